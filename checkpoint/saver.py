"""Save and load weights and optimizer state with torch.distributed.checkpoint, by canonical parameter name.

A checkpoint of any parallel layout loads into any other. `checkpoint/files.py` describes the folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from checkpoint.files import (
    Checksums,
    CorruptedCheckpoint,
    OpenedFile,
    compute_checksums,
    find_corrupted,
    find_replaced,
    find_unlisted,
    prune,
    publish,
    read_checksums,
    read_run_metadata,
    remove_partial,
    scratch_folder,
    step_folder,
)
from checkpoint.reader import SafeReader, UnsafeCheckpoint
from model.gpt import GPT
from model.init import local_rows
from model.names import tp_dim
from parallel.collectives import sum_over
from parallel.fsdp import local_tensor, sharded_parameters
from parallel.grid import Grid, device_mesh
from training.optimizer import allocate_state
from utils.errors import CollectiveError, UserError
from utils.files import sync


def whole_tensor(name: str, x: Tensor, shape: Sequence[int], grid: Grid, mesh: DeviceMesh) -> DTensor:
    """Return a DTensor of the canonical tensor in which `x` is this rank's shard; shares storage.

    A plain tensor of one name on two tp ranks would load wrong silently. The mesh is ordered (dp_replicate, tp, fsdp):
    rows sharded by tp and then by fsdp are contiguous.

    Args:
        x: this rank's shard of a parameter, or of optimizer state with its shape.
        shape: of the parameter on this tp rank, before fsdp shards it.
        mesh: from `checkpoint_mesh`.
    """
    dim = tp_dim(name)
    whole = list(shape)
    if dim is not None:
        whole[dim] *= grid.size("tp")
    placements: list[Placement] = [Replicate(), Replicate() if dim is None else Shard(dim), Shard(0)]
    stride = torch.empty(whole, device="meta").stride()
    return DTensor.from_local(x, mesh, placements, run_check=False, shape=torch.Size(whole), stride=stride)


def checkpoint_mesh(grid: Grid, device_type: str) -> DeviceMesh:
    """Return the mesh over which checkpoints shard tensors."""
    return device_mesh(grid, ("dp_replicate", "tp", "fsdp"), device_type)


def whole_tensors(parts: Mapping[str, Tensor], grid: Grid) -> dict[str, Tensor]:
    """Gather every tensor of the model in host memory on every rank, for tests and small models. Collective.

    Args:
        parts: this rank's tensors by canonical name, each with its parameter's shape.
    """
    mine = {}
    for name, x in parts.items():
        local, dim = local_tensor(x.detach()), tp_dim(name)
        shape = list(x.shape)
        place = [slice(*local_rows(x)), *(slice(None) for _ in shape[1:])]
        if dim is not None:
            shape[dim] *= grid.size("tp")
            offset = grid.rank("tp") * x.shape[dim]
            place[dim] = slice(
                (place[dim].start or 0) + offset,
                (x.shape[dim] if place[dim].stop is None else place[dim].stop) + offset,
            )
        full = local.new_zeros(shape)
        full[tuple(place)] = local
        if isinstance(x, DTensor):
            sum_over(full, grid.group("fsdp"))
        if dim is not None:
            sum_over(full, grid.group("tp"))
        mine[name] = full.cpu()
    stages: list[Any] = [None] * grid.size("pp")
    dist.all_gather_object(stages, mine, group=grid.group("pp"))
    return {name: x for stage in stages for name, x in stage.items()}


@dataclass(frozen=True)
class _Part:
    """This rank's shard of a tensor, and the shape of the tp rank's parameter; `()` for a scale of 8-bit layers."""

    name: str
    local: Tensor
    shape: tuple[int, ...]


def _parts(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, dict[str, _Part]]:
    """Return this rank's shards: {"weight", "fp8" or a key of the optimizer: {canonical name: part}}."""
    parameters = sharded_parameters(model)
    parts = {"weight": {name: _Part(name, local_tensor(p.detach()), tuple(p.shape)) for name, p in parameters.items()}}
    if optimizer is not None:
        allocate_state(optimizer)
        for name, parameter in parameters.items():
            for key, x in optimizer.state[parameter].items():
                parts.setdefault(key, {})[name] = _Part(name, local_tensor(x.detach()), tuple(x.shape))
        scales = {n: x for m in model.modules() if isinstance(m, GPT) for n, x in m.precision.state(m).items()}
        if scales:  # equal on every rank that has them
            parts["fp8"] = {name: _Part(name, x, ()) for name, x in scales.items()}
    return parts


def _state(parts: Mapping[str, Mapping[str, _Part]], grid: Grid, mesh: DeviceMesh) -> dict[str, Any]:
    """Return the state dict to save, or to load in place. Copies of a tied weight are equal: either is written."""
    whole = {
        key: {
            name: whole_tensor(name, p.local, p.shape, grid, mesh) if p.shape else p.local for name, p in named.items()
        }
        for key, named in parts.items()
    }
    state: dict[str, Any] = {"model": whole.pop("weight")}
    if "fp8" in whole:
        state["fp8"] = whole.pop("fp8")
    if whole:
        state["optimizer"] = {
            name: {key: named[name] for key, named in whole.items() if name in named} for name in state["model"]
        }
    return state


def trained_state(model: nn.Module, optimizer: torch.optim.Optimizer | None, grid: Grid) -> dict[str, Any]:
    """Return the state dict for torch.distributed.checkpoint; shares storage with model and optimizer.

    Args:
        optimizer: None leaves out its state.
    """
    parts = _parts(model, optimizer)
    device = next(iter(parts["weight"].values())).local.device
    return _state(parts, grid, checkpoint_mesh(grid, device.type))


def first_cause(error: CheckpointException) -> tuple[int, BaseException]:
    """Return the rank that failed and its error: the lowest rank with an OSError, else the lowest rank.

    On a full disk a rank gets an OSError, or an error of PyTorch's archive writer without the system's reason.
    """
    rank = min(error.failures, key=lambda r: (not isinstance(error.failures[r][0], OSError), r))
    cause = error.failures[rank][0]
    if isinstance(cause, RuntimeError) and "PytorchStreamWriter" in str(cause):
        cause = OSError(f"{' '.join(str(cause).split())[:200]} (no space left on device?)")
    return rank, cause


def _background_thread(device: torch.device) -> ThreadPoolExecutor:
    """One thread for saves. A new thread's device is GPU 0: every rank of a node would open a CUDA context there."""
    choose_device = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    return ThreadPoolExecutor(1, "checkpoint", initializer=choose_device)


class Saver:
    """Write the checkpoints of a run, one at a time. Every method is collective: all ranks call it in the same order.

    Args:
        save: folder of the checkpoints, shared by all nodes.
        group: gloo, over all ranks, for nothing else: a save in the background communicates over it.
        keep: number of newest checkpoints that stay; 0: all.
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
        asynchronous: bool = False,
        on_saved: Callable[[Path], None] | None = None,
    ) -> None:
        self.save_dir, self.model, self.optimizer, self.grid, self.group = save, model, optimizer, grid, group
        self.keep, self.asynchronous, self.on_saved = keep, asynchronous, on_saved
        # Kept: allocating (pinned) memory at every save takes longer than the copy.
        self._copies: dict[tuple[str, str], Tensor] = {}
        # Python waits for the thread at its exit: a run that ends with an error still finishes the save in progress.
        self._background = _background_thread(next(model.parameters()).device)
        self._pending: Future[None] | None = None

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
        parts = _parts(self.model, self.optimizer)
        if not self.asynchronous:
            self._write(parts, step, run_metadata)
            return
        parts = {key: {name: self._copy(key, part) for name, part in named.items()} for key, named in parts.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies must be complete before the next step writes
        self._pending = self._background.submit(self._write, parts, step, run_metadata)

    def wait(self) -> None:
        """Wait for the save in the background, if there is one.

        Raises:
            OSError: the save failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _copy(self, key: str, part: _Part) -> _Part:
        place = (key, part.name)
        if place not in self._copies:
            self._copies[place] = torch.empty_like(part.local, device="cpu", pin_memory=part.local.is_cuda)
        return replace(part, local=self._copies[place].copy_(part.local, non_blocking=True))

    def _write(self, parts: dict[str, dict[str, _Part]], step: int, run_metadata: dict[str, Any]) -> None:
        device = next(iter(parts["weight"].values())).local.device
        state = _state(parts, self.grid, checkpoint_mesh(self.grid, device.type))
        place, scratch = step_folder(self.save_dir, step), scratch_folder(self.save_dir, step)
        self._on_rank_zero(lambda: self._make_empty(scratch))
        try:
            dcp.save(state, storage_writer=dcp.FileSystemWriter(scratch), process_group=self.group)
            sums = self._checksum_files(scratch)
            self._on_rank_zero(lambda: self._publish(scratch, place, run_metadata | {"step": step}, sums))
        except (CheckpointException, OSError) as error:
            if dist.get_rank() == 0:
                shutil.rmtree(scratch, ignore_errors=True)  # frees space on a full disk
            if isinstance(error, CheckpointException):
                rank, cause = first_cause(error)
                if isinstance(cause, OSError):
                    where = cause.filename or scratch / f"__{rank}_*.distcp"
                    raise CollectiveError(f"cannot write {where}: rank {rank}: {cause.strerror or cause}") from error
            raise

    def _make_empty(self, scratch: Path) -> None:
        self.save_dir.mkdir(parents=True, exist_ok=True)
        remove_partial(self.save_dir)
        scratch.mkdir()

    def _checksum_files(self, scratch: Path) -> Checksums:
        """Sync this rank's files and read them once. Return the checksums of every rank's files."""
        rank = dist.get_rank()
        mine = [p for p in scratch.iterdir() if p.name.startswith(f"__{rank}_")]
        mine += [scratch / ".metadata"] if rank == 0 else []
        failure, own = None, {}
        try:
            for path in mine:
                sync(path)  # the library syncs before it flushes its last bytes
            own = compute_checksums(mine)
        except OSError as error:
            failure = str(error)
        gathered = _all_gather((failure, own), self.group)
        for number, (failure, _) in enumerate(gathered):
            if failure:
                raise CollectiveError(f"cannot write {scratch}: rank {number}: {failure}")
        return {name: value for _, sums in gathered for name, value in sums.items()}

    def _publish(self, scratch: Path, place: Path, run_metadata: dict[str, Any], sums: Checksums) -> None:
        publish(scratch, place, run_metadata=run_metadata, sums=sums)
        if self.on_saved is not None:
            self.on_saved(place)
        prune(self.save_dir, self.keep, place)

    def _on_rank_zero(self, work: Callable[[], None]) -> None:
        """Call `work()` on rank 0; raise its OSError on every rank."""
        failure: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                work()
            except OSError as error:
                failure = [f"{error.filename or self.save_dir}: {error.strerror or error}"]
        dist.broadcast_object_list(failure, src=0, group=self.group)
        if failure[0] is not None:
            raise CollectiveError(f"cannot write {failure[0]}")


# ---------------------------------------------------------------------------------------------------
# Loading


def _verify_share(checkpoint: Path, opened: set[OpenedFile]) -> list[str]:
    """Verify this rank's share of the files. Return an error line for each corrupted file."""
    rank = dist.get_rank()
    try:
        sums = read_checksums(checkpoint, opened)
        errors = find_corrupted(checkpoint, sorted(sums)[rank :: dist.get_world_size()], sums, opened)
        return errors + find_unlisted(checkpoint, sums) if rank == 0 else errors
    except CorruptedCheckpoint as error:
        return [str(error)]
    except OSError as error:  # another process removed the folder
        return [f"{checkpoint}: {error.strerror or error}"]


def _all_gather(item: Any, group: dist.ProcessGroup | None) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, item, group=group)
    return gathered


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

    Meanwhile every file's checksum is verified, each by one rank.

    Args:
        optimizer: None loads only weights.
        group: as `Saver`'s.
        opened: files of the checkpoint that this rank read before, as of `open_file`.

    Raises:
        CorruptedCheckpoint: a file is missing, corrupted, or replaced meanwhile. Weights may be overwritten then.
        UserError: the checkpoint lacks a tensor of this model, or has it in another shape.
    """
    state = trained_state(model, optimizer, grid)
    scales = state.pop("fp8", {})
    reader, refused = SafeReader(checkpoint), ""
    try:
        stored = reader.read_metadata().state_dict_metadata
        # Layers that the checkpoint has in bf16 start with fresh scales; the banner prints the changed flag.
        known = {name: scale for name, scale in scales.items() if f"fp8.{name}" in stored}
        state |= {"fp8": known} if known else {}
    except OSError as error:
        refused = f"{error.filename}: {error.strerror or error}"
    except UnsafeCheckpoint as error:
        refused = str(error)
    refusals = [line for line in _all_gather(refused, group) if line]
    failure: CheckpointException | None = None
    checked: set[OpenedFile] = set()
    with ThreadPoolExecutor(1) as pool:
        verified = pool.submit(_verify_share, checkpoint, checked)
        try:
            if not refusals:
                dcp.load(state, storage_reader=reader, process_group=group)
        except CheckpointException as error:  # corruption, where it is the cause, is raised first
            failure = error
        errors = verified.result()
    everyone_checked = [file for part in _all_gather(checked, group) for file in part]
    try:
        step = read_run_metadata(checkpoint, reader.opened)["step"]
    except CorruptedCheckpoint as error:
        errors.append(str(error))
    replaced = find_replaced([*opened, *reader.opened, *everyone_checked])
    gathered = _all_gather((errors, replaced), group)
    for name in sorted({name for _, names in gathered for name in names}):  # not corrupted: never quarantined
        refusals.append(f"another process replaced {name} while it was loaded; start again")
    lines = list(dict.fromkeys(line for found, _ in gathered for line in found))
    if lines:
        raise CorruptedCheckpoint(lines[0] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else "")) from failure
    if refusals:
        raise UserError(f"cannot load {checkpoint}: {refusals[0]}")
    if failure is not None:
        rank, cause = first_cause(failure)
        raise UserError(f"cannot load {checkpoint}: rank {rank}: {cause}") from failure
    if optimizer is not None:
        # Tensors of a parameter's shape are loaded in place; scalars are new objects.
        for name, parameter in sharded_parameters(model).items():
            optimizer.state[parameter].update({k: v for k, v in state["optimizer"][name].items() if not v.dim()})
    return step
