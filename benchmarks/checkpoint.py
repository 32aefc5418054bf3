"""Saving and loading a checkpoint, against torch.distributed.checkpoint alone on the same tensors.

    torchrun --nproc-per-node 2 benchmarks/checkpoint.py [--rounds 9] [--hidden 768] [--folder DIR] [--json FILE]

1. save: dcp.save of the same state / ours, which adds checksums and publishes the checkpoint.
2. load: dcp.load / ours, which verifies every file's checksum.
3. time that a step is blocked by --async-save / a copy of the same tensors into memory that exists.

A figure is a ratio of medians over the slowest rank's seconds. A missed goal does not fail.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from benchmarks.harness import (
    CPU,
    TIMEOUT,
    TrainStep,
    benchmark_parser,
    build_config,
    describe_goal,
    is_met,
    time_call,
    write_figures,
)
from checkpoint.saver import Saver, load_checkpoint
from checkpoint.state import trained_state
from parallel.fsdp import local_tensor
from runtime.distributed import broadcast_object, initialise_distributed, read_launch

VOCAB_SIZE = 4096
# What -> (over, under, goal, whether the goal is an upper bound).
FIGURES = {
    "save: dcp's time / ours": ("save, bare", "save, ours", 0.95, False),
    "load: dcp's time / ours": ("load, bare", "load, ours", 0.95, False),
    "async save, blocked / a copy": ("async, blocked", "copy", 1.25, True),
}


def build_trained(hidden: int) -> TrainStep:
    """A model of fp32 weights, with the optimizer state of a run that has begun, FSDP-sharded over all ranks."""
    flags = f"""
        --device cpu --dtype fp32 --num-layers 6 --hidden-size {hidden} --ffn-hidden-size {hidden * 8 // 3 // 16 * 16}
        --num-attention-heads 8 --num-query-groups 4 --seed 1
    """
    ours = TrainStep(build_config(flags, world_size=dist.get_world_size()), vocab_size=VOCAB_SIZE, device=CPU)
    for parameter in ours.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    ours.optimizer.step()
    ours.optimizer.zero_grad()
    return ours


def time_slowest(work: Callable[[], object]) -> float:
    """Seconds on the slowest rank. Collective."""
    dist.barrier()
    seconds = torch.tensor(time_call(work))
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def make_empty(folder: Path) -> Path:
    """The folder without its files. Collective."""
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        os.sync()  # writes of others that are still pending must not count here
    dist.barrier()
    return folder


def measure(folder: Path, hidden: int, rounds: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of every turn, and the bytes of the state over all ranks."""
    ours, group = build_trained(hidden), dist.new_group(backend="gloo")
    state = (ours.model, ours.optimizer, ours.grid)
    parts = [local_tensor(p.detach()) for p in ours.model.parameters()]
    parts += [local_tensor(x) for tensors in ours.optimizer.state.values() for x in tensors.values()]
    copies = [torch.empty_like(x) for x in parts]
    async_saver = Saver(folder / "async", *state, group=group, asynchronous=True)

    def copy() -> None:
        for to, x in zip(copies, parts, strict=True):
            to.copy_(x)

    saves = {
        "bare": lambda: dcp.save(trained_state(*state), checkpoint_id=folder / "bare"),
        "ours": lambda: Saver(folder / "ours", *state, group=group).save(1, {}),
    }
    loads = {
        "bare": lambda: dcp.load(trained_state(*state), checkpoint_id=folder / "bare"),
        "ours": lambda: load_checkpoint(folder / "ours" / "step_0000001", *state, group=group),
    }
    # The first round warms up: allocators, page cache, the asynchronous saver's own memory.
    times: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        turn: dict[str, float] = {}
        order = list(saves) if number % 2 else list(saves)[::-1]  # the first or the second may find the disk faster
        for name in order:
            make_empty(folder / name)
            turn[f"save, {name}"] = time_slowest(saves[name])
        for name in order:
            turn[f"load, {name}"] = time_slowest(loads[name])
        make_empty(folder / "async")
        turn["copy"] = time_slowest(copy)
        turn["async, blocked"] = time_slowest(lambda: async_saver.save(1, {}))
        async_saver.wait()
        if number:
            for name, seconds in turn.items():
                times.setdefault(name, []).append(seconds)
    size = torch.tensor(sum(x.nbytes for x in parts))
    dist.all_reduce(size)
    return times, int(size)


def main() -> None:
    parser = benchmark_parser(__doc__, rounds=9)
    parser.add_argument("--hidden", type=int, default=768, help="hidden size of the model; default: %(default)s")
    parser.add_argument("--folder", type=Path, help="folder of the checkpoints; default: a temporary folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    initialise_distributed(read_launch(), "cpu", timeout=TIMEOUT)
    folder = broadcast_object(args.folder or Path(tempfile.mkdtemp(prefix="checkpoint_")))
    times, size = measure(folder, args.hidden, args.rounds)
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
        figures = []
        print(f"{size / 2**20:.0f} MiB of weights and optimizer state on {dist.get_world_size()} ranks")
        for what, (over, under, target, at_most) in FIGURES.items():
            first, second = statistics.median(times[over]), statistics.median(times[under])
            ratio = first / second
            verdict = describe_goal(ratio, target, at_most=at_most)
            print(f"{what:32}{first:>8.3f} s{second:>8.3f} s{ratio:>8.3f}   {verdict}")
            passed = is_met(ratio, target, at_most=at_most)
            figures.append(dict(what=what, seconds=[first, second], ratio=ratio, target=target, passed=passed))
        write_figures(args.json, {"bytes": size, "rounds": args.rounds, "figures": figures, "seconds": times})
    dist.barrier()


if __name__ == "__main__":
    main()
