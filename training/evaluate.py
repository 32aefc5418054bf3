"""Validation loss over held-out documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch

from data.batch import Batch
from model.gpt import GPT, Stages
from parallel.collectives import sum_over
from parallel.grid import Grid
from training.step import finish_forward, forward_only
from utils.errors import UserError


def batched(items: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of up to `size` consecutive items (itertools.batched comes with Python 3.12)."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


@torch.no_grad()
def evaluate(
    model: GPT | Stages, batches: Iterable[Batch], grid: Grid, device: torch.device, *, chunk_size: int = 8
) -> tuple[float, int]:
    """Mean loss over every labelled token of the batches of the whole grid, and how many tokens that was.

    Token-weighted: the same number under every layout.

    Args:
        batches: taken `chunk_size` at a time, so that pipeline stages work side by side.
    """
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # loss sum, tokens
    for chunk in batched(batches, chunk_size):
        rows = [batch.to(device) for batch in chunk]
        for row, (_, cross_entropy) in zip(
            rows, forward_only(model, rows, grid), strict=False
        ):  # nothing before the last stage
            totals[0] += cross_entropy
            totals[1] += (row.labels >= 0).sum()
    finish_forward(model)
    loss_sum, tokens = sum_over(sum_over(totals, grid.group("loss")), grid.group("pp")).tolist()
    if not tokens:
        raise UserError("--eval-iters: the validation batches hold no token with a label")
    return loss_sum / tokens, int(tokens)
