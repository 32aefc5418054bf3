"""Steps whose loss or gradient norm is not finite: skip or stop, and what `tools/replay.py` needs to run them again."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoint.files import step_folder
from checkpoint.saver import Saver
from config.schema import TrainingConfig
from parallel.collectives import sum_over
from parallel.fsdp import local_tensor
from parallel.grid import Grid, coordinates_of
from runtime.distributed import broadcast_object
from utils.files import replace_synced
from utils.logger import log, one_line
from utils.names import redact


class NonFiniteError(FloatingPointError):
    """A loss or gradient norm is not finite. Raised on every rank.

    Attributes:
        step: counted from 1, as in the log.
        is_updated: whether the weights were updated before the step was found.
    """

    def __init__(self, step: int, loss: float, grad_norm: float, details: str = "", *, is_updated: bool = True) -> None:
        super().__init__(f"step {step}: loss {loss}, gradient norm {grad_norm}{details}")
        self.step, self.loss, self.grad_norm, self.details, self.is_updated = step, loss, grad_norm, details, is_updated


def find_nonfinite_gradients(model: nn.Module) -> list[str]:
    """Names of parameters whose gradient is not finite on this rank."""
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    return [name for name, grad in gradients if not bool(local_tensor(grad).isfinite().all())]


def gather_reports(model: nn.Module, cross_entropy: Tensor, grid: Grid) -> list[dict[str, Any]]:
    """What is not finite on each rank. Collective over the world; before gradients are cleared.

    Args:
        cross_entropy: this rank's part of the loss.
    """
    names = find_nonfinite_gradients(model)
    own = {
        "rank": grid.global_rank,
        "host": platform.node(),
        "coordinates": coordinates_of(grid.sizes, grid.global_rank),
        "own_loss_is_finite": math.isfinite(float(cross_entropy)),
        "bad_gradients": len(names),
        "first_bad_gradients": names[:16],
    }
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, own)
    return reports


def describe_reports(reports: list[dict[str, Any]]) -> str:
    """Which ranks had a loss or gradients that are not finite, for the line that ends the run."""
    if not reports:
        return "found after its update"
    found = [r for r in reports if not r["own_loss_is_finite"]]
    if found:
        return "loss not finite on rank " + ", ".join(f"{r['rank']} ({r['host']})" for r in found[:8])
    found = [r for r in reports if r["bad_gradients"]]
    if not found:
        return "each rank's own part is finite"
    named = (f"{r['rank']} ({r['host']}: {r['first_bad_gradients'][0]})" for r in found[:8])
    return "gradients not finite on rank " + ", ".join(named)


@dataclass
class NonFiniteGuard:
    """Decides what happens to a step that is not finite, before its update.

    Args:
        training: --on-nonfinite and --max-skipped-in-a-row.
        checks_each_step: read loss and norm in every step. Otherwise, on CUDA with --on-nonfinite stop, the log finds
            such a step later, after its update, and no step waits for the device.
        folder: gets a file for each such step.
        metadata: of the run, for these files: what a replay needs.
    """

    training: TrainingConfig
    checks_each_step: bool
    model: nn.Module
    grid: Grid
    folder: Path
    metadata: dict[str, Any]
    skipped: int = field(default=0, init=False)
    skipped_in_a_row: int = field(default=0, init=False)

    def should_update(self, step: int, loss: Tensor, grad_norm: Tensor, cross_entropy: Tensor) -> bool:
        """Whether the step, counted from 1, may update the weights. Collective over the world.

        Args:
            loss, grad_norm: of the whole grid.
            cross_entropy: this rank's part of the loss.

        Raises:
            NonFiniteError: the run ends here.
        """
        if not self.checks_each_step or not self._is_nonfinite_somewhere(loss, grad_norm):
            self.skipped_in_a_row = 0
            return True
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        reports = gather_reports(self.model, cross_entropy, self.grid)
        details = self.record(step, float(loss), float(grad_norm), reports)
        can_skip = self.training.on_nonfinite == "skip"
        limit = self.training.max_skipped_in_a_row
        if can_skip and self.skipped_in_a_row <= limit:
            if dist.get_rank() == 0:
                log(f"step {step}: skipped, loss {float(loss)}, gradient norm {float(grad_norm)}{details}")
            return False
        if can_skip:
            details += f"; {self.skipped_in_a_row} such steps in a row (--max-skipped-in-a-row {limit})"
        raise NonFiniteError(step, float(loss), float(grad_norm), details, is_updated=False)

    def _is_nonfinite_somewhere(self, *values: Tensor) -> bool:
        """What one replica sees must stop all. Waits for the device. Collective."""
        found = torch.stack([~v.isfinite() for v in values]).any().to(torch.int32)
        for axis in ("loss", "pp", "tp"):  # all ranks
            sum_over(found, self.grid.group(axis))
        return bool(found)

    def record(self, step: int, loss: float, grad_norm: float, reports: list[dict[str, Any]]) -> str:
        """Write the step's file on rank 0. Returns details for the message."""
        path = self.folder / f"step_{step:07d}.json"
        details = f"; {describe_reports(reports)}"
        if dist.get_rank() == 0:
            record = {"step": step, **self.metadata, "loss": loss, "grad_norm": grad_norm, "ranks": reports}
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_synced(path, redact(json.dumps(record, indent=1)) + "\n")
            except OSError as error:
                return f"{details}; its record could not be written to {path}: {error.strerror or error}"
        return f"{details}; tools/replay.py {path} runs it again"

    def explain(self, error: NonFiniteError, saver: Saver, metadata: dict[str, Any]) -> NonFiniteError:
        """The error with what a replay needs: a record of the step, the weights before it. Collective.

        Args:
            saver, metadata: of the run's checkpoints.
        """
        if error.is_updated:  # found by the log: only the record can be kept
            details = self.record(error.step, error.loss, error.grad_norm, [])
        else:
            details = error.details + self._save_weights(error.step - 1, saver, metadata)
        return NonFiniteError(error.step, error.loss, error.grad_norm, details)

    def _save_weights(self, step: int, saver: Saver, metadata: dict[str, Any]) -> str:
        """Save the weights after `step`, apart from the checkpoints of the run. Returns where, for a message."""
        folder = self.folder / "checkpoints"
        try:
            saver.wait()
            if broadcast_object(step_folder(saver.save_dir, step).exists()):
                return ""
            replay_saver = saver.into(folder)
            replay_saver.save(step, metadata | {"data": {}})
            replay_saver.wait()
        except OSError as save_error:  # the same on every rank; the step remains why the run ends
            return f"; the weights before it could not be saved: {one_line(save_error)}"
        return f"; the weights before it are in {step_folder(folder, step)}"
