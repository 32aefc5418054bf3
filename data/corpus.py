"""Where documents come from: the Python standard library by default, or files of the user's.

A source yields one text a document, in a fixed order, and says what it was made from, so that what is
derived from it (tokenizer, tokens) can be cached.
"""

from __future__ import annotations

import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data.readers import BadRecord, Record, files_under, format_of, read_records, text_of
from utils.errors import UserError

STDLIB = "the Python standard library"
# Tests and vendored trees repeat themselves or are absent from some installations.
STDLIB_LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"})


@dataclass(frozen=True)
class Source:
    """Documents in files.

    Attributes:
        name: for people.
        files: in order. JSON lines and Parquet hold a document a line or row, any other file is one document.
        json_key: field of a JSONL record, or Parquet column, that holds the text.
        kind: of every file (`readers.FORMATS`); None: told by each file's name and first line.
        flag: that named it, for errors.
    """

    name: str
    files: tuple[Path, ...]
    json_key: str = "text"
    kind: str | None = None
    flag: str = "--data-path"

    def made_from(self) -> list:
        """Changes whenever the documents may have."""
        facts: list = [self.json_key]  # not the name: the same files may be asked for in several ways
        if self.kind:
            facts.append(self.kind)
        if self.name == STDLIB:
            facts += [STDLIB, platform.python_version()]
        for file in self.files:
            stat = file.stat()
            facts.append((str(file.resolve()), stat.st_size, stat.st_mtime_ns))
        return facts

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The format of each file.

        Raises:
            ValueError: a file that is not what its name says.
        """
        if self.kind or self.name == STDLIB:
            return (self.kind or "text",) * len(self.files)
        return tuple(format_of(file) for file in self.files)

    def texts(self, skip: Callable[[BadRecord], None] | None = None) -> Iterator[str]:
        """The documents, empty ones left out.

        Args:
            skip: told of each record, or rest of a file, that is no document, which is then left out; None: it ends the reading.

        Raises:
            ValueError: a record or file that is not what its name says, with file and line, or a file that the system cannot read.
        """
        for file, kind in zip(self.files, self.kinds, strict=True):
            try:
                for record in read_records(file, kind=kind, json_key=self.json_key):
                    try:
                        text = self._text(file, kind, record)
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

    def _text(self, file: Path, kind: str, record: Record) -> str:
        try:
            return text_of(str(file), record, kind=kind, json_key=self.json_key)
        except BadRecord:
            if self.name == STDLIB and isinstance(record.content, bytes):  # a few of its files declare another encoding
                return record.content.decode("latin-1")
            raise


def stdlib_source() -> Source:
    """The running interpreter's standard library, a document a file: real text with a long tail of lengths.

    Raises:
        ValueError: an interpreter that ships no sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in STDLIB_LEFT_OUT]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    files = tuple(sorted(found))
    if not files:
        raise UserError(f"this Python has no standard library sources under {root}; give --data-path")
    return Source(STDLIB, files)


def open_source(data_path: str | None, json_key: str) -> Source:
    """The source behind `--data-path`: a file of text, JSON lines or Parquet, a folder of such, or None for the default.

    Raises:
        ValueError: missing, empty, or nothing in it that is text.
    """
    if data_path is None:
        return stdlib_source()
    path = Path(data_path)
    if not path.exists():
        raise UserError(f"--data-path {data_path}: no such file or folder, and no {path.name}.idx of a prepared corpus")
    if path.is_file():
        if path.stat().st_size == 0:
            raise UserError(f"--data-path {data_path}: the file is empty")
        return Source(data_path, (path,), json_key)
    files = tuple(p for p in files_under(path) if p.stat().st_size)
    if not files:
        raise UserError(f"--data-path {data_path}: no text in this folder (no .txt, .md, .jsonl, .parquet or the like)")
    return Source(data_path, files, json_key)
