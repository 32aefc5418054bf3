"""flash-attn's four functions that ring-flash-attn calls, over PyTorch's CPU flash operators.

So CPU ranks run the library's own ring logic. The library passes all arguments by name. Names, output layouts and mask
alignment are flash-attn 2.8's: the log-sum-exp is float32, [batch, heads, rows] for the dense functions and
[heads, total rows] for the varlen functions; a causal mask is aligned to the bottom right. CUDA tensors pass through
the host, for tests of the library's rings on a GPU without flash-attn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cp.blocks import accumulator_dtype

aten = torch.ops.aten

# Values of the options without effect; other values are refused.
NEUTRAL = {"dropout_p": 0.0, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}
IGNORED = ("deterministic", "max_seqlen_q", "max_seqlen_k", "return_softmax")


def _check(options: dict[str, Any]) -> None:
    """Raises: NotImplementedError: an option that changes the result."""
    for name, value in options.items():
        if name not in IGNORED and not (name in NEUTRAL and value == NEUTRAL[name]):
            raise NotImplementedError(f"flash-attn on CPU has no {name} {value}")


def _mask(q: Tensor, k: Tensor, causal: bool) -> dict:
    """Mask arguments for q [b, sq, h, d], k [b, sk, h, d]; the operators align their causal mask to the top left."""
    queries, keys = q.shape[1], k.shape[1]
    if not causal or queries == keys:
        return {"is_causal": causal}
    hidden = torch.ones(queries, keys, dtype=torch.bool, device="cpu").triu(keys - queries + 1)
    return {"attn_mask": torch.zeros(queries, keys, dtype=q.dtype, device="cpu").masked_fill_(hidden, float("-inf"))}


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """q [b, sq, h, d]; k, v [b, sk, hkv, d] -> out [b, sq, h, d], lse [b, h, sq]."""
    inputs = (x.cpu().transpose(1, 2) for x in (q, k, v))  # [b, h, s, d]
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*inputs, 0.0, scale=scale, **_mask(q, k, causal))
    return out.transpose(1, 2).to(q.device), lse.to(q.device)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, ...]:
    """dq, dk, dv in the layouts of q, k, v, given the final out and lse of the whole attention."""
    mask = _mask(q, k, causal)
    dtype = accumulator_dtype(q.dtype)  # as cp/kernels.py
    inputs = (x.to("cpu", dtype).transpose(1, 2) for x in (dout, q, k, v, out))
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *inputs, lse.cpu(), 0.0, mask.pop("is_causal", False), scale=scale, **mask
    )
    return tuple(grad.transpose(1, 2).to(q.device) for grad in grads)


def _flash_attn_forward(
    *, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, **options: Any
) -> tuple[Tensor, Tensor, None, None]:
    """q [b, sq, h, d] -> out [b, sq, h, d], lse [b, h, sq]."""
    _check(options)
    return *_forward(q, k, v, softmax_scale, causal), None, None


def _flash_attn_backward(
    *, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, softmax_scale: float, causal: bool, **options: Any,
) -> Tensor:  # fmt: skip
    """Writes dq, dk and dv."""
    _check(options)
    grads = _backward(dout, q, k, v, out, softmax_lse, softmax_scale, causal)
    for target, grad in zip((dq, dk, dv), grads, strict=True):
        target.copy_(grad)
    return softmax_lse


def _flash_attn_varlen_forward(
    *, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    softmax_scale: float, causal: bool, **options: Any,
) -> tuple[Tensor, Tensor, None, None]:  # fmt: skip
    """q [rows, h, d] -> out [rows, h, d], lse [h, rows]."""
    _check(options)
    out = torch.zeros_like(q)
    lse = torch.full((q.shape[1], len(q)), float("-inf"), device=q.device)
    for at_q, at_k in _sequences(cu_seqlens_q, cu_seqlens_k):
        part, part_lse = _forward(q[None, at_q], k[None, at_k], v[None, at_k], softmax_scale, causal)
        out[at_q], lse[:, at_q] = part[0], part_lse[0]
    return out, lse, None, None


def _flash_attn_varlen_backward(
    *, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    softmax_scale: float, causal: bool, **options: Any,
) -> Tensor:  # fmt: skip
    """Writes dq, dk and dv."""
    _check(options)
    for at_q, at_k in _sequences(cu_seqlens_q, cu_seqlens_k):
        queries, keys, values = q[None, at_q], k[None, at_k], v[None, at_k]
        lse = softmax_lse[None, :, at_q]
        grads = _backward(dout[None, at_q], queries, keys, values, out[None, at_q], lse, softmax_scale, causal)
        dq[at_q], dk[at_k], dv[at_k] = (grad[0] for grad in grads)
    return softmax_lse


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[slice, slice]]:
    """Query and key rows of each document that has both."""
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    pairs = [(slice(*q[i : i + 2]), slice(*k[i : i + 2])) for i in range(len(q) - 1)]
    return [(at_q, at_k) for at_q, at_k in pairs if at_q.start < at_q.stop and at_k.start < at_k.stop]
