"""The model's layers in plain PyTorch, for any device.

`te_layers.py` offers the same names and parameters on Transformer Engine modules, so `transformer.py` is written once.
Parameter names are Transformer Engine's where its parameter is the same matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cp.blocks import accumulator_dtype
from model.rope import apply_rotary, rotary_tables
from parallel.fusion import fused
from parallel.tensor import TensorParallel

__all__ = ["apply_rotary", "rotary_tables"]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (arXiv:1910.07467)."""

    def __init__(self, size: int, *, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class RowParallelLinear(nn.Module):
    """x @ weight.T without bias; this rank holds 1/tp of the inputs: x [t, in / tp], weight [out, in / tp]."""

    def __init__(self, in_features: int, out_features: int, *, dtype: torch.dtype, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(out_features, tp.divide(in_features, "inputs"), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.tp.exit_parallel_region(F.linear(x, self.weight))


class LayerNormLinear(nn.Module):
    """RMSNorm, then a column-parallel linear map: the QKV projection."""

    def __init__(
        self, in_features: int, out_features: int, *, eps: float, dtype: torch.dtype, tp: TensorParallel
    ) -> None:
        super().__init__()
        self.eps, self.tp = eps, tp
        self.layer_norm_weight = nn.Parameter(torch.empty(in_features, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(tp.divide(out_features, "outputs"), in_features, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        x = F.rms_norm(x, self.layer_norm_weight.shape, self.layer_norm_weight, self.eps)
        return F.linear(self.tp.enter_parallel_region(x), self.weight)


@fused
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of equal shapes."""
    return F.silu(gate) * up


@fused
def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, [t, h], and its RMSNorm."""
    x = x + delta
    return x, F.rms_norm(x, weight.shape, weight, eps)


class LayerNormMLP(nn.Module):
    """RMSNorm, then SwiGLU: fc2(silu(gate(x)) * up(x)) (arXiv:2002.05202). Gate and up are two tensors."""

    def __init__(
        self, hidden_size: int, ffn_hidden_size: int, *, eps: float, dtype: torch.dtype, tp: TensorParallel
    ) -> None:
        super().__init__()
        self.eps, self.tp = eps, tp
        ffn = tp.divide(ffn_hidden_size, "ffn channels")
        self.layer_norm_weight = nn.Parameter(torch.empty(hidden_size, dtype=dtype))
        self.gate_weight = nn.Parameter(torch.empty(ffn, hidden_size, dtype=dtype))
        self.up_weight = nn.Parameter(torch.empty(ffn, hidden_size, dtype=dtype))
        self.fc2_weight = nn.Parameter(torch.empty(hidden_size, ffn, dtype=dtype))

    def forward(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """x + delta, and its MLP. Args: delta: what attention adds to the residual stream x."""
        x, norm = add_norm(x, delta, self.layer_norm_weight, self.eps)
        norm = self.tp.enter_parallel_region(norm)
        hidden = swiglu(F.linear(norm, self.gate_weight), F.linear(norm, self.up_weight))
        return x, self.tp.exit_parallel_region(F.linear(hidden, self.fc2_weight))


class _Embedding(torch.autograd.Function):
    """F.embedding, whose gradient is summed in fp32.

    PyTorch sums in bf16 on the CPU, and on CUDA up to 3072 tokens: such a sum stops at 256 equal addends.
    """

    @staticmethod
    def forward(ctx, tokens: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(tokens)
        ctx.rows = len(weight)
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (tokens,) = ctx.saved_tensors
        wide = grad.to(accumulator_dtype(grad.dtype))
        return None, torch.ops.aten.embedding_dense_backward(wide, tokens, ctx.rows, -1, False).to(grad.dtype)


class VocabParallelEmbedding(nn.Module):
    """Lookup in a [padded vocabulary, hidden] table, 1/tp of its rows on each rank; returns the residual stream."""

    def __init__(self, padded_vocab_size: int, hidden_size: int, *, dtype: torch.dtype, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        rows = tp.divide(padded_vocab_size, "padded vocabulary")
        self.weight = nn.Parameter(torch.empty(rows, hidden_size, dtype=dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.tp.size == 1:
            return _Embedding.apply(tokens, self.weight)
        local = tokens - self.tp.rank * len(self.weight)
        is_own = (local >= 0) & (local < len(self.weight))
        # Each token is one rank's row plus the other ranks' zeros: the sum is exact.
        return self.tp.exit_parallel_region(_Embedding.apply(local * is_own, self.weight) * is_own[:, None])
