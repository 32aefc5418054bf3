"""Run the same few steps under several layouts and print their losses side by side, as README's table shows them.

    python tools/layouts.py [any flag of train.py]

One machine, gloo, fp64 unless told otherwise. Exit code 1 if a loss or gradient norm is further than 1e-9 (relative) from one rank's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "--device cpu --dtype fp64 --document-alignment 8 --global-batch-size 4 --seq-length 512 --train-iters 3 --lr-warmup-iters 1 "
    "--eval-interval 0 --save-interval 0 --sample-tokens 0 --tensorboard-dir none"
)
# Ranks, and what lays them out.
LAYOUTS = {
    1: [""],
    2: ["--cp-size 2", "--tp-size 2", "--pp-size 2"],
    4: ["--cp-size 4", "--tp-size 2 --cp-size 2", "--dp-replicate-size 2 --dp-shard-size 2"],
    8: [
        "--pp-size 2 --tp-size 2 --cp-size 2",
        "--pp-size 2 --dp-shard-size 2 --cp-size 2",
        "--tp-size 2 --dp-shard-size 2 --cp-size 2",
        "--pp-size 2 --virtual-stages 2 --pp-schedule interleaved --tp-size 2 --cp-size 2",
    ],
}
TOLERANCE = 1e-9


def run(ranks: int, layout: str, flags: list[str], folder: Path) -> tuple[list[dict], float]:
    """The records of every step, and the seconds of the whole command."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "train.py", *FLAGS.split(), *layout.split(), "--run-dir", str(folder), *flags]
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    records = folder / "metrics.jsonl"
    if "metrics:  " not in done.stdout or not records.is_file():
        raise SystemExit(f"{layout}: {done.stdout}{done.stderr}")
    return [json.loads(line) for line in records.read_text().splitlines()], time.perf_counter() - start


def main(flags: list[str]) -> int:
    differences: list[float] = []
    wanted = None
    print(
        "| ranks | layout | loss after 1 step | after 3 steps | gradient norm | s |\n|---|---|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as name:
        for ranks, layouts in LAYOUTS.items():
            for number, layout in enumerate(layouts):
                records, seconds = run(ranks, layout, flags, Path(name) / f"{ranks}_{number}")
                first, last = records[0], records[-1]
                figures = [record[name] for record in (first, last) for name in ("loss", "grad_norm")]
                wanted = wanted or figures
                differences += [abs(got / want - 1) for got, want in zip(figures, wanted, strict=True)]
                shown = f"`{layout}`" if layout else "plain `python train.py`"
                print(
                    f"| {ranks} | {shown} | {first['loss']:.12f} | {last['loss']:.12f} | {last['grad_norm']:.10f} | {seconds:.0f} |",
                    flush=True,
                )
    print(f"\nlargest relative difference of a loss or norm: {max(differences):.1e}")
    return int(not all(difference <= TOLERANCE for difference in differences))  # a nan is none


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
