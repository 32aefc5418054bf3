"""Documents as they stand in files: text, JSON lines or Parquet, plain or compressed with gzip or zstd.

Reading is in two halves. `read_records` finds where a file's records begin and end, which is cheap and in order;
`text_of` makes a text of one of them, which another process can do.
"""

from __future__ import annotations

import codecs
import gzip
import importlib
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, NamedTuple

from utils.errors import UserError

FORMATS = ("jsonl", "text", "parquet")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text", ".py")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIXES = (".parquet", ".pq")
COMPRESSED_SUFFIXES = (".gz", ".zst")
# What a damaged compressed file makes its library raise; an OSError with an errno is the system's, and says nothing of the content.
BROKEN_STREAM = (EOFError, OSError, zlib.error)


class BadRecord(ValueError):
    """A record that is no document.

    Attributes:
        file, number: where; the line or row counted from 1, 0 for the whole file.
        why: in words.
    """

    def __init__(self, file: str, number: int, why: str) -> None:
        super().__init__(file, number, why)
        self.file, self.number, self.why = file, number, why

    def __str__(self) -> str:
        return f"{self.file}:{self.number} {self.why}" if self.number else f"{self.file} {self.why}"


@dataclass(frozen=True)
class Place:
    """Where reading a file goes on: `offset` bytes (JSON lines, after decompression) or rows (Parquet) are done, `number` records."""

    offset: int = 0
    number: int = 0


class Record(NamedTuple):
    """One record, not looked into yet.

    Attributes:
        content: a line's or file's bytes, or a Parquet row's text (None where it has none).
        number: its line or row counted from 1; 0 for a whole file.
        end: the offset of `Place` behind it.
        consumed: bytes of the file, as it lies on disk, that were read to get here.
    """

    content: bytes | str | None
    number: int
    end: int
    consumed: int


def load_pyarrow(why: str) -> ModuleType:
    """The library that reads Parquet and zstd, imported where it is needed.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(f"{why} needs the package pyarrow ({error}): pip install -r requirements.txt") from error
    return pyarrow


def is_readable(file: Path) -> bool:
    """Whether a folder's file is taken for documents, by its name."""
    return Path(_plain_name(file)).suffix in (*TEXT_SUFFIXES, *RECORD_SUFFIXES, *PARQUET_SUFFIXES)


def files_under(folder: Path) -> list[Path]:
    """A folder's readable files in the order of their names, those behind links to folders too, none twice."""
    found: list[Path] = []
    visited: set[str] = set()
    for at, subfolders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(at)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders.sort()
        found += [Path(at, name) for name in names if is_readable(Path(name))]
    return each_once(path for path in sorted(found) if path.is_file())


def each_once(files: Iterable[Path]) -> list[Path]:
    """Files in order, without those that are an earlier one by another name."""
    found: dict[str, Path] = {}
    for file in files:
        found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def _plain_name(file: Path) -> str:
    return file.name.removesuffix(file.suffix) if file.suffix in COMPRESSED_SUFFIXES else file.name


def format_of(file: Path) -> str:
    """`jsonl`, `text` or `parquet`: by name, and for other names by whether the first line is a JSON object.

    Raises:
        ValueError: a `.json` file that is not JSON lines, or broken compression.
    """
    suffix = Path(_plain_name(file)).suffix
    if suffix in PARQUET_SUFFIXES:
        return "parquet"
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    try:
        with open_plain(file) as (_, lines):
            first = next((line for line in lines if line.strip()), b"")
    except BROKEN_STREAM as error:
        raise UserError(f"{file} cannot be read ({error})") from error
    first = first.removeprefix(codecs.BOM_UTF8).lstrip()
    if first[:1] == b"{":
        try:
            if isinstance(json.loads(first.decode()), dict):
                return "jsonl"
        except ValueError:
            pass  # text that happens to begin so
    if suffix == ".json":
        raise UserError(f"{file} is not JSON lines (one object a line); only those are read from .json files")
    return "text"


class open_plain:
    """Opens a file for reading its uncompressed bytes: (the file as it lies on disk, the stream of its content)."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> tuple[BinaryIO, BinaryIO]:
        self.raw = self.file.open("rb")
        self.stream: BinaryIO = self.raw
        if self.file.suffix == ".gz":
            self.stream = gzip.GzipFile(fileobj=self.raw, mode="rb")  # type: ignore[assignment]
        elif self.file.suffix == ".zst":
            pyarrow = load_pyarrow(str(self.file))
            native = pyarrow.CompressedInputStream(pyarrow.PythonFile(self.raw, mode="r"), "zstd")
            self.stream = io.BufferedReader(native, 1 << 20)  # type: ignore[assignment]
        return self.raw, self.stream

    def __exit__(self, *_: object) -> None:
        if self.stream is not self.raw:
            self.stream.close()
        self.raw.close()


def _skip(stream: BinaryIO, size: int) -> None:
    if stream.seekable():
        stream.seek(size)
        return
    while size:
        block = stream.read(min(size, 1 << 22))
        if not block:
            raise EOFError(f"it ends {size} bytes before the place where reading is to go on")
        size -= len(block)


def read_records(file: Path, *, kind: str, json_key: str, start: Place = Place()) -> Iterator[Record]:
    """The records of a file from `start` on, in order; blank lines are none.

    Args:
        kind: of `FORMATS`.
        json_key: the Parquet column; JSON lines are not looked into.

    Raises:
        BadRecord: what the file holds cannot be read on: broken compression, no such column.
        OSError: the system cannot read it, with its name.
    """
    number = start.number
    try:
        if kind == "parquet":
            yield from _parquet_rows(file, json_key, start)
            return
        with open_plain(file) as (raw, stream):
            if kind == "text":
                if not start.number:
                    content = stream.read()
                    yield Record(content, 0, len(content), raw.tell())
                return
            if start.offset:
                _skip(stream, start.offset)
            end = start.offset
            for line in stream:
                number += 1
                end += len(line)
                if not line.isspace():
                    yield Record(line, number, end, raw.tell())
    except BROKEN_STREAM as error:
        raise _broken(file, number, error) from error


def _broken(file: Path, done: int, error: Exception) -> Exception:
    """What is said of a file that ends in an error behind `done` records."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, os.strerror(error.errno), str(file))
    what = "the rest of the file cannot be read on" if done else "cannot be read on"
    return BadRecord(str(file), done + 1 if done else 0, f"{what} ({' '.join(str(error).split())})")


def _parquet_rows(file: Path, column: str, start: Place) -> Iterator[Record]:
    pyarrow = load_pyarrow(str(file))
    parquet = importlib.import_module("pyarrow.parquet")
    row = 0
    if file.suffix in COMPRESSED_SUFFIXES:  # the format needs to seek: the whole file is held in memory
        with open_plain(file) as (_, stream):
            opened = pyarrow.BufferReader(stream.read())
    else:
        opened = pyarrow.OSFile(str(file))
    size = file.stat().st_size
    try:
        table = parquet.ParquetFile(opened)
        names = table.schema_arrow.names
        if column not in names:
            raise BadRecord(str(file), 0, f"has no column {column!r}, but {', '.join(names[:10])}")
        if names.count(column) > 1:
            raise BadRecord(str(file), 0, f"has {names.count(column)} columns {column!r}")
        kind = table.schema_arrow.field(column).type
        if not (
            pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)
        ):
            raise BadRecord(str(file), 0, f"column {column!r} holds {kind}, no text")
        rows = table.metadata.num_rows
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            if row + batch.num_rows <= start.number:
                row += batch.num_rows
                continue
            for value in batch.column(0):
                row += 1
                if row > start.number:
                    yield Record(_parquet_text(value), row, row, size * row // rows)
    except (pyarrow.ArrowException, *BROKEN_STREAM) as error:
        raise _broken(file, row, error) from error
    finally:
        opened.close()


def _parquet_text(value: object) -> bytes | None:
    """The bytes behind a string value: whether they are UTF-8 is for `text_of` to say."""
    buffer = value.as_buffer()  # type: ignore[attr-defined]
    return None if buffer is None else buffer.to_pybytes()


def text_of(file: str, record: Record, *, kind: str, json_key: str) -> str:
    """A record's text, which may be empty.

    Raises:
        BadRecord: broken JSON, no text under the key, not UTF-8.
    """
    content, number = record.content, record.number
    if kind == "jsonl":
        assert isinstance(content, bytes)
        try:
            parsed = json.loads(content.decode("utf-8-sig"))  # of bytes, json would guess other encodings
        except (ValueError, RecursionError) as error:
            raise BadRecord(file, number, f"is not a JSON record in UTF-8 ({error})") from error
        text = parsed.get(json_key) if isinstance(parsed, dict) else None
        if not isinstance(text, str):
            raise BadRecord(file, number, f"has no text under the key {json_key!r}")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # legal JSON, no Unicode text
            raise BadRecord(file, number, f"holds half a surrogate pair ({error})") from error
        return text
    if content is None:
        raise BadRecord(file, number, f"has no text in column {json_key!r}")
    if isinstance(content, str):
        return content
    try:
        return content.decode("utf-8")  # to the byte: line ends stay
    except UnicodeDecodeError as error:
        raise BadRecord(file, number, f"is not UTF-8 text ({error})") from error
