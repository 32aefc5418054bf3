"""Tokenizers: raw bytes, or a SentencePiece model. Both end a document with one end-of-document token."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np

TOKENIZER_TYPES = ("sentencepiece", "byte")
SPACE = "\u2581"  # what SentencePiece writes for a space inside its pieces


class Tokenizer(Protocol):
    """What the data pipeline asks of a tokenizer.

    `eod` is the id that ends every document; `fingerprint` changes whenever the same text could get other ids.
    """

    vocab_size: int
    eod: int
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text, int32, without an end-of-document token."""
        ...

    def decode(self, ids: Iterable[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes, and 256 for the end of a document."""

    vocab_size = 257
    eod = 256
    fingerprint = "byte"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", errors="surrogateescape"), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def load_sentencepiece() -> ModuleType:
    """The library, imported where it is needed: byte tokens do without.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import sentencepiece
    except ImportError as error:
        raise ValueError(
            f"--tokenizer-type sentencepiece needs its package ({error}): pip install -r requirements.txt, or --tokenizer-type byte"
        ) from error
    return sentencepiece


class SentencePieceTokenizer:
    """A SentencePiece model file; its end-of-sentence piece ends a document.

    Raises:
        ValueError: not a SentencePiece model, or one without an end-of-sentence piece.
    """

    def __init__(self, model_file: Path) -> None:
        sentencepiece = load_sentencepiece()
        try:
            model = model_file.read_bytes()
        except OSError as error:
            raise ValueError(f"--tokenizer-model {model_file}: {error.strerror}") from error
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"--tokenizer-model {model_file}: not a SentencePiece model ({error})") from error
        self.eod = self.processor.eos_id()
        if self.eod < 0:
            raise ValueError(f"--tokenizer-model {model_file}: has no end-of-sentence piece to end documents with")
        self.vocab_size = self.processor.vocab_size()
        self.fingerprint = hashlib.sha256(model).hexdigest()[:16]
        # The library cannot tell a text's own U+2581 from a space; byte pieces, where the model has them, can.
        ids = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._space_sign = ids if all(self.processor.is_byte(i) for i in ids) else None

    def encode(self, text: str) -> np.ndarray:
        if self._space_sign is None or SPACE not in text:
            return np.array(self.processor.encode(text), np.int32)
        ids: list[int] = []
        for number, part in enumerate(text.split(SPACE)):
            ids += self._space_sign if number else []
            ids += self.processor.encode(part)
        return np.array(ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self.processor.decode([int(i) for i in ids])


def _training_pieces(texts: Iterable[str], size: int = 1000) -> Iterator[str]:
    """Texts cut at line ends into pieces of about `size` characters, which SentencePiece trains on."""
    for text in texts:
        buffer = ""
        for line in text.splitlines(keepends=True):
            buffer += line
            if len(buffer) >= size:
                yield buffer
                buffer = ""
        if buffer:
            yield buffer


def train_sentencepiece(texts: Iterable[str], *, vocab_size: int) -> bytes:
    """A BPE model with byte fallback that reproduces any text exactly (no normalisation, no added space)."""
    model = io.BytesIO()
    load_sentencepiece().SentencePieceTrainer.train(
        sentence_iterator=_training_pieces(texts),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.9999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        max_sentence_length=1 << 20,
        num_threads=2,
        minloglevel=2,
        unk_id=0,
        eos_id=1,
        bos_id=-1,
        pad_id=-1,
    )
    return model.getvalue()
