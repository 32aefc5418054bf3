"""Every benchmark and its JSON, a round each: figures of one round mean nothing, but what does not start measures
nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT, environment

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
COMMANDS = {
    "train_step": ["benchmarks/train_step.py", "--rounds", "1", "--steps-per-round", "1", "--only", "2"],
    "model_parallel": ["benchmarks/model_parallel.py", "--rounds", "1", "--only", "tp"],
    "checkpoint": [*TORCHRUN, "benchmarks/checkpoint.py", "--rounds", "1", "--hidden", "128"],
}


@pytest.mark.full
def test_the_gpu_benchmark_in_small(tmp_path: Path) -> None:
    """All of it that needs no Transformer Engine, on the CPU."""
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--rounds", "1", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    assert {"step", "fp8", "packed", "ring", "length"} <= figures.keys() and figures["step"][
        "torch / bare PyTorch, bshd"
    ] > 0


@pytest.mark.full
@pytest.mark.parametrize("name", COMMANDS)
def test_it_runs_and_writes_its_figures(tmp_path: Path, name: str) -> None:
    command = [sys.executable, *COMMANDS[name], "--json", str(tmp_path / "out.json")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert figures and all(figure["ratio"] > 0 for figure in figures)
