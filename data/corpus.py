"""Where documents come from: the Python standard library by default, or text files of the user's.

A source yields one text a document, in a fixed order, and says what it was made from, so that what is
derived from it (tokenizer, tokens) can be cached.
"""

from __future__ import annotations

import json
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STDLIB = "the Python standard library"
# Tests and vendored trees repeat themselves or are absent from some installations.
STDLIB_LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"})
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text", ".py")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Source:
    """Documents in files.

    Attributes:
        name: for people.
        files: in order. A file of JSON lines holds a document a line, any other file is one document.
        json_key: field of a JSONL record that holds the text.
    """

    name: str
    files: tuple[Path, ...]
    json_key: str = "text"

    def made_from(self) -> list:
        """Changes whenever the documents may have."""
        facts: list = [self.name, self.json_key]
        if self.name == STDLIB:
            facts.append(platform.python_version())
        for file in self.files:
            stat = file.stat()
            facts.append((str(file.resolve()), stat.st_size, stat.st_mtime_ns))
        return facts

    def texts(self) -> Iterator[str]:
        """The documents, empty ones left out.

        Raises:
            ValueError: a record or file that is not what its name says, with file and line.
        """
        for file in self.files:
            if self.name != STDLIB and holds_records(file):
                yield from self._records(file)
            else:
                try:
                    text = file.read_bytes().decode("utf-8")  # to the byte: line ends stay
                except UnicodeDecodeError as error:
                    if self.name == STDLIB:  # a few of its files declare another encoding
                        text = file.read_bytes().decode("latin-1")
                    else:
                        raise ValueError(f"--data-path: {file} is not UTF-8 text ({error})") from error
                if text:
                    yield text

    def _records(self, file: Path) -> Iterator[str]:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"--data-path: {file}:{number} is not a JSON record in UTF-8 ({error})") from error
                text = record.get(self.json_key) if isinstance(record, dict) else None
                if not isinstance(text, str):
                    raise ValueError(f"--data-path: {file}:{number} has no text under the key {self.json_key!r}")
                try:
                    text.encode()
                except UnicodeEncodeError as error:  # legal JSON, no Unicode text
                    raise ValueError(f"--data-path: {file}:{number} holds half a surrogate pair ({error})") from error
                if text:
                    yield text


def holds_records(file: Path) -> bool:
    """Whether a file is JSON lines: by its name, or whatever it is called, if its first line is a JSON object.

    Raises:
        ValueError: a `.json` file that is not JSON lines.
    """
    if file.suffix in (".jsonl", ".ndjson"):
        return True
    with file.open("rb") as lines:
        first = next((line for line in lines if line.strip()), b"")
    if first.lstrip()[:1] == b"{":
        try:
            return isinstance(json.loads(first), dict)
        except ValueError:
            pass  # text that happens to begin so
    if file.suffix == ".json":
        raise ValueError(f"--data-path: {file} is not JSON lines (one object a line); only those are read from .json files")
    return False


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
        raise ValueError(f"this Python has no standard library sources under {root}; give --data-path")
    return Source(STDLIB, files)


def open_source(data_path: str | None, json_key: str) -> Source:
    """The source behind `--data-path`: a text file, a JSONL file, a folder of text files, or None for the default.

    Raises:
        ValueError: missing, empty, or nothing in it that is text.
    """
    if data_path is None:
        return stdlib_source()
    path = Path(data_path)
    if not path.exists():
        raise ValueError(f"--data-path {data_path}: no such file or folder")
    if path.is_file():
        if path.stat().st_size == 0:
            raise ValueError(f"--data-path {data_path}: the file is empty")
        return Source(data_path, (path,), json_key)
    suffixes = (*TEXT_SUFFIXES, *RECORD_SUFFIXES)
    files = tuple(sorted(p for p in path.rglob("*") if p.suffix in suffixes and p.is_file() and p.stat().st_size))
    if not files:
        raise ValueError(f"--data-path {data_path}: no text in this folder (looked for {', '.join(suffixes)})")
    return Source(data_path, files, json_key)
