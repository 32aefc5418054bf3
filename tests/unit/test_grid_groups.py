"""The groups that every rank creates and joins, for whole worlds, with a stand-in for torch.distributed.

`new_group` is collective: ranks that call it in different orders hang or join the wrong communicator. Here a
group is the tuple of its ranks, and every rank of the world is asked in turn.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

import parallel.grid as grid_module
from parallel.grid import (
    AXES,
    DERIVED_AXES,
    Grid,
    GridSizes,
    build_grid,
    coordinates_of,
    device_mesh,
    embedding_group,
    rank_of,
    split_group,
)
from tests.unit.test_grid import factorisations

LARGER = [(1, 2, 2, 4, 2), (2, 1, 3, 4, 2), (1, 4, 1, 8, 1), (2, 2, 2, 2, 2)]
SHAPES = [shape for world in (1, 2, 3, 4, 6, 8, 12) for shape in factorisations(world, 5)] + LARGER


class StandIn:
    """torch.distributed of one rank; `made` lists the groups of all ranks in creation order, `alone` its own."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.made, self.alone = rank, world_size, [], []

    def get_rank(self) -> int:
        return self.rank

    def get_world_size(self) -> int:
        return self.world_size

    def get_backend(self, group: tuple[int, ...]) -> str:
        return "the axis's own"

    def new_group(
        self, ranks: list[int], timeout=None, backend=None, group_desc=None, use_local_synchronization=False
    ) -> tuple[int, ...]:
        assert len(set(ranks)) == len(ranks) and all(0 <= r < self.world_size for r in ranks)
        assert use_local_synchronization == (tuple(ranks) == (self.rank,) and group_desc == "alone")
        (self.alone if use_local_synchronization else self.made).append(tuple(ranks))
        return tuple(ranks)


def sizes_of(shape: tuple[int, ...]) -> GridSizes:
    return GridSizes(**dict(zip(AXES, shape, strict=True)))


def whole_world(sizes: GridSizes, monkeypatch) -> list[tuple[Grid, StandIn]]:
    """The grid of every rank."""
    built = []
    for rank in range(sizes.world_size):
        stand_in = StandIn(rank, sizes.world_size)
        monkeypatch.setattr(grid_module, "dist", stand_in)
        built.append((build_grid(sizes), stand_in))
    return built


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_rank_finds_its_place_in_every_group(shape: tuple[int, ...], monkeypatch) -> None:
    sizes = sizes_of(shape)
    world = whole_world(sizes, monkeypatch)
    assert len({tuple(stand_in.made) for _, stand_in in world}) == 1, "ranks make groups in different orders"
    for axis in (*AXES, *DERIVED_AXES):
        along = DERIVED_AXES.get(axis, (axis,))
        members: set[int] = set()
        for rank, (grid, _) in enumerate(world):
            group, at = grid.group(axis), coordinates_of(sizes, rank)
            # Row-major over the axes it is made of: rank within fsdp = dp_shard * CP + cp.
            place = 0
            for a in along:
                place = place * getattr(sizes, a) + at[a]
            assert group[place] == rank and grid.rank(axis) == place
            assert len(group) == grid.size(axis) == sizes.size(axis)
            for other in group:
                there = coordinates_of(sizes, other)
                assert all(there[a] == at[a] for a in AXES if a not in along)
            members |= set(group)
        assert members == set(range(sizes.world_size))


def test_axes_never_share_a_communicator(monkeypatch) -> None:
    """fsdp, loss and cp have the same ranks here; messages along one axis must not queue behind another axis's."""
    (_, stand_in), *_ = whole_world(sizes_of((1, 1, 1, 4, 1)), monkeypatch)
    assert stand_in.made.count((0, 1, 2, 3)) == sum("cp" in DERIVED_AXES.get(a, (a,)) for a in (*AXES, *DERIVED_AXES))


@pytest.mark.parametrize("shape", [*SHAPES, (1, 1, 64, 8, 1)], ids=str)
def test_ranks_alone_on_an_axis_make_no_group_together(shape: tuple[int, ...], monkeypatch) -> None:
    """Every rank helps to make every group of `made`: of 512 ranks, 83 instead of 2,131."""
    sizes = sizes_of(shape)
    stand_in = StandIn(sizes.world_size - 1, sizes.world_size)
    monkeypatch.setattr(grid_module, "dist", stand_in)
    build_grid(sizes)
    assert stand_in.alone == [(stand_in.rank,)] and all(len(ranks) > 1 for ranks in stand_in.made)
    axes = [axis for axis in (*AXES, *DERIVED_AXES) if sizes.size(axis) > 1]
    assert len(stand_in.made) == sum(sizes.world_size // sizes.size(axis) for axis in axes)


def test_sizes_that_are_not_the_world_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(grid_module, "dist", StandIn(0, 8))
    with pytest.raises(ValueError, match="grid of 4 ranks on a world of 8"):
        build_grid(GridSizes(cp=4))
    assert GridSizes().world_size == 1


@pytest.mark.parametrize("inner", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1, 1, 8, 1), (1, 2, 1, 8, 1), (1, 1, 2, 8, 2)], ids=str)
def test_split_groups_cross(shape: tuple[int, ...], inner: int, monkeypatch) -> None:
    """Neighbours that trade heads, and the ring over the rest: every pair of cp ranks is connected by one of each."""
    sizes = sizes_of(shape)
    orders = set()
    for rank, (grid, _) in enumerate(whole_world(sizes, monkeypatch)):
        stand_in = StandIn(rank, sizes.world_size)
        monkeypatch.setattr(grid_module, "dist", stand_in)
        neighbours, across = split_group(grid, "cp", inner)
        orders.add(tuple(stand_in.made))
        cp = grid.group("cp")
        at = cp.index(rank)
        assert neighbours == cp[at // inner * inner : at // inner * inner + inner]
        assert across == cp[at % inner :: inner]
    assert len(orders) == 1


@pytest.mark.parametrize("shape", [(2, 1, 1, 2, 1), (4, 1, 1, 1, 2), (3, 2, 1, 1, 1)], ids=str)
def test_the_embedding_group_has_the_first_and_last_stage(shape: tuple[int, ...], monkeypatch) -> None:
    """The first and last stage share a tied embedding; ranks between create the groups too, and join none."""
    sizes = sizes_of(shape)
    orders = set()
    for rank, (grid, _) in enumerate(whole_world(sizes, monkeypatch)):
        stand_in = StandIn(rank, sizes.world_size)
        monkeypatch.setattr(grid_module, "dist", stand_in)
        pp = grid.group("pp")
        assert embedding_group(grid) == ((pp[0], pp[-1]) if rank in (pp[0], pp[-1]) else None)
        orders.add(tuple(stand_in.made))
    assert len(orders) == 1


@pytest.mark.parametrize(
    "axes",
    [
        ("fsdp",),
        ("dp_replicate", "fsdp"),
        ("dp_replicate", "dp_shard", "cp"),
        ("pp", "loss", "tp"),
        ("dp_replicate", "tp", "fsdp"),
    ],
)
@pytest.mark.parametrize("shape", [(1, 2, 2, 3, 1), (2, 3, 1, 2, 2), (1, 1, 1, 4, 1)], ids=str)
def test_a_mesh_is_the_grids_own_groups(shape: tuple[int, ...], axes: tuple[str, ...], monkeypatch) -> None:
    seen = {}

    def from_group(group, device_type, mesh=None, mesh_dim_names=None):
        seen.update(group=group, mesh=mesh, names=mesh_dim_names)

    sizes = sizes_of(shape)
    world = whole_world(sizes, monkeypatch)
    monkeypatch.setattr(grid_module, "DeviceMesh", SimpleNamespace(from_group=from_group))
    for rank, (grid, _) in enumerate(world):
        device_mesh(grid, axes, "cpu")
        groups = [seen["group"]] if len(axes) == 1 else seen["group"]
        assert groups == [grid.group(axis) for axis in axes] and seen["names"] == axes
        if len(axes) == 1:
            continue
        for place in itertools.product(*(range(grid.size(axis)) for axis in axes)):
            there = coordinates_of(sizes, rank)
            for axis, index in zip(axes, place, strict=True):
                for a in reversed(DERIVED_AXES.get(axis, (axis,))):
                    index, there[a] = divmod(index, getattr(sizes, a))
            entry = seen["mesh"]
            for index in place:
                entry = entry[index]
            assert entry == rank_of(sizes, there)
