"""Which tokens make up sequence number n of an epoch: best-fit packing (THD) and the stream (BSHD).

Both are pure functions of (documents, seed, epoch, seq_length[, alignment]); neither ranks nor the
micro-batch size enter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

PACKINGS = ("auto", "best-fit", "stream")
PAD_ROWS = ("full", "dynamic")


def resolve_packing(name: str, qkv_format: str) -> str:
    """`auto` is best-fit for THD and one stream for BSHD."""
    if name != "auto":
        return name
    return "best-fit" if qkv_format == "thd" else "stream"


def epoch_rng(seed: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng([seed, epoch])


class Pieces(NamedTuple):
    """Parts of documents, none longer than a sequence: arrays of equal length."""

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray


def cut_documents(lengths: np.ndarray, seq_length: int) -> Pieces:
    """Every document whole, or in pieces of `seq_length` and a rest. Nothing is dropped."""
    lengths = np.asarray(lengths, np.int64)
    counts = -(-lengths // seq_length)
    document = np.repeat(np.arange(len(lengths)), counts)
    piece = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = piece * seq_length
    return Pieces(document, start, np.minimum(lengths[document] - start, seq_length))


def best_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Bin of each item: longest first, each into the fullest bin that still has room.

    The number of bins depends on the sizes only, not on their order. O(n) big-integer operations of
    `capacity` bits: bit c of `open_gaps` says that some bin has exactly c free.

    Args:
        sizes: [n] each at most `capacity`.

    Returns:
        [n] bin numbers from 0 without holes.
    """
    order = np.argsort(-sizes, kind="stable")
    bins_with_gap: list[list[int]] = [[] for _ in range(capacity + 1)]
    open_gaps = 0
    bin_of = np.empty(len(sizes), np.int64)
    bins = 0
    for item, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fitting = open_gaps >> size
        if fitting:
            gap = size + (fitting & -fitting).bit_length() - 1
            chosen = bins_with_gap[gap].pop()
            if not bins_with_gap[gap]:
                open_gaps &= ~(1 << gap)
        else:
            gap, chosen = capacity, bins
            bins += 1
        bin_of[item] = chosen
        left = gap - size
        if left:
            bins_with_gap[left].append(chosen)
            open_gaps |= 1 << left
    return bin_of


@dataclass(frozen=True)
class PackedEpoch:
    """Sequences of one epoch as lists of pieces.

    Attributes:
        pieces: [n, 3] int64 document, start, length, sorted by sequence.
        first: [sequences + 1] int64 index of each sequence's first piece.
    """

    pieces: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.first) - 1

    def sequence(self, n: int) -> np.ndarray:
        """[pieces, 3] of sequence n."""
        return self.pieces[self.first[n] : self.first[n + 1]]


def pack_epoch(lengths: np.ndarray, *, seed: int, epoch: int, seq_length: int, alignment: int) -> PackedEpoch:
    """Best-fit packing of all documents, in an order of its own for each epoch.

    Pieces are shuffled before packing, so that pieces of equal size change partners from epoch to epoch;
    finished sequences are shuffled again, because best-fit makes the ones with long documents first.
    """
    rng = epoch_rng(seed, epoch)
    pieces = cut_documents(lengths, seq_length)
    shuffled = np.stack(pieces, 1)[rng.permutation(len(pieces.document))]
    sizes = -(-shuffled[:, 2] // alignment)  # in units of the alignment
    bin_of = best_fit_decreasing(sizes, seq_length // alignment)
    num_bins = int(bin_of.max(initial=-1)) + 1
    bin_of = rng.permutation(num_bins)[bin_of]
    order = np.argsort(bin_of, kind="stable")
    first = np.concatenate(([0], np.cumsum(np.bincount(bin_of, minlength=num_bins))))
    return PackedEpoch(shuffled[order], first)


@dataclass(frozen=True)
class StreamEpoch:
    """All documents of one epoch end to end, cut every `seq_length` tokens.

    A sequence reads one token ahead for its last label; the stream's last tokens, fewer than a sequence
    and its look-ahead, are left over.

    Attributes:
        documents: [n] in the epoch's order.
        ends: [n] int64 running sum of their lengths.
    """

    documents: np.ndarray
    ends: np.ndarray
    seq_length: int

    def __len__(self) -> int:
        return max(0, (int(self.ends[-1]) - 1) // self.seq_length) if len(self.ends) else 0

    @property
    def left_over(self) -> int:
        """Tokens at the end of the stream that belong to no sequence."""
        return (int(self.ends[-1]) if len(self.ends) else 0) - len(self) * self.seq_length

    def sequence(self, n: int) -> np.ndarray:
        """[pieces, 3] document, start, length of the seq_length + 1 tokens of sequence n."""
        begin, end = n * self.seq_length, (n + 1) * self.seq_length + 1
        low, high = np.searchsorted(self.ends, [begin, end - 1], side="right")
        documents, ends = self.documents[low : high + 1], self.ends[low : high + 1]
        starts = np.concatenate(([self.ends[low - 1] if low else 0], ends[:-1]))
        start = np.maximum(begin, starts)
        return np.stack((documents, start - starts, np.minimum(end, ends) - start), 1)


def stream_epoch(lengths: np.ndarray, *, seed: int, epoch: int, seq_length: int) -> StreamEpoch:
    documents = epoch_rng(seed, epoch).permutation(len(lengths))
    return StreamEpoch(documents, np.cumsum(np.asarray(lengths, np.int64)[documents]), seq_length)
