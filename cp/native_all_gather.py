"""Attention with gathered K and V (`--cp-backend native --cp-comm-type all_gather`).

A rank receives the keys and values that its queries need (`cp/needed_keys.py`): of each of its documents the tokens
before its own, and nothing of other documents. In `contiguous` that is little where documents are short; in `zigzag`
it is three quarters of Llama 3's gather of the whole row (arXiv:2407.21783, section 3.3.2). Heads travel
`heads_k_stride` at a time: while attention runs over the K and V of some heads, the next ones are under way. The
backward pass gathers again instead of keeping K and V, and sends dK and dV back the same way.

Takes the layouts `zigzag` (balanced), `contiguous` (documents of any length) and `hybrid`. In each, a rank holds
pieces of consecutive tokens of a document. Each piece attends to itself (causal, square; no transfer) and to all
earlier tokens of its document (no mask).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from cp.blocks import (
    Block,
    Tokens,
    accumulator_dtype,
    add_tokens_,
    build_block,
    spread_tokens,
    take_tokens,
)
from cp.dropout_attention import AttentionOptions
from cp.kernels import block_backward, block_forward
from cp.layout import invert, ranges
from cp.native_p2p import merge_tokens_
from cp.needed_keys import Exchange, NeededKeys
from cp.packed_seq import PackedSeq, to_device
from parallel.collectives import Transfer, start_all_to_all


@dataclass(frozen=True, eq=False)
class Gather:
    """An `Exchange` on the device.

    Attributes:
        send: this rank's tokens that are sent, by receiver.
        sent, received: tokens to and from each rank.
        to_row: indices of the received tokens that give the row's order; None: the same order.
        from_row: the inverse.
    """

    send: Tokens
    sent: list[int]
    received: list[int]
    to_row: Tensor | None
    from_row: Tensor | None


@dataclass(frozen=True, eq=False)
class RowBlocks:
    """Queries in this rank's tokens.

    Attributes:
        own: each piece x itself, keys in this rank's tokens.
        before: each piece x the tokens of its document before it, keys in the gathered tokens in the row's order.
        gather: None if no rank needs anything of another.
    """

    own: Block | None
    before: Block | None
    gather: Gather | None


def build_row_blocks(
    packed_seq: PackedSeq, *, cp_size: int, cp_rank: int, device: torch.device, with_dropout: bool = False
) -> RowBlocks:
    """Build this rank's blocks and its part of the exchange; `with_dropout`: the blocks carry `dropout_ids`."""
    row = dict(layout=packed_seq.layout, placement=packed_seq.placement)
    keys = NeededKeys(packed_seq.lengths, packed_seq.padded_lengths, cp_size=cp_size, **row)  # type: ignore[arg-type]
    pieces, needed = keys.pieces[cp_rank], keys.needed[cp_rank]
    own_ids = before_ids = None
    if with_dropout:
        own_ids = packed_seq.token_ids_and_positions(cp_size=cp_size, cp_rank=cp_rank)
        before_ids = own_ids[0], ranges(np.zeros_like(needed), needed)
    first_key = (np.cumsum(needed) - needed)[pieces.document]
    own = (pieces.start, pieces.length, pieces.start, pieces.length)
    before = (pieces.start, pieces.length, first_key, pieces.before)
    exchange = keys.build_exchange(cp_rank)
    return RowBlocks(
        own=build_block(own, causal=True, device=device, dropout_ids=own_ids),
        before=build_block(before, causal=False, device=device, dropout_ids=before_ids),
        gather=None if exchange is None else _build_gather(exchange, device),
    )


def _build_gather(exchange: Exchange, device: torch.device) -> Gather:
    order, send = exchange.order, exchange.send
    is_same, is_slice = (order == np.arange(len(order))).all(), len(send) > 0 and (np.diff(send) == 1).all()
    return Gather(
        send=slice(int(send[0]), int(send[-1]) + 1) if is_slice else to_device(send, device),
        sent=exchange.sent.tolist(),
        received=exchange.received.tolist(),
        to_row=None if is_same else to_device(order, device),
        from_row=None if is_same else to_device(invert(order), device),
    )


def _start_rounds(
    q: Tensor, k: Tensor, v: Tensor, gather: Gather | None, group: dist.ProcessGroup, options: AttentionOptions
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Start the first round. Each round gives key/value heads, their query heads, and gathered K and V in row order.

    K and V are [gathered, stride, d]. The next round's heads are in flight while the caller computes.
    """
    if gather is None:
        return iter(())
    stride, queries, kv_heads = options.heads_k_stride, q.shape[1] // k.shape[1], k.shape[1]

    def start(first: int) -> Transfer:
        heads = slice(first, first + stride)
        kv = torch.stack([take_tokens(x[:, heads], gather.send) for x in (k, v)], 1)  # [sent, 2, stride, d]
        return start_all_to_all(kv, gather.sent, gather.received, group)

    def finish_rounds(transfer: Transfer) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        for first in range(0, kv_heads, stride):
            kv, stop = transfer.wait(options.clock), first + stride
            if stop < kv_heads:
                transfer = start(stop)
            if gather.to_row is not None:
                kv = kv.index_select(0, gather.to_row)
            yield slice(first, stop), slice(first * queries, stop * queries), kv[:, 0], kv[:, 1]

    return finish_rounds(start(0))


class _AllGatherAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, q: Tensor, k: Tensor, v: Tensor, blocks: RowBlocks, group: dist.ProcessGroup, options: AttentionOptions
    ) -> Tensor:
        accumulate = accumulator_dtype(q.dtype)
        rounds = _start_rounds(q, k, v, blocks.gather, group, options)
        if blocks.own is None:  # no real token on this rank
            out, lse = q.new_zeros(q.shape, dtype=accumulate), q.new_zeros(q.shape[:2], dtype=accumulate)
        else:
            own = block_forward(q, k, v, blocks.own, options)
            out, lse = (spread_tokens(x.to(accumulate), blocks.own.q_tokens, len(q)) for x in own)
        for _, heads, row_k, row_v in rounds:
            if blocks.before is not None:
                before = block_forward(q[:, heads], row_k, row_v, blocks.before, options.for_heads(heads.start))
                merge_tokens_(out[:, heads], lse[:, heads], blocks.before, *before)
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.blocks, ctx.group, ctx.options = blocks, group, options
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        blocks, group, options, accumulate = ctx.blocks, ctx.group, ctx.options, accumulator_dtype(q.dtype)
        dout = dout.contiguous()
        rounds = _start_rounds(q, k, v, blocks.gather, group, options)
        dq, dk, dv = (torch.zeros(x.shape, dtype=accumulate, device=x.device) for x in (q, k, v))
        if blocks.own is not None:
            grads = block_backward(dout, q, k, v, out, lse, blocks.own, options)
            for total, grad in zip((dq, dk, dv), grads, strict=True):
                add_tokens_(total, blocks.own.q_tokens, grad)
        returning = None
        for kv_heads, heads, row_k, row_v in rounds:
            dkv = torch.zeros((len(row_k), 2, *row_k.shape[1:]), dtype=accumulate, device=q.device)
            if blocks.before is not None:
                rows = (dout[:, heads], q[:, heads], row_k, row_v, out[:, heads], lse[:, heads])
                grads = block_backward(*rows, blocks.before, options.for_heads(heads.start))
                add_tokens_(dq[:, heads], blocks.before.q_tokens, grads[0])
                for part, grad in enumerate(grads[1:]):
                    add_tokens_(dkv[:, part], blocks.before.k_tokens, grad)
            if blocks.gather.from_row is not None:
                dkv = dkv.index_select(0, blocks.gather.from_row)
            if returning is not None:
                _add_returned_(dk, dv, returning, blocks.gather, options)
            returning = kv_heads, start_all_to_all(dkv, blocks.gather.received, blocks.gather.sent, group)
        if returning is not None:
            _add_returned_(dk, dv, returning, blocks.gather, options)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _add_returned_(
    dk: Tensor, dv: Tensor, returning: tuple[slice, Transfer], gather: Gather, options: AttentionOptions
) -> None:
    """Add the gradients of some heads that come back to dk and dv [t, hkv, d], in place."""
    heads, transfer = returning
    dkv = transfer.wait(options.clock)  # [sent, 2, stride, d]
    for part, total in enumerate((dk, dv)):
        add_tokens_(total[:, heads], gather.send, dkv[:, part])


def all_gather_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: RowBlocks, group: dist.ProcessGroup, options: AttentionOptions
) -> Tensor:
    """Causal attention within each document of a row sharded over `group` (zigzag, contiguous or hybrid).

    Args:
        q: [t, hq, d]; k, v: [t, hkv, d]; t = T / cp_size.
        blocks: of `build_row_blocks`.

    Returns:
        [t, hq, d]; 0 in padding.
    """
    return _AllGatherAttention.apply(q, k, v, blocks, group, options)
