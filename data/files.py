"""Input files by name: local paths, or URLs of a store that fsspec knows (`s3://`, `gs://`, `memory://`), plain or
compressed.
"""

from __future__ import annotations

import glob
import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec import AbstractFileSystem
from fsspec.compression import register_compression
from fsspec.core import OpenFile
from fsspec.implementations.local import LocalFileSystem

from utils.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text", ".py")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIXES = (".parquet", ".pq")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
STORE_PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "http": "aiohttp",
    "https": "aiohttp",
}


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
        package = STORE_PACKAGES.get(protocol, f"the fsspec package of {protocol}")
        raise UserError(f"{name}: {protocol}:// files need a package ({error}): pip install {package}") from error
    except ValueError as error:
        raise UserError(f"{name}: cannot be opened ({error})") from error


def content_suffix(name: str) -> str:
    """The suffix of a file's name without its compression's: `.jsonl` of `a.jsonl.gz`."""
    path = Path(name)
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def is_readable(name: str) -> bool:
    """Whether a folder's file holds documents, by its name."""
    return content_suffix(name) in (*TEXT_SUFFIXES, *RECORD_SUFFIXES, *PARQUET_SUFFIXES)


def file_version(name: str) -> tuple[str, int, Any]:
    """Resolved name, bytes, and a value that changes with the content (modification time, or the store's ETag)."""
    if is_remote(name):
        store, path = open_store(name)
        return name, store.size(path), store.ukey(path)  # type: ignore[attr-defined]
    stat = os.stat(name)
    return os.path.realpath(name), stat.st_size, stat.st_mtime_ns


def file_size(name: str) -> int:
    """Bytes as stored, compressed or not."""
    return file_version(name)[1]


def unique_files(names: Iterable[str]) -> list[str]:
    """Files in order, without files that an earlier name means too (links)."""
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(name if is_remote(name) else os.path.realpath(name), name)
    return list(found.values())


def files_in_folder(folder: str) -> list[str]:
    """Readable local files below a folder, sorted by name, once each; links to folders are followed."""
    found: list[str] = []
    visited: set[str] = set()
    for at, subfolders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(at)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        found += [os.path.join(at, name) for name in names if is_readable(name)]
    return unique_files(name for name in sorted(found, key=Path) if os.path.isfile(name))


def match_files(pattern: str) -> list[str]:
    """Files that a name, a folder or a glob pattern stands for; the readable files of folders."""
    if is_remote(pattern):
        store, path = open_store(pattern)
        matched = [path] if store.exists(path) else sorted(store.glob(path))
        folders = [sorted(filter(is_readable, store.find(at))) if store.isdir(at) else [at] for at in matched]
        return [store.unstrip_protocol(file) for files in folders for file in files]
    if os.path.isfile(pattern):
        return [pattern]
    matched = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    return [file for at in matched for file in (files_in_folder(at) if os.path.isdir(at) else [at])]


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
    register_compression("zstd", zstd.ZstdFile, "zst", force=True)
    return zstd


@contextmanager
def open_stream(name: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(the file as stored, its uncompressed content); `tell` of the first counts stored bytes.

    Raises:
        EOFError, gzip.BadGzipFile, zlib.error: corrupted compression.
        OSError: the system cannot read the file.
    """
    store, path = open_store(name)
    compression = COMPRESSIONS.get(Path(name).suffix)
    corrupted = _load_zstd().ZstdError if compression == "zstd" else ()
    opened = OpenFile(store, path, "rb", compression)
    try:
        with opened as stream:
            yield opened.fobjects[0], stream
    except corrupted as error:
        raise EOFError(str(error)) from error
