"""The registry of context-parallel attention: one call for every backend.

attention(q, k, v, packed_seq, group) -> out      # q [t, hq, d]; k, v [t, hkv, d]; t = T / cp

Backends that support attention dropout (`cp.support.DROPOUT_DEVICES`) also take `dropout=AttentionDropout(...)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from cp.dropout_attention import AttentionDropout, AttentionOptions
from cp.hybrid import Groups, build_rings, hybrid_p2p
from cp.native_a2a import a2a_attention, build_exchange
from cp.native_all_gather import all_gather_attention, build_row_blocks
from cp.native_p2p import build_ring_blocks, ring_attention
from cp.packed_seq import PackedSeq
from cp.support import AttentionChoice
from parallel.collectives import WaitClock

Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class NativeAttention:
    """A method of `native`.

    Attributes:
        build: makes what the method needs of a row; the row's cache keeps the result for all layers.
        attend: the method.
    """

    build: Callable[..., Any]
    attend: Callable[..., Tensor]
    options: AttentionOptions

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packed_seq: PackedSeq,
        group: dist.ProcessGroup,
        dropout: AttentionDropout | None = None,
    ) -> Tensor:
        own = dict(cp_size=group.size(), cp_rank=group.rank(), device=q.device, with_dropout=dropout is not None)
        built = packed_seq.cached((self.build, *own.values()), lambda: self.build(packed_seq, **own))
        return self.attend(q, k, v, built, group, replace(self.options, dropout=dropout))


def build_attention(
    choice: AttentionChoice,
    *,
    head_dim: int,
    a2a_groups: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None,
    degree_groups: Groups | None = None,
    clock: WaitClock | None = None,
) -> Attention:
    """Build the attention call that `cp.support.choose` selected, with softmax scale 1/sqrt(head_dim).

    Args:
        a2a_groups: for `a2a` and `a2a+p2p`: this rank's neighbours that trade heads, and the ring over the rest.
        degree_groups: for the layout hybrid: this rank's group for each degree of `cp.placement.degree_chain`.
        clock: measures the waits of `native`; the libraries' waits are not measured.
    """
    scale = head_dim**-0.5
    if choice.backend == "native":
        options = AttentionOptions(scale, clock=clock, heads_k_stride=choice.heads_k_stride)
        if choice.method == "all_gather":
            return NativeAttention(build_row_blocks, all_gather_attention, options)
        if choice.layout == "hybrid":
            assert degree_groups is not None
            return NativeAttention(partial(build_rings, groups=degree_groups), hybrid_p2p, options)
        if choice.a2a_size == 1:  # p2p, or no neighbour to trade with: the ring alone
            return NativeAttention(build_ring_blocks, ring_attention, options)
        assert a2a_groups is not None
        traded = partial(a2a_attention, a2a_group=a2a_groups[0], ring_group=a2a_groups[1])
        return NativeAttention(partial(build_exchange, a2a_size=choice.a2a_size), traded, options)
    if choice.backend == "pytorch":
        from cp.pytorch_cp import pytorch_attention  # private names of PyTorch, imported only on demand

        is_balanced = choice.layout == "zigzag"
        return partial(pytorch_attention, scale=scale, rotate_method=choice.method, load_balance=is_balanced)
    if choice.backend == "te":
        from cp.te_attention import TEAttention, TEHybridAttention  # an optional library

        if choice.layout == "hybrid":
            assert degree_groups is not None
            return TEHybridAttention(choice.method, degree_groups)
        return TEAttention(choice.method, a2a_groups)
    assert choice.backend == "ring"
    from cp.ring_flash import ring_flash_attention  # an optional library

    return partial(ring_flash_attention, scale=scale, function=choice.method, heads_k_stride=choice.heads_k_stride)
