"""Tokenizers: raw bytes, a SentencePiece model, or a Hugging Face `tokenizer.json`; each has one end-of-document token
(EOD). `TokenIds` stands for a tokenizer that is not at hand.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import re
import subprocess
import sys
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.files import parse_json

TOKENIZER_TYPES = ("sentencepiece", "huggingface", "byte")
MAX_PIECE_BYTES = 1 << 20
# Threads of SentencePiece's loading. The pieces do not depend on it, but the model's bytes, and so its fingerprint,
# hold it.
NUM_THREADS = 2
SPACE = "\u2581"  # SentencePiece's sign for a space
# EOD tokens of published tokenizers; the first that a tokenizer.json has is taken.
EOD_TOKENS: tuple[str, ...] = ("<|endoftext|>", "<|end_of_text|>", "<eod>", "</s>", "<eos>", "<|eos|>")
EOD_TOKENS += ("<\uff5cend\u2581of\u2581sentence\uff5c>",)
# BOS tokens of published tokenizers, for a tokenizer.json whose template has none.
BOS_TOKENS = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>")
# Texts that show whether a tokenizer changes text: case, accents, compatibility characters, spaces, line ends.
PROBES = ("A b", " a  b ", "a\n\n\tb\r\n", "\xe9\u2460\ufb01\u4e2d\U0001f600", "f(x)[0]!='a'")
# Parts of a tokenizer.json's decoder under which each token stands for bytes of its own.
KNOWN_DECODERS = {"Sequence", "ByteLevel", "ByteFallback", "Metaspace", "Replace", "Fuse", "Strip"}
TRIAL_SECONDS = 60.0  # for encoding the texts of `TRIAL` in a child process
TRIAL = """
import sys, tokenizers
tokenizer = tokenizers.Tokenizer.from_buffer(sys.stdin.buffer.read())
for part in ("a", "A", " ", "0", "\\n", ".", "\\u4e2d", "a ", "a1", "ab"):
    for count in (30, 300, 3000):
        try:
            tokenizer.encode(part * count + "!", add_special_tokens=False)
        except Exception:
            pass  # not of this tokenizer's alphabet; a panic is no Exception
"""


class UnencodableText(UserError):
    """A text that a tokenizer would not give back. The message is a predicate, such as "holds U+2581, which ..."."""


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        kind: of `TOKENIZER_TYPES`.
        eod: id of the end-of-document token. No text has it: only whoever writes a corpus ends a document.
        bos: id of the token that begins each document, which no text has either; None: none does.
        content: of the model's file; empty: there is none.
        change: how the tokenizer changes texts, for a message; empty: `decode` gives back what was encoded.
        fingerprint: changes whenever the same text could get other ids.
    """

    kind: str
    vocab_size: int
    eod: int
    fingerprint: str
    bos: int | None = None
    content: bytes = b""
    change: str = ""

    def begin_with_bos(self) -> None:
        """Begin each document with BOS from now on. Raises UserError: the tokenizer has none."""
        self.bos = self._find_bos()
        if self.bos is None:
            raise UserError(f"--bos: the tokenizer of type {self.kind} has no BOS token")

    def _find_bos(self) -> int | None:
        return None

    def frame(self, ids: np.ndarray, *, append_eod: bool = True) -> np.ndarray:
        """[n] int32 ids of a document whose text has these ids."""
        begin, end = ([] if self.bos is None else [self.bos]), ([self.eod] if append_eod else [])
        return np.concatenate((begin, ids, end), dtype=np.int32, casting="unsafe")

    def encode_prompt(self, text: str) -> list[int]:
        """The beginning of a document, at least one id: BOS if documents begin with it, else a line break for no text.

        EOD is the last resort: where documents are packed whole, the model never reads beyond it.
        """
        ids = self.frame(self.encode(text), append_eod=False)
        with suppress(UnencodableText):
            ids = ids if ids.size else self.encode("\n")
        return ids.tolist() or [self.eod]

    def encode(self, text: str) -> np.ndarray:
        """[n] int32 ids of the text, without EOD. Raises UnencodableText."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on one thread."""
        try:
            found = self._encode_batch(texts)
        except (UnicodeEncodeError, TypeError) as error:  # half a surrogate pair, such as a byte of a command line
            raise UnencodableText(f"is no Unicode text ({error})") from error
        for ids in found:
            for place, token in (("end", self.eod), ("beginning", self.bos)):
                if token is not None and (ids == token).any():
                    raise UnencodableText(f"holds characters that become the {place}-of-document token, id {token}")
        return found

    @abstractmethod
    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, without EOD and BOS."""

    def token_bytes(self) -> np.ndarray | None:
        """[vocab_size] int64 bytes of UTF-8 that each token stands for; 0 for EOD, BOS and ids without a token.

        Their sum over a text's ids is the length of the text, but for a space that the tokenizer puts before it. None:
        a token's length depends on its neighbours, or is not known.
        """
        return None


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes, and 256 as EOD."""

    kind = "byte"
    vocab_size = 257
    eod = 256
    fingerprint = "byte"

    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        return (np.arange(self.vocab_size) != self.eod).astype(np.int64)


class TokenIds(Tokenizer):
    """Ids of a tokenizer that is not at hand: a text is its ids in decimal, such as `17 4 2`."""

    kind = "none"

    def __init__(self, vocab_size: int, eod: int) -> None:
        self.vocab_size, self.eod, self.fingerprint = vocab_size, eod, f"none, end-of-document token {eod}"

    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        words = [text.split() for text in texts]
        if any(not word.isdecimal() or len(word) > 9 or int(word) >= self.vocab_size for ids in words for word in ids):
            raise UnencodableText(f"must be ids from 0 to {self.vocab_size - 1}: --eod-id stands for the tokenizer")
        return [np.array([int(word) for word in ids], np.int32) for ids in words]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(str(i) for i in ids if i != self.eod)


def load_sentencepiece() -> ModuleType:
    """The sentencepiece library with the types of its model files. Raises UserError: not installed."""
    try:
        import sentencepiece
        import sentencepiece.sentencepiece_model_pb2
    except ImportError as error:
        raise UserError(
            f"--tokenizer-type sentencepiece needs its package ({error}): pip install -r requirements.txt, or "
            "--tokenizer-type byte"
        ) from error
    return sentencepiece


def _read_model(file: Path) -> bytes:
    """The content of a model file. Raises UserError: says what to give instead of a folder or the name of a hub."""
    wanted = "give the file tokenizer.json or tokenizer.model"
    if file.exists() and not file.is_file():
        raise UserError(f"--tokenizer-model {file}: is a folder or a device; {wanted} in it")
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        advice = "" if file.suffix in (".model", ".json") else f"; models are not downloaded: {wanted} of the model"
        raise UserError(f"--tokenizer-model {file}: no such file{advice}") from error
    except OSError as error:
        raise UserError(f"--tokenizer-model {file}: {error.strerror}") from error
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
        raise UserError(f"--tokenizer-model {file}: is a tiktoken model; give the tokenizer.json of the same model")
    return content


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file; its end-of-sentence piece is the EOD, which the library never finds in a text.

    Raises:
        UserError: not a SentencePiece model, one without an end-of-sentence piece, or one that changes text.
    """

    kind = "sentencepiece"

    def __init__(self, model_file: Path) -> None:
        sentencepiece = load_sentencepiece()
        self.content = content = _read_model(model_file)
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise UserError(f"--tokenizer-model {model_file}: not a SentencePiece model ({error})") from error
        self.eod, self.unknown = self.processor.eos_id(), self.processor.unk_id()
        if self.eod < 0:
            raise UserError(f"--tokenizer-model {model_file}: has no end-of-sentence piece to end documents with")
        model = sentencepiece.sentencepiece_model_pb2.ModelProto.FromString(content)
        form = model.normalizer_spec
        changes = {
            f"normalizes text ({form.name or 'its own rules'})": form.precompiled_charsmap
            or model.denormalizer_spec.precompiled_charsmap,
            "removes spaces (remove_extra_whitespaces)": form.remove_extra_whitespaces,
            "adds a space at the end (treat_whitespace_as_suffix)": form.add_dummy_prefix
            and model.trainer_spec.treat_whitespace_as_suffix,
            "does not mark spaces (escape_whitespaces)": not form.escape_whitespaces,
        }
        found = [name for name, is_set in changes.items() if is_set]
        if found:
            raise UserError(
                f"--tokenizer-model {model_file}: {' and '.join(found)}, so a model would learn another text; "
                "take a model without, such as data.prepare train-tokenizer makes"
            )
        self.vocab_size = self.processor.vocab_size()
        # The library takes a text's own U+2581 for a space; the model's byte pieces, if it has them, tell the two
        # apart. A text is encoded in parts, and only the first part has the space that the model puts before a text.
        ids = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._space_sign = ids if all(self.processor.is_byte(i) for i in ids) else None
        self._later_parts, version = self.processor, b""
        if form.add_dummy_prefix:
            form.add_dummy_prefix, version = False, b"2"  # raise the number when `encode` changes
            self._later_parts = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        self.fingerprint = hashlib.sha256(content + version).hexdigest()[:16]

    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if any(SPACE in text for text in texts):
            encoded = [self._encode_parts(text) for text in texts]
        else:
            encoded = self.processor.encode(list(texts), num_threads=1)
        found = [np.array(ids, np.int32) for ids in encoded]
        for text, ids in zip(texts, found, strict=True):
            if (ids == self.unknown).any():
                lost = next((c for c in text if self.unknown in self.processor.encode(c)), text[0])
                raise UnencodableText(f"holds U+{ord(lost):04X}, for which the SentencePiece model has no piece")
        return found

    def _encode_parts(self, text: str) -> list[int]:
        first, *others = text.split(SPACE)
        if others and self._space_sign is None:
            raise UnencodableText("holds U+2581, which this SentencePiece model without byte pieces takes for a space")
        ids = self.processor.encode(first)
        for part in others:
            ids += self._space_sign + self._later_parts.encode(part)
        return ids

    def _find_bos(self) -> int | None:
        return self.processor.bos_id() if self.processor.bos_id() >= 0 else None

    def decode(self, ids: Iterable[int]) -> str:
        known = (int(i) for i in ids if i < self.vocab_size)  # a model may know more, with --vocab-size
        return self.processor.decode([i for i in known if i not in (self.eod, self.bos)])

    def token_bytes(self) -> np.ndarray:
        model, sizes = self.processor, np.zeros(self.vocab_size, np.int64)
        for i in range(self.vocab_size):
            if model.is_byte(i):
                sizes[i] = 1
            elif not (model.is_control(i) or model.is_unknown(i)):
                sizes[i] = len(model.id_to_piece(i).replace(SPACE, " ").encode())
        return sizes


@functools.lru_cache(maxsize=4)  # workers inherit what their main process has tried
def _try_tokenizer(file: Path, content: bytes) -> None:
    """Encode a few texts in a child process: a regular expression may take centuries, and nothing interrupts it.

    Raises:
        UserError: the child fails, or takes `TRIAL_SECONDS`.
    """
    try:
        subprocess.run(
            [sys.executable, "-c", TRIAL], input=content, capture_output=True, timeout=TRIAL_SECONDS, check=True
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"--tokenizer-model {file}: its regular expressions take more than {TRIAL_SECONDS:.0f} s for texts of up "
            "to 6000 characters; take another tokenizer"
        ) from error
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"signal {-error.returncode}"]
        raise UserError(f"--tokenizer-model {file}: cannot encode a text of one letter ({reason[0]})") from error


def _hide_token(said: dict[str, Any], token: str) -> bool:
    """Rename `token` in the vocabulary of a tokenizer.json's model, so that no text has its id.

    Returns:
        False: the model finds the token in no text anyway.
    """
    model = said["model"]
    vocab, merges, hidden = model["vocab"], model.get("merges"), f"\0{token}\0"
    entries = [entry for entry in vocab if entry[0] == token] if isinstance(vocab, list) else []  # Unigram's
    if not entries and token not in vocab:
        return False
    for entry in entries:
        entry[0] = hidden
    if isinstance(vocab, dict):
        if merges is not None:  # BPE: by merges, or by `ignore_merges` for a whole word
            parts = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
            kept = [pair for pair in parts if token not in (*pair, "".join(pair))]
            if len(kept) == len(merges) and not model.get("ignore_merges") and len(token) > 1:
                return False
            model["merges"] = [" ".join(pair) if isinstance(merges[0], str) else pair for pair in kept]
        vocab[hidden] = vocab.pop(token)
    if model.get("unk_token") == token:
        model["unk_token"] = hidden
    said["added_tokens"] = [added for added in said.get("added_tokens") or () if added["content"] != token]
    return True


def describe_tokenizer(model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """A tokenizer.json of this model and these parts."""
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", **empty, "added_tokens": [], "model": model, **parts}


def _read_tokenizer_json(file: Path) -> bytes:
    """A tokenizer.json: the file itself, or made of `vocab.json` and `merges.txt` by GPT-2's rules.

    Raises:
        UserError: `merges.txt` is missing, or a tokenizer.json beside may name other rules.
    """
    content = _read_model(file)
    vocab = {} if re.search(rb'"model"\s*:\s*{', content) else json.loads(content)
    if isinstance(vocab, dict) and isinstance(vocab.get("config"), dict):
        raise UserError(f"--tokenizer-model {file}: is a tekken.json; give the tokenizer.json of the same model")
    if not (isinstance(vocab, dict) and vocab and all(type(number) is int for number in vocab.values())):
        return content
    merges = file.with_name(file.name.replace("vocab.json", "merges.txt"))
    more = any(file.with_name(name).exists() for name in ("tokenizer.json", "added_tokens.json"))
    is_clip = any(token.endswith("</w>") for token in vocab)
    if more or is_clip or merges == file or not merges.is_file():
        wanted = file.with_name("tokenizer.json") if more or is_clip else None
        raise UserError(
            f"--tokenizer-model {file}: is a vocabulary without the rules of a tokenizer; "
            + (f"give {wanted}" if wanted else "name it vocab.json, with its merges.txt beside")
        )
    lines = _read_model(merges).decode().replace("\r\n", "\n").split("\n")
    model = {"type": "BPE", "vocab": vocab, "merges": [line for line in lines if line and line[:8] != "#version"]}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return json.dumps(describe_tokenizer(model, pre_tokenizer=level, decoder=level)).encode()


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the Hugging Face `tokenizers` library, without its template's special tokens; or GPT-2's
    `vocab.json` with `merges.txt` beside it.

    Args:
        eod: the EOD token; None: the first of `EOD_TOKENS` in the file.

    Raises:
        UserError: not a tokenizer.json, one that cannot encode, or no such token in it.
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
            self.content = content = _read_tokenizer_json(file)
            if re.search(rb'"Regex"|\\u00[0-7]', content):  # or its letters as JSON escapes
                _try_tokenizer(file, content)
            self.processor = tokenizers.Tokenizer.from_buffer(content)
            ids = self.processor.get_vocab(with_added_tokens=True)
            wanted = (eod,) if eod is not None else EOD_TOKENS
            found = next((token for token in wanted if token in ids), None)
            said = json.loads(content)
            version = b"2"  # raise the numbers when `encode` changes
            if found is not None and _hide_token(said, found):
                self.processor, version = tokenizers.Tokenizer.from_str(json.dumps(said)), b"3"
            elif found is not None:
                self.processor.add_special_tokens([found])  # the file may have it as an ordinary token
        except BaseException as error:
            _raise_interrupts(error)
            raise UserError(f"--tokenizer-model {file}: not a Hugging Face tokenizer.json ({error})") from error
        if found is None:
            raise UserError(
                f"--tokenizer-model {file}: has no token {' or '.join(wanted)} to end documents with; name its own "
                "with --tokenizer-eod"
            )
        # Documents stay whole and unpadded, whatever the file sets for short texts.
        self.processor.no_truncation()
        self.processor.no_padding()
        # A quoted special token is its characters, not its id: else any text could end a document.
        self.processor.encode_special_tokens = True
        self.eod = ids[found]
        self.vocab_size = max(ids.values()) + 1  # ids may have holes
        self.fingerprint = hashlib.sha256(content + found.encode() + version).hexdigest()[:16]
        for text in PROBES:
            with suppress(UnencodableText):  # not of this tokenizer's alphabet: such documents are bad records
                (probe,) = self._encode_batch([text])
                if not self._gives_back(text, probe):
                    self.change = f"{text!r} becomes {self.decode(probe)!r}"

    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            found = [self.processor.encode(text, add_special_tokens=False).ids for text in texts]
        except BaseException as error:
            _raise_interrupts(error)
            raise UnencodableText(f"cannot be tokenized ({error})") from error
        for text, ids in zip(texts, found, strict=True):
            if SPACE in text and not self.change and not self._gives_back(text, ids):
                raise UnencodableText("holds U+2581, which this tokenizer.json takes for a space")
        return [np.array(ids, np.int32) for ids in found]

    def _gives_back(self, text: str, ids: Iterable[int]) -> bool:
        """Whether the ids are the text, up to the form in which Unicode composes accents (NFC)."""
        return unicodedata.normalize("NFC", self.decode(ids)) == unicodedata.normalize("NFC", text)

    def _find_bos(self) -> int | None:
        ids, start = self.processor.get_vocab(with_added_tokens=True), find_start(self)
        return start[0] if start else next((ids[token] for token in BOS_TOKENS if token in ids), None)

    def decode(self, ids: Iterable[int]) -> str:
        known = [int(i) for i in ids if i not in (self.eod, self.bos)]
        return self.processor.decode(known, skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray | None:
        said, sizes = json.loads(self.content), np.zeros(self.vocab_size, np.int64)
        decoder = said.get("decoder") or {}
        kinds = {part.get("type") for part in (decoder, *decoder.get("decoders", ()))}
        if not kinds <= KNOWN_DECODERS:
            return None
        added = {token["content"] for token in said.get("added_tokens") or ()}
        for token, i in self.processor.get_vocab(with_added_tokens=True).items():
            if "ByteLevel" in kinds and token not in added:  # a character a byte
                sizes[i] = len(token)
            elif "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-F]{2}>", token):
                sizes[i] = 1
            else:
                sizes[i] = len(token.replace(SPACE, " ").encode())
        sizes[[self.eod if self.bos is None else self.bos, self.eod]] = 0
        for text in (*PROBES, "unbelievable"):
            with suppress(UnencodableText):
                (ids,) = self._encode_batch([text])
                extra = int(sizes[ids].sum()) - len(self.decode(ids).encode())
                if not 0 <= extra <= (SPACE in str(said)):  # one space before the text
                    return None
        return sizes


def find_start(tokenizer: Tokenizer) -> tuple[int, str] | None:
    """(id, token) of the BOS that the template of a tokenizer.json puts before a text; None: no such template."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return None
    return _find_start(parse_json(tokenizer.content).get("post_processor") or {})


def _find_start(processor: dict[str, Any]) -> tuple[int, str] | None:
    kind = processor.get("type")
    if kind == "Sequence":
        return next((found for part in processor["processors"] if (found := _find_start(part))), None)
    if kind in ("BertProcessing", "RobertaProcessing"):
        token, number = processor["cls"]
        return number, token
    first = processor["single"][:1] if kind == "TemplateProcessing" else []
    if first and "SpecialToken" in first[0]:
        special = processor["special_tokens"][first[0]["SpecialToken"]["id"]]
        return special["ids"][0], special["tokens"][0]
    return None


def _raise_interrupts(error: BaseException) -> None:
    """Raise a refusal, and what is no error of the tokenizers library, whose panics are BaseExceptions."""
    if isinstance(error, UserError) or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
        raise error


@dataclass(frozen=True)
class TokenizerSpec:
    """Flags that say which tokenizer.

    Attributes:
        kind: of `TOKENIZER_TYPES`, or `auto`: huggingface for a `.json` file, else sentencepiece.
        model: the file.
        eod: as `HuggingFaceTokenizer`'s.
        bos: whether documents begin with BOS; None: as those of prepared corpora do.
        eod_id: the tokenizer is not at hand, and this id ends a document; None: it is at hand.
        vocab_size: of --vocab-size, for `eod_id`.
    """

    kind: str = "auto"
    model: str | None = None
    eod: str | None = None
    bos: bool | None = None
    eod_id: int | None = None
    vocab_size: int | None = None

    @property
    def is_named(self) -> bool:
        """Whether the flags name a tokenizer."""
        return self.kind == "byte" or self.model is not None or self.eod_id is not None

    def load(self) -> Tokenizer:
        """Raises UserError: a model is missing, unreadable or not allowed for the type, or has no BOS to begin with."""
        tokenizer = self._open() if self.eod_id is None else self._stand_in(self.eod_id)
        if self.bos:
            tokenizer.begin_with_bos()
        return tokenizer

    def _open(self) -> Tokenizer:
        if self.kind == "byte":
            if self.model is not None:
                raise UserError(f"--tokenizer-model {self.model}: --tokenizer-type byte takes no model")
            return ByteTokenizer()
        if self.model is None:
            raise UserError(f"--tokenizer-type {self.kind} needs --tokenizer-model; --tokenizer-type byte needs none")
        if self.kind == "huggingface" or (self.kind == "auto" and self.model.endswith(".json")):
            return HuggingFaceTokenizer(Path(self.model), self.eod)
        if self.eod is not None:
            raise UserError(f"--tokenizer-eod {self.eod}: a SentencePiece model names its own end-of-sentence piece")
        return SentencePieceTokenizer(Path(self.model))

    def _stand_in(self, eod_id: int) -> TokenIds:
        if self.kind != "auto" or self.model is not None or self.bos:
            raise UserError(
                f"--eod-id {eod_id}: stands for a tokenizer that is not at hand; give no --tokenizer-type, "
                "--tokenizer-model or --bos"
            )
        if self.vocab_size is None or eod_id >= self.vocab_size:
            raise UserError(
                f"--eod-id {eod_id}: needs --vocab-size, the number of tokens of the corpus's tokenizer, above it"
            )
        return TokenIds(self.vocab_size, eod_id)


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
    texts: Iterable[str], *, vocab_size: int, input_sentence_size: int = 0, has_bos: bool = False
) -> bytes:
    """A BPE model with byte fallback that reproduces any text exactly (no normalisation, no added space).

    Args:
        input_sentence_size: number of pieces of about 1000 characters to train on, drawn with a fixed seed; 0: all.
        has_bos: the model has the BOS piece `<s>`.
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
        num_threads=NUM_THREADS,
        minloglevel=2,
        unk_id=0,
        eos_id=1,
        bos_id=2 if has_bos else -1,
        pad_id=-1,
        **sampling,
    )
    return model.getvalue()
