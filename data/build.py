"""Tokenizer, tokens and splits of a run, built from its source once and cached."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.cache import build_once, cache_key
from data.corpus import Source
from data.indexed_dataset import IndexedDataset, write_indexed_dataset
from data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, train_sentencepiece

# Changes when the way tokenizers are trained or tokens are written does.
CACHE_VERSION = 2


def build_tokenizer(source: Source, *, tokenizer_type: str, tokenizer_model: str | None, vocab_size: int, cache_path: Path) -> Tokenizer:
    """The tokenizer of a run. Without `tokenizer_model`, SentencePiece trains one on the source, once.

    Raises:
        ValueError: a file that is no model, a broken or empty corpus, or one too small for the vocabulary.
    """
    if tokenizer_type == "byte":
        return ByteTokenizer()
    if tokenizer_model is not None:
        return SentencePieceTokenizer(Path(tokenizer_model))

    def train(folder: Path) -> None:
        fault: list[ValueError] = []

        def texts() -> Iterator[str]:
            # SentencePiece turns what its iterator raises into an error of its own.
            found = False
            try:
                for text in source.texts():
                    found = True
                    yield text
            except ValueError as error:
                fault.append(error)
                raise
            if not found:
                fault.append(_nothing_in(source))

        try:
            model = train_sentencepiece(texts(), vocab_size=vocab_size)
        except (RuntimeError, ValueError) as error:
            if fault:
                raise fault[0] from None
            raise ValueError(
                f"--tokenizer-vocab-size {vocab_size}: no such model can be trained on {source.name}; "
                f"choose a smaller one or --tokenizer-type byte (SentencePiece: {str(error).splitlines()[-1]})"
            ) from error
        (folder / "tokenizer.model").write_bytes(model)

    key = cache_key(version=CACHE_VERSION, source=source.made_from(), vocab_size=vocab_size)
    return SentencePieceTokenizer(build_once(cache_path / "tokenizer" / key, train) / "tokenizer.model")


def build_tokens(source: Source, tokenizer: Tokenizer, *, cache_path: Path) -> IndexedDataset:
    """The source's documents as token files, each document ended by the end-of-document token.

    Raises:
        ValueError: no document in the source, or a broken one.
    """

    def build(folder: Path) -> None:
        documents = (np.append(tokenizer.encode(text), np.int32(tokenizer.eod)) for text in source.texts())
        write_indexed_dataset(folder / "tokens", documents, vocab_size=tokenizer.vocab_size)

    key = cache_key(version=CACHE_VERSION, source=source.made_from(), tokenizer=tokenizer.fingerprint)
    tokens = IndexedDataset(build_once(cache_path / "tokens" / key, build) / "tokens")
    if not len(tokens):
        raise _nothing_in(source)
    return tokens


def _nothing_in(source: Source) -> ValueError:
    return ValueError(f"--data-path {source.name}: no document in it")


def split_documents(num_documents: int, weights: tuple[float, ...]) -> list[np.ndarray]:
    """Train, validation and test documents, in a fixed mixed order that does not depend on the run's seed.

    A split with a weight gets at least one document as long as there are enough; the first gets the rest.

    Returns:
        One ascending array of document numbers a weight.
    """
    order = np.random.default_rng(0).permutation(num_documents)
    counts = [max(1, round(num_documents * w / sum(weights))) if w else 0 for w in weights]
    if num_documents < sum(w > 0 for w in weights):
        counts = [0] * len(weights)
    while weights[0] and sum(counts[1:]) >= num_documents > 0 and max(counts[1:]) > 1:  # they rounded up to all there is
        counts[1 + int(np.argmax(counts[1:]))] -= 1
    counts[0] = num_documents - sum(counts[1:])
    ends = np.cumsum(counts)
    return [np.sort(order[end - count : end]) for count, end in zip(counts, ends, strict=True)]
