"""Rank arithmetic by brute force, for every way to spread 1 to 64 ranks over five axes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from parallel.grid import AXES, DERIVED_AXES, GridSizes, coordinates_of, rank_of, ranks_along


def factorisations(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (n,)
        return
    for first in range(1, n + 1):
        if n % first == 0:
            for rest in factorisations(n // first, parts - 1):
                yield (first, *rest)


@pytest.mark.parametrize("world_size", range(1, 65))
def test_every_factorisation(world_size: int) -> None:
    for shape in factorisations(world_size, 5):
        sizes = GridSizes(**dict(zip(AXES, shape, strict=True)))
        assert sizes.world_size == world_size and sizes.shape == shape
        # The grid is written out as an array; tp varies fastest.
        grid = np.arange(world_size).reshape(shape)
        for at in itertools.product(*(range(n) for n in shape)):
            coordinates = dict(zip(AXES, at, strict=True))
            assert rank_of(sizes, coordinates) == grid[at]
            assert coordinates_of(sizes, int(grid[at])) == coordinates
        for axis in (*AXES, *DERIVED_AXES):
            along = DERIVED_AXES.get(axis, (axis,))
            order = [i for i, a in enumerate(AXES) if a not in along] + [AXES.index(a) for a in along]
            wanted = sorted(grid.transpose(order).reshape(-1, sizes.size(axis)).tolist())
            assert ranks_along(sizes, axis) == wanted


def test_derived_rank_is_row_major() -> None:
    sizes = GridSizes(dp_shard=3, cp=2)
    (fsdp,) = ranks_along(sizes, "fsdp")
    for rank in fsdp:
        at = coordinates_of(sizes, rank)
        assert fsdp.index(rank) == at["dp_shard"] * 2 + at["cp"]


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="cp size 0"):
        GridSizes(cp=0)
