"""Records of a file: JSON lines, Parquet rows, or the file itself as one text.

Reading has two halves. `read_records` finds where records begin and end: cheap, and in order. `decode_text` makes the
text of one record, which another process can do.
"""

from __future__ import annotations

import codecs
import importlib
import json
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from data.files import PARQUET_SUFFIXES, compression_of, content_suffix, file_size, open_store, open_stream
from utils.errors import UserError
from utils.files import parse_json

FORMATS = ("jsonl", "text", "parquet")
MAX_RECORD_BYTES = 1 << 30  # a few KB of a compressed file may hold a line of many GB
BATCH_ROWS, BATCH_BYTES = 32, 32 << 20  # of Parquet, read at a time, bytes as stored; more rows are not faster


class BadRecord(ValueError):
    """A record that is no document.

    Attributes:
        file, number: its file, and its line or row counted from 1; 0: the whole file.
        reason: a predicate such as "is not UTF-8 text".
    """

    def __init__(self, file: str, number: int, reason: str) -> None:
        super().__init__(file, number, reason)
        self.file, self.number, self.reason = file, number, reason

    def __str__(self) -> str:
        return f"{self.file}:{self.number} {self.reason}" if self.number else f"{self.file} {self.reason}"


@dataclass(frozen=True)
class FileOffset:
    """Where reading resumes in a file.

    Attributes:
        offset: uncompressed bytes (JSON lines) or rows (Parquet) that are read.
        number: records that are read.
    """

    offset: int = 0
    number: int = 0


class Record(NamedTuple):
    """One record, not decoded yet.

    Attributes:
        content: bytes of a line, a file or a Parquet string; None: a null, or a record that is too long.
        number: line or row counted from 1; 0: a whole file.
        end: the `FileOffset.offset` behind the record.
        consumed: stored bytes of the file read so far, for progress.
        is_too_long: more than `MAX_RECORD_BYTES`.
    """

    content: bytes | None
    number: int
    end: int
    consumed: int
    is_too_long: bool = False


def detect_format(file: str) -> str:
    """`jsonl`, `text` or `parquet`: by name; files of other names are jsonl if their first line is a JSON object.

    Raises:
        UserError: a `.json` file that is not JSON lines, or corrupted compression.
    """
    suffix = content_suffix(file)
    if suffix in PARQUET_SUFFIXES:
        return "parquet"
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    try:
        with open_stream(file) as (_, lines):
            first = next((line for line, _ in _limited_lines(lines) if line.strip()), b"")
    except (EOFError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error})") from error
    first = first.removeprefix(codecs.BOM_UTF8).lstrip()
    if first[:1] == b"{":
        try:
            if isinstance(parse_json(first.decode()), dict):
                return "jsonl"
        except ValueError:
            pass  # text that begins with a brace
    if suffix == ".json":
        raise UserError(f"{file} is not JSON lines (one object a line), the only .json content that is read")
    return "text"


def _limited_lines(stream: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """(a line, its bytes); of a line of more than `MAX_RECORD_BYTES` only the beginning."""
    readline = stream.readline
    while line := readline(MAX_RECORD_BYTES + 1):
        size = len(line)
        if size > MAX_RECORD_BYTES and not line.endswith(b"\n"):
            while rest := readline(1 << 20):
                size += len(rest)
                if rest.endswith(b"\n"):
                    break
        yield line, size


def read_records(file: str, *, kind: str, json_key: str, start: FileOffset = FileOffset()) -> Iterator[Record]:
    """The records of a file from `start` on, in order, without blank lines.

    Args:
        kind: of `FORMATS`.
        json_key: the Parquet column; JSON lines are not parsed here.

    Raises:
        BadRecord: the rest of the content cannot be read: corrupted compression, no such column.
        OSError: the system cannot read the file; names it.
    """
    if kind == "parquet":
        yield from _read_parquet(file, json_key, start)
        return
    number = start.number
    try:
        with open_stream(file) as (raw, stream):
            if kind == "text":
                if not start.number:
                    content = stream.read(MAX_RECORD_BYTES + 1)
                    yield _limited(content, 0, len(content), raw.tell())
                return
            stream.seek(start.offset)
            end = start.offset
            for line, size in _limited_lines(stream):
                number += 1
                end += size
                if not line.isspace():
                    yield _limited(line, number, end, raw.tell())
    except EOFError as error:
        raise _bad_rest(file, number, error) from error
    except OSError as error:
        raise _name_file(file, error) from error


def _limited(content: bytes | None, number: int, end: int, consumed: int) -> Record:
    """A record without its content if that is longer than `MAX_RECORD_BYTES`."""
    if content is not None and len(content) > MAX_RECORD_BYTES:
        return Record(None, number, end, consumed, is_too_long=True)
    return Record(content, number, end, consumed)


def _bad_rest(file: str, done: int, error: Exception) -> BadRecord:
    """The error of a file whose content is corrupted behind `done` records."""
    what = "the rest of the file cannot be read on" if done else "cannot be read on"
    return BadRecord(file, done + 1 if done else 0, f"{what} ({' '.join(str(error).split())})")


def _name_file(file: str, error: OSError) -> OSError:
    """The system's error with the file's name in it."""
    return OSError(f"{file}: {error}") if error.errno is None else OSError(error.errno, os.strerror(error.errno), file)


def _load_pyarrow(file: str) -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet. Raises UserError: not installed."""
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError(f"{file} needs the package pyarrow ({error}): pip install -r requirements.txt") from error


def _open_parquet(pyarrow: Any, file: str) -> Any:
    """A seekable file; the content of a compressed one is held in memory. Raises BadRecord: that is too much."""
    if compression_of(file):
        with open_stream(file) as (_, stream):
            content = stream.read(MAX_RECORD_BYTES + 1)
        if len(content) > MAX_RECORD_BYTES:
            raise BadRecord(file, 0, f"unpacks to more than {MAX_RECORD_BYTES:,} bytes, which are held in memory")
        return pyarrow.BufferReader(content)
    store, path = open_store(file)
    return store.open(path, "rb")


def _read_parquet(file: str, column: str, start: FileOffset) -> Iterator[Record]:
    pyarrow, parquet = _load_pyarrow(file)
    row = 0
    try:
        with closing(_open_parquet(pyarrow, file)) as opened:
            table = parquet.ParquetFile(opened)
            path = _find_column(pyarrow, file, table.schema_arrow, column)
            size, rows = file_size(file), max(1, table.metadata.num_rows)
            # Sizes of row groups would be exact, but asking for them ends the process where they are corrupted.
            at_a_time = max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(1, size)))
            for batch in table.iter_batches(batch_size=at_a_time, columns=[column]):
                if row + batch.num_rows <= start.number:
                    row += batch.num_rows
                    continue
                values = batch.column(path[0])
                for name in path[1:]:
                    values = importlib.import_module("pyarrow.compute").struct_field(values, name)
                for value in values:
                    row += 1
                    if row > start.number:
                        value = value.value if isinstance(value, pyarrow.DictionaryScalar) else value
                        content = value.as_buffer()  # the bytes, whether they are UTF-8 or not
                        text = None if content is None else content.to_pybytes()
                        yield _limited(text, row, row, size * row // rows)
    except (pyarrow.ArrowException, EOFError, OSError, UnicodeDecodeError) as error:  # a column's name may be no UTF-8
        if isinstance(error, OSError) and error.errno is not None:  # pyarrow's own, for corrupted content, have none
            raise _name_file(file, error) from error
        raise _bad_rest(file, row, error) from error


def _find_column(pyarrow: Any, file: str, schema: Any, column: str) -> list[str]:
    """The column's name, then the names of fields within: `meta.text` is the field `text` of the column `meta`.

    Raises:
        BadRecord: not one column of that name, of text or bytes, plain or a dictionary's.
    """
    names, types = schema.names, pyarrow.types
    path = [column] if column in names else column.split(".")
    if path[0] not in names:
        raise BadRecord(file, 0, f"has no column {column!r}, but {', '.join(names[:10])}")
    if names.count(path[0]) > 1:
        raise BadRecord(file, 0, f"has {names.count(path[0])} columns {path[0]!r}")
    kind = schema.field(path[0]).type
    for name in path[1:]:
        if not types.is_struct(kind) or kind.get_field_index(name) < 0:  # several of that name: -1
            raise BadRecord(file, 0, f"has no column {column!r}: {path[0]!r} holds {kind}")
        kind = kind.field(name).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    checks = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    if not any(getattr(types, f"is_{name}")(kind) for name in checks):
        raise BadRecord(file, 0, f"column {column!r} holds {kind}, no text")
    return path


def _find_key(record: Any, key: str) -> Any:
    """The value under `key`; if there is none, `meta.text` is the key `text` of the object under `meta`. None: none."""
    if not isinstance(record, dict):
        return None
    if key in record:
        return record[key]
    first, dot, rest = key.partition(".")
    return _find_key(record.get(first), rest) if dot else None


def decode_text(file: str, record: Record, *, kind: str, json_key: str) -> str:
    """A record's text, which may be empty. Raises BadRecord: corrupted JSON, no text under the key, not UTF-8."""
    content, number = record.content, record.number
    if record.is_too_long:
        raise BadRecord(file, number, f"is longer than {MAX_RECORD_BYTES:,} bytes, the most that a document may have")
    if content is None:
        raise BadRecord(file, number, f"has no text in column {json_key!r}")
    if kind != "jsonl":
        try:
            return content.decode("utf-8")  # line ends stay as they are
        except UnicodeDecodeError as error:
            raise BadRecord(file, number, f"is not UTF-8 text ({error})") from error
    try:
        parsed = json.loads(content.decode("utf-8-sig"))  # json.loads(bytes) would guess other encodings
    except (ValueError, RecursionError) as error:
        raise BadRecord(file, number, f"is not a JSON record in UTF-8 ({error})") from error
    text = _find_key(parsed, json_key)
    if not isinstance(text, str):
        raise BadRecord(file, number, f"has no text under the key {json_key!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # legal JSON, but no Unicode text
        raise BadRecord(file, number, f"holds half a surrogate pair ({error})") from error
    return text
