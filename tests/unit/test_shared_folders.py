"""Folders that other users may write to: planted links, another user's files, and the umask."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data.indexed_dataset import write_indexed_dataset
from data.prepare import main
from tests.unit.test_prepare import BYTE, lines_of
from utils.errors import UserError
from utils.files import acquire_lock, build_once, is_trusted, open_new, open_regular, replace_synced, write_synced

SECRET = b"ssh-ed25519 AAAA me@home\n"
OTHER_UID = 12345
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A user's file outside the shared folder."""
    file = tmp_path / "authorized_keys"
    file.write_bytes(SECRET)
    return file


@pytest.fixture(params=["022", "077", "002"])
def umask(request) -> Iterator[int]:
    wanted = int(request.param, 8)
    before = os.umask(wanted)
    yield wanted
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("plant", [Path.symlink_to, Path.hardlink_to])
@pytest.mark.parametrize("write", [write_synced, replace_synced])
def test_a_planted_link_is_replaced_not_followed(tmp_path: Path, victim: Path, plant, write) -> None:
    plant(tmp_path / "file", victim)
    write(tmp_path / "file", "new")
    assert victim.read_bytes() == SECRET
    assert (tmp_path / "file").read_text() == "new" and not (tmp_path / "file").is_symlink()


def test_a_new_file_may_not_be_there_twice(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with open_new(tmp_path / "file") as out:
        out.write(b"n")
    assert (tmp_path / "file").read_bytes() == b"n"


@pytest.mark.parametrize("mode", ["rb", "ab"])
def test_only_regular_files_are_opened(tmp_path: Path, victim: Path, mode: str) -> None:
    (tmp_path / "link").symlink_to(victim)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("link", "dangling", "fifo"):
        with pytest.raises(OSError, match=r"link|regular|such device"):
            open_regular(tmp_path / name, mode)
    assert victim.read_bytes() == SECRET and not (tmp_path / "nothing").exists()
    with open_regular(victim, mode) as file:
        assert file.fileno() > 2


def test_files_with_two_names_are_not_appended_to(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "tokens").hardlink_to(victim)
    with pytest.raises(OSError, match="second name") as caught:
        open_regular(tmp_path / "tokens", "ab")
    assert caught.value.errno == errno.EPERM and caught.value.filename == str(tmp_path / "tokens")


@needs_root
def test_another_users_file_is_not_appended_to(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_bytes(b"")
    os.chown(tmp_path / "tokens", OTHER_UID, -1)
    with pytest.raises(OSError, match=f"another user .uid {OTHER_UID}"):
        open_regular(tmp_path / "tokens", "ab")


@needs_root
@pytest.mark.parametrize(
    ("file_uid", "parent_mode", "is_ours"),
    [(OTHER_UID, 0o755, True), (OTHER_UID, 0o775, False), (OTHER_UID, 0o777, False), (OTHER_UID + 1, 0o755, False)],
)
def test_the_folders_owner_is_trusted_in_a_place_of_his_own(
    tmp_path: Path, file_uid: int, parent_mode: int, is_ours: bool
) -> None:
    """A colleague's corpus may be read; a folder that anyone could have made is no proof."""
    folder = tmp_path / "home" / "corpus"
    folder.mkdir(parents=True)
    (folder / "file").touch()
    os.chown(folder, OTHER_UID, -1)
    os.chown(folder / "file", file_uid, -1)
    folder.parent.chmod(parent_mode)
    assert is_trusted((folder / "file").stat(), folder) is is_ours


# ---------------------------------------------------------------------------------------------------
# Locks


def test_a_lock_is_its_users_alone(tmp_path: Path, umask: int) -> None:
    lock = acquire_lock(tmp_path / "lock", 1)
    assert lock is not None and mode_of(tmp_path / "lock") == 0o600
    lock.release()


def test_a_groups_lock_is_the_groups(tmp_path: Path, umask: int) -> None:
    """Whoever may write to the folder must be able to wait for the lock."""
    tmp_path.chmod(0o770)
    lock = acquire_lock(tmp_path / "lock", 1)
    assert lock is not None and mode_of(tmp_path / "lock") == 0o660
    lock.release()


def test_a_lock_does_not_follow_a_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "lock").symlink_to(victim)
    lock = acquire_lock(tmp_path / "lock", 1)
    assert lock is None and victim.read_bytes() == SECRET


# ---------------------------------------------------------------------------------------------------
# The cache


def fill(folder: Path) -> None:
    np.save(folder / "a.npy", np.arange(3))


def test_cache_entries_follow_the_umask(tmp_path: Path, umask: int) -> None:
    folder = build_once(tmp_path / "cache" / "tokens" / "key", fill)
    assert [mode_of(at) for at in (folder, folder.parent, folder / "a.npy")] == [
        0o777 & ~umask,
        0o777 & ~umask,
        0o666 & ~umask,
    ]


@needs_root
def test_another_users_cache_entry_is_refused(tmp_path: Path) -> None:
    folder = build_once(tmp_path / "tokens" / "key", fill)
    os.chown(folder, OTHER_UID, -1)
    with pytest.raises(UserError, match=rf"{folder} belongs to another user .uid {OTHER_UID}"):
        build_once(folder, fill)


@needs_root
def test_a_planted_link_to_ones_own_folder_is_no_entry(tmp_path: Path) -> None:
    folder = build_once(tmp_path / "tokens" / "key", fill)
    (tmp_path / "tokens" / "other").symlink_to(folder)
    os.chown(tmp_path / "tokens" / "other", OTHER_UID, -1, follow_symlinks=False)
    with pytest.raises(UserError, match="belongs to another user"):
        build_once(tmp_path / "tokens" / "other", fill)


# ---------------------------------------------------------------------------------------------------
# data.prepare


def prepare(folder: Path, capsys) -> str:
    """What data.prepare says on stderr; the prefix is `folder/c`."""
    (folder / "a.jsonl").write_bytes(lines_of(["one", "two"]))
    main(["--input", str(folder / "a.jsonl"), "--output-prefix", str(folder / "c"), *BYTE, "--workers", "0"])
    return capsys.readouterr().err


@pytest.mark.parametrize("name", ["lock", "tokens", "lengths"])
@pytest.mark.parametrize("plant", [Path.symlink_to, Path.hardlink_to])
def test_links_in_an_unfinished_corpus_are_not_followed(tmp_path: Path, victim: Path, capsys, name, plant) -> None:
    (tmp_path / "c.part").mkdir()
    plant(tmp_path / "c.part" / name, victim)
    said = prepare(tmp_path, capsys)
    assert victim.read_bytes() == SECRET
    assert name != "lock" or "link" in said  # tokens and lengths that no progress names are removed first


def test_an_unfinished_folder_that_is_a_link_is_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "tokens").write_bytes(SECRET)
    (tmp_path / "c.part").symlink_to(tmp_path / "mine")
    assert "is a link or another user's" in prepare(tmp_path, capsys)
    assert (tmp_path / "mine" / "tokens").read_bytes() == SECRET


@needs_root
def test_another_users_unfinished_folder_is_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "c.part").mkdir()
    os.chown(tmp_path / "c.part", OTHER_UID, -1)
    assert "another user's" in prepare(tmp_path, capsys)


def test_corpora_follow_the_umask(tmp_path: Path, capsys, umask: int) -> None:
    prepare(tmp_path, capsys)
    assert {mode_of(tmp_path / f"c.{kind}") for kind in ("bin", "idx", "json")} == {0o666 & ~umask}


def test_a_new_model_does_not_follow_a_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of([f"word{n} and text {n}" for n in range(200)]))
    (tmp_path / "m.model.part").symlink_to(victim)
    flags = ["--input", tmp_path / "a.jsonl", "--output", tmp_path / "m.model", "--vocab-size", "300"]
    assert main(["train-tokenizer", *map(str, flags)]) == 0
    assert victim.read_bytes() == SECRET


def test_token_files_do_not_follow_a_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "t.bin").symlink_to(victim)
    write_indexed_dataset(tmp_path / "t", [np.arange(3)], vocab_size=10)
    assert victim.read_bytes() == SECRET
