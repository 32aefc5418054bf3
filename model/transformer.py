"""One pre-norm decoder layer: attention, then MLP, each added to the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cp.attention import Attention
from cp.dropout_attention import AttentionDropout
from cp.packed_seq import PackedSeq
from model.config import RECOMPUTE, GPTConfig
from model.dropout import HiddenDropout
from model.layers import Precision
from parallel.keyed_random import key_of
from parallel.tensor import TensorParallel


class RowContext(NamedTuple):
    """What every layer needs to know of the row: made once a microbatch.

    rotary: tables of this rank's tokens, from the `rotary_tables` of the layers.
    token_ids: of the tokens of this rank's residual stream, [t], or [t / tp] with sequence parallelism; None without hidden dropout.
    """

    packed_seq: PackedSeq
    rotary: tuple[Tensor, ...]
    token_ids: Tensor | None = None


class SelfAttention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245) with rotary positions, over the cp group; 1/tp of the groups on each rank."""

    def __init__(
        self,
        config: GPTConfig,
        attention: Attention,
        cp_group: dist.ProcessGroup,
        dtype: torch.dtype,
        tp: TensorParallel,
        dropout: AttentionDropout | None,
        impl: ModuleType,
    ) -> None:
        super().__init__()
        self.config, self.attention, self.cp_group, self.dropout = config, attention, cp_group, dropout
        self.groups = tp.share(config.num_query_groups, "query groups")
        eps = config.norm_epsilon
        self.qkv = impl.LayerNormLinear(config.hidden_size, config.qkv_size, eps=eps, dtype=dtype, tp=tp)
        self.q_norm = impl.RMSNorm(config.kv_channels, eps=eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = impl.RMSNorm(config.kv_channels, eps=eps, dtype=dtype) if config.qk_norm else None
        self.apply_rotary = impl.apply_rotary
        self.output = impl.RowParallelLinear(config.query_size, config.hidden_size, dtype=dtype, tp=tp)

    def project(self, x: Tensor, rotary: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """q [t, hq, d]; k, v [t, g, d], turned by their positions."""
        c = self.config
        qkv = self.qkv(x).view(
            -1, self.groups, c.queries_per_group + 2, c.kv_channels
        )  # [t, g, hq/g + 2, d]; g of this tp rank
        q, k, v = qkv.split((c.queries_per_group, 1, 1), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = self.apply_rotary(q, *rotary).flatten(1, 2)  # [t, hq, d]
        k = self.apply_rotary(k, *rotary).flatten(1, 2)  # [t, g, d]
        return q, k, v.flatten(1, 2)

    def forward(self, x: Tensor, row: RowContext) -> Tensor:
        q, k, v = self.project(x, row.rotary)
        options = {"dropout": self.dropout} if self.dropout is not None and self.training else {}
        out = self.attention(q, k, v, row.packed_seq, self.cp_group, **options)  # [t, hq, d]
        return self.output(out.flatten(1, 2))


class TransformerLayer(nn.Module):
    """x is the residual stream: [t, h], or [t / tp, h] with sequence parallelism.

    Args:
        recompute: what the backward pass computes again instead of keeping it: `none`, `selective` (the MLP, whose activations
            are the widest), or `full` (everything between the layer's input and output). The gradients are the same bits.
        number: of the layer in the whole model.
        seed: of the dropout masks.
        impl: from `model.layers.layers_of`.
        precision: from `model.layers.precision_of`; of training alone: without gradients all is in the compute dtype.
    """

    def __init__(
        self,
        config: GPTConfig,
        attention: Attention,
        cp_group: dist.ProcessGroup,
        dtype: torch.dtype,
        tp: TensorParallel,
        recompute: str = "none",
        *,
        number: int,
        seed: int,
        impl: ModuleType,
        precision: Precision,
    ) -> None:
        super().__init__()
        assert recompute in RECOMPUTE
        self.recompute, self.precision, self.number = recompute, precision, number
        dropped = None
        if config.attention_dropout:
            first_head = tp.rank * tp.share(config.num_attention_heads, "query heads")
            dropped = AttentionDropout(
                config.attention_dropout, key_of(seed, f"dropout layers.{number}.scores"), first_head
            )
        self.attention = SelfAttention(config, attention, cp_group, dtype, tp, dropped, impl)
        self.after_attention = HiddenDropout(config.hidden_dropout, seed=seed, name=f"layers.{number}.attention")
        self.after_mlp = HiddenDropout(config.hidden_dropout, seed=seed, name=f"layers.{number}.mlp")
        self.mlp = impl.LayerNormMLP(
            config.hidden_size, config.ffn_hidden_size, eps=config.norm_epsilon, dtype=dtype, tp=tp
        )

    def forward(self, x: Tensor, row: RowContext) -> Tensor:
        if self.recompute == "full" and torch.is_grad_enabled():
            return _again(self._block, x, row)
        return self._block(x, row)

    def compile_parts(self) -> None:
        """torch.compile what is computed token by token, before and after attention, which stays as it is."""
        self.attention.project = torch.compile(self.attention.project)  # type: ignore[method-assign]
        self.attention.output.compile()
        self.mlp.compile()

    def _block(self, x: Tensor, row: RowContext) -> Tensor:
        with self.precision.of_layer(self.number) if self.training else nullcontext():
            return self._in_precision(x, row)

    def _in_precision(self, x: Tensor, row: RowContext) -> Tensor:
        x = x + self.after_attention(self.attention(x, row), row.token_ids)
        recompute = self.recompute == "selective" and torch.is_grad_enabled()
        return x + self.after_mlp(_again(self._mlp, x) if recompute else self.mlp(x), row.token_ids)

    def _mlp(self, x: Tensor) -> Tensor:
        """With its precision, which the backward pass does not know."""
        with self.precision.of_layer(self.number) if self.training else nullcontext():
            return self.mlp(x)


def _again(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """function(*args), computed anew in the backward pass. Dropout's masks are functions of places, so no random state is kept."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
