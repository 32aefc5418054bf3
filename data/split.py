"""Which documents of a corpus belong to training, validation and test."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from data.packing import mixed_order
from utils.errors import UserError
from utils.files import build_once, cache_entry, cache_key

# A split of more documents is computed, not looked up: a table would take 8 bytes a document.
MAX_TABLE_DOCUMENTS = 10**8
SPLIT_SEED = 0
cached_order = cache(mixed_order)


class DocumentRange:
    """Document numbers without a table: places `first` to `first + count - 1` of the corpus's documents in file order,
    or in `mixed_order`.

    Args:
        mixed: documents of the corpus, in mixed order; None: in file order.
    """

    def __init__(self, first: int, count: int, mixed: int | None = None) -> None:
        self.first, self.count, self.mixed = first, count, mixed

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return (int(self[at]) for at in range(self.count))

    def __getitem__(self, at: int | slice | np.ndarray) -> np.ndarray:
        places = np.arange(*at.indices(self.count)) if isinstance(at, slice) else np.asarray(at, np.int64)
        if places.size and not 0 <= places.min() <= places.max() < self.count:
            raise IndexError(f"{at} of {self.count} documents")
        places = places + self.first
        if self.mixed is None:
            return places
        return cached_order(self.mixed, SPLIT_SEED)(np.atleast_1d(places)).reshape(places.shape)


Documents = np.ndarray | DocumentRange


def count_documents(num_documents: int, weights: tuple[float, ...]) -> list[int]:
    """Documents of each split: at least one for each weight where there are enough; the first split gets the rest."""
    counts = [max(1, round(num_documents * w / sum(weights))) if w else 0 for w in weights]
    if num_documents < sum(w > 0 for w in weights):
        counts = [0] * len(weights)
    # Rounding up must leave a document to the first split.
    while weights[0] and sum(counts[1:]) >= num_documents > 0 and max(counts[1:]) > 1:
        counts[1 + int(np.argmax(counts[1:]))] -= 1
    counts[0] = num_documents - sum(counts[1:])
    return counts


def split_documents(num_documents: int, weights: tuple[float, ...]) -> list[np.ndarray]:
    """Train, validation and test documents, drawn with a fixed seed.

    Returns:
        An ascending array of document numbers for each weight, of `count_documents` each.
    """
    if not any(weights[1:]):
        return [np.arange(num_documents), *(np.arange(0) for _ in weights[1:])]
    order = np.random.default_rng(SPLIT_SEED).permutation(num_documents)
    counts = count_documents(num_documents, weights)
    ends = np.cumsum(counts)
    return [np.sort(order[end - count : end]) for count, end in zip(counts, ends, strict=True)]


def cached_split(num_documents: int, weights: tuple[float, ...], *, cache_path: Path) -> list[Documents]:
    """`split_documents` from the cache, memory-mapped: ranks and workers of a node share one copy.

    Whole corpora, and more than `MAX_TABLE_DOCUMENTS`, take neither memory nor cache: `DocumentRange`.
    """
    is_split = any(weights[1:])
    if not is_split or num_documents > MAX_TABLE_DOCUMENTS:
        counts = count_documents(num_documents, weights)
        mixed = num_documents if is_split else None
        return [DocumentRange(sum(counts[:i]), count, mixed) for i, count in enumerate(counts)]

    def build(folder: Path) -> None:
        for number, documents in enumerate(split_documents(num_documents, weights)):
            np.save(folder / f"{number}.npy", documents)

    folder = build_once(cache_path / "split" / cache_key(version=1, documents=num_documents, weights=weights), build)
    with cache_entry(folder):
        parts = [np.load(folder / f"{number}.npy", mmap_mode="r").view(np.ndarray) for number in range(len(weights))]
        if any(p.ndim != 1 or p.dtype != np.int64 for p in parts) or sum(len(p) for p in parts) != num_documents:
            raise UserError(f"parts of {[list(p.shape) for p in parts]} for {num_documents} documents")
        return list(parts)
