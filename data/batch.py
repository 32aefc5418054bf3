"""Microbatches: the row of one or more samples, cut to the tokens of this rank.

A step reads the samples that follow those of the step before (data/batch_schedule.py), so its content is a function of
the seed and the samples read so far. A microbatch is one row, the concatenation of `micro_batch_size` samples. Every cp
and tp rank of a `batch` coordinate builds the same row and keeps its own tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cp.layout import attention_pairs, balance, document_unit
from cp.packed_seq import IGNORE_LABEL, PackedSeq, build_packed_seq
from cp.placement import Placement, place
from data.balance import deal_step
from data.batch_schedule import BatchSchedule, count_microbatches
from data.dataset import PackedSample, padding_sample
from utils.errors import UserError

EMPTY = -1  # instead of a sample's number


@dataclass(frozen=True, eq=False)
class Batch:
    """One microbatch: this rank's tokens of a row, and metadata of the whole row.

    Attributes:
        tokens, labels: [T / cp] int64; a label is -100 where no loss is computed.
        packed_seq: the row's documents.
        loss_tokens: labelled tokens of the whole row.
        real_tokens: tokens of the whole row without padding.
        cp_balance: attention work of the busiest cp rank over the mean (cp/layout.py).
        row_hash: hash of the whole row and its documents, where requested; equal on ranks that share the row.
    """

    tokens: Tensor
    labels: Tensor
    packed_seq: PackedSeq
    loss_tokens: int
    real_tokens: int
    cp_balance: float
    row_hash: int | None = None

    def to(self, device: torch.device) -> Batch:
        return self if device.type == "cpu" else self._move(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Called by the DataLoader."""
        return self._move(lambda x: x.pin_memory())

    def _move(self, move: Any) -> Batch:
        return replace(self, tokens=move(self.tokens), labels=move(self.labels), packed_seq=self.packed_seq.move(move))


def build_batch(
    samples: Sequence[PackedSample],
    *,
    cp_size: int,
    cp_rank: int,
    qkv_format: str,
    layout: str,
    pad_rows: str = "full",
    row_unit: int | None = None,
    attention_cost: float = 0.0,
    hash_row: bool = False,
) -> Batch:
    """The row of these samples, cut to this rank's tokens.

    Args:
        pad_rows: of `packing.PAD_ROWS`; dynamic leaves out the samples' tails.
        row_unit: a dynamic row's length is a multiple of it; default 2 * cp_size.
        attention_cost: as `BatchPlan`'s; the layout hybrid evens the ranks' work by it.

    Raises:
        UserError: hybrid cannot place the documents, because they are aligned to less than `cp.layout.document_unit`.
    """
    parts = samples if pad_rows == "full" else _trim_tails(samples, unit=row_unit or 2 * cp_size)
    row = _join(parts)
    if layout == "hybrid" and cp_size > 1:
        numbers = np.repeat(np.arange(len(parts)), [len(s.lengths) for s in parts])
        row = _place_documents(row, numbers, len(samples), sum(len(s.tokens) for s in samples), cp_size, attention_cost)
    lengths, padded_lengths, placement = row.lengths, row.padded_lengths, row.placement
    packed_seq, owned = build_packed_seq(
        lengths,
        padded_lengths,
        cp_size=cp_size,
        cp_rank=cp_rank,
        qkv_format=qkv_format,
        layout=layout,
        first_ids=row.first_ids,
        placement=placement,
    )
    tokens, labels = row.tokens, row.labels
    places = () if placement is None else (placement.degrees, placement.first_ranks)
    row_hash = _hash_row(tokens, labels, lengths, padded_lengths, *places) if hash_row else None
    counts = [np.count_nonzero(s.labels != IGNORE_LABEL) if s.loss_tokens is None else s.loss_tokens for s in samples]
    cp_balance = 1.0
    if cp_size > 1:
        tokens, labels = tokens[owned], labels[owned]
        pairs = attention_pairs(lengths, padded_lengths, cp_size=cp_size, layout=layout, placement=placement)
        cp_balance = balance(pairs)
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        packed_seq=packed_seq,
        loss_tokens=int(sum(counts)),
        real_tokens=sum(lengths.tolist()),
        cp_balance=cp_balance,
        row_hash=row_hash,
    )


@dataclass(frozen=True, eq=False)
class _Row:
    """Samples end to end, before the cut to this rank's tokens. Attributes as `PackedSeq`'s and `PackedSample`'s."""

    tokens: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    padded_lengths: np.ndarray
    first_ids: np.ndarray
    placement: Placement | None = None


def _join(samples: Sequence[PackedSample]) -> _Row:
    ids = [
        s.first_id + end - n
        for s in samples
        for n, end in zip(s.padded_lengths, np.cumsum(s.padded_lengths), strict=True)
    ]
    names = ("tokens", "labels", "lengths", "padded_lengths")
    arrays: dict[str, Any] = {name: _concatenate([getattr(s, name) for s in samples]) for name in names}
    return _Row(**arrays, first_ids=np.array(ids, np.int64))


def _place_documents(
    row: _Row, sample_numbers: np.ndarray, num_samples: int, full_length: int, cp_size: int, attention_cost: float
) -> _Row:
    """The row with its documents padded and placed for the layout hybrid, fillers instead of tails.

    Args:
        sample_numbers: [documents] the sample of each document.
        full_length: tokens of the samples with their tails, for a shorter row without an even placement.
    """
    is_document = row.lengths > 0
    lengths, numbers = row.lengths[is_document], sample_numbers[is_document]
    for length in dict.fromkeys((len(row.tokens), full_length)):
        placed = place(
            lengths, row_length=length, cp_size=cp_size, attention_cost=attention_cost,
            sample_numbers=numbers, num_samples=num_samples,
        )  # fmt: skip
        if placed is not None and not placed.placement.is_fallback:
            break
    if placed is None:
        unit = document_unit("hybrid", cp_size, num_samples)
        raise UserError(
            f"--cp-layout hybrid: a row of {full_length} tokens has no room for its {len(lengths)} documents: "
            f"align documents to a multiple of {unit}"
        )
    tokens, labels = np.full(length, row.tokens[-1]), np.full(length, IGNORE_LABEL, np.int64)
    ids = np.concatenate((row.first_ids[is_document], np.zeros(len(placed.lengths) - len(lengths), np.int64)))
    sources = (np.cumsum(row.padded_lengths) - row.padded_lengths)[is_document].tolist()
    targets = (np.cumsum(placed.padded_lengths) - placed.padded_lengths).tolist()
    for source, target, count in zip(sources, targets, lengths.tolist(), strict=False):
        tokens[target : target + count] = row.tokens[source : source + count]
        labels[target : target + count] = row.labels[source : source + count]
    return _Row(tokens, labels, placed.lengths, placed.padded_lengths, ids, placed.placement)


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    """`np.concatenate` without a copy of a single part."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _hash_row(*parts: np.ndarray) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.astype(np.int64).tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def _trim_tails(samples: Sequence[PackedSample], *, unit: int) -> list[PackedSample]:
    """The samples without their tails (documents of length 0), and one tail up to a multiple of `unit`."""
    trimmed = []
    for s in samples:
        is_document = s.lengths > 0
        assert is_document[:-1].all(), "only the last document of a sample is a tail"
        kept = np.repeat(is_document, s.padded_lengths)
        trimmed.append(
            replace(
                s,
                tokens=s.tokens[kept],
                labels=s.labels[kept],
                lengths=s.lengths[is_document],
                padded_lengths=s.padded_lengths[is_document],
            )
        )
    total = sum(len(s.tokens) for s in trimmed)
    missing = -total % unit or (unit if not total else 0)
    if missing:  # any token fills the tail
        trimmed.append(padding_sample(missing, samples[0].tokens[-1]))
    return trimmed


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Which samples a rank reads, and which of their tokens it keeps.

    Attributes:
        batches: samples of each step. Where they do not fill the microbatches of all ranks, places stay empty.
        batch_size, batch_rank: size and coordinate of the grid's `batch` axis.
        pp_size, pp_schedule: of the pipeline, which takes some numbers of microbatches only.
        row_unit: as `build_batch`'s.
        attention_cost: work of attention to one squared length, in works of a token's projections and MLP.
        balance_work: deal a step's samples to ranks and microbatches by their work (data/balance.py); False: in the
            order of their numbers.
        hash_before_step: rows of steps below it carry their hash.
        reads_tokens: False on a pipeline stage between the first and the last, which uses a row's documents only: its
            tokens and labels are -1, but for steps below `hash_before_step`.
    """

    batches: BatchSchedule
    micro_batch_size: int
    batch_size: int
    batch_rank: int
    cp_size: int
    cp_rank: int
    qkv_format: str
    layout: str
    pad_rows: str = "full"
    row_unit: int | None = None
    attention_cost: float = 0.0
    balance_work: bool = False
    hash_before_step: int = 0
    pp_size: int = 1
    pp_schedule: str = "1f1b"
    reads_tokens: bool = True

    def num_microbatches(self, step: int) -> int:
        """Microbatches of a step on each data rank."""
        return count_microbatches(
            self.batches.size(step),
            self.micro_batch_size,
            self.batch_size,
            pp_size=self.pp_size,
            schedule=self.pp_schedule,
        )

    def num_places(self, step: int) -> int:
        """Samples and empty places of a step, over all data ranks."""
        return self.num_microbatches(step) * self.micro_batch_size * self.batch_size

    def assign_samples(self, step: int, work: np.ndarray) -> list[list[int]]:
        """[microbatches][micro_batch_size] numbers of this rank's samples; EMPTY: a place without one.

        Ranks and microbatches together read each sample of the step once.

        Args:
            work: [places] float64 estimated work of each sample of the step, then of its empty places.
        """
        first, size, count = self.batches.first_sample(step), self.batches.size(step), self.num_microbatches(step)
        if self.balance_work and self.batch_size * count > 1:
            dealt = deal_step(work, data_rank=self.batch_rank, data_ranks=self.batch_size, num_microbatches=count)
        else:
            in_order = np.arange(self.num_places(step)).reshape(count, self.batch_size, self.micro_batch_size)
            dealt = in_order[:, self.batch_rank].tolist()
        return [[first + number if number < size else EMPTY for number in row] for row in dealt]

    def row_work(self, batch: Batch) -> tuple[float, float]:
        """Mean work of the cp ranks on a row and that of the busiest, in works of a token's projections and MLP."""
        attention = self.attention_cost * float((batch.packed_seq.lengths**2).sum())
        row_length = batch.packed_seq.row_length
        return (row_length + attention) / self.cp_size, (row_length + attention * batch.cp_balance) / self.cp_size

    def build_batch(self, samples: Sequence[PackedSample], *, step: int) -> Batch:
        """The row of these samples, cut to this rank's tokens."""
        return build_batch(
            samples,
            cp_size=self.cp_size,
            cp_rank=self.cp_rank,
            qkv_format=self.qkv_format,
            layout=self.layout,
            pad_rows=self.pad_rows,
            row_unit=self.row_unit,
            attention_cost=self.attention_cost,
            hash_row=step < self.hash_before_step,
        )
