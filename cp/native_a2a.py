"""Ulysses and two-level attention (`--cp-backend native --cp-comm-type a2a | a2a+p2p`).

An all-to-all over the A ranks of `a2a_group` trades tokens for heads (DeepSpeed Ulysses, arXiv:2309.14509): each rank
then holds 1/A of the heads of A ranks' tokens. Attention over these is a ring over the other cp/A ranks (USP,
arXiv:2405.07719); with A = cp there is no ring.

The layout is the zigzag of all cp ranks. The A neighbours cp_rank = A*o .. A*o + A-1 together hold the chunks that a
zigzag over cp/A ranks gives to rank o. So after the exchange, a permutation within the rank gives the ring's layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cp.dropout_attention import AttentionOptions
from cp.layout import invert, shard_indices
from cp.native_p2p import RingBlocks, build_ring_blocks, ring_attention
from cp.packed_seq import PackedSeq, to_device
from parallel.collectives import all_to_all


@dataclass(frozen=True, eq=False)
class Exchange:
    """The ring's blocks; `order` [t * A] takes exchanged tokens, by neighbour, to the ring's order; None: the same."""

    order: Tensor | None
    inverse: Tensor | None
    blocks: RingBlocks


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad.index_select(0, *ctx.saved_tensors), None, None


def _permute(x: Tensor, order: Tensor | None, inverse: Tensor | None) -> Tensor:
    return x if order is None or inverse is None else _Permute.apply(x, order, inverse)


def kv_copies(kv_heads: int, a2a_size: int) -> int:
    """Copies of each key/value head, at least one, so that every rank gets whole heads."""
    return a2a_size // math.gcd(kv_heads, a2a_size)


def build_exchange(
    packed_seq: PackedSeq, *, a2a_size: int, cp_size: int, cp_rank: int, device: torch.device, with_dropout: bool
) -> Exchange:
    """Build the permutation and the ring's blocks of this rank; `with_dropout`: they carry `dropout_ids`."""
    padded, ring_size, ring_rank = packed_seq.padded_lengths, cp_size // a2a_size, cp_rank // a2a_size
    neighbours = range(ring_rank * a2a_size, (ring_rank + 1) * a2a_size)
    exchanged = np.concatenate([shard_indices(padded, cp_size=cp_size, cp_rank=r, layout="zigzag") for r in neighbours])
    wanted = shard_indices(padded, cp_size=ring_size, cp_rank=ring_rank, layout="zigzag")
    # Both list the same tokens of the row: find each wanted token among the exchanged tokens.
    index = np.empty(int(padded.sum()), np.int64)
    index[exchanged] = np.arange(len(exchanged))
    order = index[wanted]
    is_same = (order == np.arange(len(order))).all()
    return Exchange(
        order=None if is_same else to_device(order, device),
        inverse=None if is_same else to_device(invert(order), device),
        blocks=build_ring_blocks(
            packed_seq, cp_size=ring_size, cp_rank=ring_rank, device=device, with_dropout=with_dropout
        ),
    )


def _tokens_for_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[t, h, d] of this rank's tokens -> [A * t, h / A, d] of all neighbours' tokens."""
    size = group.size()
    sent = x.unflatten(1, (size, -1)).transpose(0, 1)  # [A, t, h/A, d]
    return all_to_all(sent, group).flatten(0, 1)


def _heads_for_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[A * t, h / A, d] of all neighbours' tokens -> [t, h, d] of this rank's tokens."""
    size = group.size()
    received = all_to_all(x.unflatten(0, (size, -1)), group)  # [A, t, h/A, d]
    return received.transpose(0, 1).flatten(1, 2)


def a2a_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exchange: Exchange,
    group: dist.ProcessGroup,
    options: AttentionOptions,
    *,
    a2a_group: dist.ProcessGroup,
    ring_group: dist.ProcessGroup,
) -> Tensor:
    """Causal attention within each document of a row sharded in zigzag order over `group` = a2a_group x ring_group.

    The clock measures the ring's waits; the all-to-alls overlap with nothing and are not measured.

    Args:
        q: [t, hq, d]; k, v: [t, hkv, d]; t = T / cp_size; hq divides by the size of `a2a_group`.
        exchange: of `build_exchange`.
        a2a_group: this rank's neighbours, with consecutive cp ranks.
        ring_group: the ranks with this rank's index among their own neighbours.

    Returns:
        [t, hq, d]; 0 in padding.
    """
    size = a2a_group.size()
    assert size * ring_group.size() == group.size() and group.rank() // size == ring_group.rank()
    copies = kv_copies(k.shape[1], size)
    if copies > 1:
        k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
    options = options.for_heads(a2a_group.rank() * (q.shape[1] // size))
    q, k, v = (_permute(_tokens_for_heads(x, a2a_group), exchange.order, exchange.inverse) for x in (q, k, v))
    out = ring_attention(q, k, v, exchange.blocks, ring_group, options)  # [A * t, hq / A, d]
    return _heads_for_tokens(_permute(out, exchange.inverse, exchange.order), a2a_group)
