"""Cross-entropy from hidden states, a chunk of tokens at a time, so that full logits never exist.

The gradients of a chunk are formed while its logits are at hand and kept in place of them ([t, h] and
[V, h] instead of [t, V]); the matrix products are the three that any cross-entropy needs, none twice.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cp.packed_seq import IGNORE_LABEL


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, chunk_size: int, z_loss: float, wants_grad: bool
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        real_weight = weight[:vocab_size]  # padded columns take no part in the softmax
        cross_entropy = hidden.new_zeros((), dtype=dtype)
        penalty = hidden.new_zeros((), dtype=dtype)
        grad_hidden = torch.empty_like(hidden) if wants_grad else None
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if wants_grad else None
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            counted = labels[rows, None] != IGNORE_LABEL  # [c, 1]
            target = labels[rows, None].clamp(min=0)  # [c, 1]
            logits = (hidden[rows] @ real_weight.T).to(dtype)  # [c, V]
            log_probs = torch.log_softmax(logits, -1)
            cross_entropy -= (log_probs.gather(1, target) * counted).sum()
            if z_loss:
                log_sum = logits[:, :1] - log_probs[:, :1]  # [c, 1] log(Z)
                penalty += z_loss * (log_sum.square() * counted).sum()
            if grad_hidden is None or grad_weight is None:
                continue
            # d(-log p[target]) = softmax - onehot, and d(z log(Z)^2) = 2 z log(Z) softmax.
            grad = log_probs.exp_()
            if z_loss:
                grad *= 1 + 2 * z_loss * log_sum
            grad.scatter_add_(1, target, grad.new_full((), -1.0).expand(target.shape))
            grad = grad.to(hidden.dtype)
            # Rows that do not count are zeroed on the narrow side, [c, h] instead of [c, V].
            torch.mul(grad @ real_weight, counted, out=grad_hidden[rows])
            counted_hidden = hidden[rows] * counted
            if grad_weight.dtype == grad.dtype:
                grad_weight[:vocab_size].addmm_(grad.T, counted_hidden)
            else:
                grad_weight[:vocab_size] += grad.T @ counted_hidden
        if wants_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(cross_entropy)
        return cross_entropy + penalty, cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor, _: Tensor):  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        # In the accumulator's precision first: 1 / tokens rounded to bf16 would be off by up to 0.4 %.
        return (
            (grad_hidden.to(scale.dtype) * scale).to(grad_hidden.dtype),
            (grad_weight * scale).to(ctx.weight_dtype),
            *(None,) * 5,
        )


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, vocab_size: int, chunk_size: int, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Sum over the labelled tokens of -log p(label), plus `z_loss` * log(Z)^2 (PaLM, arXiv:2204.02311).

    Args:
        hidden: [t, h] after the final norm.
        weight: [padded vocabulary, h]; rows from `vocab_size` on get gradient 0.
        labels: [t] int64; `IGNORE_LABEL` where no loss is wanted.
        chunk_size: tokens whose logits exist at a time.

    Returns:
        The sum to differentiate, and the cross-entropy part of it without a gradient; both scalars, fp32
        (fp64 for fp64 inputs).
    """
    # Inside a Function a weight asks for its gradient under no_grad too, so that is decided here.
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, vocab_size, chunk_size, z_loss, torch.is_grad_enabled())
