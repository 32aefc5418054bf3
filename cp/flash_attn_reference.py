"""The four functions of `flash_attn.flash_attn_interface` that ring-flash-attn calls, in plain PyTorch.

For CPU ranks, so that the library's own ring logic runs without a GPU. Signatures, output layouts and
mask alignment are those of flash-attn 2.8: the log-sum-exp is float32, (batch, heads, rows) for the dense
functions and (heads, total rows) for the varlen ones; a causal mask is aligned to the bottom right. It is a
reference: scores of one sequence are formed whole.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _check(dropout_p: float, window_left: int, window_right: int, softcap: float, alibi_slopes: Tensor | None) -> None:
    if dropout_p or (window_left, window_right) != (-1, -1) or softcap or alibi_slopes is not None:
        raise NotImplementedError("the CPU reference has no dropout, window, softcap or ALiBi")


def _probabilities(q: Tensor, k: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Softmax [h, sq, sk] and log-sum-exp [h, sq] in at least float32. q [sq, h, d], k [sk, h, d]."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if causal:
        rows, columns = scores.shape[1:]
        hidden = torch.ones(rows, columns, dtype=torch.bool, device=q.device).triu(columns - rows + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    # A row that sees no key has lse -inf and output 0.
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]), lse


def _wide(x: Tensor, heads: int | None = None) -> Tensor:
    """In the dtype that is computed in, key/value heads repeated to `heads`."""
    x = x if x.dtype == torch.float64 else x.float()
    return x if heads is None else x.repeat_interleave(heads // x.shape[1], 1)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    heads = q.shape[1]
    probabilities, lse = _probabilities(_wide(q), _wide(k, heads), scale, causal)
    return torch.einsum("hqk,khd->qhd", probabilities, _wide(v, heads)).to(q.dtype), lse.float()


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, ...]:
    """dq, dk, dv of one sequence with an out and lse from outside, as flash-attn computes them."""
    heads, kv_heads = q.shape[1], k.shape[1]
    wide_q, wide_k, wide_v, wide_dout = _wide(q), _wide(k, heads), _wide(v, heads), _wide(dout)
    scores = torch.einsum("qhd,khd->hqk", wide_q, wide_k) * scale
    if causal:
        rows, columns = scores.shape[1:]
        hidden = torch.ones(rows, columns, dtype=torch.bool, device=q.device).triu(columns - rows + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    probabilities = torch.exp(scores - lse.to(scores.dtype)[..., None])
    delta = (wide_dout * _wide(out)).sum(-1).T[..., None]  # [h, sq, 1]
    dscores = probabilities * (torch.einsum("qhd,khd->hqk", wide_dout, wide_v) - delta) * scale
    dq = torch.einsum("hqk,khd->qhd", dscores, wide_k)
    dk = torch.einsum("hqk,qhd->khd", dscores, wide_q).unflatten(1, (kv_heads, -1)).sum(2)
    dv = torch.einsum("hqk,qhd->khd", probabilities, wide_dout).unflatten(1, (kv_heads, -1)).sum(2)
    return dq, dk, dv


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, None, None]:
    """q [b, sq, h, d] -> out [b, sq, h, d], lse [b, h, sq]."""
    _check(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
    results = [_forward(q[i], k[i], v[i], softmax_scale, causal) for i in range(len(q))]
    return torch.stack([out for out, _ in results]), torch.stack([lse for _, lse in results]), None, None


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes dq, dk and dv."""
    _check(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
    for i in range(len(q)):
        grads = _backward(dout[i], q[i], k[i], v[i], out[i], softmax_lse[i], softmax_scale, causal)
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target[i] = grad
    return softmax_lse


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, None, None]:
    """q [rows, h, d] -> out [rows, h, d], lse [h, rows]."""
    _check(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
    out = torch.zeros_like(q)
    lse = torch.full((q.shape[1], len(q)), float("-inf"), device=q.device)
    for at_q, at_k in _sequences(cu_seqlens_q, cu_seqlens_k):
        out[at_q], lse[:, at_q] = _forward(q[at_q], k[at_k], v[at_k], softmax_scale, causal)
    return out, lse, None, None


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """Writes dq, dk and dv."""
    _check(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
    for at_q, at_k in _sequences(cu_seqlens_q, cu_seqlens_k):
        grads = _backward(dout[at_q], q[at_q], k[at_k], v[at_k], out[at_q], softmax_lse[:, at_q], softmax_scale, causal)
        dq[at_q], dk[at_k], dv[at_k] = (g.to(t.dtype) for g, t in zip(grads, (dq, dk, dv), strict=True))
    return softmax_lse


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[slice, slice]]:
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return [(slice(*q[i : i + 2]), slice(*k[i : i + 2])) for i in range(len(q) - 1)]
