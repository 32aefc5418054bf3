"""Checkpoints through torch.distributed.checkpoint: whole or not there, by canonical parameter name.

    <save>/step_0000200/      model, optimiser (sharded files), run.json

A checkpoint is written beside its place and renamed into it by rank 0 after every rank has finished, so a
folder named step_* is always whole.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from model.init import local_rows
from model.names import tp_dim
from parallel.collectives import sum_over
from parallel.fsdp import local_tensor, sharded_parameters
from parallel.grid import Grid, device_mesh

RUN_FILE = "run.json"
STEP_FOLDER = re.compile(r"step_(\d{7,})")


def step_folder(save: Path, step: int) -> Path:
    return save / f"step_{step:07d}"


def checkpoints(save: Path) -> list[Path]:
    """Whole checkpoints under `save`, oldest first."""
    if not save.is_dir():
        return []
    found = [p for p in save.iterdir() if STEP_FOLDER.fullmatch(p.name) and (p / RUN_FILE).is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def find_checkpoint(load: Path) -> Path:
    """The checkpoint that `--load` means: that folder itself, or the newest one under it.

    Raises:
        ValueError: neither is there.
    """
    if (load / RUN_FILE).is_file():
        return load
    found = checkpoints(load)
    if not found:
        raise ValueError(f"--load {load}: no checkpoint there (neither {RUN_FILE} nor a whole step_* folder)")
    return found[-1]


def read_run_facts(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote as `facts`, with `step`."""
    return json.loads((checkpoint / RUN_FILE).read_text())


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


def whole_tensor(name: str, x: Tensor, grid: Grid, mesh: DeviceMesh) -> DTensor:
    """A parameter, or what has its shape, as the part of a canonical tensor that it is; shares storage with `x`.

    Two tp ranks that saved their parts under one name as plain tensors would load wrong without a word. The mesh is
    ordered (dp_replicate, tp, fsdp): a cut of the rows by tp and then by fsdp is contiguous.

    Args:
        x: this rank's part: a DTensor over fsdp, or plain where FSDP does nothing.
        mesh: from `checkpoint_mesh`.
    """
    dim = tp_dim(name)
    shape = list(x.shape)
    if dim is not None:
        shape[dim] *= grid.size("tp")
    placements: list[Placement] = [Replicate(), Replicate() if dim is None else Shard(dim), Shard(0)]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local_tensor(x), mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


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
            place[dim] = slice((place[dim].start or 0) + offset, (x.shape[dim] if place[dim].stop is None else place[dim].stop) + offset)
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


def _state(model: nn.Module, optimizer: torch.optim.AdamW, grid: Grid) -> dict[str, Any]:
    """Everything that is loaded in place, by canonical name. A tied weight's copies are equal, so either may be written."""
    _ensure_optimizer_state(optimizer)
    parameters = sharded_parameters(model)
    mesh = checkpoint_mesh(grid, next(iter(parameters.values())).device.type)

    def whole(name: str, x: Tensor) -> Tensor:
        return whole_tensor(name, x.detach(), grid, mesh) if x.dim() else x

    return {
        "model": {name: whole(name, p) for name, p in parameters.items()},
        "optimizer": {name: {k: whole(name, v) for k, v in optimizer.state[p].items()} for name, p in parameters.items()},
    }


def save_checkpoint(save: Path, step: int, model: nn.Module, optimizer: torch.optim.AdamW, grid: Grid, *, facts: dict[str, Any]) -> Path:
    """Write step_<step> under `save`. Collective. `facts` must be JSON and goes to run.json with the step."""
    place = step_folder(save, step)
    scratch = save / f".{place.name}.part"
    if dist.get_rank() == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    dist.barrier()
    dcp.save(_state(model, optimizer, grid), checkpoint_id=scratch)
    if dist.get_rank() == 0:
        (scratch / RUN_FILE).write_text(json.dumps(facts | {"step": step}, indent=1))
        old = save / f".{place.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if place.exists():  # the same step saved before, by a run that was resumed from an earlier one
            place.rename(old)  # two renames, so that a whole one is always there to be found or put back
        scratch.rename(place)
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return place


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: torch.optim.AdamW, grid: Grid) -> int:
    """Load weights and optimiser state in place, each rank its shard, from any layout. Collective. Returns the step."""
    state = _state(model, optimizer, grid)
    dcp.load(state, checkpoint_id=checkpoint)
    # What has a parameter's shape was filled in place; scalars come back as new objects.
    for name, parameter in sharded_parameters(model).items():
        optimizer.state[parameter].update({k: v for k, v in state["optimizer"][name].items() if not v.dim()})
    return int(read_run_facts(checkpoint)["step"])


def check_same_run(facts: dict[str, Any], wanted: dict[str, Any], free: Collection[str], checkpoint: Path) -> list[str]:
    """Refuse to go on with another model or other data than the checkpoint's.

    Args:
        facts, wanted: the checkpoint's and the run's, by flag (`--hidden-size`) or name.
        free: those that may change on purpose, such as the learning rate.

    Returns:
        A line for each of `free` that did change.

    Raises:
        ValueError: names the first other that differs or that the checkpoint does not have, with both values.
    """
    changed = []
    for name, value in wanted.items():
        if name in facts and facts[name] == value:
            continue
        if name in free:
            changed.append(f"{name} {value} (the checkpoint: {facts.get(name, 'unknown')})")
        elif name in facts:
            raise ValueError(f"{name} {value}: the checkpoint {checkpoint} was made with {facts[name]}")
        else:
            raise ValueError(f"{name} {value}: the checkpoint {checkpoint} does not say with what it was made")
    return changed
