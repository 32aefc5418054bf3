"""Kernels of CUDA and Transformer Engine for the planner: they save and allocate as the real ones, without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from cp.packed_seq import PackedSeq
from model import loss
from model.fused_weights import Fuse
from model.gpt import GPT, Stages, get_chunks
from model.torch_layers import LayerNormMLP
from parallel.fusion import Function, kernels
from planner.counter import counted_kernel
from planner.fake import MemoryLedger


class _Kernel(torch.autograd.Function):
    """Saves its inputs and returns an empty tensor of this shape; the gradients are empty too."""

    @staticmethod
    def forward(ctx: Any, name: str, shape: torch.Size, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*inputs)
        ctx.name = name
        with counted_kernel(name, *inputs) as outputs:
            outputs.append(inputs[0].new_empty(shape))
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        saved = ctx.saved_tensors  # read once: recomputation allows no second time
        with counted_kernel(f"{ctx.name} backward", grad, *saved) as outputs:
            outputs += [torch.empty_like(x, memory_format=torch.contiguous_format) for x in saved]
        return None, None, *outputs


class _Norm(torch.autograd.Function):
    """RMSNorm in one kernel, of x or x + delta, which is a result too. Saves what is normed, and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, delta: Tensor | None) -> Any:  # type: ignore[override]
        norm, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
        added = () if delta is None else (torch.empty_like(x),)
        with counted_kernel("rms_norm", x, weight, *(() if delta is None else (delta,))) as outputs:
            outputs += norm, scale, *added
        ctx.save_for_backward(*added or (x,), weight, scale)
        return (*added, norm) if added else norm

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        with counted_kernel("rms_norm backward", *grads, x, weight, scale) as outputs:
            outputs.append(torch.empty_like(x, memory_format=torch.contiguous_format))
        # The weight's gradient is summed over the tokens in two more kernels, of which the first reads again.
        with counted_kernel("rms_norm weight", grads[-1], x, scale, kernels=2) as of_weight:
            of_weight.append(torch.empty_like(weight))
        return outputs[0], of_weight[0], outputs[0] if len(grads) > 1 else None


def fused_rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
    """PyTorch's kernel. The CPU's operations save more."""
    return _Norm.apply(x, weight, None)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`model.loss._add_product_` of CUDA: the factors are views of one number, so that only `total` takes memory."""
    total.addmm_(*(x.new_empty((), dtype=total.dtype).expand(x.shape) for x in (a, b)))


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """Stand-ins for RMSNorm's kernel and the loss's sum of products, which the CPU computes by other operations."""
    product = mock.patch.object(loss, "_add_product_", _add_product)
    with mock.patch.object(functional, "rms_norm", fused_rms_norm), product:
        yield


def plan_kernels(ledger: MemoryLedger) -> Callable[[Function], Function]:
    """For `parallel.fusion.kernels`: intermediate results take no memory; the backward pass keeps inputs only."""

    def build(function: Function) -> Function:
        # A row of a vocabulary fits no cache: read for its sum, and for its result.
        is_softmax = function.__name__.startswith("_log_softmax")
        times = dict(kernels=2, passes=2) if is_softmax else {}

        def compute(*args: Any) -> Any:
            with ledger.pause(), counted_kernel(function.__name__, *args, **times) as outputs, kernels(None):
                out = function(*args)
                outputs += [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            ledger.add(out)
            return out

        def call(*args: Any) -> Any:
            if not (torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)):
                return compute(*args)
            if function.__name__ == "add_norm":
                x, delta, weight, _ = args
                return _Norm.apply(x, weight, delta)
            return _Kernel.apply(function.__name__, torch.broadcast_shapes(*(x.shape for x in args)), *args)

        return call

    return build


class TEMLP(LayerNormMLP):
    """The MLP of `model.te_layers`: gate and up are fused once a step, in a copy that stays; SwiGLU is one kernel."""

    ledger: MemoryLedger
    fused: Tensor | None = None

    def forward(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        x = x + delta
        gate, up = self.gate_weight, self.up_weight
        if self.fused is None:
            self.fused = gate.new_empty(len(gate) + len(up), gate.shape[1])
            self.ledger.relabel(self.fused, "fused weights")
        norm = fused_rms_norm(x, None, self.layer_norm_weight, self.eps)
        hidden = functional.linear(self.tp.enter_parallel_region(norm), Fuse.apply(gate, up, self.fused))
        activation = _Kernel.apply("swiglu", (len(hidden), len(gate)), hidden)
        return x, self.tp.exit_parallel_region(functional.linear(activation, self.fc2_weight))


def te_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in one kernel, forward and backward, with one table of angles."""
    return _Rotary.apply(x, cos)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(angles)
        return _rotate("rotary", x, angles)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return _rotate("rotary backward", grad, *ctx.saved_tensors), None


def _rotate(name: str, x: Tensor, angles: Tensor) -> Tensor:
    with counted_kernel(name, x, angles) as outputs:
        outputs.append(torch.empty_like(x, memory_format=torch.contiguous_format))
    return outputs[0]


class _FlashAttention(torch.autograd.Function):
    """Attention over the stored documents, whose kernels take q, k and v and give their gradients in bf16."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, packed_seq: PackedSeq) -> Tensor:  # type: ignore[override]
        lengths = (packed_seq.cu_seqlens, packed_seq.cu_seqlens, packed_seq.max_seqlen, packed_seq.max_seqlen)
        out, lse, *ctx.random = torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, True, False)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.lengths = lengths
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:  # type: ignore[override]
        options = *ctx.lengths, 0.0, True, *ctx.random[:2]
        return *torch.ops.aten._flash_attention_backward(dout, *ctx.saved_tensors, *options), None


def te_attention(q: Tensor, k: Tensor, v: Tensor, packed_seq: PackedSeq, group: dist.ProcessGroup) -> Tensor:
    """`cp.te_attention.TEAttention` of one rank: padding is zeroed before and after."""
    if not packed_seq.is_padded:
        return _FlashAttention.apply(q, k, v, packed_seq)
    padding = torch.empty(len(q), 1, 1, dtype=torch.bool, device=q.device)
    q, k, v = (x.masked_fill(padding, 0) for x in (q, k, v))
    return _FlashAttention.apply(q, k, v, packed_seq).masked_fill(padding, 0)


def use_te_mlp(model: GPT | Stages, ledger: MemoryLedger) -> None:
    """Plain MLPs save and allocate as those of Transformer Engine do (2.20.2, module/layernorm_mlp.py)."""
    for chunk in get_chunks(model):
        for layer in chunk.layers.values():
            layer.mlp.__class__ = TEMLP
            layer.mlp.ledger = ledger  # type: ignore[union-attr]
