"""What is in a prepared corpus: `python -m data.prepare stats P`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.indexed_dataset import IndexedDataset, index_file, token_file
from data.sources import metadata_file
from utils.errors import OneLineParser, UserError

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


def collect_statistics(tokens: IndexedDataset) -> dict[str, Any]:
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
    return "\n".join(lines)


def stats_command(words: Sequence[str], parser: OneLineParser) -> None:
    """`data.prepare stats P`."""
    parser.add_argument("prefix", metavar="P", help="prefix of P.bin and P.idx")
    parser.add_argument("--json", metavar="FILE", help="also write all statistics to FILE; default: off")
    options = parser.parse_args(words)
    prefix = Path(options.prefix)
    corpus = {file(prefix).resolve() for file in (token_file, index_file, metadata_file)}
    if options.json is not None and Path(options.json).resolve() in corpus:
        raise UserError(f"--json {options.json}: is a file of the corpus itself; choose another name")
    found = collect_statistics(IndexedDataset(prefix))
    print(format_report(found))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
