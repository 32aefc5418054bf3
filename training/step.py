"""Forward and backward over the microbatches of one step, and the gradient sums over tp and tied embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import Batch
from metrics.timers import Timers
from model.fused_weights import cache_fused_weights
from model.gpt import GPT, PipelineInputs, Stages, get_chunks
from model.names import needs_tp_grad_sum, tp_dim
from parallel.fsdp import Accumulation, local_grads, reshard_model, set_last_microbatch
from parallel.grid import Grid
from parallel.pipeline import pipeline_forward
from parallel.tensor import sum_gradients_


@dataclass(frozen=True)
class Pipeline:
    """The pipeline of this rank's stages.

    Attributes:
        schedule: from a number of microbatches to `parallel.pipeline.build_schedule`'s result; keeps the last one.
        group: of the pp axis.
        tied_group: first and last stage if they share the embedding, else None.
    """

    schedule: Callable[[int], Any]
    group: dist.ProcessGroup
    tied_group: dist.ProcessGroup | None = None


def forward_backward(
    model: GPT | Stages,
    batches: Sequence[Batch],
    *,
    loss_tokens: Tensor,
    device: torch.device,
    accumulation: Accumulation,
    pipeline: Pipeline | None = None,
    timers: Timers | None = None,
) -> Tensor:
    """Gradients of (sum of all token losses) / `loss_tokens`, summed over the ranks after the last microbatch.

    Args:
        loss_tokens: labelled tokens of the whole step, over all microbatches and ranks; one number for all.
        accumulation: between microbatches; without effect in a pipeline, whose schedule reduces once.
        pipeline: None with one stage.
        timers: measures the sums over tp and tied embeddings as gradient reduction.

    Returns:
        This rank's sum of cross-entropies, a float64 scalar on `device`, without a gradient; 0 before the last stage.
    """
    batches = [batch.to(device) for batch in batches] if pipeline else batches
    total = torch.zeros((), dtype=torch.float64, device=device)
    chunks = get_chunks(model)
    if pipeline is not None:
        inputs = PipelineInputs(
            [b.tokens for b in batches],
            [b.labels for b in batches],
            [b.packed_seq for b in batches],
            loss_tokens,
            total,
        )
        numbers = torch.arange(len(batches), device=device)  # from the host, each forward would wait for a copy
        for chunk in chunks:
            chunk.pipeline_inputs = inputs
        first, last = (any(getattr(chunk, which) for chunk in chunks) for which in ("is_first", "is_last"))
        with cache_fused_weights(chunks):
            schedule = pipeline.schedule(len(batches))
            schedule.step(*([numbers] if first else []), **({"target": numbers} if last else {}))
        for chunk in chunks:
            chunk.pipeline_inputs = None
    else:
        with cache_fused_weights(chunks):
            for number, batch in enumerate(batches, 1):
                set_last_microbatch(model, number == len(batches), accumulation)
                batch = batch.to(device)
                loss_sum, cross_entropy = model(batch.tokens, batch.packed_seq, labels=batch.labels)
                (loss_sum / loss_tokens.to(loss_sum.dtype)).backward()
                total += cross_entropy
    without = next((name for name, p in model.named_parameters() if p.grad is None), None)
    if without is not None:  # FSDP under a schedule can lose a gradient, and the optimizer would skip it silently
        raise RuntimeError(
            f"{without} has no gradient after the backward pass on rank {dist.get_rank()}: internal error, please "
            "report"
        )
    with timers("gradient reduction") if timers is not None else nullcontext():
        tp = chunks[0].tp
        if tp.group is not None:
            parts = [
                p for n, p in model.named_parameters() if needs_tp_grad_sum(n, sequence_parallel=tp.sequence_parallel)
            ]
            sum_gradients_(local_grads(parts), tp.group)
        if pipeline is not None and pipeline.tied_group is not None:
            tied = [p for n, p in model.named_parameters() if n == "embedding.weight"]
            sum_gradients_(local_grads(tied), pipeline.tied_group)
    return total


def get_norm_owned_names(model: GPT | Stages, grid: Grid) -> frozenset[str]:
    """Names of the parameters that this rank counts in the gradient norm: one rank of pp x tp counts each weight."""
    names = {n for c in get_chunks(model) for n, _ in c.named_parameters() if not c.is_copy(n)}
    return frozenset(n for n in names if grid.rank("tp") == 0 or tp_dim(n) is not None)


@torch.no_grad()
def forward_only(model: GPT | Stages, batches: Sequence[Batch], grid: Grid, logits_rows: Tensor | None = None) -> list:
    """Output of the model for each row: (loss sum, cross-entropy), or logits of `logits_rows`. Collective over pp.

    Args:
        batches: on the device.

    Returns:
        One entry a row on the last stage; empty on other stages.
    """
    chunks = get_chunks(model)

    def forward_of(chunk: GPT) -> Callable[[int, Tensor | None], Any]:
        def forward(number: int, hidden: Tensor | None) -> Any:
            batch = batches[number]
            labels = batch.labels if logits_rows is None else None
            return chunk(
                batch.tokens if hidden is None else hidden, batch.packed_seq, labels=labels, logits_rows=logits_rows
            )

        return forward

    if grid.size("pp") == 1:
        return [forward_of(chunks[0])(number, None) for number in range(len(batches))]
    tp, width = chunks[0].tp, chunks[0].config.hidden_size
    share = tp.size if tp.sequence_parallel else 1
    world = dist.group.WORLD
    assert world is not None
    results = pipeline_forward(
        [forward_of(chunk) for chunk in chunks],
        grid.group("pp"),
        world,
        microbatches=len(batches),
        hidden=lambda n: torch.empty(
            len(batches[n].tokens) // share, width, dtype=chunks[0].compute_dtype, device=batches[n].tokens.device
        ),
    )
    return results


def finish_forward(model: GPT | Stages) -> None:
    """After forward passes without backward: free gathered weights, return to training mode."""
    reshard_model(model)
    model.train()
