"""What is in a prepared corpus, and what packing makes of it: `python -m data.prepare stats P`."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.indexed_dataset import IndexedDataset, index_file, token_file
from data.packing import best_fit_decreasing, cut_documents
from data.sources import metadata_file
from utils.errors import OneLineParser, UserError
from utils.files import replace_synced

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
    """Documents that equal an earlier one token for token, by 128 bits of BLAKE2b."""
    hashes = np.empty((len(tokens), 2), np.uint64)
    for number, length in enumerate(tokens.lengths.tolist()):
        digest = hashlib.blake2b(tokens.read(number, 0, length).data, digest_size=16).digest()
        hashes[number] = np.frombuffer(digest, np.uint64)
    return len(hashes) - len(np.unique(hashes, axis=0))


def padding_shares(lengths: np.ndarray, seq_length: int, cp_size: int) -> dict[str, float]:
    """Padding's share of an epoch's stored tokens for each packing, documents aligned to 2 * cp.

    `concat` pads nothing: its negative share is the left over end of the stream.
    """
    lengths = np.asarray(lengths, np.int64)
    total, alignment = int(lengths.sum()), 2 * cp_size
    stored = int((-(-lengths // alignment) * alignment).sum())
    pieces = cut_documents(lengths, seq_length).length
    best = int(best_fit_decreasing(-(-pieces // alignment), seq_length // alignment).max(initial=-1)) + 1
    samples = {"best-fit": best, "greedy": -(-stored // seq_length), "concat": max(0, total - 1) // seq_length}
    return {name: 1 - total / (count * seq_length) if count else 0.0 for name, count in samples.items()}


def collect_statistics(tokens: IndexedDataset, seq_lengths: Sequence[int]) -> dict[str, Any]:
    """All statistics that `stats` prints, as JSON."""
    lengths = np.asarray(tokens.lengths)
    edges, documents, held = length_histogram(lengths)
    histogram = {"edges": edges, "documents": documents, "tokens": held.astype(np.int64)}
    return {
        "documents": len(lengths),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "token_bytes": tokens.dtype.itemsize,
        "empty_documents": int((lengths == 0).sum()),
        "longest": int(lengths.max(initial=0)),
        "percentiles": {str(p): int(np.percentile(lengths, p)) for p in PERCENTILES} if len(lengths) else {},
        "histogram": {name: values.tolist() for name, values in histogram.items()},
        "duplicates": count_duplicates(tokens),
        "padding": {str(t): {str(cp): padding_shares(lengths, t, cp) for cp in CP_SIZES} for t in seq_lengths},
    }


def format_report(found: dict[str, Any]) -> str:
    """The statistics as tables."""
    total, histogram = found["tokens"], found["histogram"]
    percentiles = ", ".join(f"{p} % up to {value:,}" for p, value in found["percentiles"].items())
    lines = [
        f"{found['documents']:,} documents, {total:,} tokens of {found['token_bytes']} bytes; "
        f"{found['empty_documents']:,} empty, {found['duplicates']:,} repeat an earlier one",
        f"tokens a document: {percentiles}; longest {found['longest']:,}",
        "",
        f"{'tokens a document':>24}  {'documents':>12}  {'tokens':>16}  share of tokens",
    ]
    edges = histogram["edges"]
    for low, high, documents, tokens in zip(
        edges[:-1], edges[1:], histogram["documents"], histogram["tokens"], strict=True
    ):
        if documents:
            share, bin_name = tokens / total, f"{low:,} to {high - 1:,}"
            lines.append(f"{bin_name:>24}  {documents:>12,}  {tokens:>16,}  {share:6.1%} {'#' * round(40 * share)}")
    for seq_length, by_cp in found["padding"].items():
        lines += ["", f"padding at --seq-length {int(seq_length):,}, documents aligned to 2 * cp:"]
        lines.append(f"{'cp':>4}" + "".join(f"{name:>12}" for name in by_cp["1"]))
        lines += [f"{cp:>4}" + "".join(f"{share:>12.3%}" for share in shares.values()) for cp, shares in by_cp.items()]
    if found["padding"]:
        lines.append("(concat pads nothing: a negative share is the end of the stream that is left over)")
    return "\n".join(lines)


def draw_histogram(found: dict[str, Any], title: str) -> bytes:
    """Documents and tokens by length, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    histogram = found["histogram"]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, counted in zip(axes, ("documents", "tokens"), strict=True):
        axis.stairs(histogram[counted], histogram["edges"], fill=True, color="#3b6ea5")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens a document")
        axis.set_ylabel(counted)
        axis.grid(alpha=0.3)
    figure.suptitle(f"{title}: {found['documents']:,} documents, {found['tokens']:,} tokens")
    out = io.BytesIO()
    figure.savefig(out, dpi=120, format="png")
    pyplot.close(figure)
    return out.getvalue()


def stats_command(words: Sequence[str], parser: OneLineParser) -> None:
    """`data.prepare stats P`."""
    parser.add_argument("prefix", metavar="P", help="prefix of P.bin and P.idx")
    parser.add_argument(
        "--seq-length",
        type=int,
        nargs="*",
        default=[8192, 32768],
        metavar="T",
        help="sequence lengths whose padding is computed, multiples of 16; default: 8192 32768",
    )
    parser.add_argument("--png", help="the histogram's file; default: P.lengths.png; none: no picture")
    parser.add_argument("--json", metavar="FILE", help="also write all statistics to FILE; default: off")
    parser.refuse_repeated_lists(words)
    options = parser.parse_args(words)
    for seq_length in options.seq_length:
        if seq_length < 16 or seq_length % 16:
            nearest = max(1, round(seq_length / 16)) * 16
            raise UserError(
                f"--seq-length {seq_length}: must be a multiple of 16, what cp 8 aligns to: nearest {nearest}"
            )
    prefix = Path(options.prefix)
    picture = None if options.png == "none" else Path(options.png or f"{prefix}.lengths.png")
    corpus = {file(prefix).resolve() for file in (token_file, index_file, metadata_file)}
    for flag, path in (("--json", options.json), ("--png", picture)):
        if path is not None and Path(path).resolve() in corpus:
            raise UserError(f"{flag} {path}: is a file of the corpus itself; choose another name")
    found = collect_statistics(IndexedDataset(prefix), options.seq_length)
    print(format_report(found))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    if picture is not None:
        try:
            replace_synced(picture, draw_histogram(found, prefix.name))
        except OSError as error:
            if options.png:
                raise
            print(f"\nno picture: {picture.parent}: {error.strerror}; --png FILE writes it elsewhere")
        else:
            print(f"\npicture: {picture}")
