"""From sequence numbers to the tokens a rank holds: sequences, rows, batches, and their loader.

Step k reads sequences k * global_batch_size .. + global_batch_size - 1 of an endless run of epochs, or of a blend of
several such runs, so what a step sees is a function of the seed and k. A microbatch is one row, the concatenation of
`micro_batch_size` sequences; every cp and tp rank of a `batch` coordinate builds the same row and keeps
its own tokens of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping
from collections.abc import Sequence as ListLike
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cp.layout import attention_pairs, balance
from cp.packed_seq import IGNORE_LABEL, PackedSeq, build_packed_seq
from data.blend import Blend
from data.indexed_dataset import CHUNK, IndexedDataset
from data.packing import (
    Epoch,
    StoredEpoch,
    Windows,
    concat_epoch,
    greedy_epoch,
    pack_epoch,
    store_epoch,
    stored_epoch,
    windowed_epoch,
)
from utils.errors import UserError
from utils.files import CacheNotWritable, build_once, cache_entry, cache_key

# Changes when the way an epoch is packed does.
INDEX_VERSION = 2
# An epoch of fewer pieces is packed in a moment, each time: a small source read for thousands of epochs leaves no folder for each.
STORED_FROM = 10_000


@dataclass
class Sequence:
    """`seq_length` tokens with their labels.

    lengths, padded_lengths: of its documents, the tail included.
    first_id: the number of its first token in the whole run, epochs included.
    loss_tokens: how many are labelled; None: to be counted.
    """

    tokens: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    padded_lengths: np.ndarray
    first_id: int = 0
    loss_tokens: int | None = None


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


class Sequences(Protocol):
    """What is read from: numbered sequences without end.

    `sequences_per_epoch` is how many there are before one repeats.
    """

    seq_length: int
    sequences_per_epoch: int

    def sequence(self, n: int) -> Sequence: ...

    def empty_sequence(self) -> Sequence:
        """All padding: fills the last batch of an evaluation without counting."""
        ...

    def fingerprint(self) -> str:
        """Of the documents, and of what decides their order but for flags."""
        ...

    def state(self, n: int) -> dict[str, Any]:
        """Where each source stands before sequence n, as JSON; `go_on` takes it."""
        ...

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if the state is not of these sources."""
        ...


class SequenceDataset:
    """Sequence n of the endless run of epochs over some documents of a token file.

    Args:
        documents: [n] which documents of `tokens` belong to this split.
        packing: of `packing.PACKINGS`.
        alignment: documents are padded to a multiple of it (best-fit, greedy).
        one_document: a sequence is one document to attention (bshd, and concat), not one a piece.
        pad_token: id that fills padding; it is never computed on or learned.
        cache_path: where an epoch's index is kept, if it is not a small one; None keeps it in memory only.
        window: best-fit over so many documents at a time; None: over all.
        vocab_size: token ids must be from 0 to below it; None: not checked.
        name: for people.

    Raises:
        ValueError: as `IndexedDataset.lengths`.
        CacheNotWritable: the first epoch's index is not there, and cannot be.
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
        one_document: bool = False,
        window: int | None = None,
        vocab_size: int | None = None,
        name: str = "",
    ) -> None:
        self.tokens, self.documents, self.name = tokens, documents, name or str(tokens.prefix)
        self.seq_length, self.packing, self.alignment = seq_length, packing, alignment
        self.one_document = one_document or packing == "concat"
        self.seed, self.pad_token, self.window, self.vocab_size = seed, pad_token, window, vocab_size
        self.cache_path = cache_path
        # Where the same documents lie does not matter to what is packed from them; only their lengths do.
        digest = hashlib.sha256()
        self.num_tokens = self.longest = self.num_pieces = 0
        for at in range(0, len(documents), CHUNK):
            lengths = tokens.lengths[documents[at : at + CHUNK]].astype(np.int64)
            digest.update(lengths.tobytes())
            self.num_pieces += int((-(-lengths // seq_length)).sum()) if packing == "best-fit" else len(lengths)
            self.num_tokens, self.longest = self.num_tokens + int(lengths.sum()), max(self.longest, int(lengths.max()))
        self._lengths_hash = digest.hexdigest()
        self._epochs: dict[int, Epoch] = {}
        self.sequences_per_epoch = len(self.epoch(0))

    @property
    def lengths(self) -> np.ndarray:
        """[documents] int64 tokens of each; made when asked for."""
        return self.tokens.lengths[self.documents].astype(np.int64)

    def epoch(self, number: int) -> Epoch:
        """The index of an epoch; the last one asked for is kept."""
        if number not in self._epochs:
            index = self._stored_epoch(number) if self.window is None else self._windowed_epoch(number)
            self._epochs = {number: index}
        return self._epochs[number]

    def _build_epoch(self, number: int) -> StoredEpoch:
        options: dict[str, int] = dict(seed=self.seed, epoch=number, seq_length=self.seq_length)
        if self.packing == "concat":
            return concat_epoch(self.lengths, **options)
        build = greedy_epoch if self.packing == "greedy" else pack_epoch
        return build(self.lengths, alignment=self.alignment, **options)

    def _key(self, **more: int) -> str:
        facts = dict(
            version=INDEX_VERSION,
            lengths=self._lengths_hash,
            packing=self.packing,
            seq_length=self.seq_length,
            seed=self.seed,
        )
        return cache_key(**facts, alignment=1 if self.packing == "concat" else self.alignment, **more)

    def _stored_epoch(self, number: int) -> StoredEpoch:
        if self.cache_path is None or self.num_pieces < STORED_FROM:
            return self._build_epoch(number)
        folder = self.cache_path / "packing" / self._key(epoch=number)
        try:
            build_once(folder, lambda scratch: store_epoch(self._build_epoch(number), scratch))
        except (CacheNotWritable, OSError):  # read-only, or its disk is full
            if number == 0:  # nothing has begun: better said now than paid for by every rank and worker with its memory
                raise
            return self._build_epoch(number)
        with cache_entry(folder):
            return stored_epoch(self.packing, folder, self.seq_length)

    def _windowed_epoch(self, number: int) -> Epoch:
        assert self.packing == "best-fit" and self.window is not None
        windows = Windows(
            lambda documents: self.tokens.lengths[self.documents[documents]],
            len(self.documents),
            seed=self.seed,
            seq_length=self.seq_length,
            alignment=self.alignment,
            window=self.window,
        )
        if self.cache_path is None:
            return windowed_epoch(windows, windows.count(), number)
        folder = self.cache_path / "packing" / self._key(window=self.window)
        build_once(folder, lambda scratch: np.save(scratch / "counts.npy", windows.count()))
        with cache_entry(folder):
            counts = np.load(folder / "counts.npy")
            if counts.shape != (len(windows),) or counts.dtype != np.int64 or counts.min(initial=0) < 0:
                raise UserError(f"counts.npy is {counts.dtype} {list(counts.shape)} for {len(windows)} windows")
        return windowed_epoch(windows, counts, number)

    def fingerprint(self) -> str:
        """Of the documents: all their lengths, and what a thousand of them begin with, so that its cost does not grow."""
        digest = hashlib.sha256(self._lengths_hash.encode())
        for at in np.unique(
            np.linspace(0, len(self.documents) - 1, num=min(1000, len(self.documents)), dtype=np.int64)
        ):
            document = int(self.documents[at])
            ids = self.tokens.read(document, 0, min(64, int(self.tokens.lengths[document])))
            digest.update(ids.astype(np.int64).tobytes())
        return digest.hexdigest()[:16]

    def state(self, n: int) -> dict[str, Any]:
        epoch, position = divmod(n, self.sequences_per_epoch)
        return {"sequences": n, "sources": [{"name": self.name, "epoch": epoch, "position": position}]}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Nothing to do: where sequence n lies takes no steps to find."""

    def sequence(self, n: int) -> Sequence:
        """Sequence n; n runs on through the epochs, which all have the same number of sequences.

        Raises:
            ValueError: a token file that does not hold what its index says, or tokens outside the vocabulary.
        """
        epoch, at = divmod(n, self.sequences_per_epoch)
        index = self.epoch(epoch)
        assert len(index) == self.sequences_per_epoch
        pieces = index.sequence(at)
        # Python's numbers from here on: a sequence has few pieces, for which arrays are slower.
        triples = list(
            zip(self.documents[pieces[:, 0]].tolist(), pieces[:, 1].tolist(), pieces[:, 2].tolist(), strict=True)
        )
        sequence = self._from_stream(triples) if self.packing == "concat" else self._from_pieces(triples)
        sequence.first_id = n * self.seq_length
        return sequence

    def empty_sequence(self) -> Sequence:
        return _empty_sequence(self.seq_length, self.pad_token)

    def _from_stream(self, pieces: list[tuple[int, int, int]]) -> Sequence:
        stream = np.concatenate([self.tokens.read(*piece) for piece in pieces]).astype(np.int64)
        self._check_vocabulary(stream, [], pieces)
        whole = np.array([self.seq_length])
        return Sequence(stream[:-1], stream[1:], whole, whole, loss_tokens=self.seq_length)

    def _check_vocabulary(self, tokens: np.ndarray, ahead: list[int], pieces: list[tuple[int, int, int]]) -> None:
        """Of a sequence's tokens, and of labels that are none of them. Raises ValueError: ids outside; the document."""
        size = self.vocab_size
        # Unsigned, what is below 0 is very large: one pass finds both.
        if size is None or (int(tokens.view(np.uint64).max()) < size and all(0 <= label < size for label in ahead)):
            return
        for document, start, length in pieces:
            ids = self.tokens.read(document, start, min(length + 1, self.tokens.lengths.item(document) - start))
            outside = ids[(ids < 0) | (ids >= size)]
            if len(outside):
                raise UserError(
                    f"{self.tokens.prefix}.bin: token {outside[0]} in document {document}, but the tokenizer's are 0 to {size - 1}: "
                    f"made with another, or damaged"
                )
        raise AssertionError(f"padding with token {self.pad_token} of {size}")

    def _from_pieces(self, pieces: list[tuple[int, int, int]]) -> Sequence:
        tokens, labels = np.empty(self.seq_length, np.int64), np.empty(self.seq_length, np.int64)
        stored, ends, alignment, place = self.tokens.tokens, self.tokens.lengths, self.alignment, self.tokens.place
        lengths, padded_lengths, closings, ahead, at = [], [], [], [], 0
        for document, start, length in pieces:
            # One token ahead if the document goes on; its true end has no label.
            goes_on = ends.item(document) - start > length
            begin = place(document, start, length + goes_on)
            end = at + length
            tokens[at:end] = stored[begin : begin + length]
            label = IGNORE_LABEL
            if goes_on:
                label = stored.item(begin + length)
                ahead.append(label)
            at += -(-length // alignment) * alignment
            if at > end:
                tokens[end:at] = self.pad_token
            closings.append((end, at, label))
            lengths.append(length)
            padded_lengths.append(at - end + length)
        tokens[at:] = self.pad_token
        # All at once, which is quicker than document by document, then what each ends with.
        labels[:-1] = tokens[1:]
        for end, padded_end, label in closings:
            labels[end - 1] = label
            if padded_end > end:
                labels[end:padded_end] = IGNORE_LABEL
        labels[at:] = IGNORE_LABEL
        self._check_vocabulary(tokens, ahead, pieces)
        loss_tokens = sum(lengths) - len(pieces) + len(ahead)
        if self.one_document:
            return Sequence(tokens, labels, np.array([at]), np.array([self.seq_length]), loss_tokens=loss_tokens)
        if at < self.seq_length:  # the tail is a document of real length 0
            lengths.append(0)
            padded_lengths.append(self.seq_length - at)
        return Sequence(tokens, labels, np.array(lengths), np.array(padded_lengths), loss_tokens=loss_tokens)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_epochs": {}}


def _empty_sequence(seq_length: int, pad_token: int) -> Sequence:
    whole, tokens, labels = (
        np.array([seq_length]),
        np.full(seq_length, pad_token, np.int64),
        np.full(seq_length, IGNORE_LABEL, np.int64),
    )
    return Sequence(tokens, labels, np.zeros_like(whole), whole, loss_tokens=0)


class BlendedDataset:
    """Sequences of several sources in turn (data/blend.py).

    Args:
        weights: [sources] whole numbers above 0, in proportion to the sequences that each gives.
    """

    def __init__(self, sources: ListLike[SequenceDataset], weights: ListLike[int]) -> None:
        self.sources, self.blend = list(sources), Blend(weights)
        self.seq_length = self.sources[0].seq_length
        # As many as can be read before a source begins again.
        self.sequences_per_epoch = min(
            s.sequences_per_epoch * self.blend.total // w for s, w in zip(self.sources, self.blend.weights, strict=True)
        )

    def sequence(self, n: int) -> Sequence:
        source, position = self.blend.at(n)
        sequence = self.sources[source].sequence(position)
        sequence.first_id = n * self.seq_length  # of the run: a source that repeats is dropped out of elsewhere
        return sequence

    def empty_sequence(self) -> Sequence:
        return self.sources[0].empty_sequence()

    def fingerprint(self) -> str:
        """Of the sources in order, and their weights."""
        facts = [(s.fingerprint(), w) for s, w in zip(self.sources, self.blend.weights, strict=True)]
        return cache_key(blend=facts)

    def state(self, n: int) -> dict[str, Any]:
        counts = self.blend.counts(n)
        return {
            "sequences": n,
            "sources": [s.state(c)["sources"][0] for s, c in zip(self.sources, counts, strict=True)],
        }

    def go_on(self, state: Mapping[str, Any]) -> None:
        if not state:
            return  # of a checkpoint that does not say: worked out from the beginning, which is only slower
        places = state["sources"]
        if len(places) != len(self.sources):
            raise UserError(
                f"--data-path: {len(self.sources)} sources, but the checkpoint's data came from {len(places)}"
            )
        counts = [s.sequences_per_epoch * p["epoch"] + p["position"] for s, p in zip(self.sources, places, strict=True)]
        self.blend = Blend(self.blend.weights, (state["sequences"], counts))


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
    lengths = _joined([s.lengths for s in sequences])
    padded_lengths = _joined([s.padded_lengths for s in sequences])
    first_ids = np.array(
        [s.first_id + at for s in sequences for at in accumulate([0, *s.padded_lengths.tolist()[:-1]])], np.int64
    )
    packed_seq, owned = build_packed_seq(
        lengths,
        padded_lengths,
        cp_size=cp_size,
        cp_rank=cp_rank,
        qkv_format=qkv_format,
        layout=layout,
        first_ids=first_ids,
    )
    tokens, labels = _joined([s.tokens for s in sequences]), _joined([s.labels for s in sequences])
    row_hash = None
    if hash_row:
        digest = hashlib.blake2b(digest_size=8)
        for part in (tokens, labels, lengths, padded_lengths):
            digest.update(part.astype(np.int64).tobytes())
        row_hash = int.from_bytes(digest.digest(), "little", signed=True)
    counts = [np.count_nonzero(s.labels != IGNORE_LABEL) if s.loss_tokens is None else s.loss_tokens for s in sequences]
    return Batch(
        tokens=torch.from_numpy(tokens if cp_size == 1 else tokens[owned]),
        labels=torch.from_numpy(labels if cp_size == 1 else labels[owned]),
        packed_seq=packed_seq,
        loss_tokens=int(sum(counts)),
        real_tokens=sum(lengths.tolist()),
        cp_balance=1.0
        if cp_size == 1
        else balance(attention_pairs(lengths, padded_lengths, cp_size=cp_size, layout=layout)),
        row_hash=row_hash,
    )


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _without_tails(sequences: list[Sequence], *, unit: int) -> list[Sequence]:
    """The same documents without documents of real length 0, and one such at the end that makes the row a multiple of `unit`."""
    kept = []
    for s in sequences:
        real = np.repeat(s.lengths > 0, s.padded_lengths)
        assert (s.lengths[:-1] > 0).all(), "only the last document of a sequence is a tail"
        whole = s.lengths > 0
        kept.append(
            replace(
                s,
                tokens=s.tokens[real],
                labels=s.labels[real],
                lengths=s.lengths[whole],
                padded_lengths=s.padded_lengths[whole],
            )
        )
    total = sum(len(s.tokens) for s in kept)
    missing = -total % unit or (unit if not total else 0)
    if missing:
        first = sequences[0]
        pad_token = first.tokens[-1]  # what the tail holds does not matter
        tail = np.array([missing])
        kept.append(
            Sequence(
                np.full(missing, pad_token), np.full(missing, IGNORE_LABEL), np.zeros_like(tail), tail, loss_tokens=0
            )
        )
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

    def __init__(self, sequences: Sequences, plan: BatchPlan, limit: int | None = None) -> None:
        self.sequences, self.plan, self.limit = sequences, plan, limit

    def __getitem__(self, at: tuple[int, int]) -> Batch:
        plan = self.plan
        row = [
            self.sequences.empty_sequence()
            if self.limit is not None and n >= self.limit
            else self.sequences.sequence(n)
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
    def __init__(self, steps: ListLike[int], num_microbatches: int) -> None:
        self.steps, self.num_microbatches = steps, num_microbatches

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in self.steps:
            for microbatch in range(self.num_microbatches):
                yield step, microbatch

    def __len__(self) -> int:
        return len(self.steps) * self.num_microbatches


def build_loader(
    sequences: Sequences,
    plan: BatchPlan,
    *,
    steps: ListLike[int],
    num_workers: int,
    pin_memory: bool,
    limit: int | None = None,
    worker_init: Callable[[int], None] | None = None,
) -> DataLoader:
    """A loader of the microbatches of some steps, in order.

    Args:
        steps: their numbers from 0.
        num_workers: processes that build batches ahead; 0 builds them in this one. The batches are the same.
        worker_init: called first in each of them, with its number.
    """
    return DataLoader(
        RowDataset(sequences, plan, limit),
        batch_size=None,
        sampler=_StepSampler(steps, plan.num_microbatches),
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=worker_init,
    )


class DataFault(Exception):
    """Reading data failed in the middle of a run: a corpus that is not what it says, or a worker that died."""


@contextmanager
def data_faults() -> Iterator[None]:
    """Around a whole run: the error of a data worker that died, which PyTorch's handler of SIGCHLD raises wherever the rank happens to be.

    Raises:
        DataFault: in one line.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataFault(
            f"a data worker died ({str(error).splitlines()[0]}); out of memory? --num-workers 0 reads in the rank itself"
        ) from error


def read_batches(loader: DataLoader) -> Generator[Batch, None, None]:
    """The loader's batches; its `close` ends the workers.

    Raises:
        DataFault: in one line, what a worker found in the data.
    """
    try:
        yield from loader
    except ValueError as error:  # of a worker: with its traceback before the message
        raise DataFault(
            str(error).strip().splitlines()[-1].removeprefix("utils.errors.UserError: ").removeprefix("ValueError: ")
        ) from error
