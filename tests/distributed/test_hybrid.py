"""The layout hybrid over 3 and 6 ranks, over rows that `place` makes, and what broken copies of it compute."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

import cp.hybrid
from cp.placement import PlacedRow, degree_chain, place
from cp.support import AttentionChoice
from tests.distributed.test_cp_attention import (
    Documents,
    inputs,
    mixed_degrees,
    place_at,
    real_rows,
    run_attention,
    wanted,
)
from tests.reference import relative_error, worst
from tests.world import World


@pytest.fixture(scope="module")
def world():
    with World(6) as world:
        yield world


def hybrid(cp_size: int, method: str = "p2p") -> AttentionChoice:
    return AttentionChoice(backend="native", method=method, qkv_format="thd", layout="hybrid", cp_size=cp_size)


def placed(cp_size: int) -> PlacedRow:
    """A row of short and long documents; the long ones need several ranks."""
    rng = np.random.default_rng(cp_size)
    lengths = np.concatenate((rng.integers(1, 9, 6 * cp_size), [30 * cp_size, 20]))
    row_length = (int(lengths.sum()) // cp_size + 4 * cp_size) * cp_size
    row = place(
        lengths, row_length=row_length, cp_size=cp_size, attention_cost=0.01,
        sample_numbers=np.zeros_like(lengths), num_samples=1,
    )  # fmt: skip
    assert row is not None and not row.placement.is_fallback
    return row


def errors_of(rank: int, cp_size: int, method: str, documents: Documents, broken: str = "") -> dict[str, float]:
    tensors = inputs(int(documents[1].sum()), 2, torch.float64)
    with BREAKS[broken]() if broken else mock.patch("os.sep", "/"):
        got, real = run_attention(hybrid(cp_size, method), documents, tensors), real_rows(documents)[:, None, None]
    names = ("out", "dq", "dk", "dv")
    pairs = zip(names, got, wanted(documents, tensors), strict=True)
    return {name: relative_error(g * real, w) for name, g, w in pairs}


@pytest.mark.parametrize("method", ["p2p", "all_gather"])
@pytest.mark.parametrize("cp_size", [2, 3, 6])
def test_mixed_degrees_equal_one_rank(world: World, cp_size: int, method: str) -> None:
    rows = [placed(cp_size), *(mixed_degrees(name, cp_size) for name in ("a", "b", "ones", "empty"))]
    assert len(set(rows[0].placement.degrees)) > 1
    # Equal pieces whose keys lie in the row in the other order than the pieces in storage.
    first_degree = degree_chain(cp_size)[1]
    rows.append(place_at([2, 2], [first_degree, cp_size], [0, 0], cp_size))
    for row in rows:
        for errors in world.run(errors_of, cp_size, method, tuple(row)):
            assert worst(errors) <= 1e-10, errors


# ---------------------------------------------------------------------------------------------------
# Broken copies


def lost_local_documents():
    """Documents of degree 1 are not computed."""
    real = cp.hybrid.build_ring_blocks

    def build(packed_seq, **place):
        blocks = real(packed_seq, **place)
        nothing = replace(blocks.rows, queries=slice(0, 0), padding=None)
        return replace(blocks, steps=[None], rows=nothing) if place["cp_size"] == 1 else blocks

    return mock.patch.object(cp.hybrid, "build_ring_blocks", build)


def wrong_ring():
    """The tokens of a document go around the ring of another degree."""
    real = cp.hybrid.build_degree_rows

    def build(packed_seq, **place):
        rows = real(packed_seq, **place)
        if [row.degree for row in rows[:2]] == [6, 2]:
            rows[:2] = [replace(rows[0], tokens=rows[1].tokens), replace(rows[1], tokens=rows[0].tokens)]
        return rows

    return mock.patch.object(cp.hybrid, "build_degree_rows", build)


def wrong_place_in_the_ring():
    """Every rank takes its neighbour's place."""
    real = cp.hybrid.build_ring_blocks

    def build(packed_seq, *, cp_size, cp_rank, **options):
        return real(packed_seq, cp_size=cp_size, cp_rank=(cp_rank + 1) % cp_size, **options)

    return mock.patch.object(cp.hybrid, "build_ring_blocks", build)


BREAKS = {f.__name__: f for f in (lost_local_documents, wrong_ring, wrong_place_in_the_ring)}


@pytest.mark.parametrize("broken", BREAKS)
def test_broken_copies_are_wrong(world: World, broken: str) -> None:
    # Documents 0 and 1 hold as many tokens of ranks 0 and 1, on 6 and on 2 of them.
    row = place_at([47, 15, 9, 5], [6, 2, 1, 1], [0, 0, 0, 4], 6)
    errors = world.run(errors_of, 6, "p2p", tuple(row))
    assert all(worst(error) <= 1e-10 for error in errors)
    errors = world.run(errors_of, 6, "p2p", tuple(row), broken)
    assert max(worst(error) for error in errors) > 1e-3
