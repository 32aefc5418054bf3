"""Tokenizers: raw bytes, a SentencePiece model, or a Hugging Face `tokenizer.json`; each has one end-of-document token
(EOD).
"""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from utils.errors import UserError

TOKENIZER_TYPES = ("sentencepiece", "huggingface", "byte")
MAX_PIECE_BYTES = 1 << 20
# Threads of SentencePiece's loading. The pieces do not depend on it, but the model's bytes, and so its fingerprint,
# hold it.
NUM_THREADS = 2
SPACE = "\u2581"  # SentencePiece's sign for a space
# EOD tokens of published tokenizers; the first that a tokenizer.json has is taken.
EOD_TOKENS: tuple[str, ...] = ("<|endoftext|>", "<|end_of_text|>", "<eod>", "</s>", "<eos>", "<|eos|>")
EOD_TOKENS += ("<\uff5cend\u2581of\u2581sentence\uff5c>",)


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        kind: of `TOKENIZER_TYPES`.
        eod: id of the end-of-document token.
        fingerprint: changes whenever the same text could get other ids.
    """

    kind: str
    vocab_size: int
    eod: int
    fingerprint: str

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """[n] int32 ids of the text, without EOD."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on one thread."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str: ...


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes, and 256 as EOD."""

    kind = "byte"
    vocab_size = 257
    eod = 256
    fingerprint = "byte"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", errors="surrogateescape"), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def load_sentencepiece() -> ModuleType:
    """The sentencepiece library. Raises UserError: not installed."""
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError(
            f"--tokenizer-type sentencepiece needs its package ({error}): pip install -r requirements.txt, or "
            "--tokenizer-type byte"
        ) from error
    return sentencepiece


def _read_model(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"--tokenizer-model {file}: {error.strerror}") from error


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file; its end-of-sentence piece is the EOD.

    Raises:
        UserError: not a SentencePiece model, or one without an end-of-sentence piece.
    """

    kind = "sentencepiece"

    def __init__(self, model_file: Path) -> None:
        sentencepiece = load_sentencepiece()
        model = _read_model(model_file)
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"--tokenizer-model {model_file}: not a SentencePiece model ({error})") from error
        self.eod = self.processor.eos_id()
        if self.eod < 0:
            raise UserError(f"--tokenizer-model {model_file}: has no end-of-sentence piece to end documents with")
        self.vocab_size = self.processor.vocab_size()
        self.fingerprint = hashlib.sha256(model).hexdigest()[:16]
        # The library takes a text's own U+2581 for a space; the model's byte pieces, if it has them, tell the two
        # apart.
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

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._space_sign is not None and any(SPACE in text for text in texts):
            return [self.encode(text) for text in texts]
        return [np.array(ids, np.int32) for ids in self.processor.encode(list(texts), num_threads=1)]

    def decode(self, ids: Iterable[int]) -> str:
        return self.processor.decode([int(i) for i in ids])


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the Hugging Face `tokenizers` library, without its template's special tokens.

    Args:
        eod: the EOD token; None: the first of `EOD_TOKENS` in the file.

    Raises:
        UserError: not a tokenizer.json, or no such token in it.
    """

    kind = "huggingface"

    def __init__(self, file: Path, eod: str | None = None) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                f"--tokenizer-model {file} needs the package tokenizers ({error}): pip install -r requirements.txt"
            ) from error
        content = _read_model(file)
        try:
            self.processor = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises no narrower type
            raise UserError(f"--tokenizer-model {file}: not a Hugging Face tokenizer.json ({error})") from error
        # Documents stay whole and unpadded, whatever the file sets for short texts.
        self.processor.no_truncation()
        self.processor.no_padding()
        # A quoted special token is its characters, not its id: else any text could end a document.
        self.processor.encode_special_tokens = True
        ids = self.processor.get_vocab(with_added_tokens=True)
        wanted = (eod,) if eod is not None else EOD_TOKENS
        found = next((token for token in wanted if token in ids), None)
        if found is None:
            raise UserError(
                f"--tokenizer-model {file}: has no token {' or '.join(wanted)} to end documents with; name its own "
                "with --tokenizer-eod"
            )
        self.processor.add_special_tokens([found])  # the file may have it as an ordinary token
        self.eod = ids[found]
        self.vocab_size = max(ids.values()) + 1  # ids may have holes
        # Raise the number when `encode` changes.
        self.fingerprint = hashlib.sha256(content + found.encode() + b"2").hexdigest()[:16]

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.processor.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self.processor.decode([int(i) for i in ids], skip_special_tokens=False)


def load_tokenizer(tokenizer_type: str, model: str | None, eod: str | None = None) -> Tokenizer:
    """The tokenizer of a type and a model file.

    Args:
        tokenizer_type: of `TOKENIZER_TYPES`, or `auto`: huggingface for a `.json` file, else sentencepiece.
        eod: as `HuggingFaceTokenizer`'s.

    Raises:
        UserError: a model is missing, unreadable, or not allowed for the type.
    """
    if tokenizer_type == "byte":
        if model is not None:
            raise UserError(f"--tokenizer-model {model}: --tokenizer-type byte takes no model")
        return ByteTokenizer()
    if model is None:
        raise UserError(f"--tokenizer-type {tokenizer_type} needs --tokenizer-model")
    if resolve_tokenizer_type(tokenizer_type, model) == "huggingface":
        return HuggingFaceTokenizer(Path(model), eod)
    if eod is not None:
        raise UserError(f"--tokenizer-eod {eod}: a SentencePiece model names its own end-of-sentence piece")
    return SentencePieceTokenizer(Path(model))


@dataclass(frozen=True)
class TokenizerSpec:
    """How a process loads the tokenizer. Attributes: kind, model, eod of `load_tokenizer`."""

    kind: str
    model: str | None
    eod: str | None

    def load(self) -> Tokenizer:
        return load_tokenizer(self.kind, self.model, self.eod)


def resolve_tokenizer_type(tokenizer_type: str, model: str | None) -> str:
    """`auto` resolved by the name of the model file."""
    if tokenizer_type != "auto":
        return tokenizer_type
    return "huggingface" if model is not None and model.endswith(".json") else "sentencepiece"


def _training_pieces(texts: Iterable[str], size: int = 1000) -> Iterator[str]:
    """Texts cut into pieces of about `size` characters for SentencePiece: at line ends, in long lines before spaces.

    SentencePiece counts words with the space before them, so these cuts change its counts little. A line without spaces
    is cut every 10 * `size` characters: SentencePiece silently leaves out pieces longer than `MAX_PIECE_BYTES`.
    """
    for text in texts:
        buffer = ""
        for line in text.splitlines(keepends=True):
            at = 0
            while at < len(line):
                end = len(line)
                if end - at > 2 * size:
                    space = line.find(" ", at + size, at + 10 * size)
                    end = at + 10 * size if space < 0 else space
                buffer += line[at:end]
                at = end
                if len(buffer) >= size:
                    yield buffer
                    buffer = ""
        if buffer:
            yield buffer


def train_sentencepiece(
    texts: Iterable[str], *, vocab_size: int, input_sentence_size: int = 0, num_threads: int = NUM_THREADS
) -> bytes:
    """A BPE model with byte fallback that reproduces any text exactly (no normalisation, no added space).

    Args:
        input_sentence_size: number of pieces of about 1000 characters to train on, drawn with a fixed seed; 0: all.
    """
    # Only set where it is given: the model's bytes, and so its fingerprint, hold these options.
    sampling = dict(input_sentence_size=input_sentence_size, shuffle_input_sentence=True) if input_sentence_size else {}
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
        max_sentence_length=MAX_PIECE_BYTES,
        num_threads=num_threads,
        minloglevel=2,
        unk_id=0,
        eos_id=1,
        bos_id=-1,
        pad_id=-1,
        **sampling,
    )
    return model.getvalue()
