"""One call for every context-parallel attention: the registry.

attention(q, k, v, packed_seq, group) -> out      # q [t, hq, d]; k, v [t, hkv, d]; t = T / cp
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from cp.native_p2p import ring_attention
from cp.packed_seq import PackedSeq

Attention = Callable[[Tensor, Tensor, Tensor, PackedSeq, dist.ProcessGroup], Tensor]

# (backend, comm type) of every row of cp.plan.SUPPORT -> the function that serves it.
IMPLEMENTATIONS: dict[tuple[str, str], Callable[..., Tensor]] = {
    ("native", "p2p"): ring_attention,
}


def build_attention(backend: str, comm_type: str, *, head_dim: int) -> Attention:
    """The attention call of a backend that `cp.plan.check` has accepted, with softmax scale 1/sqrt(head_dim)."""
    implementation = IMPLEMENTATIONS[backend, comm_type]
    scale = head_dim**-0.5

    def attention(q: Tensor, k: Tensor, v: Tensor, packed_seq: PackedSeq, group: dist.ProcessGroup) -> Tensor:
        return implementation(q, k, v, packed_seq, group, scale=scale)

    return attention
