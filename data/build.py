"""Tokenizer, tokens, splits and samples of a run, built from its sources once and cached."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from data.ahead import start_child
from data.blend import whole_weights
from data.dataset import (
    BlendedDataset,
    CorpusFacts,
    Mixture,
    PackedDataset,
    PackingOptions,
    SampleDataset,
    measure_corpus,
)
from data.files import file_version
from data.indexed_dataset import IndexedDataset, index_file, token_file, write_indexed_dataset
from data.sources import DataSource, PreparedCorpus, TextSource, list_opened, no_document_error, train_model
from data.split import MAX_TABLE_DOCUMENTS, Documents, cached_split, count_documents
from data.tokenizer import SentencePieceTokenizer, Tokenizer, UnencodableText, load_sentencepiece
from utils.errors import UserError
from utils.files import CacheNotWritable, build_once, cache_entry, cache_key, parse_json, read_text

# Part of the cache keys: raise it when the training of tokenizers or the written tokens change.
CACHE_VERSION = 3
# Documents of a window where an epoch's index over all documents, about 95 bytes each, would not fit in memory.
FORCED_WINDOW = 100_000


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
    """Token files of the source, cached; EOD ends each document, and the tokenizer's BOS, if set, begins it.

    Raises:
        UserError: no document in the source, or a corrupted one.
    """

    more = {} if tokenizer.bos is None else {"bos": tokenizer.bos}

    def encode(number: int, text: str) -> np.ndarray:
        try:
            return tokenizer.frame(tokenizer.encode(text))
        except UnencodableText as error:
            raise UserError(f"{source.flag} {source.name}: document {number} {error}") from error

    def build(folder: Path) -> None:
        documents = (encode(number, text) for number, text in enumerate(source.texts(), 1))
        write_indexed_dataset(folder / "tokens", documents, vocab_size=tokenizer.vocab_size)

    key = cache_key(version=CACHE_VERSION, source=source.cache_facts(), tokenizer=tokenizer.fingerprint, **more)
    folder = build_once(cache_path / "tokens" / key, build)
    with cache_entry(folder):
        tokens = IndexedDataset(folder / "tokens")
    if not len(tokens):
        raise no_document_error(source)
    return tokens


def cached_facts(
    tokens: IndexedDataset,
    documents: Documents,
    packing: PackingOptions,
    *,
    split: tuple[float, ...],
    which: int,
    cache_path: Path,
) -> CorpusFacts:
    """`measure_corpus` from the cache, where a file's path, size and times (mtime, ctime) name it.

    So one process reads the whole index, and the documents of the fingerprint. A rank that sees another file measures
    its own.
    """
    files = [file_version(str(file(tokens.prefix))) for file in (index_file, token_file)]
    key = cache_key(version=2, files=files, split=split, which=which, method=packing.method, length=packing.seq_length)

    def build(folder: Path) -> None:
        (folder / "facts.json").write_text(json.dumps(vars(measure_corpus(tokens, documents, packing))))

    try:
        folder = build_once(cache_path / "facts" / key, build)
    except (CacheNotWritable, OSError):  # a read-only cache
        return measure_corpus(tokens, documents, packing)
    with cache_entry(folder):
        found = parse_json(read_text(folder / "facts.json"))
        if not isinstance(found, dict) or {n: type(v) for n, v in found.items()} != get_type_hints(CorpusFacts):
            raise UserError("facts.json does not hold the facts of a corpus")
    tokens.is_checked = tokens.is_checked or found["is_checked"]
    return CorpusFacts(**found)


def open_dataset(
    tokens: IndexedDataset,
    packing: PackingOptions,
    *,
    split: tuple[float, ...],
    which: int,
    cache_path: Path,
    builds_ahead: bool = False,
    **more: Any,
) -> PackedDataset:
    """One split of a corpus; above `MAX_TABLE_DOCUMENTS` documents best-fit takes windows.

    Args:
        builds_ahead: start a process that builds the next epoch's index before an epoch ends.
        more: of `PackedDataset`.
    """
    documents = cached_split(len(tokens), split, cache_path=cache_path)[which]
    facts = cached_facts(tokens, documents, packing, split=split, which=which, cache_path=cache_path)
    if packing.method == "best-fit" and packing.window is None and len(tokens) > MAX_TABLE_DOCUMENTS:
        packing = replace(packing, window=FORCED_WINDOW)
        facts = replace(facts, fingerprint=cache_key(of=facts.fingerprint, window=FORCED_WINDOW))

    def start_building(epoch: int) -> subprocess.Popen:
        index = dict(prefix=tokens.prefix.resolve(), cache_path=cache_path.resolve(), split=split, which=which)
        return start_child(**index, packing=vars(packing), epoch=epoch)

    ahead = start_building if builds_ahead else None
    return PackedDataset(tokens, documents, packing, cache_path=cache_path, facts=facts, build_ahead=ahead, **more)


def _check_tokens(dataset: PackedDataset, source: DataSource, tokenizer: Tokenizer) -> None:
    """Raises UserError: ids outside the vocabulary among the first tokens, or documents that do not begin with BOS."""
    if dataset.facts.highest >= tokenizer.vocab_size:
        raise UserError(
            f"{dataset.tokens.prefix}.bin: holds token {np.uint64(dataset.facts.highest).astype(np.int64)}, but the "
            f"tokenizer's are 0 to {tokenizer.vocab_size - 1}: made with another tokenizer, or corrupted"
        )
    # What P.json says was compared already; only files without it are read.
    if tokenizer.bos is None or not isinstance(source.content, PreparedCorpus) or source.content.metadata:
        return
    if (share := dataset.share_with(tokenizer.bos, at_end=False)) < 1:
        raise UserError(f"--bos: only {share:.1%} of the documents of {source.name} begin with token {tokenizer.bos}")


def build_dataset(
    sources: Sequence[DataSource],
    tokenizer: Tokenizer,
    packing: PackingOptions,
    *,
    split: tuple[float, ...],
    which: int,
    flag: str,
    cache_path: Path,
    starts: Sequence[int] = (),
    builds_ahead: bool = False,
) -> SampleDataset:
    """The samples of one split of some sources, blended if there are several sources.

    Args:
        split: weights of train, validation and test documents.
        which: index into `split`; 0 is train.
        flag: names the sources in errors.
        starts: first sample of each phase after the first.
        builds_ahead: as `open_dataset`'s.

    Raises:
        UserError: a source has no document, no whole sample or no label in this split.
    """
    name = ("training", "validation", "test")[which]
    datasets = []
    for source in list_opened(sources):
        if isinstance(source.content, PreparedCorpus):
            tokens = source.content.tokens
        else:
            tokens = build_tokens(source.content, tokenizer, cache_path=cache_path)
        num_documents = count_documents(len(tokens), split)[which]
        if not num_documents:
            raise UserError(
                f"{flag} {source.name}: its {len(tokens)} documents leave no {name} document: "
                "give more, as lines of a .jsonl file or as files of a folder"
                + (", or other text by --valid-data-path, or --data-split 1,0 --eval-interval 0" if which else "")
            )
        dataset = open_dataset(
            tokens,
            packing,
            split=split,
            which=which,
            cache_path=cache_path,
            builds_ahead=builds_ahead,
            pad_token=tokenizer.eod,
            vocab_size=tokenizer.vocab_size,
            name=source.name,
        )
        if not dataset.samples_per_epoch:
            raise UserError(
                f"--seq-length {packing.seq_length}: the {name} documents of {source.name} hold {dataset.num_tokens} "
                "tokens, not one sequence"
            )
        _check_tokens(dataset, source, tokenizer)
        if dataset.facts.longest < 2 and packing.method != "concat":
            raise UserError(
                f"{flag} {source.name}: each of its {num_documents} {name} documents is one token: no label to learn"
            )
        datasets.append(dataset)
    if len(datasets) == len(starts) + 1 == 1:
        return datasets[0]
    numbers, mixtures = {id(source.content): number for number, source in enumerate(list_opened(sources))}, []
    for phase, first in enumerate((0, *starts)):
        own = [source for source in sources if source.phase == phase]
        members = [numbers[id(source.content)] for source in own]
        pairs = zip(members, own, strict=True)
        weights = [datasets[m].samples_per_epoch if source.weight is None else source.weight for m, source in pairs]
        mixtures.append(Mixture(first, whole_weights(weights), members))
    return BlendedDataset(datasets, mixtures)
