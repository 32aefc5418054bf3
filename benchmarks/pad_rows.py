"""`--pad-rows dynamic` against `full`: what rows without tails save, and what their changing shape costs.

    python benchmarks/pad_rows.py [--rounds 3] [--steps 12] [--json FILE]

Runs train.py over two cp ranks of one thread, full and dynamic in turns, on two corpora: Python's standard library,
whose rows best-fit packing fills, and documents of 0.7 of a row each, which leave 0.3 of every row empty. Compared are
real tokens a second: a run's median over its steps without the first two, then the median of the rounds' ratios.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import ROOT, benchmark_parser, round_ratios, take_turns, write_figures

SEQ_LENGTH = 2048
WARM_UP_STEPS = 2
FLAGS = shlex.split(f"""
    --cp-size 2 --seq-length {SEQ_LENGTH} --micro-batch-size 2 --global-batch-size 2 --document-alignment 4 --device cpu
    --num-workers 0 --eval-interval 0 --save-interval 0 --sample-tokens 0 --tensorboard-dir none
""")


def write_sparse_corpus(folder: Path) -> list[str]:
    """Documents of 0.7 of a row in bytes: no row holds two. Returns the flags that read them."""
    path = folder / "sparse.jsonl"
    text = "all ranks hold a part of every row; "
    with path.open("w") as out:
        for number in range(200):
            out.write(json.dumps({"text": f"{number} {text * 100}"[: int(0.7 * SEQ_LENGTH)]}) + "\n")
    return ["--data-path", str(path), "--tokenizer-type", "byte"]


def train(run_dir: Path, flags: list[str]) -> list[dict]:
    """train.py on two ranks. Returns the records of its steps.

    Raises:
        RuntimeError: the run failed.
    """
    command = ["launch/local.sh", "2", "--run-dir", str(run_dir), *FLAGS, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PENTAGRID_BIN": str(Path(sys.executable).parent)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    # gloo's threads sometimes abort at teardown, after the run has printed its last line.
    if done.returncode and "metrics:  " not in done.stdout:
        raise RuntimeError(f"{shlex.join(command)}:\n{done.stdout}{done.stderr}")
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def compare(folder: Path, name: str, data: list[str], *, rounds: int, steps: int) -> dict[str, Any]:
    """The figures of one corpus."""

    def run(pad_rows: str) -> list[dict]:
        flags = [*data, "--pad-rows", pad_rows, "--train-iters", str(steps), "--data-cache-path", str(folder / "cache")]
        return train(Path(tempfile.mkdtemp(prefix="run-", dir=folder)), flags)[WARM_UP_STEPS:]

    records = take_turns({"full": lambda: run("full"), "dynamic": lambda: run("dynamic")}, rounds)
    speeds = {
        rows: [statistics.median(step["tokens_per_s"] for step in run_records) for run_records in runs]
        for rows, runs in records.items()
    }
    filled = statistics.mean(step["packing_efficiency"] for step in records["full"][-1])
    ratio = round_ratios(speeds["dynamic"], speeds["full"])["median"]
    full, dynamic = (statistics.median(speeds[rows]) for rows in ("full", "dynamic"))
    print(f"{name:28}{filled:>8.1%}{full:>12.0f}{dynamic:>15.0f}{ratio:>16.3f}", flush=True)
    return {"tokens_per_s": speeds, "ratio": ratio, "filled": filled}


def main() -> None:
    parser = benchmark_parser(__doc__, rounds=3)
    parser.add_argument("--steps", type=int, default=12, help="steps of a run; default: %(default)s")
    args = parser.parse_args()
    figures: dict[str, Any] = {"rounds": args.rounds, "steps": args.steps}
    print(f"{'corpus':28}{'full':>8}{'full tok/s':>12}{'dynamic tok/s':>15}{'dynamic / full':>16}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpora = {"standard library": [], "documents of 0.7 of a row": write_sparse_corpus(folder)}
        for corpus, data in corpora.items():
            figures[corpus] = compare(folder, corpus, data, rounds=args.rounds, steps=args.steps)
    write_figures(args.json, figures)


if __name__ == "__main__":
    main()
