"""What is in a prepared corpus, and what packing makes of it: `python -m data.prepare stats P`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.indexed_dataset import IndexedDataset
from data.packing import best_fit_decreasing, cut_documents
from utils.errors import UserError

CP_SIZES = (1, 2, 4, 8)
PERCENTILES = (1, 25, 50, 75, 99)


def length_histogram(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents and tokens in bins of powers of two: edges [n + 1] (1, 2, 4, ...), documents [n], tokens [n]."""
    top = max(1, int(lengths.max(initial=1)).bit_length())
    edges = 2 ** np.arange(top + 1)
    documents, _ = np.histogram(lengths, edges)
    tokens, _ = np.histogram(lengths, edges, weights=lengths)
    return edges, documents, tokens


def count_duplicates(tokens: IndexedDataset) -> int:
    """Documents that are the same, token for token, as an earlier one, told by 128 bits of BLAKE2b."""
    import hashlib

    hashes = np.empty((len(tokens), 2), np.uint64)
    for number, length in enumerate(tokens.lengths.tolist()):
        digest = hashlib.blake2b(tokens.read(number, 0, length).data, digest_size=16).digest()
        hashes[number] = np.frombuffer(digest, np.uint64)
    return len(hashes) - len(np.unique(hashes, axis=0))


def padding_shares(lengths: np.ndarray, seq_length: int, cp_size: int) -> dict[str, float]:
    """Share of an epoch's stored tokens that are none of the corpus, for each packing, documents aligned to 2 * cp.

    `concat` pads nothing; it leaves the end of the stream over, which is given as a negative share.
    """
    lengths = np.asarray(lengths, np.int64)
    total, alignment = int(lengths.sum()), 2 * cp_size
    stored = int((-(-lengths // alignment) * alignment).sum())
    pieces = cut_documents(lengths, seq_length).length
    best = int(best_fit_decreasing(-(-pieces // alignment), seq_length // alignment).max(initial=-1)) + 1
    rows = {"best-fit": best, "greedy": -(-stored // seq_length), "concat": max(0, total - 1) // seq_length}
    return {name: 1 - total / (count * seq_length) if count else 0.0 for name, count in rows.items()}


def statistics(tokens: IndexedDataset, seq_lengths: Sequence[int]) -> dict[str, Any]:
    """Everything that `stats` prints, as JSON."""
    lengths = np.asarray(tokens.lengths)
    edges, documents, held = length_histogram(lengths)
    return {
        "documents": len(lengths),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "token_bytes": tokens.dtype.itemsize,
        "empty_documents": int((lengths == 0).sum()),
        "longest": int(lengths.max(initial=0)),
        "percentiles": {str(p): int(np.percentile(lengths, p)) for p in PERCENTILES} if len(lengths) else {},
        "histogram": {
            "edges": edges.tolist(),
            "documents": documents.tolist(),
            "tokens": held.astype(np.int64).tolist(),
        },
        "duplicates": count_duplicates(tokens),
        "padding": {str(t): {str(cp): padding_shares(lengths, t, cp) for cp in CP_SIZES} for t in seq_lengths},
    }


def report(facts: dict[str, Any]) -> str:
    """The statistics for people."""
    count, total = facts["documents"], facts["tokens"]
    lines = [
        f"{count:,} documents, {total:,} tokens of {facts['token_bytes']} bytes; {facts['empty_documents']:,} empty, "
        f"{facts['duplicates']:,} repeat an earlier one",
        "tokens a document: "
        + ", ".join(f"{p} % up to {value:,}" for p, value in facts["percentiles"].items())
        + f"; longest {facts['longest']:,}",
        "",
        f"{'tokens a document':>24}  {'documents':>12}  {'tokens':>16}  share of tokens",
    ]
    histogram = facts["histogram"]
    for low, high, documents, tokens in zip(
        histogram["edges"], histogram["edges"][1:], histogram["documents"], histogram["tokens"], strict=False
    ):
        if documents:
            share = tokens / total
            lines.append(
                f"{f'{low:,} to {high - 1:,}':>24}  {documents:>12,}  {tokens:>16,}  {share:6.1%} {'#' * round(40 * share)}"
            )
    for seq_length, by_cp in facts["padding"].items():
        lines += ["", f"padding at --seq-length {int(seq_length):,}, documents aligned to 2 * cp:"]
        lines.append(f"{'cp':>4}" + "".join(f"{name:>12}" for name in by_cp["1"]))
        lines += [f"{cp:>4}" + "".join(f"{share:>12.3%}" for share in shares.values()) for cp, shares in by_cp.items()]
    if facts["padding"]:
        lines.append("(concat pads nothing: a negative share is the end of the stream that is left over)")
    return "\n".join(lines)


def draw(facts: dict[str, Any], file: Path, title: str) -> None:
    """The histogram as a PNG: documents and tokens by length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    edges, histogram = facts["histogram"]["edges"], facts["histogram"]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, what in zip(axes, ("documents", "tokens"), strict=True):
        axis.stairs(histogram[what], edges, fill=True, color="#3b6ea5")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens a document")
        axis.set_ylabel(what)
        axis.grid(alpha=0.3)
    figure.suptitle(f"{title}: {facts['documents']:,} documents, {facts['tokens']:,} tokens")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def stats_command(argv: Sequence[str], parser_class: type[argparse.ArgumentParser]) -> None:
    """`data.prepare stats P`."""
    parser = parser_class(
        prog="python -m data.prepare stats",
        allow_abbrev=False,
        description="What is in a corpus, and what packing makes of it.",
    )
    parser.add_argument("prefix", metavar="P", help="of P.bin and P.idx")
    parser.add_argument(
        "--seq-length",
        type=int,
        nargs="*",
        default=[8192, 32768],
        metavar="T",
        help="for which padding is worked out; a multiple of 16",
    )
    parser.add_argument("--png", help="the histogram's file; default: P.lengths.png; none: no picture")
    parser.add_argument("--json", metavar="FILE", help="write everything there, too")
    args = parser.parse_args(argv)
    for seq_length in args.seq_length:
        if seq_length < 16 or seq_length % 16:
            raise UserError(
                f"--seq-length {seq_length}: must be a multiple of 16, what cp 8 aligns to: nearest {max(1, round(seq_length / 16)) * 16}"
            )
    picture = None if args.png == "none" else Path(args.png or f"{args.prefix}.lengths.png")
    own = {Path(f"{args.prefix}{suffix}").resolve() for suffix in (".bin", ".idx", ".json")}
    for flag, path in (("--json", args.json), ("--png", picture)):
        if path is not None and Path(path).resolve() in own:
            raise UserError(f"{flag} {path}: is a file of the corpus itself; choose another name")
    facts = statistics(IndexedDataset(Path(args.prefix)), args.seq_length)
    print(report(facts))
    if args.json:
        Path(args.json).write_text(json.dumps(facts, indent=1) + "\n")
    if picture is not None:
        draw(facts, picture, Path(args.prefix).name)
        print(f"\npicture: {picture}")
