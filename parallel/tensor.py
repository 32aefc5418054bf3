"""Tensor and sequence parallelism: entering and leaving the region between two sharded matrices.

A column-parallel matrix holds 1/tp of the outputs, a row-parallel matrix 1/tp of the inputs (Megatron-LM,
arXiv:1909.08053). With sequence parallelism (arXiv:2205.05198) the residual stream outside the region holds 1/tp of the
tokens: entering gathers tokens, leaving reduce-scatters them. Without, every rank holds all tokens: entering is the
identity in the forward pass, leaving is an all-reduce.

Where tp exceeds the key/value heads, neighbours share one. Each computes an equal part of the head's and its queries'
channels and gathers the others' (Megatron-LM does so over all of tp): no weight is held twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import Collective, communicate, reduce_scatter, start_all_gather
from parallel.grid import Grid, neighbour_groups
from utils.errors import UserError


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return start_all_gather(x.contiguous(), group).wait()


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def _identity(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x.view_as(x)


def _gather_columns(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, c] of each rank -> [n, size * c]."""
    return _gather(x, group).unflatten(0, (group.size(), -1)).transpose(0, 1).flatten(1)


def _scatter_columns(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, size * c] partial sums -> this rank's [n, c] of their sum."""
    return reduce_scatter(x.unflatten(1, (group.size(), -1)).transpose(0, 1).flatten(0, 1), group)


_communicate_uncompiled = torch.compiler.disable(communicate)  # a graph ends here, but only where ranks communicate


def _exchange(x: Tensor, group: dist.ProcessGroup | None, forward: Collective, backward: Collective) -> Tensor:
    """`communicate`, or x where there is no other rank."""
    return x if group is None or group.size() == 1 else _communicate_uncompiled(x, group, forward, backward)


@dataclass(frozen=True)
class TensorParallel:
    """The ranks that share each matrix, and whether they also shard the residual stream.

    Args:
        group: of the `tp` axis; None: one rank.
        sequence_parallel: the residual stream holds 1/tp of the tokens.
        kv_group: the ranks that share this rank's key/value head; None: this rank alone has its heads.
    """

    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False
    kv_group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    def divide(self, size: int, what: str) -> int:
        """size / tp.

        Raises:
            UserError: tp does not divide the size.
        """
        if size % self.size:
            raise UserError(f"{what} {size} is not a multiple of the {self.size} tensor-parallel ranks")
        return size // self.size

    def enter_parallel_region(self, x: Tensor) -> Tensor:
        """Input of a column-parallel matrix: [t / tp, h] or [t, h] -> [t, h] of all tokens."""
        return _exchange(x, self.group, *((_gather, reduce_scatter) if self.sequence_parallel else (_identity, _sum)))

    def exit_parallel_region(self, x: Tensor) -> Tensor:
        """Output of a row-parallel matrix: [t, h] partial sums -> the residual stream, [t / tp, h] or [t, h]."""
        return _exchange(x, self.group, *((reduce_scatter, _gather) if self.sequence_parallel else (_sum, _identity)))

    def gather_columns(self, x: Tensor) -> Tensor:
        """[n, c / tp] of each rank -> [n, c]. No gradient."""
        return x if self.group is None else _gather_columns(x, self.group)

    def gather_heads(self, x: Tensor) -> Tensor:
        """Output of the QKV matrix, [t, c] of each rank of `kv_group` -> [t, size * c]. Gradients are summed."""
        return _exchange(x, self.kv_group, _gather_columns, _scatter_columns)


def build_tensor_parallel(
    grid: Grid, query_groups: int, sequence_parallel: bool, timeout: timedelta | None = None
) -> TensorParallel:
    """The grid's tp ranks, and those that share a key/value head. Collective: every rank of the world calls it."""
    sharing = grid.size("tp") // query_groups
    kv_group = neighbour_groups(grid, "tp", [sharing], timeout=timeout).get(sharing)
    return TensorParallel(grid.group("tp"), sequence_parallel, kv_group)


@torch.no_grad()
def sum_gradients_(gradients: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Sum each gradient over the group in one all-reduce. Collective: the same shapes on every rank."""
    gradients = list(gradients)
    if group.size() == 1 or not gradients:
        return
    message = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(message, group=group)
    for gradient, summed in zip(gradients, message.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
