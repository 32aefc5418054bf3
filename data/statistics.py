"""What is in a prepared corpus: `python -m data.prepare stats P`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.indexed_dataset import IndexedDataset
from utils.errors import OneLineParser

PERCENTILES = (1, 25, 50, 75, 99)


def count_duplicates(tokens: IndexedDataset) -> int:
    """Documents that equal an earlier one token for token, by 128 bits of BLAKE2b."""
    hashes = np.empty((len(tokens), 2), np.uint64)
    for number, length in enumerate(tokens.lengths.tolist()):
        digest = hashlib.blake2b(tokens.read(number, 0, length).data, digest_size=16).digest()
        hashes[number] = np.frombuffer(digest, np.uint64)
    return len(hashes) - len(np.unique(hashes, axis=0))


def describe_corpus(tokens: IndexedDataset) -> str:
    """Counts, percentiles of the lengths, and documents and tokens by length, in bins of powers of two."""
    lengths = np.asarray(tokens.lengths)
    total, longest = int(lengths.sum(dtype=np.int64)), int(lengths.max(initial=0))
    percentiles = [f"{p} % up to {int(np.percentile(lengths, p)):,}" for p in PERCENTILES if len(lengths)]
    lines = [
        f"{len(lengths):,} documents, {total:,} tokens of {tokens.dtype.itemsize} bytes; "
        f"{int((lengths == 0).sum()):,} empty, {count_duplicates(tokens):,} repeat an earlier one",
        f"tokens a document: {', '.join(percentiles)}; longest {longest:,}",
        f"\n{'tokens a document':>24}  {'documents':>12}  {'tokens':>16}  share of tokens",
    ]
    for low in (1 << bit for bit in range(longest.bit_length())):
        here = lengths[(lengths >= low) & (lengths < 2 * low)]
        if len(here):
            held, bin_name = int(here.sum(dtype=np.int64)), f"{low:,} to {2 * low - 1:,}"
            shown = f"{held / total:6.1%} {'#' * round(40 * held / total)}"
            lines.append(f"{bin_name:>24}  {len(here):>12,}  {held:>16,}  {shown}")
    return "\n".join(lines)


def stats_command(words: Sequence[str], parser: OneLineParser) -> None:
    """`data.prepare stats P`."""
    parser.add_argument("prefix", metavar="P", help="prefix of P.bin and P.idx")
    print(describe_corpus(IndexedDataset(Path(parser.parse_args(words).prefix))))
