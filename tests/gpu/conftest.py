"""What runs on one GPU: `make test-gpu`. Without one everything here is skipped, which pytest says."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parent.parent.parent
FIGURES: dict[str, dict[str, float]] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.requires_gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """record(loss=..., ...) keeps a test's figures for the table."""
    return lambda **figures: FIGURES.setdefault(request.node.name, {}).update(figures)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """The figures as JSON and as a table, in $OUT where it is set (the GPU machine's way back), else under
    benchmarks/results/.
    """
    if not FIGURES:
        return
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    facts = {
        "command": "make test-gpu",
        "commit": commit or "unknown",
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "exit status": int(exitstatus),
    }
    (folder / "gpu_tests.json").write_text(json.dumps(facts | {"figures": FIGURES}, indent=1))
    lines = [f"{name}: {value}" for name, value in facts.items()]
    lines += ["", "| test | figures |", "|---|---|"]
    lines += [
        f"| {test} | {', '.join(f'{k} {v:.3g}' for k, v in figures.items())} |" for test, figures in FIGURES.items()
    ]
    (folder / "gpu_tests.md").write_text("\n".join(lines) + "\n")
