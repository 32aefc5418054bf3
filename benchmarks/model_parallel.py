"""Tensor and pipeline parallelism over two single-thread processes against one process of two threads.

    python benchmarks/model_parallel.py [--rounds 7] [--steps-per-round 1] [--json FILE]

train.py's default model (6 layers, hidden 256, vocabulary 4096), fp32, eight sequences of 1024 tokens a step in eight microbatches
for all, whole train.py steps: forward, backward, clipping, AdamW. Things that are compared take turns, round by round; a figure is
a ratio of medians. Prints a table, then JSON. A missed target is reported and does not fail; layouts that disagree on the loss do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
from config.arguments import model_config, parse_arguments, resolve

from benchmarks.train_step import CPU, LOSS_TOLERANCE, SEED, World
from data.batch import build_batch
from data.dataset import PackedSample
from model.config import padded_vocab_size
from parallel.collectives import sum_over
from parallel.fsdp import clip_grad_norm_
from parallel.grid import GridSizes, build_grid
from train import build_model, build_pipeline
from training.optimizer import build_optimizer
from training.step import forward_backward, get_norm_owned_names

VOCAB_SIZE, SEQ_LENGTH, MICROBATCHES, WARM_UP_STEPS = 4096, 1024, 8, 2
FLAGS = f"--device cpu --dtype fp32 --qkv-format bshd --seq-length {SEQ_LENGTH} --global-batch-size {MICROBATCHES} --seed {SEED}"
# Name -> (processes, threads of each, flags, target of its tokens/s over the first's, or None).
LAYOUTS: dict[str, tuple[int, int, str, float | None]] = {
    "one process of 2 threads": (1, 2, "", None),
    "tp 2": (2, 1, "--tp-size 2", 0.55),
    # The output layer and the loss cost about as much as two layers, so the last stage has two fewer.
    "pp 2, 1f1b": (2, 1, "--pp-size 2 --first-stage-layers 4", 0.75),
    "pp 2, gpipe": (2, 1, "--pp-size 2 --first-stage-layers 4 --pp-schedule gpipe", None),
    "pp 2, interleaved": (2, 1, "--pp-size 2 --virtual-stages 2 --pp-schedule interleaved --last-stage-layers 1", None),
    "cp 2": (2, 1, "--cp-size 2", None),
}


class LayoutRank:
    """What a process can be told to do. Every rank of a world is told the same."""

    def prepare(self, flags: str) -> list[float]:
        """Build the layout and warm up; the losses."""
        size = dist.get_world_size()
        self.args = args = parse_arguments([*FLAGS.split(), *flags.split()])
        resolve(args, world_size=size, local_world_size=size, cuda_devices=lambda: 0)
        config = model_config(
            args,
            vocab_size=VOCAB_SIZE,
            padded_vocab_size=padded_vocab_size(VOCAB_SIZE, args.make_vocab_size_divisible_by),
        )
        self.grid = grid = build_grid(GridSizes(pp=args.pp_size, cp=args.cp_size, tp=args.tp_size))
        self.model = build_model(args, config, grid, CPU)
        self.pipeline = build_pipeline(args, self.model, config, grid, CPU, MICROBATCHES)
        adam = dict(
            lr=args.lr, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_eps, weight_decay=args.weight_decay
        )
        self.optimizer = build_optimizer(self.model, **adam)
        stream = np.random.default_rng(SEED).integers(0, VOCAB_SIZE, (MICROBATCHES, SEQ_LENGTH + 1))
        whole = np.array([SEQ_LENGTH])
        place = dict(cp_size=args.cp_size, cp_rank=grid.rank("cp"), qkv_format=args.qkv_format, layout=args.cp_layout)
        self.batches = [build_batch([PackedSample(row[:-1], row[1:], whole, whole)], **place) for row in stream]
        return [self.step() for _ in range(WARM_UP_STEPS)]

    def step(self) -> float:
        loss_tokens = torch.tensor(float(MICROBATCHES * SEQ_LENGTH), dtype=torch.float64)
        options = dict(loss_tokens=loss_tokens, device=CPU, reshard_between=False, pipeline=self.pipeline)
        total = forward_backward(self.model, self.batches, **options)
        parameters = dict(self.model.named_parameters())
        clip_grad_norm_(
            parameters, self.grid, max_norm=self.args.clip_grad, owned=get_norm_owned_names(self.model, self.grid)
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return (sum_over(sum_over(total, self.grid.group("loss")), self.grid.group("pp")) / loss_tokens).item()

    def time_steps(self, steps: int) -> float:
        """Seconds of `steps` steps."""
        dist.barrier()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        dist.barrier()
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Tensor and pipeline parallelism on two cores")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each layout")
    parser.add_argument("--steps-per-round", type=int, default=1, help="training steps in a turn")
    parser.add_argument("--only", help="layouts whose names begin so, and the one process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON there, too")
    args = parser.parse_args()
    chosen = {n: what for n, what in LAYOUTS.items() if what[0] == 1 or n.startswith(args.only or "")}
    with ExitStack() as stack:
        worlds = {
            n: stack.enter_context(World(size, threads=threads, what=LayoutRank))
            for n, (size, threads, _, _) in chosen.items()
        }
        losses = {name: world.call("prepare", chosen[name][2])[0] for name, world in worlds.items()}
        one = next(iter(losses.values()))
        for name, found in losses.items():
            assert all(abs(a / b - 1) <= LOSS_TOLERANCE for a, b in zip(found, one, strict=True)), (name, found, one)
        times: dict[str, list[float]] = {name: [] for name in worlds}
        for _ in range(args.rounds):
            for name, world in worlds.items():
                times[name].append(max(world.call("time_steps", args.steps_per_round)))
    tokens = args.steps_per_round * MICROBATCHES * SEQ_LENGTH
    alone = statistics.median(next(iter(times.values())))
    figures = []
    print(f"{'':28}{'tokens/s':>9}{'ratio':>8}{'quartiles':>15}   target")
    for name, seconds in times.items():
        ratios = sorted(alone / s for s in seconds)
        ratio, low, high = alone / statistics.median(seconds), ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        target = chosen[name][3]
        verdict = "" if target is None else f">= {target:.2f} {'pass' if ratio >= target else 'miss'}"
        print(f"{name:28}{tokens / statistics.median(seconds):>9.0f}{ratio:>8.3f}{low:>8.3f}-{high:.3f}   {verdict}")
        figures.append(dict(what=name, flags=chosen[name][2], seconds=seconds, ratio=ratio, target=target))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    facts = {
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "load average at the end": os.getloadavg()[0],
        "commit": commit,
    }
    facts |= {"command": " ".join(["python benchmarks/model_parallel.py", *sys.argv[1:]])}
    text = json.dumps(
        facts | {"rounds": args.rounds, "steps per round": args.steps_per_round, "losses": losses, "figures": figures}
    )
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
