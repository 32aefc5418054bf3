"""`--profile`: PyTorch's trace and memory of some steps, a file a rank (docs/operate.md says how to read them)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from utils.logger import log

TOP_ROWS = 60


class StepProfiler:
    """Traces the steps of a range; does nothing around others.

    Args:
        steps: from 1; None: none.
        folder: gets trace_rank<r>.json.gz for Perfetto or chrome://tracing, memory_rank<r>.txt with the operators that
            allocate most, and on CUDA memory_rank<r>.pickle for PyTorch's memory viewer.
    """

    def __init__(self, steps: range | None, *, folder: Path, rank: int, device: torch.device) -> None:
        self.steps, self.folder, self.rank, self.cuda = steps or range(0), folder, rank, device.type == "cuda"
        self.profile: profile | None = None

    def before(self, step: int) -> None:
        if step not in self.steps or self.profile is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.cuda:
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
        self.profile = profile(activities=activities, profile_memory=True, record_shapes=True)
        self.profile.start()

    def after(self, step: int, *, is_last: bool = False) -> Path | None:
        """Write the trace after the last step of the range or of the run. Returns its file."""
        if self.profile is None or (step + 1 in self.steps and not is_last):
            return None
        if self.cuda:
            torch.cuda.synchronize()
        traced, self.profile = self.profile, None
        traced.stop()
        place = self.folder / f"trace_rank{self.rank}.json.gz"
        traced.export_chrome_trace(str(place))
        column = "self_device_memory_usage" if self.cuda else "self_cpu_memory_usage"
        table = traced.key_averages(group_by_input_shape=True).table(sort_by=column, row_limit=TOP_ROWS)
        (self.folder / f"memory_rank{self.rank}.txt").write_text(table, encoding="utf-8")
        if self.cuda:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory_rank{self.rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        if self.rank == 0:
            log(f"profile in {self.folder}")
        return place
