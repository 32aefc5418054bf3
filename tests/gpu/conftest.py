"""What runs on one GPU: `make test-gpu`. Without one everything here is skipped, which pytest says."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parent.parent.parent
FIGURES: dict[str, dict[str, float]] = {}
ORDER = ("test_layers", "test_context_parallel", "test_model")  # the most valuable first
END = time.monotonic() + float(os.environ.get("GPU_TEST_SECONDS") or "inf")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.index(item.path.stem) if item.path.stem in ORDER else -1)
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.requires_gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if HERE in item.path.parents and time.monotonic() > END:
        pytest.skip("GPU_TEST_SECONDS is over")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """record(loss=..., ...) keeps a test's figures for the table."""

    def keep(**figures: float) -> None:
        FIGURES.setdefault(request.node.name, {}).update(figures)
        write_figures("running")  # a session that is cut off leaves what it had

    return keep


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if FIGURES:
        write_figures(int(exitstatus))


def write_figures(status: int | str) -> None:
    """The figures as JSON and as a table, in $OUT where it is set (the GPU machine's way back), else under
    benchmarks/results/.
    """
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
        "exit status": status,
    }
    (folder / "gpu_tests.json").write_text(json.dumps(facts | {"figures": FIGURES}, indent=1))
    lines = [f"{name}: {value}" for name, value in facts.items()]
    lines += ["", "| test | figures |", "|---|---|"]
    lines += [
        f"| {test} | {', '.join(f'{k} {v:.3g}' for k, v in figures.items())} |" for test, figures in FIGURES.items()
    ]
    (folder / "gpu_tests.md").write_text("\n".join(lines) + "\n")
