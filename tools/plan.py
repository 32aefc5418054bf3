"""What a run will need, on a laptop, without a rank: `python tools/plan.py --world-size 64 --gpu-memory 80 <flags of train.py>`.

Memory of a rank by part, FLOPs and sent bytes of a step, packing and balance for a distribution of document lengths, legal sizes, and with
--rank-layouts the layouts that fit, best first. Memory is counted from the model's own code (planner/memory.py), on plain PyTorch layers,
which hold most; with --transformer-impl te on Transformer Engine's, installed or not, in bf16.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from config.cli import parse_arguments
from config.schema import RunConfig
from config.validate import resolve
from model.config import GPTConfig
from planner.estimate import data_of, describe_rows, make_plan, parse_lengths, plan_text, worst_memory
from planner.memory import stage_parameters
from training.flops import PEAK_TFLOPS
from utils.errors import UserError, run_tool

AXES = ("pp", "dp_replicate", "cp", "tp")  # dp_shard is what is left
STORED = 4  # bytes of a weight, a moment
ROOM = 0.9  # of a device's memory that a plan may fill: the rest is the allocator's, NCCL's and the context's
# What a byte sent over an axis costs beside one that is hidden: tp and cp wait for each other in every layer, FSDP's run ahead.
EXPOSED = {"tp": 1.0, "cp": 0.3, "fsdp": 0.3, "dp_replicate": 0.3, "pp": 0.3}
WITHIN_NODE, BETWEEN_NODES = (
    300e9,
    40e9,
)  # bytes a second of a rank, as NVLink and a 400 Gb/s card give; for the order alone
AGAIN = {"none": 1.0, "selective": 1.12, "full": 4 / 3}  # computation with recomputing


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="All flags of train.py too.",
    )
    parser.add_argument("--world-size", type=int, default=1, help="ranks in all")
    parser.add_argument("--node-size", type=int, help="ranks on a node; default: all, at most 8")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="of one device")
    parser.add_argument(
        "--vocab-size", type=int, help="default: the tokenizer's, or --tokenizer-vocab-size where it would be trained"
    )
    parser.add_argument(
        "--lengths", help="of documents: fixed:N, lognormal:MEAN,SIGMA or a file; default: the prepared corpus's"
    )
    parser.add_argument(
        "--rank-layouts", action="store_true", help="list the layouts of --world-size ranks that fit, best first"
    )
    parser.add_argument("--most", type=int, default=12, help="of the list")
    parser.add_argument(
        "--json", action="store_true", help="print an object instead of words; with --rank-layouts, of the list"
    )
    return parser


def resolved(words: list[str], world: int, node: int) -> RunConfig:
    """Raises ValueError where train.py would refuse."""
    config = parse_arguments(words)
    if config.parallel.device == "auto":
        config.parallel.device = "cuda"
    planned = "te" if config.model.transformer_impl == "te" else "torch"
    if planned == "te":  # which need not be here, and whose 8 bits are planned as bf16
        config.model.fp8, config.model.fp8_first_last_bf16 = "none", False
        config.parallel.cp_backend = "native" if config.parallel.cp_backend == "te" else config.parallel.cp_backend
    config.model.transformer_impl = "torch"
    resolve(config, world_size=world, local_world_size=min(node, world), cuda_devices=lambda: node)
    config.model.transformer_impl = planned
    return config


def legal_values(words: list[str], world: int, node: int) -> dict[str, list[int]]:
    """For each axis the sizes that train.py would take with everything else as given and dp_shard what is left."""
    found: dict[str, list[int]] = {}
    for axis in AXES:
        found[axis] = []
        for size in (n for n in range(1, world + 1) if world % n == 0):
            with contextlib.suppress(ValueError):
                resolved([*words, "--dp-shard-size", "-1", f"--{axis.replace('_', '-')}-size", str(size)], world, node)
                found[axis].append(size)
    return found


def layouts(words: list[str], world: int, node: int) -> Iterator[RunConfig]:
    """Every legal layout; recomputing none, selective, full of each."""
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    for pp in divisors:
        for tp in (n for n in divisors if n <= node and world % (pp * n) == 0):
            for cp in (n for n in divisors if world % (pp * tp * n) == 0):
                for recompute in AGAIN:
                    sizes = ["--pp-size", pp, "--tp-size", tp, "--cp-size", cp, "--dp-shard-size", -1]
                    with contextlib.suppress(ValueError):
                        yield resolved([*words, *map(str, sizes), "--recompute", recompute], world, node)


def estimated_seconds(config: RunConfig, architecture: GPTConfig, plan: Any, node: int) -> float:
    """For the order of layouts only, not a measurement: half the peak of an H100 for the computation, stretched by recomputing,
    imbalance and the pipeline's idle time, and each axis's bytes at the speed of the slowest link it crosses, as far as they are exposed.
    """
    world = config.parallel.world_size
    peak = dict(PEAK_TFLOPS)["H100"] * 1e12 / 2
    seconds = plan.flops / world / peak * AGAIN[config.training.recompute] * plan.rows.cp_balance / (1 - plan.bubble)
    reach = {
        "tp": config.parallel.tp_size,
        "cp": config.parallel.tp_size * config.parallel.cp_size,
        "fsdp": config.parallel.tp_size * config.parallel.cp_size * config.parallel.dp_shard_size,
        "dp_replicate": config.parallel.tp_size
        * config.parallel.cp_size
        * config.parallel.dp_shard_size
        * config.parallel.dp_replicate_size,
        "pp": world,
    }
    return seconds + sum(
        EXPOSED[a] * n / (WITHIN_NODE if reach[a] <= node else BETWEEN_NODES) for a, n in plan.sent.items()
    )


def ranked(
    words: list[str], world: int, node: int, memory: float, vocab: int, lengths: np.ndarray | None
) -> list[tuple[float, Any, Any]]:
    """(estimated seconds, flags, plan) of the layouts that fit, best first."""
    found, rows = [], {}  # type: ignore[var-annotated]
    for config in layouts(words, world, node):
        architecture = config.model.architecture(vocab)
        limit = ROOM * memory * 2**30
        own = stage_parameters(config, architecture, 0) // (config.parallel.dp_shard_size * config.parallel.cp_size)
        if 3 * STORED * own > limit:  # weights and moments alone
            continue
        needed = worst_memory(config, architecture)
        if needed.peak > limit:
            continue
        key = (config.parallel.cp_size, config.parallel.cp_layout, config.data.document_alignment)
        if key not in rows:
            rows[key] = describe_rows(config, lengths)
        plan = make_plan(config, architecture, lengths, needed, rows[key])
        found.append((estimated_seconds(config, architecture, plan, node), config, plan))
    return sorted(found, key=lambda one: one[0])


def check_numbers(own: argparse.Namespace) -> None:
    """Raises ValueError for a size or count below 1, or a memory that is none."""
    for name in ("world_size", "node_size", "vocab_size", "most"):
        value = getattr(own, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if own.gpu_memory is not None and not 0 < own.gpu_memory < math.inf:
        raise UserError(f"--gpu-memory {own.gpu_memory:g}: must be finite and above 0")


def main(argv: list[str]) -> int:
    own, words = build_parser().parse_known_args(argv)
    check_numbers(own)
    node = own.node_size or min(8, own.world_size)
    if own.world_size % node:
        raise UserError(f"--world-size {own.world_size}: must be a multiple of --node-size {node}")
    if own.rank_layouts and not own.gpu_memory:
        raise UserError("--rank-layouts needs --gpu-memory: what shall they fit into?")
    first = parse_arguments(words)
    vocab, lengths = data_of(first.data)
    vocab = own.vocab_size or vocab
    lengths = parse_lengths(own.lengths, np.random.default_rng(first.training.seed)) if own.lengths else lengths
    if own.rank_layouts:
        best = ranked(words, own.world_size, node, own.gpu_memory, vocab, lengths)
        if not best:
            fit = f"fits into {ROOM:.0%} of {own.gpu_memory:g} GiB"
            raise UserError(f"no layout of {own.world_size} ranks {fit}: more ranks, or smaller rows")
        if own.json:
            print(
                json.dumps(
                    {"fitting": len(best), "layouts": [_ranked_facts(*one) for one in best[: own.most]]}, indent=1
                )
            )
        else:
            _print_ranked(best[: own.most], len(best), own.gpu_memory)
        return 0
    config = resolved(words, own.world_size, node)
    architecture = config.model.architecture(vocab)
    if own.json:
        plan = make_plan(config, architecture, lengths)
        print(json.dumps(asdict(plan), indent=1))
        return 0
    print(plan_text(config, architecture, lengths))
    if own.gpu_memory:
        share = make_plan(config, architecture, lengths).memory.peak / 2**30 / own.gpu_memory
        verdict = "yes" if share <= ROOM else "NO"
        print(f"{'fits':<14} {verdict}: {share:.0%} of {own.gpu_memory:g} GiB, of which {ROOM:.0%} may be planned")
    with contextlib.redirect_stderr(io.StringIO()):
        legal = legal_values(words, own.world_size, node)
    print(
        f"{'legal sizes':<14} "
        + "; ".join(f"{axis} {', '.join(map(str, sizes)) or 'none'}" for axis, sizes in legal.items())
    )
    return 0


def _ranked_facts(seconds: float, config: RunConfig, plan: Any) -> dict[str, Any]:
    sizes = {f"{axis}_size": getattr(config.parallel, f"{axis}_size") for axis in (*AXES, "dp_shard")}
    return {**sizes, "recompute": config.training.recompute, "estimated_seconds": seconds, "plan": asdict(plan)}


def _print_ranked(best: list[tuple[float, Any, Any]], found: int, memory: float) -> None:
    print(
        f"{found} layouts fit into {ROOM:.0%} of {memory:g} GiB; ordered by an estimate from FLOPs, bytes and idle time, not a measurement"
    )
    widths = {
        "pp": 3,
        "tp": 3,
        "cp": 3,
        "dp_shard": 8,
        "recompute": -10,
        "GiB": 7,
        "idle": 6,
        "balance": 8,
        "sent GiB": 9,
        "estimate": 9,
    }
    print(" ".join(f"{name:>{w}}" if w > 0 else f"{name:<{-w}}" for name, w in widths.items()))
    for seconds, config, plan in best:
        print(
            f"{config.parallel.pp_size:>3} {config.parallel.tp_size:>3} {config.parallel.cp_size:>3} {config.parallel.dp_shard_size:>8} {config.training.recompute:<10} "
            f"{plan.memory.peak / 2**30:>7.1f} {plan.bubble:>6.1%} {plan.rows.cp_balance:>8.3f} {sum(plan.sent.values()) / 2**30:>9.2f} "
            f"{seconds:>7.2f} s"
        )


if __name__ == "__main__":
    sys.exit(run_tool(main))
