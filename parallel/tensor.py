"""Tensor and sequence parallelism: how the residual stream enters and leaves a pair of cut matrices.

A column-parallel matrix holds 1/tp of the outputs, a row-parallel one 1/tp of the inputs (Megatron-LM,
arXiv:1909.08053). With sequence parallelism (arXiv:2205.05198) the residual stream between them holds 1/tp
of the tokens: entering gathers them, leaving sums and cuts them; without it every rank holds all tokens,
entering costs nothing forward and leaving sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import reduce_scatter, start_all_gather
from utils.errors import UserError


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return start_all_gather(x.contiguous(), group).wait()


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


class _GatherRows(torch.autograd.Function):
    """[t / tp, ...] -> [t, ...]; backward: the sum over the ranks of the gradient of this rank's rows."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return reduce_scatter(grad.contiguous(), ctx.group), None


class _SumScatterRows(torch.autograd.Function):
    """[t, ...] partial sums -> [t / tp, ...] of their sum; backward: gather."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return reduce_scatter(x.contiguous(), group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return _gather(grad, ctx.group), None


class _Copy(torch.autograd.Function):
    """The same x on every rank, each of which uses it in part; backward: the sum of the parts' gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return _sum(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    """Partial sums -> their sum on every rank; backward: every part gets the sum's gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        return _sum(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad, None


@dataclass(frozen=True)
class TensorParallel:
    """The ranks that share each matrix, and whether they share the tokens between the matrices too.

    Args:
        group: of the `tp` axis; None: this rank alone.
        sequence_parallel: the residual stream holds 1/tp of the tokens.
    """

    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    def divide(self, size: int, what: str) -> int:
        """1/tp of a size that must divide."""
        if size % self.size:
            raise UserError(f"{what} {size} does not divide by the {self.size} tensor-parallel ranks")
        return size // self.size

    @torch.compiler.disable
    def enter_parallel_region(self, x: Tensor) -> Tensor:
        """The residual stream (or its norm) in front of a column-parallel matrix: [t, h] of all tokens."""
        if self.group is None or self.size == 1:
            return x
        return (_GatherRows if self.sequence_parallel else _Copy).apply(x, self.group)

    @torch.compiler.disable
    def exit_parallel_region(self, x: Tensor) -> Tensor:
        """What a row-parallel matrix made, [t, h] partial sums, on its way to the residual stream."""
        if self.group is None or self.size == 1:
            return x
        return (_SumScatterRows if self.sequence_parallel else _Sum).apply(x, self.group)

    def gather_columns(self, x: Tensor) -> Tensor:
        """[n, c / tp] of each rank -> [n, c]. No gradient."""
        if self.group is None or self.size == 1:
            return x
        return _gather(x, self.group).unflatten(0, (self.size, -1)).transpose(0, 1).flatten(1)


@torch.no_grad()
def sum_gradients_(gradients: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Sum each gradient over the group, in one message. Collective: the same shapes on every rank."""
    gradients = list(gradients)
    if group.size() == 1 or not gradients:
        return
    message = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(message, group=group)
    for gradient, summed in zip(gradients, message.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
