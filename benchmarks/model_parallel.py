"""Tensor and pipeline parallelism over two processes of one thread, against one process of two threads.

    python benchmarks/model_parallel.py [--only tp] [--rounds 7] [--steps-per-round 1] [--json FILE]

Whole training steps (forward, backward, clipping, AdamW) of train.py's default model (6 layers, hidden 256, vocabulary
4096) in fp32, eight sequences of 1024 tokens a step in eight microbatches. A figure is a ratio of medians. Layouts that
disagree on the loss fail; a missed goal does not.
"""

from __future__ import annotations

import statistics
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch.distributed as dist

from benchmarks.harness import (
    CPU,
    LOSS_TOLERANCE,
    TrainStep,
    World,
    benchmark_parser,
    build_config,
    describe_goal,
    median_ratio,
    one_document,
    round_ratios,
    take_turns,
    time_call,
    write_figures,
)

VOCAB_SIZE, SEQ_LENGTH, MICROBATCHES, SEED, WARM_UP_STEPS = 4096, 1024, 8, 1234, 2
FLAGS = f"""
    --device cpu --dtype fp32 --qkv-format bshd --seed {SEED}
    --seq-length {SEQ_LENGTH} --global-batch-size {MICROBATCHES}
"""


@dataclass(frozen=True)
class Layout:
    """Attributes: goal: of tokens/s over those of the one process."""

    processes: int
    threads: int
    flags: str = ""
    goal: float | None = None


ALONE = "one process of 2 threads"
LAYOUTS = {
    ALONE: Layout(1, 2),
    "tp 2": Layout(2, 1, "--tp-size 2", 0.55),
    # Output layer and loss cost about as much as two layers: the last stage has two fewer.
    "pp 2, 1f1b": Layout(2, 1, "--pp-size 2 --first-stage-layers 4", 0.75),
    "pp 2, gpipe": Layout(2, 1, "--pp-size 2 --first-stage-layers 4 --pp-schedule gpipe"),
    "pp 2, interleaved": Layout(2, 1, "--pp-size 2 --virtual-stages 2 --pp-schedule interleaved --last-stage-layers 1"),
    "cp 2": Layout(2, 1, "--cp-size 2"),
}


class LayoutRank:
    """What a rank of a layout runs."""

    def prepare(self, flags: str) -> list[float]:
        """Build the layout and warm up. Returns the losses."""
        config = build_config(f"{FLAGS} {flags}", world_size=dist.get_world_size())
        self.ours = TrainStep(config, vocab_size=VOCAB_SIZE, device=CPU)
        tokens = np.random.default_rng(SEED).integers(0, VOCAB_SIZE, (MICROBATCHES, SEQ_LENGTH + 1))
        self.batches = [self.ours.build_batch([one_document(row)]) for row in tokens]
        return [self.ours.step(self.batches).item() for _ in range(WARM_UP_STEPS)]

    def time_steps(self, steps: int) -> float:
        """Seconds of `steps` steps."""
        return time_call(lambda: [self.ours.step(self.batches) for _ in range(steps)], dist.barrier)


def time_slowest(world: World, steps: int) -> float:
    """Seconds of `steps` steps on the slowest rank."""
    return max(world.run(LayoutRank.time_steps, steps))


def main() -> None:
    parser = benchmark_parser(__doc__, rounds=7)
    parser.add_argument("--steps-per-round", type=int, default=1, help="training steps of a turn; default: %(default)s")
    parser.add_argument(
        "--only", default="", metavar="PREFIX", help="layouts whose names begin so, and the one process"
    )
    args = parser.parse_args()
    chosen = {name: layout for name, layout in LAYOUTS.items() if name == ALONE or name.startswith(args.only)}
    with ExitStack() as stack:
        worlds = {
            name: stack.enter_context(World(layout.processes, LayoutRank, threads=layout.threads))
            for name, layout in chosen.items()
        }
        losses = {name: world.run(LayoutRank.prepare, chosen[name].flags)[0] for name, world in worlds.items()}
        for name, found in losses.items():
            apart = max(abs(a / b - 1) for a, b in zip(found, losses[ALONE], strict=True))
            assert apart <= LOSS_TOLERANCE, f"{name}: losses {found}, one process {losses[ALONE]}"
        turns = {name: partial(time_slowest, world, args.steps_per_round) for name, world in worlds.items()}
        times = take_turns(turns, args.rounds)
    tokens = args.steps_per_round * MICROBATCHES * SEQ_LENGTH
    figures = []
    print(f"{'':28}{'tokens/s':>9}{'ratio':>8}{'quartiles':>15}   target")
    for name, seconds in times.items():
        layout, ratio = chosen[name], median_ratio(times[ALONE], seconds)
        low, high = round_ratios(times[ALONE], seconds)["quartiles"]
        speed, verdict = tokens / statistics.median(seconds), describe_goal(ratio, layout.goal)
        print(f"{name:28}{speed:>9.0f}{ratio:>8.3f}{low:>8.3f}-{high:.3f}   {verdict}")
        figures.append(dict(what=name, flags=layout.flags, seconds=seconds, ratio=ratio, target=layout.goal))
    rounds = {"rounds": args.rounds, "steps per round": args.steps_per_round}
    write_figures(args.json, rounds | {"losses": losses, "figures": figures})


if __name__ == "__main__":
    main()
