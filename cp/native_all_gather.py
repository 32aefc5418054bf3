"""Attention with K and V gathered over the group (`--cp-backend native --cp-comm-type all_gather`).

Llama 3's scheme (arXiv:2407.21783, section 3.3.2), some heads at a time: while attention runs over the K and V of
`heads_k_stride` heads, the next heads are gathered. The backward pass gathers again instead of keeping the whole row,
and reduce-scatters dK and dV.

Takes the layouts `zigzag` (balanced) and `contiguous` (documents of any length). In both, a rank holds pieces of
consecutive tokens of a document. Each piece attends to itself (causal, square) and to all earlier tokens of its
document (no mask).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from cp.blocks import Block, accumulator_dtype, add_tokens_, build_block, spread_tokens
from cp.dropout_attention import AttentionOptions
from cp.kernels import block_backward, block_forward
from cp.layout import invert, ranges, shard_indices, unshard_indices
from cp.native_p2p import merge_tokens_
from cp.packed_seq import PackedSeq, to_device
from parallel.collectives import Transfer, reduce_scatter, start_all_gather


@dataclass(frozen=True, eq=False)
class RowBlocks:
    """Queries in this rank's tokens, keys in the whole row in order.

    Attributes:
        own: each piece x itself.
        before: each piece x the tokens of its document before it.
        to_row: [T] indices of the gathered tokens (rank by rank) that give row order; None: the same order.
        from_row: the inverse.
    """

    own: Block | None
    before: Block | None
    to_row: Tensor | None
    from_row: Tensor | None


def build_row_blocks(
    packed_seq: PackedSeq, *, cp_size: int, cp_rank: int, device: torch.device, with_dropout: bool = False
) -> RowBlocks:
    """Build this rank's blocks over the gathered row; `with_dropout`: they carry `dropout_ids`."""
    layout, padded = packed_seq.layout, packed_seq.padded_lengths
    owned = shard_indices(padded, cp_size=cp_size, cp_rank=cp_rank, layout=layout)
    ends = np.cumsum(padded)
    document = np.searchsorted(ends, owned, side="right")
    # A piece begins where the row's order or the document changes.
    breaks = np.flatnonzero((np.diff(owned) != 1) | (np.diff(document) != 0)) + 1
    q_start = np.concatenate(([0], breaks)) if len(owned) else np.zeros(0, np.int64)
    stored = np.diff(np.append(q_start, len(owned)))
    piece_document, k_start = document[q_start], owned[q_start]
    document_start = ends[piece_document] - padded[piece_document]
    offset = k_start - document_start  # of the piece within its document
    real = np.clip(packed_seq.lengths[piece_document] - offset, 0, stored)
    before = np.where(real > 0, offset, 0)
    to_row = from_row = None
    if layout != "contiguous" and cp_size > 1:
        order = unshard_indices(padded, cp_size=cp_size, layout=layout)
        to_row, from_row = to_device(order, device), to_device(invert(order), device)
    dropout_ids = None
    if with_dropout:
        query_ids, _ = packed_seq.token_ids_and_positions(cp_size=cp_size, cp_rank=cp_rank)
        dropout_ids = query_ids, ranges(np.zeros_like(padded), padded)
    return RowBlocks(
        own=build_block((q_start, real, k_start, real), causal=True, device=device, dropout_ids=dropout_ids),
        before=build_block(
            (q_start, real, document_start, before), causal=False, device=device, dropout_ids=dropout_ids
        ),
        to_row=to_row,
        from_row=from_row,
    )


def _gather_rounds(
    q: Tensor, k: Tensor, v: Tensor, blocks: RowBlocks, group: dist.ProcessGroup, options: AttentionOptions
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Key/value heads, their query heads, and K and V of the whole row in order, [T, stride, d] each, of each round.

    The next round's heads are in flight while the caller computes.
    """
    stride, queries = options.heads_k_stride, q.shape[1] // k.shape[1]

    def start(first: int) -> Transfer:
        heads = slice(first, first + stride)
        return start_all_gather(torch.stack((k[:, heads], v[:, heads]), 1), group)  # [t, 2, stride, d]

    gather = start(0)
    for first in range(0, k.shape[1], stride):
        kv = gather.wait(options.clock)  # [T, 2, stride, d], rank by rank
        if blocks.to_row is not None:
            kv = kv.index_select(0, blocks.to_row)
        stop = first + stride
        if stop < k.shape[1]:
            gather = start(stop)
        yield slice(first, stop), slice(first * queries, stop * queries), kv[:, 0], kv[:, 1]


class _AllGatherAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, q: Tensor, k: Tensor, v: Tensor, blocks: RowBlocks, group: dist.ProcessGroup, options: AttentionOptions
    ) -> Tensor:
        accumulate = accumulator_dtype(q.dtype)
        result = torch.zeros_like(q, memory_format=torch.contiguous_format)
        lse = q.new_zeros(q.shape[:2], dtype=accumulate)
        for _, q_heads, row_k, row_v in _gather_rounds(q, k, v, blocks, group, options):
            if blocks.own is None:
                continue
            part, part_options = q[:, q_heads], options.for_heads(q_heads.start)
            out, part_lse = block_forward(part, row_k, row_v, blocks.own, part_options)
            out = spread_tokens(out.to(accumulate), blocks.own.q_tokens, len(q))
            part_lse = spread_tokens(part_lse.to(accumulate), blocks.own.q_tokens, len(q))
            if blocks.before is not None:
                before = block_forward(part, row_k, row_v, blocks.before, part_options)
                merge_tokens_(out, part_lse, blocks.before, *before)
            result[:, q_heads], lse[:, q_heads] = out.to(q.dtype), part_lse
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.blocks, ctx.group, ctx.options = blocks, group, options
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        blocks, group, accumulate = ctx.blocks, ctx.group, accumulator_dtype(q.dtype)
        dout = dout.contiguous()
        dq = torch.zeros(q.shape, dtype=accumulate, device=q.device)
        dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
        for kv_heads, q_heads, row_k, row_v in _gather_rounds(q, k, v, blocks, group, ctx.options):
            dkv = torch.zeros((len(row_k), 2, *row_k.shape[1:]), dtype=accumulate, device=q.device)
            part_dout, part_q, part_out, part_lse = (x[:, q_heads] for x in (dout, q, out, lse))
            options = ctx.options.for_heads(q_heads.start)
            for block in (blocks.own, blocks.before):
                if block is None:
                    continue
                block_dq, block_dk, block_dv = block_backward(
                    part_dout, part_q, row_k, row_v, part_out, part_lse, block, options
                )
                add_tokens_(dq[:, q_heads], block.q_tokens, block_dq)
                add_tokens_(dkv[:, 0], block.k_tokens, block_dk)
                add_tokens_(dkv[:, 1], block.k_tokens, block_dv)
            if blocks.from_row is not None:
                dkv = dkv.index_select(0, blocks.from_row)
            mine = reduce_scatter(dkv, group)  # [t, 2, stride, d]
            dk[:, kv_heads], dv[:, kv_heads] = mine[:, 0].to(k.dtype), mine[:, 1].to(v.dtype)
        return dq.to(q.dtype), dk, dv, None, None, None


def all_gather_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: RowBlocks, group: dist.ProcessGroup, options: AttentionOptions
) -> Tensor:
    """Causal attention within each document of a row sharded over `group` (zigzag or contiguous).

    Args:
        q: [t, hq, d]; k, v: [t, hkv, d]; t = T / cp_size.
        blocks: of `build_row_blocks`.

    Returns:
        [t, hq, d]; 0 in padding.
    """
    return _AllGatherAttention.apply(q, k, v, blocks, group, options)
