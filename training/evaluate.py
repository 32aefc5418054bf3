"""Validation loss over held-out documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from data.batch import Batch, BatchPlan
from data.dataset import BlendedDataset, SampleDataset
from data.loader import build_loader
from metrics.log import HeldOut, MetricsLog
from metrics.timers import Timers
from model.gpt import GPT, Stages
from parallel.collectives import sum_over
from parallel.grid import Grid
from runtime.distributed import Ranks
from runtime.signals import StopRequested, StopRequests
from training.step import finish_forward, forward_only
from utils.logger import log


def batched(items: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of up to `size` consecutive items (itertools.batched needs Python 3.12)."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


@torch.no_grad()
def evaluate(
    model: GPT | Stages,
    batches: Iterable[Batch],
    grid: Grid,
    device: torch.device,
    *,
    token_bytes: Tensor | None,
    stops: StopRequests,
) -> HeldOut:
    """Mean loss over every labelled token of the batches of the whole grid. Collective.

    The mean is over tokens: the same number under every layout.

    Args:
        token_bytes: [vocab_size] int64 bytes of text that each token stands for; None: not known.

    Raises:
        StopRequested: a request to stop came in between two batches.
    """
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss sum, tokens, bytes of text
    sizes = None if token_bytes is None else token_bytes.to(device)
    for chunk in batched(batches, 8 if grid.size("pp") > 1 else 1):  # several: pipeline stages overlap
        stops.start_sync()
        rows = [batch.to(device) for batch in chunk]
        for row, (_, cross_entropy) in zip(rows, forward_only(model, rows, grid), strict=False):  # last stage only
            totals[0] += cross_entropy
            is_labelled = row.labels >= 0
            totals[1] += is_labelled.sum()
            if sizes is not None:
                totals[2] += (sizes[row.labels.clamp(min=0)] * is_labelled).sum()
        if reason := stops.request():
            finish_forward(model)
            raise StopRequested(reason)
    finish_forward(model)
    loss_sum, tokens, text_bytes = sum_over(sum_over(totals, grid.group("loss")), grid.group("pp")).tolist()
    return HeldOut(loss_sum / tokens if tokens else None, int(tokens), int(text_bytes))


@dataclass(frozen=True)
class Validator:
    """Validates the model and logs the loss.

    Args:
        samples: of the validation documents; None: validation is off.
        token_bytes: [vocab_size] int64 bytes of text that each token stands for.
        batch_plan: of one batch size; its first steps are the validation.
        eval_iters: steps of a validation, at most one epoch of `samples`.
    """

    model: GPT | Stages
    samples: SampleDataset | None
    token_bytes: Tensor | None
    batch_plan: BatchPlan
    ranks: Ranks
    log: MetricsLog
    timers: Timers
    eval_iters: int
    stops: StopRequests

    def run(self, step: int) -> str:
        """Validate after `step` steps, and each source of a blend by itself. Collective.

        Returns:
            The request to stop that ended the validation without a result; empty: it is complete.
        """
        if self.samples is None:
            return ""
        sources = self.samples.sources if isinstance(self.samples, BlendedDataset) else []
        with self.timers("eval"):
            try:
                whole = self._loss(self.samples)
                losses = {part.name: self._loss(part) for part in sources}
            except StopRequested as request:
                if self.ranks.is_writer:
                    log(f"validation after step {step}: left to the resumed run ({request})")
                return str(request)
            self.log.validation(step, whole, losses)
        return ""

    def _loss(self, samples: SampleDataset) -> HeldOut:
        steps = min(self.eval_iters, self.batch_plan.batches.steps_for(samples.samples_per_epoch))
        batches = build_loader(
            samples,
            self.batch_plan,
            steps=range(steps),
            num_workers=0,
            pin_memory=False,
            limit=samples.samples_per_epoch,
        )
        with_heartbeats = self.ranks.watchdog.with_heartbeats(batches, "validation")
        return evaluate(
            self.model,
            self.log.show_progress(with_heartbeats, total=steps * self.batch_plan.num_microbatches(0)),
            self.ranks.grid,
            self.ranks.device,
            token_bytes=self.token_bytes,
            stops=self.stops,
        )
