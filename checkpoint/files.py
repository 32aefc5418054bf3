"""Checkpoints as files: which are there, their checksums, how one appears and how old ones go. No torch.

    <save>/latest                 the name of the newest, for people and scripts
    <save>/step_0000200/          .metadata, __<rank>_<n>.distcp   (torch.distributed.checkpoint)
                        run.json         the run's facts and the step
                        checksums.json   of every other file

A checkpoint is written as `.step_0000200.part` and renamed when every rank has written, synced and checked its files: a
folder called step_* was whole when it got that name. What is wrong with one later is therefore damage, and refused.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from utils.errors import UserError
from utils.files import checksum, sync, write_synced

RUN_FILE = "run.json"
SUMS_FILE = "checksums.json"
LATEST_FILE = "latest"
STEP_FOLDER = re.compile(r"step_(\d{7,})")
OLD_FOLDER = re.compile(r"\.(step_\d{7,})\.old")
LEFT_OVER = re.compile(r"\.step_\d{7,}\.(part|gone)")


class DamagedCheckpoint(UserError):
    """A checkpoint's files are missing or not as they were written. An older one may serve."""


def step_folder(save: Path, step: int) -> Path:
    return save / f"step_{step:07d}"


def scratch_folder(save: Path, step: int) -> Path:
    """Where a checkpoint is written before it is whole."""
    return save / f".step_{step:07d}.part"


def step_of(checkpoint: Path) -> int:
    """The step in the name of a folder that `checkpoints` lists."""
    return int(re.sub(r"\D", "", checkpoint.name))


def checkpoints(save: Path) -> list[Path]:
    """The checkpoints under `save`, oldest first; a step that was being replaced when its writer died is its old one."""
    if not save.is_dir():
        return []
    names = {p.name for p in save.iterdir()}
    found = [name for name in names if STEP_FOLDER.fullmatch(name)]
    found += [name for name in names if (old := OLD_FOLDER.fullmatch(name)) and old[1] not in names]
    return sorted((save / name for name in found), key=step_of)


def find_checkpoint(load: Path) -> Path:
    """The checkpoint that `--load` means: that folder itself, or the newest one under it.

    Raises:
        ValueError: neither is there.
    """
    if (load / RUN_FILE).is_file() or STEP_FOLDER.fullmatch(load.name):
        if not load.is_dir():
            raise UserError(f"--load {load}: no such folder")
        return load
    found = checkpoints(load)
    if not found:
        raise UserError(f"--load {load}: no checkpoint there (neither {RUN_FILE} nor a step_* folder)")
    return found[-1]


def older_than(checkpoint: Path) -> list[Path]:
    """The checkpoints beside this one with fewer steps, newest first."""
    return [p for p in reversed(checkpoints(checkpoint.parent)) if step_of(p) < step_of(checkpoint)]


def read_json(path: Path) -> Any:
    """A JSON file of a checkpoint.

    Raises:
        DamagedCheckpoint: missing or not JSON, naming the file.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise DamagedCheckpoint(f"{path}: damaged, not JSON any more") from error


def read_run_facts(checkpoint: Path) -> dict[str, Any]:
    """What the run wrote about itself, with `step`.

    Raises:
        DamagedCheckpoint: `run.json` is missing or damaged.
    """
    facts = read_json(checkpoint / RUN_FILE)
    if not isinstance(facts, dict) or type(facts.get("step")) is not int or facts["step"] < 0:
        raise DamagedCheckpoint(f"{checkpoint / RUN_FILE}: damaged, says no step")
    return facts


# ---------------------------------------------------------------------------------------------------
# Checksums


def checksums(paths: Iterable[Path]) -> dict[str, list]:
    """{file name: [bytes, checksum]}."""
    return {path.name: list(checksum(path)) for path in paths}


def read_checksums(checkpoint: Path) -> dict[str, list]:
    """{file name: [bytes, checksum]} of every file of a checkpoint.

    Raises:
        DamagedCheckpoint: `checksums.json` is missing or damaged.
    """
    sums = read_json(checkpoint / SUMS_FILE)
    if (
        not isinstance(sums, dict)
        or RUN_FILE not in sums
        or not all(isinstance(v, list) and len(v) == 2 for v in sums.values())
    ):
        raise DamagedCheckpoint(f"{checkpoint / SUMS_FILE}: damaged")
    outside = [name for name in sums if name in ("", ".", "..") or "/" in name or "\0" in name]
    if outside:
        raise DamagedCheckpoint(f"{checkpoint / SUMS_FILE}: names {outside[0]!r}, which is no file of this folder")
    return sums


def damage(checkpoint: Path, names: Iterable[str], sums: dict[str, list]) -> list[str]:
    """One line for each of the named files that is not as it was written."""
    found = []
    for name in names:
        path = checkpoint / name
        size, wanted = sums[name]
        try:
            got_size, got = checksum(path)
        except OSError as error:
            found.append(f"{path}: {error.strerror or error}")
            continue
        if got_size != size:
            found.append(f"{path}: {got_size} bytes, written were {size}")
        elif got != wanted:
            found.append(f"{path}: damaged, its checksum differs from the one in {SUMS_FILE}")
    return found


def unlisted(checkpoint: Path, sums: dict[str, list]) -> list[str]:
    """One line for each file in the folder that has no checksum."""
    return [
        f"{checkpoint / name}: {SUMS_FILE} does not list it"
        for name in _names(checkpoint)
        if name not in {*sums, SUMS_FILE}
    ]


def _names(folder: Path) -> list[str]:
    """Its files, but for what NFS leaves of removed ones that are still open."""
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith(".nfs"))


# ---------------------------------------------------------------------------------------------------
# Coming and going

PATIENCE = 30.0  # seconds that a run's processes may take to go after it ended


def hold(save: Path) -> IO[str] | None:
    """The right to write checkpoints there, as long as what is returned is open: two runs would remove each other's half written ones.

    Returns:
        None where the file system knows no locks, or the folder beside `save` cannot be written in.

    Raises:
        ValueError: another process has it.
    """
    place = save.with_name(f".{save.name}.lock")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        file = place.open("a")
    except OSError:
        return None
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError as error:
            if time.monotonic() > until:
                file.close()
                raise UserError(
                    f"--save {save}: another run is writing checkpoints there; end it, or choose another --run-dir"
                ) from error
            time.sleep(0.2)
        except OSError:
            file.close()
            return None


def clear_left_overs(save: Path) -> None:
    """Remove what writers that died left half written or half removed."""
    for path in save.iterdir():
        old = OLD_FOLDER.fullmatch(path.name)
        if LEFT_OVER.fullmatch(path.name) or (old and (save / old[1]).exists()):
            with suppress(OSError):  # what is in the way of the next checkpoint is told when that is made
                _remove(path)


def _remove(path: Path) -> None:
    """A folder with all that is in it, or a file of such a name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def publish(scratch: Path, place: Path, *, facts: dict[str, Any], sums: dict[str, list]) -> None:
    """Turn a folder that every rank has written into the checkpoint `place`, by one rename.

    Args:
        facts: for run.json.
        sums: of every file in it, from the ranks that wrote them.
    """
    for name, (size, _) in sums.items():
        there = (scratch / name).stat().st_size
        if there != size:
            raise OSError(
                f"{scratch / name}: {there} bytes on rank 0, its writer saw {size}; is the folder shared by all nodes?"
            )
    unknown = [name for name in _names(scratch) if name not in sums]
    if unknown:
        raise OSError(f"{scratch / unknown[0]}: no rank says that it wrote this file")
    write_synced(scratch / RUN_FILE, json.dumps(facts, indent=1))
    write_synced(scratch / SUMS_FILE, json.dumps(sums | checksums([scratch / RUN_FILE]), indent=1))
    sync(scratch)
    old = place.with_name(f".{place.name}.old")
    if place.exists():  # the same step saved before, by a run that went on from an earlier one
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)  # which `checkpoints` lists until the new one has its name
    scratch.rename(place)
    sync(place.parent)
    shutil.rmtree(old, ignore_errors=True)
    latest = place.with_name(LATEST_FILE)
    beside = place.with_name(f".{LATEST_FILE}.part")
    write_synced(beside, place.name + "\n")
    beside.replace(latest)
    sync(place.parent)


def prune(save: Path, keep: int, newest: Path, complain: Callable[[str], object] = print) -> list[str]:
    """Remove all but the `keep` newest checkpoints, and never `newest`, which was just written. 0 keeps all.

    Args:
        complain: called with a line for each that cannot be removed, as one that somebody reads; the new one is whole all the same.

    Returns:
        The names of those that went.
    """
    gone = []
    for path in checkpoints(save)[:-keep] if keep else []:
        if path != newest:
            doomed = path.with_name(f".{path.name.strip('.').removesuffix('.old')}.gone")
            try:
                path.rename(doomed)  # a half removed one must not look whole
                _remove(doomed)
                gone.append(path.name)
            except OSError as error:
                complain(f"could not remove the old checkpoint {path}: {error.strerror or error}")
    return gone


def set_aside(checkpoint: Path) -> Path:
    """Give a damaged checkpoint a name under which no run finds it: as the newest it would be taken for one, and kept for one."""
    place = checkpoint.with_name(f"{checkpoint.name.strip('.')}.damaged")
    _remove(place)
    return checkpoint.rename(place)
