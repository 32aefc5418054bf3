"""Copies of every rank's shards in a folder of its node, each also on the next node: a failure costs few steps.

    <--local-save-dir>/<run>-<id>/step_0000050/rank_3.<start>.<layout>.<checksum>.pt

A copy is complete when its file has this name. A step is complete when each rank's copy, all of one start of the run,
is on some node; a rank whose node lacks its copy gets it from a node that has it. Only the same layout loads copies;
the checkpoints in `--save` are for all else. Nothing is synced: after a loss of power the checksum differs, and the
next node's copy is taken. nvidia-resiliency-ext is not used: its tensors must be on CUDA, and its files are pickles,
which run code.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoint.files import list_checkpoints, parse_step, step_folder
from checkpoint.resume import DOCUMENTS, FREE_ON_RESUME, SOURCES, LoadPlan, TrainState, check_same_run
from checkpoint.saver import background_thread
from checkpoint.state import get_parts
from data.batch_schedule import BatchSchedule
from parallel.grid import Grid
from runtime.distributed import broadcast_object, collective_timeout, run_on_rank_zero
from runtime.run import Run
from utils.errors import UserError
from utils.files import cache_key, checksum, is_trusted, name_file, read_text, replace_synced
from utils.logger import log

ID_FILE = "local_copies"  # in --save, so that the copies of a run that was removed do not return
COPY = re.compile(r"rank_([0-9]+)\.([0-9a-f]{12})\.([0-9a-f]{16})\.([0-9a-f]{32})\.pt")
BLOCK = 1 << 26  # bytes that are sent at a time
HEADER = 256  # bytes


class Copy(NamedTuple):
    """A file with one rank's shards of one step. Attributes: start: of the run, shared by its ranks only."""

    step: int
    rank: int
    start: str
    layout: str
    checksum: str


class LocalCopies:
    """Writes, exchanges and loads the copies of a run. Every method is collective, the constructor too.

    Args:
        local_save_dir: on this node's own disk or in its memory.
        save: folder of the run's checkpoints, which all nodes share.
        node_size: ranks of a node; with several nodes a copy also goes to the node after its own.
        group: gloo, over all ranks, for nothing else: an asynchronous save communicates over it.
        asynchronous: write and send what was copied to host memory, in a background thread; the next save waits for it.
    """

    def __init__(
        self,
        local_save_dir: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        grid: Grid,
        *,
        save: Path,
        node_size: int,
        group: dist.ProcessGroup | None = None,
        asynchronous: bool = False,
    ) -> None:
        self.model, self.optimizer, self.grid, self.save_dir = model, optimizer, grid, save
        self.group, self.asynchronous, self.node_size = group, asynchronous, node_size
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        run, self.start = broadcast_object((run_on_rank_zero(lambda: _read_id(save)), uuid.uuid4().hex[:12]))
        self.folder = local_save_dir / f"{save.parent.name}-{run}"
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_trusted(self.folder.lstat(), local_save_dir):
            raise UserError(f"--local-save-dir: {self.folder} is another user's: give a folder of your own")
        self._staged: dict[str, Tensor] = {}
        self._background = background_thread(next(model.parameters()).device)
        self._pending: Future[None] | None = None

    def _tensors(self) -> tuple[dict[str, Tensor], str]:
        """This rank's shards by name, which share storage with model and optimizer; a hash of the layout."""
        parts = get_parts(self.model, self.optimizer)
        tensors = {f"{key}/{name}": part.local for key, named in parts.items() for name, part in named.items()}
        shards = [(name, tuple(x.shape), x.dtype) for name, x in tensors.items()]
        return tensors, cache_key(shards=shards, sizes=asdict(self.grid.sizes))

    def _path(self, copy: Copy) -> Path:
        name = f"rank_{copy.rank}.{copy.start}.{copy.layout}.{copy.checksum}.pt"
        return step_folder(self.folder, copy.step) / name

    def _scratch(self, copy: Copy) -> Path:
        path = self._path(copy)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.with_name(f".rank_{copy.rank}.part")

    def save(self, step: int, run_metadata: dict[str, Any]) -> None:
        """Write this rank's copy of a step, send it to the next node, remove earlier steps.

        Args:
            run_metadata: as `Saver.save`'s.

        Raises:
            OSError: of this save or of the asynchronous one before.
        """
        self.wait()
        tensors, layout = self._tensors()
        if not self.asynchronous:
            self._write({name: x.cpu().contiguous() for name, x in tensors.items()}, step, layout, run_metadata)
            return
        for name, x in tensors.items():
            if name not in self._staged:
                self._staged[name] = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
            self._staged[name].copy_(x, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies must be complete before the next step writes
        self._pending = self._background.submit(self._write, self._staged, step, layout, run_metadata)

    def wait(self) -> None:
        """Wait for the save in the background, if there is one. Raises OSError: it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def remove(self) -> None:
        """Remove the copies, at the end of a run whose newest checkpoint is in --save."""
        self.wait()
        if self.rank % self.node_size == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, tensors: dict[str, Tensor], step: int, layout: str, run_metadata: dict[str, Any]) -> None:
        checkpoints = list_checkpoints(self.save_dir) if self.rank == 0 else []
        newest = parse_step(checkpoints[-1]) if checkpoints else 0
        copy = Copy(step, self.rank, self.start, layout, "")
        scratch = self._scratch(copy)
        with name_file(scratch):
            torch.save(
                {"tensors": tensors, "run": json.dumps(run_metadata | {"step": step}), "checkpoint": newest}, scratch
            )
        copy = copy._replace(checksum=_checksum(scratch))
        scratch.rename(self._path(copy))
        if self.world_size > self.node_size:
            to, source = ((self.rank + way * self.node_size) % self.world_size for way in (1, -1))
            self._exchange(copy, to, source)
        dist.barrier(group=self.group)  # the step is complete, so that earlier ones can go
        if self.rank % self.node_size == 0:
            for folder in list_checkpoints(self.folder):
                if folder != step_folder(self.folder, step):
                    shutil.rmtree(folder, ignore_errors=True)  # what is left goes after the next save

    def _exchange(self, sent: Copy | None, to: int, source: int | None) -> None:
        """Send a copy to rank `to` while another one comes from rank `source`; None: only the other way."""

        def swap(out: Tensor | None, into: Tensor | None) -> None:
            both = [(dist.isend, out, to), (dist.irecv, into, source)]
            ops = [dist.P2POp(way, x, peer, self.group) for way, x, peer in both if x is not None]
            for work in dist.batch_isend_irecv(ops):
                work.wait()

        size = self._path(sent).stat().st_size if sent else 0
        out = torch.tensor(list(json.dumps([size, sent]).ljust(HEADER).encode()), dtype=torch.uint8)
        head = torch.zeros_like(out)
        swap(out if sent else None, head if source is not None else None)
        with ExitStack() as files:
            if sent:
                file = files.enter_context(self._path(sent).open("rb"))
            coming = 0
            if source is not None:
                coming, fields = json.loads(head.numpy().tobytes())
                scratch = self._scratch(received := Copy(*fields))
                files.enter_context(name_file(scratch))
                target = files.enter_context(scratch.open("wb"))
            for start in range(0, max(size, coming), BLOCK):
                block = torch.empty(max(0, min(BLOCK, coming - start)), dtype=torch.uint8)
                swap(
                    torch.from_numpy(np.fromfile(file, np.uint8, BLOCK)) if start < size else None,
                    block if start < coming else None,
                )
                if start < coming:
                    block.numpy().tofile(target)
        if source is not None:
            scratch.rename(self._path(received))

    def load(self, wanted: dict[str, Any], batches: BatchSchedule, start: LoadPlan | None) -> TrainState | None:
        """Load the newest complete step in place, if it is newer than the checkpoint that `start` names.

        Args:
            wanted: metadata of this run, from `run_metadata`.
            batches: of this run, resolved with `start`.

        Returns:
            None: there is no such step, or this run does not lead to it.

        Raises:
            UserError: the copies are of another model or other data.
        """
        after = 0 if start is None or start.weights_only else parse_step(start.checkpoint)
        tensors, layout = self._tensors()
        sources = self._find_sources(layout, after)
        while sources and any(self._gather(self._remove_corrupted(sources))):
            sources = self._find_sources(layout, after)
        if not sources:
            return None
        for rank, (source, copy) in enumerate(sources):
            if self.rank == source != rank:
                self._exchange(copy, rank, None)
            elif self.rank == rank != source:
                self._exchange(None, rank, source)
        path = self._path(sources[self.rank][1])
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # Rank 0's text: other ranks do not know the position in the data.
        text, checkpoint = broadcast_object((content["run"], content["checkpoint"]))
        saved, declined = json.loads(text), ""
        if checkpoint > after:
            declined = f"step {checkpoint} was in {self.save_dir} when they were made"
        elif saved["data"].get("batches") != batches.to_json(saved["step"]):
            declined = "their steps had other batches"
        elif any(saved.get(name) != wanted.get(name) for name in (DOCUMENTS, SOURCES)):
            declined = "their steps had other data"
        if declined := broadcast_object(declined):
            if self.rank == 0:
                log(f"the copies of step {saved['step']} in {path.parent} are not loaded: {declined}")
            return None
        changed = run_on_rank_zero(lambda: check_same_run(saved, wanted, FREE_ON_RESUME, path.parent)) or []
        for name, x in tensors.items():
            x.copy_(content["tensors"][name])
        notes = [
            f"rank {rank}: copy from rank {source}'s node" for rank, (source, _) in enumerate(sources) if source != rank
        ]
        return TrainState(
            checkpoint=path.parent,
            first_step=saved["step"],
            notes=notes,
            changed=changed,
            data=saved["data"],
            validation_due=saved.get("validation_due") is True,
        )

    def _remove_corrupted(self, sources: list[tuple[int, Copy]]) -> int:
        """Remove the copies whose source is this rank and whose checksum differs. Return their number."""
        paths = [
            self._path(copy)
            for source, copy in sources
            if source == self.rank and _checksum(self._path(copy)) != copy.checksum
        ]
        for path in paths:
            path.unlink()
        return len(paths)

    def _find_sources(self, layout: str, after: int) -> list[tuple[int, Copy]]:
        """For each rank its copy of the newest complete step, and a rank whose node holds the copy, itself if possible.

        Empty: no step newer than `after` is complete.
        """
        gathered = self._gather((layout, self._list_copies()))
        holders: dict[tuple[int, str], dict[int, list[tuple[int, Copy]]]] = {}  # by step and start, then by rank
        for holder, (_, copies) in enumerate(gathered):
            for copy in copies:
                if copy.step > after and copy.rank < self.world_size and copy.layout == gathered[copy.rank][0]:
                    holders.setdefault((copy.step, copy.start), {}).setdefault(copy.rank, []).append((holder, copy))
        complete = [key for key, copies in holders.items() if len(copies) == self.world_size]
        # Ranks of one node hold the same files: those that others need are spread over them.
        return [
            next((one for one in held if one[0] == rank), held[rank % len(held)])
            for rank, held in sorted(holders[max(complete)].items() if complete else [])
        ]

    def _list_copies(self) -> list[Copy]:
        """The complete copies on this node."""
        found = [
            (folder, COPY.fullmatch(path.name)) for folder in list_checkpoints(self.folder) for path in folder.iterdir()
        ]
        return [Copy(parse_step(folder), int(name[1]), *name.groups()[1:]) for folder, name in found if name]

    def _gather(self, item: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, item, group=self.group)
        return gathered


def build_local_copies(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer) -> LocalCopies | None:
    """The copies of a run; None without --local-save-dir, and where nothing is trained. Collective."""
    flags = run.config.checkpoint
    if flags.local_save_dir is None or run.config.training.eval_only:
        return None
    timeout = collective_timeout(run.config.parallel)
    return LocalCopies(
        Path(flags.local_save_dir),
        model,
        optimizer,
        run.ranks.grid,
        save=run.paths.checkpoints,
        node_size=run.ranks.launch.local_world_size,
        group=dist.new_group(backend="gloo", timeout=timeout, group_desc="local copies"),
        asynchronous=flags.async_save,
    )


def _read_id(save: Path) -> str:
    """The identity of the run whose checkpoints are in `save`, made at its first start."""
    path = save / ID_FILE
    if not path.exists():
        save.mkdir(parents=True, exist_ok=True)
        replace_synced(path, uuid.uuid4().hex[:12])
    return read_text(path)


def _checksum(path: Path) -> str:
    return checksum(path)[1].partition(":")[2]
