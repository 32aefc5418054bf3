"""What `--data-path` names: tokenized corpora (data.prepare's or Megatron-LM's) or text; and the tokenizer that belongs
to them.

Beside `<prefix>.bin` and `<prefix>.idx`, data.prepare writes `<prefix>.json`, the metadata that names the tokenizer,
and a copy of its model. Corpora of Megatron-LM have neither: flags give their tokenizer.
"""

from __future__ import annotations

import functools
import os
import platform
import reprlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.blend import parse_phases
from data.files import LeftOut, describe_left_out, drop_empty, file_version, is_remote, match_files
from data.indexed_dataset import IndexedDataset, index_file, token_file
from data.readers import BadRecord, Record, decode_text, detect_format, read_records
from data.tokenizer import TokenIds, Tokenizer, TokenizerSpec, train_sentencepiece
from utils.errors import UserError
from utils.files import checksum, parse_json, read_text
from utils.names import redact

BOS, EOD = "begin_of_document_token", "end_of_document_token"  # keys of `<prefix>.json`; null: documents have none
STDLIB = "the Python standard library"
# Tests and vendored trees repeat themselves or are absent from some installations.
STDLIB_LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"})


# ---------------------------------------------------------------------------------------------------
# Text


@dataclass(frozen=True)
class TextSource:
    """Documents in text files, in a fixed order.

    Attributes:
        name: for messages.
        files: paths or URLs in order. A document is a line of JSON lines, a row of Parquet, or any other file.
        json_key: JSONL field, or Parquet column, that holds the text.
        kind: format of every file (`readers.FORMATS`); None: detected for each file.
        flag: names the source in errors.
        left_out: what lies in its folders beside.
    """

    name: str
    files: tuple[str, ...]
    json_key: str = "text"
    kind: str | None = None
    flag: str = "--data-path"
    left_out: LeftOut = field(default_factory=dict)

    def cache_facts(self) -> list:
        """Part of a cache key: changes whenever the documents may have changed."""
        facts: list = [self.json_key]  # without the name: the same files may be named in several ways
        if self.kind:
            facts.append(self.kind)
        if self.name == STDLIB:
            facts += [STDLIB, platform.python_version()]
        return facts + [file_version(file) for file in self.files]

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The format of each file. Raises UserError: a file's content contradicts its name."""
        if self.kind or self.name == STDLIB:
            return (self.kind or "text",) * len(self.files)
        return tuple(detect_format(file) for file in self.files)

    def texts(self, skip: Callable[[BadRecord], None] | None = None) -> Iterator[str]:
        """The documents without empty ones.

        Args:
            skip: called with each bad record, or rest of a file, which is left out; None: bad records are errors.

        Raises:
            UserError: a bad record, with file and line, or a file that the system cannot read.
        """
        for file, kind in zip(self.files, self.kinds, strict=True):
            try:
                for record in read_records(file, kind=kind, json_key=self.json_key):
                    try:
                        text = self._decode(file, kind, record)
                    except BadRecord as error:
                        if skip is None:
                            raise
                        skip(error)
                        continue
                    if text:
                        yield text
            except BadRecord as error:
                if skip is None:
                    raise UserError(f"{self.flag}: {error}") from error
                skip(error)
            except OSError as error:
                raise UserError(f"{self.flag}: {error}") from error

    def _decode(self, file: str, kind: str, record: Record) -> str:
        try:
            return decode_text(file, record, kind=kind, json_key=self.json_key)
        except BadRecord:
            if self.name == STDLIB and record.content is not None:  # a few of its files declare another encoding
                return record.content.decode("latin-1")
            raise


def no_document_error(source: TextSource) -> UserError:
    return UserError(f"{source.flag} {source.name}: no document in it")


@functools.cache
def open_stdlib() -> TextSource:
    """The interpreter's standard library, a document a file: real text with a long tail of lengths.

    Raises:
        UserError: this interpreter ships no sources.
    """
    root = sysconfig.get_path("stdlib")
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in STDLIB_LEFT_OUT]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    if not found:
        raise UserError(f"this Python has no standard library sources under {root}; give --data-path")
    return TextSource(STDLIB, tuple(str(path) for path in sorted(found)))


def open_text(data_path: str | None, json_key: str) -> TextSource:
    """The text behind `--data-path`: a file of text, JSON lines or Parquet, a folder of such files; None: the standard
    library.

    Raises:
        UserError: missing, empty, or a folder without text files.
    """
    if data_path is None:
        return open_stdlib()
    left_out: LeftOut = {}
    files = match_files(data_path, left_out) if is_remote(data_path) or os.path.lexists(data_path) else []
    if not files and not os.path.isdir(data_path):
        name = Path(data_path).name
        raise UserError(f"--data-path {data_path}: no such file or folder, and no {name}.idx of a prepared corpus")
    filled = drop_empty(files, left_out)
    if not filled:
        beside = f"; left out: {describe_left_out(left_out)}" if left_out else ""
        raise UserError(
            f"--data-path {data_path}: the file is empty"
            if files == [data_path]
            else f"--data-path {data_path}: no text in this folder (no .txt, .md, .jsonl, .parquet or the like){beside}"
        )
    return TextSource(data_path, tuple(filled), json_key, left_out=left_out)


# ---------------------------------------------------------------------------------------------------
# Prepared corpora


def metadata_file(prefix: Path) -> Path:
    """`<prefix>.json`."""
    return Path(f"{prefix}.json")


@dataclass(frozen=True)
class PreparedCorpus:
    """A tokenized corpus.

    Attributes:
        metadata: content of `<prefix>.json`; empty without that file.
    """

    prefix: Path
    tokens: IndexedDataset
    metadata: dict[str, Any]

    def tokenizer(self) -> Tokenizer | None:
        """The corpus's tokenizer, from the model beside it; None: the metadata name none.

        Raises:
            UserError: the model is missing or another one.
        """
        named = self.metadata.get("tokenizer")
        if named is None:
            return None
        model = None if named["model"] is None else str(self.prefix.parent / Path(named["model"]).name)
        found = TokenizerSpec(named["type"], model, named["eod"]).load()
        if found.fingerprint != named["fingerprint"]:
            raise UserError(
                f"{metadata_file(self.prefix)}: the {named['type']} model beside it is not the tokenizer that it was "
                "made with, or encodes some texts in another way since CHANGELOG.md's last release: prepare it again"
            )
        return found

    def verify(self) -> None:
        """Reads both files whole and compares their checksums with the metadata.

        Raises:
            UserError: a file differs, or the metadata hold no checksums.
        """
        sums = self.metadata.get("checksums")
        if sums is None:
            raise UserError(
                f"--check-data: {metadata_file(self.prefix)} has no checksums; data.prepare writes them with a corpus"
            )
        for kind, path in (("bin", token_file(self.prefix)), ("idx", index_file(self.prefix))):
            wanted = sums.get(kind) if isinstance(sums, dict) else None
            if not isinstance(wanted, list) or [type(item) for item in wanted] != [int, str]:
                raise UserError(f"{metadata_file(self.prefix)}: its checksums are not those that data.prepare writes")
            size, digest = checksum(path, like=wanted[1])
            if [size, digest] != wanted:
                was = f"{sums[kind][0]} bytes and checksum {sums[kind][1]}"
                raise UserError(f"{path}: {size} bytes and checksum {digest}, but data.prepare wrote {was}")


def open_prepared(prefix: Path) -> PreparedCorpus:
    """A corpus by its prefix. Raises UserError: corrupted files, or metadata that contradict them."""
    tokens, file = IndexedDataset(prefix), metadata_file(prefix)
    metadata: dict[str, Any] = {}
    if file.exists():
        try:
            metadata = parse_json(read_text(file.resolve()))
            counted = (metadata["documents"], metadata["tokens"])
            named = metadata["tokenizer"]
            for key, kinds in (("type", str), ("model", str | None), ("eod", str | None), ("fingerprint", str)):
                if not isinstance(named[key], kinds):  # type: ignore[arg-type]
                    raise TypeError(f"tokenizer {key} is {reprlib.repr(named[key])}")
            if type(bos := metadata.get(BOS)) not in (int, type(None)):
                raise TypeError(f"{BOS} is {reprlib.repr(bos)}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file}: not written by data.prepare ({type(error).__name__}: {error}); remove it to read the corpus "
                "without"
            ) from error
        held = (len(tokens), len(tokens.tokens))
        if counted != held:
            raise UserError(
                f"{file}: says {counted[0]} documents and {counted[1]} tokens, but the files hold {held[0]} and "
                f"{held[1]}"
            )
    return PreparedCorpus(prefix, tokens, metadata)


# ---------------------------------------------------------------------------------------------------
# The flag


@dataclass(frozen=True)
class DataSource:
    """One opened source of a phase of `--data-path`.

    Attributes:
        weight: None: by its size.
        content: one object in all phases.
        phase: its number.
    """

    name: str
    weight: Fraction | None
    content: PreparedCorpus | TextSource
    phase: int = 0

    def verify(self) -> None:
        """Raises UserError: the files differ from their checksums, or have none."""
        if not isinstance(self.content, PreparedCorpus):
            raise UserError(f"--check-data: {self.name} is raw text, which has no checksums; run data.prepare")
        self.content.verify()


def open_sources(words: Sequence[str] | None, json_key: str, flag: str = "--data-path") -> list[DataSource]:
    """The sources that a flag names; None: the standard library.

    Raises:
        UserError: a blend, file or corpus is missing or corrupted.
    """
    if words is None:
        source = open_stdlib()
        return [DataSource(source.name, None, source)]
    phases = parse_phases(words, flag)
    if len(phases) > 1 and flag != "--data-path":
        raise UserError(f"{flag} {words[0]}: phases are for --data-path; give one list of sources")
    sources: list[DataSource] = []
    opened: dict[str, tuple[str, PreparedCorpus | TextSource]] = {}
    for number, part in ((number, part) for number, phase in enumerate(phases) for part in phase.parts):
        real = os.path.realpath(part.path)
        if real not in opened:
            opened[real] = redact(part.path), _open_source(part.path, json_key, flag)
        name, content = opened[real]
        sources.append(DataSource(name, part.weight, content, number))
    return sources


def _open_source(name: str, json_key: str, flag: str) -> PreparedCorpus | TextSource:
    path = Path(name)
    if index_file(path).exists():
        return open_prepared(path)
    if path.suffix in (".bin", ".idx") and index_file(path.with_suffix("")).exists():
        raise UserError(f"{flag} {path}: give the prefix of both files, {path.with_suffix('')}")
    return open_text(name, json_key)


def list_opened(sources: Sequence[DataSource]) -> list[DataSource]:
    """Each source once: those of several phases as one mixture, by their sizes."""
    if not any(source.phase for source in sources):
        return list(sources)
    once = {id(source.content): source for source in sources}
    return [replace(source, weight=None, phase=0) for source in once.values()]


def find_tokenizer(
    sources: Sequence[DataSource], others: Sequence[DataSource], flags: TokenizerSpec
) -> Tokenizer | None:
    """The run's tokenizer: the one that flags name, else the one of the prepared corpora.

    Args:
        sources, others: training and validation sources.

    Returns:
        None: SentencePiece, to be trained on the only source, which is text.

    Raises:
        UserError: no tokenizer is named, a corpus was made with another one, or only some documents begin with BOS.
    """
    chosen = flags.load() if flags.is_named else None
    if isinstance(chosen, TokenIds):
        _check_ids([*sources, *others], chosen)
    else:
        chosen = _find_named(sources, others, flags, chosen)
    begins, by = (
        None if isinstance(chosen, TokenIds) else flags.bos,
        f"this run ({'--bos' if flags.bos else '--no-bos'})",
    )
    for source in (*sources, *others):
        if isinstance(source.content, PreparedCorpus) and source.content.metadata:
            own = source.content.metadata.get(BOS) is not None
            if begins is None:
                begins, by = own, source.name
            elif own != begins:
                raise UserError(
                    f"--data-path: the documents of {source.name} begin {'with' if own else 'without'} BOS, unlike "
                    f"{by}; prepare it again {'without' if own else 'with'} --bos"
                )
    if begins and chosen is None:
        raise UserError("--bos: a tokenizer that is trained on the text has no BOS token; give --tokenizer-model")
    if begins and chosen is not None and not isinstance(chosen, TokenIds):
        chosen.begin_with_bos()
    return chosen


def _check_ids(sources: Sequence[DataSource], tokenizer: TokenIds) -> None:
    """Raises UserError: a source of text, or corpora of other ids."""
    fingerprints: dict[str, str] = {}
    for source in sources:
        if not isinstance(source.content, PreparedCorpus):
            raise UserError(f"--eod-id {tokenizer.eod}: {source.name} is text; prepare it with its tokenizer")
        if said := source.content.metadata:
            if said.get(EOD) not in (None, tokenizer.eod):
                raise UserError(f"--eod-id {tokenizer.eod}: the documents of {source.name} end with token {said[EOD]}")
            fingerprints[said["tokenizer"]["fingerprint"]] = source.name
    if len(fingerprints) > 1:
        raise UserError(f"--data-path: {' and '.join(fingerprints.values())} were made with different tokenizers")


def _find_named(
    sources: Sequence[DataSource], others: Sequence[DataSource], flags: TokenizerSpec, chosen: Tokenizer | None
) -> Tokenizer | None:
    by, unnamed = "the flags", None
    for source in (*sources, *others):
        if not isinstance(source.content, PreparedCorpus):
            continue
        own = source.content.tokenizer()
        if own is None:
            unnamed = unnamed or source.name
            continue
        if flags.kind not in ("auto", own.kind):
            raise UserError(
                f"--tokenizer-type {flags.kind}: {source.name} was made with a tokenizer of type {own.kind}"
            )
        if chosen is None:
            chosen, by = own, source.name
        elif own.fingerprint != chosen.fingerprint:
            raise UserError(f"--data-path: {source.name} was made with another tokenizer than that of {by}")
    if chosen is not None:
        return chosen
    if unnamed is not None:
        raise UserError(
            f"--data-path {unnamed} holds tokens and does not say whose: give its --tokenizer-model, "
            "--tokenizer-type byte, or --vocab-size and --eod-id"
        )
    if len(sources) > 1:
        raise UserError(
            f"--data-path: {len(sources)} sources of text need one tokenizer: give --tokenizer-model, or "
            "--tokenizer-type byte"
        )
    if flags.kind == "huggingface":
        raise UserError("--tokenizer-type huggingface needs --tokenizer-model, a tokenizer.json")
    return None


def train_model(
    source: TextSource, *, vocab_size: int, flag: str, skip: Callable[[BadRecord], None] | None = None, **options: Any
) -> bytes:
    """A SentencePiece model of the source's texts.

    Args:
        flag: names the vocabulary's size in errors.
        skip: as `TextSource.texts`.
        options: as `train_sentencepiece`.

    Raises:
        UserError: a corrupted or empty source, or one too small for the vocabulary.
    """
    fault: list[UserError] = []  # SentencePiece turns what its iterator raises into an error of its own

    def read_texts() -> Iterator[str]:
        found = False
        try:
            for text in source.texts(skip):
                found = True
                yield text
        except UserError as error:
            fault.append(error)
            raise
        if not found:
            fault.append(no_document_error(source))

    try:
        return train_sentencepiece(read_texts(), vocab_size=vocab_size, **options)
    except (RuntimeError, ValueError) as error:
        if fault:
            raise fault[0] from None
        raise UserError(
            f"{flag} {vocab_size}: no such model can be trained on {source.name}; "
            f"choose a smaller one or --tokenizer-type byte (SentencePiece: {str(error).splitlines()[-1]})"
        ) from error


def document_lengths(sources: Sequence[DataSource]) -> np.ndarray | None:
    """[documents] int64 tokens of the prepared sources' documents (the first million of each); None without any."""
    prepared = [source.content for source in sources if isinstance(source.content, PreparedCorpus)]
    lengths = [content.tokens.first_lengths(1_000_000).astype(np.int64) for content in prepared]
    return np.concatenate(lengths) if lengths else None
