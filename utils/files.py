"""Files and folders that are whole or not there at all, also after a loss of power."""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError

WORDS_PER_PAGE = 512  # of 8 bytes
WAIT_SECONDS = (
    900.0  # for another process that builds the same; then it is built here too, which costs time and memory only
)
LEFT_AFTER = 86400.0  # seconds in which nothing was written to an unfinished folder, whose builder is then dead


def cache_key(**made_from: Any) -> str:
    """A short hash of everything that a cached thing depends on."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode()).hexdigest()[:16]


def checksum(path: Path) -> tuple[int, str]:
    """Size in bytes and a checksum of a file: SHA-256 over its size and the sum of each page's 64-bit words.

    Finds every change of one word in a page for certain, others but for one in 2^64, at the speed of memory: a CRC of the
    same file takes longer than loading it (benchmarks/checkpoint.py).
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        words = size // 8
        if words:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                data = np.frombuffer(mapped, "<u8", count=words)
                pages = words // WORDS_PER_PAGE * WORDS_PER_PAGE
                digest.update(data[:pages].reshape(-1, WORDS_PER_PAGE).sum(1, dtype=np.uint64).tobytes())
                digest.update(data[pages:].tobytes())
                del data  # the map cannot be closed while something looks into it
        file.seek(words * 8)
        digest.update(file.read())
    return size, digest.hexdigest()


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())


def replace_synced(path: Path, text: str) -> None:
    """Write a file beside its place and rename it there: a reader sees the old one or the new one."""
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")  # ranks on several hosts may have the same pid
    try:
        write_synced(scratch, text)
        os.replace(scratch, path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def _first_in_line(path: Path) -> Iterator[None]:
    """Until the end, or the death, of one process in here the others wait, unless `path` appears or the file system has no locks."""
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("w") as file:
        started = time.monotonic()
        while not path.is_dir() and time.monotonic() - started < WAIT_SECONDS:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:
                break
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


class CacheNotWritable(UserError):
    """What a cache lacks cannot be put there."""


@contextmanager
def cache_entry(folder: Path) -> Iterator[None]:
    """Around the opening of what `build_once` made.

    Raises:
        ValueError: it is broken; what to do.
    """
    try:
        yield
    except (OSError, ValueError, EOFError) as error:
        why = " ".join(str(error).split())
        raise UserError(
            f"--data-cache-path: {folder} is broken ({why}); remove that folder, and it is built anew"
        ) from error


def _sync_folder(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        sync(path)


def _remove_left_behind(folder: Path) -> None:
    """What builders that were killed left in a folder of the cache."""
    for left in folder.glob(".*.*"):
        with suppress(OSError):  # another builder may remove it, too
            if left.is_dir() and time.time() - max(p.stat().st_mtime for p in (left, *left.iterdir())) > LEFT_AFTER:
                shutil.rmtree(left, ignore_errors=True)


def build_once(path: Path, build: Callable[[Path], None]) -> Path:
    """`path`, made by `build(empty folder)` if it is not there yet.

    The folder is built beside its place and renamed into it, so it is never seen half made, not even after a loss of power.
    Whoever comes second, in this job or another, waits for the first one's and uses it.

    Raises:
        CacheNotWritable: it is not there, and its folder cannot be written in.
    """
    if path.is_dir():
        return path
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_first_in_line(path))
            if path.is_dir():
                return path
            _remove_left_behind(path.parent)
            scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        except OSError as error:
            text = f"--data-cache-path: {path} is not there yet and cannot be made ({error.strerror})"
            raise CacheNotWritable(f"{text}; fill the cache once where it can be written") from error
        try:
            build(scratch)
            scratch.chmod(0o755)
            _sync_folder(scratch)
            try:
                os.rename(scratch, path)
            except OSError:
                if not path.is_dir():
                    raise
            sync(path.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return path
