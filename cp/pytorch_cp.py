"""PyTorch's own context parallelism as a backend (`--cp-backend pytorch`), BSHD.

The public `torch.distributed.tensor.experimental.context_parallel` patches scaled_dot_product_attention and shards
whole buffers; on CPU it fails, because the CPU flash operator has no sharding rule. The templated ring beneath takes
any flash operator, forward and backward, and takes shards: this file calls it on CPU and on CUDA.

No other file imports private names of PyTorch's context parallelism.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from cp.blocks import accumulator_dtype
from cp.packed_seq import PackedSeq
from utils.errors import UserError

aten = torch.ops.aten
SEQUENCE_DIM = 2  # of [b, h, s, d]

PRIVATE_MODULE = "torch.distributed.tensor.experimental._context_parallel._attention"
# The functions that this file calls, with the leading parameters that it passes.
_RING, _SHARDS = ("group", "seq_dim", "op"), ("query", "key", "value")
PRIVATE_FUNCTIONS = {
    "_templated_ring_attention": (*_RING, *_SHARDS, "is_causal"),
    "_templated_ring_attention_backward": (
        *_RING,
        "grad_out",
        "grad_out_name",
        *_SHARDS,
        "out",
        "logsumexp",
        "is_causal",
    ),
    "set_rotate_method": ("rotate_method",),
}
PRIVATE_OPTIONS = ("rotate_method", "enable_load_balance", "convert_to_f32")


def load_private() -> Any:
    """Import the module of PyTorch's ring, and check the names that this file uses.

    Raises:
        UserError: this PyTorch moved or changed a name.
    """
    advice = f"in PyTorch {torch.__version__}: use --cp-backend native, or adapt cp/pytorch_cp.py"
    try:
        module = importlib.import_module(PRIVATE_MODULE)
    except ImportError as error:
        raise UserError(f"--cp-backend pytorch: {PRIVATE_MODULE} is gone {advice}") from error
    for name, wanted in PRIVATE_FUNCTIONS.items():
        function = getattr(module, name, None)
        if function is None:
            raise UserError(f"--cp-backend pytorch: {name} is gone from {PRIVATE_MODULE} {advice}")
        found = tuple(inspect.signature(function).parameters)
        if found[: len(wanted)] != wanted:
            raise UserError(f"--cp-backend pytorch: {name} takes {', '.join(found)} {advice}")
    missing = [name for name in PRIVATE_OPTIONS if not hasattr(getattr(module, "_cp_options", None), name)]
    if missing:
        raise UserError(f"--cp-backend pytorch: its options have no {', '.join(missing)} {advice}")
    return module


torch_cp = load_private()


@contextmanager
def _options(rotate_method: str, load_balance: bool, convert_to_f32: bool) -> Iterator[None]:
    """Set PyTorch's process-wide options for one call, and restore them."""
    options = torch_cp._cp_options
    before = options.rotate_method, options.enable_load_balance, options.convert_to_f32
    try:
        torch_cp.set_rotate_method(rotate_method)
        options.enable_load_balance, options.convert_to_f32 = load_balance, convert_to_f32
        yield
    finally:
        options.rotate_method, options.enable_load_balance, options.convert_to_f32 = before


class _TemplatedRing(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        group: dist.ProcessGroup,
        scale: float,
        rotate_method: str,
        load_balance: bool,
    ) -> Tensor:
        forward = aten._scaled_dot_product_flash_attention
        operator = aten._scaled_dot_product_flash_attention_for_cpu if q.device.type == "cpu" else forward
        # convert_to_f32 is off in fp64: PyTorch's accumulators would be float32.
        ctx.options = (rotate_method, load_balance, q.dtype != torch.float64)
        with _options(*ctx.options):
            out, lse, *rest = torch_cp._templated_ring_attention(
                group, SEQUENCE_DIM, operator, q, k, v, is_causal=True, scale=scale
            )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.group, ctx.scale, ctx.rest = group, scale, rest
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        dtype = q.dtype
        if q.device.type == "cpu":  # as cp/kernels.py
            dout, q, k, v, out = (x.to(accumulator_dtype(dtype)) for x in (dout, q, k, v, out))
        arguments: dict[str, Any] = dict(scale=ctx.scale, dropout_p=0.0)
        operator = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        if q.device.type != "cpu":
            operator = aten._scaled_dot_product_flash_attention_backward.default
            names = ("cum_seq_q", "cum_seq_k", "max_q", "max_k", "philox_seed", "philox_offset")
            arguments |= dict(zip(names, ctx.rest, strict=False))
        with _options(*ctx.options):
            grads = torch_cp._templated_ring_attention_backward(
                ctx.group, SEQUENCE_DIM, operator, dout.contiguous(), "grad_out", q, k, v, out, lse, True, **arguments
            )
        return *(grad.to(dtype) for grad in grads[:3]), None, None, None, None


def pytorch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed_seq: PackedSeq,
    group: dist.ProcessGroup,
    *,
    scale: float,
    rotate_method: str,
    load_balance: bool,
) -> Tensor:
    """Causal attention within each sequence of a BSHD row, [t, hq, d].

    Args:
        q: [t, hq, d]; k, v: [t, hkv, d]; t = T / cp_size; zigzag with `load_balance`, else doc_contiguous.
        rotate_method: `allgather` or `alltoall`.
    """
    sequences = len(packed_seq.lengths)
    q, k, v = (x.unflatten(0, (sequences, -1)).transpose(1, 2) for x in (q, k, v))  # [b, h, s / cp, d]
    out = _TemplatedRing.apply(q, k, v, group, scale, rotate_method, load_balance)
    return out.transpose(1, 2).flatten(0, 1)
