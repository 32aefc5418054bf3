"""Cross-entropy from hidden states, one chunk of tokens at a time: full logits never exist.

Each tp rank holds the columns of its part of the vocabulary; the ranks exchange two numbers a token.

A chunk's gradients are formed while its logits exist, and kept instead of them: [t, h] and [V, h] instead of [t, V].
The matrix products are the three that any cross-entropy needs; none is repeated.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cp.blocks import accumulator_dtype
from cp.packed_seq import IGNORE_LABEL
from parallel.fusion import fused
from parallel.tensor import TensorParallel


def chunk_starts(num_tokens: int, chunk_size: int) -> range:
    """First token of each chunk. A plan of memory takes the first few (planner/memory.py)."""
    return range(0, num_tokens, chunk_size)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        vocab_size: int,
        chunk_size: int,
        z_loss: float,
        tp: TensorParallel,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulator_dtype(hidden.dtype)
        first = tp.rank * len(weight)  # this rank's first column
        vocab_size = min(max(vocab_size - first, 0), len(weight))  # padded columns take no part in the softmax
        # float64 sums: a row may have a million tokens, and the reported loss must not depend on its chunks.
        cross_entropy = hidden.new_zeros((), dtype=torch.float64)
        penalty = hidden.new_zeros((), dtype=torch.float64)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if needs_grad else None
        for start in chunk_starts(len(hidden), chunk_size):
            chunk = slice(start, start + chunk_size)
            counted = labels[chunk, None] != IGNORE_LABEL  # [c, 1]
            target = labels[chunk, None] - first  # [c, 1]
            is_mine = (target >= 0) & (target < vocab_size)
            target = target * is_mine
            # Products of the whole weight: a slice of odd length would keep GPUs off their tensor cores.
            log_sum, at_target, grad = _chunk_terms(
                hidden[chunk] @ weight.T, target, is_mine, vocab_size, dtype, z_loss, tp, needs_grad
            )
            cross_entropy -= (at_target * counted).sum(dtype=torch.float64)
            if z_loss:
                penalty += z_loss * (log_sum.square() * counted).sum(dtype=torch.float64)
            if grad is not None and grad_hidden is not None and grad_weight is not None:
                # Tokens without loss are zeroed in [c, h], which is narrower than [c, V].
                torch.mul(grad @ weight, counted, out=grad_hidden[chunk])
                _add_product_(grad_weight, grad.T, hidden[chunk] * counted)
            del grad  # before the next chunk's logits exist
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(cross_entropy)
        return (cross_entropy + penalty).to(dtype), cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor, _: Tensor):  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        # Scaled before the cast: 1 / tokens rounded to bf16 would be off by up to 0.4 %.
        grad_hidden = _scaled(grad_hidden, scale, grad_hidden.dtype)
        return grad_hidden, _scaled(grad_weight, scale, ctx.weight_dtype), *(None,) * 6


def _chunk_terms(
    logits: Tensor,
    target: Tensor,
    is_mine: Tensor,
    vocab_size: int,
    dtype: torch.dtype,
    z_loss: float,
    tp: TensorParallel,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """log_sum [c, 1], at_target [c, 1] and the gradient [c, V] of a chunk's logits. Frees all else of [c, V]."""
    parts = logits, target, is_mine, vocab_size, dtype
    if tp.size == 1:
        if needs_grad:
            return _log_softmax_and_grad(*parts, z_loss, logits.dtype)
        return *_log_softmax_at_target(*parts), None
    log_probs, log_sum, at_target = _log_softmax(*parts)
    log_probs, log_sum, at_target = _reduce_over_tp(log_probs, log_sum, at_target, is_mine, tp)
    if not needs_grad:
        return log_sum, at_target, None
    return log_sum, at_target, _grad_of_logits(log_probs, log_sum, target, is_mine, z_loss, logits.dtype)


@fused
def _log_softmax(
    logits: Tensor, target: Tensor, is_mine: Tensor, vocab_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """log_probs [c, V], log_sum [c, 1] and at_target [c, 1], over this rank's columns only.

    Args:
        logits: [c, V]; overwritten where they have the dtype.
        vocab_size: columns that take part.
        dtype: of the results.
    """
    logits = logits.to(dtype)
    logits[:, vocab_size:] = -torch.inf  # their softmax and gradient are 0
    if not vocab_size:  # this rank holds padded columns only
        return logits, logits[:, :1].clone(), torch.zeros_like(logits[:, :1])
    log_probs = torch.log_softmax(logits, -1)
    log_sum = logits[:, :1] - log_probs[:, :1]  # log(Z)
    return log_probs, log_sum, log_probs.gather(1, target) * is_mine


@fused
def _log_softmax_at_target(
    logits: Tensor, target: Tensor, is_mine: Tensor, vocab_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """log_sum and at_target, for evaluation: as a kernel, log_probs never exist in memory."""
    return _log_softmax(logits, target, is_mine, vocab_size, dtype)[1:]


@fused
def _grad_of_logits(
    log_probs: Tensor, log_sum: Tensor, target: Tensor, is_mine: Tensor, z_loss: float, dtype: torch.dtype
) -> Tensor:
    """d(-log p[target]) = softmax - onehot, and d(z log(Z)^2) = 2 z log(Z) softmax. Overwrites `log_probs`."""
    is_kernel = torch.compiler.is_compiling()
    grad = log_probs.exp() if is_kernel else log_probs.exp_()
    if z_loss:
        grad *= 1 + 2 * z_loss * log_sum
    if is_kernel:  # a scatter would need a kernel of its own
        grad -= ((torch.arange(grad.shape[1], device=grad.device) == target) & is_mine).to(grad.dtype)
    else:
        grad.scatter_add_(1, target, -is_mine.to(grad.dtype))
    return grad.to(dtype)


@fused
def _log_softmax_and_grad(
    logits: Tensor,
    target: Tensor,
    is_mine: Tensor,
    vocab_size: int,
    dtype: torch.dtype,
    z_loss: float,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """log_sum, at_target and the gradient of the logits: as a kernel, log_probs never exist in memory."""
    log_probs, log_sum, at_target = _log_softmax(logits, target, is_mine, vocab_size, dtype)
    return log_sum, at_target, _grad_of_logits(log_probs, log_sum, target, is_mine, z_loss, grad_dtype)


@fused
def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.to(scale.dtype) * scale).to(dtype)


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in total's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:  # the sum is part of the product: no bf16 product passes through memory
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b)


def _reduce_over_tp(
    log_probs: Tensor, log_sum: Tensor, at_target: Tensor, is_mine: Tensor, tp: TensorParallel
) -> tuple[Tensor, Tensor, Tensor]:
    """log_probs [c, V / tp], log_sum [c, 1] and at_target [c, 1] of the whole vocabulary. Equal bits on every rank."""
    logit = torch.where(is_mine, at_target + log_sum, 0.0)  # the target's, on its rank; 0 on others
    gathered = tp.gather_columns(torch.cat((log_sum, logit), 1))  # [c, 2 * tp]
    whole = torch.logsumexp(gathered[:, ::2], 1, keepdim=True)
    shift = torch.where(log_sum == -torch.inf, 0.0, log_sum - whole)
    # In place: a new tensor of this size would cost more than the sum.
    return log_probs.add_(shift), whole, gathered[:, 1::2].sum(1, keepdim=True) - whole


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    chunk_size: int,
    z_loss: float = 0.0,
    tp: TensorParallel | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over labelled tokens of -log p(label), plus `z_loss` * log(Z)^2 (PaLM, arXiv:2204.02311).

    Args:
        hidden: [t, h] after the final norm.
        weight: [padded vocabulary / tp, h], this rank's rows; rows from `vocab_size` on get gradient 0.
        labels: [t] int64; `IGNORE_LABEL` for tokens without loss.
        chunk_size: tokens whose logits exist at a time.
        tp: the ranks that share the vocabulary; each rank's gradient of `hidden` is a partial sum over tp.

    Returns:
        The sum to differentiate, a scalar in fp32 (fp64 for fp64 inputs), and its cross-entropy part in fp64 without
        gradient.
    """
    # Inside a Function, inputs require gradients under no_grad too, so grad mode is read here.
    return _ChunkedCrossEntropy.apply(
        hidden, weight, labels, vocab_size, chunk_size, z_loss, tp or TensorParallel(), torch.is_grad_enabled()
    )
