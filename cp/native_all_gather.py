"""Attention with K and V gathered over the group (`--cp-backend native --cp-comm-type all_gather`).

Llama 3's scheme (arXiv:2407.21783, section 3.3.2), some heads at a time: while attention runs over the
K and V of `heads_k_stride` heads, the next ones are being gathered. The backward pass gathers again
instead of keeping the whole row, and reduce-scatters dK and dV.

Takes the layouts `zigzag` (balanced) and `contiguous` (documents of any length). Either way a rank holds
runs of consecutive tokens of a document; each attends to itself (causal, square) and to everything of
its document before it (no mask).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from cp.dropout_attention import AttentionDropout
from cp.kernels import (
    Block,
    accumulator_dtype,
    add_rows_,
    block_backward,
    block_forward,
    build_block,
    spread_rows,
)
from cp.layout import ranges, shard_indices, unshard_indices
from cp.native_p2p import merge_rows_
from cp.packed_seq import PackedSeq, to_device
from parallel.collectives import Gather, WaitClock, reduce_scatter, start_all_gather


@dataclass(frozen=True, eq=False)
class _Plan:
    """`own`: runs x themselves; `before`: runs x what precedes them. Queries in local rows, keys in row order.

    to_row: [T] gathered rows (rank by rank) -> row order; from_row: its inverse; None: the same order.
    """

    own: Block | None
    before: Block | None
    to_row: Tensor | None
    from_row: Tensor | None


def build_row_blocks(
    packed_seq: PackedSeq, *, cp_size: int, cp_rank: int, device: torch.device, with_dropout: bool = False
) -> _Plan:
    """`with_dropout` for dropout."""
    layout, padded = packed_seq.layout, packed_seq.padded_lengths
    owned = shard_indices(padded, cp_size=cp_size, cp_rank=cp_rank, layout=layout)
    ends = np.cumsum(padded)
    document = np.searchsorted(ends, owned, side="right")
    # A run begins where the row's order or the document changes.
    breaks = np.flatnonzero((np.diff(owned) != 1) | (np.diff(document) != 0)) + 1
    q_start = np.concatenate(([0], breaks)) if len(owned) else np.zeros(0, np.int64)
    stored = np.diff(np.append(q_start, len(owned)))
    run_document, k_start = document[q_start], owned[q_start]
    document_start = ends[run_document] - padded[run_document]
    offset = k_start - document_start  # of the run within its document
    real = np.clip(packed_seq.lengths[run_document] - offset, 0, stored)
    before = np.where(real > 0, offset, 0)
    to_row = from_row = None
    if layout != "contiguous" and cp_size > 1:
        order = unshard_indices(padded, cp_size=cp_size, layout=layout)
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        to_row, from_row = to_device(order, device), to_device(inverse, device)
    places = None
    if with_dropout:
        places = (
            packed_seq.token_ids_and_positions(cp_size=cp_size, cp_rank=cp_rank)[0],
            ranges(np.zeros_like(padded), padded),
        )
    return _Plan(
        own=build_block(q_start, real, k_start, real, causal=True, device=device, places=places),
        before=build_block(q_start, real, document_start, before, causal=False, device=device, places=places),
        to_row=to_row,
        from_row=from_row,
    )


def _start_gather(k: Tensor, v: Tensor, heads: slice, group: dist.ProcessGroup) -> Gather:
    return start_all_gather(torch.stack((k[:, heads], v[:, heads]), 1), group)  # [t, 2, stride, d]


def _whole_row(gather: Gather, plan: _Plan, clock: WaitClock | None) -> tuple[Tensor, Tensor]:
    """K and V of the whole row in order, [T, stride, d] each, once they are here."""
    kv = gather.wait(clock)  # [T, 2, stride, d], rank by rank
    if plan.to_row is not None:
        kv = kv.index_select(0, plan.to_row)
    return kv[:, 0], kv[:, 1]


def _head_slices(kv_heads: int, stride: int, queries_per_group: int) -> list[tuple[slice, slice]]:
    """(key/value heads, their query heads) of each round."""
    return [
        (slice(h, h + stride), slice(h * queries_per_group, (h + stride) * queries_per_group))
        for h in range(0, kv_heads, stride)
    ]


def _of_heads(dropout: AttentionDropout | None, q_heads: slice) -> AttentionDropout | None:
    return None if dropout is None else replace(dropout, first_head=dropout.first_head + q_heads.start)


class _AllGatherAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: _Plan,
        group: dist.ProcessGroup,
        scale: float,
        stride: int,
        clock: WaitClock | None,
        dropout: AttentionDropout | None,
    ) -> Tensor:
        accumulate = accumulator_dtype(q.dtype)
        result = torch.zeros_like(q, memory_format=torch.contiguous_format)
        lse = q.new_zeros(q.shape[:2], dtype=accumulate)
        rounds = _head_slices(k.shape[1], stride, q.shape[1] // k.shape[1])
        gather = _start_gather(k, v, rounds[0][0], group)
        for number, (_, q_heads) in enumerate(rounds):
            row_k, row_v = _whole_row(gather, plan, clock)
            if number + 1 < len(rounds):
                gather = _start_gather(k, v, rounds[number + 1][0], group)
            if plan.own is None:
                continue
            part = q[:, q_heads]
            dropped = _of_heads(dropout, q_heads)
            out, part_lse = block_forward(part, row_k, row_v, plan.own, scale, dropped)
            out = spread_rows(out.to(accumulate), plan.own.q_rows, len(q))
            part_lse = spread_rows(part_lse.to(accumulate), plan.own.q_rows, len(q))
            if plan.before is not None:
                merge_rows_(out, part_lse, plan.before, *block_forward(part, row_k, row_v, plan.before, scale, dropped))
            result[:, q_heads], lse[:, q_heads] = out.to(q.dtype), part_lse
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.plan, ctx.group, ctx.scale, ctx.rounds, ctx.clock, ctx.dropout = plan, group, scale, rounds, clock, dropout
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        plan, group, accumulate = ctx.plan, ctx.group, accumulator_dtype(q.dtype)
        dout = dout.contiguous()
        dq = torch.zeros(q.shape, dtype=accumulate, device=q.device)
        dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
        gather = _start_gather(k, v, ctx.rounds[0][0], group)
        for number, (kv_heads, q_heads) in enumerate(ctx.rounds):
            row_k, row_v = _whole_row(gather, plan, ctx.clock)
            if number + 1 < len(ctx.rounds):
                gather = _start_gather(k, v, ctx.rounds[number + 1][0], group)
            dkv = torch.zeros((len(row_k), 2, *row_k.shape[1:]), dtype=accumulate, device=q.device)
            part_dout, part_q, part_out, part_lse = (x[:, q_heads] for x in (dout, q, out, lse))
            for block in (plan.own, plan.before):
                if block is None:
                    continue
                block_dq, block_dk, block_dv = block_backward(
                    part_dout,
                    part_q,
                    row_k,
                    row_v,
                    part_out,
                    part_lse,
                    block,
                    ctx.scale,
                    _of_heads(ctx.dropout, q_heads),
                )
                add_rows_(dq[:, q_heads], block.q_rows, block_dq)
                add_rows_(dkv[:, 0], block.k_rows, block_dk)
                add_rows_(dkv[:, 1], block.k_rows, block_dv)
            if plan.from_row is not None:
                dkv = dkv.index_select(0, plan.from_row)
            mine = reduce_scatter(dkv, group)  # [t, 2, stride, d]
            dk[:, kv_heads], dv[:, kv_heads] = mine[:, 0].to(k.dtype), mine[:, 1].to(v.dtype)
        return dq.to(q.dtype), dk, dv, None, None, None, None, None, None


def all_gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed_seq: PackedSeq,
    group: dist.ProcessGroup,
    *,
    scale: float,
    heads_k_stride: int,
    clock: WaitClock | None = None,
    dropout: AttentionDropout | None = None,
) -> Tensor:
    """Causal attention within each document of a row cut over `group` (zigzag or contiguous).

    Args:
        q: [t, hq, d]; k, v: [t, hkv, d]; t = T / cp_size.
        heads_k_stride: key/value heads gathered at a time; divides hkv.
        dropout: of the probabilities; CPU only.

    Returns:
        [t, hq, d]; 0 in padding.
    """
    key = ("native_all_gather", q.device, dropout is not None)
    if key not in packed_seq.cache:
        packed_seq.cache[key] = build_row_blocks(
            packed_seq, cp_size=group.size(), cp_rank=group.rank(), device=q.device, with_dropout=dropout is not None
        )
    return _AllGatherAttention.apply(q, k, v, packed_seq.cache[key], group, scale, heads_k_stride, clock, dropout)
