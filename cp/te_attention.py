"""Transformer Engine's attention with its own context parallelism (`--cp-backend te`). CUDA only.

`--cp-comm-type p2p | all_gather | a2a | a2a+p2p` select Transformer Engine's own methods. Its token order over the cp
ranks (DualChunkSwap, per document in THD) is our zigzag, index for index.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
import transformer_engine.pytorch as te
from torch import Tensor

from cp.hybrid import DegreeRow, Groups, build_degree_rows
from cp.packed_seq import PackedSeq, to_device


class TEAttention:
    """The attention call on one `DotProductAttention` per set of head counts, built at its first call.

    Args:
        method: value of `--cp-comm-type`.
        groups: for `a2a+p2p`: the neighbours that trade heads, and the ring over the rest.
    """

    def __init__(self, method: str, groups: tuple[dist.ProcessGroup, dist.ProcessGroup] | None) -> None:
        # a2a+p2p without neighbours is the ring alone, which Transformer Engine knows as p2p with one group.
        self.method, self.groups = "p2p" if method == "a2a+p2p" and groups is None else method, groups
        self.modules: dict[tuple[int, int, int], te.DotProductAttention] = {}

    def _module(
        self, heads: int, kv_heads: int, head_dim: int, group: dist.ProcessGroup | None
    ) -> te.DotProductAttention:
        """The module for one tp rank's heads; it knows nothing else of tensor parallelism."""
        key = (heads, kv_heads, head_dim)
        if key not in self.modules:
            dpa = te.DotProductAttention(heads, head_dim, num_gqa_groups=kv_heads, attention_dropout=0.0)
            if group is not None and group.size() > 1:
                dpa.set_context_parallel_group(
                    list(self.groups) if self.method == "a2a+p2p" and self.groups is not None else group,
                    dist.get_process_group_ranks(group),
                    torch.cuda.Stream(),
                    cp_comm_type=self.method,
                )
            self.modules[key] = dpa
        return self.modules[key]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, packed_seq: PackedSeq, group: dist.ProcessGroup | None
    ) -> Tensor:
        """q [t, hq, d]; k, v [t, hkv, d] -> [t, hq, d], 0 in padding. group None: one rank."""
        # --fp8 covers the matrices only. All layers share this module, which delayed scaling could not serve.
        with te.autocast(enabled=False):
            return self._attend(q, k, v, packed_seq, group)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, packed_seq: PackedSeq, group: dist.ProcessGroup | None
    ) -> Tensor:
        dpa = self._module(q.shape[1], k.shape[1], q.shape[2], group)
        if packed_seq.qkv_format == "bshd":
            q4, k4, v4 = (x.unflatten(0, (len(packed_seq.lengths), -1)) for x in (q, k, v))  # [b, s / cp, h, d]
            return dpa(q4, k4, v4, qkv_format="bshd", attn_mask_type="causal").reshape(q.shape)  # [b, s / cp, hq * d]
        if not packed_seq.is_padded:
            return dpa(q, k, v, **thd_arguments(packed_seq)).reshape(q.shape)  # from [t, hq * d]
        # The kernels leave padding undefined, in the output and in the gradients. NaN there would reach the weights
        # through zero gradients: masked_fill stops NaN in both directions.
        cp_size, cp_rank = (1, 0) if group is None else (group.size(), group.rank())
        padding = packed_seq.cached(
            ("te padding", q.device),
            lambda: to_device(packed_seq.padding(cp_size=cp_size, cp_rank=cp_rank), q.device)[:, None, None],
        )  # [t, 1, 1]
        q, k, v = (x.masked_fill(padding, 0) for x in (q, k, v))
        return dpa(q, k, v, **thd_arguments(packed_seq)).reshape(q.shape).masked_fill(padding, 0)


class TEHybridAttention:
    """The layout hybrid: a `TEAttention` with its own group for each degree, called one after another.

    Args:
        groups: this rank's group for each degree above 1.
    """

    def __init__(self, method: str, groups: Groups) -> None:
        self.groups, self.attentions = groups, {degree: TEAttention(method, None) for degree in (1, *groups)}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, packed_seq: PackedSeq, group: dist.ProcessGroup) -> Tensor:
        """As `TEAttention`. In the backward pass autograd runs the degrees in reverse, on all ranks."""

        def build() -> list[DegreeRow]:
            rows = build_degree_rows(packed_seq, cp_size=group.size(), cp_rank=group.rank())
            return [
                replace(row, packed_seq=row.packed_seq.move(lambda x: to_device(x.numpy(), q.device))) for row in rows
            ]

        return torch.cat(
            [
                self.attentions[row.degree](
                    q[row.tokens], k[row.tokens], v[row.tokens], row.packed_seq, self.groups.get(row.degree)
                )
                for row in packed_seq.cached(("te degrees", q.device), build)
            ]
        )


def thd_arguments(packed_seq: PackedSeq) -> dict:
    """`DotProductAttention`'s arguments for a packed row: real and padded lengths, of the whole row on every cp rank.

    `pad_between_seqs` is set explicitly: the default detection misses padding after the last document only
    (TransformerEngine issue 3331).
    """
    real, stored = packed_seq.lengths, packed_seq.padded_lengths
    longest = int(stored[real > 0].max(initial=int(np.min(stored))))  # a multiple of 2 * cp, as every stored length
    return {
        "qkv_format": "thd",
        "attn_mask_type": "padding_causal",
        "cu_seqlens_q": packed_seq.cu_seqlens,
        "cu_seqlens_kv": packed_seq.cu_seqlens,
        "cu_seqlens_q_padded": packed_seq.cu_seqlens_padded,
        "cu_seqlens_kv_padded": packed_seq.cu_seqlens_padded,
        "max_seqlen_q": longest,
        "max_seqlen_kv": longest,
        "pad_between_seqs": packed_seq.is_padded,
    }
