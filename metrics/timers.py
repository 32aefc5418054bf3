"""Time of a step by phase: minimum and maximum over the ranks, and the slowest rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from parallel.collectives import reduce_scatter_into

# Phase: level from which it is measured. In a wait a rank is idle for others: the rank that waits least is the slowest.
PHASES = {
    "data": 1,
    "forward-backward": 1,
    "cp wait": 1,
    "optimizer": 1,
    "eval": 1,
    "save": 1,
    "gradient reduction": 2,
    "gradient norm": 2,
}
WAITS = ("cp wait", "gradient reduction")


class Timers:
    """Seconds of each phase since the last reading.

    Level 0 measures nothing. Level 1 never waits for the device: on CUDA phases lie between events, read where the log
    waits anyway. Level 2 synchronises before and after each phase: no overlap of host and device, exact times.
    """

    def __init__(self, level: int, device: torch.device) -> None:
        self.level, self.device, self.cuda = level, device, device.type == "cuda"
        self.seconds = dict.fromkeys([name for name, needs in PHASES.items() if needs <= level], 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if PHASES[phase] > self.level:
            yield
            return
        if self.cuda and self.level == 1 and phase not in ("data", "save"):  # both run on the host
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            yield
            after.record()
            self._events.append((phase, before, after))
            return
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[phase] += time.perf_counter() - start

    def add(self, phase: str, seconds: float) -> None:
        """Count time that was measured elsewhere."""
        if phase in self.seconds:
            self.seconds[phase] += seconds

    def read(self, group: dist.ProcessGroup) -> dict[str, tuple[float, float, int]]:
        """{phase: (minimum seconds, maximum seconds, slowest rank)} since the last reading, without unused phases.

        Collective. On CUDA waits for the device, which the log has done already.

        Args:
            group: a gloo group over all ranks.
        """
        if not self.level:
            return {}
        if self._events:
            torch.cuda.synchronize(self.device)
        for phase, before, after in self._events:
            self.seconds[phase] += before.elapsed_time(after) / 1000
        self._events.clear()
        mine = torch.tensor(list(self.seconds.values()), dtype=torch.float64)
        everyone = torch.zeros(group.size(), len(mine), dtype=torch.float64)
        everyone[group.rank()] = mine
        dist.all_reduce(everyone, group=group)
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        found = {}
        for phase, column in zip(self.seconds, everyone.T, strict=True):
            if column.max() > 0:
                slowest = column.argmin() if phase in WAITS else column.argmax()
                found[phase] = (float(column.min()), float(column.max()), int(slowest))
        return found

    def watch_reductions(self, model: nn.Module) -> None:
        """At level 2 measure FSDP's gradient reductions, which then no longer overlap with computation."""
        if self.level < PHASES["gradient reduction"]:
            return
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(_TimedReduceScatter(self))  # type: ignore[arg-type]

    def _wait(self) -> None:
        if self.cuda and self.level > 1:
            torch.cuda.synchronize(self.device)


class _TimedReduceScatter:
    """Replaces FSDP2's reduce-scatter."""

    def __init__(self, timers: Timers) -> None:
        self.timers = timers

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        with self.timers("gradient reduction"):
            reduce_scatter_into(output_tensor, input_tensor, op=op, group=group)


def describe_phases(phases: dict[str, tuple[float, float, int]], *, num_steps: int) -> str:
    """One line: milliseconds a step. The slowest rank is named if the ranks differ by 10 %."""
    parts = []
    for phase, (least, most, rank) in phases.items():
        spread = f" {1000 * least / num_steps:,.1f}..{1000 * most / num_steps:,.1f}"
        parts.append(phase + spread + (f" (slowest: rank {rank})" if most > 1.1 * least else ""))
    return "ms a step, min..max over ranks: " + " | ".join(parts)
