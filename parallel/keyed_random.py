"""Random masks as a pure function of key and indices, equal under every layout, resume and recomputation.

A mask from each rank's own generator differs between ranks that should agree, and may agree between ranks that should
differ. Here a mask element is the hash of (key, row, column): every rank computes the same element in any order and any
number of times. The hash uses integers only, so devices agree.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# Constants of splitmix64 (Steele, Lea, Flood, OOPSLA 2014), as signed 64-bit numbers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
# Elements hashed at a time: bounds the memory of their 64-bit hashes.
_CHUNK = 1 << 22


def key_of(seed: int, name: str) -> int:
    """A signed 64-bit key; keys of different seeds or names are independent."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little", signed=True)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical x >> bits; PyTorch's shift of signed integers is arithmetic."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix_(x: Tensor) -> Tensor:
    """splitmix64's finaliser, in place. Products wrap."""
    x.bitwise_xor_(_shifted(x, 30)).mul_(_FIRST)
    x.bitwise_xor_(_shifted(x, 27)).mul_(_SECOND)
    return x.bitwise_xor_(_shifted(x, 31))


def keep_mask(key: int, rows: Tensor, columns: Tensor, rate: float) -> Tensor:
    """Bernoulli mask [n, m] bool: each element is True with probability 1 - rate, independently.

    Args:
        key: from `key_of`.
        rows, columns: [n] and [m] int64, any numbering.
    """
    assert 0 <= rate < 1
    threshold = int(rate * 2**64) - 2**63  # hashes are uniform over signed 64-bit numbers
    row_hashes = _mix_(rows * _GOLDEN + key)[:, None]
    steps = columns * _GOLDEN
    size = max(1, _CHUNK // max(1, len(columns)))
    parts = [_mix_(part + steps).ge(threshold) for part in row_hashes.split(size)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
