"""Context-parallel sharding: which rank owns which token, as pure functions on numpy arrays with their inverses.

- `zigzag` cuts every document into 2*cp chunks and gives rank r the chunks r and 2*cp-1-r, so that all ranks have the
  same share of every document's causal attention (Llama 3, arXiv:2407.21783, section 3.3.2; the order of Transformer
  Engine's DUAL_CHUNK_SWAP).
- `contiguous` cuts the row into cp equal parts; documents may have any length.
- `doc_contiguous` cuts every document into cp equal parts; rank r takes part r.
- `striped` deals every document's tokens out one by one (Striped Attention, arXiv:2311.09431).
"""

from __future__ import annotations

from functools import partial

import numpy as np

from utils.errors import UserError

LAYOUTS = ("zigzag", "contiguous", "doc_contiguous", "striped")


def document_unit(layout: str, cp_size: int) -> int:
    """The number of tokens that must divide each document's padded length; 1 for one rank, which cuts nothing."""
    if cp_size == 1:
        return 1
    return {"zigzag": 2 * cp_size, "contiguous": 1, "doc_contiguous": cp_size, "striped": cp_size}[layout]


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate arange(start, start + length) over all pairs. int64."""
    starts, lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
    values = np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
    values += np.arange(len(values))
    return values


def shard_indices(padded_lengths: np.ndarray, *, cp_size: int, cp_rank: int, layout: str) -> np.ndarray:
    """Positions in the row of the tokens that `cp_rank` owns, in its storage order.

    Args:
        padded_lengths: [documents] stored tokens of each document; their sum is T.

    Returns:
        [T / cp_size] int64.

    Raises:
        UserError: a length that the layout cannot cut, or an unknown layout.
    """
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}")
    padded_lengths = np.asarray(padded_lengths, np.int64)
    unit = document_unit(layout, cp_size)
    if (padded_lengths % unit).any():
        bad = padded_lengths[padded_lengths % unit != 0]
        raise UserError(
            f"a document of padded length {bad[0]} cannot be cut into {unit} chunks (layout {layout}, cp {cp_size})"
        )
    if cp_size == 1:
        return np.arange(int(padded_lengths.sum()))
    if layout == "contiguous":
        total = int(padded_lengths.sum())
        if total % cp_size:
            raise UserError(f"a row of {total} tokens cannot be cut into cp = {cp_size} parts")
        return np.arange(total // cp_size * cp_rank, total // cp_size * (cp_rank + 1))
    start = np.cumsum(padded_lengths) - padded_lengths
    if layout == "striped":
        share = padded_lengths // cp_size
        within = ranges(np.zeros_like(share), share)
        return np.repeat(start + cp_rank, share) + cp_size * within
    chunk = padded_lengths // unit
    first = start + cp_rank * chunk
    if layout == "doc_contiguous":
        return ranges(first, chunk)
    second = start + (2 * cp_size - 1 - cp_rank) * chunk
    # [documents, 2] flattened: a document's two chunks are adjacent in this rank's storage.
    return ranges(np.stack((first, second), 1).ravel(), np.repeat(chunk, 2))


def invert(order: np.ndarray) -> np.ndarray:
    """The inverse permutation: x[order][invert(order)] is x."""
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return inverse


def unshard_indices(padded_lengths: np.ndarray, *, cp_size: int, layout: str) -> np.ndarray:
    """The inverse of `shard_indices`: [T] int64 indices into the concatenated shards that restore the row's order."""
    shards = [shard_indices(padded_lengths, cp_size=cp_size, cp_rank=rank, layout=layout) for rank in range(cp_size)]
    return invert(np.concatenate(shards))


def attention_pairs(lengths: np.ndarray, padded_lengths: np.ndarray, *, cp_size: int, layout: str) -> np.ndarray:
    """Causal (query, key) pairs of real tokens that each rank computes, [cp_size] int64: the work to balance."""
    lengths, padded_lengths = np.asarray(lengths, np.int64), np.asarray(padded_lengths, np.int64)
    start = np.cumsum(padded_lengths) - padded_lengths
    position = np.arange(padded_lengths.sum()) - np.repeat(start, padded_lengths)
    # A real query at position p of its document attends to p + 1 keys. Padding costs nothing.
    work = np.where(position < np.repeat(lengths, padded_lengths), position + 1, 0)
    cut = partial(shard_indices, padded_lengths, cp_size=cp_size, layout=layout)
    return np.array([work[cut(cp_rank=rank)].sum() for rank in range(cp_size)])


def balance(pairs: np.ndarray) -> float:
    """max / mean of the ranks' work; 1.0 is perfect. An empty row has 1.0."""
    mean = float(np.mean(pairs))
    return float(np.max(pairs)) / mean if mean else 1.0
