"""Checkpoints as files: checksums that find every changed byte, folders that appear whole and go one by one."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from checkpoint import files
from checkpoint.files import (
    CorruptedCheckpoint,
    compute_checksums,
    find_checkpoint,
    find_corrupted,
    list_checkpoints,
    parse_step,
    prune,
    publish,
    purge,
)
from tests.launch import ROOT
from tools import checkpoint as checkpoint_tool
from utils.errors import UserError
from utils.files import checksum, legacy_page_sum


def made(save: Path, step: int, content: bytes = b"weights") -> Path:
    """A checkpoint as a run makes it, of one small file."""
    scratch = files.scratch_folder(save, step)
    scratch.mkdir(parents=True)
    (scratch / "__0_0.distcp").write_bytes(content)
    place = files.step_folder(save, step)
    publish(scratch, place, run_metadata={"step": step}, sums=compute_checksums([scratch / "__0_0.distcp"]))
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


def _swapped_words(page: bytearray) -> None:
    page[0:8], page[8:16] = page[8:16], page[0:8]


def _rotated_page(page: bytearray) -> None:
    page[:] = page[8:] + page[:8]


def _opposite_changes(page: bytearray) -> None:
    words = np.frombuffer(page, "<u8")
    words[3] += 1 << 20
    words[5] -= 1 << 20


@pytest.mark.parametrize("change", [_swapped_words, _rotated_page, _opposite_changes])
def test_changes_that_keep_a_pages_sum_change_the_checksum(tmp_path: Path, change: Callable[[bytearray], None]) -> None:
    """The checksum of older checkpoints, a sum of each page's words, sees none of these."""
    path = tmp_path / "file"
    page = bytearray(np.random.default_rng(1).bytes(4096))
    path.write_bytes(page * 3)
    wanted = checksum(path)
    changed = bytearray(page)
    change(changed)
    assert changed != page
    path.write_bytes(page + changed + page)
    assert checksum(path) != wanted


OLD = ROOT / "tests" / "assets" / "checkpoint_part6"


def test_checksums_of_older_versions_verify(tmp_path: Path) -> None:
    """The files in the asset were written, and their checksums computed, by an older version."""
    checkpoint = OLD / "checkpoints" / "step_0000003"
    sums = files.read_checksums(checkpoint)
    assert len(sums) == 4 and find_corrupted(checkpoint, sums, sums) == []
    corpus = json.loads((OLD / "corpus.json").read_text())["checksums"]
    for suffix, wanted in corpus.items():
        assert list(checksum(OLD / f"corpus.{suffix}", like=wanted[1])) == wanted
    for at in (0, 5000, -1):
        copy = tmp_path / "__0_0.distcp"
        content = bytearray((checkpoint / copy.name).read_bytes())
        content[at] ^= 1
        copy.write_bytes(content)
        (line,) = find_corrupted(tmp_path, [copy.name], sums)
        assert "__0_0.distcp: corrupted" in line


@pytest.mark.parametrize("size", [0, 7, 4096, 1024 * 4096 + 4096 + 9])
def test_the_legacy_sum_is_the_same_for_any_size(tmp_path: Path, size: int) -> None:
    """A second formula for what older versions computed: one pass over the whole file."""
    content = np.random.default_rng(2).bytes(size)
    (tmp_path / "file").write_bytes(content)
    pages = size // 4096
    sums = np.frombuffer(content, "<u8", count=pages * 512).reshape(pages, 512).sum(1, dtype=np.uint64)
    whole = size.to_bytes(8, "little") + sums.tobytes() + content[pages * 4096 :]
    with (tmp_path / "file").open("rb") as file:
        assert legacy_page_sum(file) == hashlib.sha256(whole).hexdigest()


def test_new_checksums_name_their_algorithm(tmp_path: Path) -> None:
    """The value is the reference implementation's for no bytes: a library that computes another hash is found."""
    (tmp_path / "file").touch()
    assert checksum(tmp_path / "file") == (0, "xxh3_128:99aa06d3014798d86001c324468d497f")


def test_a_checkpoint_appears_whole_and_latest_names_it(tmp_path: Path) -> None:
    first, second = made(tmp_path, 5), made(tmp_path, 12)
    assert list_checkpoints(tmp_path) == [first, second] and find_checkpoint(tmp_path) == second
    assert (tmp_path / "latest").read_text() == "step_0000012\n"
    assert files.read_run_metadata(second) == {"step": 12}
    assert {p.name for p in second.iterdir()} == {"__0_0.distcp", "run.json", "checksums.json"}
    sums = files.read_checksums(second)
    assert sums.keys() == {"__0_0.distcp", "run.json"} and find_corrupted(second, sums, sums) == []


def test_a_step_written_again_replaces_the_old_one(tmp_path: Path) -> None:
    made(tmp_path, 5, b"old")
    place = made(tmp_path, 5, b"new")
    assert (place / "__0_0.distcp").read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_0000005"]


def test_a_writer_that_died_between_two_renames_leaves_the_old_one_to_be_found(tmp_path: Path) -> None:
    place = made(tmp_path, 5)
    older = made(tmp_path, 3)
    place.rename(tmp_path / ".step_0000005.old")
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_0000003", ".step_0000005.old"]
    assert find_checkpoint(tmp_path).name == ".step_0000005.old" and files.list_older(find_checkpoint(tmp_path)) == [
        older
    ]
    files.remove_partial(tmp_path)
    assert find_checkpoint(tmp_path).name == ".step_0000005.old"
    made(tmp_path, 5)
    (tmp_path / ".step_0000005.old").mkdir()  # and one that died before it removed the old one
    files.remove_partial(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_0000003", "step_0000005"]


def test_half_written_and_half_removed_folders_are_no_checkpoints(tmp_path: Path) -> None:
    made(tmp_path, 5)
    for name in (".step_0000006.part", ".step_0000004.gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_0000005"]
    files.remove_partial(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_0000005"]


def test_keep(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        made(tmp_path, step)
    newest = tmp_path / "step_0000010"
    assert prune(tmp_path, 0, newest) == [] and len(list_checkpoints(tmp_path)) == 4
    doomed = prune(tmp_path, 2, newest)
    assert [p.name for p in doomed] == [".step_0000001.gone", ".step_0000002.gone"] and doomed[0].is_dir()
    purge(doomed)
    assert not any(p.exists() for p in doomed)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_0000003", "step_0000010"]
    assert prune(tmp_path, 9, newest) == []
    assert prune(tmp_path, 1, tmp_path / "step_0000003") == []  # what was just written stays, whatever stands above it


def test_multiples_are_kept_for_ever(tmp_path: Path) -> None:
    for step in range(1, 8):
        made(tmp_path, step)
        purge(prune(tmp_path, 1, tmp_path / f"step_{step:07d}", keep_every=3))
    assert [parse_step(p) for p in list_checkpoints(tmp_path)] == [3, 6, 7]


def test_a_checkpoint_that_a_process_loads_is_not_removed(tmp_path: Path, monkeypatch) -> None:
    old, newest = made(tmp_path, 1), made(tmp_path, 2)
    with files.keep_during(old), files.keep_during(old):  # a lock belongs to an open file, not to a process
        assert prune(tmp_path, 1, newest) == [] and old.is_dir()
    with files.keep_during(tmp_path / "nothing"):
        monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "no locks")))
        assert [p.name for p in prune(tmp_path, 1, newest)] == [".step_0000001.gone"]


def test_a_quarantined_checkpoint_is_not_found(tmp_path: Path) -> None:
    for _ in range(2):  # the second time its name is taken
        made(tmp_path, 5)
        assert files.quarantine(made(tmp_path, 7)).name == "step_0000007.damaged"
        assert find_checkpoint(tmp_path).name == "step_0000005"


CORRUPTIONS = {
    "flipped byte": (lambda p: (p / "__0_0.distcp").write_bytes(b"weighty"), "__0_0.distcp: corrupted"),
    "cut short": (lambda p: (p / "__0_0.distcp").write_bytes(b"weigh"), "__0_0.distcp: 5 bytes, written were 7"),
    "missing": (lambda p: (p / "__0_0.distcp").unlink(), "__0_0.distcp: No such file"),
    "run.json changed": (lambda p: (p / "run.json").write_text('{"step": 6}'), "run.json"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption_names_the_file(tmp_path: Path, name: str) -> None:
    place = made(tmp_path, 5)
    do, words = CORRUPTIONS[name]
    do(place)
    sums = files.read_checksums(place)
    (line,) = find_corrupted(place, sums, sums)
    assert words in line and str(place) in line


@pytest.mark.parametrize("content", [None, "{", "[]", '{"a": 3}', "{}", '{"run.json": [3, 4], "step": "3"}'])
def test_broken_json_names_the_file(tmp_path: Path, content: str | None) -> None:
    place = made(tmp_path, 5)
    for name, read in (("run.json", files.read_run_metadata), ("checksums.json", files.read_checksums)):
        kept = (place / name).read_text()
        (place / name).unlink()
        if content is not None:
            (place / name).write_text(content)
        with pytest.raises(CorruptedCheckpoint, match=name):
            read(place)
        (place / name).write_text(kept)


def test_a_file_that_is_not_listed_is_told(tmp_path: Path) -> None:
    place = made(tmp_path, 5)
    sums = files.read_checksums(place)
    assert files.find_unlisted(place, sums) == []
    del sums["__0_0.distcp"]
    assert "__0_0.distcp" in files.find_unlisted(place, sums)[0]


def test_a_file_that_nobody_counted_is_not_published(tmp_path: Path) -> None:
    scratch = files.scratch_folder(tmp_path, 5)
    scratch.mkdir()
    (scratch / "a").write_bytes(b"a")
    (scratch / ".nfs0001").write_bytes(b"what NFS keeps of a removed file")
    with pytest.raises(OSError, match="no rank says"):
        publish(scratch, files.step_folder(tmp_path, 5), run_metadata={}, sums={})
    with pytest.raises(OSError, match="its writer saw 9"):
        publish(scratch, files.step_folder(tmp_path, 5), run_metadata={}, sums={"a": [9, "x"]})
    assert list_checkpoints(tmp_path) == []


def test_load_names_what_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path, tmp_path / "step_0000007"):
        with pytest.raises(ValueError, match="--load"):
            find_checkpoint(path)
    damaged = made(tmp_path, 5)
    (damaged / "run.json").unlink()
    assert find_checkpoint(damaged) == find_checkpoint(tmp_path) == damaged  # refused when it is read, not passed over
    assert json.loads((damaged / "checksums.json").read_text())


@pytest.mark.parametrize("step", ["null", '"x"', "-5", "true", "1.5"])
def test_an_invalid_step_is_corruption(tmp_path: Path, step: str) -> None:
    (tmp_path / "run.json").write_text(f'{{"step": {step}}}')
    with pytest.raises(CorruptedCheckpoint, match="no valid step"):
        files.read_run_metadata(tmp_path)


@pytest.mark.parametrize(("name", "step"), [("step_9", 2), ("step_0000009", 2), ("step_00000004", 5), ("s", 10**12)])
def test_a_folders_name_says_its_step(tmp_path: Path, name: str, step: int) -> None:
    place = tmp_path / name
    place.mkdir()
    (place / "run.json").write_text(f'{{"step": {step}}}')
    with pytest.raises(CorruptedCheckpoint, match=r"is not the folder's|no valid step"):
        files.read_run_metadata(place)
    (tmp_path / "step_00000004").mkdir(exist_ok=True)
    (tmp_path / "step_00000004" / "run.json").write_text('{"step": 4}')
    assert files.read_run_metadata(tmp_path / "step_00000004")["step"] == 4  # named by --load


def test_a_step_has_one_name(tmp_path: Path) -> None:
    for name in ("step_0000004", "step_00000004", "step_1000000000000000000", "step_٠٠٠٠٠٠٥", "step_12345678"):
        (tmp_path / name).mkdir()
    assert [place.name for place in list_checkpoints(tmp_path)] == ["step_0000004", "step_12345678"]


def test_the_locks_file_is_the_users_alone(tmp_path: Path, monkeypatch) -> None:
    save, lock_file = tmp_path / "checkpoints", tmp_path / ".checkpoints.lock"
    lock = files.lock_dir(save)
    assert lock is not None and lock_file.stat().st_mode & 0o777 == 0o600
    lock.release()
    lock_file.unlink(missing_ok=True)
    (tmp_path / "precious").write_text("text")
    lock_file.symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"its lock .* is another user's, or a link"):
        files.lock_dir(save)
    assert (tmp_path / "precious").read_text() == "text"
    lock_file.unlink()
    lock_file.touch()
    monkeypatch.setattr(files, "acquire_lock", lambda *_: None)  # as for another user's file of mode 0600
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"its lock .* is another user's, or a link"):
        files.lock_dir(save)


def test_a_run_folders_checkpoints_are_all_verified(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint_tool, "read_tensor_index", lambda reader: {})
    for step in (5, 7, 8):
        made(tmp_path / "checkpoints", step)
    for folder in (tmp_path, tmp_path / "checkpoints"):
        assert checkpoint_tool.main(["verify", str(folder)]) == 0
        assert capsys.readouterr().out.count("whole") == 3
    (tmp_path / "checkpoints" / "step_0000005" / "__0_0.distcp").write_bytes(b"w")
    (tmp_path / "checkpoints" / "step_0000007" / "checksums.json").unlink()
    assert checkpoint_tool.main(["verify", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert out.count("CORRUPTED") == 2 and out.count("whole") == 1 and "step_0000007/checksums.json" in out
    assert checkpoint_tool.main(["verify", str(tmp_path / "checkpoints" / "step_0000008")]) == 0
    assert checkpoint_tool.main(["verify", str(tmp_path / "nothing")]) == 1
    assert capsys.readouterr().err.startswith("tools/checkpoint.py: ")


def test_partial_files_are_removed_like_folders(tmp_path: Path) -> None:
    (tmp_path / ".step_0000021.part").touch()
    (tmp_path / ".step_0000022.part").mkdir()
    (tmp_path / ".step_0000023.gone").symlink_to(tmp_path / "nowhere")
    files.remove_partial(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "step_0000001.damaged").touch()
    assert files.quarantine(made(tmp_path, 1)).is_dir()


def test_one_run_at_a_time_writes_checkpoints(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.3)
    save = tmp_path / "run" / "checkpoints"
    first, other = files.lock_dir(save), files.lock_dir(tmp_path / "run" / "others")
    assert first is not None and other is not None and not save.exists()
    with pytest.raises(UserError, match=f"--save {save}: another run is writing"):
        files.lock_dir(save)
    first.release()
    again = files.lock_dir(save)
    assert again is not None
    again.release()
    other.release()


def test_a_lock_ends_with_a_killed_process(tmp_path: Path, monkeypatch) -> None:
    """Also while a process that it forked, such as a data worker, is alive."""
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.3)
    save = tmp_path / "checkpoints"
    code = f"""
import os, time
from pathlib import Path
from checkpoint.files import lock_dir
lock = lock_dir(Path({str(save)!r}))
worker = os.fork()
if worker:
    print(worker, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        worker = int(holder.stdout.readline())
        try:
            with pytest.raises(UserError, match="another run is writing"):
                files.lock_dir(save)
            holder.kill()
            holder.wait()
            lock = files.lock_dir(save)
            assert lock is not None
            lock.release()
        finally:
            os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_reason_to_stop(tmp_path: Path, monkeypatch, code: int) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for _ in range(2):  # and no lock file of the first one keeps out the second
        assert files.lock_dir(tmp_path / "checkpoints") is None
    assert files.lock_dir(Path("/proc/nowhere/checkpoints")) is None


def test_an_old_one_that_cannot_go_is_told_and_no_more(tmp_path: Path, monkeypatch) -> None:
    elsewhere = made(tmp_path / "other disk", 1)
    (tmp_path / "step_0000001").symlink_to(elsewhere)
    newest = [made(tmp_path, step) for step in (2, 3, 4)][-1]
    (link,) = prune(tmp_path, 3, newest)
    purge([link])
    assert not link.is_symlink() and elsewhere.is_dir()  # the link goes, what it names stays
    remove, said = files.shutil.rmtree, []

    def busy(path: Path, **_: object) -> None:
        if "0000002" in path.name:
            raise OSError(39, "Directory not empty")
        remove(path)

    monkeypatch.setattr(files.shutil, "rmtree", busy)
    purge(prune(tmp_path, 1, newest), said.append)
    assert said == [f"could not remove the old checkpoint {tmp_path}/.step_0000002.gone: Directory not empty"]
    assert not (tmp_path / ".step_0000003.gone").exists()
    files.remove_partial(tmp_path)
    assert list_checkpoints(tmp_path) == [newest]


def test_inspect_says_where_batch_and_mixture_stand() -> None:
    rows = [["a", "1", 0.25], ["b", "2", 0.75]]
    places = [{"name": "a", "epoch": 0, "position": 9}, {"name": "b", "epoch": 1, "position": 2}]
    state = {"sequences": 1234, "batches": [[0, 0, 4], [3, 12, 8]], "sources": places, "mixtures": [[40, rows]]}
    assert list(checkpoint_tool.describe_course(10, state)) == [
        ("samples read", "1,234"),
        ("samples a step", "4 from step 1, 8 from step 4"),
        ("from sample 40 on", "25.0000% a, 75.0000% b"),
        ("epoch 0, sample 9", "of a"),
        ("epoch 1, sample 2", "of b"),
    ]
    for wrong in ({"sources": 5}, {"mixtures": [[1]]}, {"batches": []}):
        with pytest.raises(UserError, match="corrupted"):
            list(checkpoint_tool.describe_course(10, state | wrong))
