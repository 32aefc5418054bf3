"""What a folder of inputs stands for: nothing is lost silently, nothing hidden is taken in."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import fsspec
import pytest

from data.files import describe_left_out, match_files
from data.prepare import main
from data.sources import open_text
from tests.unit.test_prepare import BYTE, TEXTS, lines_of, run, texts_in, zstd
from tests.unit.test_prepare_files import refused

PACK = {".bz2": bz2.compress, ".xz": lzma.compress, ".zstd": zstd, ".zst": zstd, ".gz": gzip.compress}


def fill(folder: Path) -> Path:
    """Readable files, and what is left out."""
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / ".ipynb_checkpoints" / "a-checkpoint.jsonl").write_bytes(lines_of(["a copy"]))
    (folder / ".b.jsonl").write_bytes(lines_of(["hidden"]))
    (folder / "a.jsonl").write_bytes(lines_of(TEXTS[:3]))
    (folder / "part-00000").write_bytes(lines_of(["no suffix"]))
    (folder / "x.png").write_bytes(b"\x89PNG")
    (folder / "y.png").write_bytes(b"\x89PNG")
    (folder / "z.txt").write_bytes(b"")
    return folder


WANTED = {"hidden": 2, "without suffix": 1, ".png": 2, "empty": 1}


def test_what_is_left_out_is_listed(tmp_path: Path, capsys) -> None:
    folder = fill(tmp_path / "in")
    assert main(["--input", str(folder), "--output-prefix", str(tmp_path / "p"), *BYTE, "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert texts_in(tmp_path / "p") == TEXTS[:3]
    stored = json.loads((tmp_path / "p.json").read_text())["left_out"]
    assert {kind: names["count"] for kind, names in stored.items()} == WANTED
    assert stored[".png"]["first"] == [str(folder / "x.png"), str(folder / "y.png")]
    for kind, count in WANTED.items():
        assert f"left out: {count} {kind}, first {folder}/" in said
    source = open_text(str(folder), "text")
    assert list(source.texts()) == TEXTS[:3]
    assert {kind: len(names) for kind, names in source.left_out.items()} == WANTED
    assert f"2 .png ({folder}/x.png, ...)" in describe_left_out(source.left_out)


def test_a_folder_without_text_says_what_it_holds(tmp_path: Path, capsys) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "part-00000").write_bytes(lines_of(["no suffix"]))
    with pytest.raises(ValueError, match=r"no text in this folder.*left out: 1 without suffix"):
        open_text(str(tmp_path / "in"), "text")
    said = refused(capsys, "--input", tmp_path / "in", "--output-prefix", tmp_path / "p", *BYTE)
    assert "left out: 1 without suffix" in said


def test_outputs_of_an_earlier_run_are_no_left_outs(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(["a"]))
    for _ in range(2):
        run("--input", tmp_path, "--output-prefix", tmp_path / "p", *BYTE, "--workers", 0, "--overwrite")
    assert json.loads((tmp_path / "p.json").read_text())["left_out"] == {}


@pytest.mark.parametrize("suffix", [*PACK, *map(str.upper, PACK)])
def test_compressions_in_any_case(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "in").mkdir()
    for name, text in (("a.jsonl", "one"), ("b.JSONL", "two")):
        (tmp_path / "in" / f"{name}{suffix}").write_bytes(PACK[suffix.lower()](lines_of([text])))
    assert list(open_text(str(tmp_path / "in"), "text").texts()) == ["one", "two"]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("cut", ["end", "all", "middle"])
def test_broken_compression_is_a_bad_record(tmp_path: Path, capsys, suffix: str, cut: str) -> None:
    packed = bytearray(PACK[suffix](lines_of(TEXTS * 20)))
    content = packed[:-5] if cut == "end" else b""
    if cut == "middle":
        packed[len(packed) // 2 : len(packed) // 2 + 40] = b"\xff" * 40
        content = packed
    (tmp_path / f"a.jsonl{suffix}").write_bytes(content)
    said = refused(capsys, "--input", tmp_path, "--output-prefix", tmp_path / "p", *BYTE, "--workers", 0)
    assert f"a.jsonl{suffix}" in said
    assert "cannot be read" in said or "is not a JSON record" in said  # gzip's checksum is at the end


def test_empty_parquet_is_broken(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b\.parquet cannot be read on"):
        list(open_text(str(tmp_path), "text").texts())


@pytest.mark.parametrize("how", ["dangling", "dangling folder", "loop", "fifo", "unreadable", "glob"])
def test_what_is_broken_is_refused(tmp_path: Path, monkeypatch, capsys, how: str) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "b.txt").write_text("b")
    (folder / "a.txt").write_text("a")
    pattern, name, words = folder, folder / "shard.jsonl", "a link that leads nowhere"
    if how == "dangling":
        name.symlink_to(tmp_path / "gone.jsonl")
    elif how == "dangling folder":
        name = folder / "shards"
        name.symlink_to(tmp_path / "gone")
    elif how == "loop":
        name.symlink_to(name)
    elif how == "fifo":
        os.mkfifo(name)
        words = "a pipe or a device"
    else:  # the tests may run as root, whom no mode keeps out
        name, words, real = folder / "sub", "Permission denied", os.scandir
        pattern = folder if how == "unreadable" else folder / "*" / "*.txt"

        def scandir(at="."):
            if isinstance(at, (str, os.PathLike)) and Path(at) == name:
                raise PermissionError(13, words, str(at))
            return real(at)

        monkeypatch.setattr(os, "scandir", scandir)
    said = refused(capsys, "--input", pattern, "--output-prefix", tmp_path / "p", *BYTE, "--workers", 0)
    assert f"{name}" in said and words in said
    if how != "glob":
        with pytest.raises(ValueError, match=words):
            open_text(str(folder), "text")


def test_a_dangling_link_by_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="a link that leads nowhere"):
        open_text(str(tmp_path / "a.jsonl"), "text")


def test_a_pipe_is_refused_in_one_line(tmp_path: Path, capsys) -> None:
    reader, writer = os.pipe()
    try:
        for name in (f"/dev/fd/{reader}", f"/proc/self/fd/{reader}"):
            said = refused(capsys, "--input", name, "--output-prefix", tmp_path / "p", *BYTE)
            assert f"{name}: a pipe or a device, but inputs are read more than once" in said
            with pytest.raises(ValueError, match="a pipe or a device"):
                open_text(name, "text")
    finally:
        os.close(reader)
        os.close(writer)


def test_hidden_files_of_a_store_are_left_out() -> None:
    store = fsspec.filesystem("memory")
    for name in ("a.jsonl", ".tmp/b.jsonl", "deep/.c.jsonl", "deep/d.jsonl", "deep/e.png"):
        store.pipe(f"/hidden-in-store/{name}", b"x")
    left_out: dict[str, list[str]] = {}
    found = match_files("memory://hidden-in-store", left_out)
    assert [Path(name).name for name in found] == ["a.jsonl", "d.jsonl"]
    assert {kind: len(names) for kind, names in left_out.items()} == {"hidden": 2, ".png": 1}
