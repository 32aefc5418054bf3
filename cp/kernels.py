"""Attention of one block with its log-sum-exp, on PyTorch's flash kernels.

A merged (ring) attention needs operators whose backward takes `out` and log-sum-exp from outside. Two ATen pairs do:

- CPU: `_scaled_dot_product_flash_attention_for_cpu`, one call a run of equal documents; fp64, fp32, bf16.
- CUDA: `_flash_attention_forward` with cu_seqlens, one call a block with all its documents; bf16.

PyTorch's autograd formulas of these operators drop the gradient of the log-sum-exp, so an autograd Function of our own
calls the raw operators.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cp.blocks import Block, Segments, accumulator_dtype, take_tokens
from cp.dropout_attention import AttentionOptions, dropout_backward, dropout_forward


def _run_view(x: Tensor, count: int, at: Segments) -> Tensor:
    """[t, h, d] -> [count, h, length, d] view of `count` segments."""
    row, head, channel = x.stride()
    shape, strides = (count, x.shape[1], at.length, x.shape[2]), (at.distance * row, head, row, channel)
    return x.as_strided(shape, strides, x.storage_offset() + at.start * row)


def cat_tokens(parts: Sequence[Tensor]) -> Tensor:
    """Concatenated; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for run in block.runs:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _run_view(q, run.count, run.q),
            _run_view(k, run.count, run.k),
            _run_view(v, run.count, run.k),
            0.0,
            block.causal,
            scale=scale,
        )
        outs.append(out.transpose(1, 2).flatten(0, 1))  # [count * length, h, d]
        lses.append(lse.transpose(1, 2).flatten(0, 1))  # [count * length, h]
    return cat_tokens(outs), cat_tokens(lses)


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # In bf16 the kernel would sum dk and dv over blocks of queries and over query heads in bf16.
    dout, q, k, v, out = (x.to(accumulator_dtype(x.dtype)) for x in (dout, q, k, v, out))
    grads: tuple[list[Tensor], ...] = ([], [], [])
    tensors = (dout, q, k, v, out, lse[..., None])
    for run in block.runs:
        sides = (run.q, run.q, run.k, run.k, run.q, run.q)
        *views, run_lse = (_run_view(x, run.count, at) for x, at in zip(tensors, sides, strict=True))
        run_grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *views, run_lse[..., 0], 0.0, block.causal, scale=scale
        )
        for parts, grad in zip(grads, run_grads, strict=True):
            parts.append(grad.transpose(1, 2).flatten(0, 1))
    return cat_tokens(grads[0]), cat_tokens(grads[1]), cat_tokens(grads[2])


def _cuda_lengths(block: Block) -> tuple[Tensor | None, Tensor | None, int, int]:
    return block.cu_q, block.cu_k, block.max_q, block.max_k


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]:
    k, v = take_tokens(k, block.k_tokens), take_tokens(v, block.k_tokens)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *_cuda_lengths(block), 0.0, block.causal, False, scale=scale
    )
    return out, lse.transpose(0, 1)  # from [h, tokens]


def _cuda_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    k, v = take_tokens(k, block.k_tokens), take_tokens(v, block.k_tokens)
    inputs = (dout.contiguous(), q, k, v, out, lse.transpose(0, 1).contiguous())
    # Without dropout the kernel reads neither the random state nor the tensor after it.
    random_state = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        *inputs, *_cuda_lengths(block), 0.0, block.causal, *random_state, scale=scale
    )


def block_forward(q: Tensor, k: Tensor, v: Tensor, block: Block, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """Attention of the block's queries over its keys; with dropout, by explicit scores instead of the kernel.

    Args:
        q: [n, hq, d]; k, v: [t, hkv, d], hkv divides hq.

    Returns:
        out [n, hq, d] in q's dtype and lse [n, hq] (natural log) in fp32 or fp64.
    """
    if options.dropout is not None:
        return dropout_forward(q, k, v, block, options)
    forward = _cpu_forward if block.cu_q is None else _cuda_forward
    return forward(q, k, v, block, options.scale)


def block_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block, options: AttentionOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's part of the gradients, given the final out and lse of the whole attention.

    Args:
        dout, q, out: [n, hq, d]; k, v: [t, hkv, d]; lse: [n, hq].

    Returns:
        dq [n, hq, d]; dk and dv for `block.k_tokens`.
    """
    if options.dropout is not None:
        return dropout_backward(dout, q, k, v, out, lse, block, options)
    backward = _cpu_backward if block.cu_q is None else _cuda_backward
    return backward(dout, q, k, v, out, lse, block, options.scale)
