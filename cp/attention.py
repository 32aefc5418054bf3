"""The registry of context-parallel attention: one call for every backend.

attention(q, k, v, packed_seq, group) -> out      # q [t, hq, d]; k, v [t, hkv, d]; t = T / cp

Backends that support attention dropout (`cp.support.DROPOUT_DEVICES`) also take `dropout=AttentionDropout(...)`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.distributed as dist
from torch import Tensor

from cp.native_a2a import a2a_attention
from cp.native_all_gather import all_gather_attention
from cp.native_p2p import ring_attention
from cp.support import AttentionChoice
from parallel.collectives import WaitClock

Attention = Callable[..., Tensor]


def build_attention(
    choice: AttentionChoice,
    *,
    head_dim: int,
    a2a_groups: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None,
    clock: WaitClock | None = None,
) -> Attention:
    """Build the attention call that `cp.support.choose` selected, with softmax scale 1/sqrt(head_dim).

    Args:
        a2a_groups: for `a2a` and `a2a+p2p`: this rank's neighbours that trade heads, and the ring over the rest.
        clock: measures the waits of `native`; the libraries' waits are not measured.
    """
    scale = head_dim**-0.5
    if choice.backend == "native":
        if choice.method == "p2p":
            return partial(ring_attention, scale=scale, clock=clock)
        if choice.method == "all_gather":
            return partial(all_gather_attention, scale=scale, heads_k_stride=choice.heads_k_stride, clock=clock)
        if choice.a2a_size == 1:  # no neighbour to trade with: the ring alone
            return partial(ring_attention, scale=scale, clock=clock)
        assert a2a_groups is not None
        return partial(a2a_attention, scale=scale, a2a_group=a2a_groups[0], ring_group=a2a_groups[1], clock=clock)
    if choice.backend == "pytorch":
        from cp.pytorch_cp import pytorch_attention  # private names of PyTorch, imported only on demand

        return partial(
            pytorch_attention, scale=scale, rotate_method=choice.method, load_balance=choice.layout == "zigzag"
        )
    if choice.backend == "te":
        from cp.te_attention import TEAttention  # an optional library

        return TEAttention(choice.method, a2a_groups)
    assert choice.backend == "ring"
    from cp.ring_flash import ring_flash_attention  # an optional library

    return partial(ring_flash_attention, scale=scale, function=choice.method, heads_k_stride=choice.heads_k_stride)
