"""Tokenizer, tokens, splits and sequences of a run, built from its sources once and cached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.blend import whole_weights
from data.corpus import Source
from data.dataset import BlendedDataset, PackedDataset, PackingOptions, SampleDataset
from data.indexed_dataset import IndexedDataset, write_indexed_dataset
from data.sources import Part, Prepared, nothing_in, train_on
from data.tokenizer import SentencePieceTokenizer, Tokenizer, load_sentencepiece
from utils.errors import UserError
from utils.files import build_once, cache_entry, cache_key

# Changes when the way tokenizers are trained or tokens are written does.
CACHE_VERSION = 3


def train_tokenizer(source: Source | Prepared, *, vocab_size: int, cache_path: Path) -> Tokenizer:
    """A SentencePiece model of a source of text, trained once.

    Raises:
        ValueError: a broken or empty corpus, or one too small for the vocabulary.
    """

    assert isinstance(source, Source), "a prepared corpus has its tokenizer"

    def train(folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(train_on(source, vocab_size=vocab_size, flag="--tokenizer-vocab-size"))

    key = cache_key(version=CACHE_VERSION, source=source.made_from(), vocab_size=vocab_size)
    folder = build_once(cache_path / "tokenizer" / key, train)
    load_sentencepiece()  # a missing library is no fault of the cache
    with cache_entry(folder):
        return SentencePieceTokenizer(folder / "tokenizer.model")


def build_tokens(source: Source, tokenizer: Tokenizer, *, cache_path: Path) -> IndexedDataset:
    """The source's documents as token files, each document ended by the end-of-document token.

    Raises:
        ValueError: no document in the source, or a broken one.
    """

    def build(folder: Path) -> None:
        documents = (np.append(tokenizer.encode(text), np.int32(tokenizer.eod)) for text in source.texts())
        write_indexed_dataset(folder / "tokens", documents, vocab_size=tokenizer.vocab_size)

    key = cache_key(version=CACHE_VERSION, source=source.made_from(), tokenizer=tokenizer.fingerprint)
    folder = build_once(cache_path / "tokens" / key, build)
    with cache_entry(folder):
        tokens = IndexedDataset(folder / "tokens")
    if not len(tokens):
        raise nothing_in(source)
    return tokens


def split_documents(num_documents: int, weights: tuple[float, ...]) -> list[np.ndarray]:
    """Train, validation and test documents, in a fixed mixed order that does not depend on the run's seed.

    A split with a weight gets at least one document as long as there are enough; the first gets the rest.

    Returns:
        One ascending array of document numbers a weight.
    """
    if not any(weights[1:]):
        return [np.arange(num_documents), *(np.arange(0) for _ in weights[1:])]
    order = np.random.default_rng(0).permutation(num_documents)
    counts = [max(1, round(num_documents * w / sum(weights))) if w else 0 for w in weights]
    if num_documents < sum(w > 0 for w in weights):
        counts = [0] * len(weights)
    while (
        weights[0] and sum(counts[1:]) >= num_documents > 0 and max(counts[1:]) > 1
    ):  # they rounded up to all there is
        counts[1 + int(np.argmax(counts[1:]))] -= 1
    counts[0] = num_documents - sum(counts[1:])
    ends = np.cumsum(counts)
    return [np.sort(order[end - count : end]) for count, end in zip(counts, ends, strict=True)]


def cached_split(num_documents: int, weights: tuple[float, ...], *, cache_path: Path) -> list[np.ndarray]:
    """`split_documents`, kept on disk and memory-mapped: every rank and worker of a node shares one copy."""

    def build(folder: Path) -> None:
        for number, documents in enumerate(split_documents(num_documents, weights)):
            np.save(folder / f"{number}.npy", documents)

    folder = build_once(cache_path / "split" / cache_key(version=1, documents=num_documents, weights=weights), build)
    with cache_entry(folder):
        parts = [np.load(folder / f"{number}.npy", mmap_mode="r").view(np.ndarray) for number in range(len(weights))]
        if any(p.ndim != 1 or p.dtype != np.int64 for p in parts) or sum(len(p) for p in parts) != num_documents:
            raise UserError(f"parts of {[list(p.shape) for p in parts]} for {num_documents} documents")
        return parts


def build_dataset(
    parts: Sequence[Part],
    tokenizer: Tokenizer,
    packing: PackingOptions,
    *,
    split: tuple[float, ...],
    which: int,
    flag: str,
    cache_path: Path,
) -> SampleDataset:
    """The samples of one split of some sources, blended if there are several sources.

    Args:
        split: weights of train, validation and test documents.
        which: index into `split`; 0 is train.
        flag: names the sources in errors.

    Raises:
        ValueError: a source has no document or no whole sample in this split.
    """
    name = ("training", "validation", "test")[which]
    sources = []
    for part in parts:
        if isinstance(part.content, Prepared):
            tokens = part.content.tokens
        else:
            tokens = build_tokens(part.content, tokenizer, cache_path=cache_path)
        documents = cached_split(len(tokens), split, cache_path=cache_path)[which]
        if not len(documents):
            raise UserError(f"{flag} {part.name}: its {len(tokens)} documents leave no {name} document (--data-split)")
        dataset = PackedDataset(
            tokens,
            documents,
            packing,
            pad_token=tokenizer.eod,
            cache_path=cache_path,
            vocab_size=tokenizer.vocab_size,
            name=part.name,
        )
        if not dataset.samples_per_epoch:
            raise UserError(
                f"--seq-length {packing.seq_length}: the {name} documents of {part.name} hold {dataset.num_tokens} tokens, "
                f"not one sequence"
            )
        sources.append(dataset)
    if len(sources) == 1:
        return sources[0]
    weights = [s.samples_per_epoch if p.weight is None else p.weight for s, p in zip(sources, parts, strict=True)]
    return BlendedDataset(sources, whole_weights(weights))
