"""Attention alone over context-parallel ranks: time, efficiency, traffic and balance of each method of cp/support.py.

    python benchmarks/cp_attention.py [--seq-lengths 4096,32768] [--dtype fp32] [--only 1,2,3] [--json FILE]

1. Every cell of cp/support.py's table on gloo ranks of one thread, over one BSHD sequence and over packed THD
   documents of log-normal lengths. Efficiency is (one rank's time for the whole row / cp) / time, at most cores / cp.
   `wait` is the time in which native's computation waits for transfers, slower peers included. `sent` is counted, in
   bytes that a rank sends, and compared with the method's formula (planner/estimate.py).
2. native p2p against ring-flash-attn's zigzag in bf16, both over PyTorch's flash kernel; 1 or more: as fast or faster.
3. Profile of native p2p with few and with many documents: no read of a tensor's value by the host.
4. The layout hybrid against zigzag, contiguous and llama3, over packed documents of median 600 and 2000 and over one
   document: time of the others over hybrid's. 1 or more with packed documents, 0.98 or more with one document.

A figure is a median over rounds of the slowest rank. ring-flash-attn runs over PyTorch's flash kernel
(cp/flash_attn_cpu.py). A wrong byte count or a host read fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import (
    CORES,
    World,
    benchmark_parser,
    describe_goal,
    round_ratios,
    take_turns,
    write_figures,
)
from cp.attention import build_attention
from cp.layout import attention_pairs, balance, held_documents
from cp.packed_seq import PackedSeq, build_packed_seq
from cp.placement import Placement, degree_chain, place
from cp.support import QKV_FORMATS, AttentionChoice, cells
from data.packing import pack_epoch
from parallel import collectives
from parallel.collectives import WaitClock
from parallel.grid import GridSizes, build_grid, neighbour_groups, split_group
from planner.estimate import count_gathered, cp_bytes

CP_SIZES = (2, 4)
MEDIAN_LENGTH, SIGMA, SEED = 600, 1.5, 1234
HYBRID_MEDIANS, HYBRID_SAMPLES = (600, 2000), 8  # median lengths of comparison 4, samples of a row
ATTENTION_COST = 4.5e-5  # of a 1B model, as data.batch.BatchPlan's
UNIT = 2 * max(CP_SIZES)  # every layout at every cp size cuts documents that are padded to it
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LONG, LONG_ROUNDS = 16384, 3  # rows from here on get fewer rounds
PROFILED_TOKENS = 16384  # about, of comparison 3
RING_ROUNDS = 7  # at least, of comparison 2
MAX_DIFFERENCE = 0.02  # relative, between native and ring-flash-attn in bf16
ALONE = AttentionChoice(backend="native", method="p2p", qkv_format="thd", layout="zigzag", cp_size=1)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of tokens in documents of `lengths`, and the shape of its heads."""

    seq_length: int
    qkv_format: str
    dtype: str
    heads: int
    groups: int
    head_dim: int
    lengths: tuple[int, ...]

    @property
    def padded_lengths(self) -> np.ndarray:
        """A last document of length 0 is the row's tail."""
        padded = np.array([-(-length // UNIT) * UNIT for length in self.lengths])
        if not self.lengths[-1]:
            padded[-1] = self.seq_length - padded.sum()
        return padded


@cache
def place_documents(row: Row, layout: str, cp_size: int) -> tuple[np.ndarray, np.ndarray, Placement | None]:
    """Real and padded lengths; for hybrid placed as in the training of a 1B model, with fillers."""
    lengths = np.array(row.lengths)
    if layout != "hybrid" or cp_size == 1:
        return lengths, row.padded_lengths, None
    lengths = lengths[lengths > 0]
    samples: dict[str, Any] = dict(sample_numbers=np.zeros_like(lengths), num_samples=1)
    placed = place(lengths, row_length=row.seq_length, cp_size=cp_size, attention_cost=ATTENTION_COST, **samples)
    assert placed is not None
    return placed.lengths, placed.padded_lengths, placed.placement


def draw_lengths(seq_length: int, median: int = MEDIAN_LENGTH) -> tuple[int, ...]:
    """Log-normal lengths whose padded ones fill the row; the last is cut."""
    generator, lengths, room = np.random.default_rng(SEED), [], seq_length
    while room:
        length = min(room, max(1, round(generator.lognormal(math.log(median), SIGMA))))
        lengths.append(length)
        room -= -(-length // UNIT) * UNIT
    return tuple(lengths)


def draw_packed(seq_length: int, samples: int, median: int) -> tuple[int, ...]:
    """Documents of log-normal lengths in samples of `seq_length` tokens, as best-fit packing makes them, and a tail."""
    lengths = np.random.default_rng(SEED).lognormal(math.log(median), SIGMA, 64 * samples * seq_length // median)
    options = dict(seed=SEED, epoch=0, seq_length=seq_length, alignment=2 * UNIT)
    epoch = pack_epoch(np.maximum(1, np.rint(lengths)).astype(np.int64), **options)
    return *(int(n) for sample in range(samples) for n in epoch.sample_pieces(sample)[:, 2]), 0


def compute_sent_bytes(row: Row, choice: AttentionChoice) -> tuple[int, int]:
    """Bytes that the rank that sends most sends in the forward and in the backward pass, by the formula."""
    lengths, padded, placement = place_documents(row, choice.layout, choice.cp_size)
    place: dict[str, Any] = dict(cp_size=choice.cp_size, layout=choice.layout, placement=placement)
    gathered = count_gathered(lengths, padded, **place).tolist()
    shape: dict[str, Any] = dict(
        heads=row.heads, groups=row.groups, head_dim=row.head_dim, item=DTYPES[row.dtype].itemsize
    )
    tokens = row.seq_length // choice.cp_size
    if placement is not None and choice.method == "p2p":  # a ring for each degree
        held = [held_documents(placement, rank) for rank in range(choice.cp_size)]
        rings = [
            [
                cp_bytes(replace(choice, cp_size=degree), tokens=stored // degree, **shape)
                for degree, stored in zip(placement.degrees[own].tolist(), padded[own].tolist(), strict=True)
            ]
            for own in held
        ]
        return max((sum(sent for sent, _ in ring), sum(sent for _, sent in ring)) for ring in rings)
    return max(cp_bytes(choice, tokens=tokens, **shape, gathered=counts) for counts in gathered)


# ---------------------------------------------------------------------------------------------------
# What ranks run


class AttentionRank:
    """A cp rank that keeps what it builds: groups, attentions, and tensors until `forget`."""

    def __init__(self) -> None:
        self.grid = build_grid(GridSizes(cp=dist.get_world_size()))
        degrees = degree_chain(dist.get_world_size())
        self.degree_groups = neighbour_groups(self.grid, "cp", degrees)
        self.a2a_groups: dict[int, tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}
        self.attentions: dict[tuple[Row, AttentionChoice], tuple[Callable[..., Tensor], WaitClock]] = {}
        self.shards: dict[tuple[Row, str], tuple[PackedSeq, list[Tensor]]] = {}

    def _shard(self, row: Row, layout: str) -> tuple[PackedSeq, list[Tensor]]:
        """The row's `PackedSeq`, and this rank's q, k, v and dout."""
        if (row, layout) in self.shards:
            return self.shards[row, layout]
        cp_size = self.grid.size("cp")
        lengths, padded, placement = place_documents(row, layout, cp_size)
        place: dict[str, Any] = dict(qkv_format=row.qkv_format, layout=layout, placement=placement)
        packed_seq, owned = build_packed_seq(lengths, padded, cp_size=cp_size, cp_rank=self.grid.rank("cp"), **place)
        generator, tensors = torch.Generator().manual_seed(SEED), []
        for heads in (row.heads, row.groups, row.groups, row.heads):
            whole = torch.randn(row.seq_length, heads, row.head_dim, generator=generator)
            tensors.append(whole[torch.from_numpy(owned)].to(DTYPES[row.dtype]))
        for x in tensors[:3]:
            x.requires_grad_()
        return self.shards.setdefault((row, layout), (packed_seq, tensors))

    def _attention(self, row: Row, choice: AttentionChoice) -> tuple[Callable[..., Tensor], WaitClock]:
        if (row, choice) in self.attentions:
            return self.attentions[row, choice]
        if choice.backend == "ring":
            message = r".*torch\.distributed\.\w+` is deprecated"
            warnings.filterwarnings("ignore", message=message, category=FutureWarning)
        size, clock = choice.a2a_size, WaitClock()
        if size > 1 and size not in self.a2a_groups:
            self.a2a_groups[size] = split_group(self.grid, "cp", size)
        groups = self.a2a_groups.get(size)
        all_groups: dict[str, Any] = dict(a2a_groups=groups, degree_groups=self.degree_groups)
        attention = build_attention(choice, head_dim=row.head_dim, clock=clock, **all_groups)
        return self.attentions.setdefault((row, choice), (attention, clock))

    def forget(self) -> None:
        """Free the rows' tensors and plans."""
        self.shards.clear()

    def _run(self, row: Row, choice: AttentionChoice, between: Callable[[], Any] = lambda: None) -> list[Tensor]:
        """One forward and backward: out, dq, dk, dv. `between` is called between the passes."""
        attention, _ = self._attention(row, choice)
        packed_seq, (q, k, v, dout) = self._shard(row, choice.layout)
        q.grad = k.grad = v.grad = None
        out = attention(q, k, v, packed_seq, self.grid.group("cp"))
        between()
        out.backward(dout)
        return [x for x in (out.detach(), q.grad, k.grad, v.grad) if x is not None]

    def time(self, row: Row, choice: AttentionChoice) -> tuple[float, float, float]:
        """Seconds of the forward pass, of forward and backward, and of the waits in both (0 where no clock counts)."""
        _, clock = self._attention(row, choice)
        clock.read()
        marks: list[float] = []
        dist.barrier()
        start = time.perf_counter()
        self._run(row, choice, lambda: marks.append(time.perf_counter()))
        return marks[0] - start, time.perf_counter() - start, clock.read()

    def count_sent(self, row: Row, choice: AttentionChoice) -> tuple[int, int]:
        """Bytes sent in the forward and in the backward pass. Also the warm-up."""
        sent = [0]
        with counting_sent(sent):
            self._run(row, choice, lambda: sent.append(0))
        return sent[0], sent[1]

    def compare(self, row: Row, first: AttentionChoice, second: AttentionChoice) -> float:
        """Largest relative difference of two choices' out, dq, dk and dv."""
        results = [[x.float().clone() for x in self._run(row, choice)] for choice in (first, second)]
        return max(((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True))

    def profile(self, row: Row, choice: AttentionChoice) -> dict[str, int]:
        """Calls of operators in one forward and backward whose plan exists."""
        self._run(row, choice)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            self._run(row, choice)
        calls = {event.key: event.count for event in profile.key_averages()}

        def count(prefix: str) -> int:
            return sum(number for name, number in calls.items() if name.startswith(prefix))

        return {
            "aten::item": calls.get("aten::item", 0),
            "aten::_local_scalar_dense": calls.get("aten::_local_scalar_dense", 0),
            "aten::empty*": count("aten::empty"),
            "flash kernels": count("aten::_scaled_dot_product_flash"),
        }


@contextmanager
def counting_sent(sent: list[int]) -> Iterator[None]:
    """Add the bytes that this rank sends to sent[-1]: wraps every collective that a method of the table calls."""
    from torch.distributed import _functional_collectives as functional

    def wrap(holder: Any, name: str, bytes_of: Callable[..., float]) -> Any:
        original = getattr(holder, name)

        def call(*positional: Any, **keywords: Any) -> Any:
            sent[-1] += round(bytes_of(*positional, **keywords))
            return original(*positional, **keywords)

        return mock.patch.object(holder, name, call)

    def ring(ops: list[dist.P2POp]) -> float:
        return sum(op.tensor.nbytes for op in ops if op.op is dist.isend)

    def gather(out: Tensor, x: Tensor, *_: Any, **__: Any) -> float:
        return out.nbytes - x.nbytes

    def scatter(out: Tensor, x: Tensor, *_: Any, **__: Any) -> float:
        return x.nbytes - out.nbytes

    def trade(out: Tensor, x: Tensor, _: Any = None, rows: Any = None, *, group: dist.ProcessGroup, **__: Any) -> float:
        kept = len(x) / group.size() if rows is None else rows[group.rank()]
        return x.nbytes * (1 - kept / len(x)) if len(x) else 0.0

    def functional_gather(x: Tensor, gather_dim: int, group: dist.ProcessGroup) -> float:
        return x.nbytes * (group.size() - 1)

    patches = [
        wrap(dist, "batch_isend_irecv", ring),
        wrap(dist, "all_gather_into_tensor", gather),
        wrap(dist, "reduce_scatter_tensor", scatter),
        wrap(dist, "all_to_all_single", trade),
        wrap(collectives, "all_gather_into", gather),
        wrap(collectives, "reduce_scatter_into", scatter),
        wrap(functional, "permute_tensor", lambda x, *_: x.nbytes),
        wrap(functional, "all_gather_single", functional_gather),
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


# ---------------------------------------------------------------------------------------------------
# The comparisons

Worlds = dict[int, World]  # by cp size


def time_choices(
    worlds: Worlds, row: Row, choices: list[AttentionChoice], rounds: int
) -> dict[AttentionChoice, list[list[float]]]:
    """Per choice and round: seconds of forward, of forward and backward, of waits; of the slowest rank."""

    def time_one(choice: AttentionChoice) -> list[float]:
        ranks = worlds[choice.cp_size].run(AttentionRank.time, row, choice)
        return [max(seconds) for seconds in zip(*ranks, strict=True)]

    return take_turns({choice: partial(time_one, choice) for choice in choices}, rounds)


def medians(rounds: list[list[float]]) -> list[float]:
    return [statistics.median(values) for values in zip(*rounds, strict=True)]


def list_cells(row: Row, cp_size: int) -> list[AttentionChoice]:
    """The table's cells for the row's format and dtype, without a2a+p2p if no ranks are left for the ring."""
    found = cells(device="cpu", cp_size=cp_size, heads=row.heads, groups=row.groups)
    chosen = [c for c, dtype in found if (c.qkv_format, dtype) == (row.qkv_format, row.dtype)]
    return [c for c in chosen if not (c.method == "a2a+p2p" and c.a2a_size == cp_size)]


def describe_choice(
    row: Row, choice: AttentionChoice, rounds: list[list[float]], sent: tuple[int, int], alone: list[float]
) -> dict[str, Any]:
    """The figures of a cell.

    Args:
        sent: counted bytes of the rank that sends most.
        alone: one rank's seconds of forward, and of forward and backward.
    """
    size, (forward, both, waiting) = choice.cp_size, medians(rounds)
    lengths, padded, placement = place_documents(row, choice.layout, size)
    pairs = attention_pairs(lengths, padded, cp_size=size, layout=choice.layout, placement=placement)
    return dict(
        choice=asdict(choice),
        seq_length=row.seq_length,
        dtype=row.dtype,
        documents=len(row.lengths),
        forward_s=forward,
        forward_backward_s=both,
        one_rank_s=alone,
        efficiency_forward=alone[0] / size / forward,
        efficiency=alone[1] / size / both,
        efficiency_bound=min(1.0, CORES / size),
        wait_s=waiting if choice.backend == "native" and choice.method != "a2a" else None,
        sent_bytes=sent,
        sent_formula=compute_sent_bytes(row, choice),
        balance=balance(pairs),
        rounds_s=rounds,
    )


def print_choice(entry: dict[str, Any]) -> None:
    """A cell's line of the table; (!) marks a byte count that differs from the formula."""
    choice = entry["choice"]
    name = f"{choice['backend']} {choice['method']} {choice['layout']}"
    wait = "-" if entry["wait_s"] is None else f"{entry['wait_s']:.3f}"
    both = zip(entry["sent_bytes"], entry["sent_formula"], strict=True)
    forward, backward = (f"{sent / 2**20:.2f}{'' if sent == formula else ' (!)'}" for sent, formula in both)
    numbers = f"{entry['forward_s']:>8.3f}{entry['forward_backward_s']:>8.3f}"
    numbers += f"{entry['efficiency_forward']:>8.2f}{entry['efficiency']:>8.2f}{entry['efficiency_bound']:>7.2f}"
    line = f"   {choice['cp_size']:>2} {name:33}{numbers}{wait:>8}{forward:>14}{backward:>9}{entry['balance']:>9.3f}"
    print(line, flush=True)


def compare_methods(worlds: Worlds, rows: list[Row], rounds: int) -> list[dict]:
    """Comparison 1."""
    columns = f"{'fwd s':>8}{'f+b s':>8}{'eff fwd':>8}{'eff f+b':>8}{'bound':>7}{'wait s':>8}"
    print(f"\n1  {'cp':>2} {'backend method layout':33}{columns}{'sent fwd MiB':>14}{'bwd MiB':>9}{'balance':>9}")
    figures = []
    for row in rows:
        alone = replace(ALONE, qkv_format=row.qkv_format)
        choices = [alone, *(choice for size in CP_SIZES for choice in list_cells(row, size))]
        sent = {choice: max(worlds[choice.cp_size].run(AttentionRank.count_sent, row, choice)) for choice in choices}
        times = time_choices(worlds, row, choices, rounds if row.seq_length < LONG else min(rounds, LONG_ROUNDS))
        one_rank = medians(times[alone])[:2]
        title = f"{row.seq_length} tokens, {row.qkv_format}, {row.dtype}, {len(row.lengths)} documents"
        print(f"{title}: one rank {one_rank[0]:.3f} s forward, {one_rank[1]:.3f} s forward and backward")
        for choice in choices[1:]:
            figures.append(describe_choice(row, choice, times[choice], sent[choice], one_rank))
            print_choice(figures[-1])
        for world in worlds.values():
            world.run(AttentionRank.forget)
    return figures


def compare_with_ring_flash(worlds: Worlds, rows: list[Row], rounds: int) -> list[dict]:
    """Comparison 2, over the first BSHD row."""
    row = replace(next(r for r in rows if r.qkv_format == "bshd"), dtype="bf16")
    kernel = "bshd, bf16, both over PyTorch's flash kernel"
    print(f"\n2  native p2p, ring-flash-attn zigzag: {row.seq_length} tokens, {kernel}")
    figures = []
    for size in CP_SIZES:
        ours = AttentionChoice(backend="native", method="p2p", qkv_format="bshd", layout="zigzag", cp_size=size)
        theirs = replace(ours, backend="ring", method="zigzag")
        apart = max(worlds[size].run(AttentionRank.compare, row, ours, theirs))  # also the warm-up
        assert apart <= MAX_DIFFERENCE, f"cp {size}: results differ by {apart}, at most {MAX_DIFFERENCE} is rounding"
        times = time_choices(worlds, row, [ours, theirs], max(rounds, RING_ROUNDS))
        for column, name in enumerate(("forward", "forward+backward")):
            our_rounds, their_rounds = ([r[column] for r in times[choice]] for choice in (ours, theirs))
            our_time, their_time = statistics.median(our_rounds), statistics.median(their_rounds)
            spread = round_ratios(their_rounds, our_rounds)
            ratio, (low, high) = spread["median"], spread["quartiles"]
            numbers = f"{our_time:>8.3f} s {their_time:>8.3f} s   {ratio:.3f} ({low:.3f} to {high:.3f})"
            print(f"   cp {size} {name:18}{numbers} {describe_goal(ratio, 1.0)}", flush=True)
            entry = dict(cp_size=size, what=name, native_s=our_time, ring_flash_s=their_time)
            figures.append(entry | dict(ratio=ratio, quartiles=[low, high]))
        figures[-1] |= dict(rounds_s=list(times.values()), relative_difference=apart)
    return figures


def profile_documents(worlds: Worlds, rows: list[Row], rounds: int) -> list[dict]:
    """Comparison 3."""
    print("\n3  profiled forward and backward of native p2p, cp 2, thd; calls on one rank:")
    figures = []
    for count in (4, 64):
        weights = np.random.default_rng(SEED).dirichlet(np.full(count, 3.0))
        lengths = np.maximum(1, (weights * PROFILED_TOKENS / UNIT).astype(int)) * UNIT - 3
        seq_length = int(lengths.sum()) + 3 * count
        row = replace(rows[0], qkv_format="thd", lengths=tuple(lengths.tolist()), seq_length=seq_length)
        calls = worlds[2].run(AttentionRank.profile, row, replace(ALONE, cp_size=2))[0]
        numbers = ", ".join(f"{number} {name}" for name, number in calls.items())
        print(f"   {count:>2} documents: {numbers}", flush=True)
        figures.append({"documents": count, "tokens": row.seq_length, **calls})
    return figures


def compare_hybrid(worlds: Worlds, rows: list[Row], rounds: int) -> list[dict]:
    """Comparison 4, over rows of the last row's length."""
    last, figures = rows[-1], []
    print(f"\n4  time / that of native p2p hybrid, forward and backward, {last.seq_length} tokens, {last.dtype}, thd")
    columns = f"{'s':>8}{'ratio':>7} {'quartiles':>14}{'MiB':>9}{'balance':>9}"
    print(f"   {'':17}{'cp':>3} {'backend method layout':33}{columns}")
    own = last.seq_length // HYBRID_SAMPLES
    documents = {f"median {m}": draw_packed(own, HYBRID_SAMPLES, m) for m in HYBRID_MEDIANS}
    documents["one document"] = (last.seq_length,)
    for (name, lengths), size in itertools.product(documents.items(), CP_SIZES):
        row = replace(last, qkv_format="thd", lengths=lengths)
        hybrid = replace(ALONE, cp_size=size, layout="hybrid")
        choices = [hybrid, *(c for c in list_cells(row, size) if c != hybrid)]
        sent = {choice: max(worlds[size].run(AttentionRank.count_sent, row, choice)) for choice in choices}
        times = time_choices(worlds, row, choices, rounds)
        for choice in choices:
            both, ours = ([r[1] for r in times[c]] for c in (choice, hybrid))
            spread, formula = round_ratios(both, ours), compute_sent_bytes(row, choice)
            lengths_and_padding = place_documents(row, choice.layout, size)
            place: dict[str, Any] = dict(cp_size=size, layout=choice.layout, placement=lengths_and_padding[2])
            even = balance(attention_pairs(*lengths_and_padding[:2], **place))
            low, high = spread["quartiles"]
            method = f"{choice.backend} {choice.method} {choice.layout}"
            numbers = f"{statistics.median(both):>8.3f}{spread['median']:>7.2f} {low:>6.2f} to {high:.2f}"
            mib = f"{sum(sent[choice]) / 2**20:>8.2f}{' ' if sent[choice] == formula else '!'}"
            print(f"   {name:17}{size:>3} {method:33}{numbers}{mib}{even:>9.3f}", flush=True)
            entry = dict(documents=name, number=len(lengths), choice=asdict(choice), ratio=spread["median"])
            entry |= dict(quartiles=[low, high], sent_bytes=sent[choice], sent_formula=formula, balance=even)
            figures.append(entry | dict(rounds_s=times[choice]))
        for world in worlds.values():
            world.run(AttentionRank.forget)
    return figures


COMPARISONS = {
    "1": compare_methods,
    "2": compare_with_ring_flash,
    "3": profile_documents,
    "4": compare_hybrid,
}


def plot(figures: list[dict], path: Path) -> None:
    """Efficiency of forward and backward by method: a panel a row, a colour a cp size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple, dict[str, dict[int, float]]] = {}
    for entry in figures:
        choice = entry["choice"]
        bars = panels.setdefault((entry["seq_length"], choice["qkv_format"], entry["dtype"]), {})
        name = f"{choice['backend']} {choice['method']}\n{choice['layout']}"
        bars.setdefault(name, {})[choice["cp_size"]] = entry["efficiency"]
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(12, 3.6 * len(panels)), squeeze=False)
    for axis, ((seq_length, qkv_format, dtype), bars) in zip(axes[:, 0], panels.items(), strict=True):
        for i, size in enumerate(CP_SIZES):
            positions = [x + (i - 0.5) * 0.4 for x in range(len(bars))]
            heights, bound = [values.get(size, 0.0) for values in bars.values()], min(1.0, CORES / size)
            axis.bar(positions, heights, 0.38, color=f"C{i}", label=f"cp {size}")
            axis.axhline(bound, color=f"C{i}", linestyle=":", label=f"bound of {CORES} cores, cp {size}")
        axis.set_xticks(range(len(bars)), list(bars), fontsize=7)
        axis.set_ylabel("efficiency")
        axis.set_title(f"{seq_length} tokens, {qkv_format}, {dtype}: forward and backward", fontsize=9)
        axis.legend(fontsize=7, ncols=4)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def build_parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(__doc__, rounds=5, parts=COMPARISONS)
    lengths_help = f"tokens of a row, multiples of {UNIT}; comparison 2 takes the first; default: %(default)s"
    parser.add_argument("--seq-lengths", default="4096", metavar="N,N", help=lengths_help)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of comparison 1; comparison 2 is in bf16")
    formats = ",".join(QKV_FORMATS)
    parser.add_argument("--qkv-formats", default=formats, metavar="F,F", help=f"of comparison 1; default: {formats}")
    parser.add_argument("--num-attention-heads", type=int, default=4, help="query heads; default: %(default)s")
    parser.add_argument("--num-query-groups", type=int, default=2, help="key/value heads; default: %(default)s")
    parser.add_argument("--kv-channels", type=int, default=64, help="channels of a head; default: %(default)s")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw comparison 1 as PNG; needs matplotlib")
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    seq_lengths = [int(n) for n in args.seq_lengths.split(",")]
    if bad := [n for n in seq_lengths if n <= 0 or n % UNIT]:
        nearest = max(1, round(bad[0] / UNIT)) * UNIT
        parser.error(f"--seq-lengths {bad[0]}: must be a multiple of {UNIT}, such as {nearest}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs the matplotlib package: pip install matplotlib")
    shape = dict(
        dtype=args.dtype, heads=args.num_attention_heads, groups=args.num_query_groups, head_dim=args.kv_channels
    )
    rows = [Row(seq_length=n, qkv_format="bshd", lengths=(n,), **shape) for n in seq_lengths]
    rows += [Row(seq_length=n, qkv_format="thd", lengths=draw_lengths(n), **shape) for n in seq_lengths]
    chosen_rows = [row for row in rows if row.qkv_format in args.qkv_formats.split(",")]
    bounds = ", ".join(f"cp {size} at most {CORES / size:.2f}" for size in CP_SIZES if size > CORES)
    print(f"torch {torch.__version__}, {CORES} cores, one thread a rank: cp {CORES} can reach efficiency 1, {bounds}")
    figures: dict[str, Any] = {
        "arguments": {name: value.name if isinstance(value, Path) else value for name, value in vars(args).items()}
    }
    start = time.perf_counter()
    with World(1, AttentionRank) as one, World(2, AttentionRank) as two, World(4, AttentionRank) as four:
        for name in args.only:
            compared = chosen_rows if name == "1" else rows
            figures[name] = COMPARISONS[name]({1: one, 2: two, 4: four}, compared, args.rounds)
    figures["seconds"] = time.perf_counter() - start
    print(f"\n{figures['seconds']:.0f} s; load average {os.getloadavg()[0]:.1f}")
    write_figures(args.json, figures)
    if args.plot and "1" in figures:
        plot(figures["1"], args.plot)
    counted = [*figures.get("1", []), *figures.get("4", [])]
    wrong = [entry for entry in counted if list(entry["sent_bytes"]) != list(entry["sent_formula"])]
    reads = sum(entry["aten::item"] + entry["aten::_local_scalar_dense"] for entry in figures.get("3", []))
    if wrong or reads:
        sys.exit(f"{len(wrong)} methods sent other than their formula, {reads} host reads")


if __name__ == "__main__":
    main()
