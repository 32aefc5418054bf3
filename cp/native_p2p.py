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

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from cp.blocks import Block, accumulator_dtype, add_tokens_, build_block, fill_tokens_, spread_tokens, take_tokens
from cp.dropout_attention import AttentionOptions
from cp.kernels import block_backward, block_forward
from cp.packed_seq import PackedSeq
from parallel.collectives import start_ring_shift

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
    difference = block_lse.to(lse.dtype) - take_tokens(lse, tokens)
    weight = torch.sigmoid(difference)[..., None]  # [queries, hq, 1]
    merged = torch.lerp(take_tokens(out, tokens), block_out.to(out.dtype), weight)
    grown = take_tokens(lse, tokens) + torch.nn.functional.softplus(difference, threshold=60.0)
    if isinstance(tokens, slice):
        out[tokens], lse[tokens] = merged, grown
    else:
        out.index_copy_(0, tokens, merged)
        lse.index_copy_(0, tokens, grown)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        blocks: list[Block | None],
        group: dist.ProcessGroup,
        options: AttentionOptions,
    ) -> Tensor:
        cp_size = len(blocks)
        accumulate = accumulator_dtype(q.dtype)
        kv: Any = torch.stack((k, v)) if cp_size > 1 else (k, v)  # [2, t, hkv, d], one message
        for step, block in enumerate(blocks):
            shift = start_ring_shift(kv, group, tag=KV_TAG) if step + 1 < cp_size else None
            if block is not None:
                block_out, block_lse = block_forward(q, kv[0], kv[1], block, options)
                if step == 0:
                    out = spread_tokens(block_out.to(accumulate), block.q_tokens, len(q))
                    lse = spread_tokens(block_lse.to(accumulate), block.q_tokens, len(q))
                else:
                    merge_tokens_(out, lse, block, block_out, block_lse)
            elif step == 0:  # no real token on this rank, so every later block is empty too
                out, lse = q.new_zeros(q.shape, dtype=accumulate), q.new_zeros(q.shape[:2], dtype=accumulate)
            if shift is not None:
                kv = shift.wait(options.clock)
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.blocks, ctx.group, ctx.options = blocks, group, options
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        dout = dout.contiguous()
        blocks, group, options, cp_size = ctx.blocks, ctx.group, ctx.options, len(ctx.blocks)
        accumulate = accumulator_dtype(q.dtype)
        dq = torch.empty(q.shape, dtype=accumulate, device=q.device)
        kv: Any = torch.stack((k, v)) if cp_size > 1 else (k, v)
        dkv_shift = None
        for step, block in enumerate(blocks):
            kv_shift = start_ring_shift(kv, group, tag=KV_TAG) if step + 1 < cp_size else None
            # Filled before the same shard's gradient arrives from the previous rank.
            dkv = torch.empty((2, *k.shape), dtype=accumulate, device=q.device)
            if block is not None:
                block_dq, block_dk, block_dv = block_backward(dout, q, kv[0], kv[1], out, lse, block, options)
                (fill_tokens_ if step == 0 else add_tokens_)(dq, block.q_tokens, block_dq)
                fill_tokens_(dkv[0], block.k_tokens, block_dk)
                fill_tokens_(dkv[1], block.k_tokens, block_dv)
            else:
                dkv.zero_()
                if step == 0:
                    dq.zero_()
            if dkv_shift is not None:
                dkv += dkv_shift.wait(options.clock)
            if cp_size > 1:
                dkv_shift = start_ring_shift(dkv, group, tag=GRAD_TAG)  # the last shift ends on the shard's own rank
            if kv_shift is not None:
                kv = kv_shift.wait(options.clock)
        if dkv_shift is not None:
            dkv = dkv_shift.wait(options.clock)
        return dq.to(q.dtype), dkv[0].to(k.dtype), dkv[1].to(v.dtype), None, None, None


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: list[Block | None], group: dist.ProcessGroup, options: AttentionOptions
) -> Tensor:
    """Causal attention within each document of a row sharded over `group` in zigzag order.

    Args:
        q: [t, hq, d]; k, v: [t, hkv, d]; t = T / cp_size, hkv divides hq.
        blocks: of `build_ring_blocks`.

    Returns:
        [t, hq, d]; 0 in padding, as are the gradients of padding's q, k and v.
    """
    return _RingAttention.apply(q, k, v, blocks, group, options)
