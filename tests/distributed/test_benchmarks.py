"""Every benchmark and its JSON, one short round each: the figures mean nothing, the command must work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch import ROOT, environment

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# With a list of figures, each a ratio to something that runs in the same turn.
RATIOS = {
    "train_step": ["benchmarks/train_step.py", "--rounds", "1", "--steps-per-round", "1", "--only", "2"],
    "model_parallel": ["benchmarks/model_parallel.py", "--rounds", "1", "--only", "tp"],
    "checkpoint": [*TORCHRUN, "benchmarks/checkpoint.py", "--rounds", "1", "--hidden", "128"],
}
SMALL_CORPUS = ["--documents", "2000", "--tokens", "500000", "--index-documents", "20000"]


def run_benchmark(tmp_path: Path, *words: str) -> dict[str, Any]:
    """The JSON of a benchmark that must succeed."""
    command = [sys.executable, *words, "--json", str(tmp_path / "out.json")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert f"{words[-1]} --json out.json" in found["command"] and found["commit"]
    return found


@pytest.mark.full
def test_the_gpu_benchmark_in_small(tmp_path: Path) -> None:
    """All parts that need no Transformer Engine, on the CPU."""
    figures = run_benchmark(tmp_path, "benchmarks/gpu.py", "--tiny", "--rounds", "1")
    assert {"step", "fp8", "packed", "ring", "memory", "length"} <= figures.keys()
    assert figures["step"]["torch / bare PyTorch, bshd"] > 0 and figures["memory"]["torch"]["planned GiB"] > 0


@pytest.mark.full
@pytest.mark.parametrize("name", RATIOS)
def test_ratios_are_written(tmp_path: Path, name: str) -> None:
    figures = run_benchmark(tmp_path, *RATIOS[name])["figures"]
    assert figures and all(figure["ratio"] > 0 for figure in figures)


@pytest.mark.full
def test_attention_sends_what_its_formula_says(tmp_path: Path) -> None:
    found = run_benchmark(
        tmp_path, "benchmarks/cp_attention.py", "--only", "1", "--rounds", "1", "--seq-lengths", "512"
    )
    assert {cell["choice"]["backend"] for cell in found["1"]} >= {"native", "pytorch"}
    assert all(cell["sent_bytes"] == cell["sent_formula"] for cell in found["1"])


@pytest.mark.full
def test_parts_of_the_data_benchmark(tmp_path: Path) -> None:
    words = ["--only", "pack,loader,index,memory", "--rounds", "1", *SMALL_CORPUS]
    found = run_benchmark(tmp_path, "benchmarks/data.py", *words)
    assert found["loader"]["T 4096"]["ours, Mtok/s"] > 0 and found["memory"]["MB of growth"] < 11
    assert found["pack"]["T 8192, cp 1"]["rows over the fewest possible"] >= 1


@pytest.mark.full
def test_row_padding_of_both_corpora(tmp_path: Path) -> None:
    found = run_benchmark(tmp_path, "benchmarks/pad_rows.py", "--rounds", "1", "--steps", "3")
    assert found["documents of 0.7 of a row"]["filled"] == pytest.approx(0.7, abs=0.01)
    assert found["standard library"]["ratio"] > 0
