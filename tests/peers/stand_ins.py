"""CPU stand-ins for what the peers' code finds on a GPU machine only. Their own code runs unchanged.

`install` must run before a peer is imported. Each stand-in is of a kernel or of a name that a package lacks:

- flash_attn: cp/flash_attn_cpu.py, and its varlen function with autograd.
- aten::_scaled_dot_product_flash_attention and its backward: the CUDA operators that PyTorch's context parallelism
  knows, over PyTorch's CPU flash operators; scaled_dot_product_attention takes them for DTensors.
- torch.cuda.current_device: cpu. accelerate and NeMo AutoModel are told that the CPU is a GPU.
- NCCL's average: gloo's sum, divided; whole numbers round down, as NCCL's.
"""

from __future__ import annotations

import os
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cp import flash_attn_cpu

aten = torch.ops.aten
LIBRARY = torch.library.Library("aten", "IMPL")  # lives as long as the kernels


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, scale):  # type: ignore[override]
        lengths = dict(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
        out, lse, *_ = flash_attn_cpu._flash_attn_varlen_forward(
            q=q, k=k, v=v, **lengths, softmax_scale=scale, causal=True
        )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    def backward(ctx, dout):  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        flash_attn_cpu._flash_attn_varlen_backward(
            dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse, dq=dq, dk=dk, dv=dv, **ctx.lengths,
            softmax_scale=ctx.scale, causal=True,
        )  # fmt: skip
        return dq, dk, dv, None, None, None


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False, deterministic: bool = False,
) -> Tensor:  # fmt: skip
    """q [rows, h, d] -> out [rows, h, d]; a causal mask is aligned to the bottom right."""
    assert causal and not dropout_p
    return _Varlen.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale or q.shape[-1] ** -0.5)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """q [b, sq, h, d], k, v [b, sk, hkv, d] -> out [b, sq, h, d], as one document for each sequence."""
    starts = (torch.arange(len(x) + 1, dtype=torch.int32) * x.shape[1] for x in (q, k))
    rows = (x.flatten(0, 1) for x in (q, k, v))
    return flash_attn_varlen_func(*rows, *starts, q.shape[1], k.shape[1], **options).unflatten(0, q.shape[:2])


def _package() -> dict[str, types.ModuleType]:
    package = types.ModuleType("flash_attn")
    package.__spec__ = ModuleSpec("flash_attn", None)
    package.__version__ = "2.8.3"  # type: ignore[attr-defined]
    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    package.flash_attn_interface = flash_attn_cpu  # type: ignore[attr-defined]
    return {"flash_attn": package, "flash_attn.flash_attn_interface": flash_attn_cpu}


# ---------------------------------------------------------------------------------------------------
# PyTorch's context parallelism


def _flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout_p, is_causal, scale=scale)
    unused = [torch.zeros((), dtype=torch.int64) for _ in range(4)]
    return out, lse, *unused[:2], q.shape[2], k.shape[2], *unused[2:], q.new_zeros(())


def _flash_backward(
    grad_out, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, seed, offset, *, scale=None
):  # fmt: skip
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(grad_out, q, k, v, out, lse, dropout_p, is_causal, scale=scale)


def _sdpa_on_dtensors(original: Any) -> Any:
    from torch.distributed.tensor import DTensor

    def scaled_dot_product_attention(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):  # fmt: skip
        if not isinstance(query, DTensor):
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        assert attn_mask is None  # as CUDA's flash operator, which takes none
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]

    return scaled_dot_product_attention


def _average_on_gloo(original: Any) -> Any:
    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if op != dist.ReduceOp.AVG:
            return original(tensor, op, group, async_op)
        original(tensor, dist.ReduceOp.SUM, group)
        size = dist.get_world_size(group)
        tensor.copy_(tensor / size if tensor.is_floating_point() else tensor // size)

    return all_reduce


def install() -> None:
    """Once a process."""
    sys.modules.update(_package())
    LIBRARY.impl("_scaled_dot_product_flash_attention", _flash, "CPU")
    LIBRARY.impl("_scaled_dot_product_flash_attention_backward", _flash_backward, "CPU")
    functional = torch.nn.functional
    functional.scaled_dot_product_attention = _sdpa_on_dtensors(functional.scaled_dot_product_attention)
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    dist.all_reduce = _average_on_gloo(dist.all_reduce)


def pretend_gpu() -> None:
    """To accelerate and to the block-diagonal exchange, which refuse the CPU."""
    import nemo_automodel.components.distributed.blockdiag_cp.kernels as kernels
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    kernels._varlen_backend_unavailable_reason = lambda *_: None
