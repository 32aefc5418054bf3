"""The whole sequence from its context-parallel shards, in original order, with exact gradients."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from cp.layout import unshard_indices
from cp.packed_seq import PackedSeq
from parallel.collectives import reduce_scatter, start_all_gather
from utils.errors import UserError

LOSSES = ("replicated", "sharded")


class _GatherOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor, group: dist.ProcessGroup, loss: str) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(inverse)
        ctx.group, ctx.loss, ctx.rows = group, loss, len(x)
        return start_all_gather(x.contiguous(), group).wait().index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        by_rank = grad.index_select(0, inverse)  # [T, ...], rank by rank
        if ctx.loss == "sharded":
            mine = reduce_scatter(by_rank, ctx.group)
        else:
            mine = by_rank[ctx.group.rank() * ctx.rows : (ctx.group.rank() + 1) * ctx.rows]
        return mine, None, None, None, None


def gather_outputs(x: Tensor, packed_seq: PackedSeq, group: dist.ProcessGroup, *, loss: str) -> Tensor:
    """[t, ...] of each rank -> [T, ...] of the row in its original order, on every rank.

    The gradient depends on what is done with the result, so it must be said:

    - `replicated`: every rank computes the same loss of the whole row, and that loss counts once. Each rank's
      gradient is its own rows of it.
    - `sharded`: each rank computes a part of the loss, and the loss is the sum of the parts over the ranks. Each
      rank's gradient is the sum of all ranks' gradients of its rows.

    Raises:
        ValueError: another word for `loss`.
    """
    if loss not in LOSSES:
        raise UserError(f"loss {loss!r}: choose {' or '.join(LOSSES)}")
    order = unshard_indices(packed_seq.padded_lengths, cp_size=group.size(), layout=packed_seq.layout)
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return _GatherOutputs.apply(
        x, torch.from_numpy(order).to(x.device), torch.from_numpy(inverse).to(x.device), group, loss
    )
