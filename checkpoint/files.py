"""The files of checkpoints: list, verify, publish and remove them. Imports no torch.

    <save>/latest                    name of the newest checkpoint, for people and scripts
    <save>/step_0000200/             .metadata, __<rank>_<n>.distcp   (torch.distributed.checkpoint)
                        run.json         metadata of the run, with the step
                        checksums.json   size and checksum of every other file

Ranks write into `.step_0000200.part`. When every rank has written, synced and verified its files, one rename publishes
the checkpoint. A folder named step_* was complete when it got that name; a later fault in one is corruption and is
refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from utils.errors import UserError
from utils.files import (
    FileLock,
    acquire_lock,
    checksum,
    checksum_file,
    open_regular,
    parse_json,
    read_text,
    replace_synced,
    sync,
    write_synced,
)

RUN_FILE = "run.json"
INDEX_FILE = ".metadata"
CONFIG_FILE = "config.json"  # of a run: in its folder, and in --save where that is elsewhere
SUMS_FILE = "checksums.json"
LATEST_FILE = "latest"
STEP_FOLDER = re.compile(r"step_([0-9]{7}|[1-9][0-9]{7,11})")
REPLACED_FOLDER = re.compile(rf"\.({STEP_FOLDER.pattern})\.old")
PARTIAL = re.compile(rf"\.{STEP_FOLDER.pattern}\.(part|gone)|\.latest\.[^/]+")
NAMED_STEP = re.compile(r"\.?step_([0-9]+)(\.old)?")  # a name that promises a step, also in other digits than ours
HUGGING_FACE_FILES = ("*.safetensors", "pytorch_model*.bin")  # weights, beside a config.json
MAX_STEP = 10**12 - 1
LOCK_SECONDS = 30.0  # the processes of a run that ended may take so long to exit

Checksums = dict[str, list]  # {file name: [bytes, checksum]}
OpenedFile = tuple[str, str, tuple[int, int], tuple[int, int]]  # name, host, (inode, ctime), (bytes, mtime)


class CorruptedCheckpoint(UserError):
    """A file of a checkpoint is missing or differs from what was written. An older checkpoint may load."""


def step_folder(save: Path, step: int) -> Path:
    """The folder of a published checkpoint."""
    return save / f"step_{step:07d}"


def scratch_folder(save: Path, step: int) -> Path:
    """The folder in which ranks write a checkpoint before it is published."""
    return save / f".step_{step:07d}.part"


def parse_step(checkpoint: Path) -> int:
    """Return the step in the name of a folder that `list_checkpoints` returns."""
    return int(re.sub(r"\D", "", checkpoint.name))


def list_checkpoints(save: Path) -> list[Path]:
    """Return the checkpoints in `save`, oldest first.

    A writer that died while it replaced a step leaves the step's old folder; that folder counts.
    """
    if not save.is_dir():
        return []
    names = {p.name for p in save.iterdir()}
    found = [name for name in names if STEP_FOLDER.fullmatch(name)]
    found += [name for name in names if (old := REPLACED_FOLDER.fullmatch(name)) and old[1] not in names]
    return sorted((save / name for name in found), key=parse_step)


def list_older(checkpoint: Path) -> list[Path]:
    """Return the checkpoints beside this one with fewer steps, newest first."""
    beside = list_checkpoints(checkpoint.parent)
    return [p for p in reversed(beside) if parse_step(p) < parse_step(checkpoint)]


def find_checkpoint(load: Path) -> Path:
    """Return the checkpoint that `--load` names: the folder itself, or the newest in it or of a run in that folder.

    Raises:
        UserError: there is no checkpoint.
    """
    if (load / RUN_FILE).is_file() or STEP_FOLDER.fullmatch(load.name):
        if not load.is_dir():
            raise UserError(f"--load {load}: no such folder")
        return load
    found = list_checkpoints(load) or list_checkpoints(load / "checkpoints") or list_checkpoints(recorded_save(load))
    folder = load.parent if load.is_file() else load
    if not found and (folder / "config.json").is_file() and any(any(folder.glob(n)) for n in HUGGING_FACE_FILES):
        raise UserError(
            f"--load {load}: a Hugging Face model; python tools/convert_hf.py import --input {folder} --output RUN "
            "makes a checkpoint of it"
        )
    if len(load.parts) == 2 and not load.parent.exists():
        raise UserError(
            f"--load {load}: no such folder; download a model of the Hugging Face hub, then python "
            "tools/convert_hf.py import --input FOLDER --output RUN"
        )
    if not found:
        raise UserError(f"--load {load}: no checkpoint there (neither {RUN_FILE} nor a step_* folder)")
    return found[-1]


def recorded_save(run_dir: Path) -> Path:
    """The folder of a run's checkpoints, by its config.json; without one a folder that does not exist."""
    try:
        save = parse_json(read_text(run_dir / CONFIG_FILE))["checkpoints"]
    except (OSError, ValueError, KeyError, TypeError):  # no run's
        save = None
    return Path(save) if isinstance(save, str) else run_dir / "checkpoints"


def find_config(checkpoint: Path) -> Path:
    """The run's config.json, in --save or in the run's folder."""
    found = checkpoint.parent / CONFIG_FILE
    return found if found.is_file() else checkpoint.parent.parent / CONFIG_FILE


def find_run_checkpoints(folder: Path) -> list[Path]:
    """Return `folder`, where it is a checkpoint, or the checkpoints in it or of a run in that folder, oldest first.

    Raises:
        UserError: there is no checkpoint.
    """
    newest = find_checkpoint(folder)
    return [newest] if newest == folder else list_checkpoints(newest.parent)


def find_run_checkpoint(folder: Path) -> Path:
    """Return the newest of `find_run_checkpoints`."""
    return find_run_checkpoints(folder)[-1]


# ---------------------------------------------------------------------------------------------------
# Reading and verifying


@contextmanager
def open_file(path: Path, opened: set[OpenedFile] | None = None) -> Iterator[IO[bytes]]:
    """Open a file of a checkpoint, never a link out of its folder.

    Args:
        opened: gets which file was open, as `find_replaced` compares them, at its opening and its end.

    Raises:
        OSError: the file is missing or no regular file.
    """
    with open_regular(path) as file:

        def note() -> None:
            found = os.fstat(file.fileno())
            marks = (found.st_ino, found.st_ctime_ns), (found.st_size, found.st_mtime_ns)
            if opened is not None:
                opened.add((path.name, platform.node(), *marks))

        note()
        yield file
        note()


def find_replaced(opened: Iterable[OpenedFile]) -> list[str]:
    """Return the names under which different files were opened: what was verified may not be what was loaded.

    Hosts may number the files of one store differently: inodes and their times are compared within a host.
    """
    seen = {mark for name, host, own, content in opened for mark in ((name, host, own), (name, "", content))}
    counts = Counter((name, host) for name, host, _ in seen)
    return sorted({name for (name, _), count in counts.items() if count > 1})


def read_json(path: Path, opened: set[OpenedFile] | None = None) -> Any:
    """Return the content of a checkpoint's JSON file; `opened` as of `open_file`.

    Raises:
        CorruptedCheckpoint: the file is missing or not JSON.
    """
    try:
        with open_file(path, opened) as file:
            return parse_json(file.read())
    except OSError as error:
        raise CorruptedCheckpoint(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CorruptedCheckpoint(f"{path}: corrupted, not JSON any more") from error


def read_run_metadata(checkpoint: Path, opened: set[OpenedFile] | None = None) -> dict[str, Any]:
    """Return the metadata that the run saved with its checkpoint, among them `step`; `opened` as of `open_file`.

    Raises:
        CorruptedCheckpoint: `run.json` is missing, or its step is not valid or not that of the folder's name.
    """
    path = checkpoint / RUN_FILE
    metadata = read_json(path, opened)
    step = metadata.get("step") if isinstance(metadata, dict) else None
    if type(step) is not int or not 0 <= step <= MAX_STEP:
        raise CorruptedCheckpoint(f"{path}: corrupted, has no valid step")
    if (named := NAMED_STEP.fullmatch(checkpoint.name)) and named[1].lstrip("0") != str(step).lstrip("0"):
        raise CorruptedCheckpoint(f"{path}: corrupted, its step {step} is not the folder's, {checkpoint.name}")
    return metadata


def compute_checksums(paths: Iterable[Path]) -> Checksums:
    """Return size and checksum of each file, by name."""
    return {path.name: list(checksum(path)) for path in paths}


def read_checksums(checkpoint: Path, opened: set[OpenedFile] | None = None) -> Checksums:
    """Return size and checksum of every file of a checkpoint, as written; `opened` as of `open_file`.

    Raises:
        CorruptedCheckpoint: `checksums.json` is missing or corrupted, or names a file outside the folder.
    """
    path = checkpoint / SUMS_FILE
    sums = read_json(path, opened)
    if not isinstance(sums, dict) or RUN_FILE not in sums:
        raise CorruptedCheckpoint(f"{path}: corrupted, does not list {RUN_FILE}")
    for name, value in sums.items():
        if not isinstance(value, list) or [type(x) for x in value] != [int, str]:
            raise CorruptedCheckpoint(f"{path}: corrupted, has no size and checksum of {name!r}")
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise CorruptedCheckpoint(f"{path}: names {name!r}, which is no file of this folder")
    return sums


def find_corrupted(
    checkpoint: Path, names: Iterable[str], sums: Checksums, opened: set[OpenedFile] | None = None
) -> list[str]:
    """Return an error line for each named file that is missing or differs from its checksum.

    Args:
        opened: as of `open_file`.
    """
    errors = []
    for name in names:
        path = checkpoint / name
        try:
            with open_file(path, opened) as file:
                difference = describe_difference(*checksum_file(file, like=sums[name][1]), sums[name])
        except OSError as error:
            difference = error.strerror or str(error)
        errors += [f"{path}: {difference}"] if difference else []
    return errors


def describe_difference(size: int, found: str, wanted: Sequence[Any]) -> str:
    """Return how a file differs from its entry in `checksums.json`, or "".

    Args:
        size, found: bytes and checksum of the file.
    """
    if size != wanted[0]:
        return f"{size} bytes, written were {wanted[0]}"
    return "" if found == wanted[1] else f"corrupted, its checksum differs from the one in {SUMS_FILE}"


def find_unlisted(checkpoint: Path, sums: Checksums) -> list[str]:
    """Return an error line for each file of the folder that has no checksum."""
    listed = {*sums, SUMS_FILE}
    return [
        f"{checkpoint / name}: {SUMS_FILE} does not list it" for name in _list_names(checkpoint) if name not in listed
    ]


def _list_names(folder: Path) -> list[str]:
    """Return a folder's file names, without NFS's placeholders of removed files that are still open."""
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith(".nfs"))


# ---------------------------------------------------------------------------------------------------
# Writing and removing


def lock_dir(save: Path) -> FileLock | None:
    """Lock a folder of checkpoints, until `release()` or the end of this process. Two writers would remove each other's
    files.

    Returns:
        None where the lock has no effect: no locks on this file system, or the folder above cannot be written.

    Raises:
        UserError: another run holds the lock for more than `LOCK_SECONDS`, or another user made the lock's file.
    """
    path = save.with_name(f".{save.name}.lock")
    try:
        lock = acquire_lock(path, LOCK_SECONDS)
    except TimeoutError as error:
        raise UserError(
            f"--save {save}: another run is writing checkpoints there; end it, or choose another --run-dir"
        ) from error
    if lock is None and os.path.lexists(path) and (path.is_symlink() or not os.access(path, os.W_OK)):
        raise UserError(
            f"--save {save}: its lock {path} is another user's, or a link; if no run writes there, remove that file"
        )
    return lock


@contextmanager
def keep_during(checkpoint: Path) -> Iterator[None]:
    """Keep `prune`, of any process, from removing a checkpoint meanwhile, where the file system has locks."""
    with ExitStack() as stack:
        with suppress(OSError):  # whoever reads the checkpoint tells
            file = stack.enter_context(open_regular(checkpoint / RUN_FILE))
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


def _is_kept(checkpoint: Path) -> bool:
    """Whether a process is inside `keep_during`."""
    try:
        with (checkpoint / RUN_FILE).open("rb+") as file:  # NFS locks only what may be written
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def remove_partial(save: Path) -> None:
    """Remove the partly written and partly removed files of writers that died."""
    for path in save.iterdir():
        replaced = REPLACED_FOLDER.fullmatch(path.name)
        if PARTIAL.fullmatch(path.name) or (replaced and (save / replaced[1]).exists()):
            with suppress(OSError):  # a file in the way of the next checkpoint is an error there
                _remove(path)


def _remove(path: Path) -> None:
    """Remove a folder with its content, a file, or a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def publish(scratch: Path, checkpoint: Path, *, run_metadata: dict[str, Any], sums: Checksums) -> None:
    """Turn a folder that every rank has written into a checkpoint, by one rename.

    Args:
        run_metadata: for run.json.
        sums: of every file in `scratch`, computed by the ranks that wrote them.

    Raises:
        OSError: a file differs in size from what its writer saw, or no rank wrote it.
    """
    for name, (size, _) in sums.items():
        found = (scratch / name).stat().st_size
        if found != size:
            raise OSError(
                f"{scratch / name}: {found} bytes on rank 0, its writer saw {size}; is the folder shared by all nodes?"
            )
    unknown = [name for name in _list_names(scratch) if name not in sums]
    if unknown:
        raise OSError(f"{scratch / unknown[0]}: no rank says that it wrote this file")
    write_synced(scratch / RUN_FILE, json.dumps(run_metadata, indent=1))
    write_synced(scratch / SUMS_FILE, json.dumps(sums | compute_checksums([scratch / RUN_FILE]), indent=1))
    sync(scratch)
    old = checkpoint.with_name(f".{checkpoint.name}.old")
    if checkpoint.exists():  # a run that resumed from an earlier step saves this step again
        shutil.rmtree(old, ignore_errors=True)
        checkpoint.rename(old)  # `list_checkpoints` returns the old folder until the new one has its name
    scratch.rename(checkpoint)
    sync(checkpoint.parent)
    shutil.rmtree(old, ignore_errors=True)
    replace_synced(checkpoint.with_name(LATEST_FILE), checkpoint.name + "\n")


def prune(
    save: Path, keep: int, newest: Path, log_error: Callable[[str], object] = print, *, keep_every: int = 0
) -> list[Path]:
    """Rename all but the `keep` newest checkpoints for `purge`; 0 keeps all. Return the new paths.

    Args:
        keep_every: checkpoints of its multiples, in steps, stay too; 0: none.
        newest: just written, never removed. A checkpoint that a process loads stays until the next call.
        log_error: called with a line for each checkpoint that cannot be removed, which is no reason to stop.
    """
    doomed = []
    for path in list_checkpoints(save)[:-keep] if keep else []:
        is_multiple = keep_every > 0 and parse_step(path) % keep_every == 0
        if path != newest and not is_multiple and not _is_kept(path):
            try:  # a partly removed checkpoint must not look complete
                doomed.append(path.rename(path.with_name(f".{path.name.strip('.').removesuffix('.old')}.gone")))
            except OSError as error:
                log_error(f"could not remove the old checkpoint {path}: {error.strerror or error}")
    return doomed


def purge(doomed: Iterable[Path], log_error: Callable[[str], object] = print) -> None:
    """Remove what `prune` renamed; `log_error` as there. The next `remove_partial` removes what is left."""
    for path in doomed:
        try:
            _remove(path)
        except OSError as error:
            log_error(f"could not remove the old checkpoint {path}: {error.strerror or error}")


def quarantine(checkpoint: Path) -> Path:
    """Rename a corrupted checkpoint to step_N.damaged, so that no run loads it, counts it or keeps it. Return the new
    path.
    """
    place = checkpoint.with_name(f"{checkpoint.name.strip('.')}.damaged")
    _remove(place)
    return checkpoint.rename(place)
