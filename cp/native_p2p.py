"""Ring attention over the zigzag layout, on PyTorch's flash kernels (`--cp-backend native --cp-comm-type p2p`).

K and V travel the ring once in the forward pass and once in the backward pass. In the backward pass each shard's
gradient follows the shard and arrives on its own rank after the last step (Ring Attention, arXiv:2310.01889, with
Llama 3's balanced layout). The next shard is in flight while the present one is computed.

Rank r computes with rank j's shard, for each document (chunks of padded length / 2cp):

    j == r  own chunks r and 2cp-1-r: causal, and square because they are adjacent in storage
    j <  r  all own queries x the first half of j's shard: all earlier; the second half is all later
    j >  r  own second half x all of j's shard; the first half is earlier than all of it

No fully masked block is computed. Queries of the steps with j > r, the late ones, are gathered once for those steps.
On CUDA, padding is computed as the end of its document (`cp.blocks.computed_lengths`), and its results are set to 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    fill_tokens_,
    put_tokens_,
    spread_tokens,
    take_tokens,
)
from cp.dropout_attention import AttentionOptions
from cp.kernels import block_backward, block_forward, cat_tokens
from cp.layout import ranges
from cp.packed_seq import PackedSeq
from parallel.collectives import Transfer, start_ring_shift
from parallel.fusion import fused

KV_TAG, GRAD_TAG = 0, 1
MAX_PENDING = 2  # blocks' dq that one pass over the sum adds


@dataclass(frozen=True, eq=False)
class RingBlocks:
    """The blocks of a rank, one a step; None where a step computes nothing.

    Attributes:
        first_later: the step from which on `rows.later` are the queries.
    """

    steps: list[Block | None]
    rows: Rows
    first_later: int


def build_ring_blocks(
    packed_seq: PackedSeq, *, cp_size: int, cp_rank: int, device: torch.device, with_dropout: bool = False
) -> RingBlocks:
    """Build the block of each ring step; at step s, the shard of rank (cp_rank - s) mod cp_size is on this rank.

    All lengths are known on the host, so no step reads a value from the device. `with_dropout`: the blocks carry
    `dropout_ids`.
    """
    assert packed_seq.layout == "zigzag"
    padded = packed_seq.padded_lengths
    computed = computed_lengths(packed_seq.lengths, padded, device)
    chunk = -(-padded // (2 * cp_size))  # one rank takes documents of any length
    start = (np.cumsum(padded) - padded) // cp_size  # of each document in a rank's T / cp tokens

    def count(chunk_index: int) -> np.ndarray:
        """[documents] tokens in one of each document's chunks; chunks fill in order."""
        return np.clip(computed - chunk_index * chunk, 0, chunk)

    first, second = count(cp_rank), count(2 * cp_size - 1 - cp_rank)
    own = first + second
    row, later_row = (np.cumsum(x) - x for x in (own, second))
    later = row + first, second
    steps: list[Block | None] = []
    own_ids = packed_seq.token_ids_and_positions(cp_size=cp_size, cp_rank=cp_rank)[0] if with_dropout else None
    for step in range(cp_size):
        peer = (cp_rank - step) % cp_size
        keys = count(peer) + count(2 * cp_size - 1 - peer)
        if peer == cp_rank:
            segments = (row, own, start, keys)
        elif peer < cp_rank:
            segments = (row, own, start, count(peer))
        else:
            segments = (later_row, second, start, keys)
        dropout_ids = None
        if own_ids is not None:
            ids = own_ids[ranges(start, own)]
            positions = packed_seq.token_ids_and_positions(cp_size=cp_size, cp_rank=peer)[1]
            dropout_ids = ids[ranges(*later)] if peer > cp_rank else ids, positions
        steps.append(build_block(segments, causal=peer == cp_rank, device=device, dropout_ids=dropout_ids))
    is_padding = packed_seq.padding(cp_size=cp_size, cp_rank=cp_rank)
    return RingBlocks(steps, Rows.build((start, own), later, is_padding, device), first_later=cp_rank + 1)


@fused
def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge a block's result into the running softmax of the same queries: out [n, hq, d], lse [n, hq], in place.

    With w = sigmoid(block_lse - lse): out = lerp(out, block_out, w), lse -= log(1 - w). The causal block comes first,
    so lse is finite.
    """
    difference = block_lse.to(lse.dtype) - lse
    weight = torch.sigmoid(difference)[..., None]  # [n, hq, 1]
    out.copy_(torch.lerp(out, block_out.to(out.dtype), weight))
    lse.copy_(lse + torch.nn.functional.softplus(difference, threshold=60.0))


@fused
def _add_(total: Tensor, *values: Tensor) -> None:
    """total += values, one after the other."""
    for value in values:
        total.add_(value)


@fused
def _add_up(dtype: torch.dtype, first: Tensor, *others: Tensor) -> Tensor:
    """The sum in this dtype, from the first to the last."""
    total = first.to(dtype)
    for value in others:
        total = total + value
    return total


@dataclass(frozen=True, eq=False)
class Ring:
    """Documents that the ranks of a group share in zigzag order.

    Attributes:
        tokens: the part of this rank's tokens that belongs to the documents.
        blocks: of `build_ring_blocks`.
        group: None: one rank, no transfer.
    """

    tokens: slice
    blocks: RingBlocks
    group: dist.ProcessGroup | None


class _Pass:
    """K and V on their way around one ring.

    Args:
        kv: [2, t, hkv, d] of this rank, one message; (k, v) where nothing is sent.
    """

    def __init__(self, k: Tensor, v: Tensor, ring: Ring, options: AttentionOptions) -> None:
        k, v = k[ring.tokens], v[ring.tokens]
        self.blocks, self.group, self.options, self.steps = ring.blocks, ring.group, options, len(ring.blocks.steps)
        self.size = len(k)
        self.kv: Any = torch.stack((k, v)) if self.steps > 1 else (k, v)
        # A single block is its own sum.
        self.accumulate = accumulator_dtype(k.dtype) if self.steps > 1 else k.dtype
        self.kv_shift: Transfer | None = None

    def shift_kv(self, step: int) -> None:
        """Take the shard that this step needs, and send it on."""
        if self.kv_shift is not None:
            self.kv = self.kv_shift.wait(self.options.clock)
        self.kv_shift = self._start(self.kv, KV_TAG) if step + 1 < self.steps else None

    def _start(self, x: Tensor, tag: int) -> Transfer:
        assert self.group is not None
        return start_ring_shift(x, self.group, tag=tag)


class _Forward(_Pass):
    """Attributes: out [t, hq, d] and lse [t, hq] of the documents' tokens, once finished."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, ring: Ring, options: AttentionOptions) -> None:
        super().__init__(k, v, ring, options)
        self.q = take_tokens(q[ring.tokens], ring.blocks.rows.queries)
        self.out = self.q  # both are kept where the rank has no query
        self.lse = torch.empty(self.q.shape[:2], dtype=accumulator_dtype(q.dtype), device=q.device)
        self.early: tuple[Tensor, Tensor] | None = None

    def compute(self, step: int) -> None:
        block = self.blocks.steps[step]
        if block is None:
            return
        if step == self.blocks.first_later:
            self.early = self.out, self.lse
            self.q, self.out, self.lse = (take_tokens(x, self.blocks.rows.later) for x in (self.q, self.out, self.lse))
        block_out, block_lse = block_forward(self.q, self.kv[0], self.kv[1], block, self.options)
        if step == 0:
            self.out, self.lse = block_out.to(self.accumulate), block_lse
        else:
            merge_(self.out, self.lse, block_out, block_lse)

    def finish(self) -> None:
        if self.early is not None:
            for total, rows in zip(self.early, (self.out, self.lse), strict=True):
                put_tokens_(total, self.blocks.rows.later, rows)
            self.out, self.lse = self.early
        self.out, self.lse = self.blocks.rows.finish(self.out.to(self.q.dtype), self.lse, self.size)


class _Backward(_Pass):
    """Attributes: dq [t, hq, d] and dkv, [2, t, hkv, d], of the documents' tokens, once finished."""

    def __init__(self, saved: tuple[Tensor, ...], dout: Tensor, ring: Ring, options: AttentionOptions) -> None:
        q, k, v, out, lse = saved
        super().__init__(k, v, ring, options)
        self._take_rows([x[ring.tokens] for x in (q, dout, out, lse)], ring.blocks.rows.queries)
        self.dq: Any = None
        self.early_dq: Tensor | None = None
        self.pending: list[Tensor] = []
        self.block_dkv: Sequence[Tensor] = ()
        self.dkv: Any = None
        self.dkv_shift: Transfer | None = None

    def _take_rows(self, tensors: Sequence[Tensor], tokens: Tokens) -> None:
        self.q, self.dout, self.out, lse = (take_tokens(x, tokens) for x in tensors)
        self.lse = lse.t().contiguous().t()  # by head, as kernels take it

    def compute(self, step: int) -> None:
        block = self.blocks.steps[step]
        if block is None:
            return
        if step == self.blocks.first_later:
            self.early_dq = self._sum_dq()
            self._take_rows((self.q, self.dout, self.out, self.lse), self.blocks.rows.later)
            self.dq = take_tokens(self.early_dq, self.blocks.rows.later)
        block_dq, *self.block_dkv = block_backward(
            self.dout, self.q, self.kv[0], self.kv[1], self.out, self.lse, block, self.options
        )
        self.pending.append(block_dq)
        if len(self.pending) == MAX_PENDING:
            self._sum_dq()

    def _sum_dq(self) -> Tensor:
        """The sum of dq until now."""
        pending, self.pending = self.pending, []
        if self.dq is None:
            self.dq = _add_up(self.accumulate, *pending) if len(pending) > 1 else pending[0].to(self.accumulate)
        elif pending:
            _add_(self.dq, *pending)
        return self.dq

    def shift_dkv(self, step: int) -> None:
        """Add this step's gradient of the shard to that of the ranks before, and send the sum on."""
        block = self.blocks.steps[step]
        if self.dkv_shift is not None:
            self.dkv, write_ = self.dkv_shift.wait(self.options.clock), add_tokens_
        else:
            self.dkv, write_ = torch.empty_like(self.kv, dtype=self.accumulate), fill_tokens_
            if block is None:
                self.dkv.zero_()
        if block is not None:
            for total, grad in zip(self.dkv, self.block_dkv, strict=True):
                write_(total, block.k_tokens, grad)
        self.dkv_shift = self._start(self.dkv, GRAD_TAG)

    def finish(self) -> None:
        block = self.blocks.steps[0]
        if self.dkv_shift is not None:
            dkv = self.dkv_shift.wait(self.options.clock)  # the last shift ends on the shard's own rank
            self.dkv = dkv.to(self.q.dtype)
        elif block is not None:
            grads = (grad.to(self.q.dtype) for grad in self.block_dkv)
            self.dkv = [spread_tokens(grad, block.k_tokens, self.size) for grad in grads]
        else:
            self.dkv = [torch.zeros_like(x) for x in self.kv]
        dq = self.q if block is None else self._sum_dq()
        if self.early_dq is not None:
            put_tokens_(self.early_dq, self.blocks.rows.later, dq)
            dq = self.early_dq
        self.dq = spread_tokens(dq.to(self.q.dtype), self.blocks.rows.queries, self.size)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, q: Tensor, k: Tensor, v: Tensor, rings: Sequence[Ring], options: AttentionOptions
    ) -> Tensor:
        passes = [_Forward(q, k, v, ring, options) for ring in rings]
        for step in range(max(ring.steps for ring in passes)):
            under_way = [ring for ring in passes if step < ring.steps]
            for ring in under_way:
                ring.shift_kv(step)
            for ring in reversed(under_way):
                ring.compute(step)
        for ring in passes:
            ring.finish()
        result, lse = cat_tokens([ring.out for ring in passes]), cat_tokens([ring.lse for ring in passes])
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.rings, ctx.options = rings, options
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):  # type: ignore[override]
        saved = ctx.saved_tensors  # read once: recomputation allows no second time
        dout = dout.contiguous()
        passes = [_Backward(saved, dout, ring, ctx.options) for ring in ctx.rings]
        for step in range(max(ring.steps for ring in passes)):
            under_way = [ring for ring in passes if step < ring.steps]
            for ring in under_way:
                ring.shift_kv(step)
            for ring in reversed(under_way):
                ring.compute(step)
            for ring in under_way:
                if ring.steps > 1:
                    ring.shift_dkv(step)
        for ring in passes:
            ring.finish()
        dq = cat_tokens([ring.dq for ring in passes])
        dk, dv = (cat_tokens([ring.dkv[i] for ring in passes]) for i in (0, 1))
        return dq, dk, dv, None, None


def rings_attention(q: Tensor, k: Tensor, v: Tensor, rings: Sequence[Ring], options: AttentionOptions) -> Tensor:
    """Causal attention within each document, over several rings at a time.

    In each step the transfers of all rings start, then the blocks of the smallest ring are computed first. Rings come
    in the same order on all ranks, so none waits for a rank that waits for another ring.

    Args:
        q: [t, hq, d]; k, v: [t, hkv, d]; hkv divides hq.
        rings: the largest first; their tokens follow one another and are all tokens.

    Returns:
        [t, hq, d]; 0 in padding, as are the gradients of padding's q, k and v.
    """
    return _RingAttention.apply(q, k, v, rings, options)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: RingBlocks,
    group: dist.ProcessGroup | None,
    options: AttentionOptions,
) -> Tensor:
    """`rings_attention` of a row sharded over `group` in zigzag order, t = T / cp_size tokens a rank."""
    return rings_attention(q, k, v, [Ring(slice(0, len(q)), blocks, group)], options)
