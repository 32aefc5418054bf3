"""Checkpoints as files: checksums that find every changed byte, folders that appear whole and go one by one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from checkpoint import files as files
from checkpoint.files import DamagedCheckpoint, checkpoints, checksums, damage, find_checkpoint, prune, publish
from utils.files import checksum


def made(save: Path, step: int, content: bytes = b"weights") -> Path:
    """A checkpoint as a run makes it, of one small file."""
    scratch = files.scratch_folder(save, step)
    scratch.mkdir(parents=True)
    (scratch / "__0_0.distcp").write_bytes(content)
    place = files.step_folder(save, step)
    publish(scratch, place, facts={"step": step}, sums=checksums([scratch / "__0_0.distcp"]))
    return place


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 4095, 4096, 4097, 3 * 4096 + 13])
def test_every_changed_byte_changes_the_checksum(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    content = bytearray(os.urandom(size))
    path.write_bytes(content)
    wanted = checksum(path)
    assert wanted[0] == size and checksum(path) == wanted
    for at in {0, size // 2, size - 1, *range(0, size, 97)} if size else set():
        for bit in (1, 128):
            content[at] ^= bit
            path.write_bytes(content)
            assert checksum(path) != wanted, at
            content[at] ^= bit
    path.write_bytes(content + b"\0")
    assert checksum(path) != wanted


def test_lost_and_exchanged_pages_change_the_checksum(tmp_path: Path) -> None:
    """Pages of one repeated number, as a norm's weights are: an exclusive or would not see one become zero."""
    path = tmp_path / "file"
    ones, zeros, other = (bytes([b]) * 4096 for b in (63, 0, 64))
    sums = set()
    for content in (ones + other, other + ones, zeros + other, ones + zeros, ones + ones):
        path.write_bytes(content)
        sums.add(checksum(path))
    assert len(sums) == 5


def test_a_checkpoint_appears_whole_and_latest_names_it(tmp_path: Path) -> None:
    first, second = made(tmp_path, 5), made(tmp_path, 12)
    assert checkpoints(tmp_path) == [first, second] and find_checkpoint(tmp_path) == second
    assert (tmp_path / "latest").read_text() == "step_0000012\n"
    assert files.read_run_facts(second) == {"step": 12}
    assert {p.name for p in second.iterdir()} == {"__0_0.distcp", "run.json", "checksums.json"}
    sums = files.read_checksums(second)
    assert sums.keys() == {"__0_0.distcp", "run.json"} and damage(second, sums, sums) == []


def test_a_step_written_again_replaces_the_old_one(tmp_path: Path) -> None:
    made(tmp_path, 5, b"old")
    place = made(tmp_path, 5, b"new")
    assert (place / "__0_0.distcp").read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_0000005"]


def test_a_writer_that_died_between_two_renames_leaves_the_old_one_to_be_found(tmp_path: Path) -> None:
    place = made(tmp_path, 5)
    older = made(tmp_path, 3)
    place.rename(tmp_path / ".step_0000005.old")
    assert [p.name for p in checkpoints(tmp_path)] == ["step_0000003", ".step_0000005.old"]
    assert find_checkpoint(tmp_path).name == ".step_0000005.old" and files.older_than(find_checkpoint(tmp_path)) == [
        older
    ]
    files.clear_left_overs(tmp_path)
    assert find_checkpoint(tmp_path).name == ".step_0000005.old"
    made(tmp_path, 5)
    (tmp_path / ".step_0000005.old").mkdir()  # and one that died before it removed the old one
    files.clear_left_overs(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_0000003", "step_0000005"]


def test_half_written_and_half_removed_folders_are_no_checkpoints(tmp_path: Path) -> None:
    made(tmp_path, 5)
    for name in (".step_0000006.part", ".step_0000004.gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
    assert [p.name for p in checkpoints(tmp_path)] == ["step_0000005"]
    files.clear_left_overs(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_0000005"]


def test_keep(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        made(tmp_path, step)
    newest = tmp_path / "step_0000010"
    assert prune(tmp_path, 0, newest) == [] and len(checkpoints(tmp_path)) == 4
    assert prune(tmp_path, 2, newest) == ["step_0000001", "step_0000002"]
    assert [p.name for p in checkpoints(tmp_path)] == ["step_0000003", "step_0000010"]
    assert prune(tmp_path, 9, newest) == []
    assert prune(tmp_path, 1, tmp_path / "step_0000003") == []  # what was just written stays, whatever stands above it


def test_a_damaged_one_is_found_no_more_once_set_aside(tmp_path: Path) -> None:
    for _ in range(2):  # the second time its name is taken
        made(tmp_path, 5)
        assert files.set_aside(made(tmp_path, 7)).name == "step_0000007.damaged"
        assert find_checkpoint(tmp_path).name == "step_0000005"


DAMAGES = {
    "flipped byte": (lambda p: (p / "__0_0.distcp").write_bytes(b"weighty"), "__0_0.distcp: damaged"),
    "cut short": (lambda p: (p / "__0_0.distcp").write_bytes(b"weigh"), "__0_0.distcp: 5 bytes, written were 7"),
    "missing": (lambda p: (p / "__0_0.distcp").unlink(), "__0_0.distcp: No such file"),
    "run.json changed": (lambda p: (p / "run.json").write_text('{"step": 6}'), "run.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_names_the_file(tmp_path: Path, name: str) -> None:
    place = made(tmp_path, 5)
    do, words = DAMAGES[name]
    do(place)
    sums = files.read_checksums(place)
    (line,) = damage(place, sums, sums)
    assert words in line and str(place) in line


@pytest.mark.parametrize("content", [None, "{", "[]", '{"a": 3}', "{}"])
def test_broken_json_names_the_file(tmp_path: Path, content: str | None) -> None:
    place = made(tmp_path, 5)
    for name, read in (("run.json", files.read_run_facts), ("checksums.json", files.read_checksums)):
        kept = (place / name).read_text()
        (place / name).unlink()
        if content is not None:
            (place / name).write_text(content)
        with pytest.raises(DamagedCheckpoint, match=name):
            read(place)
        (place / name).write_text(kept)


def test_a_file_that_is_not_listed_is_told(tmp_path: Path) -> None:
    place = made(tmp_path, 5)
    sums = files.read_checksums(place)
    assert files.unlisted(place, sums) == []
    del sums["__0_0.distcp"]
    assert "__0_0.distcp" in files.unlisted(place, sums)[0]


def test_a_file_that_nobody_counted_is_not_published(tmp_path: Path) -> None:
    scratch = files.scratch_folder(tmp_path, 5)
    scratch.mkdir()
    (scratch / "a").write_bytes(b"a")
    (scratch / ".nfs0001").write_bytes(b"what NFS keeps of a removed file")
    with pytest.raises(OSError, match="no rank says"):
        publish(scratch, files.step_folder(tmp_path, 5), facts={}, sums={})
    with pytest.raises(OSError, match="its writer saw 9"):
        publish(scratch, files.step_folder(tmp_path, 5), facts={}, sums={"a": [9, "x"]})
    assert checkpoints(tmp_path) == []


def test_load_names_what_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path, tmp_path / "step_0000007"):
        with pytest.raises(ValueError, match="--load"):
            find_checkpoint(path)
    damaged = made(tmp_path, 5)
    (damaged / "run.json").unlink()
    assert find_checkpoint(damaged) == find_checkpoint(tmp_path) == damaged  # refused when it is read, not passed over
    assert json.loads((damaged / "checksums.json").read_text())


@pytest.mark.parametrize("step", ["null", '"x"', "-5", "true", "1.5"])
def test_a_step_that_is_none_is_damage(tmp_path: Path, step: str) -> None:
    (tmp_path / "run.json").write_text(f'{{"step": {step}}}')
    with pytest.raises(DamagedCheckpoint, match="says no step"):
        files.read_run_facts(tmp_path)


def test_files_named_like_left_overs_go_too(tmp_path: Path) -> None:
    (tmp_path / ".step_0000021.part").touch()
    (tmp_path / ".step_0000022.part").mkdir()
    (tmp_path / ".step_0000023.gone").symlink_to(tmp_path / "nowhere")
    files.clear_left_overs(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "step_0000001.damaged").touch()
    assert files.set_aside(made(tmp_path, 1)).is_dir()


def test_one_run_at_a_time_writes_checkpoints(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.3)
    save = tmp_path / "run" / "checkpoints"
    first = files.hold(save)
    assert first is not None and not save.exists()
    with pytest.raises(ValueError, match=f"--save {save}: another run is writing"):
        files.hold(save)
    with files.hold(tmp_path / "run" / "others"):  # type: ignore[union-attr]
        first.close()
    files.hold(save).close()  # type: ignore[union-attr]


def test_a_file_system_without_locks_is_no_reason_to_stop(tmp_path: Path, monkeypatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    assert files.hold(tmp_path / "checkpoints") is None
    assert files.hold(Path("/proc/nowhere/checkpoints")) is None


def test_an_old_one_that_cannot_go_is_told_and_no_more(tmp_path: Path, monkeypatch) -> None:
    elsewhere = made(tmp_path / "other disk", 1)
    (tmp_path / "step_0000001").symlink_to(elsewhere)
    newest = [made(tmp_path, step) for step in (2, 3, 4)][-1]
    assert prune(tmp_path, 3, newest) == ["step_0000001"] and elsewhere.is_dir()  # the link goes, what it names stays
    remove, said = files.shutil.rmtree, []

    def busy(path: Path, **_: object) -> None:
        if "0000002" in path.name:
            raise OSError(39, "Directory not empty")
        remove(path)

    monkeypatch.setattr(files.shutil, "rmtree", busy)
    assert prune(tmp_path, 1, newest, said.append) == ["step_0000003"]
    assert said == [f"could not remove the old checkpoint {tmp_path}/step_0000002: Directory not empty"]
    files.clear_left_overs(tmp_path)
    assert checkpoints(tmp_path) == [newest]
