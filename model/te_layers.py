"""The layers of `torch_layers.py` on Transformer Engine modules: the same names, parameters, shapes and call. CUDA only.

Imported where `--transformer-impl te` asks for it. Parameters are the canonical ones, so that sharding, initial weights, the gradient
norm and checkpoints know nothing of Transformer Engine. What it is told of tensor parallelism are the grid's own groups.
"""

from __future__ import annotations

import torch
import transformer_engine.pytorch as te
from torch import Tensor, nn
from torch.func import functional_call

from model.torch_layers import ColumnParallelLinear, VocabParallelEmbedding
from parallel.tensor import TensorParallel

__all__ = ["ColumnParallelLinear", "LayerNormLinear", "LayerNormMLP", "RMSNorm", "RowParallelLinear", "VocabParallelEmbedding"]


def _parallel(tp: TensorParallel) -> dict:
    """What every module of Transformer Engine is told of the ranks that share it."""
    if tp.size == 1:
        return {"tp_group": None, "tp_size": 1, "sequence_parallel": False}
    return {"tp_group": tp.group, "tp_size": tp.size, "sequence_parallel": tp.sequence_parallel}


def _device() -> str:
    """Where parameters are made, as Transformer Engine compares it: a `torch.device` is never its "meta"."""
    return str(torch.get_default_device())


class RMSNorm(te.RMSNorm):
    """x / rms(x) * weight over the last axis (arXiv:1910.07467)."""

    def __init__(self, size: int, *, eps: float, dtype: torch.dtype) -> None:
        super().__init__(size, eps=eps, params_dtype=dtype, device=_device())


class RowParallelLinear(te.Linear):
    """x @ weight.T without bias; this rank holds 1/tp of the inputs: x [t, in / tp], weight [out, in / tp]."""

    def __init__(self, in_features: int, out_features: int, *, dtype: torch.dtype, tp: TensorParallel) -> None:
        tp.share(in_features, "inputs")
        mode = "row" if tp.size > 1 else None
        super().__init__(in_features, out_features, bias=False, params_dtype=dtype, parallel_mode=mode, device=_device(), **_parallel(tp))


class LayerNormLinear(te.LayerNormLinear):
    """RMSNorm, then a column-parallel linear map: the block in front of attention."""

    def __init__(self, in_features: int, out_features: int, *, eps: float, dtype: torch.dtype, tp: TensorParallel) -> None:
        tp.share(out_features, "outputs")
        super().__init__(
            in_features,
            out_features,
            eps=eps,
            bias=False,
            normalization="RMSNorm",
            params_dtype=dtype,
            parallel_mode="column" if tp.size > 1 else None,
            device=_device(),
            **_parallel(tp),
        )


class LayerNormMLP(nn.Module):
    """RMSNorm, then SwiGLU: fc2(silu(gate(x)) * up(x)) (arXiv:2002.05202). Gate and up are two tensors.

    Transformer Engine's module wants them as one, the gate's rows above the up's. They are joined for each call: a shard of the joined
    tensor would be a piece of both, which no checkpoint of another layout could read. The copy costs the weights' bytes once.
    """

    def __init__(self, hidden_size: int, ffn_hidden_size: int, *, eps: float, dtype: torch.dtype, tp: TensorParallel) -> None:
        super().__init__()
        ffn = tp.share(ffn_hidden_size, "ffn channels")
        self.layer_norm_weight = nn.Parameter(torch.empty(hidden_size, dtype=dtype))
        self.gate_weight = nn.Parameter(torch.empty(ffn, hidden_size, dtype=dtype))
        self.up_weight = nn.Parameter(torch.empty(ffn, hidden_size, dtype=dtype))
        self.fc2_weight = nn.Parameter(torch.empty(hidden_size, ffn, dtype=dtype))
        module = te.LayerNormMLP(
            hidden_size,
            ffn_hidden_size,
            eps=eps,
            bias=False,
            normalization="RMSNorm",
            activation="swiglu",
            params_dtype=dtype,
            set_parallel_mode=tp.size > 1,
            device="meta",
            **_parallel(tp),
        )
        self.hidden = (module,)  # from nn.Module, in a tuple: its own parameters stay on the meta device, ours stand in for them

    def forward(self, x: Tensor) -> Tensor:
        weights = {
            "layer_norm_weight": self.layer_norm_weight,
            "fc1_weight": torch.cat((self.gate_weight, self.up_weight)),  # [2 * ffn / tp, h]
            "fc2_weight": self.fc2_weight,
        }
        return functional_call(self.hidden[0], weights, (x,))
