"""Save and load weights and optimizer state with torch.distributed.checkpoint, by canonical parameter name.

A checkpoint of any parallel layout loads into any other. `checkpoint/files.py` describes the folder.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.planner import ReadItem

from checkpoint.files import (
    INDEX_FILE,
    Checksums,
    CorruptedCheckpoint,
    OpenedFile,
    compute_checksums,
    find_corrupted,
    find_replaced,
    find_unlisted,
    keep_during,
    prune,
    publish,
    purge,
    read_checksums,
    read_run_metadata,
    remove_partial,
    scratch_folder,
    step_folder,
)
from checkpoint.index import PackedIndex, build_index, data_file, describe_chunks
from checkpoint.reader import DATA_FILE, SafeReader, UnsafeCheckpoint, read_index
from checkpoint.state import Part, checkpoint_mesh, get_parts, named_tensors, select_own, trained_state
from parallel.fsdp import local_tensor
from parallel.grid import Grid
from utils.errors import CollectiveError, UserError
from utils.files import sync, write_synced

T = TypeVar("T")


def first_cause(failures: Mapping[int, BaseException]) -> tuple[int, BaseException]:
    """Return the rank that failed and its error: the lowest rank with an OSError, else the lowest rank.

    On a full disk a rank gets an OSError, or an error of PyTorch's archive writer without the system's reason.
    """
    rank = min(failures, key=lambda r: (not isinstance(failures[r], OSError), r))
    cause = failures[rank]
    if isinstance(cause, RuntimeError) and "PytorchStreamWriter" in str(cause):
        cause = OSError(f"{' '.join(str(cause).split())[:200]} (no space left on device?)")
    return rank, cause


def from_rank_zero(action: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Return rank 0's `action()` on every rank, or raise its error there; an OSError as CollectiveError. Collective."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = action()
        except OSError as error:
            box[1] = CollectiveError(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0, group=group)
    if box[1] is not None:
        raise box[1]
    return box[0]


def _gather(work: Callable[[], Any], group: dist.ProcessGroup | None) -> list[Any]:
    """Return every rank's `work()`, or its exception, on rank 0; [] on the others. Collective."""
    try:
        own = work()
    except Exception as error:
        own = error
    gathered: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(own, gathered or None, dst=0, group=group)
    return gathered


def _find_failures(outcomes: Sequence[Any]) -> dict[int, BaseException]:
    return {rank: outcome for rank, outcome in enumerate(outcomes) if isinstance(outcome, BaseException)}


def background_thread(device: torch.device) -> ThreadPoolExecutor:
    """One thread for saves. A new thread's device is GPU 0: every rank of a node would open a CUDA context there."""
    choose_device = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    return ThreadPoolExecutor(1, "checkpoint", initializer=choose_device)


class Saver:
    """Write the checkpoints of a run, one at a time. Every method is collective: all ranks call it in the same order.

    Args:
        save: folder of the checkpoints, shared by all nodes.
        group: gloo, over all ranks, for nothing else: a save in the background communicates over it.
        keep: number of newest checkpoints that stay; 0: all.
        keep_every: checkpoints of its multiples, in steps, stay too; 0: none.
        asynchronous: write a copy of the state in a background thread; the next save waits for it.
        on_saved: called on rank 0 with each published checkpoint, in the thread that saves.
    """

    def __init__(
        self,
        save: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        grid: Grid,
        *,
        group: dist.ProcessGroup | None = None,
        keep: int = 0,
        keep_every: int = 0,
        asynchronous: bool = False,
        on_saved: Callable[[Path], None] | None = None,
    ) -> None:
        self.save_dir, self.model, self.optimizer, self.grid, self.group = save, model, optimizer, grid, group
        self.keep, self.keep_every, self.asynchronous, self.on_saved = keep, keep_every, asynchronous, on_saved
        # Kept: allocating (pinned) memory at every save takes longer than the copy.
        self._copies: dict[tuple[str, str], Tensor] = {}
        # Python waits for the thread at its exit: a run that ends with an error still finishes the save in progress.
        self._background = background_thread(next(model.parameters()).device)
        self._pending: Future[None] | None = None
        self._doomed: list[Path] = []  # on rank 0: checkpoints to remove
        self._chunks = ""  # of this rank, from `describe_chunks`
        # On rank 0: the digest of each rank's chunks, and their index. Equal chunks have an equal index.
        self._index: tuple[list[str], bytes] = [], b""

    def into(self, folder: Path) -> Saver:
        """A saver of the same state into another folder, of which one checkpoint stays."""
        return Saver(folder, self.model, self.optimizer, self.grid, group=self.group, keep=1)

    def save(self, step: int, run_metadata: dict[str, Any]) -> None:
        """Write step_<step>. An asynchronous save returns when the state is copied.

        Args:
            run_metadata: JSON for run.json; `step` is added.

        Raises:
            OSError: on every rank, of this save or of the asynchronous one before.
        """
        self.wait()
        parts = select_own(get_parts(self.model, self.optimizer), self.model, self.grid)
        if not self.asynchronous:
            self._write(parts, step, run_metadata)
            self._pending = self._background.submit(purge, self._doomed)
            return
        parts = {key: {name: self._copy(key, part) for name, part in named.items()} for key, named in parts.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies must be complete before the next step writes
        self._pending = self._background.submit(self._write_and_purge, parts, step, run_metadata)

    def wait(self) -> None:
        """Wait for the save in the background, if there is one, and for the removal of old checkpoints.

        Raises:
            OSError: the save failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _copy(self, key: str, part: Part) -> Part:
        place = (key, part.name)
        if place not in self._copies:
            self._copies[place] = torch.empty_like(part.local, device="cpu", pin_memory=part.local.is_cuda)
        return replace(part, local=self._copies[place].copy_(part.local, non_blocking=True))

    def _write_and_purge(self, parts: dict[str, dict[str, Part]], step: int, run_metadata: dict[str, Any]) -> None:
        self._write(parts, step, run_metadata)
        purge(self._doomed)  # the other ranks' saves have ended

    def _write(self, parts: dict[str, dict[str, Part]], step: int, run_metadata: dict[str, Any]) -> None:
        """No rank plans for others. Rank 0 makes the index from what each rank wrote, where that is new."""
        mesh = checkpoint_mesh(self.grid, "cpu" if self.asynchronous else next(self.model.parameters()).device.type)
        state = named_tensors(parts, self.grid, mesh)
        place, scratch = step_folder(self.save_dir, step), scratch_folder(self.save_dir, step)
        try:
            from_rank_zero(lambda: self._make_empty(scratch), self.group)
            written, chunks = _gather(lambda: self._write_file(state, scratch), self.group), []
            if from_rank_zero(lambda: self._is_index_stale(written), self.group):
                chunks = _gather(lambda: self._chunks, self.group)
            metadata = run_metadata | {"step": step}
            from_rank_zero(lambda: self._publish(scratch, place, metadata, written, chunks), self.group)
        except CollectiveError as error:
            if dist.get_rank() == 0:
                shutil.rmtree(scratch, ignore_errors=True)  # frees space on a full disk
            raise CollectiveError(f"cannot write {error}") from error

    def _make_empty(self, scratch: Path) -> None:
        self.save_dir.mkdir(parents=True, exist_ok=True)
        remove_partial(self.save_dir)
        scratch.mkdir()

    def _write_file(self, state: dict[str, Tensor], scratch: Path) -> tuple[str, Checksums]:
        """Write this rank's file, sync it and read it once. Return the digest of its chunks, and its checksum."""
        rank = dist.get_rank()
        writer, planner = dcp.FileSystemWriter(scratch), dcp.DefaultSavePlanner()
        writer.set_up_storage_writer(False, rank=rank, use_collectives=False)
        planner.set_up_planner(state)
        plan = writer.prepare_local_plan(planner.create_local_plan())
        self._chunks = describe_chunks(plan, writer.write_data(plan, planner).value())
        path = scratch / data_file(rank)
        sync(path)  # the library syncs before it flushes its last bytes
        return hashlib.sha256(self._chunks.encode()).hexdigest(), compute_checksums([path])

    def _is_index_stale(self, written: list[Any]) -> bool:
        """Whether a rank wrote other chunks than the index has.

        Raises:
            CollectiveError: a rank could not write.
        """
        if failures := _find_failures(written):
            rank, cause = first_cause(failures)
            if isinstance(cause, OSError):
                where = cause.filename or self.save_dir / data_file(rank)
                raise CollectiveError(f"{where}: rank {rank}: {cause.strerror or cause}") from cause
            raise cause
        return self._index[0] != [digest for digest, _ in written]

    def _publish(
        self, scratch: Path, place: Path, run_metadata: dict[str, Any], written: list[Any], chunks: list[str]
    ) -> None:
        if chunks:
            self._index = [digest for digest, _ in written], build_index(chunks)
        write_synced(scratch / INDEX_FILE, self._index[1])
        sums = {name: value for _, own in written for name, value in own.items()}
        publish(scratch, place, run_metadata=run_metadata, sums=sums | compute_checksums([scratch / INDEX_FILE]))
        if self.on_saved is not None:
            self.on_saved(place)
        self._doomed = prune(self.save_dir, self.keep, place, keep_every=self.keep_every)


# ---------------------------------------------------------------------------------------------------
# Loading


def _raise_corrupted(lines: Sequence[str]) -> None:
    if lines:
        raise CorruptedCheckpoint(lines[0] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""))


def _read_head(checkpoint: Path, opened: set[OpenedFile]) -> tuple[PackedIndex, Checksums, int]:
    """Return the index, the data files' checksums and the step. Verify the other files."""
    try:
        sums = read_checksums(checkpoint, opened)
        data = {name: value for name, value in sums.items() if DATA_FILE.fullmatch(name)}
        errors = find_corrupted(checkpoint, sorted(sums.keys() - data.keys()), sums, opened)
        _raise_corrupted(errors + find_unlisted(checkpoint, sums))
        step = read_run_metadata(checkpoint, opened)["step"]
        return PackedIndex.pack(read_index(checkpoint / INDEX_FILE, opened)), data, step
    except UnsafeCheckpoint as error:
        raise UserError(f"cannot load {checkpoint}: {error}") from error
    except OSError as error:  # another process removed the folder
        raise CorruptedCheckpoint(f"{error.filename or checkpoint}: {error.strerror or error}") from error


def _assign_files(checkpoint: Path, names: Collection[str], wanted: list[Any]) -> dict[str, int]:
    """Return the rank that verifies each file: the one that loads most of the file, for which that is no second read.

    Args:
        wanted: bytes to load by file, of each rank; or its exception.

    Raises:
        UserError: the checkpoint lacks a tensor, or has it in another shape.
    """
    if failures := _find_failures(wanted):
        rank, cause = first_cause(failures)
        raise UserError(f"cannot load {checkpoint}: rank {rank}: {cause}") from cause
    ranks = {name: number % len(wanted) for number, name in enumerate(sorted(names))}  # for files that no rank loads
    most = dict.fromkeys(names, 0)
    for rank, sizes in enumerate(wanted):
        for name, size in sizes.items():
            if size > most.get(name, size):
                ranks[name], most[name] = rank, size
    return ranks


def _read_files(
    reader: SafeReader, items: Mapping[str, Sequence[ReadItem]], state: Mapping[str, Tensor], verified: Checksums
) -> tuple[list[str], Exception | None, set[OpenedFile]]:
    """Load and verify files. Return a line for each corrupted one, the first other error, and what was opened."""
    errors, failure = [], None
    for name in dict.fromkeys((*items, *verified)):
        try:
            reader.load_file(name, items.get(name, ()), state, verified.get(name))
        except CorruptedCheckpoint as error:
            errors.append(str(error))
        except OSError as error:
            line = f"{reader.path / name}: {error.strerror or error}"
            errors += [line] if name in verified else []
            failure = failure or UserError(line)
        except UnsafeCheckpoint as error:
            failure = failure or error
    return errors, failure, reader.opened


def _check_loaded(checkpoint: Path, outcomes: list[Any], opened: Collection[OpenedFile]) -> None:
    """Raise what `load_checkpoint` raises, from each rank's `_read_files`."""
    failures = _find_failures(outcomes)
    done = {rank: outcome for rank, outcome in enumerate(outcomes) if rank not in failures}
    _raise_corrupted([line for lines, _, _ in done.values() for line in lines])
    replaced = find_replaced([*opened, *(file for _, _, files in done.values() for file in files)])
    if replaced:  # not corrupted: never quarantined
        raise UserError(
            f"cannot load {checkpoint}: another process replaced {replaced[0]} while it was loaded; start again"
        )
    failures |= {rank: failure for rank, (_, failure, _) in done.items() if failure is not None}
    if failures:
        rank, cause = first_cause(failures)
        raise UserError(f"cannot load {checkpoint}: rank {rank}: {cause}") from cause


def _share_with_replicas(state: Mapping[str, Tensor], grid: Grid, device: torch.device) -> None:
    """Copy what dp_replicate 0 loaded to the other replicas. Groups carry tensors of `device` only."""
    if grid.size("dp_replicate") == 1:
        return
    for x in state.values():
        local = local_tensor(x)
        if local.numel():
            sent = local.to(device)
            dist.broadcast(sent, group=grid.group("dp_replicate"), group_src=0)
            local.copy_(sent)


def load_checkpoint(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    grid: Grid,
    *,
    group: dist.ProcessGroup | None = None,
    opened: Collection[OpenedFile] = (),
) -> int:
    """Load weights and optimizer state in place, each rank its shard, from any layout. Collective. Return the step.

    Rank 0 reads the index for all. The ranks of dp_replicate 0 read the tensors, and send them to the other replicas.
    Every file's checksum is verified by one rank, which reads the file once.

    Args:
        optimizer: None loads only weights.
        group: as `Saver`'s.
        opened: files of the checkpoint that rank 0 read before, as of `open_file`.

    Raises:
        CorruptedCheckpoint: a file is missing or corrupted. Weights may be overwritten then.
        UserError: the checkpoint lacks a tensor of this model, or has it in another shape; or a file was replaced
            meanwhile.
    """
    state, rank, seen = trained_state(model, optimizer, grid), dist.get_rank(), set(opened)
    with keep_during(checkpoint) if rank == 0 else nullcontext():
        index, sums, step = from_rank_zero(lambda: _read_head(checkpoint, seen), group)
        # Layers that the checkpoint has in bf16 start with fresh scales; the banner prints the changed flag.
        state = {name: x for name, x in state.items() if name in index.tensors or not name.startswith("fp8.")}
        reader = SafeReader(checkpoint, index.select(state))
        items: dict[str, list[ReadItem]] = {}

        def plan_reads() -> dict[str, int]:
            if grid.rank("dp_replicate") == 0:
                for item in create_default_local_load_plan(state, reader.read_metadata()).items:
                    items.setdefault(reader.find(item.storage_index).relative_path, []).append(item)
            return {name: sum(reader.find(i.storage_index).length for i in own) for name, own in items.items()}

        wanted = _gather(plan_reads, group)
        verifiers = from_rank_zero(lambda: _assign_files(checkpoint, sums, wanted), group)
        verified = {name: sums[name] for name, verifier in verifiers.items() if verifier == rank}
        outcomes = _gather(lambda: _read_files(reader, items, state, verified), group)
        from_rank_zero(lambda: _check_loaded(checkpoint, outcomes, seen), group)
    _share_with_replicas(state, grid, next(model.parameters()).device)
    return step
