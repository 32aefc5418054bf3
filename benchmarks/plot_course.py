"""Draws a run that changes course: docs/course.png of docs/course.md's example.

python benchmarks/plot_course.py runs/course --output docs/course.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.figure import Figure

from data.batch_schedule import BatchSchedule


def draw(run: Path) -> Figure:
    """Training loss, bits a byte of held-out text, learning rate and batch size over the tokens read."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    tokens = {r["step"]: r["consumed_tokens"] / 1e6 for r in steps}
    held_out = [r for r in records if r.get("bits_per_byte")]
    newest = max((run / "checkpoints").glob("step_*/run.json"))
    saved = json.loads(newest.read_text())["data"]
    batches = BatchSchedule.parse(saved["batches"])
    figure = Figure(figsize=(9, 6), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    at = [tokens[r["step"]] for r in steps]
    top.plot(at, [r["loss"] for r in steps], linewidth=0.6, color="0.6", label="training loss, nats a token")
    top.plot(
        [tokens[r["step"]] for r in held_out],
        [r["bits_per_byte"] for r in held_out],
        marker="o",
        label="held-out prose, bits a byte",
    )
    top.set_ylim(top=5)
    top.legend()
    middle.plot(at, [r["lr"] for r in steps])
    middle.set_ylabel("learning rate")
    bottom.step(at, [batches.size(r["step"] - 1) for r in steps], where="pre")
    bottom.set_ylabel("samples a step")
    bottom.set_xlabel("million tokens")
    changed = saved["mixture"]["sequences"] * (steps[0]["consumed_tokens"] // batches.size(0)) / 1e6
    for axes in (top, middle, bottom):
        axes.axvline(changed, linestyle=":", color="black")
    top.annotate("other mixture, three ranks", (changed, 4.0), xytext=(-6, 0), textcoords="offset points", ha="right")
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.png")
    args = parser.parse_args()
    draw(args.run).savefig(args.output, dpi=100)
