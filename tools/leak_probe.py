"""Leak probe: a token of one document must not reach another document, nor an earlier token of its own.

Documents are numbered in the order of the samples. One token in each even document is changed. Final hidden states are
then compared to the bit with those before: in odd documents, and before the changed token, no state may change. Behind
the changed token, states must change. The loss of the changed samples counts tokens of even documents only, so the
gradient of an odd document's embeddings must be exactly 0. Both directions of every pair of neighbours are covered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cp.packed_seq import IGNORE_LABEL
from data.batch import Batch
from data.dataset import PackedSample
from model.gpt import GPT, Stages, get_chunks
from parallel.grid import Grid

MIN_REACHED = 0.9  # of the later tokens; in bf16 a change may round away in some tokens of a long document
CHANGED_AT = 1 / 3  # of an even document's length
EARLIER, LATER, OTHER, IGNORED = range(4)  # tokens before and behind a changed one, of odd documents, all else

Result = TypeVar("Result")


@dataclass(frozen=True)
class Leak:
    """Tokens, counted over all ranks.

    Attributes:
        others: tokens that the changed tokens must not reach.
        changed: of these, tokens whose final hidden state changed.
        gradients: tokens of odd documents whose embedding has a gradient.
        later: tokens that the changed tokens must reach.
        reached: of these, tokens whose final hidden state changed.
    """

    others: int
    changed: int
    gradients: int
    later: int
    reached: int

    @property
    def passed(self) -> bool:
        return not self.changed and not self.gradients and self.reached >= MIN_REACHED * self.later


def change_samples(samples: Sequence[PackedSample], vocab_size: int) -> tuple[list[PackedSample], dict[int, int]]:
    """The samples with a token of each even document changed and labels in even documents only.

    Returns:
        The samples, and the part of each real token by the token's id.
    """
    changed, parts, number = [], {}, 0
    for sample in samples:
        tokens, labels = sample.tokens.copy(), sample.labels.copy()
        starts = np.cumsum(sample.padded_lengths) - sample.padded_lengths
        for start, length in zip(starts.tolist(), sample.lengths.tolist(), strict=True):
            at, end = start + int(length * CHANGED_AT), start + length
            for token in range(start, end):
                parts[sample.first_id + token] = OTHER if number % 2 else LATER if token > at else EARLIER
            if number % 2:
                labels[start:end] = IGNORE_LABEL
            elif length:
                tokens[at] = (tokens[at] + 1) % vocab_size
                parts[sample.first_id + at] = IGNORED
            number += length > 0
        changed.append(replace(sample, tokens=tokens, labels=labels, loss_tokens=None))
    return changed, parts


@contextmanager
def watch(model: GPT | Stages) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Final hidden states, and gradients of the embeddings' output, of each microbatch that runs in this context."""
    states: list[Tensor] = []
    gradients: list[Tensor] = []

    def keep_gradient(_: object, __: object, out: Tensor) -> None:
        at = len(gradients)
        gradients.append(torch.zeros_like(out))
        if out.requires_grad:
            out.register_hook(lambda grad: gradients[at].copy_(grad))

    hooks = []
    for chunk in get_chunks(model):
        if chunk.is_first:
            hooks.append(chunk.after_embedding.register_forward_hook(keep_gradient))
        if chunk.final_norm is not None:
            hooks.append(chunk.final_norm.register_forward_hook(lambda _, __, out: states.append(out.detach())))
    yield states, gradients
    for hook in hooks:
        hook.remove()


def probe(
    model: GPT | Stages,
    batches: Sequence[Batch],
    changed_batches: Sequence[Batch],
    parts: dict[int, int],
    run: Callable[[Sequence[Batch]], Result],
    grid: Grid,
    device: torch.device,
) -> tuple[Result, Leak]:
    """Count leaks between the rows and the changed rows. Collective. The model has the rows' gradients afterwards.

    Args:
        batches, changed_batches: microbatches of the samples before and after `change_samples`.
        run: forward and backward over microbatches.

    Returns:
        What `run` returned for the rows, and the counts.
    """
    with watch(model) as (_, gradients), watch(model) as (changed_states, _):
        run(changed_batches)
    model.zero_grad()
    with watch(model) as (states, _):
        result = run(batches)
    counts = torch.zeros(5, dtype=torch.int64)
    shares = grid.size("tp") if get_chunks(model)[0].tp.sequence_parallel else 1
    for number, batch in enumerate(batches if shares > 1 or grid.rank("tp") == 0 else []):
        part = _own_parts(batch, parts, grid).chunk(shares)[grid.rank("tp") % shares]
        others, later = (part == EARLIER) | (part == OTHER), part == LATER
        if states:  # the last stage
            differs = (states[number] != changed_states[number]).any(-1).cpu()
            counts[[0, 1, 3, 4]] += torch.stack([x.sum() for x in (others, others & differs, later, later & differs)])
        if gradients:  # the first stage
            counts[2] += ((gradients[number] != 0).any(-1).cpu() & (part == OTHER)).sum()
    counts = counts.to(device)
    dist.all_reduce(counts)
    return result, Leak(*counts.tolist())


def _own_parts(batch: Batch, parts: dict[int, int], grid: Grid) -> Tensor:
    """[T / cp] parts of this cp rank's tokens."""
    own = dict(cp_size=grid.size("cp"), cp_rank=grid.rank("cp"))
    ids, _ = batch.packed_seq.token_ids_and_positions(**own)
    found = [parts.get(token, IGNORED) for token in ids.tolist()]
    return torch.from_numpy(np.where(batch.packed_seq.padding(**own), IGNORED, found))
