"""Builds the next epoch's index in a process of its own, at the lowest priority, before the epoch begins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def start_child(**index: Any) -> subprocess.Popen:
    """Start `build_index` of these arguments.

    Not in a thread, which would hold the rank's interpreter; not forked, for a child would keep the rank's connections
    and its GPU's memory open.
    """
    command = [sys.executable, "-m", "data.ahead", json.dumps(index, default=str)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def build_index(
    *, prefix: str, split: list[float], which: int, packing: dict[str, Any], cache_path: str, epoch: int
) -> None:
    """Build an epoch's index in the cache; waits for another process that builds the same."""
    from data.build import open_dataset  # it imports this file
    from data.indexed_dataset import IndexedDataset
    from data.packing import PackingOptions

    options = PackingOptions(**packing)
    dataset = open_dataset(
        IndexedDataset(Path(prefix)), options, split=tuple(split), which=which, cache_path=Path(cache_path), pad_token=0
    )
    dataset.epoch(epoch)


if __name__ == "__main__":
    os.nice(19)
    build_index(**json.loads(sys.argv[1]))
