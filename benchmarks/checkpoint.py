"""Saving and loading a checkpoint against torch.distributed.checkpoint alone on the same tensors, and what an asynchronous save blocks.

    torchrun --nproc-per-node 2 benchmarks/checkpoint.py [--rounds 9] [--hidden 768] [--folder DIR] [--json FILE]

Things that are compared take turns, round by round; a figure is a ratio of medians over the slowest rank's seconds.

1. save: dcp.save of the same state / ours, which checks, publishes and names the newest.
2. load: dcp.load / ours, which verifies every file's checksum.
3. blocked by --async-save / a copy of the same tensors into memory that is there already.

A missed target is reported and does not fail.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from checkpoint.saver import Saver, load_checkpoint, trained_state
from cp.attention import build_attention
from cp.support import AttentionChoice
from model.config import GPTConfig
from model.gpt import GPT
from model.init import initialise
from model.transformer import GPTOptions
from parallel.fsdp import local_tensor, shard_model
from parallel.grid import Grid, GridSizes, build_grid
from training.optimizer import build_optimizer

CPU = torch.device("cpu")


def build(grid: Grid, hidden: int) -> tuple[GPT, torch.optim.AdamW]:
    """A model of fp32 weights with the optimiser state of a run that has begun."""
    config = GPTConfig(
        num_layers=6,
        hidden_size=hidden,
        ffn_hidden_size=hidden * 8 // 3 // 16 * 16,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=hidden // 8,
        vocab_size=4096,
        padded_vocab_size=4096,
    )
    choice = AttentionChoice(backend="native", method="p2p", qkv_format="thd", layout="zigzag", cp_size=1)
    with torch.device("meta"):
        model = GPT(
            config,
            attention=build_attention(choice, head_dim=config.kv_channels),
            cp_group=grid.group("cp"),
            options=GPTOptions(dtype=torch.float32),
        )
    shard_model(
        model, model.layers.values(), grid, device_type="cpu", compute_dtype=torch.float32, reshard_after_forward=False
    )
    initialise(model, config, seed=1, device=CPU)
    optimizer = build_optimizer(model, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def timed(work: Callable[[], object]) -> float:
    """Seconds on the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    work()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def empty(folder: Path) -> Path:
    """The folder, with nothing in it. Collective."""
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        os.sync()  # what others have not written yet must not be paid for here
    dist.barrier()
    return folder


def measure(folder: Path, grid: Grid, hidden: int, rounds: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of every turn, and the bytes of the state over all ranks."""
    model, optimizer = build(grid, hidden)
    group = dist.new_group(backend="gloo")
    parts = [local_tensor(p.detach()) for p in model.parameters()]
    parts += [local_tensor(x) for state in optimizer.state.values() for x in state.values()]
    copies = [torch.empty_like(x) for x in parts]
    times: dict[str, list[float]] = {}
    beside = Saver(folder / "async", model, optimizer, grid, group=group, asynchronous=True)

    def turn(name: str, work: Callable[[], object]) -> None:
        times.setdefault(name, []).append(timed(work))

    def copy() -> None:
        for to, x in zip(copies, parts, strict=True):
            to.copy_(x)

    def save_bare() -> None:
        dcp.save(trained_state(model, optimizer, grid), checkpoint_id=folder / "bare")

    def save_ours() -> None:
        Saver(folder / "ours", model, optimizer, grid, group=group).save(1, {})

    def load_bare() -> None:
        dcp.load(trained_state(model, optimizer, grid), checkpoint_id=folder / "bare")

    def load_ours() -> None:
        load_checkpoint(folder / "ours" / "step_0000001", model, optimizer, grid, group=group)

    # The first round warms up: allocators, page cache, the asynchronous saver's own memory.
    for number in range(rounds + 1):
        order = [("bare", save_bare, load_bare), ("ours", save_ours, load_ours)]
        for name, save, _ in order if number % 2 else order[::-1]:  # the disk is kinder to the second, or the first
            empty(folder / name)
            turn(f"save, {name}", save)
        for name, _, load in order if number % 2 else order[::-1]:
            turn(f"load, {name}", load)
        empty(folder / "async")
        turn("copy", copy)
        turn("async, blocked", lambda: beside.save(1, {}))
        beside.wait()
        if not number:
            times = {}
    size = torch.tensor(float(sum(x.numel() * x.element_size() for x in parts)), dtype=torch.float64)
    dist.all_reduce(size)
    return times, int(size)


FIGURES = {
    "save: dcp's time / ours": ("save, bare", "save, ours", 0.95, False),
    "load: dcp's time / ours": ("load, bare", "load, ours", 0.95, False),
    "async save, blocked / a copy": ("async, blocked", "copy", 1.25, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each thing compared")
    parser.add_argument("--hidden", type=int, default=768, help="size of the model")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; default: a temporary folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON there, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    grid = build_grid(GridSizes(dp_shard=dist.get_world_size()))
    box = [str(args.folder or tempfile.mkdtemp(prefix="checkpoint_"))]
    dist.broadcast_object_list(box, src=0)
    folder = Path(box[0])
    times, size = measure(folder, grid, args.hidden, args.rounds)
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
        figures = []
        print(f"{size / 2**20:.0f} MiB of weights and optimiser state on {dist.get_world_size()} ranks")
        for what, (one, other, target, at_most) in FIGURES.items():
            first, second = (statistics.median(times[name]) for name in (one, other))
            ratio = first / second
            passed = ratio <= target if at_most else ratio >= target
            verdict = f"{'<=' if at_most else '>='} {target:.2f} {'pass' if passed else 'miss'}"
            print(f"{what:32}{first:>8.3f} s{second:>8.3f} s{ratio:>8.3f}   {verdict}")
            figures.append(dict(what=what, seconds=[first, second], ratio=ratio, target=target, passed=passed))
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        facts = {
            "torch": torch.__version__,
            "cores": os.cpu_count(),
            "load average at the end": os.getloadavg()[0],
            "commit": commit,
        }
        facts |= {
            "command": " ".join(
                ["torchrun --nproc-per-node", str(dist.get_world_size()), "benchmarks/checkpoint.py", *sys.argv[1:]]
            )
        }
        text = json.dumps(facts | {"bytes": size, "rounds": args.rounds, "figures": figures, "seconds": times})
        if args.json:
            args.json.write_text(text + "\n")
    dist.barrier()


if __name__ == "__main__":
    main()
