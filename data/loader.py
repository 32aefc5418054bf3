"""From sequence numbers to the tokens a rank holds: sequences, rows, batches, and their loader.

Step k reads sequences k * global_batch_size .. + global_batch_size - 1 of an endless run of epochs, so
what a step sees is a function of the seed and k. A microbatch is one row, the concatenation of
`micro_batch_size` sequences; every cp and tp rank of a `batch` coordinate builds the same row and keeps
its own tokens of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cp.layout import attention_pairs, balance
from cp.packed_seq import IGNORE_LABEL, PackedSeq, build_packed_seq
from data.cache import build_once, cache_key
from data.indexed_dataset import IndexedDataset
from data.packing import PackedEpoch, StreamEpoch, pack_epoch, stream_epoch

# Changes when the way an epoch is packed does.
INDEX_VERSION = 1


@dataclass(frozen=True)
class Sequence:
    """`seq_length` tokens with their labels.

    lengths, padded_lengths: of its documents, the tail included.
    first_id: the number of its first token in the whole run, epochs included.
    """

    tokens: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    padded_lengths: np.ndarray
    first_id: int = 0


@dataclass(frozen=True, eq=False)
class Batch:
    """One microbatch: this rank's tokens of a row, and facts about the whole row.

    Attributes:
        tokens, labels: [T / cp] int64; label -100 where no loss is wanted.
        packed_seq: the row's documents.
        loss_tokens: labelled tokens of the whole row.
        real_tokens: tokens of the whole row that are not padding.
        cp_balance: attention work of the busiest cp rank over the mean (cp/layout.py).
        row_hash: of the whole row and its documents, where that was asked for; equal on ranks that share the row.
    """

    tokens: Tensor
    labels: Tensor
    packed_seq: PackedSeq
    loss_tokens: int
    real_tokens: int
    cp_balance: float
    row_hash: int | None = None

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        return self._move(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Called by the DataLoader."""
        return self._move(lambda x: x.pin_memory())

    def _move(self, move: Any) -> Batch:
        return replace(self, tokens=move(self.tokens), labels=move(self.labels), packed_seq=self.packed_seq.move(move))


class SequenceDataset:
    """Sequence n of the endless run of epochs over some documents of a token file.

    Args:
        documents: [n] which documents of `tokens` belong to this split.
        packing: `best-fit` or `stream`.
        alignment: documents are padded to a multiple of it (best-fit).
        pad_token: id that fills padding; it is never computed on or learned.
        cache_path: where an epoch's index is kept; None keeps it in memory only.
    """

    def __init__(
        self,
        tokens: IndexedDataset,
        documents: np.ndarray,
        *,
        seq_length: int,
        packing: str,
        alignment: int,
        seed: int,
        pad_token: int,
        cache_path: Path | None,
    ) -> None:
        self.tokens, self.documents = tokens, documents
        self.lengths = np.asarray(tokens.lengths, np.int64)[documents]
        if (self.lengths < 0).any():
            raise ValueError(f"{tokens.prefix}.idx: a document of {self.lengths.min()} tokens")
        self.seq_length, self.packing, self.alignment = seq_length, packing, alignment
        self.seed, self.pad_token = seed, pad_token
        self.cache_path = cache_path
        # Where the same documents lie does not matter to what is packed from them; only their lengths do.
        self._lengths_hash = hashlib.sha256(self.lengths.tobytes()).hexdigest()
        self._epochs: dict[int, PackedEpoch | StreamEpoch] = {}
        self.sequences_per_epoch = len(self.epoch(0))

    def epoch(self, number: int) -> PackedEpoch | StreamEpoch:
        """The index of an epoch; the last one asked for is kept."""
        if number not in self._epochs:
            if self.packing == "stream":
                index: PackedEpoch | StreamEpoch = stream_epoch(self.lengths, seed=self.seed, epoch=number, seq_length=self.seq_length)
            else:
                index = self._packed_epoch(number)
            self._epochs = {number: index}
        return self._epochs[number]

    def _packed_epoch(self, number: int) -> PackedEpoch:
        options = dict(seed=self.seed, epoch=number, seq_length=self.seq_length, alignment=self.alignment)
        if self.cache_path is None:
            return pack_epoch(self.lengths, **options)

        def build(folder: Path) -> None:
            index = pack_epoch(self.lengths, **options)
            np.save(folder / "pieces.npy", index.pieces)
            np.save(folder / "first.npy", index.first)

        key = cache_key(version=INDEX_VERSION, lengths=self._lengths_hash, **options)
        folder = build_once(self.cache_path / "packing" / key, build)
        return PackedEpoch(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("pieces", "first")))

    def fingerprint(self) -> str:
        """Of the documents: all their lengths, and what a thousand of them begin with, so that its cost does not grow."""
        digest = hashlib.sha256(self._lengths_hash.encode())
        for at in np.unique(np.linspace(0, len(self.documents) - 1, num=min(1000, len(self.documents)), dtype=np.int64)):
            ids = self.tokens.read(self.documents[at], 0, min(64, int(self.lengths[at])))
            digest.update(ids.astype(np.int64).tobytes())
        return digest.hexdigest()[:16]

    def sequence(self, n: int) -> Sequence:
        """Sequence n; n runs on through the epochs, which all have the same number of sequences."""
        epoch, at = divmod(n, self.sequences_per_epoch)
        index = self.epoch(epoch)
        assert len(index) == self.sequences_per_epoch
        pieces = index.sequence(at)
        sequence = self._from_stream(pieces) if self.packing == "stream" else self._from_pieces(pieces)
        return replace(sequence, first_id=n * self.seq_length)

    def empty_sequence(self) -> Sequence:
        """All padding: fills the last batch of an evaluation without counting."""
        tokens = np.full(self.seq_length, self.pad_token, np.int64)
        whole = np.array([self.seq_length])
        return Sequence(tokens, np.full(self.seq_length, IGNORE_LABEL, np.int64), np.zeros_like(whole), whole)

    def _from_stream(self, pieces: np.ndarray) -> Sequence:
        stream = np.concatenate([self.tokens.read(self.documents[d], s, n) for d, s, n in pieces.tolist()])
        stream = stream.astype(np.int64)
        whole = np.array([self.seq_length])
        return Sequence(stream[:-1], stream[1:], whole, whole)

    def _from_pieces(self, pieces: np.ndarray) -> Sequence:
        tokens = np.full(self.seq_length, self.pad_token, np.int64)
        labels = np.full(self.seq_length, IGNORE_LABEL, np.int64)
        lengths, padded_lengths = [], []
        at = 0
        for document, start, length in pieces.tolist():
            # One token ahead if the document goes on; its true end has no label.
            available = int(self.lengths[document]) - start
            ids = self.tokens.read(self.documents[document], start, min(length + 1, available))
            tokens[at : at + length] = ids[:length]
            labels[at : at + len(ids) - 1] = ids[1:]
            lengths.append(length)
            padded_lengths.append(-(-length // self.alignment) * self.alignment)
            at += padded_lengths[-1]
        if at < self.seq_length:  # the tail is a document of real length 0
            lengths.append(0)
            padded_lengths.append(self.seq_length - at)
        return Sequence(tokens, labels, np.array(lengths), np.array(padded_lengths))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_epochs": {}}


def build_batch(
    sequences: list[Sequence],
    *,
    cp_size: int,
    cp_rank: int,
    qkv_format: str,
    layout: str,
    pad_rows: str = "full",
    row_unit: int | None = None,
    hash_row: bool = False,
) -> Batch:
    """The row that `sequences` make up, cut to this rank's tokens.

    Args:
        row_unit: a dynamic row is a multiple of it; default 2 * cp_size.
    """
    if pad_rows == "dynamic":
        sequences = _without_tails(sequences, unit=row_unit or 2 * cp_size)
    lengths = np.concatenate([s.lengths for s in sequences])
    padded_lengths = np.concatenate([s.padded_lengths for s in sequences])
    first_ids = np.concatenate([s.first_id + np.cumsum(s.padded_lengths) - s.padded_lengths for s in sequences])
    packed_seq, owned = build_packed_seq(
        lengths, padded_lengths, cp_size=cp_size, cp_rank=cp_rank, qkv_format=qkv_format, layout=layout, first_ids=first_ids
    )
    tokens = np.concatenate([s.tokens for s in sequences])
    labels = np.concatenate([s.labels for s in sequences])
    row_hash = None
    if hash_row:
        digest = hashlib.blake2b(digest_size=8)
        for part in (tokens, labels, lengths, padded_lengths):
            digest.update(part.astype(np.int64).tobytes())
        row_hash = int.from_bytes(digest.digest(), "little", signed=True)
    return Batch(
        tokens=torch.from_numpy(tokens[owned]),
        labels=torch.from_numpy(labels[owned]),
        packed_seq=packed_seq,
        loss_tokens=int((labels != IGNORE_LABEL).sum()),
        real_tokens=int(lengths.sum()),
        cp_balance=balance(attention_pairs(lengths, padded_lengths, cp_size=cp_size, layout=layout)),
        row_hash=row_hash,
    )


def _without_tails(sequences: list[Sequence], *, unit: int) -> list[Sequence]:
    """The same documents without documents of real length 0, and one such at the end that makes the row a multiple of `unit`."""
    kept = []
    for s in sequences:
        real = np.repeat(s.lengths > 0, s.padded_lengths)
        assert (s.lengths[:-1] > 0).all(), "only the last document of a sequence is a tail"
        kept.append(Sequence(s.tokens[real], s.labels[real], s.lengths[s.lengths > 0], s.padded_lengths[s.lengths > 0], s.first_id))
    total = sum(len(s.tokens) for s in kept)
    missing = -total % unit or (unit if not total else 0)
    if missing:
        first = sequences[0]
        pad_token = first.tokens[-1]  # what the tail holds does not matter
        tail = np.array([missing])
        kept.append(Sequence(np.full(missing, pad_token), np.full(missing, IGNORE_LABEL), np.zeros_like(tail), tail))
    return kept


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Which sequences a rank reads, and which of their tokens it keeps."""

    global_batch_size: int
    micro_batch_size: int
    batch_size: int  # ranks along the `batch` axis
    batch_rank: int
    cp_size: int
    cp_rank: int
    qkv_format: str
    layout: str
    pad_rows: str = "full"
    row_unit: int | None = None
    hash_before_step: int = 0  # rows of steps below it carry their hash

    @property
    def num_microbatches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.batch_size)

    def sequence_numbers(self, step: int, microbatch: int) -> range:
        """The sequences of this rank's row. Over all ranks and microbatches: each of the step's exactly once."""
        first = step * self.global_batch_size
        first += (microbatch * self.batch_size + self.batch_rank) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)


class RowDataset(Dataset):
    """Batches by (step, microbatch). With `limit`, sequences from that number on are empty ones."""

    def __init__(self, sequences: SequenceDataset, plan: BatchPlan, limit: int | None = None) -> None:
        self.sequences, self.plan, self.limit = sequences, plan, limit

    def __getitem__(self, at: tuple[int, int]) -> Batch:
        plan = self.plan
        row = [
            self.sequences.empty_sequence() if self.limit is not None and n >= self.limit else self.sequences.sequence(n)
            for n in plan.sequence_numbers(*at)
        ]
        return build_batch(
            row,
            cp_size=plan.cp_size,
            cp_rank=plan.cp_rank,
            qkv_format=plan.qkv_format,
            layout=plan.layout,
            pad_rows=plan.pad_rows,
            row_unit=plan.row_unit,
            hash_row=at[0] < plan.hash_before_step,
        )


class _StepSampler(Sampler):
    def __init__(self, first_step: int, last_step: int, num_microbatches: int) -> None:
        self.steps, self.num_microbatches = range(first_step, last_step), num_microbatches

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in self.steps:
            for microbatch in range(self.num_microbatches):
                yield step, microbatch

    def __len__(self) -> int:
        return len(self.steps) * self.num_microbatches


def build_loader(
    sequences: SequenceDataset,
    plan: BatchPlan,
    *,
    first_step: int,
    last_step: int,
    num_workers: int,
    pin_memory: bool,
    limit: int | None = None,
) -> DataLoader:
    """A loader of the microbatches of steps first_step .. last_step - 1, in order.

    Args:
        num_workers: processes that build batches ahead; 0 builds them in this one. The batches are the same.
    """
    return DataLoader(
        RowDataset(sequences, plan, limit),
        batch_size=None,
        sampler=_StepSampler(first_step, last_step, plan.num_microbatches),
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
    )
