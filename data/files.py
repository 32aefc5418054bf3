"""Input files by name: local paths, or URLs of a store that fsspec knows (`s3://`, `gs://`, `memory://`), plain or
compressed.
"""

from __future__ import annotations

import functools
import glob
import gzip
import importlib
import io
import lzma
import os
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import fsspec
from fsspec import AbstractFileSystem
from fsspec.compression import register_compression
from fsspec.core import OpenFile
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from utils.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text", ".py")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIXES = (".parquet", ".pq")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz"}


def is_remote(name: str) -> bool:
    return "://" in name


def open_store(name: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a file, and the file's path in it.

    Raises:
        UserError: unknown protocol, or its package is not installed.
    """
    if not is_remote(name):
        return LocalFileSystem(), os.path.abspath(name)
    protocol = name.partition("://")[0]
    try:
        return fsspec.url_to_fs(name)
    except ImportError as error:
        raise UserError(f"{name}: {protocol}:// files need a package that is not installed: {error}") from error
    except ValueError as error:
        raise UserError(f"{name}: cannot be opened ({error})") from error


def compression_of(name: str) -> str | None:
    """Of `COMPRESSIONS`, by name in any case; None: stored plain."""
    return COMPRESSIONS.get(Path(name).suffix.lower())


def content_suffix(name: str) -> str:
    """The lower-case suffix of a file's name without its compression's: `.jsonl` of `a.JSONL.gz`."""
    path = Path(name.lower())
    return Path(path.stem).suffix if compression_of(name) else path.suffix


def is_readable(name: str) -> bool:
    """Whether a folder's file holds documents, by its name."""
    return content_suffix(name) in (*TEXT_SUFFIXES, *RECORD_SUFFIXES, *PARQUET_SUFFIXES)


def file_version(name: str) -> tuple[str, int, Any]:
    """Resolved name, bytes, and a value that changes with the content: the store's ETag, or of a local file the time
    of modification and the time of the inode's change, which `cp -p`, `rsync -t` and `tar` cannot set back.
    """
    if is_remote(name):
        store, path = open_store(name)
        return name, store.size(path), store.ukey(path)  # type: ignore[attr-defined]
    found = os.stat(name)
    return os.path.realpath(name), found.st_size, (found.st_mtime_ns, found.st_ctime_ns)


def file_size(name: str) -> int:
    """Bytes as stored, compressed or not."""
    return file_version(name)[1]


def unique_files(names: Iterable[str]) -> list[str]:
    """Files in order, without files that an earlier name means too (links)."""
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(name if is_remote(name) else os.path.realpath(name), name)
    return list(found.values())


LeftOut = dict[str, list[str]]  # {kind, such as "hidden" or ".png": names}


def describe_left_out(left_out: LeftOut) -> str:
    """`2 hidden (text/.git, ...), 1 .png (text/a.png)`."""
    return ", ".join(
        f"{len(names):,} {kind} ({names[0]}{', ...' if len(names) > 1 else ''})" for kind, names in left_out.items()
    )


def _sort_out(names: Iterable[str], left_out: LeftOut) -> list[str]:
    """The names that hold documents; the others are added to `left_out`, by suffix."""
    found = []
    for name in names:
        if is_readable(name):
            found.append(name)
        else:
            left_out.setdefault(Path(name).suffix or "without suffix", []).append(name)
    return found


def drop_empty(files: Iterable[str], left_out: LeftOut) -> list[str]:
    """The files with content; others go to `left_out`.

    An empty Parquet or compressed file stays: its reader refuses the file.
    """
    filled: list[str] = []
    empty: list[str] = []
    for name in files:
        is_broken_if_empty = compression_of(name) is not None or content_suffix(name) in PARQUET_SUFFIXES
        (filled if is_broken_if_empty or file_size(name) else empty).append(name)
    if empty:
        left_out["empty"] = empty
    return filled


def _refuse(error: OSError) -> NoReturn:
    dangles = os.path.islink(error.filename) and not os.path.exists(error.filename)
    problem = "a link that leads nowhere" if dangles else error.strerror
    raise UserError(f"{error.filename}: {problem}; data must not be lost silently: repair or remove it") from error


def _check_file(name: str) -> str:
    """The name of a regular file. Raises UserError: a broken link, a pipe, a device, or a file that cannot be read."""
    try:
        mode = os.stat(name).st_mode
    except OSError as error:
        _refuse(error)
    if not stat.S_ISREG(mode):
        raise UserError(f"{name}: a pipe or a device, but inputs are read more than once: write it to a file")
    return name


def files_in_folder(folder: str, left_out: LeftOut) -> list[str]:
    """Readable local files below a folder, sorted by name, once each; links to folders are followed.

    Args:
        left_out: gets files of other names, and hidden files and folders.

    Raises:
        UserError: a subfolder cannot be read, a link leads nowhere, or a file is no regular one.
    """
    found: list[str] = []
    visited: set[str] = set()
    for at, subfolders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        real = os.path.realpath(at)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        hidden = [os.path.join(at, name) for name in (*subfolders, *names) if name.startswith(".")]
        if hidden:
            left_out.setdefault("hidden", []).extend(hidden)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            path = os.path.join(at, name)
            # Only what would be read, or may be a folder, is refused where it is broken.
            if not name.startswith("."):
                found.append(_check_file(path) if is_readable(path) or "." not in name else path)
    return unique_files(_sort_out(sorted(found, key=Path), left_out))


def _glob(pattern: str) -> list[str]:
    """Local names that match. Raises UserError: a folder that the pattern searches cannot be read."""
    parts = Path(pattern).parts
    for number, part in enumerate(parts):  # glob itself passes over what it cannot read
        if glob.has_magic(part):
            for folder in glob.glob(os.path.join(*parts[:number], ""), recursive=True) if number else ["."]:
                try:
                    os.scandir(folder).close()
                except OSError as error:
                    _refuse(error)
    return sorted(glob.glob(pattern, recursive=True))


def match_files(pattern: str, left_out: LeftOut | None = None) -> list[str]:
    """Files that a name, a folder or a glob pattern stands for; the readable files of folders.

    Args:
        left_out: gets what folders hold beside; None: not wanted.

    Raises:
        UserError: as `files_in_folder`.
    """
    left_out = {} if left_out is None else left_out
    files: list[str] = []
    if is_remote(pattern):
        store, path = open_store(pattern)
        matched = [path] if store.exists(path) else sorted(store.glob(path))
        for at in matched:
            below = sorted(store.find(at)) if store.isdir(at) else []
            hidden = [name for name in below if "/." in name[len(at.rstrip("/")) :]]
            if hidden:
                left_out.setdefault("hidden", []).extend(hidden)
            files += _sort_out(sorted({*below}.difference(hidden)), left_out) if below else [at]
        return [store.unstrip_protocol(file) for file in files]
    for at in [pattern] if os.path.lexists(pattern) else _glob(pattern):
        files += files_in_folder(at, left_out) if os.path.isdir(at) else [_check_file(at)]
    return files


def _load_zstd() -> Any:
    """The zstd library, registered with fsspec.

    fsspec's fallback `zstandard` ends behind the first frame of a file without an error, so the rest would be lost.

    Raises:
        UserError: not installed.
    """
    name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    try:
        zstd = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f".zst files need the package {name} ({error}): pip install -r requirements.txt") from error
    # A window of 2 GiB, as `zstd --long=31` writes: the library's own limit is 128 MiB.
    widest = {zstd.DecompressionParameter.window_log_max: zstd.DecompressionParameter.window_log_max.bounds()[1]}
    register_compression("zstd", functools.partial(zstd.ZstdFile, options=widest), "zst", force=True)
    return zstd


@contextmanager
def open_stream(name: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(the file as stored, its uncompressed content); `tell` of the first counts stored bytes.

    Raises:
        EOFError: corrupted compression.
        OSError: the system cannot read the file.
    """
    store, path = open_store(name)
    compression = compression_of(name)
    corrupted = (zlib.error, lzma.LZMAError, *((_load_zstd().ZstdError,) if compression == "zstd" else ()))
    if compression and not file_size(name):
        raise EOFError("empty, which is no compressed content")  # gzip takes it for an empty text
    opened = OpenFile(store, path, "rb", compression)
    try:
        with opened as stream:
            # `readline` of a remote store's file takes no size.
            yield opened.fobjects[0], io.BufferedReader(stream) if isinstance(stream, AbstractBufferedFile) else stream
    except corrupted as error:
        raise EOFError(str(error)) from error
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile) or str(error) == "Invalid data stream":  # bz2's words
            raise EOFError(str(error)) from error
        raise
