"""Masks as a function of indices: uniform, independent, equal in any order and any parts."""

from __future__ import annotations

import hashlib

import pytest
import torch

from parallel import keyed_random
from parallel.keyed_random import keep_mask, key_of

ROWS, COLUMNS = torch.arange(2000), torch.arange(1000)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_the_share_that_is_kept(rate: float) -> None:
    mask = keep_mask(key_of(1, "a"), ROWS + 2**50, COLUMNS, rate)
    deviation = (rate * (1 - rate) / mask.numel()) ** 0.5
    assert abs(mask.double().mean().item() - (1 - rate)) <= 4 * deviation
    for dim in (0, 1):  # and of every row and column
        shares = mask.double().mean(dim)
        expected = (rate * (1 - rate) / mask.shape[dim]) ** 0.5
        assert shares.std().item() == pytest.approx(expected, rel=0.1) or rate == 0


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack((a.double().flatten(), b.double().flatten())))[0, 1].item()


def test_neighbours_and_other_keys_have_nothing_in_common() -> None:
    mask = keep_mask(key_of(1, "a"), ROWS, COLUMNS, 0.5)
    others = {
        "next row": keep_mask(key_of(1, "a"), ROWS + 1, COLUMNS, 0.5),
        "next column": keep_mask(key_of(1, "a"), ROWS, COLUMNS + 1, 0.5),
        "next head": keep_mask(key_of(1, "a"), ROWS, COLUMNS + 2**32, 0.5),
        "diagonal": keep_mask(key_of(1, "a"), ROWS + 1, COLUMNS + 1, 0.5),
        "exchanged": keep_mask(key_of(1, "a"), COLUMNS, ROWS, 0.5).T,
        "other name": keep_mask(key_of(1, "b"), ROWS, COLUMNS, 0.5),
        "other seed": keep_mask(key_of(2, "a"), ROWS, COLUMNS, 0.5),
        "next key": keep_mask(key_of(1, "a") + 1, ROWS, COLUMNS, 0.5),
    }
    # 2 million decisions: a correlation of independent ones deviates by 0.0007. A next row or column holds the same
    # decisions, moved.
    for name, other in others.items():
        assert abs(correlation(mask, other)) < 0.004, name
    assert torch.equal(mask[1:], others["next row"][:-1]) and torch.equal(mask[:, 1:], others["next column"][:, :-1])


def test_any_part_in_any_order_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    key = key_of(7, "x")
    whole = keep_mask(key, ROWS, COLUMNS, 0.3)
    rows, columns = torch.randperm(2000)[:77], torch.randperm(1000)[:55]
    assert torch.equal(keep_mask(key, rows, columns, 0.3), whole[rows][:, columns])
    monkeypatch.setattr(keyed_random, "_CHUNK", 10)
    assert torch.equal(keep_mask(key, ROWS[:50], COLUMNS[:30], 0.3), whole[:50, :30])
    assert keep_mask(key, ROWS[:0], COLUMNS, 0.3).shape == (0, 1000)


def test_a_higher_rate_drops_more_of_the_same() -> None:
    low, high = (keep_mask(key_of(3, "x"), ROWS, COLUMNS, rate) for rate in (0.2, 0.6))
    assert not (high & ~low).any() and (low & ~high).any()


def test_by_hand_in_unbounded_integers() -> None:
    """The same hash in Python's own integers."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    golden, key = 0x9E3779B97F4A7C15, key_of(5, "hand")
    assert key % 2**64 == int.from_bytes(hashlib.sha256(b"5/hand").digest()[:8], "little")
    rows, columns = [0, 1, 2**45 + 3], [0, 9, 7 * 2**32 + 1]
    got = keep_mask(key, torch.tensor(rows), torch.tensor(columns), 0.37)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            hashed = mix((mix((row * golden + key) % 2**64) + column * golden) % 2**64)
            signed = hashed - 2**64 if hashed >= 2**63 else hashed
            assert bool(got[i, j]) == (signed >= int(0.37 * 2**64) - 2**63)
