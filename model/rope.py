"""Rotary position embeddings (arXiv:2104.09864), rotating the two halves of each head."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotary_tables(positions: Tensor, *, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2i/d), once a microbatch.

    Angles are taken in float64: in float32 the angle of position 1,000,000 is off by 0.06.

    Args:
        positions: [t] int64, restarting at each document.
        dtype: of the tables; fp32, or fp64 in an fp64 run.

    Returns:
        Two tensors [t, head_dim / 2].
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angle = positions.to(torch.float64)[:, None] * base**-exponent  # [t, d/2]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [t, ..., d] turned by the angles of [t, d/2] tables; computed in the tables' dtype, returned in x's."""
    shape = (len(cos), *([1] * (x.dim() - 2)), cos.shape[1])
    cos, sin = cos.view(shape), sin.view(shape)
    first, second = x.to(cos.dtype).chunk(2, -1)  # [t, ..., d/2] each
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out_first, out_second = out.chunk(2, -1)
    if x.dtype == cos.dtype:
        torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    else:
        out_first.copy_((first * cos).addcmul_(second, sin, value=-1))
        out_second.copy_((second * cos).addcmul_(first, sin))
    return out


class _Rotary(torch.autograd.Function):
    """A rotation's gradient is the rotation back, so nothing but the tables is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [t, ..., d] rotated by its token's position; a new contiguous tensor."""
    return _Rotary.apply(x, cos, sin)
