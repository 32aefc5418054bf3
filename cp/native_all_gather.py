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
    Rows,
    Tokens,
    accumulator_dtype,
    add_tokens_,
    build_block,
    computed_lengths,
    find_tokens,
    put_tokens_,
    spread_tokens,
    take_tokens,
)
from cp.dropout_attention import AttentionOptions
from cp.kernels import block_backward, block_forward
from cp.layout import ranges
from cp.native_p2p import merge_
from cp.needed_keys import Exchange, NeededKeys
from cp.packed_seq import PackedSeq
from parallel.collectives import Transfer, start_all_to_all


@dataclass(frozen=True, eq=False)
class Gather:
    """An `Exchange` on the device.

    Attributes:
        send: this rank's tokens that are sent, by receiver.
        sent, received: tokens to and from each rank.
        keys: received tokens that are keys, segment by segment of `RowBlocks.before`; one of two segments comes twice.
    """

    send: Tokens
    sent: list[int]
    received: list[int]
    keys: Tokens


@dataclass(frozen=True, eq=False)
class RowBlocks:
    """The blocks of a rank.

    Attributes:
        own: each piece x itself, keys in this rank's tokens; `rows` are the queries.
        before: each piece x the tokens of its document before it, keys as in `Gather`; `rows.later` are the queries.
        gather: None if no rank needs anything of another.
    """

    own: Block | None
    before: Block | None
    rows: Rows
    gather: Gather | None


def build_row_blocks(
    packed_seq: PackedSeq, *, cp_size: int, cp_rank: int, device: torch.device, with_dropout: bool = False
) -> RowBlocks:
    """Build this rank's blocks and its part of the exchange; `with_dropout`: the blocks carry `dropout_ids`."""
    computed = computed_lengths(packed_seq.lengths, packed_seq.padded_lengths, device)
    row = dict(cp_size=cp_size, layout=packed_seq.layout, placement=packed_seq.placement)
    keys = NeededKeys(computed, packed_seq.padded_lengths, **row)  # type: ignore[arg-type]
    pieces, needed = keys.pieces[cp_rank], keys.needed[cp_rank]
    length, before_length = pieces.length, pieces.before
    later_length = np.where(before_length > 0, length, 0)
    first, later, first_key = (np.cumsum(x) - x for x in (length, later_length, before_length))
    own_ids = before_ids = None
    if with_dropout:
        ids, positions = packed_seq.token_ids_and_positions(cp_size=cp_size, cp_rank=cp_rank)
        ids = ids[ranges(pieces.start, length)]
        own_ids = ids, positions
        before_ids = ids[ranges(first, later_length)], ranges(np.zeros_like(before_length), before_length)
    own, before = (first, length, pieces.start, length), (later, later_length, first_key, before_length)
    is_padding = packed_seq.padding(cp_size=cp_size, cp_rank=cp_rank)
    exchange = keys.build_exchange(cp_rank)
    key_segments = ranges((np.cumsum(needed) - needed)[pieces.document], before_length)  # in the row's order
    return RowBlocks(
        own=build_block(own, causal=True, device=device, dropout_ids=own_ids),
        before=build_block(before, causal=False, device=device, dropout_ids=before_ids),
        rows=Rows.build((pieces.start, length), (first, later_length), is_padding, device),
        gather=None if exchange is None else _build_gather(exchange, key_segments, device),
    )


def _build_gather(exchange: Exchange, key_segments: np.ndarray, device: torch.device) -> Gather:
    send, keys = (
        find_tokens(index, np.ones_like(index), device) for index in (exchange.send, exchange.order[key_segments])
    )
    return Gather(send, exchange.sent.tolist(), exchange.received.tolist(), keys)


def _start_rounds(
    q: Tensor, k: Tensor, v: Tensor, gather: Gather | None, group: dist.ProcessGroup, options: AttentionOptions
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Start the first round. Each round gives key/value heads, their query heads, and K and V of `Gather.keys`.

    K and V are [keys, stride, d]. The next round's heads are in flight while the caller computes.
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
            kv = take_tokens(kv, gather.keys)
            yield slice(first, stop), slice(first * queries, stop * queries), kv[:, 0], kv[:, 1]

    return finish_rounds(start(0))


class _AllGatherAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, q: Tensor, k: Tensor, v: Tensor, blocks: RowBlocks, group: dist.ProcessGroup, options: AttentionOptions
    ) -> Tensor:
        accumulate = accumulator_dtype(q.dtype)
        rounds = _start_rounds(q, k, v, blocks.gather, group, options)
        rows = take_tokens(q, blocks.rows.queries)
        if blocks.own is None:  # no real token on this rank
            out, lse = rows, rows.new_zeros(rows.shape[:2], dtype=accumulate)
        else:
            out, lse = (x.to(accumulate) for x in block_forward(rows, k, v, blocks.own, options))
        later = [take_tokens(x, blocks.rows.later) for x in (rows, out, lse)]
        for _, heads, before_k, before_v in rounds:
            if blocks.before is not None:
                later_q, later_out, later_lse = (x[:, heads] for x in later)
                before = block_forward(later_q, before_k, before_v, blocks.before, options.for_heads(heads.start))
                merge_(later_out, later_lse, *before)
        for total, values in zip((out, lse), later[1:], strict=True):
            put_tokens_(total, blocks.rows.later, values)
        result, lse = blocks.rows.finish(out.to(q.dtype), lse, len(q))
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
        rows = [take_tokens(x, blocks.rows.queries) for x in (dout, q, out, lse)]
        if blocks.own is None:
            dq, dk, dv = (torch.zeros(x.shape, dtype=accumulate, device=x.device) for x in (rows[1], k, v))
        else:
            grads = block_backward(rows[0], rows[1], k, v, rows[2], rows[3], blocks.own, options)
            tokens = slice(0, len(grads[0])), blocks.own.k_tokens, blocks.own.k_tokens
            sizes = len(grads[0]), len(k), len(k)
            dq, dk, dv = map(spread_tokens, (x.to(accumulate) for x in grads), tokens, sizes)
        later = [take_tokens(x, blocks.rows.later) for x in (*rows, dq)]
        returning = None
        for kv_heads, heads, before_k, before_v in rounds:
            shape = sum(blocks.gather.received), 2, *before_k.shape[1:]
            dkv = torch.zeros(shape, dtype=accumulate, device=q.device)
            if blocks.before is not None:
                later_dout, later_q, later_out, later_lse, later_dq = (x[:, heads] for x in later)
                sides = later_dout, later_q, before_k, before_v, later_out, later_lse
                grads = block_backward(*sides, blocks.before, options.for_heads(heads.start))
                later_dq.add_(grads[0])
                for part, grad in enumerate(grads[1:]):
                    add_tokens_(dkv[:, part], blocks.gather.keys, grad)
            if returning is not None:
                _add_returned_(dk, dv, returning, blocks.gather, options)
            returning = kv_heads, start_all_to_all(dkv, blocks.gather.received, blocks.gather.sent, group)
        if returning is not None:
            _add_returned_(dk, dv, returning, blocks.gather, options)
        put_tokens_(dq, blocks.rows.later, later[-1])
        dq = spread_tokens(dq.to(q.dtype), blocks.rows.queries, len(q))
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


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
