"""One pre-norm decoder layer: attention, then MLP, each added to the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
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
from model.layers import get_layers
from model.precision import Precision
from parallel.keyed_random import key_of
from parallel.tensor import TensorParallel


@dataclass(frozen=True, kw_only=True)
class GPTOptions:
    """How a model computes. Shapes are in `GPTConfig`; no option changes a checkpoint's names.

    Attributes:
        dtype: of the parameters.
        compute_dtype: FSDP casts parameters to this dtype, hidden states have it; None: `dtype`.
        recompute: activations that the backward pass recomputes: `none`, `selective` (the MLP, whose activations are
            the widest), `full` (everything between a layer's input and output). Gradients are bitwise equal.
        offload_activations: with `full`, inputs of layers wait for the backward pass in pinned host memory.
        dropout_seed: of the dropout masks.
        implementation: of the layers, as `model.layers.get_layers` takes it.
        precision: from `model.layers.build_precision`; applies in training only.
        loss_chunk_size: tokens whose logits exist at a time.
        z_loss: weight of log(Z)^2; 0: off.
    """

    dtype: torch.dtype
    compute_dtype: torch.dtype | None = None
    recompute: str = "none"
    offload_activations: bool = False
    dropout_seed: int = 0
    implementation: str = "torch"
    precision: Precision = field(default_factory=Precision)
    loss_chunk_size: int = 512
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        assert self.recompute in RECOMPUTE


class RowContext(NamedTuple):
    """What every layer reads of the row, made once a microbatch.

    Attributes:
        cp_group: the ranks that hold the row's shards.
        rotary: tables of this rank's tokens, from the layers' `rotary_tables`.
        token_ids: of this rank's residual stream, [t], or [t / tp] with sequence parallelism; None: no hidden dropout.
    """

    packed_seq: PackedSeq
    cp_group: dist.ProcessGroup
    rotary: tuple[Tensor, ...]
    token_ids: Tensor | None = None


class SelfAttention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245) with rotary positions over the cp group.

    A tp rank has 1/tp of the query heads, and the groups that these belong to: 1/tp of them, or one that ranks share.
    The layer's `number` in the whole model names the dropout masks.
    """

    def __init__(
        self, config: GPTConfig, number: int, *, attention: Attention, tp: TensorParallel, options: GPTOptions
    ) -> None:
        super().__init__()
        self.config, self.attention, self.tp = config, attention, tp
        sharing = 1 if tp.kv_group is None else tp.kv_group.size()
        self.groups, rest = divmod(config.num_query_groups * sharing, tp.size)
        assert not rest, "tp does not split the query groups"
        heads = tp.divide(config.num_attention_heads, "query heads")
        self.queries = heads // self.groups  # of each of this rank's groups
        self.first_query = tp.rank % sharing * self.queries
        self.dropout = None
        if config.attention_dropout:
            key = key_of(options.dropout_seed, f"dropout layers.{number}.scores")
            self.dropout = AttentionDropout(config.attention_dropout, key, first_head=tp.rank * heads)
        impl, eps, dtype = get_layers(options.implementation), config.norm_epsilon, options.dtype
        self.qkv = impl.LayerNormLinear(config.hidden_size, config.qkv_size, eps=eps, dtype=dtype, tp=tp)
        self.q_norm = impl.RMSNorm(config.kv_channels, eps=eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = impl.RMSNorm(config.kv_channels, eps=eps, dtype=dtype) if config.qk_norm else None
        self.apply_rotary = impl.apply_rotary
        self.output = impl.RowParallelLinear(config.query_size, config.hidden_size, dtype=dtype, tp=tp)

    def project(self, x: Tensor, rotary: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """q [t, hq, d]; k, v [t, g, d]; q and k rotated by their positions."""
        c = self.config
        # [t, g, hq/g + 2, d], g of this tp rank
        qkv = self.tp.gather_heads(self.qkv(x)).view(-1, self.groups, c.queries_per_group + 2, c.kv_channels)
        if self.queries < c.queries_per_group:  # the other queries are those of the ranks that share the group
            own = qkv[:, :, self.first_query : self.first_query + self.queries]
            qkv = torch.cat((own, qkv[:, :, -2:]), 2)  # frees what is gathered
        q, k, v = qkv.split((self.queries, 1, 1), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = self.apply_rotary(q, *rotary).flatten(1, 2)  # [t, hq, d]
        k = self.apply_rotary(k, *rotary).flatten(1, 2)  # [t, g, d]
        return q, k, v.flatten(1, 2)

    def forward(self, x: Tensor, row: RowContext) -> Tensor:
        q, k, v = self.project(x, row.rotary)
        options = {"dropout": self.dropout} if self.dropout is not None and self.training else {}
        out = self.attention(q, k, v, row.packed_seq, row.cp_group, **options)  # [t, hq, d]
        return self.output(out.flatten(1, 2))


class TransformerLayer(nn.Module):
    """A decoder layer over the residual stream x: [t, h], or [t / tp, h] with sequence parallelism."""

    def __init__(
        self, config: GPTConfig, number: int, *, attention: Attention, tp: TensorParallel, options: GPTOptions
    ) -> None:
        super().__init__()
        self.number, self.recompute, self.precision = number, options.recompute, options.precision
        self.offloads_input = options.offload_activations
        rate, seed = config.hidden_dropout, options.dropout_seed
        self.attention = SelfAttention(config, number, attention=attention, tp=tp, options=options)
        self.after_attention = HiddenDropout(rate, seed=seed, name=f"layers.{number}.attention")
        self.after_mlp = HiddenDropout(rate, seed=seed, name=f"layers.{number}.mlp")
        self.mlp = get_layers(options.implementation).LayerNormMLP(
            config.hidden_size, config.ffn_hidden_size, eps=config.norm_epsilon, dtype=options.dtype, tp=tp
        )

    def forward(self, x: Tensor, row: RowContext) -> Tensor:
        if self.recompute == "full" and torch.is_grad_enabled():
            # What checkpoint keeps is x; tensors saved inside are recomputed and never reach these hooks.
            with torch.autograd.graph.save_on_cpu(pin_memory=True) if self.offloads_input else nullcontext():
                return checkpointed(self._block, x, row)
        return self._block(x, row)

    def compile_parts(self) -> None:
        """torch.compile the token-wise parts before and after attention."""
        self.attention.project = torch.compile(self.attention.project)  # type: ignore[method-assign]
        self.attention.output.compile()
        self.mlp.compile()

    def _precision_context(self) -> AbstractContextManager:
        return self.precision.layer_context(self.number) if self.training else nullcontext()

    def _block(self, x: Tensor, row: RowContext) -> Tensor:
        with self._precision_context():
            added = self.after_attention(self.attention(x, row), row.token_ids)
            recompute = self.recompute == "selective" and torch.is_grad_enabled()
            x, out = checkpointed(self._mlp, x, added) if recompute else self.mlp(x, added)
            return x + self.after_mlp(out, row.token_ids)

    def _mlp(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The MLP in its precision context, which recomputation in the backward pass enters again."""
        with self._precision_context():
            return self.mlp(x, delta)


def checkpointed(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), recomputed in the backward pass. Dropout masks are functions of ids: no RNG state is kept."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
