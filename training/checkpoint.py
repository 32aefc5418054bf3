"""Checkpoints through torch.distributed.checkpoint: whole or not there, by canonical parameter name.

    <save>/step_0000200/      model, optimiser (sharded files), run.json

A checkpoint is written beside its place and renamed into it by rank 0 after every rank has finished, so a
folder named step_* is always whole.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from parallel.fsdp import sharded_parameters

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


def _state(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    """Everything that is loaded in place, by canonical name."""
    _ensure_optimizer_state(optimizer)
    parameters = sharded_parameters(model)
    return {
        "model": {name: p.detach() for name, p in parameters.items()},
        "optimizer": {name: dict(optimizer.state[p]) for name, p in parameters.items()},
    }


def save_checkpoint(save: Path, step: int, model: nn.Module, optimizer: torch.optim.AdamW, *, facts: dict[str, Any]) -> Path:
    """Write step_<step> under `save`. Collective. `facts` must be JSON and goes to run.json with the step."""
    place = step_folder(save, step)
    scratch = save / f".{place.name}.part"
    if dist.get_rank() == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    dist.barrier()
    dcp.save(_state(model, optimizer), checkpoint_id=scratch)
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


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: torch.optim.AdamW) -> int:
    """Load weights and optimiser state in place, each rank its shard. Collective. Returns the step."""
    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=checkpoint)
    # Tensors were filled in place; scalars come back as new objects.
    for name, parameter in sharded_parameters(model).items():
        optimizer.state[parameter].update(state["optimizer"][name])
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
