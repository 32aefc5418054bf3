"""Tokenizers: raw bytes, a SentencePiece model, or a Hugging Face `tokenizer.json`. All have one token that ends a document."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np

from utils.errors import UserError

TOKENIZER_TYPES = ("sentencepiece", "huggingface", "byte")
LONGEST_PIECE = 1 << 20  # bytes
NUM_THREADS = (
    2  # of loading, the smaller part of training; the same pieces for any number, but it stands in the model's bytes
)
SPACE = "\u2581"  # what SentencePiece writes for a space inside its pieces
# What published tokenizers call the token that ends a document; the first that a tokenizer.json has is taken.
EOD_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<eod>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)


class Tokenizer(Protocol):
    """What the data pipeline asks of a tokenizer.

    `kind` is of `TOKENIZER_TYPES`; `eod` the id that ends every document; `fingerprint` changes whenever the same text could get other ids.
    """

    kind: str
    vocab_size: int
    eod: int
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text, int32, without an end-of-document token."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each, on one thread, in less time."""
        ...

    def decode(self, ids: Iterable[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes, and 256 for the end of a document."""

    kind = "byte"
    vocab_size = 257
    eod = 256
    fingerprint = "byte"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", errors="surrogateescape"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

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
        raise UserError(
            f"--tokenizer-type sentencepiece needs its package ({error}): pip install -r requirements.txt, or --tokenizer-type byte"
        ) from error
    return sentencepiece


class SentencePieceTokenizer:
    """A SentencePiece model file; its end-of-sentence piece ends a document.

    Raises:
        ValueError: not a SentencePiece model, or one without an end-of-sentence piece.
    """

    kind = "sentencepiece"

    def __init__(self, model_file: Path) -> None:
        sentencepiece = load_sentencepiece()
        try:
            model = model_file.read_bytes()
        except OSError as error:
            raise UserError(f"--tokenizer-model {model_file}: {error.strerror}") from error
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"--tokenizer-model {model_file}: not a SentencePiece model ({error})") from error
        self.eod = self.processor.eos_id()
        if self.eod < 0:
            raise UserError(f"--tokenizer-model {model_file}: has no end-of-sentence piece to end documents with")
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

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._space_sign is not None and any(SPACE in text for text in texts):
            return [self.encode(text) for text in texts]
        return [np.array(ids, np.int32) for ids in self.processor.encode(list(texts), num_threads=1)]

    def decode(self, ids: Iterable[int]) -> str:
        return self.processor.decode([int(i) for i in ids])


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library; no template's special tokens are added.

    Args:
        eod: the token that ends a document; None: the first of `EOD_TOKENS` that it has.

    Raises:
        ValueError: not such a file, or no such token in it.
    """

    kind = "huggingface"

    def __init__(self, file: Path, eod: str | None = None) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                f"--tokenizer-model {file} needs the package tokenizers ({error}): pip install -r requirements.txt"
            ) from error
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"--tokenizer-model {file}: {error.strerror}") from error
        try:
            self.processor = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"--tokenizer-model {file}: not a Hugging Face tokenizer.json ({error})") from error
        # What the file says for training on short texts: a corpus keeps its whole documents, unpadded.
        self.processor.no_truncation()
        self.processor.no_padding()
        # A document that quotes a special token holds its characters, not its id: else any text could end a document.
        self.processor.encode_special_tokens = True
        ids = self.processor.get_vocab(with_added_tokens=True)
        wanted = (eod,) if eod is not None else EOD_TOKENS
        found = next((token for token in wanted if token in ids), None)
        if found is None:
            raise UserError(
                f"--tokenizer-model {file}: has no token {' or '.join(wanted)} to end documents with; name its own with --tokenizer-eod"
            )
        self.processor.add_special_tokens([found])  # also where the file has it as an ordinary token
        self.eod = ids[found]
        self.vocab_size = max(ids.values()) + 1  # ids may have holes
        # The number changes when `encode` does.
        self.fingerprint = hashlib.sha256(content + found.encode() + b"2").hexdigest()[:16]

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.processor.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # encode_batch of the library starts threads; processes are what we share work over.
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return self.processor.decode([int(i) for i in ids], skip_special_tokens=False)


def load_tokenizer(tokenizer_type: str, model: str | None, eod: str | None = None) -> Tokenizer:
    """The tokenizer of a type and a model file.

    Args:
        tokenizer_type: of `TOKENIZER_TYPES`, or `auto`: huggingface for a `.json` file, else sentencepiece.
        eod: as `HuggingFaceTokenizer`'s.

    Raises:
        ValueError: a model missing, unreadable, or where none belongs.
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


def resolve_tokenizer_type(tokenizer_type: str, model: str | None) -> str:
    """`auto` told by the model file's name."""
    if tokenizer_type != "auto":
        return tokenizer_type
    return "huggingface" if model is not None and model.endswith(".json") else "sentencepiece"


def _training_pieces(texts: Iterable[str], size: int = 1000) -> Iterator[str]:
    """Texts cut at line ends, long lines also before spaces, into pieces of about `size` characters, which SentencePiece trains on.

    It counts words, each with the space before it, so where a line is cut changes next to nothing. Without a space it is cut
    every 10 * `size` characters: SentencePiece leaves out, without a word, what is longer than `LONGEST_PIECE`.
    """
    for text in texts:
        buffer = ""
        for line in text.splitlines(keepends=True):
            for part in _cut_line(line, size):
                buffer += part
                if len(buffer) >= size:
                    yield buffer
                    buffer = ""
        if buffer:
            yield buffer


def _cut_line(line: str, size: int) -> Iterator[str]:
    at = 0
    while len(line) - at > 2 * size:
        space = line.find(" ", at + size, at + 10 * size)
        end = at + 10 * size if space < 0 else space
        yield line[at:end]
        at = end
    yield line[at:]


def train_sentencepiece(
    texts: Iterable[str], *, vocab_size: int, input_sentence_size: int = 0, num_threads: int = NUM_THREADS
) -> bytes:
    """A BPE model with byte fallback that reproduces any text exactly (no normalisation, no added space).

    Args:
        input_sentence_size: pieces of about 1000 characters to hold in memory and train on, drawn at random, always the same; 0: all.
    """
    # Said only where it is given: the model holds it, and caches and runs tell models apart by their bytes.
    drawn = dict(input_sentence_size=input_sentence_size, shuffle_input_sentence=True) if input_sentence_size else {}
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
        max_sentence_length=LONGEST_PIECE,
        num_threads=num_threads,
        minloglevel=2,
        unk_id=0,
        eos_id=1,
        bos_id=-1,
        pad_id=-1,
        **drawn,
    )
    return model.getvalue()
