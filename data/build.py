"""Tokenizer, tokens, splits and samples of a run, built from its sources once and cached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.blend import whole_weights
from data.dataset import BlendedDataset, PackedDataset, PackingOptions, SampleDataset
from data.indexed_dataset import IndexedDataset, write_indexed_dataset
from data.sources import DataSource, PreparedCorpus, TextSource, no_document_error, train_model
from data.tokenizer import SentencePieceTokenizer, Tokenizer, UnencodableText, load_sentencepiece
from utils.errors import UserError
from utils.files import build_once, cache_entry, cache_key

# Part of the cache keys: raise it when the training of tokenizers or the written tokens change.
CACHE_VERSION = 3


def train_tokenizer(source: TextSource | PreparedCorpus, *, vocab_size: int, cache_path: Path) -> Tokenizer:
    """A SentencePiece tokenizer trained on a source of text, cached.

    Raises:
        UserError: a corrupted or empty source, or one too small for the vocabulary.
    """
    assert isinstance(source, TextSource), "a prepared corpus has a tokenizer"

    def train(folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(
            train_model(source, vocab_size=vocab_size, flag="--tokenizer-vocab-size")
        )

    key = cache_key(version=CACHE_VERSION, source=source.cache_facts(), vocab_size=vocab_size)
    folder = build_once(cache_path / "tokenizer" / key, train)
    load_sentencepiece()  # a missing library is refused as such, not as a corrupted cache
    with cache_entry(folder):
        return SentencePieceTokenizer(folder / "tokenizer.model")


def build_tokens(source: TextSource, tokenizer: Tokenizer, *, cache_path: Path) -> IndexedDataset:
    """Token files of the source, cached; EOD ends each document.

    Raises:
        UserError: no document in the source, or a corrupted one.
    """

    def encode(number: int, text: str) -> np.ndarray:
        try:
            return np.append(tokenizer.encode(text), np.int32(tokenizer.eod))
        except UnencodableText as error:
            raise UserError(f"{source.flag} {source.name}: document {number} {error}") from error

    def build(folder: Path) -> None:
        documents = (encode(number, text) for number, text in enumerate(source.texts(), 1))
        write_indexed_dataset(folder / "tokens", documents, vocab_size=tokenizer.vocab_size)

    key = cache_key(version=CACHE_VERSION, source=source.cache_facts(), tokenizer=tokenizer.fingerprint)
    folder = build_once(cache_path / "tokens" / key, build)
    with cache_entry(folder):
        tokens = IndexedDataset(folder / "tokens")
    if not len(tokens):
        raise no_document_error(source)
    return tokens


def split_documents(num_documents: int, weights: tuple[float, ...]) -> list[np.ndarray]:
    """Train, validation and test documents, drawn with a fixed seed.

    Each split with a weight gets at least one document where there are enough; the first split gets the rest.

    Returns:
        An ascending array of document numbers for each weight.
    """
    if not any(weights[1:]):
        return [np.arange(num_documents), *(np.arange(0) for _ in weights[1:])]
    order = np.random.default_rng(0).permutation(num_documents)
    counts = [max(1, round(num_documents * w / sum(weights))) if w else 0 for w in weights]
    if num_documents < sum(w > 0 for w in weights):
        counts = [0] * len(weights)
    # Rounding up must leave a document to the first split.
    while weights[0] and sum(counts[1:]) >= num_documents > 0 and max(counts[1:]) > 1:
        counts[1 + int(np.argmax(counts[1:]))] -= 1
    counts[0] = num_documents - sum(counts[1:])
    ends = np.cumsum(counts)
    return [np.sort(order[end - count : end]) for count, end in zip(counts, ends, strict=True)]


def cached_split(num_documents: int, weights: tuple[float, ...], *, cache_path: Path) -> list[np.ndarray]:
    """`split_documents` from the cache, memory-mapped: ranks and workers of a node share one copy."""

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
    sources: Sequence[DataSource],
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
        UserError: a source has no document, no whole sample or no label in this split.
    """
    name = ("training", "validation", "test")[which]
    datasets = []
    for source in sources:
        if isinstance(source.content, PreparedCorpus):
            tokens = source.content.tokens
        else:
            tokens = build_tokens(source.content, tokenizer, cache_path=cache_path)
        documents = cached_split(len(tokens), split, cache_path=cache_path)[which]
        if not len(documents):
            raise UserError(
                f"{flag} {source.name}: its {len(tokens)} documents leave no {name} document: "
                "give more, as lines of a .jsonl file or as files of a folder"
                + (", or other text by --valid-data-path, or --data-split 1,0 --eval-interval 0" if which else "")
            )
        dataset = PackedDataset(
            tokens,
            documents,
            packing,
            pad_token=tokenizer.eod,
            cache_path=cache_path,
            vocab_size=tokenizer.vocab_size,
            name=source.name,
        )
        if not dataset.samples_per_epoch:
            raise UserError(
                f"--seq-length {packing.seq_length}: the {name} documents of {source.name} hold {dataset.num_tokens} "
                "tokens, "
                f"not one sequence"
            )
        if dataset.longest < 2 and packing.method != "concat":
            raise UserError(
                f"{flag} {source.name}: each of its {len(documents)} {name} documents is one token: no label to learn"
            )
        datasets.append(dataset)
    if len(datasets) == 1:
        return datasets[0]
    pairs = zip(datasets, sources, strict=True)
    weights = [data.samples_per_epoch if source.weight is None else source.weight for data, source in pairs]
    return BlendedDataset(datasets, whole_weights(weights))
