"""The mechanisms of NeMo AutoModel and Axolotl beside this suite's, on the same rows (docs/comparison).

    python benchmarks/peers.py [--only mechanisms,padding,scale] [--rounds 5] [--seq-length 8192] [--json FILE]

mechanisms: attention alone, forward and backward in bf16, on gloo ranks of one thread, over one document and over
    packed documents of median 600: time over native p2p's of the same round, bytes that a rank sends, balance, kernel
    calls, and the peak of the memory that one rank allocates in a step (PyTorch's allocator, counted by its profiler;
    gloo's buffers are not in it). NeMo's is PyTorch's all-gather ring, Axolotl's are ring-flash-attn's ring and llama3
    with heads_k_stride 1, 2 and all. Over PyTorch's flash kernel (cp/flash_attn_cpu.py).
padding: stored tokens that are padding, by the packing of documents and by the rule of each suite.
scale: the busiest rank's work over the mean, and bytes sent in one layer of an 8B model, computed.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.cp_attention import (
    SEED,
    SIGMA,
    AttentionRank,
    Row,
    compute_sent_bytes,
    draw_lengths,
    medians,
    place_documents,
    time_choices,
)
from benchmarks.harness import World, benchmark_parser, round_ratios, write_figures
from cp.layout import attention_pairs, balance
from cp.support import AttentionChoice
from data.packing import pack_epoch
from planner.estimate import cp_bytes

MEASURED_CP, HEADS, GROUPS, HEAD_DIM = (2, 4), 8, 4, 64
MEDIANS, COMPUTED_CP = (100, 600, 2000), (2, 4, 8, 16, 32, 64)
PADDED_ROW, SCALED_ROW, DOCUMENTS = 8192, 131072, 4000
SHAPE_8B: dict[str, Any] = dict(heads=32, groups=8, head_dim=128, item=2)


class PeersRank(AttentionRank):
    def peak_memory(self, row: Row, choice: AttentionChoice) -> int:
        """Bytes above those before the step, at its peak; its inputs, plan and groups exist."""
        self._run(row, choice)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            self._run(row, choice)
        assert profile.profiler is not None and profile.profiler.kineto_results is not None
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes = np.array([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
        return int(changes.cumsum().max())


def list_mechanisms(qkv_format: str, cp_size: int) -> dict[str, AttentionChoice]:
    """By name; the first is what the others are compared with."""
    ours = AttentionChoice(backend="native", method="p2p", qkv_format=qkv_format, layout="zigzag", cp_size=cp_size)
    gather = replace(ours, method="all_gather")
    found = {"p2p": ours, "a2a": replace(ours, method="a2a", a2a_size=cp_size)}
    if qkv_format == "bshd":
        torch_ring = replace(ours, backend="pytorch", method="allgather")
        found["NeMo: PyTorch all-gather, zigzag"] = torch_ring
        found["Axolotl: batch ring"] = replace(ours, backend="ring", method="ring", layout="doc_contiguous")
        return found
    found["p2p, hybrid"] = replace(ours, layout="hybrid")
    llama3 = replace(ours, backend="ring", method="llama3", layout="contiguous")
    for stride in (1, 2, GROUPS):
        found[f"all_gather, stride {stride}"] = replace(gather, heads_k_stride=stride)
        found[f"Axolotl: llama3, stride {stride}"] = replace(llama3, heads_k_stride=stride)
    return found


def measure_mechanisms(seq_length: int, rounds: int) -> list[dict]:
    print(f"\nmechanisms: {seq_length} tokens, bf16, {HEADS} query and {GROUPS} key/value heads of {HEAD_DIM}")
    columns = f"{'s':>7}{'/ p2p':>7} {'quartiles':>13}{'MiB':>7}{'balance':>9}{'calls':>7}{'peak MiB':>10}"
    print(f"  {'row':13}{'cp':>3} {'mechanism':34}{columns}")
    shape: dict[str, Any] = dict(dtype="bf16", heads=HEADS, groups=GROUPS, head_dim=HEAD_DIM, seq_length=seq_length)
    rows = {
        ("one document", "bshd"): Row(qkv_format="bshd", lengths=(seq_length,), **shape),
        ("one document", "thd"): Row(qkv_format="thd", lengths=(seq_length,), **shape),
        ("packed", "thd"): Row(qkv_format="thd", lengths=draw_lengths(seq_length), **shape),
    }
    figures = []
    with World(2, PeersRank) as two, World(4, PeersRank) as four:
        worlds = {2: two, 4: four}
        for ((name, qkv_format), row), size in ((item, size) for item in rows.items() for size in MEASURED_CP):
            mechanisms = list_mechanisms(qkv_format, size)
            world = worlds[size]
            sent = {key: max(world.run(PeersRank.count_sent, row, choice)) for key, choice in mechanisms.items()}
            times = time_choices(worlds, row, list(mechanisms.values()), rounds)
            base = [r[1] for r in times[mechanisms["p2p"]]]
            for key, choice in mechanisms.items():
                lengths, padded, placement = place_documents(row, choice.layout, size)
                pairs = attention_pairs(lengths, padded, cp_size=size, layout=choice.layout, placement=placement)
                calls = max(c["flash kernels"] for c in world.run(PeersRank.profile, row, choice))
                spread = round_ratios([r[1] for r in times[choice]], base)
                entry = dict(row=f"{name}, {qkv_format}", mechanism=key, choice=asdict(choice), ratio=spread["median"])
                entry |= dict(quartiles=spread["quartiles"], sent_bytes=sent[key], balance=balance(pairs), calls=calls)
                entry |= dict(sent_formula=compute_sent_bytes(row, choice), rounds_s=times[choice])
                entry["peak_bytes"] = max(world.run(PeersRank.peak_memory, row, choice))
                figures.append(entry)
                low, high = spread["quartiles"]
                numbers = f"{medians(times[choice])[1]:>7.3f}{spread['median']:>7.2f} {low:>5.2f} to {high:.2f}"
                numbers += f"{sum(sent[key]) / 2**20:>8.1f}{entry['balance']:>9.2f}{calls:>7}"
                print(f"  {name:13}{size:>3} {key:34}{numbers}{entry['peak_bytes'] / 2**20:>10.1f}", flush=True)
            world.run(PeersRank.forget)
    return figures


def pack_documents(median: int, alignment: int, seq_length: int) -> list[np.ndarray]:
    """Lengths of the documents of each row, best fit, each document counted as padded to `alignment`."""
    lengths = np.random.default_rng(SEED).lognormal(math.log(median), SIGMA, DOCUMENTS)
    whole = np.maximum(1, np.rint(lengths)).astype(np.int64)
    epoch = pack_epoch(whole, seed=SEED, epoch=0, seq_length=seq_length, alignment=alignment)
    return [epoch.sample_pieces(n)[:, 2] for n in range(len(epoch))]


def padded_share(rows: list[np.ndarray], document: int, row: int) -> float:
    """Stored tokens that are padding, if each document and then each row is padded to a multiple."""
    real = sum(int(lengths.sum()) for lengths in rows)
    stored = sum(-(-int((-(-lengths // document) * document).sum()) // row) * row for lengths in rows)
    return 1 - real / stored


def compute_padding() -> list[dict]:
    print(f"\npadding: share of stored tokens, rows of up to {PADDED_ROW} tokens without their tails")
    print("  median  cp   each document to 2*cp   row to 2*cp   row to 64 or cp")
    figures = []
    for median in MEDIANS:
        for size in COMPUTED_CP:
            aligned, free = (pack_documents(median, unit, PADDED_ROW) for unit in (2 * size, 1))
            entry = dict(median=median, cp_size=size, document=padded_share(aligned, 2 * size, 1))
            entry |= dict(row=padded_share(free, 1, 2 * size), row_64=padded_share(free, 1, max(64, size)))
            entry |= dict(rows=len(aligned), rows_unaligned=len(free))
            figures.append(entry)
            print(f"  {median:>6}{size:>4}{entry['document']:>24.2%}{entry['row']:>14.3%}{entry['row_64']:>18.2%}")
    return figures


def compute_scale() -> list[dict]:
    print(f"\nscale: rows of {SCALED_ROW} tokens, one layer of 32 query and 8 key/value heads of 128, bf16")
    print("  row            cp   balance: contiguous   zigzag   MiB sent: ring or llama3   PyTorch all-gather   a2a")
    figures = []
    packed = sorted(pack_documents(2000, 2 * max(COMPUTED_CP), SCALED_ROW), key=len)
    typical = packed[len(packed) // 2]
    for name, lengths in {"one document": np.array([SCALED_ROW]), f"{len(typical)} documents": typical}.items():
        for size in COMPUTED_CP:
            unit = 2 * size
            padded = -(-lengths // unit) * unit
            layouts = {"contiguous": padded, "zigzag": padded}
            even = {
                layout: balance(attention_pairs(lengths, p, cp_size=size, layout=layout))
                for layout, p in layouts.items()
            }
            entry: dict[str, Any] = dict(row=name, documents=len(lengths), cp_size=size, balance=even, sent={})
            for key, choice in {**list_mechanisms("bshd", size), **list_mechanisms("thd", size)}.items():
                if choice.method in ("ring", "llama3", "allgather", "a2a") and (choice.method != "a2a" or size <= 32):
                    entry["sent"][key] = sum(cp_bytes(choice, tokens=SCALED_ROW // size, **SHAPE_8B))
            figures.append(entry)
            mib = {key: f"{sent / 2**20:.0f}" for key, sent in entry["sent"].items()}
            ring, llama3 = mib["Axolotl: batch ring"], mib["Axolotl: llama3, stride 1"]
            print(
                f"  {name:13}{size:>4}{even['contiguous']:>22.2f}{even['zigzag']:>9.3f}{f'{ring} / {llama3}':>28}"
                f"{mib['NeMo: PyTorch all-gather, zigzag']:>21}{mib.get('a2a', '-'):>6}"
            )
    return figures


def main() -> None:
    parts = ("mechanisms", "padding", "scale")
    parser = benchmark_parser(__doc__, rounds=5, parts=parts)
    parser.add_argument("--seq-length", type=int, default=8192, help="tokens of a measured row; default: %(default)s")
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    if "padding" in args.only:
        figures["padding"] = compute_padding()
    if "scale" in args.only:
        figures["scale"] = compute_scale()
    if "mechanisms" in args.only:
        figures["mechanisms"] = measure_mechanisms(args.seq_length, args.rounds)
    write_figures(args.json, figures)


if __name__ == "__main__":
    main()
