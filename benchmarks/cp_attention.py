"""Attention alone over context-parallel ranks: time, efficiency, traffic and balance of each method of cp/support.py.

    python benchmarks/cp_attention.py [--seq-lengths 4096,8192,32768] [--dtype fp32|bf16] [--only 1|2|3] [--json FILE] [--plot FILE]

1. Every cell of cp/support.py's table on gloo ranks of one thread, over one BSHD sequence and over packed THD
   documents of log-normal lengths. Efficiency is (one rank's time for the whole row / cp) / time: it cannot
   pass cores / cp. `wait` is what native's computation stood still for transfers, slower peers included.
   `sent` is counted, in bytes that a rank sends, and compared with the method's formula (`sent_formula`).
2. native p2p against ring-flash-attn's zigzag in bf16, both over PyTorch's flash kernel: >= 1 is at least as fast.
3. What the profiler sees in a step of native p2p with few and with many documents: no read of a tensor's
   value by the host.

Things that are compared take turns, round by round; a figure is a median over rounds of the slowest rank.
ring-flash-attn runs over PyTorch's flash kernel too (cp/flash_attn_cpu.py). Prints tables; a wrong byte count or a
host read fails.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cp.attention import build_attention
from cp.layout import attention_pairs, balance
from cp.packed_seq import build_packed_seq
from cp.support import QKV_FORMATS, AttentionChoice, cells
from parallel import collectives
from parallel.collectives import WaitClock
from parallel.grid import Grid, GridSizes, build_grid, split_group
from planner.communication import cp_bytes
from runtime.distributed import keep_freed_memory
from tests.world import World

CP_SIZES = (2, 4)
MEDIAN_LENGTH, SIGMA, SEED = 600, 1.5, 1234
UNIT = 2 * max(CP_SIZES)  # every layout at every size cuts documents padded to it
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CORES = len(os.sched_getaffinity(0))
LONG, LONG_ROUNDS = 16384, 3  # rows from here on get fewer rounds
PROFILED_TOKENS = 16384  # about, of comparison 3
FASTER_ROUNDS = 7  # at least, of comparison 2
TIMEOUT = 1800.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of tokens and the shape of its heads."""

    seq_length: int
    qkv_format: str
    dtype: str
    heads: int
    groups: int
    head_dim: int
    lengths: tuple[int, ...]

    @property
    def padded_lengths(self) -> np.ndarray:
        return np.array([-(-length // UNIT) * UNIT for length in self.lengths])


def documents(seq_length: int) -> tuple[int, ...]:
    """Log-normal lengths whose padded ones fill the row; the last is cut."""
    generator, lengths, room = np.random.default_rng(SEED), [], seq_length
    while room:
        length = min(room, max(1, round(generator.lognormal(math.log(MEDIAN_LENGTH), SIGMA))))
        lengths.append(length)
        room -= -(-length // UNIT) * UNIT
    return tuple(lengths)


ALONE = AttentionChoice(backend="native", method="p2p", qkv_format="thd", layout="zigzag", cp_size=1)


def sent_formula(row: Row, choice: AttentionChoice) -> tuple[int, int]:
    """Bytes that a rank sends in the forward and in the backward pass."""
    return cp_bytes(
        choice,
        tokens=row.seq_length // choice.cp_size,
        heads=row.heads,
        groups=row.groups,
        head_dim=row.head_dim,
        item=DTYPES[row.dtype].itemsize,
    )


# ---------------------------------------------------------------------------------------------------
# What ranks are told to do


@functools.cache
def grid_of() -> Grid:
    keep_freed_memory()  # as train.py does on a CPU; for all that is compared alike
    return build_grid(GridSizes(cp=dist.get_world_size()))


@functools.cache
def a2a_groups(a2a_size: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    return split_group(grid_of(), "cp", a2a_size)


@functools.cache
def shards(row: Row, layout: str) -> tuple[Any, list[Tensor]]:
    """The row's `PackedSeq` and this rank's q, k, v and dout; kept, with the plans, until `forget`."""
    grid = grid_of()
    padded, place = row.padded_lengths, dict(cp_size=grid.size("cp"), cp_rank=grid.rank("cp"))
    packed_seq, owned = build_packed_seq(
        np.array(row.lengths), padded, qkv_format=row.qkv_format, layout=layout, **place
    )
    generator, tensors = torch.Generator().manual_seed(SEED), []
    for heads in (row.heads, row.groups, row.groups, row.heads):
        whole = torch.randn(row.seq_length, heads, row.head_dim, generator=generator)
        tensors.append(whole[torch.from_numpy(owned)].to(DTYPES[row.dtype]))
    for x in tensors[:3]:
        x.requires_grad_()
    return packed_seq, tensors


@functools.cache
def built(row: Row, choice: AttentionChoice) -> tuple[Callable[..., Tensor], WaitClock]:
    if choice.backend == "ring":
        warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    groups = a2a_groups(choice.a2a_size) if choice.a2a_size > 1 else None
    clock = WaitClock()
    return build_attention(choice, head_dim=row.head_dim, a2a_groups=groups, clock=clock), clock


def forget(rank: int) -> None:
    shards.cache_clear()


def one_pass(row: Row, choice: AttentionChoice, between: Callable[[], Any] = lambda: None) -> list[Tensor]:
    """out, dq, dk, dv; `between` is called between forward and backward."""
    attention, _ = built(row, choice)
    packed_seq, (q, k, v, dout) = shards(row, choice.layout)
    q.grad = k.grad = v.grad = None
    out = attention(q, k, v, packed_seq, grid_of().group("cp"))
    between()
    out.backward(dout)
    return [x for x in (out.detach(), q.grad, k.grad, v.grad) if x is not None]


def timed(rank: int, row: Row, choice: AttentionChoice) -> tuple[float, float, float]:
    """Seconds of the forward pass, of forward and backward, and of waiting in both (0 where it cannot be seen)."""
    _, clock = built(row, choice)
    clock.read()
    marks: list[float] = []
    dist.barrier()
    start = time.perf_counter()
    one_pass(row, choice, lambda: marks.append(time.perf_counter()))
    return marks[0] - start, time.perf_counter() - start, clock.read()


@contextmanager
def counted(sent: list[int]) -> Iterator[None]:
    """Adds to sent[-1] the bytes that this rank sends."""
    from torch.distributed import _functional_collectives as functional

    def wrap(holder: Any, name: str, bytes_of: Callable[..., float]) -> Any:
        original = getattr(holder, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            sent[-1] += round(bytes_of(*args, **kwargs))
            return original(*args, **kwargs)

        return mock.patch.object(holder, name, call)

    def ring(ops: list[dist.P2POp]) -> float:
        return sum(op.tensor.nbytes for op in ops if op.op is dist.isend)

    def gather(out: Tensor, x: Tensor, *_: Any, **__: Any) -> float:
        return out.nbytes - x.nbytes

    def scatter(out: Tensor, x: Tensor, *_: Any, **__: Any) -> float:
        return x.nbytes - out.nbytes

    def trade(out: Tensor, x: Tensor, *_: Any, group: dist.ProcessGroup, **__: Any) -> float:
        return x.nbytes * (group.size() - 1) / group.size()

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


def sent_bytes(rank: int, row: Row, choice: AttentionChoice) -> tuple[int, int]:
    """Counted in the forward and in the backward pass; it warms up, too."""
    sent = [0]
    with counted(sent):
        one_pass(row, choice, lambda: sent.append(0))
    return sent[0], sent[1]


def difference(rank: int, row: Row, first: AttentionChoice, second: AttentionChoice) -> float:
    """Largest relative difference of two choices' out, dq, dk and dv."""
    results = [[x.float().clone() for x in one_pass(row, choice)] for choice in (first, second)]
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True))


def profiled(rank: int, row: Row, choice: AttentionChoice) -> dict[str, int]:
    """Calls of operators in one pass whose plan is made."""
    one_pass(row, choice)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        one_pass(row, choice)
    calls = {event.key: event.count for event in profile.key_averages()}
    return {
        "aten::item": calls.get("aten::item", 0),
        "aten::_local_scalar_dense": calls.get("aten::_local_scalar_dense", 0),
        "aten::empty*": sum(count for name, count in calls.items() if name.startswith("aten::empty")),
        "flash kernels": sum(
            count for name, count in calls.items() if name.startswith("aten::_scaled_dot_product_flash")
        ),
    }


# ---------------------------------------------------------------------------------------------------
# The comparisons


def take_turns(
    worlds: dict[int, World], row: Row, choices: list[AttentionChoice], rounds: int
) -> dict[AttentionChoice, list]:
    """Per choice and round: forward, forward and backward, waiting; of the slowest rank."""
    times: dict[AttentionChoice, list] = {choice: [] for choice in choices}
    for _ in range(rounds):
        for choice in choices:
            ranks = worlds[choice.cp_size].run(timed, row, choice, timeout=TIMEOUT)
            times[choice].append([max(of_rank) for of_rank in zip(*ranks, strict=True)])
    return times


def medians(rounds: list) -> list[float]:
    return [statistics.median(values) for values in zip(*rounds, strict=True)]


def table_cells(row: Row, cp_size: int) -> list[AttentionChoice]:
    """The table's cells for this row's format and dtype, without a2a+p2p where nothing is left to ring over."""
    found = cells(device="cpu", cp_size=cp_size, heads=row.heads, groups=row.groups)
    chosen = [c for c, dtype in found if (c.qkv_format, dtype) == (row.qkv_format, row.dtype)]
    return [c for c in chosen if not (c.method == "a2a+p2p" and c.a2a_size == cp_size)]


def compare_methods(worlds: dict[int, World], rows: list[Row], rounds: int) -> list[dict]:
    print(f"\n1  {'cp':>2} {'backend method layout':33}{'fwd s':>8}{'f+b s':>8}{'eff fwd':>8}{'eff f+b':>8}", end="")
    print(f"{'bound':>7}{'wait s':>8}{'sent fwd MiB':>14}{'bwd MiB':>9}{'balance':>9}")
    figures = []
    for row in rows:
        alone = replace(ALONE, qkv_format=row.qkv_format)
        choices = [alone, *(choice for size in CP_SIZES for choice in table_cells(row, size))]
        sent = {choice: worlds[choice.cp_size].run(sent_bytes, row, choice, timeout=TIMEOUT) for choice in choices}
        times = take_turns(worlds, row, choices, rounds if row.seq_length < LONG else min(rounds, LONG_ROUNDS))
        one_forward, one_both, _ = medians(times[alone])
        print(f"{row.seq_length} tokens, {row.qkv_format}, {row.dtype}, {len(row.lengths)} documents: ", end="")
        print(f"one rank {one_forward:.3f} s forward, {one_both:.3f} s forward and backward")
        for choice in choices[1:]:
            size, (forward, both, waiting) = choice.cp_size, medians(times[choice])
            pairs = attention_pairs(np.array(row.lengths), row.padded_lengths, cp_size=size, layout=choice.layout)
            formula = sent_formula(row, choice)
            entry = dict(
                choice=asdict(choice),
                seq_length=row.seq_length,
                dtype=row.dtype,
                documents=len(row.lengths),
                forward_s=forward,
                forward_backward_s=both,
                one_rank_s=[one_forward, one_both],
                efficiency_forward=one_forward / size / forward,
                efficiency=one_both / size / both,
                efficiency_bound=min(1.0, CORES / size),
                wait_s=waiting if choice.backend == "native" and choice.method != "a2a" else None,
                sent_bytes=max(sent[choice]),
                sent_formula=formula,
                balance=balance(pairs),
                rounds_s=times[choice],
            )
            name = f"{choice.backend} {choice.method} {choice.layout}"
            wait = "-" if entry["wait_s"] is None else f"{waiting:.3f}"
            mib = [
                f"{b / 2**20:.2f}{'' if b == f else ' (!)'}" for b, f in zip(entry["sent_bytes"], formula, strict=True)
            ]
            print(
                f"   {size:>2} {name:33}{forward:>8.3f}{both:>8.3f}{entry['efficiency_forward']:>8.2f}{entry['efficiency']:>8.2f}",
                end="",
            )
            print(
                f"{entry['efficiency_bound']:>7.2f}{wait:>8}{mib[0]:>14}{mib[1]:>9}{entry['balance']:>9.3f}", flush=True
            )
            figures.append(entry)
        for world in worlds.values():
            world.run(forget)
    return figures


def compare_with_ring_flash(worlds: dict[int, World], rows: list[Row], rounds: int) -> list[dict]:
    row = replace(next(r for r in rows if r.qkv_format == "bshd"), dtype="bf16")
    print(
        f"\n2  native p2p, ring-flash-attn zigzag: {row.seq_length} tokens, bshd, bf16, both over PyTorch's flash kernel"
    )
    figures = []
    for size in CP_SIZES:
        ours = AttentionChoice(backend="native", method="p2p", qkv_format="bshd", layout="zigzag", cp_size=size)
        theirs = replace(ours, backend="ring", method="zigzag")
        apart = max(worlds[size].run(difference, row, ours, theirs, timeout=TIMEOUT))  # also the warm-up
        assert apart <= 0.02, f"cp {size}: results differ by {apart}"
        times = take_turns(worlds, row, [ours, theirs], max(rounds, FASTER_ROUNDS))
        our_times, their_times = medians(times[ours])[:2], medians(times[theirs])[:2]
        for i, (name, mine, other) in enumerate(
            zip(("forward", "forward+backward"), our_times, their_times, strict=True)
        ):
            # Round by round, since both take their turn in the same weather; the quarter points say how sure that is.
            low, ratio, high = statistics.quantiles(
                [t[i] / o[i] for o, t in zip(times[ours], times[theirs], strict=True)]
            )
            verdict = "pass" if ratio >= 1 else "miss"
            print(
                f"   cp {size} {name:18}{mine:>8.3f} s {other:>8.3f} s   {ratio:.3f} ({low:.3f} to {high:.3f}) >= 1.00 {verdict}",
                flush=True,
            )
            figures.append(
                dict(cp_size=size, what=name, native_s=mine, ring_flash_s=other, ratio=ratio, quartiles=[low, high])
            )
        figures[-1] |= dict(rounds_s=list(times.values()), relative_difference=apart)
    return figures


def compare_documents(worlds: dict[int, World], rows: list[Row], rounds: int) -> list[dict]:
    print("\n3  profiled forward and backward of native p2p, cp 2, thd; calls on one rank:")
    figures = []
    for count in (4, 64):
        shares = np.random.default_rng(SEED).dirichlet(np.full(count, 3.0))
        lengths = np.maximum(1, (shares * PROFILED_TOKENS / UNIT).astype(int)) * UNIT - 3
        row = replace(
            rows[0], qkv_format="thd", lengths=tuple(lengths.tolist()), seq_length=int(lengths.sum()) + 3 * count
        )
        calls = worlds[2].run(profiled, row, replace(ALONE, cp_size=2), timeout=TIMEOUT)[0]
        print(
            f"   {count:>2} documents: " + ", ".join(f"{number} {name}" for name, number in calls.items()), flush=True
        )
        figures.append({"documents": count, "tokens": row.seq_length, **calls})
    return figures


COMPARISONS = {"1": compare_methods, "2": compare_with_ring_flash, "3": compare_documents}


def plot(figures: list[dict], path: Path) -> None:
    """Efficiency of forward and backward by method, a panel for each row, a colour for each cp size."""
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
            places = [x + (i - 0.5) * 0.4 for x in range(len(bars))]
            axis.bar(
                places, [values.get(size, 0.0) for values in bars.values()], 0.38, color=f"C{i}", label=f"cp {size}"
            )
            axis.axhline(
                min(1.0, CORES / size), color=f"C{i}", linestyle=":", label=f"bound of {CORES} cores, cp {size}"
            )
        axis.set_xticks(range(len(bars)), list(bars), fontsize=7)
        axis.set_ylabel("efficiency")
        axis.set_title(f"{seq_length} tokens, {qkv_format}, {dtype}: forward and backward", fontsize=9)
        axis.legend(fontsize=7, ncols=4)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Attention alone over context-parallel ranks: time, efficiency, traffic, balance"
    )
    parser.add_argument(
        "--seq-lengths",
        default="4096",
        metavar="N,N",
        help=f"tokens of a row, multiples of {UNIT}; comparison 2: the first",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="fp32",
        help="of comparison 1; ring-flash-attn's dense functions take only bf16",
    )
    parser.add_argument("--qkv-formats", default=",".join(QKV_FORMATS), metavar="F,F", help="of comparison 1")
    parser.add_argument("--num-attention-heads", type=int, default=4)
    parser.add_argument("--num-query-groups", type=int, default=2, help="key/value heads")
    parser.add_argument("--kv-channels", type=int, default=64, help="of one head")
    parser.add_argument(
        "--rounds", type=int, default=5, help=f"turns of each; {LONG_ROUNDS} at most from {LONG} tokens on"
    )
    parser.add_argument("--only", choices=COMPARISONS, help="one comparison; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw comparison 1 there, as PNG; needs matplotlib")
    args = parser.parse_args()
    seq_lengths = [int(n) for n in args.seq_lengths.split(",")]
    if bad := [n for n in seq_lengths if n <= 0 or n % UNIT]:
        parser.error(
            f"--seq-lengths {bad[0]}: choose a multiple of {UNIT}, such as {max(1, round(bad[0] / UNIT)) * UNIT}"
        )
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot: matplotlib is not installed: pip install matplotlib")

    shape = dict(
        dtype=args.dtype, heads=args.num_attention_heads, groups=args.num_query_groups, head_dim=args.kv_channels
    )
    bshd = [Row(seq_length=n, qkv_format="bshd", lengths=(n,), **shape) for n in seq_lengths]
    thd = [Row(seq_length=n, qkv_format="thd", lengths=documents(n), **shape) for n in seq_lengths]
    print(f"torch {torch.__version__}, {CORES} cores, one thread a rank: cp {CORES} can reach efficiency 1, ", end="")
    print(", ".join(f"cp {size} at most {CORES / size:.2f}" for size in CP_SIZES if size > CORES))
    facts: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "torch": torch.__version__,
        "cores": CORES,
        "arguments": vars(args),
    }
    start = time.perf_counter()
    with World(1) as one, World(2) as two, World(4) as four:
        worlds = {1: one, 2: two, 4: four}
        for name in [args.only] if args.only else COMPARISONS:
            rows = (
                bshd + thd
                if name != "1"
                else [row for row in bshd + thd if row.qkv_format in args.qkv_formats.split(",")]
            )
            facts[name] = COMPARISONS[name](worlds, rows, args.rounds)
    facts |= {"seconds": time.perf_counter() - start, "load average at the end": os.getloadavg()[0]}
    print(f"\n{facts['seconds']:.0f} s; load average {facts['load average at the end']:.1f}")
    if args.json:
        args.json.write_text(json.dumps(facts, default=str) + "\n")
    if args.plot and "1" in facts:
        plot(facts["1"], args.plot)
    wrong = [entry for entry in facts.get("1", []) if list(entry["sent_bytes"]) != list(entry["sent_formula"])]
    reads = sum(entry["aten::item"] + entry["aten::_local_scalar_dense"] for entry in facts.get("3", []))
    if wrong or reads:
        sys.exit(f"{len(wrong)} methods sent other than their formula, {reads} host reads")


if __name__ == "__main__":
    main()
