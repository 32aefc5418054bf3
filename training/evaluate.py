"""Validation loss over held-out documents."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from data.loader import Batch
from parallel.collectives import sum_over
from parallel.fsdp import reshard_model
from parallel.grid import Grid


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], grid: Grid, device: torch.device) -> tuple[float, int]:
    """Mean loss over every labelled token of the batches of the whole grid, and how many tokens that was.

    Token-weighted: the same number under every layout.
    """
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # loss sum, tokens
    for batch in batches:
        batch = batch.to(device)
        _, cross_entropy = model(batch.tokens, batch.packed_seq, labels=batch.labels)
        totals[0] += cross_entropy
        totals[1] += (batch.labels >= 0).sum()
    reshard_model(model)
    model.train()
    loss_sum, tokens = sum_over(totals, grid.group("loss")).tolist()
    if not tokens:
        raise ValueError("--eval-iters: the validation batches hold no token with a label")
    return loss_sum / tokens, int(tokens)
