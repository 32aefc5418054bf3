"""The tensors of a checkpoint by canonical name: this rank's shards, as parts of whole tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from model.gpt import GPT
from model.init import local_rows
from model.names import tp_dim
from parallel.collectives import sum_over
from parallel.fsdp import local_tensor, sharded_parameters
from parallel.grid import Grid, device_mesh


def _allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Allocate the state that the optimizer allocates at its first step, to load into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if optimizer.state[parameter]:
                continue
            is_adamw = "betas" in group
            moments = ("exp_avg", "exp_avg_sq") if is_adamw else ("momentum",)
            steps = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)} if is_adamw else {}
            optimizer.state[parameter] = steps | {key: torch.zeros_like(parameter) for key in moments}


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
class Part:
    """This rank's shard of a tensor, and the shape of the tp rank's parameter; `()` for a scale of 8-bit layers."""

    name: str
    local: Tensor
    shape: tuple[int, ...]


def get_parts(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, dict[str, Part]]:
    """Return this rank's shards: {"weight", "fp8" or a key of the optimizer: {canonical name: part}}."""
    parameters = sharded_parameters(model)
    parts = {"weight": {name: Part(name, local_tensor(p.detach()), tuple(p.shape)) for name, p in parameters.items()}}
    if optimizer is not None:
        _allocate_state(optimizer)
        for name, parameter in parameters.items():
            for key, x in optimizer.state[parameter].items():
                parts.setdefault(key, {})[name] = Part(name, local_tensor(x.detach()), tuple(x.shape))
        scales = {n: x for m in model.modules() if isinstance(m, GPT) for n, x in m.precision.state(m).items()}
        if scales:  # equal on every rank that has them
            parts["fp8"] = {name: Part(name, x, ()) for name, x in scales.items()}
    return parts


def named_tensors(parts: Mapping[str, Mapping[str, Part]], grid: Grid, mesh: DeviceMesh) -> dict[str, Tensor]:
    """Return the tensors to save, or to load in place, by their names in a checkpoint."""
    state = {}
    for key, named in parts.items():
        for name, part in named.items():
            place = {"weight": f"model.{name}", "fp8": f"fp8.{name}"}.get(key, f"optimizer.{name}.{key}")
            state[place] = whole_tensor(name, part.local, part.shape, grid, mesh) if part.shape else part.local
    return state


def trained_state(model: nn.Module, optimizer: torch.optim.Optimizer | None, grid: Grid) -> dict[str, Tensor]:
    """Return the tensors for torch.distributed.checkpoint by name; they share storage with model and optimizer.

    Args:
        optimizer: None leaves out its state.
    """
    parts = get_parts(model, optimizer)
    device = next(iter(parts["weight"].values())).local.device
    return named_tensors(parts, grid, checkpoint_mesh(grid, device.type))


def select_own(parts: Mapping[str, Mapping[str, Part]], model: nn.Module, grid: Grid) -> dict[str, dict[str, Part]]:
    """Return the parts that this rank writes: of equal copies one, those of the replicas by size.

    The ranks of a stage hold the same tensors and compute the same choice, without communication.
    """
    written = [0] * grid.size("dp_replicate")  # bytes
    stages = [module for module in model.modules() if isinstance(module, GPT)]
    own: dict[str, dict[str, Part]] = {}
    for key, named in parts.items():
        for number, (name, part) in enumerate(named.items()):
            if part.shape:
                replica = written.index(min(written))
                written[replica] += part.local.nbytes
                is_own = replica == grid.rank("dp_replicate") and part.local.numel() > 0
                if tp_dim(name) is None:
                    is_own = is_own and number % grid.size("tp") == grid.rank("tp")
            else:
                is_own = grid.rank("stage") == 0
            if is_own and not (stages and all(stage.is_copy(name) for stage in stages)):
                own.setdefault(key, {})[name] = part
    return own
