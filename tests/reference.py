"""Attention and documents written independently of `cp/`: what the suite is measured against."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def dense_attention(q: Tensor, k: Tensor, v: Tensor, lengths, padded_lengths, *, scale: float) -> Tensor:
    """Causal attention within each document by an explicit [T, T] mask.

    q [T, hq, d]; k, v [T, hkv, d] of the whole row in order. Rows of padding are 0.
    """
    document = np.full(int(np.sum(padded_lengths)), -1)
    at = 0
    for index, (real, padded) in enumerate(zip(lengths, padded_lengths, strict=True)):
        document[at : at + real] = index
        at += padded
    document = torch.from_numpy(document)
    order = torch.arange(len(document))
    allowed = (document[:, None] == document[None, :]) & (document[:, None] >= 0) & (order[:, None] >= order[None, :])
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores.masked_fill(~allowed, float("-inf"))
    # A row of padding has no key: softmax of all -inf is nan, so give it weight 0 by hand.
    weights = torch.softmax(scores.masked_fill(~allowed.any(1)[:, None], 0.0), -1) * allowed
    return torch.einsum("hqk,khd->qhd", weights, v)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Frobenius norm of the difference over the norm of `want` (or the plain norm where `want` is 0)."""
    want = want.double()
    difference = (got.double() - want).norm().item()
    size = want.norm().item()
    return difference / size if size else difference


def random_documents(rng: np.random.Generator, row_length: int, alignment: int) -> tuple[np.ndarray, np.ndarray]:
    """Real and padded lengths that fill a row: ragged, some of length 1, often with a tail of real length 0."""
    real: list[int] = []
    padded: list[int] = []
    left = row_length
    while left:
        longest = left if rng.random() < 0.3 else min(left, 4 * alignment)
        length = 1 if rng.random() < 0.2 else int(rng.integers(1, longest + 1))
        size = -(-length // alignment) * alignment
        if rng.random() < 0.1:  # tail
            length, size = 0, left
        real.append(length)
        padded.append(size)
        left -= size
    return np.array(real), np.array(padded)
