"""A run's weights and optimiser state in checkpoints of torch.distributed.checkpoint, by canonical parameter name.

Saved under any layout, loaded under any other. `checkpoint/files.py` says what lies in the folder.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from checkpoint.files import (
    DamagedCheckpoint,
    checksums,
    clear_left_overs,
    damage,
    prune,
    publish,
    read_checksums,
    read_run_facts,
    scratch_folder,
    step_folder,
    sync,
    unlisted,
)
from checkpoint.reader import SafeReader
from model.gpt import GPT
from model.init import local_rows
from model.names import tp_dim
from parallel.collectives import sum_over
from parallel.fsdp import local_tensor, sharded_parameters
from parallel.grid import Grid, device_mesh
from utils.errors import UserError


def _ensure_optimizer_state(optimizer: torch.optim.AdamW) -> None:
    """Give AdamW the state it makes at its first step, so that there is something to load into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def whole_tensor(name: str, x: Tensor, shape: Sequence[int], grid: Grid, mesh: DeviceMesh) -> DTensor:
    """This rank's part of a parameter, or of what has its shape, as the part of a canonical tensor that it is; shares storage.

    Two tp ranks that saved their parts under one name as plain tensors would load wrong without a word. The mesh is
    ordered (dp_replicate, tp, fsdp): a cut of the rows by tp and then by fsdp is contiguous.

    Args:
        x: plain, this rank's shard.
        shape: of its tp rank's parameter.
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
    return device_mesh(grid, ("dp_replicate", "tp", "fsdp"), device_type)


def whole_tensors(parts: Mapping[str, Tensor], grid: Grid) -> dict[str, Tensor]:
    """Every named tensor of the model, whole, in host memory, on every rank: for checks and small models. Collective.

    Args:
        parts: this rank's, by canonical name, each with its parameter's shape.
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
    """What a rank holds of a tensor of the state: its shard, and the shape of its tp rank's parameter."""

    name: str
    local: Tensor
    shape: tuple[int, ...]


def _parts(model: nn.Module, optimizer: torch.optim.AdamW | None) -> dict[str, dict[str, _Part]]:
    """This rank's part of the state: {"weight" or the optimiser's key: {canonical name: part}}."""
    parameters = sharded_parameters(model)
    parts = {"weight": {name: _Part(name, local_tensor(p.detach()), tuple(p.shape)) for name, p in parameters.items()}}
    if optimizer is not None:
        _ensure_optimizer_state(optimizer)
        for name, parameter in parameters.items():
            for key, x in optimizer.state[parameter].items():
                parts.setdefault(key, {})[name] = _Part(name, local_tensor(x.detach()), tuple(x.shape))
    if optimizer is not None:
        scales = {n: x for m in model.modules() if isinstance(m, GPT) for n, x in m.precision.state(m).items()}
        if scales:
            parts["fp8"] = {
                name: _Part(name, x, ()) for name, x in scales.items()
            }  # the same on every rank that has them
    return parts


def _state(parts: Mapping[str, Mapping[str, _Part]], grid: Grid, mesh: DeviceMesh) -> dict[str, Any]:
    """Everything that is saved, or loaded in place, by canonical name. A tied weight's copies are equal, so either may be written."""
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
        state["optimizer"] = {name: {key: whole[key][name] for key in whole} for name in state["model"]}
    return state


def trained_state(model: nn.Module, optimizer: torch.optim.AdamW | None, grid: Grid) -> dict[str, Any]:
    """Weights and optimiser state as torch.distributed.checkpoint saves and loads them; shares storage with both.

    Args:
        optimizer: None leaves its state out.
    """
    parts = _parts(model, optimizer)
    device = next(iter(parts["weight"].values())).local.device
    return _state(parts, grid, checkpoint_mesh(grid, device.type))


def _first_cause(error: CheckpointException) -> tuple[int, BaseException]:
    """The lowest rank that failed inside the library, and why; one that says what the system said comes first.

    On a full disk a rank may get the system's error, or PyTorch's archive writer, which says only that it could not write.
    """
    rank = min(error.failures, key=lambda r: (not isinstance(error.failures[r][0], OSError), r))
    cause = error.failures[rank][0]
    if isinstance(cause, RuntimeError) and "PytorchStreamWriter" in str(cause):
        cause = OSError(f"{' '.join(str(cause).split())[:200]} (no space left on device?)")
    return rank, cause


class Saver:
    """Writes a run's checkpoints, one at a time. Every method is collective: all ranks call it in the same order.

    Args:
        save: folder of the checkpoints, shared by all nodes.
        group: over all ranks, for host memory (gloo), used by nothing else: an asynchronous save talks over it.
        keep: how many checkpoints stay; 0: all.
        asynchronous: write a copy in the background while training goes on; a second save waits for the first.
        tell: called on rank 0 with each checkpoint that is whole; in the background where saving is.
    """

    def __init__(
        self,
        save: Path,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        grid: Grid,
        *,
        group: dist.ProcessGroup | None = None,
        keep: int = 0,
        asynchronous: bool = False,
        tell: Callable[[Path], None] | None = None,
    ) -> None:
        self.save_dir, self.model, self.optimizer, self.grid, self.group = save, model, optimizer, grid, group
        self.keep, self.asynchronous, self.tell = keep, asynchronous, tell
        self._copies: dict[
            tuple[str, str], Tensor
        ] = {}  # kept: new (pinned) memory at every save would cost more than the copy
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, facts: dict[str, Any]) -> None:
        """Write step_<step>; in the background, return when the state has been copied.

        Args:
            facts: JSON, for run.json, beside the step.

        Raises:
            OSError: on every rank, what could not be written, of this save or of the one before.
        """
        self.wait()
        parts = _parts(self.model, self.optimizer)
        if not self.asynchronous:
            self._write(parts, step, facts)
            return
        parts = {key: {name: self._copy(key, part) for name, part in named.items()} for key, named in parts.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies must be complete before the next step writes
        # Not a daemon: a run that ends for a reason of its own still finishes the save under way.
        self._thread = threading.Thread(target=self._write_in_background, args=(parts, step, facts), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until the save under way, if any, is whole.

        Raises:
            OSError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _copy(self, key: str, part: _Part) -> _Part:
        place = (key, part.name)
        if place not in self._copies:
            self._copies[place] = torch.empty_like(part.local, device="cpu", pin_memory=part.local.is_cuda)
        return replace(part, local=self._copies[place].copy_(part.local, non_blocking=True))

    def _write_in_background(self, parts: dict[str, dict[str, _Part]], step: int, facts: dict[str, Any]) -> None:
        try:
            self._write(parts, step, facts)
        except BaseException as error:  # raised to the caller by `wait`
            self._error = error

    def _write(self, parts: dict[str, dict[str, _Part]], step: int, facts: dict[str, Any]) -> None:
        device = next(iter(parts["weight"].values())).local.device
        state = _state(parts, self.grid, checkpoint_mesh(self.grid, device.type))
        place, scratch = step_folder(self.save_dir, step), scratch_folder(self.save_dir, step)
        self._on_rank_zero(lambda: self._make_empty(scratch))
        try:
            dcp.save(state, storage_writer=dcp.FileSystemWriter(scratch), process_group=self.group)
            sums = self._check_own_files(scratch)
            self._on_rank_zero(lambda: self._publish(scratch, place, facts | {"step": step}, sums))
        except (CheckpointException, OSError) as error:
            if dist.get_rank() == 0:
                shutil.rmtree(scratch, ignore_errors=True)  # a full disk gets its room back
            if isinstance(error, CheckpointException):
                rank, cause = _first_cause(error)
                if isinstance(cause, OSError):
                    where = cause.filename or scratch / f"__{rank}_*.distcp"
                    raise OSError(f"cannot write {where}: rank {rank}: {cause.strerror or cause}") from error
            raise

    def _make_empty(self, scratch: Path) -> None:
        self.save_dir.mkdir(parents=True, exist_ok=True)
        clear_left_overs(self.save_dir)
        scratch.mkdir()

    def _check_own_files(self, scratch: Path) -> dict[str, list]:
        """Sync this rank's files and read them once; every rank's checksums, on rank 0."""
        rank = dist.get_rank()
        mine = [p for p in scratch.iterdir() if p.name.startswith(f"__{rank}_")]
        mine += [scratch / ".metadata"] if rank == 0 else []
        failure, own = None, {}
        try:
            for path in mine:
                sync(path)  # the library syncs before its last bytes have left the buffer
            own = checksums(mine)
        except OSError as error:
            failure = str(error)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (failure, own), group=self.group)
        for number, (failure, _) in enumerate(gathered):
            if failure:
                raise OSError(f"cannot write {scratch}: rank {number}: {failure}")
        return {name: value for _, sums in gathered for name, value in sums.items()}

    def _publish(self, scratch: Path, place: Path, facts: dict[str, Any], sums: dict[str, list]) -> None:
        publish(scratch, place, facts=facts, sums=sums)
        if self.tell is not None:
            self.tell(place)
        prune(self.save_dir, self.keep, place)

    def _on_rank_zero(self, work: Callable[[], None]) -> None:
        """`work()` on rank 0; its OSError on every rank."""
        failure: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                work()
            except OSError as error:
                failure = [f"{error.filename or self.save_dir}: {error.strerror or error}"]
        dist.broadcast_object_list(failure, src=0, group=self.group)
        if failure[0] is not None:
            raise OSError(f"cannot write {failure[0]}")


# ---------------------------------------------------------------------------------------------------
# Loading


def stored_names(checkpoint: Path) -> frozenset[str]:
    """What a checkpoint holds; nothing where its index cannot be read, which loading will say."""
    try:
        return frozenset(SafeReader(checkpoint).read_metadata().state_dict_metadata)
    except Exception:
        return frozenset()


def _own_damage(checkpoint: Path) -> list[str]:
    """Of this rank's share of the files, what is wrong with them: a line each."""
    try:
        sums = read_checksums(checkpoint)
    except ValueError as error:
        return [str(error)]
    rank = dist.get_rank()
    return damage(checkpoint, sorted(sums)[rank :: dist.get_world_size()], sums) + (
        unlisted(checkpoint, sums) if rank == 0 else []
    )


def load_checkpoint(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.AdamW | None,
    grid: Grid,
    *,
    group: dist.ProcessGroup | None = None,
) -> int:
    """Load weights and optimiser state in place, each rank its shard, from any layout. Collective. Returns the step.

    Every file's checksum is verified meanwhile, each by one rank.

    Args:
        optimizer: None loads the weights alone.
        group: as `Saver`'s.

    Raises:
        DamagedCheckpoint: a file is missing or is not as it was written; the weights are then no longer what they were.
        ValueError: it lacks a tensor of this model, or holds it in another shape.
    """
    state = trained_state(model, optimizer, grid)
    if (
        "fp8" in state
    ):  # layers that the writer had in bf16 start with fresh scales; the banner says that the flag changed
        stored = stored_names(checkpoint)
        state["fp8"] = {name: scale for name, scale in state["fp8"].items() if f"fp8.{name}" in stored}
        if not state["fp8"]:
            del state["fp8"]
    failure: CheckpointException | None = None
    reader = SafeReader(checkpoint)
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(_own_damage, checkpoint)
        try:
            dcp.load(state, storage_reader=reader, process_group=group)
        except CheckpointException as error:  # what damage did to the library is told as damage
            failure = error
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, checked.result(), group=group)
    lines = list(dict.fromkeys(line for part in found for line in part))
    if lines:
        raise DamagedCheckpoint(lines[0] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else "")) from failure
    if failure is not None:
        rank, cause = _first_cause(failure)
        raise UserError(f"cannot load {checkpoint}: rank {rank}: {reader.refused or cause}") from failure
    if optimizer is not None:
        # What has a parameter's shape was filled in place; scalars come back as new objects.
        for name, parameter in sharded_parameters(model).items():
            optimizer.state[parameter].update({k: v for k, v in state["optimizer"][name].items() if not v.dim()})
    return int(read_run_facts(checkpoint)["step"])
