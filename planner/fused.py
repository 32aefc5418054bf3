"""Kernels of CUDA and Transformer Engine for the planner: they save and allocate as the real ones, without data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from model.gpt import GPT, Stages, get_chunks
from model.torch_layers import LayerNormMLP
from planner.counter import counted_kernel
from planner.fake import MemoryLedger


class _Kernel(torch.autograd.Function):
    """Saves `saved` and returns an empty tensor of this shape; the gradients are empty too."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, name: str, shape: torch.Size, saved: tuple[Tensor, ...], *inputs: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*inputs, *saved)
        ctx.name, ctx.number = name, len(inputs)
        with counted_kernel(name, *inputs) as outputs:
            outputs += inputs[0].new_empty(shape), *saved
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        # A weight's gradient is summed over the tokens in two more kernels, of which the first reads everything again.
        inputs, has_weight = ctx.saved_tensors[: ctx.number], ctx.number > 1
        reads = (grad, *ctx.saved_tensors)
        with counted_kernel(f"{ctx.name} backward", *reads, kernels=1 + 2 * has_weight, passes=1 + has_weight) as outputs:
            outputs += [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        return None, None, None, *outputs


def fused_rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm in one kernel: saves its input and one number a row. The CPU's operations save more."""
    return _Kernel.apply("rms_norm", x.shape, (x.new_empty(x.shape[:-1], dtype=torch.float32),), x, weight)


class _Fuse(torch.autograd.Function):
    """Two weights as one that exists already."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, fused: Tensor) -> Tensor:  # type: ignore[override]
        return fused.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return *grad.chunk(2), None


class TEMLP(LayerNormMLP):
    """The MLP of `model.te_layers`: gate and up are fused once a step, in a copy that stays; SwiGLU is one kernel."""

    ledger: MemoryLedger
    fused: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_weight, self.up_weight
        if self.fused is None:
            self.fused = gate.new_empty(len(gate) + len(up), gate.shape[1])
            self.ledger.relabel(self.fused, "fused weights")
        norm = fused_rms_norm(x, None, self.layer_norm_weight, self.eps)
        hidden = functional.linear(self.tp.enter_parallel_region(norm), _Fuse.apply(gate, up, self.fused))
        activation = _Kernel.apply("swiglu", (len(hidden), len(gate)), (), hidden)
        return self.tp.exit_parallel_region(functional.linear(activation, self.fc2_weight))


def use_te_mlp(model: GPT | Stages, ledger: MemoryLedger) -> None:
    """Plain MLPs save and allocate as those of Transformer Engine do (2.20.2, module/layernorm_mlp.py)."""
    for chunk in get_chunks(model):
        for layer in chunk.layers.values():
            layer.mlp.__class__ = TEMLP
            layer.mlp.ledger = ledger  # type: ignore[union-attr]
