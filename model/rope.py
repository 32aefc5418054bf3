"""Rotary position embeddings (arXiv:2104.09864), rotating the two halves of each head."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.config import GPTConfig
from parallel.fusion import fused

# Llama 3.1: frequencies with fewer turns over the original length are scaled, those with more than the second are not.
LLAMA3_TURNS = (1.0, 4.0)


def rotary_frequencies(config: GPTConfig, device: torch.device | None = None) -> Tensor:
    """[head_dim / 2] float64 radians a position: base^(-2i/d), scaled for contexts beyond the trained length.

    `linear` divides all by the factor (position interpolation, arXiv:2306.15595). `llama3` divides frequencies with
    less than one turn over the original length, keeps those with more than four, and interpolates between (Llama 3.1).
    """
    head_dim, factor = config.kv_channels, config.rope_scaling_factor
    frequency = config.rotary_base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    if config.rope_scaling == "none":
        return frequency
    if config.rope_scaling == "linear":
        return frequency / factor
    assert config.rope_scaling == "llama3"
    low, high = LLAMA3_TURNS
    turns = config.rope_original_seq_length * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequency * kept + frequency / factor * (1 - kept)


def rotary_tables(positions: Tensor, frequencies: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, [t, head_dim / 2] each, made once a microbatch.

    Angles are float64: in float32 the angle of position 1,000,000 is off by 0.06.

    Args:
        positions: [t] int64, restarting at each document; on the device of `frequencies`.
        dtype: of the tables; fp32, or fp64 in an fp64 run.
    """
    angle = positions.to(torch.float64)[:, None] * frequencies  # [t, d/2]
    return angle.cos().to(dtype), angle.sin().to(dtype)


@fused
def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [t, ..., d] rotated by the angles of [t, d/2] tables; computed in the tables' dtype, returned in x's."""
    shape = (len(cos), *([1] * (x.dim() - 2)), cos.shape[1])
    cos, sin = cos.view(shape), sin.view(shape)
    first, second = x.to(cos.dtype).chunk(2, -1)  # [t, ..., d/2] each
    if torch.compiler.is_compiling():  # the compiler fuses plain operations
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
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
    """The gradient is the inverse rotation, so only the tables are saved."""

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
    """x [t, ..., d] rotated by its tokens' positions; a new contiguous tensor."""
    return (_rotate if torch.compiler.is_compiling() else _Rotary.apply)(x, cos, sin)  # no Function is fused
