"""Atomic files and folders, checksums, locks, and a cache that is built once."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import shutil
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import xxhash
from filelock import FileLock, Timeout

from utils.errors import UserError

LEASE_SECONDS = 180.0  # without a sign of life from its holder; above the 60 s for which NFS caches times
ABANDONED_SECONDS = 86400.0  # an unfinished folder without a write for so long belongs to a dead builder
HASHED_BYTES = 1 << 26  # bytes of a file that are mapped at a time


def cache_key(**made_from: Any) -> str:
    """A short hash of everything that a cache entry depends on."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------
# Checksums


class Checksum:
    """The checksum of bytes that come in parts."""

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_128()

    def update(self, content: Any) -> None:
        """Add the content of a buffer."""
        self._digest.update(content)

    def value(self) -> str:
        """Return `<algorithm>:<hex>`."""
        return f"xxh3_128:{self._digest.hexdigest()}"


def checksum(path: Path, *, like: str = "xxh3_128:") -> tuple[int, str]:
    """Return a file's size in bytes and its checksum, `<algorithm>:<hex>`.

    Args:
        like: a checksum whose algorithm is used. Without a prefix: the one of files from before xxh3_128.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return checksum_file(file, like=like)


def checksum_file(file: IO[bytes], *, like: str) -> tuple[int, str]:
    """`checksum` of an open file."""
    size = os.fstat(file.fileno()).st_size
    if ":" not in like:
        return size, legacy_page_sum(file)
    digest = Checksum()
    if size:  # an empty file cannot be mapped; reading instead of mapping takes 1.7 times as long
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for start in range(0, size, HASHED_BYTES):
                digest.update(memoryview(content)[start : start + HASHED_BYTES])
                content.madvise(mmap.MADV_DONTNEED, start, min(HASHED_BYTES, size - start))  # else counted as memory
    return size, digest.value()


def legacy_page_sum(file: IO[bytes]) -> str:
    """Return the SHA-256 over a file's size and the sum of each 4 KiB page's 64-bit words.

    Only for checksums that are on disk already: a sum misses swapped words.
    """
    digest = hashlib.sha256(os.fstat(file.fileno()).st_size.to_bytes(8, "little"))
    while block := file.read(1024 * 4096):
        pages = len(block) // 4096
        words = np.frombuffer(block, "<u8", count=pages * 512).reshape(pages, 512)
        digest.update(words.sum(1, dtype=np.uint64).tobytes())
        digest.update(block[pages * 4096 :])
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------
# Folders that other users may write to


def is_trusted(found: os.stat_result, folder: Path) -> bool:
    """Whether a file in `folder` belongs to this user, to root, or to the folder's owner in a place of his own."""
    if found.st_uid in (os.geteuid(), 0):
        return True
    others_can_write = stat.S_IWGRP | stat.S_IWOTH  # they could have made `folder` themselves
    if folder.stat().st_uid == found.st_uid and not folder.resolve().parent.stat().st_mode & others_can_write:
        return True
    with suppress(OSError), tempfile.TemporaryFile(dir=folder) as probe:
        return os.fstat(probe.fileno()).st_uid == found.st_uid  # a store that gives all files one owner
    return False


@contextmanager
def name_file(path: Path | str) -> Iterator[None]:
    """Put the file's name into an OSError without one, as of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def open_new(path: Path) -> BinaryIO:
    """Create a file and open it for writing; what had the name before is removed, and a planted link not followed."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def open_regular(path: Path, mode: str = "rb", *, permissions: int = 0o666, buffering: int = -1) -> IO[Any]:
    """Open a regular file, never a link, a FIFO or a device.

    Args:
        mode: "rb"; or "ab" or "ab+", which make a missing file, and else open only one that `is_trusted` and has one
            name.
        buffering: as Python's `open`.
        permissions: of a new file, before the umask.

    Raises:
        OSError: the file is missing, or is none of these.
    """

    def open_it(name: str, flags: int) -> int:
        try:
            return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, permissions)  # a FIFO would wait
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OSError(errno.ELOOP, "is a link, which is not followed", name) from error
            raise

    file = open(path, mode, buffering, opener=open_it)  # noqa: SIM115 - the caller closes it
    found, problem = os.fstat(file.fileno()), ""
    if not stat.S_ISREG(found.st_mode):
        problem = "is no regular file"
    elif mode != "rb" and found.st_nlink > 1:
        problem = "has a second name, a hard link"
    elif mode != "rb" and not is_trusted(found, path.parent):
        problem = f"belongs to another user (uid {found.st_uid})"
    if problem:
        file.close()
        raise OSError(errno.EPERM, problem, str(path))
    return file


def read_text(path: Path) -> str:
    """UTF-8 text of a regular file, opened as `open_regular`. Raises OSError; ValueError: not UTF-8."""
    with open_regular(path) as file:
        return file.read().decode("utf-8")


def parse_json(text: str | bytes) -> Any:
    """`json.loads` with one error for whatever is not JSON. Raises ValueError."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


# ---------------------------------------------------------------------------------------------------
# Writes that survive a loss of power


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, content: str | bytes | Iterable[bytes]) -> None:
    """Write a new file, text as UTF-8, and flush it to the disk; opened as `open_new`."""
    if isinstance(content, str | bytes):
        content = [content.encode() if isinstance(content, str) else content]
    with name_file(path), open_new(path) as out:
        out.writelines(content)
        out.flush()
        os.fsync(out.fileno())


def replace_synced(path: Path, content: str | bytes | Iterable[bytes]) -> None:
    """Replace a file by one rename: a reader sees the old content or the new."""
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")  # ranks on several hosts may have the same pid
    try:
        write_synced(scratch, content)
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        error.filename = error.filename or str(path)  # a write names no file
        raise
    sync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder that gets the name `path` at the end, by one rename, when its files are on the disk.

    After an error nothing is left; after a kill a hidden folder beside `path`.

    Raises:
        UserError: `path` exists and is no empty folder.
    """
    path = Path(os.path.abspath(path))
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise UserError(f"--output {path}: exists already; choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    scratch.mkdir()
    try:
        with name_file(path):
            yield scratch
        for written in (*scratch.rglob("*"), scratch):
            sync(written)
        os.rename(scratch, path)
        sync(path.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------
# Locks


def acquire_lock(path: Path, timeout: float) -> FileLock | None:
    """Lock a file until `release()` or the end of this process; no link is followed.

    The file is this user's alone; in a folder that a group may write to, the group's.

    Args:
        timeout: seconds to wait for another holder; -1: without limit.

    Returns:
        None where the file cannot be opened or the file system has no locks: the lock has no effect there.

    Raises:
        TimeoutError: another holder kept the lock.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A soft lock would outlive a kill; whoever may read the file could hold the lock.
        mode = 0o600 | 0o060 * bool(path.parent.stat().st_mode & stat.S_IWGRP)
        lock = FileLock(path, timeout=timeout, poll_interval=0.1, fallback_to_soft=False, mode=mode)
        lock.acquire()
    except Timeout:
        raise
    except OSError:
        return None
    return lock


# ---------------------------------------------------------------------------------------------------
# A cache of folders


class CacheNotWritable(UserError):
    """A missing cache entry cannot be written."""


@contextmanager
def cache_entry(folder: Path) -> Iterator[None]:
    """Turn an error while a cache entry is opened into a refusal.

    Raises:
        UserError: the entry is broken; remove its folder.
    """
    try:
        yield
    except (OSError, ValueError, EOFError) as error:
        why = " ".join(str(error).split())
        raise UserError(
            f"--data-cache-path: {folder} is broken ({why}); remove that folder, and it is built anew"
        ) from error


@contextmanager
def _builder_lock(path: Path) -> Iterator[None]:
    """Let one process at a time build `path`; others wait without limit for as long as the builder lives."""
    file = path.with_name(f".{path.name}.lock")
    lock = acquire_lock(file, -1)
    with nullcontext() if lock else _lease(path.with_name(f".{path.name}.lease")):
        try:
            yield
        finally:
            with suppress(OSError):
                file.unlink()  # while locked: a waiter that has the removed file open opens the next one
            if lock is not None:
                lock.release()


@contextmanager
def _lease(folder: Path) -> Iterator[None]:
    """A lock where the file system has none: an empty folder whose time its holder renews, else it is taken over."""
    seen, since = 0, time.monotonic()
    while True:
        try:
            folder.mkdir()
            break
        except FileExistsError:
            with suppress(FileNotFoundError):  # released since
                renewed = folder.stat().st_mtime_ns
                if renewed != seen:
                    seen, since = renewed, time.monotonic()
                elif time.monotonic() - since > LEASE_SECONDS:  # by this clock: those of hosts differ
                    folder.rmdir()
            time.sleep(min(1.0, LEASE_SECONDS / 10))
    released = threading.Event()

    def renew() -> None:
        while not released.wait(LEASE_SECONDS / 10):
            with suppress(OSError):
                os.utime(folder)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        released.set()
        thread.join()
        with suppress(OSError):
            folder.rmdir()


def _remove_abandoned(folder: Path) -> None:
    """Remove the unfinished folders of builders that were killed."""
    for left in folder.glob(".*.*"):
        with suppress(OSError):  # another builder may remove the same folder
            newest = max(p.stat().st_mtime for p in (left, *left.iterdir()))
            if time.time() - newest > ABANDONED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _is_built(path: Path) -> bool:
    """Whether a cache entry is there. Raises UserError: it belongs to another user."""
    if not path.is_dir():
        return False
    found = path.lstat()
    if not is_trusted(found, path.parent):
        raise UserError(
            f"--data-cache-path: {path} belongs to another user (uid {found.st_uid}), not to you or root; "
            "give a cache folder of your own"
        )
    return True


def build_once(path: Path, build: Callable[[Path], None]) -> Path:
    """Return the folder `path`, made by `build(empty folder)` where it does not exist.

    The folder is built under another name and renamed, so no reader sees an unfinished one, even after a loss of power.
    Other processes, of this job or another, wait for the first one's folder and use it.

    Raises:
        CacheNotWritable: the folder is missing and cannot be made there.
        UserError: the folder belongs to another user, who may have put anything into it.
    """
    if _is_built(path):
        return path
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_builder_lock(path))
            if _is_built(path):
                return path
            _remove_abandoned(path.parent)
            scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
            scratch.mkdir()
        except OSError as error:
            text = f"--data-cache-path: {path} is not there yet and cannot be made ({error.strerror})"
            raise CacheNotWritable(f"{text}; fill the cache once where it can be written") from error
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        with name_file(path):
            build(scratch)
        for file in (*scratch.iterdir(), scratch):
            sync(file)
        try:
            os.rename(scratch, path)
        except OSError:
            if not _is_built(path):  # without a lock another builder may be first
                raise
        sync(path.parent)
    return path
