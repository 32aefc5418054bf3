"""Context-parallel sharding: which rank owns which token, as pure functions on numpy arrays.

- `zigzag` cuts every document into 2*cp chunks and gives rank r the chunks r and 2*cp-1-r, so that all ranks have the
  same share of every document's causal attention (Llama 3, arXiv:2407.21783, section 3.3.2; the order of Transformer
  Engine's DUAL_CHUNK_SWAP).
- `contiguous` cuts the row into cp equal parts; documents may have any length.
- `doc_contiguous` cuts every document into cp equal parts; rank r takes part r.
- `striped` deals every document's tokens out one by one (Striped Attention, arXiv:2311.09431).
- `hybrid` gives every document ranks of its own (`cp/placement.py`), which share it as in `zigzag`. Documents of the
  most ranks come first in a rank's storage.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from cp.placement import Placement, degree_unit, sample_degree
from utils.errors import UserError

LAYOUTS = ("zigzag", "contiguous", "doc_contiguous", "striped", "hybrid")


def document_unit(layout: str, cp_size: int, num_samples: int = 1) -> int:
    """The number of tokens that must divide each document's padded length; 1 for one rank, which cuts nothing.

    Args:
        num_samples: of a row; for hybrid, whose rows without an even placement give samples ranks of their own.
    """
    if cp_size == 1:
        return 1
    if layout == "hybrid":
        return int(degree_unit(sample_degree(cp_size, num_samples)))
    return {"zigzag": 2 * cp_size, "contiguous": 1, "doc_contiguous": cp_size, "striped": cp_size}[layout]


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate arange(start, start + length) over all pairs. int64."""
    starts, lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
    values = np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
    values += np.arange(len(values))
    return values


def held_documents(placement: Placement, cp_rank: int) -> np.ndarray:
    """Documents of which a rank holds tokens, [n] int64, in the order of its storage."""
    first, stop = placement.first_ranks, placement.first_ranks + placement.degrees
    held = np.flatnonzero((first <= cp_rank) & (cp_rank < stop))
    return held[np.argsort(-placement.degrees[held], kind="stable")]


def shard_indices(
    padded_lengths: np.ndarray, *, cp_size: int, cp_rank: int, layout: str, placement: Placement | None = None
) -> np.ndarray:
    """Positions in the row of the tokens that `cp_rank` owns, in its storage order.

    Args:
        padded_lengths: [documents] stored tokens of each document; their sum is T.
        placement: of the layout hybrid; None: every document lies on all ranks.

    Returns:
        [T / cp_size] int64.

    Raises:
        UserError: a length that the layout cannot cut, or an unknown layout.
    """
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}")
    padded_lengths = np.asarray(padded_lengths, np.int64)
    if layout == "hybrid" and placement is None:
        placement = Placement.on_all_ranks(len(padded_lengths), cp_size)
    unit = document_unit(layout, cp_size) if placement is None else degree_unit(placement.degrees)
    if (padded_lengths % unit).any():
        bad = int(np.flatnonzero(padded_lengths % unit)[0])
        chunks = np.broadcast_to(unit, padded_lengths.shape)[bad]
        raise UserError(
            f"a document of padded length {padded_lengths[bad]} cannot be cut into {chunks} chunks "
            f"(layout {layout}, cp {cp_size})"
        )
    if cp_size == 1:
        return np.arange(int(padded_lengths.sum()))
    if layout == "contiguous":
        total = int(padded_lengths.sum())
        if total % cp_size:
            raise UserError(f"a row of {total} tokens cannot be cut into cp = {cp_size} parts")
        return np.arange(total // cp_size * cp_rank, total // cp_size * (cp_rank + 1))
    start = np.cumsum(padded_lengths) - padded_lengths
    if placement is not None:
        return _placed_indices(start, padded_lengths, placement, cp_rank)
    if layout == "striped":
        share = padded_lengths // cp_size
        within = ranges(np.zeros_like(share), share)
        return np.repeat(start + cp_rank, share) + cp_size * within
    if layout == "doc_contiguous":
        chunk = padded_lengths // cp_size
        return ranges(start + cp_rank * chunk, chunk)
    return _zigzag_indices(start, padded_lengths // unit, cp_size, cp_rank)


def _zigzag_indices(start: np.ndarray, chunk: np.ndarray, size: int | np.ndarray, rank: int | np.ndarray) -> np.ndarray:
    first, second = start + rank * chunk, start + (2 * size - 1 - rank) * chunk
    # [documents, 2] flattened: a document's two chunks are adjacent in this rank's storage.
    return ranges(np.stack((first, second), 1).ravel(), np.repeat(chunk, 2))


def _placed_indices(start: np.ndarray, padded: np.ndarray, placement: Placement, cp_rank: int) -> np.ndarray:
    held = held_documents(placement, cp_rank)
    degrees, first_ranks = placement.degrees[held], placement.first_ranks[held]
    is_shared = degrees > 1  # these come first
    shared, whole = held[is_shared], held[~is_shared]
    cut = _zigzag_indices(
        start[shared],
        padded[shared] // (2 * degrees[is_shared]),
        degrees[is_shared],
        cp_rank - first_ranks[is_shared],
    )
    return np.concatenate((cut, ranges(start[whole], padded[whole])))


def invert(order: np.ndarray) -> np.ndarray:
    """The inverse permutation: x[order][invert(order)] is x."""
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return inverse


def attention_pairs(
    lengths: np.ndarray, padded_lengths: np.ndarray, *, cp_size: int, layout: str, placement: Placement | None = None
) -> np.ndarray:
    """Causal (query, key) pairs of real tokens that each rank computes, [cp_size] int64: the work to balance."""
    lengths, padded_lengths = np.asarray(lengths, np.int64), np.asarray(padded_lengths, np.int64)
    if layout in ("zigzag", "hybrid"):
        placement = placement or Placement.on_all_ranks(len(lengths), cp_size)
        return _zigzag_pairs(lengths, padded_lengths, placement, cp_size)
    start = np.cumsum(padded_lengths) - padded_lengths
    position = np.arange(padded_lengths.sum()) - np.repeat(start, padded_lengths)
    # A real query at position p of its document attends to p + 1 keys. Padding costs nothing.
    work = np.where(position < np.repeat(lengths, padded_lengths), position + 1, 0)
    cut = partial(shard_indices, padded_lengths, cp_size=cp_size, layout=layout)
    return np.array([work[cut(cp_rank=rank)].sum() for rank in range(cp_size)])


def _zigzag_pairs(lengths: np.ndarray, padded: np.ndarray, placement: Placement, cp_size: int) -> np.ndarray:
    pairs = np.zeros(cp_size, np.int64)
    for degree in np.unique(placement.degrees).tolist():
        own = placement.degrees == degree
        # [documents, 2 * degree + 1] real tokens before each chunk's end; n tokens from the document's first have
        # n (n + 1) / 2 pairs.
        ends = np.arange(2 * degree + 1) * -(-padded[own] // (2 * degree))[:, None]
        before = np.minimum(ends, lengths[own][:, None])
        chunks = np.diff(before * (before + 1) // 2, axis=1)
        ranks = placement.first_ranks[own][:, None] + np.arange(degree)
        np.add.at(pairs, ranks, chunks[:, :degree] + chunks[:, : degree - 1 : -1])
    return pairs


def balance(pairs: np.ndarray) -> float:
    """max / mean of the ranks' work; 1.0 is perfect. An empty row has 1.0."""
    mean = float(np.mean(pairs))
    return float(np.max(pairs)) / mean if mean else 1.0
