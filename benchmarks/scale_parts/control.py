"""Start and watching: what each rank asks of the store that all ranks share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.harness import ROOT
from benchmarks.scale_parts.table import Row


def measure_group(ranks: int, *, is_lazy: bool) -> dict[str, Any]:
    """Store calls and open files a rank of one gloo group and one all-reduce."""
    command = [sys.executable, "-m", "benchmarks.scale_parts.gloo_mesh", str(ranks)]
    environment = os.environ | {"TORCH_GLOO_LAZY_INIT": str(int(is_lazy))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def gloo_groups() -> list[Row]:
    """One group over the world, connected to all ranks at once, or to a rank when it is first sent something."""
    rows = []
    for ranks in (32, 96):
        before, after = (measure_group(ranks, is_lazy=is_lazy) for is_lazy in (False, True))
        for key, what in (("calls", "store calls"), ("descriptors", "open files")):
            rows.append(Row(f"{what} a rank and gloo group", ranks, before[key], after[key]))
    return rows


PARTS: dict[str, Callable[[], list[Row]]] = {"groups": gloo_groups}
