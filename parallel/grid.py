"""The process grid: five axes and the process groups along them.

The rank arithmetic is plain Python, tested without torch.distributed; `build_grid` makes one `ProcessGroup` an axis
with `torch.distributed.new_group`. Axis order is Megatron-LM's default (`tp` has stride 1), with the data-parallel axis
split into dp_replicate x dp_shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from utils.errors import UserError

# Outer to inner. The innermost axis has stride 1.
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")

# Products of axes.
DERIVED_AXES: dict[str, tuple[str, ...]] = {
    "fsdp": ("dp_shard", "cp"),  # parameters are sharded
    "batch": ("dp_replicate", "dp_shard"),  # each coordinate reads its own samples
    "loss": ("dp_replicate", "dp_shard", "cp"),  # tokens are counted, gradients summed
    "stage": ("dp_replicate", "dp_shard", "cp", "tp"),  # ranks with the same layers
    "model": ("pp", "tp"),  # the shards of one replica, which the gradient norm sums
}


@dataclass(frozen=True, kw_only=True)
class GridSizes:
    """Ranks along each axis, at least 1."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise UserError(f"{axis} size {getattr(self, axis)} is below 1")

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes in the order of `AXES`."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def world_size(self) -> int:
        return math.prod(self.shape)

    def size(self, axis: str) -> int:
        """Number of ranks along an axis or a derived axis."""
        return math.prod(getattr(self, a) for a in DERIVED_AXES.get(axis, (axis,)))


def coordinates_of(sizes: GridSizes, rank: int) -> dict[str, int]:
    """Coordinate of `rank` on each of the five axes."""
    coordinates = {}
    for axis in reversed(AXES):
        rank, coordinates[axis] = divmod(rank, getattr(sizes, axis))
    assert rank == 0, "rank outside the grid"
    return coordinates


def rank_of(sizes: GridSizes, coordinates: Mapping[str, int], axes: Sequence[str] = AXES) -> int:
    """Row-major index over the axes; over all five: tp + TP*(cp + CP*(dp_shard + DS*(dp_replicate + DR*pp)))."""
    rank = 0
    for axis in axes:
        rank = rank * getattr(sizes, axis) + coordinates[axis]
    return rank


def ranks_along(sizes: GridSizes, *axes: str) -> list[list[int]]:
    """Every group of ranks that differ only along an axis, a derived axis or several of them.

    Groups come in ascending order of their first rank, members in ascending rank order, which for a
    derived axis is row-major over its axes: rank within `fsdp` = dp_shard * CP + cp.
    """
    along = {a for axis in axes for a in DERIVED_AXES.get(axis, (axis,))}
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(sizes.world_size):
        at = coordinates_of(sizes, rank)
        groups.setdefault(tuple(at[a] for a in AXES if a not in along), []).append(rank)
    return sorted(groups.values())


@dataclass(frozen=True, eq=False)
class Grid:
    """This process's coordinates on the grid, and its group along every axis and derived axis."""

    sizes: GridSizes
    global_rank: int
    groups: Mapping[str, dist.ProcessGroup]

    def group(self, axis: str) -> dist.ProcessGroup:
        return self.groups[axis]

    def size(self, axis: str) -> int:
        return self.sizes.size(axis)

    def rank(self, axis: str) -> int:
        """This process's index within its group along `axis`."""
        axes = DERIVED_AXES.get(axis, (axis,))
        return rank_of(self.sizes, coordinates_of(self.sizes, self.global_rank), axes)

    def describe(self) -> str:
        """Like `pp 1 x dp_replicate 1 x dp_shard 1 x cp 4 x tp 1`, for logs."""
        return " x ".join(f"{a} {getattr(self.sizes, a)}" for a in AXES)


def _join(groups: Iterable[Sequence[int]], **options: Any) -> dist.ProcessGroup | None:
    """Make every group of ranks, in order; this rank's, or None where it is in none. Collective."""
    own = None
    for ranks in groups:
        group = dist.new_group(list(ranks), **options)
        own = group if dist.get_rank() in ranks else own
    return own


def build_grid(sizes: GridSizes, *, timeout: timedelta | None = None, backend: str | None = None) -> Grid:
    """Make the groups of every axis. Collective: every rank calls it, in the same order.

    Each axis has communicators of its own even where two axes hold the same ranks, so that traffic
    along one (the CP ring) never queues behind traffic along another (FSDP's gathers).

    Args:
        timeout: of each group's collectives; None: PyTorch's default.
        backend: of each group; None: that of the world, which on CUDA would make a gloo mesh beside each NCCL one.

    Raises:
        ValueError: the sizes do not multiply to the world size.
    """
    if sizes.world_size != dist.get_world_size():
        raise UserError(f"grid of {sizes.world_size} ranks on a world of {dist.get_world_size()}")
    options: dict[str, Any] = dict(timeout=timeout, backend=backend)
    # Axes of size 1 share one group, which no other rank helps to make: with a group for each such axis of each rank,
    # 512 ranks would make thousands, each with all others' help.
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True, group_desc="alone", **options)
    groups: dict[str, Any] = {}
    for axis in (*AXES, *DERIVED_AXES):
        lines = ranks_along(sizes, axis)
        groups[axis] = alone if len(lines[0]) == 1 else _join(lines, group_desc=axis, **options)
    return Grid(sizes=sizes, global_rank=dist.get_rank(), groups=groups)


def device_mesh(grid: Grid, axes: Sequence[str], device_type: str) -> DeviceMesh:
    """The `DeviceMesh` over some axes, built from the grid's own groups, for libraries that ask for one.

    Args:
        axes: disjoint axes or derived axes, outer to inner, such as `("dp_replicate", "fsdp")`.
    """
    if len(axes) == 1:
        return DeviceMesh.from_group(grid.group(axes[0]), device_type, mesh_dim_names=(axes[0],))
    along = [a for axis in axes for a in DERIVED_AXES.get(axis, (axis,))]
    ranks = next(ranks for ranks in ranks_along(grid.sizes, *axes) if grid.global_rank in ranks)
    rows: list = sorted(ranks, key=lambda rank: [coordinates_of(grid.sizes, rank)[a] for a in along])
    for axis in reversed(axes[1:]):
        rows = [rows[i : i + grid.size(axis)] for i in range(0, len(rows), grid.size(axis))]
    groups = [grid.group(axis) for axis in axes]
    return DeviceMesh.from_group(groups, device_type, mesh=rows, mesh_dim_names=tuple(axes))


def embedding_group(grid: Grid, *, timeout: timedelta | None = None) -> dist.ProcessGroup | None:
    """The first and last rank along `pp`, which hold the tied embedding; None on the ranks between them.

    Collective: every rank of the world calls it. `timeout` as in `build_grid`; the backend is the axis's own.
    """
    assert grid.size("pp") > 1
    ends = [(ranks[0], ranks[-1]) for ranks in ranks_along(grid.sizes, "pp")]
    return _join(ends, timeout=timeout, backend=dist.get_backend(grid.group("pp")), group_desc="embedding")


def neighbour_groups(
    grid: Grid, axis: str, sizes: Iterable[int], *, timeout: timedelta | None = None
) -> dict[int, dist.ProcessGroup]:
    """This rank's group of `size` consecutive ranks along an axis, for each size above 1; the whole axis has its own.

    Collective: every rank of the world calls it, because PyTorch names a group that only its members make by the number
    of groups that each of them has. `timeout` as `build_grid`; the backend is that of the axis.
    """
    lines, size_of_axis = ranks_along(grid.sizes, axis), grid.size(axis)
    options: dict[str, Any] = dict(timeout=timeout, backend=dist.get_backend(grid.group(axis)))
    found = {}
    for size in sizes:
        if size == size_of_axis:
            found[size] = grid.group(axis)
        elif size > 1:
            neighbours = [ranks[i : i + size] for ranks in lines for i in range(0, size_of_axis, size)]
            group = _join(neighbours, group_desc=f"{axis} {size}", **options)
            assert group is not None
            found[size] = group
    return found


def split_group(
    grid: Grid, axis: str, inner_size: int, *, timeout: timedelta | None = None
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Cut every group along `axis` in two levels: neighbours of `inner_size` consecutive ranks, and across them.

    Collective: every rank of the world calls it. `timeout` as `build_grid`; the backend is that of the axis.

    Returns:
        This rank's inner group (`inner_size` ranks) and outer group (size / inner_size ranks).
    """
    assert grid.size(axis) % inner_size == 0
    whole, size = ranks_along(grid.sizes, axis), grid.size(axis)
    neighbours = [ranks[i : i + inner_size] for ranks in whole for i in range(0, size, inner_size)]
    across = [ranks[i::inner_size] for ranks in whole for i in range(inner_size)]
    options: dict[str, Any] = dict(timeout=timeout, backend=dist.get_backend(grid.group(axis)))
    inner = _join(neighbours, group_desc=f"{axis} inner", **options)
    outer = _join(across, group_desc=f"{axis} outer", **options)
    assert inner is not None and outer is not None
    return inner, outer
