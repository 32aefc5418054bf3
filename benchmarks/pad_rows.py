"""`--pad-rows dynamic` against `full`: what a row that ends with its last document saves, and what its changing shape costs.

    python benchmarks/pad_rows.py [--rounds 3] [--steps 12] [--json FILE]

Runs train.py over two cp ranks of one thread, full and dynamic in turns, on two corpora: Python's standard library,
whose rows best-fit packing fills, and documents of 0.7 of a row each, which leave 0.3 of every row empty. Compared are
real tokens a second, the median over the steps of a run but its first two, and the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.launch import train

SEQ_LENGTH = 2048
FLAGS = shlex.split(f"""
    --cp-size 2 --seq-length {SEQ_LENGTH} --micro-batch-size 2 --global-batch-size 2 --document-alignment 4 --device cpu --num-workers 0
    --eval-interval 0 --save-interval 0 --sample-tokens 0 --tensorboard-dir none
""")


def sparse_corpus(folder: Path) -> list[str]:
    """Documents of 0.7 of a row in bytes: two never fit one row."""
    path = folder / "sparse.jsonl"
    text = "all ranks hold a part of every row; "
    with path.open("w") as out:
        for number in range(200):
            out.write(json.dumps({"text": f"{number} {text * 100}"[: int(0.7 * SEQ_LENGTH)]}) + "\n")
    return ["--data-path", str(path), "--tokenizer-type", "byte"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Dynamic rows against full ones: real tokens a second")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--steps", type=int, default=12, help="steps of a run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    args = parser.parse_args()
    facts: dict = {"command": " ".join(sys.argv), "rounds": args.rounds, "steps": args.steps}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpora = {"standard library": [], "documents of 0.7 of a row": sparse_corpus(folder)}
        print(f"{'corpus':28}{'full':>8}{'full tok/s':>12}{'dynamic tok/s':>15}{'dynamic / full':>16}")
        for corpus, data in corpora.items():
            speeds: dict[str, list[float]] = {"full": [], "dynamic": []}
            filled = 0.0
            for number in range(args.rounds):
                for rows, found in speeds.items():
                    run = folder / f"{corpus}-{rows}-{number}"
                    flags = [*FLAGS, *data, "--pad-rows", rows, "--train-iters", str(args.steps)]
                    flags += ["--data-cache-path", str(folder / "cache")]
                    steps = train(2, run, *flags)[2:]
                    found.append(statistics.median(step["tokens_per_s"] for step in steps))
                    if rows == "full":
                        filled = statistics.mean(step["packing_efficiency"] for step in steps)
            ratio = statistics.median(d / f for f, d in zip(speeds["full"], speeds["dynamic"], strict=True))
            full, dynamic = (statistics.median(speeds[rows]) for rows in ("full", "dynamic"))
            print(f"{corpus:28}{filled:>8.1%}{full:>12.0f}{dynamic:>15.0f}{ratio:>16.3f}", flush=True)
            facts[corpus] = {"tokens_per_s": speeds, "ratio": ratio, "filled": filled}
    facts["load average at the end"] = os.getloadavg()[0]
    if args.json:
        args.json.write_text(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
