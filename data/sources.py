"""What `--data-path` names: corpora that data.prepare or Megatron-LM tokenized, or text; and which tokenizer belongs to them.

Beside `<prefix>.bin` and `<prefix>.idx`, data.prepare writes `<prefix>.json`, which says with what tokenizer they were made,
and a copy of its model. Files of Megatron-LM's have neither: their tokenizer is then given by flags.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from data.blend import parse_blend
from data.corpus import Source, open_source
from data.indexed_dataset import IndexedDataset, index_file, token_file
from data.readers import BadRecord
from data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from utils.errors import UserError
from utils.files import checksum


def facts_file(prefix: Path) -> Path:
    """`<prefix>.json`."""
    return Path(f"{prefix}.json")


@dataclass(frozen=True)
class Prepared:
    """A tokenized corpus.

    Attributes:
        facts: of its `<prefix>.json`; empty where there is none.
    """

    prefix: Path
    tokens: IndexedDataset
    facts: dict[str, Any]

    def tokenizer(self) -> Tokenizer | None:
        """The one it was made with, from the copy beside it; None where it does not say.

        Raises:
            ValueError: the copy is missing or another one.
        """
        said = self.facts.get("tokenizer")
        if said is None:
            return None
        model = said["model"]
        found = load_tokenizer(
            said["type"], None if model is None else str(self.prefix.parent / Path(model).name), said["eod"]
        )
        if found.fingerprint != said["fingerprint"]:
            raise UserError(
                f"{facts_file(self.prefix)}: the {said['type']} model beside it is not the tokenizer that it was made with"
            )
        return found

    def check(self) -> None:
        """Read both files whole and compare them with what data.prepare wrote.

        Raises:
            ValueError: a file is not as it was written, or the corpus does not say how it was.
        """
        sums = self.facts.get("checksums")
        if sums is None:
            raise UserError(
                f"--check-data: {facts_file(self.prefix)} has no checksums; data.prepare writes them with a corpus"
            )
        for kind, path in (("bin", token_file(self.prefix)), ("idx", index_file(self.prefix))):
            size, digest = checksum(path)
            if [size, digest] != list(sums[kind]):
                raise UserError(
                    f"{path}: {size} bytes and checksum {digest[:12]}, but data.prepare wrote {sums[kind][0]} bytes, checksum "
                    f"{sums[kind][1][:12]}"
                )


@dataclass(frozen=True)
class Part:
    """One source of `--data-path`, opened. Attributes: weight, None: by its size; content."""

    name: str
    weight: Fraction | None
    content: Prepared | Source

    def check(self) -> None:
        """Raises ValueError if the files are not as they were written, or nothing says how they were."""
        if not isinstance(self.content, Prepared):
            raise UserError(
                f"--check-data: {self.name} is text, of which nothing says what it was; data.prepare makes a corpus that does"
            )
        self.content.check()


def open_parts(words: Sequence[str] | None, json_key: str, flag: str = "--data-path") -> list[Part]:
    """The sources of a flag; None: the default corpus.

    Raises:
        ValueError: a blend, file or corpus that is not what it should be.
    """
    if words is None:
        source = open_source(None, json_key)
        return [Part(source.name, None, source)]
    parts = []
    for part in parse_blend(words, flag):
        path = Path(part.path)
        if index_file(path).exists():
            content: Prepared | Source = open_prepared(path)
        elif path.suffix in (".bin", ".idx") and index_file(path.with_suffix("")).exists():
            raise UserError(f"{flag} {path}: give the prefix of both files, {path.with_suffix('')}")
        else:
            content = open_source(part.path, json_key)
        parts.append(Part(part.path, part.weight, content))
    return parts


def open_prepared(prefix: Path) -> Prepared:
    """A corpus by its prefix.

    Raises:
        ValueError: broken files.
    """
    tokens, file = IndexedDataset(prefix), facts_file(prefix)
    facts: dict[str, Any] = {}
    if file.exists():
        try:
            facts = json.loads(file.read_text("utf-8"))
            counted = (facts["documents"], facts["tokens"])
            said = facts["tokenizer"]
            _ = said["type"], said["model"], said["eod"], said["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file}: not written by data.prepare ({type(error).__name__}: {error}); remove it to read the corpus without"
            ) from error
        if counted != (len(tokens), len(tokens.tokens)):
            raise UserError(
                f"{file}: says {counted[0]} documents and {counted[1]} tokens, but the files hold {len(tokens)} and {len(tokens.tokens)}"
            )
    return Prepared(prefix, tokens, facts)


def find_tokenizer(
    parts: Sequence[Part], others: Sequence[Part] = (), *, tokenizer_type: str, model: str | None, eod: str | None
) -> Tokenizer | None:
    """The run's tokenizer: the one that flags name, else the one that prepared corpora were made with.

    Args:
        parts, others: what is trained on, and what is read beside it.

    Returns:
        None: SentencePiece, to be trained on the only source there is, which is text.

    Raises:
        ValueError: none is named, or one that a corpus was not made with.
    """
    chosen: Tokenizer | None = None
    by = "the flags"
    if tokenizer_type == "byte" or model is not None:
        chosen = load_tokenizer(tokenizer_type, model, eod)
    for part in (*parts, *others):
        own = part.content.tokenizer() if isinstance(part.content, Prepared) else None
        if own is None:
            continue
        if tokenizer_type not in ("auto", own.kind):
            raise UserError(
                f"--tokenizer-type {tokenizer_type}: {part.name} was made with a tokenizer of type {own.kind}"
            )
        if chosen is None:
            chosen, by = own, part.name
        elif own.fingerprint != chosen.fingerprint:
            raise UserError(f"--data-path: {part.name} was made with another tokenizer than that of {by}")
    if chosen is not None:
        return chosen
    nameless = next((part.name for part in (*parts, *others) if isinstance(part.content, Prepared)), None)
    if nameless is not None:
        raise UserError(
            f"--data-path {nameless} holds tokens and does not say whose: give its --tokenizer-model, or --tokenizer-type byte"
        )
    if len(parts) > 1:
        raise UserError(
            f"--data-path: {len(parts)} sources of text need one tokenizer: give --tokenizer-model, or --tokenizer-type byte"
        )
    if tokenizer_type == "huggingface":
        raise UserError("--tokenizer-type huggingface needs --tokenizer-model, a tokenizer.json")
    return None


def train_on(
    source: Source, *, vocab_size: int, flag: str, skip: Callable[[BadRecord], None] | None = None, **options: int
) -> bytes:
    """A SentencePiece model of the source's texts; `skip` as `Source.texts`, `options` as `train_sentencepiece`.

    Raises:
        ValueError: a broken or empty corpus, or one too small for the vocabulary.
    """
    fault: list[UserError] = []

    def texts() -> Iterator[str]:
        # SentencePiece turns what its iterator raises into an error of its own.
        found = False
        try:
            for text in source.texts(skip):
                found = True
                yield text
        except UserError as error:
            fault.append(error)
            raise
        if not found:
            fault.append(nothing_in(source))

    try:
        return train_sentencepiece(texts(), vocab_size=vocab_size, **options)
    except (RuntimeError, ValueError) as error:
        if fault:
            raise fault[0] from None
        raise UserError(
            f"{flag} {vocab_size}: no such model can be trained on {source.name}; "
            f"choose a smaller one or --tokenizer-type byte (SentencePiece: {str(error).splitlines()[-1]})"
        ) from error


def nothing_in(source: Source) -> UserError:
    return UserError(f"{source.flag} {source.name}: no document in it")
