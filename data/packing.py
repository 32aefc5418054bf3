"""Which tokens make up sample n of an epoch.

- `best-fit`: whole documents, each in the fullest sample with room, over all documents of an epoch or over windows of
  them (`window`). Only documents longer than a sample are cut.
- `greedy`: documents in the epoch's order, cut where a sample ends.
- `concat`: one stream of tokens, cut every `seq_length` tokens; attention and labels cross documents.

Packings are pure functions of (documents, seed, epoch, seq_length, alignment, window); ranks and micro-batch size play
no part. All epochs of the same documents have the same number of samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import UserError

# Packings of each attention format; `auto` takes the first.
PACKINGS: dict[str, tuple[str, ...]] = {"thd": ("best-fit", "greedy", "concat"), "bshd": ("concat", "greedy")}
PAD_ROWS = ("full", "dynamic")
BIN_DTYPES: tuple[type, ...] = (np.int32, np.int64)


def resolve_packing(name: str, qkv_format: str) -> str:
    """`auto` is best-fit for thd and concat for bshd."""
    return PACKINGS[qkv_format][0] if name == "auto" else name


@dataclass(frozen=True, kw_only=True)
class PackingOptions:
    """How documents become samples.

    Attributes:
        method: of `packing.PACKINGS`.
        alignment: documents are padded to a multiple of it (best-fit, greedy).
        window: best-fit packs windows of so many documents; None: all documents of an epoch at once.
        one_document: attention sees one document a sample (bshd; always with concat), not one a piece.
    """

    seq_length: int
    method: str
    seed: int
    alignment: int = 1
    window: int | None = None
    one_document: bool = False


def epoch_rng(seed: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng([seed, epoch])


# ---------------------------------------------------------------------------------------------------
# Best fit


class Pieces(NamedTuple):
    """Parts of documents, none longer than a sample: int64 arrays of equal length."""

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray


def cut_documents(lengths: np.ndarray, seq_length: int) -> Pieces:
    """Every document whole, or in pieces of `seq_length` tokens and a rest."""
    lengths = np.asarray(lengths, np.int64)
    counts = -(-lengths // seq_length)
    document = np.repeat(np.arange(len(lengths)), counts)
    piece = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = piece * seq_length
    return Pieces(document, start, np.minimum(lengths[document] - start, seq_length))


def best_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Bin of each item: longest item first, each into the fullest bin with room.

    The number of bins depends on the sizes, not on their order. Items of one size are placed together: the fullest bin
    with room stays the fullest until it has none, so it takes as many items as fit. Bit c of `open_gaps`: some bin has
    c free.

    Args:
        sizes: [n] each from 1 to `capacity`.

    Returns:
        [n] bin numbers from 0 without holes, of the first of `BIN_DTYPES` that holds n - 1.
    """
    order = np.argsort(-np.asarray(sizes, np.int32), kind="stable")
    distinct, counts = np.unique(sizes, return_counts=True)
    bins_with_gap: list[list[int]] = [[] for _ in range(capacity + 1)]
    open_gaps = 0
    bin_of: np.ndarray = np.empty(
        len(sizes), next(dtype for dtype in BIN_DTYPES if len(sizes) - 1 <= np.iinfo(dtype).max)
    )
    bins = done = 0
    for size, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            fitting = open_gaps >> size
            gap = size + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            fit = gap // size  # items of this size in one such bin
            wanted = -(-count // fit)
            if fitting:
                stack = bins_with_gap[gap]
                chosen = stack[: -wanted - 1 : -1]  # the latest bins first
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
            last = placed - (len(chosen) - 1) * fit  # items in the last bin, which may still have room
            filled = len(chosen) if last == fit else len(chosen) - 1
            for left, those in ((gap - fit * size, chosen[:filled]), (gap - last * size, chosen[filled:])):
                if left and those:
                    bins_with_gap[left].extend(those)
                    open_gaps |= 1 << left
    return bin_of


@dataclass(frozen=True)
class PackedEpoch:
    """Samples of one epoch as lists of pieces.

    Attributes:
        pieces: [n, 3] int64 document, start, length, sorted by sample.
        first: [samples + 1] int64 index of each sample's first piece.
    """

    pieces: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.first) - 1

    def sample_pieces(self, n: int) -> np.ndarray:
        """[pieces, 3] int64 document, start, length of sample n."""
        return self.pieces[self.first[n] : self.first[n + 1]]

    def piece_lengths(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Lengths [pieces] of the pieces of samples `begin` to `end` - 1, and the first piece [samples + 1] of each."""
        first = self.first[begin : end + 1]
        return self.pieces[first[0] : first[-1], 2], first - first[0]


def pack_epoch(lengths: np.ndarray, *, seed: int, epoch: int, seq_length: int, alignment: int) -> PackedEpoch:
    """Best-fit packing of all documents, in an order of its own for each epoch."""
    return _pack(cut_documents(lengths, seq_length), epoch_rng(seed, epoch), seq_length=seq_length, alignment=alignment)


def _pack(pieces: Pieces, rng: np.random.Generator, *, seq_length: int, alignment: int) -> PackedEpoch:
    """Shuffles pieces before packing, so that pieces of equal size change partners between epochs, and samples after
    packing, because best-fit makes samples of long documents first.
    """
    mixed = rng.permutation(len(pieces.document))
    units = -(-pieces.length // alignment)
    bin_of = best_fit_decreasing(units[mixed], seq_length // alignment)
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
    """A fixed random permutation of range(count) without a table: positions [n] -> documents [n] int64.

    Four rounds of a Feistel network over the next power of four, repeated until the result is below count (Black and
    Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    """
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.random.default_rng([seed, count]).integers(0, 1 << 63, 4, dtype=np.uint64)

    def permute(x: np.ndarray) -> np.ndarray:
        left, right = x >> np.uint64(half), x & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # splitmix64's constants
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        return (left << np.uint64(half)) | right

    def order(positions: np.ndarray) -> np.ndarray:
        x = permute(np.asarray(positions, np.uint64))
        outside = np.flatnonzero(x >= count)
        while len(outside):
            x[outside] = permute(x[outside])
            outside = outside[x[outside] >= count]
        return x.astype(np.int64)

    return order


class Windows:
    """Documents dealt at random into windows of `window` documents; each window is packed by itself.

    An epoch's index is one number a window. Windows hold the same documents in every epoch; epochs differ in the order
    of windows, and in which documents of a window share a sample.

    Args:
        lengths_of: document numbers [n] -> lengths [n].
    """

    def __init__(
        self, lengths_of: Callable[[np.ndarray], np.ndarray], num_documents: int, packing: PackingOptions
    ) -> None:
        assert packing.window is not None
        self.lengths_of, self.num_documents = lengths_of, num_documents
        self.seed, self.seq_length, self.alignment = packing.seed, packing.seq_length, packing.alignment
        self.window = packing.window
        self.order = mixed_order(num_documents, packing.seed)

    def __len__(self) -> int:
        return -(-self.num_documents // self.window)

    def _pieces(self, number: int) -> Pieces:
        documents = self.order(np.arange(number * self.window, min((number + 1) * self.window, self.num_documents)))
        pieces = cut_documents(self.lengths_of(documents), self.seq_length)
        return pieces._replace(document=documents[pieces.document])

    def count_samples(self) -> np.ndarray:
        """[windows] int64 samples of each window, the same in every epoch."""
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
    """The windows of one epoch, each packed at its first read.

    Attributes:
        order: [windows] the windows in this epoch's order.
        first: [windows + 1] int64 number of each window's first sample.
    """

    windows: Windows
    epoch: int
    order: np.ndarray
    first: np.ndarray
    _packed: dict[int, PackedEpoch] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.first[-1])

    def sample_pieces(self, n: int) -> np.ndarray:
        at, window = self._window_of(n)
        return window.sample_pieces(n - at)

    def piece_lengths(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """As `PackedEpoch.piece_lengths`."""
        lengths, firsts, pieces = [], [np.zeros(1, np.int64)], 0
        while begin < end:
            at, window = self._window_of(begin)
            stop = min(end, at + len(window))
            own, first = window.piece_lengths(begin - at, stop - at)
            lengths.append(own)
            firsts.append(first[1:] + pieces)
            pieces, begin = pieces + len(own), stop
        return np.concatenate(lengths), np.concatenate(firsts)

    def _window_of(self, n: int) -> tuple[int, PackedEpoch]:
        """The first sample of the window that holds sample n, and the window."""
        at = int(np.searchsorted(self.first, n, side="right")) - 1
        if at not in self._packed:
            while len(self._packed) >= 2:  # a batch may span two
                del self._packed[next(iter(self._packed))]
            self._packed[at] = self.windows.pack(int(self.order[at]), self.epoch)
        return int(self.first[at]), self._packed[at]


def windowed_epoch(windows: Windows, counts: np.ndarray, epoch: int) -> WindowedEpoch:
    """An epoch over windows of `counts` samples each."""
    order = epoch_rng(windows.seed, epoch).permutation(len(windows))
    return WindowedEpoch(windows, epoch, order, np.concatenate(([0], np.cumsum(counts[order]))))


# ---------------------------------------------------------------------------------------------------
# In order


@dataclass(frozen=True)
class StreamEpoch:
    """Documents of one epoch end to end, cut every `seq_length` tokens: `greedy` and `concat`.

    Attributes:
        documents: [n] int64 numbers of the documents in the epoch's order.
        lengths: [n] int64 their lengths; None: `ends` counts no padding.
        ends: [n] int64 running sum of their padded lengths.
        lookahead: 1 where a sample reads one token more for its last label. The last tokens of the stream, too few for
            a sample and its lookahead, are then left over; with 0 the last sample has a tail.
    """

    documents: np.ndarray
    lengths: np.ndarray | None
    ends: np.ndarray
    seq_length: int
    lookahead: int

    def __len__(self) -> int:
        total = int(self.ends[-1]) if len(self.ends) else 0
        return max(0, total - 1) // self.seq_length if self.lookahead else -(-total // self.seq_length)

    @property
    def left_over(self) -> int:
        """Tokens at the end of a stream with lookahead that belong to no sample."""
        return (int(self.ends[-1]) if len(self.ends) else 0) - len(self) * self.seq_length

    def sample_pieces(self, n: int) -> np.ndarray:
        """As `PackedEpoch.sample_pieces`, `lookahead` included."""
        begin, end = n * self.seq_length, (n + 1) * self.seq_length + self.lookahead
        low, high = np.searchsorted(self.ends, [begin, end - 1], side="right")
        here = slice(low, high + 1)
        ends = self.ends[here]
        starts = np.concatenate(([self.ends[low - 1] if low else 0], ends[:-1]))
        lengths = ends - starts if self.lengths is None else self.lengths[here]
        first = np.maximum(begin, starts) - starts
        taken = np.minimum(lengths, end - starts) - first
        return np.stack((self.documents[here], first, taken), 1)[taken > 0]

    def piece_lengths(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """As `PackedEpoch.piece_lengths`, without lookahead; a sample's tail is a piece of length 0."""
        cuts = np.arange(begin, end + 1) * self.seq_length
        low, high = np.searchsorted(self.ends, [cuts[0], cuts[-1] - 1], side="right")
        bounds = np.unique(np.concatenate((cuts, self.ends[low:high])))
        starts = bounds[:-1]
        document = np.searchsorted(self.ends, starts, side="right")
        assert self.lengths is not None
        is_real = document < len(self.ends)
        document = np.minimum(document, len(self.ends) - 1)
        before = np.where(document > 0, self.ends[document - 1], 0)
        left = np.where(is_real, self.lengths[document] - (starts - before), 0)
        return np.clip(left, 0, np.diff(bounds)), np.searchsorted(starts, cuts)


def greedy_epoch(lengths: np.ndarray, *, seed: int, epoch: int, seq_length: int, alignment: int) -> StreamEpoch:
    """Documents in an order of its own for each epoch, padded to the alignment."""
    documents = epoch_rng(seed, epoch).permutation(len(lengths))
    ordered = np.asarray(lengths, np.int64)[documents]
    ends = np.cumsum(-(-ordered // alignment) * alignment)
    return StreamEpoch(documents, ordered, ends, seq_length, lookahead=0)


def concat_epoch(lengths: np.ndarray, *, seed: int, epoch: int, seq_length: int) -> StreamEpoch:
    """One stream of documents, in an order of its own for each epoch."""
    documents = epoch_rng(seed, epoch).permutation(len(lengths))
    ends = np.cumsum(np.asarray(lengths, np.int64)[documents])
    return StreamEpoch(documents, None, ends, seq_length, lookahead=1)


# ---------------------------------------------------------------------------------------------------
# On disk

StoredEpoch = PackedEpoch | StreamEpoch
Epoch = StoredEpoch | WindowedEpoch


def build_epoch(lengths: np.ndarray, packing: PackingOptions, number: int) -> StoredEpoch:
    """An epoch over documents of these lengths, without windows."""
    options = dict(seed=packing.seed, epoch=number, seq_length=packing.seq_length)
    if packing.method == "concat":
        return concat_epoch(lengths, **options)
    build = greedy_epoch if packing.method == "greedy" else pack_epoch
    return build(lengths, alignment=packing.alignment, **options)


STORED_ARRAYS = {
    "best-fit": ("pieces", "first"),
    "greedy": ("documents", "lengths", "ends"),
    "concat": ("documents", "ends"),
}


def save_epoch(index: StoredEpoch, folder: Path) -> None:
    """Writes an index's arrays, one .npy file each."""
    for name, value in vars(index).items():
        if isinstance(value, np.ndarray):
            np.save(folder / f"{name}.npy", value)


def load_epoch(packing: str, folder: Path, seq_length: int) -> StoredEpoch:
    """The index that `save_epoch` wrote, memory-mapped.

    Raises:
        OSError, ValueError, EOFError: a file is missing or corrupted, or the arrays do not belong together.
    """
    # Plain arrays are faster to index than np.memmap.
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in STORED_ARRAYS[packing]}
    shapes = {name: a.shape for name, a in arrays.items()}
    if packing == "best-fit":
        count, first = len(arrays["pieces"]), arrays["first"]
        fits = shapes["pieces"] == (count, 3) and first.ndim == 1 and len(first) > 0
        fits = fits and first[0] == 0 and first[-1] == count
    else:
        fits = len(set(shapes.values())) == 1
    if not fits or any(a.dtype != np.int64 for a in arrays.values()):
        found = ", ".join(f"{name} is {a.dtype} {list(a.shape)}" for name, a in arrays.items())
        raise UserError(f"{found}: not of one index")
    if packing == "best-fit":
        return PackedEpoch(**arrays)
    ordered = arrays["documents"], arrays.get("lengths"), arrays["ends"]
    return StreamEpoch(*ordered, seq_length, lookahead=1 if packing == "concat" else 0)
