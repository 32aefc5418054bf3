"""Copies of every rank's shards in a folder of its node, each also on the next node: a failure costs few steps.

    <--local-save-dir>/<run>-<id>/step_0000050/rank_3.<start>.<base>.<layout>.<checksum>.pt

A copy is complete when its file has this name. A step is complete when each rank's copy, all of one start of the run,
is on some node; a rank whose node lacks its copy gets it from a node that has it. Only the same layout loads copies,
and only with the checkpoint (base) that was the newest when they were written: a run that goes back does not load
what it abandoned. The checkpoints in `--save` are for all else. Nothing is synced: after a loss of power the checksum
differs, and the next node's copy is taken. nvidia-resiliency-ext is not used: its tensors must be on CUDA, and its
files are pickles, which run code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoint.files import SUMS_FILE, list_checkpoints, parse_step, step_folder
from checkpoint.resume import DOCUMENTS, SOURCES, LoadPlan, TrainState, check_same_run, free_on_resume
from checkpoint.saver import background_thread, first_cause
from checkpoint.state import get_parts
from config.schema import RunConfig
from parallel.grid import Grid
from runtime.distributed import broadcast_object, collective_timeout, run_on_rank_zero
from runtime.run import Run
from utils.errors import UserError
from utils.files import cache_key, checksum, is_trusted, name_file, read_text, replace_synced
from utils.logger import log, log_error, one_line

ID_FILE = "local_copies"  # in --save, so that the copies of a run that was removed do not return
SKIPPED = "skipped steps"  # metadata of a copy: first and last of each range in --skip-steps
NO_BASE = "0" * 32
COPY = re.compile(r"rank_([0-9]+)\.([0-9a-f]{12})\.([0-9a-f]{32})\.([0-9a-f]{16})\.([0-9a-f]{32})\.pt")
BLOCK = 1 << 26  # bytes that are sent at a time
HEADER = 256  # bytes
ATTEMPTS = 5  # to read a complete step; each one removes the corrupted copies that it finds


class Copy(NamedTuple):
    """A file with one rank's shards of one step; `start` is one of the run, `base` the newest checkpoint's identity."""

    step: int
    rank: int
    start: str
    base: str
    layout: str
    checksum: str


class LocalCopies:
    """Writes, exchanges and loads the copies of a run. Every method is collective, the constructor too.

    Args:
        local_save_dir: on this node's own disk or in its memory.
        config: says which steps are skipped, how large their batches are and what may change on resume.
        start: checkpoint that this start of the run resumes from, or whose weights it takes.
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
        config: RunConfig,
        start: LoadPlan | None,
        save: Path,
        node_size: int,
        group: dist.ProcessGroup | None = None,
        asynchronous: bool = False,
    ) -> None:
        self.model, self.optimizer, self.grid, self.save_dir = model, optimizer, grid, save
        self.config, self.group, self.asynchronous, self.node_size = config, group, asynchronous, node_size
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.after = 0 if start is None or start.weights_only else start.metadata["step"]
        base = NO_BASE if start is None or self.rank > 0 else _identify(start.checkpoint)
        run = run_on_rank_zero(lambda: _read_id(save))
        run, self.start, self.base = broadcast_object((run, uuid.uuid4().hex[:12], base))
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
        name = f"rank_{copy.rank}.{copy.start}.{copy.base}.{copy.layout}.{copy.checksum}.pt"
        return step_folder(self.folder, copy.step) / name

    def _scratch(self, copy: Copy) -> Path:
        path = self._path(copy)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.with_name(f".rank_{copy.rank}.part")

    def save(self, step: int, run_metadata: dict[str, Any]) -> None:
        """Write this rank's copy of a step, send it to the next node, remove earlier steps.

        After an error of a node's disk, as a full one, the step has no copy; a line says so.

        Args:
            run_metadata: as `Saver.save`'s.
        """
        self.wait()
        run_metadata = run_metadata | {SKIPPED: [[steps[0], steps[-1]] for steps in self.config.data.skip_steps]}
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
        """Wait for the save in the background, if there is one."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def remove(self) -> None:
        """Remove the copies, at the end of a run whose newest checkpoint is in --save."""
        self.wait()
        if self.rank % self.node_size == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, tensors: dict[str, Tensor], step: int, layout: str, run_metadata: dict[str, Any]) -> None:
        copy, base = Copy(step, self.rank, self.start, "", layout, ""), self.base
        outcome: Any = None
        try:
            if self.rank == 0 and (checkpoints := list_checkpoints(self.save_dir)):
                base = _identify(checkpoints[-1])
            with name_file(scratch := self._scratch(copy)):
                torch.save({"tensors": tensors, "run": json.dumps(run_metadata | {"step": step})}, scratch)
            copy = copy._replace(checksum=_checksum(scratch))
        except (OSError, RuntimeError) as error:
            outcome = error
        wrote = self._gather((base, outcome))
        if self._is_dropped(step, [failure for _, failure in wrote]):
            return
        copy = copy._replace(base=wrote[0][0])
        errors: list[OSError] = []
        with _collect(errors):
            scratch.rename(self._path(copy))
        if self.world_size > self.node_size:
            to, source = ((self.rank + way * self.node_size) % self.world_size for way in (1, -1))
            errors += self._exchange(copy, to, source)
        earlier: list[Path] = []  # listed before the ranks meet: one that goes on may write the next step
        with _collect(errors):
            earlier += [folder for folder in list_checkpoints(self.folder) if folder != step_folder(self.folder, step)]
        is_dropped = self._is_dropped(step, self._gather(next(iter(errors), None)))
        if not is_dropped and self.rank % self.node_size == 0:
            for folder in earlier:
                shutil.rmtree(folder, ignore_errors=True)  # what is left goes after the next save

    def _is_dropped(self, step: int, outcomes: list[Exception | None]) -> bool:
        """Whether a rank's disk failed: the step's copies are removed, earlier ones stay. Raises any other error."""
        failures = {rank: outcome for rank, outcome in enumerate(outcomes) if outcome is not None}
        if not failures:
            return False
        rank, cause = first_cause(failures)
        if not isinstance(cause, OSError):
            raise cause
        if self.rank == 0:
            log_error(f"no node-local copy of step {step}, the run goes on: rank {rank}: {one_line(cause)}")
        if self.rank % self.node_size == 0:
            shutil.rmtree(step_folder(self.folder, step), ignore_errors=True)
        return True

    def _exchange(self, sent: Copy | None, to: int, source: int | None) -> list[OSError]:
        """Send a copy to rank `to` while another one comes from rank `source`; None: only the other way.

        Return errors of this node's disk. The other ranks get as many bytes as without them, so that none waits.
        """

        def swap(out: Tensor | None, into: Tensor | None) -> None:
            both = [(dist.isend, out, to), (dist.irecv, into, source)]
            ops = [dist.P2POp(way, x, peer, self.group) for way, x, peer in both if x is not None and x.numel()]
            for work in dist.batch_isend_irecv(ops):
                work.wait()

        errors: list[OSError] = []
        size, coming, file, target = 0, 0, None, None
        with _collect(errors), ExitStack() as files:
            with _collect(errors):
                if sent:
                    file = files.enter_context(self._path(sent).open("rb"))
                    size = os.fstat(file.fileno()).st_size
            out = torch.tensor(list(json.dumps([size, sent]).ljust(HEADER).encode()), dtype=torch.uint8)
            head = torch.zeros_like(out)
            swap(out if sent else None, head if source is not None else None)
            if source is not None:
                coming, fields = json.loads(head.numpy().tobytes())
                received = Copy(*fields)
                with _collect(errors):
                    target = files.enter_context(self._scratch(received).open("wb"))
            for start in range(0, max(size, coming), BLOCK):
                out, block = (torch.zeros(max(0, min(BLOCK, n - start)), dtype=torch.uint8) for n in (size, coming))
                with _collect(errors):
                    if file is not None:
                        file.readinto(out.numpy().data)
                swap(out, block)
                with _collect(errors), name_file(self.folder):
                    if target is not None and block.numel():
                        block.numpy().tofile(target)
        if target is not None:
            with _collect(errors):
                self._scratch(received).rename(self._path(received))
        return errors

    def load(self, wanted: dict[str, Any]) -> TrainState | None:
        """Load the newest complete step in place, if it is newer than the checkpoint that this start resumes from.

        Args:
            wanted: metadata of this run, from `run_metadata`.

        Returns:
            None: there is no such step, or this run does not lead to it.

        Raises:
            UserError: the copies are of another model or other data.
        """
        if self.rank % self.node_size == 0:
            for folder in list_checkpoints(self.folder):
                if parse_step(folder) <= self.after:
                    shutil.rmtree(folder, ignore_errors=True)
        dist.barrier(group=self.group)  # no rank lists a folder while it is removed
        tensors, layout = self._tensors()
        sources, content = self._fetch(layout)
        if content is None:
            return None
        path = self._path(sources[self.rank][1])
        # Rank 0's text: other ranks do not know the position in the data.
        saved = json.loads(broadcast_object(content["run"]))
        if declined := broadcast_object(self._find_reason(saved, wanted)):
            if self.rank == 0:
                log(f"the copies of step {saved['step']} in {path.parent} are not loaded: {declined}")
            return None
        free = free_on_resume(self.config)
        changed = run_on_rank_zero(lambda: check_same_run(saved, wanted, free, path.parent)) or []
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

    def _find_reason(self, saved: dict[str, Any], wanted: dict[str, Any]) -> str:
        """Why this run does not lead to the copies' step, or ""."""

        def skipped(ranges: Any) -> set[int]:
            return {n for first, *_, last in ranges for n in range(max(first, self.after + 1), min(last, step) + 1)}

        step = saved["step"]
        if saved["data"].get("batches") != self.config.training.batches.to_json(step):
            return "their steps had other batches"
        if any(saved.get(name) != wanted.get(name) for name in (DOCUMENTS, SOURCES)):
            return "their steps had other data"
        if skipped(saved[SKIPPED]) != skipped([steps[0], steps[-1]] for steps in self.config.data.skip_steps):
            return "--skip-steps names other steps of theirs"
        return ""

    def _fetch(self, layout: str) -> tuple[list[tuple[int, Copy]], dict[str, Any] | None]:
        """Bring this rank's copy of the newest complete step to its node. Return each rank's source; the content."""
        for _ in range(ATTEMPTS):
            sources = self._find_sources(layout)
            if not sources:
                return [], None
            sent = [copy for rank, (source, copy) in enumerate(sources) if self.rank == source != rank]
            if any(self._gather(sum(not self._is_intact(copy) for copy in sent))):
                continue
            for rank, (source, copy) in enumerate(sources):
                if self.rank == source != rank:
                    self._exchange(copy, rank, None)
                elif self.rank == rank != source:
                    self._exchange(None, rank, source)  # its error leaves no file, or a corrupted one
            own = sources[self.rank][1]
            if all(self._gather(self._is_intact(own))):
                return sources, torch.load(self._path(own), map_location="cpu", weights_only=True, mmap=True)
        if self.rank == 0:
            log_error(f"the copies in {self.folder} are not loaded: corrupted or unreadable in {ATTEMPTS} attempts")
        return [], None

    def _is_intact(self, copy: Copy) -> bool:
        """Whether a copy on this node has its checksum; else it is removed."""
        with suppress(OSError):
            if _checksum(self._path(copy)) == copy.checksum:
                return True
        with suppress(OSError):
            self._path(copy).unlink()
        return False

    def _find_sources(self, layout: str) -> list[tuple[int, Copy]]:
        """For each rank its copy of the newest complete step, and a rank whose node holds the copy, itself if possible.

        Empty: no step newer than the checkpoint, and of its branch of the run, is complete.
        """
        gathered = self._gather((layout, self._list_copies()))
        holders: dict[tuple[int, str], dict[int, list[tuple[int, Copy]]]] = {}  # by step and start, then by rank
        for holder, (_, copies) in enumerate(gathered):
            for copy in copies:
                is_of_branch = copy.step > self.after and copy.base == self.base
                if is_of_branch and copy.rank < self.world_size and copy.layout == gathered[copy.rank][0]:
                    holders.setdefault((copy.step, copy.start), {}).setdefault(copy.rank, []).append((holder, copy))
        complete = [key for key, copies in holders.items() if len(copies) == self.world_size]
        # Ranks of one node hold the same files: those that others need are spread over them.
        return [
            next((one for one in held if one[0] == rank), held[rank % len(held)])
            for rank, held in sorted(holders[max(complete)].items() if complete else [])
        ]

    def _list_copies(self) -> list[Copy]:
        """The complete copies on this node."""
        found = []
        with suppress(OSError):  # an unreadable folder: the next node's copies are taken
            for folder in list_checkpoints(self.folder):
                found += [(folder, COPY.fullmatch(path.name)) for path in folder.iterdir()]
        return [Copy(parse_step(folder), int(name[1]), *name.groups()[1:]) for folder, name in found if name]

    def _gather(self, item: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, item, group=self.group)
        return gathered


def build_local_copies(
    run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, start: LoadPlan | None
) -> LocalCopies | None:
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
        config=run.config,
        start=start,
        save=run.paths.checkpoints,
        node_size=run.ranks.launch.local_world_size,
        group=dist.new_group(backend="gloo", timeout=timeout, group_desc="local copies"),
        asynchronous=flags.async_save,
    )


def _read_id(save: Path) -> str:
    """The identity of the run whose checkpoints are in `save`, made at its first start; a copied folder has another."""
    path = save / ID_FILE
    if not path.exists():
        save.mkdir(parents=True, exist_ok=True)
        replace_synced(path, uuid.uuid4().hex[:12])
    return cache_key(run=read_text(path), save=str(save.resolve()))[:12]


@contextmanager
def _collect(errors: list[OSError]) -> Iterator[None]:
    """Add an OSError to `errors`, whose owner tells the other ranks first."""
    try:
        yield
    except OSError as error:
        errors.append(error)


def _identify(checkpoint: Path) -> str:
    """The identity of a checkpoint, of whose files its list has the checksums; unreadable: one that no copy has."""
    with suppress(OSError):
        return _checksum(checkpoint / SUMS_FILE)
    return uuid.uuid4().hex


def _checksum(path: Path) -> str:
    return checksum(path)[1].partition(":")[2]
