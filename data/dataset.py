"""Datasets of packed samples: sample n is a function of the documents, the packing options and n.

Samples run on through the epochs without end. A blend of several datasets takes its samples from them in turn
(data/blend.py).
"""

from __future__ import annotations

import bisect
import hashlib
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import get_worker_info

from cp.packed_seq import IGNORE_LABEL
from data.blend import Blend
from data.indexed_dataset import CHUNK, IndexedDataset
from data.packing import (
    Epoch,
    PackingOptions,
    StoredEpoch,
    Windows,
    build_epoch,
    load_epoch,
    save_epoch,
    windowed_epoch,
)
from data.split import Documents
from utils.errors import UserError
from utils.files import CacheNotWritable, build_once, cache_entry, cache_key

# Part of the cache key: raise this version when the packing of an epoch changes.
INDEX_VERSION = 2
# Epochs of fewer pieces are packed in memory: a small source, read for thousands of epochs, fills no folder per epoch.
MIN_STORED_PIECES = 10_000
AHEAD = 0.9  # share of an epoch after which the next epoch's index is built
NOT_READ = -1  # token and label of a sample of which only the index is read; neither padding nor IGNORE_LABEL


@dataclass
class PackedSample:
    """`seq_length` tokens, their labels and the documents that they belong to.

    Attributes:
        tokens, labels: [seq_length] int64; a label is -100 where no loss is computed.
        lengths, padded_lengths: [documents] tokens of each document without and with padding; the tail is a document of
            length 0.
        first_id: number of the first token in the whole run, epochs included; dropout is keyed by it.
        loss_tokens: number of labelled tokens; None: counted when the batch is built.
    """

    tokens: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    padded_lengths: np.ndarray
    first_id: int = 0
    loss_tokens: int | None = None


def padding_sample(length: int, pad_token: int) -> PackedSample:
    """A sample of `length` padding tokens, none of them labelled."""
    padded = np.array([length])
    tokens, labels = np.full(length, pad_token, np.int64), np.full(length, IGNORE_LABEL, np.int64)
    return PackedSample(tokens, labels, np.zeros_like(padded), padded, loss_tokens=0)


@dataclass(frozen=True)
class CorpusFacts:
    """What a pass over a split's documents tells.

    Attributes:
        lengths_hash: of all lengths: the packing depends on them only, not on the documents' places in the file.
        fingerprint: hash of all lengths and of the first 64 tokens of up to 1000 documents.
        num_tokens, longest: tokens of all documents, and of the longest.
        num_pieces: pieces that the packing makes of them.
        num_cut: documents longer than a sample.
        highest: largest id among the tokens of the fingerprint, as an unsigned number: a negative id is very large.
        is_checked: as `IndexedDataset`'s.
    """

    lengths_hash: str
    fingerprint: str
    num_tokens: int
    longest: int
    num_pieces: int
    num_cut: int
    highest: int
    is_checked: bool


def measure_corpus(tokens: IndexedDataset, documents: Documents, packing: PackingOptions) -> CorpusFacts:
    """Reads the whole index once, in constant memory. Raises UserError: as `IndexedDataset.lengths`."""
    digest, seq_length = hashlib.sha256(), packing.seq_length
    num_tokens = longest = num_pieces = num_cut = 0
    for at in range(0, len(documents), CHUNK):
        lengths = tokens.lengths[documents[at : at + CHUNK]].astype(np.int64)
        digest.update(lengths.tobytes())
        num_pieces += int((-(-lengths // seq_length)).sum()) if packing.method == "best-fit" else len(lengths)
        num_tokens += int(lengths.sum())
        longest = max(longest, int(lengths.max()))
        num_cut += int((lengths > seq_length).sum())
    content, highest = hashlib.sha256(digest.hexdigest().encode()), 0
    for document in _some_documents(documents):
        ids = tokens.read(document, 0, min(64, tokens.lengths.item(document))).astype(np.int64)
        content.update(ids.tobytes())
        highest = max(highest, int(ids.view(np.uint64).max(initial=0)))
    counts = num_tokens, longest, num_pieces, num_cut, highest
    return CorpusFacts(digest.hexdigest(), content.hexdigest()[:16], *counts, bool(tokens.is_checked))


def _some_documents(documents: Documents) -> Iterator[int]:
    """Up to 1000 documents, spread evenly."""
    count = len(documents)
    for at in np.unique(np.linspace(0, count - 1, num=min(1000, count), dtype=np.int64)):
        yield int(documents[at])


class PackedDataset:
    """Samples of endless epochs over some documents of a token file.

    Args:
        documents: [n] numbers of the split's documents in `tokens`.
        pad_token: id that fills padding; no loss is computed on it.
        cache_path: folder for epoch indices of at least `MIN_STORED_PIECES` pieces; None: indices stay in memory.
        vocab_size: token ids must be in [0, vocab_size); None: not checked.
        name: for messages.
        facts: of these documents; None: measured.
        build_ahead: starts a process that stores the index of an epoch; None: a stored index is built when its epoch
            begins.

    Raises:
        UserError: as `IndexedDataset.lengths`.
        CacheNotWritable: the first epoch's index is not cached and cannot be written.
    """

    def __init__(
        self,
        tokens: IndexedDataset,
        documents: Documents,
        packing: PackingOptions,
        *,
        pad_token: int,
        cache_path: Path | None = None,
        vocab_size: int | None = None,
        name: str = "",
        facts: CorpusFacts | None = None,
        build_ahead: Callable[[int], subprocess.Popen] | None = None,
    ) -> None:
        self.tokens, self.documents, self.packing, self.name = tokens, documents, packing, name or str(tokens.prefix)
        self.pad_token, self.vocab_size, self.cache_path = pad_token, vocab_size, cache_path
        self.seq_length = packing.seq_length
        self.facts = facts or measure_corpus(tokens, documents, packing)
        self.num_tokens = self.facts.num_tokens
        self._epochs: dict[int, Epoch] = {}
        self._build_ahead = build_ahead
        self._ahead: tuple[int, subprocess.Popen | None] = (0, None)  # the latest epoch that is built ahead
        if packing.window is None:
            self.samples_per_epoch = len(self.epoch(0))  # reads all lengths in order
            tokens.expect_random_reads()
        else:
            tokens.expect_random_reads()
            self.samples_per_epoch = len(self.epoch(0))  # reads the lengths of random documents

    @property
    def lengths(self) -> np.ndarray:
        """[documents] int64 tokens of each, gathered at every call."""
        return self.tokens.lengths[self.documents[:]].astype(np.int64)

    def epoch(self, number: int) -> Epoch:
        """The index of an epoch; the latest two stay in memory, for a step may need both in turns."""
        if number not in self._epochs:
            index = self._load_epoch(number) if self.packing.window is None else self._load_windows(number)
            self._epochs = dict([*self._epochs.items(), (number, index)][-2:])
        return self._epochs[number]

    def fingerprint(self) -> str:
        """As `CorpusFacts.fingerprint`."""
        return self.facts.fingerprint

    def _cache_folder(self, **more: int) -> Path:
        assert self.cache_path is not None
        packing = self.packing
        key = cache_key(
            version=INDEX_VERSION,
            lengths=self.facts.lengths_hash,
            packing=packing.method,
            seq_length=packing.seq_length,
            seed=packing.seed,
            alignment=1 if packing.method == "concat" else packing.alignment,
            **more,
        )
        return self.cache_path / "packing" / key

    @property
    def _is_stored(self) -> bool:
        """Whether each epoch has an index of its own on the disk."""
        is_large = self.facts.num_pieces >= MIN_STORED_PIECES
        return self.cache_path is not None and self.packing.window is None and is_large

    def _load_epoch(self, number: int) -> StoredEpoch:
        if not self._is_stored:
            return build_epoch(self.lengths, self.packing, number)
        folder = self._cache_folder(epoch=number)
        try:
            build_once(folder, lambda scratch: save_epoch(build_epoch(self.lengths, self.packing, number), scratch))
        except (CacheNotWritable, OSError):  # read-only, or a full disk
            if number == 0:  # refused at the start: later, every rank and worker would pay for the index in memory
                raise
            return build_epoch(self.lengths, self.packing, number)
        with cache_entry(folder):
            return load_epoch(self.packing.method, folder, self.seq_length)

    def _load_windows(self, number: int) -> Epoch:
        packing = self.packing
        assert packing.method == "best-fit" and packing.window is not None
        documents = self.documents
        windows = Windows(lambda numbers: self.tokens.lengths[documents[numbers]], len(documents), packing)
        if self.cache_path is None:
            return windowed_epoch(windows, windows.count_samples(), number)
        folder = self._cache_folder(window=packing.window)
        build_once(folder, lambda scratch: np.save(scratch / "counts.npy", windows.count_samples()))
        with cache_entry(folder):
            counts = np.load(folder / "counts.npy")
            if counts.shape != (len(windows),) or counts.dtype != np.int64 or counts.min(initial=0) < 0:
                raise UserError(f"counts.npy is {counts.dtype} {list(counts.shape)} for {len(windows)} windows")
        return windowed_epoch(windows, counts, number)

    def share_with(self, token: int, *, at_end: bool) -> float:
        """Share of documents, of up to 1000 that are not empty, whose last, or first, token this is."""
        lengths = ((document, self.tokens.lengths.item(document)) for document in _some_documents(self.documents))
        found = [self.tokens.read(document, (n - 1) * at_end, 1).item() for document, n in lengths if n]
        return found.count(token) / max(1, len(found))

    def state_dict(self, n: int) -> dict[str, Any]:
        """Epoch and position of each source before sample n, and the mixtures so far, as JSON."""
        epoch, position = divmod(n, self.samples_per_epoch)
        place = {"name": self.name, "fingerprint": self.fingerprint(), "epoch": epoch, "position": position}
        return {"sequences": n, "sources": [place], "mixtures": [[0, self.list_rows()]]}

    def list_rows(self, number: int = 0) -> list[list[Any]]:
        """As `BlendedDataset.list_rows`."""
        return [[self.name, self.fingerprint(), 1.0]]

    def sample(self, n: int, *, reads_tokens: bool = True) -> PackedSample:
        """Sample n of the run; every epoch has `samples_per_epoch` of them.

        Args:
            reads_tokens: False: only the index is read; tokens and labels are `NOT_READ`.

        Raises:
            UserError: the token file contradicts its index, or holds tokens outside the vocabulary.
        """
        epoch, at = divmod(n, self.samples_per_epoch)
        index = self.epoch(epoch)
        worker = get_worker_info()
        builds = self._build_ahead if worker is None or worker.id == 0 else None
        if builds is not None and at > AHEAD * self.samples_per_epoch and self._ahead[0] <= epoch:
            self._ahead = (epoch + 1, builds(epoch + 1) if self._is_stored else None)
        assert len(index) == self.samples_per_epoch
        pieces = index.sample_pieces(at)
        # A sample has few pieces: Python's numbers are faster than arrays from here on.
        columns = (self.documents[pieces[:, 0]], pieces[:, 1], pieces[:, 2])
        triples = list(zip(*(column.tolist() for column in columns), strict=True))
        build = self._cut_stream if self.packing.method == "concat" else self._join_documents
        sample = build(triples, reads_tokens)
        sample.first_id = n * self.seq_length
        return sample

    def squared_lengths(self, first: int, count: int) -> np.ndarray:
        """[count] int64 sum of length^2 over the documents of samples `first` to `first + count - 1`.

        Read from the index: no token is touched.
        """
        if self.packing.one_document or self.packing.method == "concat":
            return np.full(count, self.seq_length**2)
        parts = []
        while count:
            epoch, at = divmod(first, self.samples_per_epoch)
            taken = min(count, self.samples_per_epoch - at)
            lengths, bounds = self.epoch(epoch).piece_lengths(at, at + taken)
            sums = np.concatenate(([0], np.cumsum(lengths * lengths)))[bounds]
            parts.append(np.diff(sums))
            first, count = first + taken, count - taken
        return np.concatenate(parts)

    def empty_sample(self) -> PackedSample:
        """Only padding: fills the last batch of an evaluation and counts nothing."""
        return padding_sample(self.seq_length, self.pad_token)

    def _cut_stream(self, pieces: list[tuple[int, int, int]], reads_tokens: bool) -> PackedSample:
        whole = np.array([self.seq_length])
        if not reads_tokens:
            unread = np.full(self.seq_length, NOT_READ, np.int64)
            return PackedSample(unread, unread, whole, whole, loss_tokens=self.seq_length)
        for document, start, length in pieces:
            self.tokens.prefetch(self.tokens.locate(document, start, length), length)
        stream = np.concatenate([self.tokens.read(*piece) for piece in pieces]).astype(np.int64)
        self._check_vocabulary(stream, [], pieces)
        return PackedSample(stream[:-1], stream[1:], whole, whole, loss_tokens=self.seq_length)

    def _check_vocabulary(self, tokens: np.ndarray, ahead: list[int], pieces: list[tuple[int, int, int]]) -> None:
        """Checks a sample's tokens and the labels that are not among them. Raises UserError: names id and document."""
        size = self.vocab_size
        # As unsigned numbers, negative ids are very large: one pass finds both faults.
        if size is None or (int(tokens.view(np.uint64).max()) < size and all(0 <= label < size for label in ahead)):
            return
        for document, start, length in pieces:
            ids = self.tokens.read(document, start, min(length + 1, self.tokens.lengths.item(document) - start))
            outside = ids[(ids < 0) | (ids >= size)]
            if len(outside):
                raise UserError(
                    f"{self.tokens.prefix}.bin: token {outside[0]} in document {document}, but the tokenizer's are "
                    f"0 to {size - 1}: made with another tokenizer, or corrupted"
                )
        raise AssertionError(f"padding with token {self.pad_token} of {size}")

    def _join_documents(self, pieces: list[tuple[int, int, int]], reads_tokens: bool) -> PackedSample:
        whole_lengths, alignment = self.tokens.lengths, self.packing.alignment
        # The label of a piece's last token is one token ahead; a document's last token has none.
        continued = [whole_lengths.item(document) - start > length for document, start, length in pieces]
        lengths = [length for _, _, length in pieces]
        padded_lengths = [-(-length // alignment) * alignment for length in lengths]
        loss_tokens = sum(lengths) - len(pieces) + sum(continued)
        if reads_tokens:
            tokens, labels = self._read_pieces(pieces, continued, padded_lengths)
        else:
            tokens = labels = np.full(self.seq_length, NOT_READ, np.int64)
        at = sum(padded_lengths)
        if self.packing.one_document:
            lengths, padded_lengths = [at], [self.seq_length]
        elif at < self.seq_length:  # the tail is a document of length 0
            lengths.append(0)
            padded_lengths.append(self.seq_length - at)
        return PackedSample(tokens, labels, np.array(lengths), np.array(padded_lengths), loss_tokens=loss_tokens)

    def _read_pieces(
        self, pieces: list[tuple[int, int, int]], continued: list[bool], padded_lengths: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels [seq_length] of a sample."""
        tokens, labels = np.empty(self.seq_length, np.int64), np.empty(self.seq_length, np.int64)
        stored, ends, ahead, begins, at = self.tokens.tokens, [], [], [], 0
        for (document, start, length), continues in zip(pieces, continued, strict=True):
            begins.append(self.tokens.locate(document, start, length + continues))
            self.tokens.prefetch(begins[-1], length + continues)
        for begin, (_, _, length), padded, continues in zip(begins, pieces, padded_lengths, continued, strict=True):
            end = at + length
            tokens[at:end] = stored[begin : begin + length]
            label = IGNORE_LABEL
            if continues:
                label = stored.item(begin + length)
                ahead.append(label)
            at += padded
            if at > end:
                tokens[end:at] = self.pad_token
            ends.append((end, at, label))
        tokens[at:] = self.pad_token
        # Shifting all labels at once, then correcting document ends, is faster than shifting each document.
        labels[:-1] = tokens[1:]
        for end, padded_end, label in ends:
            labels[end - 1] = label
            if padded_end > end:
                labels[end:padded_end] = IGNORE_LABEL
        labels[at:] = IGNORE_LABEL
        self._check_vocabulary(tokens, ahead, pieces)
        return tokens, labels

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_epochs": {}, "_build_ahead": None}


class Mixture(NamedTuple):
    """Which sources give the samples of a run from one sample on.

    Attributes:
        first: this sample.
        weights: [members] positive whole numbers in proportion to the samples of each.
        members: number of each source.
    """

    first: int
    weights: list[int]
    members: list[int]


@dataclass(frozen=True)
class Past:
    """What a resumed run has read.

    Attributes:
        current: number of the mixture that goes on.
        begun, counts: [sources] samples of each before this mixture, and before sample n.
        n: samples read.
        mixtures: first sample and rows (`list_rows`) of the mixtures before.
        left: states of sources that are in none of the run's mixtures any more.
    """

    current: int
    begun: list[int]
    counts: list[int]
    n: int
    mixtures: list[list[Any]]
    left: list[dict[str, Any]]


class _Turns(NamedTuple):
    """A mixture that the run has reached. Attributes: [sources] samples of each before the mixture."""

    blend: Blend
    begun: list[int]


class BlendedDataset:
    """Samples of several datasets in turn (data/blend.py), by one mixture or by one after the other.

    Each source goes on where the mixtures before have left it.

    Args:
        mixtures: ascending; the first begins with sample 0, or in a resumed run with any sample that is read.
        past: of a resumed run.
    """

    def __init__(self, sources: Sequence[PackedDataset], mixtures: Sequence[Mixture], past: Past | None = None) -> None:
        self.sources, self.mixtures = list(sources), list(mixtures)
        none = [0] * len(sources)
        self.past = past or Past(0, none, none, 0, [], [])
        self.seq_length = self.sources[0].seq_length
        self._turns: dict[int, _Turns] = {}
        # Samples before any source of the first mixture begins its second epoch.
        _, weights, members = self.mixtures[0]
        sizes = [self.sources[member].samples_per_epoch for member in members]
        self.samples_per_epoch = min(size * sum(weights) // w for size, w in zip(sizes, weights, strict=True))

    def sample(self, n: int, *, reads_tokens: bool = True) -> PackedSample:
        source, position = self.at(n)
        sample = self.sources[source].sample(position, reads_tokens=reads_tokens)
        sample.first_id = n * self.seq_length  # of the run: repeated tokens get other dropout masks
        return sample

    def at(self, n: int) -> tuple[int, int]:
        """(source, number of the sample in that source) of sample n, which is none of a mixture before the current."""
        number = max(self.past.current, bisect.bisect_right(self.mixtures, n, key=lambda m: m.first) - 1)
        (first, _, members), turns = self.mixtures[number], self._find_turns(number)
        place, position = turns.blend.at(n - first)
        return members[place], position + turns.begun[members[place]]

    def counts(self, n: int) -> list[int]:
        """[sources] samples of each before sample n."""
        number = self._mixture_before(n)
        (first, _, members), turns = self.mixtures[number], self._find_turns(number)
        counts = list(turns.begun)
        for member, count in zip(members, turns.blend.counts(n - first), strict=True):
            counts[member] += count
        return counts

    def _mixture_before(self, n: int) -> int:
        """Number of the mixture of sample n - 1."""
        return max(self.past.current, bisect.bisect_left(self.mixtures, n, key=lambda m: m.first) - 1)

    def _find_turns(self, number: int) -> _Turns:
        if number not in self._turns:
            (first, weights, members), past = self.mixtures[number], self.past
            is_current = number == past.current
            begun = past.begun if is_current else self.counts(first)
            since = [past.counts[member] - begun[member] for member in members]
            self._turns[number] = _Turns(Blend(weights, (past.n - first, since) if is_current else None), begun)
        return self._turns[number]

    def squared_lengths(self, first: int, count: int) -> np.ndarray:
        """As `PackedDataset.squared_lengths`."""
        found = np.array([self.at(n) for n in range(first, first + count)], np.int64)
        squares = np.zeros(count, np.int64)
        for number, source in enumerate(self.sources):
            own = found[:, 0] == number
            if own.any():  # a source's samples of a step follow each other
                squares[own] = source.squared_lengths(int(found[own, 1][0]), int(own.sum()))
        return squares

    def empty_sample(self) -> PackedSample:
        return self.sources[0].empty_sample()

    def fingerprint(self) -> str:
        """Hash of the sources in order, their weights and where later mixtures begin; of one source its own."""
        if len(self.sources) == len(self.mixtures) == 1:
            return self.sources[0].fingerprint()
        prints = [source.fingerprint() for source in self.sources]
        blends = [
            (first, [(prints[member], w) for member, w in zip(members, weights, strict=True)])
            for first, weights, members in self.mixtures
        ]
        return cache_key(blend=blends[0][1], **({"later": blends[1:]} if blends[1:] else {}))

    def list_rows(self, number: int) -> list[list[Any]]:
        """[name, fingerprint, share of the samples] of each source of a mixture."""
        _, weights, members = self.mixtures[number]
        total, sources = sum(weights), [self.sources[member] for member in members]
        return [[source.name, source.fingerprint(), w / total] for source, w in zip(sources, weights, strict=True)]

    def state_dict(self, n: int) -> dict[str, Any]:
        """As `PackedDataset.state_dict`, and the samples of each source before the mixture of sample n - 1."""
        last = self._mixture_before(n)
        numbers = range(self.past.current, last + 1)
        mixtures = [[self.mixtures[number].first, self.list_rows(number)] for number in numbers]
        sources, left = zip(self.sources, self.counts(n), strict=True), self.past.left
        begun = [*self._find_turns(last).begun, *([0] * len(left))]
        return {
            "sequences": n,
            "sources": [*(source.state_dict(count)["sources"][0] for source, count in sources), *left],
            "mixture": {"sequences": self.mixtures[last].first, "counts": begun},
            "mixtures": [*self.past.mixtures, *mixtures],
        }


SampleDataset = PackedDataset | BlendedDataset
