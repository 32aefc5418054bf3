"""The model's layers in plain PyTorch, for any device.

`te_layers.py` offers the same names with the same parameters on Transformer Engine modules, so that
`transformer.py` is written once. Parameter names are Transformer Engine's where it has one name for
the same matrix; `model/names.py` maps the only one it fuses further.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (arXiv:1910.07467)."""

    def __init__(self, size: int, *, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Linear(nn.Module):
    """x @ weight.T without bias; weight [out, in]."""

    def __init__(self, in_features: int, out_features: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class LayerNormLinear(nn.Module):
    """RMSNorm, then a linear map: the block in front of attention."""

    def __init__(self, in_features: int, out_features: int, *, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.layer_norm_weight = nn.Parameter(torch.empty(in_features, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.rms_norm(x, self.layer_norm_weight.shape, self.layer_norm_weight, self.eps), self.weight)


class LayerNormMLP(nn.Module):
    """RMSNorm, then SwiGLU: fc2(silu(gate(x)) * up(x)) (arXiv:2002.05202). Gate and up are two tensors."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int, *, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.layer_norm_weight = nn.Parameter(torch.empty(hidden_size, dtype=dtype))
        self.gate_weight = nn.Parameter(torch.empty(ffn_hidden_size, hidden_size, dtype=dtype))
        self.up_weight = nn.Parameter(torch.empty(ffn_hidden_size, hidden_size, dtype=dtype))
        self.fc2_weight = nn.Parameter(torch.empty(hidden_size, ffn_hidden_size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        x = F.rms_norm(x, self.layer_norm_weight.shape, self.layer_norm_weight, self.eps)
        return F.linear(F.silu(F.linear(x, self.gate_weight)) * F.linear(x, self.up_weight), self.fc2_weight)


class VocabEmbedding(nn.Module):
    """Rows of a [padded vocabulary, hidden] table."""

    def __init__(self, padded_vocab_size: int, hidden_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(padded_vocab_size, hidden_size, dtype=dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)
