"""Random decisions that are a pure function of a key and a place, so that no layout, resume or recomputation can change them.

A mask that every rank draws from a generator of its own differs between ranks that should agree and agrees between
ranks that should differ, unless states are kept apart with care. Here a decision is the hash of (key, row, column):
whoever computes that place, in whatever order and however often, decides the same. Integers only, so devices agree.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# Of splitmix64 (Steele, Lea, Flood, OOPSLA 2014), as signed 64-bit numbers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
# Decisions that are made at a time: bounds the memory of their 64-bit hashes.
_CHUNK = 1 << 22


def key_of(seed: int, name: str) -> int:
    """A signed 64-bit key; keys of different seeds or names have nothing in common."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little", signed=True)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits of the 64 bits as they stand; PyTorch's shift of a negative number would fill in ones."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix_(x: Tensor) -> Tensor:
    """splitmix64's finaliser, in place. Products wrap around."""
    x.bitwise_xor_(_shifted(x, 30)).mul_(_FIRST)
    x.bitwise_xor_(_shifted(x, 27)).mul_(_SECOND)
    return x.bitwise_xor_(_shifted(x, 31))


def keep_mask(key: int, rows: Tensor, columns: Tensor, rate: float) -> Tensor:
    """Which places are kept: each with probability 1 - rate, independently of all others.

    Args:
        key: from `key_of`.
        rows: [n] int64, columns: [m] int64; what they number is the caller's business.

    Returns:
        [n, m] bool.
    """
    assert 0 <= rate < 1
    threshold = int(rate * 2**64) - 2**63  # of a hash that is even over the signed numbers
    row_hashes = _mix_(rows * _GOLDEN + key)[:, None]
    steps = columns * _GOLDEN
    size = max(1, _CHUNK // max(1, len(columns)))
    parts = [_mix_(part + steps).ge(threshold) for part in row_hashes.split(size)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
