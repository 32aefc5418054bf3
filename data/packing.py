"""Which tokens make up sequence number n of an epoch.

- `best-fit`: documents whole, each into the fullest sequence that has room; over all documents of an epoch at once, or over
  windows of them (`window`). Only documents longer than a sequence are cut.
- `greedy`: documents in the epoch's order, cut where a sequence ends.
- `concat`: one stream of tokens, cut every `seq_length` of them; attention and labels cross documents.

All are pure functions of (documents, seed, epoch, seq_length, alignment, window); neither ranks nor the micro-batch size enter.
Every epoch of the same documents has the same number of sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from utils.errors import UserError

# Packings by the attention format that they can be read in; the first is what `auto` takes.
PACKINGS: dict[str, tuple[str, ...]] = {"thd": ("best-fit", "greedy", "concat"), "bshd": ("concat", "greedy")}
PAD_ROWS = ("full", "dynamic")


def resolve_packing(name: str, qkv_format: str) -> str:
    """`auto` is best-fit for THD and one stream for BSHD."""
    return PACKINGS[qkv_format][0] if name == "auto" else name


def epoch_rng(seed: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng([seed, epoch])


# ---------------------------------------------------------------------------------------------------
# Best fit


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

    The number of bins depends on the sizes only, not on their order. Items of one size go together: the bin that is
    the fullest with room stays it until it has no more, so a bin takes as many as fit before the next is looked for.
    Bit c of `open_gaps` says that some bin has exactly c free.

    Args:
        sizes: [n] each from 1 to `capacity`.

    Returns:
        [n] int32 bin numbers from 0 without holes.
    """
    order = np.argsort(-np.asarray(sizes, np.int32), kind="stable")
    distinct, counts = np.unique(sizes, return_counts=True)
    bins_with_gap: list[list[int]] = [[] for _ in range(capacity + 1)]
    open_gaps = 0
    bin_of = np.empty(len(sizes), np.int32)
    bins = done = 0
    for size, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            fitting = open_gaps >> size
            gap = size + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            fit = gap // size  # items that one such bin takes
            wanted = -(-count // fit)
            if fitting:
                stack = bins_with_gap[gap]
                chosen = stack[: -wanted - 1 : -1]  # the latest first
                del stack[-wanted:]
                if not stack:
                    open_gaps &= ~(1 << gap)
            else:
                chosen = list(range(bins, bins + wanted))
                bins += wanted
            placed = min(count, len(chosen) * fit)
            if len(chosen) == 1:
                bin_of[order[done : done + placed]] = chosen[0]
            else:
                bin_of[order[done : done + placed]] = np.repeat(chosen, fit)[:placed]
            count, done = count - placed, done + placed
            last = placed - (len(chosen) - 1) * fit  # items in the last bin, which may have room for more of this size
            filled = len(chosen) if last == fit else len(chosen) - 1
            for left, those in ((gap - fit * size, chosen[:filled]), (gap - last * size, chosen[filled:])):
                if left and those:
                    bins_with_gap[left].extend(those)
                    open_gaps |= 1 << left
    return bin_of


class Epoch(Protocol):
    """The sequences of one epoch."""

    def __len__(self) -> int: ...

    def sequence(self, n: int) -> np.ndarray:
        """[pieces, 3] document, start, length of sequence n."""
        ...


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
        return self.pieces[self.first[n] : self.first[n + 1]]


def pack_epoch(lengths: np.ndarray, *, seed: int, epoch: int, seq_length: int, alignment: int) -> PackedEpoch:
    """Best-fit packing of all documents, in an order of its own for each epoch."""
    return _pack(cut_documents(lengths, seq_length), epoch_rng(seed, epoch), seq_length=seq_length, alignment=alignment)


def _pack(pieces: Pieces, rng: np.random.Generator, *, seq_length: int, alignment: int) -> PackedEpoch:
    """Pieces are shuffled before packing, so that pieces of equal size change partners from epoch to epoch;
    finished sequences are shuffled again, because best-fit makes the ones with long documents first."""
    mixed = rng.permutation(len(pieces.document))
    bin_of = best_fit_decreasing(
        (-(-pieces.length // alignment))[mixed], seq_length // alignment
    )  # in units of the alignment
    num_bins = int(bin_of.max(initial=-1)) + 1
    bin_of = rng.permutation(num_bins)[bin_of]
    order = mixed[np.argsort(bin_of, kind="stable")]
    first = np.concatenate(([0], np.cumsum(np.bincount(bin_of, minlength=num_bins))))
    del mixed, bin_of
    packed = np.empty((len(order), 3), np.int64)
    for column, values in enumerate(pieces):
        packed[:, column] = values[order]
    return PackedEpoch(packed, first)


# ---------------------------------------------------------------------------------------------------
# Best fit over windows


def mixed_order(count: int, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """A fixed random permutation of range(count) that takes no memory: places [n] -> documents [n], int64.

    Four rounds of a Feistel network over the next power of four, stepped until it lands inside (Black and Rogaway,
    Ciphers with Arbitrary Finite Domains, 2002).
    """
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.random.default_rng([seed, count]).integers(0, 1 << 63, 4, dtype=np.uint64)

    def once(x: np.ndarray) -> np.ndarray:
        left, right = x >> np.uint64(half), x & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # splitmix64's constants
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        return (left << np.uint64(half)) | right

    def order(places: np.ndarray) -> np.ndarray:
        x = once(np.asarray(places, np.uint64))
        outside = np.flatnonzero(x >= count)
        while len(outside):
            x[outside] = once(x[outside])
            outside = outside[x[outside] >= count]
        return x.astype(np.int64)

    return order


class Windows:
    """Documents dealt out at random into windows of `window`, the same in every epoch, each packed by itself.

    So an epoch's index is one number a window, whatever the corpus. Epochs differ in the order of windows, and within
    each in who is packed with whom.

    Args:
        lengths_of: documents [n] -> their lengths [n].
        num_documents: how many there are.
    """

    def __init__(
        self,
        lengths_of: Callable[[np.ndarray], np.ndarray],
        num_documents: int,
        *,
        seed: int,
        seq_length: int,
        alignment: int,
        window: int,
    ) -> None:
        self.lengths_of, self.num_documents = lengths_of, num_documents
        self.seed, self.seq_length, self.alignment, self.window = seed, seq_length, alignment, window
        self.order = mixed_order(num_documents, seed)

    def __len__(self) -> int:
        return -(-self.num_documents // self.window)

    def _pieces(self, number: int) -> Pieces:
        documents = self.order(np.arange(number * self.window, min((number + 1) * self.window, self.num_documents)))
        pieces = cut_documents(self.lengths_of(documents), self.seq_length)
        return pieces._replace(document=documents[pieces.document])

    def count(self) -> np.ndarray:
        """[windows] int64 sequences that each window makes, in any epoch."""
        counts = np.zeros(len(self), np.int64)
        for number in range(len(self)):
            sizes = -(-self._pieces(number).length // self.alignment)
            counts[number] = best_fit_decreasing(sizes, self.seq_length // self.alignment).max(initial=-1) + 1
        return counts

    def pack(self, number: int, epoch: int) -> PackedEpoch:
        rng = np.random.default_rng([self.seed, epoch, number])
        return _pack(self._pieces(number), rng, seq_length=self.seq_length, alignment=self.alignment)


@dataclass(frozen=True)
class WindowedEpoch:
    """The windows of one epoch, each packed when it is first read.

    Attributes:
        order: [windows] the windows in this epoch's order.
        first: [windows + 1] int64 number of each one's first sequence.
    """

    windows: Windows
    epoch: int
    order: np.ndarray
    first: np.ndarray
    _packed: dict[int, PackedEpoch] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.first[-1])

    def sequence(self, n: int) -> np.ndarray:
        at = int(np.searchsorted(self.first, n, side="right")) - 1
        if at not in self._packed:
            while len(self._packed) >= 2:  # a batch may straddle two
                del self._packed[next(iter(self._packed))]
            self._packed[at] = self.windows.pack(int(self.order[at]), self.epoch)
        return self._packed[at].sequence(n - int(self.first[at]))


def windowed_epoch(windows: Windows, counts: np.ndarray, epoch: int) -> WindowedEpoch:
    """An epoch over windows that make `counts` sequences each."""
    order = epoch_rng(windows.seed, epoch).permutation(len(windows))
    return WindowedEpoch(windows, epoch, order, np.concatenate(([0], np.cumsum(counts[order]))))


# ---------------------------------------------------------------------------------------------------
# In order


@dataclass(frozen=True)
class GreedyEpoch:
    """Documents in the epoch's order, padded to the alignment, cut where a sequence ends; the last one has a tail.

    Attributes:
        documents: [n] in the epoch's order.
        lengths: [n] their lengths.
        ends: [n] int64 running sum of their padded lengths.
    """

    documents: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray
    seq_length: int

    def __len__(self) -> int:
        return -(-int(self.ends[-1]) // self.seq_length) if len(self.ends) else 0

    def sequence(self, n: int) -> np.ndarray:
        begin, end = n * self.seq_length, (n + 1) * self.seq_length
        low, high = np.searchsorted(self.ends, [begin, end - 1], side="right")
        ends = self.ends[low : high + 1]
        starts = np.concatenate(([self.ends[low - 1] if low else 0], ends[:-1]))
        start = np.maximum(begin, starts)
        first = start - starts
        length = np.minimum(self.lengths[low : high + 1] - first, end - start)
        return np.stack((self.documents[low : high + 1], first, length), 1)[length > 0]


def greedy_epoch(lengths: np.ndarray, *, seed: int, epoch: int, seq_length: int, alignment: int) -> GreedyEpoch:
    documents = epoch_rng(seed, epoch).permutation(len(lengths))
    ordered = np.asarray(lengths, np.int64)[documents]
    return GreedyEpoch(documents, ordered, np.cumsum(-(-ordered // alignment) * alignment), seq_length)


@dataclass(frozen=True)
class ConcatEpoch:
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
        """As `Epoch.sequence`, of the seq_length + 1 tokens of sequence n."""
        begin, end = n * self.seq_length, (n + 1) * self.seq_length + 1
        low, high = np.searchsorted(self.ends, [begin, end - 1], side="right")
        documents, ends = self.documents[low : high + 1], self.ends[low : high + 1]
        starts = np.concatenate(([self.ends[low - 1] if low else 0], ends[:-1]))
        start = np.maximum(begin, starts)
        return np.stack((documents, start - starts, np.minimum(end, ends) - start), 1)


def concat_epoch(lengths: np.ndarray, *, seed: int, epoch: int, seq_length: int) -> ConcatEpoch:
    documents = epoch_rng(seed, epoch).permutation(len(lengths))
    return ConcatEpoch(documents, np.cumsum(np.asarray(lengths, np.int64)[documents]), seq_length)


# ---------------------------------------------------------------------------------------------------
# On disk

StoredEpoch = PackedEpoch | GreedyEpoch | ConcatEpoch
STORED: dict[str, type[StoredEpoch]] = {"best-fit": PackedEpoch, "greedy": GreedyEpoch, "concat": ConcatEpoch}


def _arrays(kind: type[StoredEpoch]) -> list[str]:
    return [f.name for f in fields(kind) if f.name != "seq_length"]


def store_epoch(index: StoredEpoch, folder: Path) -> None:
    """Write an index's arrays, a file each."""
    for name in _arrays(type(index)):
        np.save(folder / f"{name}.npy", getattr(index, name))


def stored_epoch(packing: str, folder: Path, seq_length: int) -> StoredEpoch:
    """What `store_epoch` wrote, memory-mapped.

    Raises:
        OSError, ValueError, EOFError: a file that is missing or broken, or arrays that do not belong together.
    """
    kind = STORED[packing]
    arrays = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in _arrays(kind)
    }  # quicker than memmap
    if kind is PackedEpoch:
        pieces, first = arrays["pieces"], arrays["first"]
        fit = (
            pieces.shape == (len(pieces), 3)
            and first.ndim == 1
            and len(first) > 0
            and first[0] == 0
            and first[-1] == len(pieces)
        )
    else:
        fit = len({a.shape for a in arrays.values()}) == 1
    if not fit or any(a.dtype != np.int64 for a in arrays.values()):
        raise UserError(
            ", ".join(f"{name} is {a.dtype} {list(a.shape)}" for name, a in arrays.items()) + ": not of one index"
        )
    return PackedEpoch(**arrays) if kind is PackedEpoch else kind(**arrays, seq_length=seq_length)  # type: ignore[call-arg]
