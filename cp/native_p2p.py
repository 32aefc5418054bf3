"""Ring attention over the zigzag layout, on PyTorch's flash kernels (`--cp-backend native --cp-comm-type p2p`).

K and V travel the ring once in the forward pass and once in the backward pass. In the backward pass each shard's
gradient follows the shard and arrives on its own rank after the last step (Ring Attention, arXiv:2310.01889, with
Llama 3's balanced layout). The next shard is in flight while the present one is computed.

Rank r computes with rank j's shard, for each document (chunks of padded length / 2cp):

    j == r  own chunks r and 2cp-1-r: causal, and square because they are adjacent in storage
    j <  r  all own queries x the first half of j's shard: all earlier; the second half is all later
    j >  r  own second half x all of j's shard; the first half is earlier than all of it

Only real tokens take part: padding costs nothing. No fully masked block is computed.
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

from cp.blocks import Block, accumulator_dtype, add_tokens_, build_block, fill_tokens_, spread_tokens
from cp.dropout_attention import AttentionOptions
from cp.kernels import block_backward, block_forward
from cp.packed_seq import PackedSeq
from parallel.collectives import Transfer, start_ring_shift
from parallel.fusion import fused

KV_TAG, GRAD_TAG = 0, 1


def build_ring_blocks(
    packed_seq: PackedSeq, *, cp_size: int, cp_rank: int, device: torch.device, with_dropout: bool = False
) -> list[Block | None]:
    """Build the block of each ring step; at step s, the shard of rank (cp_rank - s) mod cp_size is on this rank.

    All lengths are known on the host, so no step reads a value from the device. `with_dropout`: the blocks carry
    `dropout_ids`. None where a step computes nothing.
    """
    assert packed_seq.layout == "zigzag"
    lengths, padded = packed_seq.lengths, packed_seq.padded_lengths
    chunk = -(-padded // (2 * cp_size))  # one rank takes documents of any length
    start = (np.cumsum(padded) - padded) // cp_size  # of each document in a rank's T / cp tokens

    def real(chunk_index: int) -> np.ndarray:
        """[documents] real tokens in one of each document's chunks; chunks fill in order."""
        return np.clip(lengths - chunk_index * chunk, 0, chunk)

    first, second = real(cp_rank), real(2 * cp_size - 1 - cp_rank)
    blocks: list[Block | None] = []
    own_ids = packed_seq.token_ids_and_positions(cp_size=cp_size, cp_rank=cp_rank)[0] if with_dropout else None
    for step in range(cp_size):
        peer = (cp_rank - step) % cp_size
        dropout_ids = None
        if own_ids is not None:
            dropout_ids = own_ids, packed_seq.token_ids_and_positions(cp_size=cp_size, cp_rank=peer)[1]
        keys = real(peer) + real(2 * cp_size - 1 - peer)
        if peer == cp_rank:
            segments = (start, first + second, start, keys)
        elif peer < cp_rank:
            segments = (start, first + second, start, real(peer))
        else:
            segments = (start + chunk, second, start, keys)
        blocks.append(build_block(segments, causal=peer == cp_rank, device=device, dropout_ids=dropout_ids))
    return blocks


def merge_tokens_(out: Tensor, lse: Tensor, block: Block, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge one block's result into the running softmax: out [t, hq, d], lse [t, hq], both in place.

    With w = sigmoid(block_lse - lse): out = lerp(out, block_out, w), lse -= log(1 - w). The causal block comes first,
    so the lse of the block's queries is finite.
    """
    tokens = block.q_tokens
    if isinstance(tokens, slice):
        _merge_(out[tokens], lse[tokens], block_out, block_lse, None)
    else:
        _merge_(out, lse, block_out, block_lse, tokens)


@fused
def _merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor, index: Tensor | None) -> None:
    """`merge_tokens_` at the tokens `index`; None: at all tokens."""
    own_out, own_lse = (x if index is None else x.index_select(0, index) for x in (out, lse))
    difference = block_lse.to(lse.dtype) - own_lse
    weight = torch.sigmoid(difference)[..., None]  # [queries, hq, 1]
    merged = torch.lerp(own_out, block_out.to(out.dtype), weight)
    grown = own_lse + torch.nn.functional.softplus(difference, threshold=60.0)
    if index is None:
        out.copy_(merged)
        lse.copy_(grown)
    else:
        out.index_copy_(0, index, merged)
        lse.index_copy_(0, index, grown)


@dataclass(frozen=True, eq=False)
class Ring:
    """Documents that the ranks of a group share in zigzag order.

    Attributes:
        tokens: the part of this rank's tokens that belongs to the documents.
        blocks: of `build_ring_blocks`, one a step.
        group: None: one rank, no transfer.
    """

    tokens: slice
    blocks: list[Block | None]
    group: dist.ProcessGroup | None


class _Pass:
    """K and V on their way around one ring.

    Args:
        kv: [2, t, hkv, d] of this rank, one message; (k, v) where nothing is sent.
    """

    def __init__(self, k: Tensor, v: Tensor, ring: Ring, options: AttentionOptions) -> None:
        k, v = k[ring.tokens], v[ring.tokens]
        self.blocks, self.group, self.options, self.steps = ring.blocks, ring.group, options, len(ring.blocks)
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
    """Attributes: out [t, hq, d] and lse [t, hq], of the documents' tokens."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, ring: Ring, options: AttentionOptions) -> None:
        super().__init__(k, v, ring, options)
        self.q = q[ring.tokens]

    def compute(self, step: int) -> None:
        q, block = self.q, self.blocks[step]
        if block is not None:
            block_out, block_lse = block_forward(q, self.kv[0], self.kv[1], block, self.options)
            if step == 0:
                self.out = spread_tokens(block_out.to(self.accumulate), block.q_tokens, len(q))
                self.lse = spread_tokens(block_lse, block.q_tokens, len(q))
            else:
                merge_tokens_(self.out, self.lse, block, block_out, block_lse)
        elif step == 0:  # no real token on this rank, so every later block is empty too
            self.out = q.new_zeros(q.shape, dtype=self.accumulate)
            self.lse = q.new_zeros(q.shape[:2], dtype=accumulator_dtype(q.dtype))


class _Backward(_Pass):
    """Attributes: dq [t, hq, d]; dkv [2, t, hkv, d], of the shard on this rank."""

    def __init__(self, saved: tuple[Tensor, ...], dout: Tensor, ring: Ring, options: AttentionOptions) -> None:
        q, k, v, out, lse = saved
        super().__init__(k, v, ring, options)
        self.q, self.out, self.lse, self.dout = (x[ring.tokens] for x in (q, out, lse, dout))
        self.dkv_shift: Transfer | None = None

    def compute(self, step: int) -> None:
        """Fill dkv before the same shard's gradient arrives from the previous rank."""
        q, kv, block = self.q, self.kv, self.blocks[step]
        self.dkv = torch.empty((2, *kv[0].shape), dtype=self.accumulate, device=q.device)
        if block is not None:
            block_dq, block_dk, block_dv = block_backward(
                self.dout, q, kv[0], kv[1], self.out, self.lse, block, self.options
            )
            if step == 0:
                self.dq = spread_tokens(block_dq.to(self.accumulate), block.q_tokens, len(q))
            else:
                add_tokens_(self.dq, block.q_tokens, block_dq)
            fill_tokens_(self.dkv[0], block.k_tokens, block_dk)
            fill_tokens_(self.dkv[1], block.k_tokens, block_dv)
        else:
            self.dkv.zero_()
            if step == 0:
                self.dq = torch.zeros_like(q, dtype=self.accumulate)

    def shift_dkv(self) -> None:
        """Add the shard's gradient of the ranks before, and send the sum on."""
        if self.dkv_shift is not None:
            self.dkv += self.dkv_shift.wait(self.options.clock)
        if self.steps > 1:
            self.dkv_shift = self._start(self.dkv, GRAD_TAG)

    def finish(self) -> None:
        if self.dkv_shift is not None:
            self.dkv = self.dkv_shift.wait(self.options.clock)  # the last shift ends on the shard's own rank


def _cat(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


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
        result, lse = _cat([ring.out.to(q.dtype) for ring in passes]), _cat([ring.lse for ring in passes])
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.rings, ctx.options = rings, options
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):  # type: ignore[override]
        saved = ctx.saved_tensors  # read once: recomputation allows no second time
        q, k, v = saved[:3]
        dout = dout.contiguous()
        passes = [_Backward(saved, dout, ring, ctx.options) for ring in ctx.rings]
        for step in range(max(ring.steps for ring in passes)):
            under_way = [ring for ring in passes if step < ring.steps]
            for ring in under_way:
                ring.shift_kv(step)
            for ring in reversed(under_way):
                ring.compute(step)
            for ring in under_way:
                ring.shift_dkv()
        for ring in passes:
            ring.finish()
        dq = _cat([ring.dq.to(q.dtype) for ring in passes])
        dk, dv = (_cat([ring.dkv[i].to(x.dtype) for ring in passes]) for i, x in enumerate((k, v)))
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
    blocks: list[Block | None],
    group: dist.ProcessGroup | None,
    options: AttentionOptions,
) -> Tensor:
    """`rings_attention` of a row sharded over `group` in zigzag order, t = T / cp_size tokens a rank."""
    return rings_attention(q, k, v, [Ring(slice(0, len(q)), blocks, group)], options)
