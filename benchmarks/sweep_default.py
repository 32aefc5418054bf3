"""Bits a byte of held-out text that a budget of FLOPs buys: the choice of train.py's defaults and of
configs/half_hour.yaml.

Each candidate is a list of flags; the number of steps follows from the budget, counted as training/flops.py counts:
forward and backward. What Muon's iterations add is counted apart. A candidate is one process of train.py, validated at
its end on all held-out documents.

    python benchmarks/sweep_default.py --tflop 3 --json FILE "NAME: FLAGS" "NAME: FLAGS" ...

Figures that the file holds already, of the same flags and budget, are not measured again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.harness import ROOT, build_config, describe_machine
from data.dataset import PackedDataset
from model.config import GPTConfig
from training.build import build_data
from training.flops import training_flops
from training.optimizer import NEWTON_SCHULZ_STEPS

# All held-out documents at the end only; no checkpoint, no sample.
MEASURED = "--eval-iters 100000 --save-interval 0 --tensorboard-dir none --log-interval 50 --sample-tokens 0"


def count_steps(flags: str, tflop: float) -> tuple[int, dict[str, float]]:
    """Steps that the budget buys, and what describes the model."""
    config = build_config(flags)
    data = build_data(config)
    architecture = config.model.architecture(data.tokenizer.vocab_size)
    assert isinstance(data.train, PackedDataset)
    lengths, size = data.train.lengths, config.data.seq_length
    whole, rest = np.divmod(lengths, size)
    squares = float((whole * size**2 + rest**2).sum()) / lengths.sum()  # a token: documents are cut at `size`
    flops = training_flops(architecture, tokens=1, squared_lengths=squares)
    share = lengths.sum() / (data.train.samples_per_epoch * size)
    steps = max(1, round(tflop * 1e12 / (flops * config.training.global_batch_size * size * share)))
    by_muon = config.training.optimizer == "muon"
    return steps, {
        "flops_a_token": flops,
        "tokens_an_epoch": int(lengths.sum()),
        "muon_tflop": steps * newton_schulz_flops(architecture) / 1e12 if by_muon else 0.0,
    }


def newton_schulz_flops(architecture: GPTConfig) -> float:
    """FLOPs of a step's orthogonalizations: two products with the matrix and one with its Gram matrix, five times."""
    hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    shapes = [(architecture.qkv_size, hidden), (hidden, architecture.query_size), *[(ffn, hidden)] * 3]
    short_long = [(min(shape), max(shape)) for shape in shapes]
    return architecture.num_layers * sum(NEWTON_SCHULZ_STEPS * (4 * s * s * n + 2 * s**3) for s, n in short_long)


def measure(flags: str, tflop: float, launcher: list[str], run_dir: str) -> dict[str, Any]:
    """Train once; figures of the run."""
    steps, figures = count_steps(flags, tflop)
    every = f"--train-iters {steps} --eval-interval {max(steps, 1)} --run-dir {run_dir}"
    start = time.monotonic()
    with open(f"{run_dir}.log", "w") as output:
        command = [*launcher, *shlex.split(f"{flags} {every} {MEASURED}")]
        subprocess.run(command, cwd=ROOT, check=True, stdout=output, stderr=subprocess.STDOUT)
    lines = [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    last = [line["loss"] for line in trained[-20:]]
    return figures | {
        "steps": steps,
        "tokens": sum(line["tokens"] for line in trained),
        "tflop": sum(line["tflops_per_rank"] * line["step_time_s"] for line in trained),
        "bits_per_byte": next(line["bits_per_byte"] for line in reversed(lines) if "bits_per_byte" in line),
        "last_losses": sum(last) / len(last),
        "step_seconds": sum(line["step_time_s"] for line in trained),
        "seconds": time.monotonic() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidates", nargs="+", metavar="NAME:FLAGS", help="flags of train.py")
    parser.add_argument("--tflop", type=float, default=3.0, help="budget of a run; default: %(default)s")
    parser.add_argument("--base", default="", help="flags of every candidate")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="figures are added to this file")
    parser.add_argument("--launcher", default=f"{sys.executable} train.py", help="default: %(default)s")
    args = parser.parse_args()
    figures = json.loads(args.json.read_text()) if args.json.exists() else {"runs": []}
    for candidate in args.candidates:
        name, _, own = candidate.partition(":")
        flags = f"{args.base} {own}".strip()
        if any(run["flags"] == flags and run["budget"] == args.tflop for run in figures["runs"]):
            continue
        with TemporaryDirectory() as folder:
            found = measure(flags, args.tflop, shlex.split(args.launcher), f"{folder}/run")
        figures["runs"].append({"name": name, "flags": flags, "budget": args.tflop} | found)
        print(json.dumps(figures["runs"][-1]), flush=True)
        args.json.write_text(json.dumps(describe_machine() | figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
