"""Plan a run on a laptop, without ranks: `python tools/plan.py --world-size 64 --gpu-memory 80 <flags of train.py>`.

Prints memory of a rank by part, FLOPs and sent bytes of a step, packing and balance of a distribution of document
lengths, legal sizes, and with --rank-layouts the best layouts that fit. Memory is measured on fake tensors
(planner/memory.py) with plain PyTorch layers, which save most; with --transformer-impl te with the layers of
Transformer Engine, installed or not, in bf16.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from config.cli import add_demo_preset, parse_arguments
from config.schema import RunConfig
from cp.cost import length_quantiles
from model.config import RECOMPUTE, GPTConfig
from planner.estimate import (
    GIB,
    Plan,
    Rows,
    format_plan,
    least_memory,
    make_plan,
    max_rank_memory,
    pack_rows,
    parse_lengths,
    read_vocab_and_lengths,
    resolve_for_cluster,
    resolve_without_devices,
)
from planner.memory import Memory
from planner.step_time import Job, build_machines, estimate_step
from utils.errors import OneLineParser, UserError, run_tool

AXES = ("pp", "dp_replicate", "cp", "tp")  # dp_shard takes the ranks that are left
USABLE = 0.9  # share of a device's memory that a plan may fill; the rest is the allocator's, NCCL's and the context's


@dataclass(frozen=True)
class Layout:
    """A layout with its plan; `seconds` of a step are an estimate for the order."""

    seconds: float
    config: RunConfig
    plan: Plan


def build_parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, epilog="All flags of train.py too.")
    add = parser.add_argument
    add("--world-size", type=int, default=1, help="ranks in all; default: 1")
    add("--node-size", type=int, help="ranks on a node; default: all, at most 8")
    add("--gpu-memory", type=float, metavar="GIB", help="memory of one device in GiB; default: no verdict")
    add("--lengths", help="of documents: fixed:N, lognormal:MEAN,SIGMA or a file; default: the prepared corpus's")
    add("--rank-layouts", action="store_true", help="list the best layouts of --world-size ranks that fit")
    add("--most", type=int, default=12, help="layouts in the list; default: 12")
    add("--json", action="store_true", help="print the plan, or the list of --rank-layouts, as JSON")
    return parser


def find_legal_sizes(words: list[str], world: int, node: int) -> dict[str, list[int]]:
    """For each axis the sizes that train.py accepts with the other flags as given and --dp-shard-size -1."""
    legal: dict[str, list[int]] = {axis: [] for axis in AXES}
    for axis, sizes in legal.items():
        for size in (n for n in range(1, world + 1) if world % n == 0):
            with contextlib.suppress(UserError):
                flags = ["--dp-shard-size", "-1", f"--{axis.replace('_', '-')}-size", str(size)]
                resolve_without_devices([*words, *flags], world, node)
                sizes.append(size)
    return legal


def legal_layouts(words: list[str], world: int, node: int) -> Iterator[RunConfig]:
    """Every legal layout, with each kind of recomputation; for larger cp sizes than the given one also a hybrid pool.

    A rank of a pool has as many tokens as with the given --micro-batch-size and --cp-size.
    """
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    given = parse_arguments(words)
    samples, ranks = given.training.micro_batch_size, given.parallel.cp_size
    for pp in divisors:
        for tp in (n for n in divisors if n <= node and world % (pp * n) == 0):
            for cp in (n for n in divisors if world % (pp * tp * n) == 0):
                pool = samples * cp // ranks
                kinds = [(given.parallel.cp_layout, samples)]
                if pool > samples and samples * cp % ranks == 0 and "--cp-layout" not in words:
                    kinds.append(("hybrid", pool))
                for (layout, micro_batch), recompute in itertools.product(kinds, RECOMPUTE):
                    config = deepcopy(given)
                    parallel, training = config.parallel, config.training
                    parallel.pp_size, parallel.tp_size, parallel.cp_size, parallel.dp_shard_size = pp, tp, cp, -1
                    parallel.cp_layout, training.micro_batch_size, training.recompute = layout, micro_batch, recompute
                    with contextlib.suppress(UserError):
                        yield resolve_for_cluster(config, world, node)


def read_quantiles(flags: RunConfig, lengths: np.ndarray | None) -> tuple[float, ...]:
    """Document lengths, each of which stands for an equal share of the tokens."""
    is_whole = lengths is None or flags.data.packing == "concat"
    return (float(flags.data.seq_length),) if is_whole else length_quantiles(lengths, flags.data.seq_length)


def estimate_seconds(
    config: RunConfig, architecture: GPTConfig, rows: Rows, lengths: tuple[float, ...], node: int
) -> float:
    """Seconds of a step on H100s, or on CPU ranks, of the busiest rank of the rows; replicas count as shards.

    Args:
        lengths: document lengths, each of which stands for an equal share of the tokens.
    """
    parallel, is_cpu = config.parallel, config.parallel.device == "cpu"
    job = Job(
        architecture=architecture,
        seq_length=config.training.micro_batch_size * config.data.seq_length,
        lengths=lengths,
        dtype="fp32" if is_cpu else "bf16",
        choice=parallel.attention,
        dp=parallel.dp_size,
        microbatches=config.num_microbatches,
        tp=parallel.tp_size,
        pp=parallel.pp_size,
        virtual_stages=parallel.virtual_stages,
        recompute=config.training.recompute,
        reshard=parallel.reshard_after_forward == "on",
    )
    machine = replace(build_machines()["cpu" if is_cpu else "H100"], node_ranks=node)
    return estimate_step(job, machine).total * rows.work_balance


def plan_run(
    config: RunConfig, vocab: int, lengths: np.ndarray | None, node: int, memory: Memory | None = None
) -> tuple[Plan, float]:
    """The plan of resolved flags, and the estimated seconds of a step. `memory` as `make_plan`."""
    architecture = config.model.architecture(vocab)
    rows = pack_rows(config, architecture, lengths)
    seconds = estimate_seconds(config, architecture, rows, read_quantiles(config, lengths), node)
    return make_plan(config, architecture, rows, memory), seconds


@dataclass(frozen=True)
class Ranking:
    """Layouts in the order of their estimated time, and those that fit.

    Attributes:
        layouts: every legal one, without memory.
        limit: bytes that a rank's plan may fill.
    """

    layouts: list[Layout]
    vocab: int
    limit: float

    def find_fitting(self, most: int, report: Callable[[str], object] = lambda text: None) -> Iterator[Layout]:
        """The first `most` layouts that fit, as they are found. Memory is measured only where a bound from sizes fits.

        Args:
            report: is told how many layouts are done.
        """
        found = 0
        for number, layout in enumerate(self.layouts, start=1):
            report(f"{number} of {len(self.layouts)}")
            config, architecture = layout.config, layout.config.model.architecture(self.vocab)
            if least_memory(config, architecture) > self.limit:
                continue
            memory = max_rank_memory(config, architecture, self.limit)
            if memory.peak <= self.limit:
                yield replace(layout, plan=replace(layout.plan, memory=memory))
                found += 1
                if found == most:
                    return


def rank_layouts(
    words: list[str],
    world_size: int,
    node: int,
    vocab: int,
    lengths: np.ndarray | None,
    *,
    gpu_memory: float,
) -> Ranking:
    """All legal layouts in the order of estimated time."""
    rows, found = {}, []  # type: ignore[var-annotated]
    quantiles = read_quantiles(parse_arguments(words), lengths)
    for config in legal_layouts(words, world_size, node):
        parallel, architecture = config.parallel, config.model.architecture(vocab)
        sizes = parallel.cp_size, parallel.dp_size, config.training.micro_batch_size
        key = (*sizes, parallel.cp_layout, parallel.attention.method, config.data.document_alignment)
        if key not in rows:
            rows[key] = pack_rows(config, architecture, lengths)
        plan = make_plan(config, architecture, rows[key], Memory(0, {}, 0))  # memory is not measured yet
        found.append(Layout(estimate_seconds(config, architecture, rows[key], quantiles, node), config, plan))
    ordered = sorted(found, key=lambda layout: layout.seconds)
    return Ranking(ordered, vocab, USABLE * gpu_memory * GIB)


def check_numbers(counts: Mapping[str, int | None], gpu_memory: float | None) -> None:
    """Raises UserError for a size or count below 1, or a memory that is not finite and positive."""
    for name in ("world_size", "node_size", "most"):
        value = counts[name]
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if gpu_memory is not None and not 0 < gpu_memory < math.inf:
        raise UserError(f"--gpu-memory {gpu_memory:g}: must be finite and above 0")


def layout_as_json(layout: Layout) -> dict[str, Any]:
    sizes = {f"{axis}_size": getattr(layout.config.parallel, f"{axis}_size") for axis in (*AXES, "dp_shard")}
    recompute = layout.config.training.recompute
    sizes |= {"micro_batch_size": layout.config.training.micro_batch_size}
    shape = {**sizes, "cp_layout": layout.config.parallel.cp_layout}
    return {**shape, "recompute": recompute, "estimated_seconds": layout.seconds, "plan": asdict(layout.plan)}


def layout_row(layout: Layout) -> str:
    parallel, plan = layout.config.parallel, layout.plan
    return (
        f"{parallel.pp_size:>3} {parallel.tp_size:>3} {parallel.cp_size:>3} {parallel.dp_shard_size:>8} "
        f"{layout.config.training.micro_batch_size:>5} {parallel.cp_layout:<10} "
        f"{layout.config.training.recompute:<10} {plan.memory.peak / GIB:>7.1f} {plan.bubble:>6.1%} "
        f"{plan.rows.work_balance:>8.3f} {sum(plan.sent.values()) / GIB:>9.2f} {layout.seconds:>7.2f} s"
    )


def print_layouts(ranking: Ranking, most: int, memory: float) -> int:
    """Print each layout as it is found, and on a terminal how many are done. Returns the number printed."""
    is_terminal, found = sys.stderr.isatty(), []

    def report(text: str) -> None:
        if is_terminal:
            print(f"\r{text}\x1b[K\r", end="", file=sys.stderr, flush=True)

    print(
        f"of {len(ranking.layouts)} legal layouts the first {most} that fit into {USABLE:.0%} of {memory:g} GiB, best "
        "first by an estimate of planner/step_time.py, not a measurement"
    )
    print(" pp  tp  cp dp_shard micro layout     recompute      GiB   idle  balance  sent GiB  estimate", flush=True)
    for layout in ranking.find_fitting(most, report):
        print(layout_row(layout), flush=True)
        found.append(layout)
    report("")
    return len(found)


def advise(config: RunConfig, memory: Memory) -> str:
    """Flags that make the largest part of a rank's memory smaller."""
    parallel, training = config.parallel, config.training
    part = max(memory.parts, key=lambda name: memory.parts[name])
    activations = {
        "--recompute full": training.recompute != "full",
        "--offload-activations": training.recompute == "full" and not training.offload_activations,
        "--micro-batch-size 1": training.micro_batch_size > 1,
        "a larger --cp-size": True,
    }
    weights = {
        "--reshard-after-forward on": parallel.reshard_after_forward != "on" and parallel.pp_size == 1,
        "a larger --tp-size": True,
        "more ranks (--world-size)": True,
    }
    reduced = {"--reduce-every-microbatch on": parallel.reduce_every_microbatch != "on" and parallel.pp_size == 1}
    logits = {"a smaller --loss-chunk-size": True}
    by_part = {"gradients": reduced | weights, "gathered weights": weights, "logits and loss": logits | activations}
    by_part |= {"weights": weights, "optimiser states": weights, "fused weights": weights}
    helping = [flag for flag, helps in by_part.get(part, activations).items() if helps]
    return f"most of it is {part}: {' or '.join(helping[:3])}"


def print_plan(
    config: RunConfig, plan: Plan, seconds: float, gpu_memory: float | None, legal: dict[str, list[int]]
) -> None:
    print(format_plan(config, plan))
    device = "CPU ranks" if config.parallel.device == "cpu" else "H100"
    print(f"{'estimate':<14} {seconds:.2f} s a step on {device} (planner/step_time.py), not a measurement")
    if gpu_memory:
        share = plan.memory.peak / GIB / gpu_memory
        verdict = "yes" if share <= USABLE else "NO"
        print(f"{'fits':<14} {verdict}: {share:.0%} of {gpu_memory:g} GiB, of which {USABLE:.0%} may be planned")
        if share > USABLE:
            print(f"{'':<14} {advise(config, plan.memory)}")
    sizes = (f"{axis} {', '.join(map(str, sizes)) or 'none'}" for axis, sizes in legal.items())
    print(f"{'legal sizes':<14} {'; '.join(sizes)}")


def main(argv: list[str]) -> int:
    own, words = build_parser().parse_known_args(argv)
    check_numbers(vars(own), own.gpu_memory)
    node = own.node_size or min(8, own.world_size)
    if own.world_size % node:
        raise UserError(f"--world-size {own.world_size}: must be a multiple of --node-size {node}")
    if own.rank_layouts and not own.gpu_memory:
        raise UserError("--rank-layouts needs --gpu-memory, the limit that layouts must fit into")
    words, notes = add_demo_preset(words)
    for note in notes:
        print(f"{note}, as train.py without --data-path and --config", file=sys.stderr)
    flags = parse_arguments(words)
    vocab, lengths = read_vocab_and_lengths(flags)
    lengths = parse_lengths(own.lengths, np.random.default_rng(flags.training.seed)) if own.lengths else lengths
    gc.freeze()  # collections of garbage, which take a tenth of a plan's time, skip what imports made
    if own.rank_layouts:
        ranking = rank_layouts(words, own.world_size, node, vocab, lengths, gpu_memory=own.gpu_memory)
        if own.json:
            best = list(ranking.find_fitting(own.most))
            print(json.dumps({"legal": len(ranking.layouts), "layouts": list(map(layout_as_json, best))}, indent=1))
        elif not print_layouts(ranking, own.most, own.gpu_memory):
            fit = f"fits into {USABLE:.0%} of {own.gpu_memory:g} GiB"
            raise UserError(f"no layout of {own.world_size} ranks {fit}: more ranks, or smaller rows")
        return 0
    config = resolve_without_devices(words, own.world_size, node)
    plan, seconds = plan_run(config, vocab, lengths, node)
    if own.json:
        print(json.dumps(asdict(plan) | {"estimated_seconds": seconds}, indent=1))
        return 0
    print_plan(config, plan, seconds, own.gpu_memory, find_legal_sizes(words, own.world_size, node))
    first, *later = config.training.batches.phases
    if later:
        config.training.global_batch_size = first.size
        _, seconds = plan_run(config, vocab, lengths, node, plan.memory)
        print(
            f"{'ramp':<14} {seconds:.2f} s a step of {first.size} samples at first, {later[-1].step} steps to the last"
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
