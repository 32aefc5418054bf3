"""Forward and backward over the microbatches of one step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from data.loader import Batch
from parallel.fsdp import set_last_microbatch


def forward_backward(
    model: nn.Module, batches: Sequence[Batch], *, loss_tokens: Tensor, device: torch.device, reshard_between: bool
) -> Tensor:
    """Gradients of (sum of all token losses) / `loss_tokens`, summed over the ranks after the last microbatch.

    Args:
        loss_tokens: labelled tokens of the whole step, over every microbatch and rank; one number for all.
        reshard_between: free gathered weights between microbatches.

    Returns:
        This rank's sum of cross-entropies, a float64 scalar on `device`, without a gradient.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for number, batch in enumerate(batches, 1):
        set_last_microbatch(model, number == len(batches), reshard_between=reshard_between)
        batch = batch.to(device)
        loss_sum, cross_entropy = model(batch.tokens, batch.packed_seq, labels=batch.labels)
        (loss_sum / loss_tokens.to(loss_sum.dtype)).backward()
        total += cross_entropy
    return total
