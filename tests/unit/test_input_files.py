"""Inputs through fsspec: what we rely on in it, object stores by URL, compression that is cut, packages that are
missing.
"""

from __future__ import annotations

import gzip
import importlib
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.compression import compr, register_compression
from fsspec.core import OpenFile
from fsspec.implementations.local import LocalFileSystem

import data.files as files_module
from data.files import file_version, match_files, open_stream
from data.prepare import main
from data.readers import BadRecord, FileOffset, decode_text, read_records
from data.sources import open_text
from tests.unit.test_prepare import BYTE, TEXTS, lines_of, run, texts_in, zstd


@pytest.fixture
def store() -> Iterator[fsspec.AbstractFileSystem]:
    memory = fsspec.filesystem("memory")
    yield memory
    memory.rm("/", recursive=True)


PACK = {"a.jsonl": bytes, "b.jsonl.gz": gzip.compress, "c.jsonl.zst": zstd}


def fill(store: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    """TEXTS in four files of memory://corpus, and a file that holds no documents."""
    for number, (name, pack) in enumerate(PACK.items()):
        store.pipe(f"/corpus/{name}", pack(lines_of(TEXTS[30 * number : 30 * number + 30])))
    pq.write_table(pa.table({"text": TEXTS[90:]}), tmp_path / "d.parquet")
    store.put(str(tmp_path / "d.parquet"), "/corpus/d.parquet")
    store.pipe("/corpus/picture.png", b"\x89PNG")


@pytest.mark.parametrize("pattern", ["memory://corpus", "memory://corpus/*.[jp]*[lqtz]*"])
def test_a_store_is_read_by_url(store, tmp_path: Path, pattern: str) -> None:
    fill(store, tmp_path)
    if "*" in pattern:
        store.rm("/corpus/picture.png")  # a pattern stands for every file that it matches
    run("--input", pattern, "--output-prefix", tmp_path / "p", *BYTE, "--workers", 2)
    assert texts_in(tmp_path / "p") == TEXTS
    assert list(open_text("memory://corpus", "text").texts()) == TEXTS


@pytest.mark.parametrize("name", PACK)
def test_reading_resumes_at_any_record(store, name: str) -> None:
    store.pipe(f"/{name}", PACK[name](lines_of(TEXTS)))
    url = f"memory://{name}"
    records = list(read_records(url, kind="jsonl", json_key="text"))
    for at in (0, 1, 57, len(records) - 1):
        start = FileOffset(records[at].end, records[at].number)
        rest = list(read_records(url, kind="jsonl", json_key="text", start=start))
        assert [r[:3] for r in rest] == [r[:3] for r in records[at + 1 :]]
        assert [decode_text(url, r, kind="jsonl", json_key="text") for r in rest] == TEXTS[at + 1 :]
    assert records[-1].consumed == store.size(f"/{name}")


@pytest.mark.parametrize("name", ["b.jsonl.gz", "c.jsonl.zst"])
def test_a_cut_file_of_a_store_is_a_bad_record(store, name: str) -> None:
    packed = PACK[name](lines_of(TEXTS))
    store.pipe(f"/{name}", packed[: len(packed) - 5])
    with pytest.raises(BadRecord, match="the rest of the file cannot be read on"):
        list(read_records(f"memory://{name}", kind="jsonl", json_key="text"))


def test_another_content_is_another_version(store) -> None:
    store.pipe("/a.txt", b"one")
    before = file_version("memory://a.txt")
    store.pipe("/a.txt", b"two")
    assert before[:2] == ("memory://a.txt", 3) and file_version("memory://a.txt") != before


def test_missing_files_of_a_store_are_refused(store, tmp_path: Path, capsys) -> None:
    flags = ["--output-prefix", str(tmp_path / "p"), *BYTE, "--workers", "0", "--input"]
    for url in ("memory://nothing.jsonl", "memory://nothing/*.jsonl"):
        assert main([*flags, url]) == 2 and f"--input {url}: no such file" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--data-path memory://nothing: no such file"):
        open_text("memory://nothing", "text")
    assert main([*flags, "memory://a.txt", "--output-prefix", "memory://p"]) == 2
    assert "must be a local path" in capsys.readouterr().err


def test_a_missing_package_is_refused_with_its_install_line(monkeypatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(ValueError, match=r"s3://bucket/a\.jsonl: .*Install s3fs"):
        match_files("s3://bucket/a.jsonl")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="nosuch://a: cannot be opened"):
        match_files("nosuch://a")

    def no_zstd(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", no_zstd)
    with pytest.raises(ValueError, match=r"zstd.*pip install -r requirements\.txt"), open_stream("a.jsonl.zst"):
        pass


@pytest.mark.parametrize("name", ["a::b.jsonl", "a*[x]?.jsonl", "~a.jsonl", "memory:a.jsonl", "ä ö.jsonl.gz"])
def test_local_names_are_taken_as_they_are(tmp_path: Path, monkeypatch, name: str) -> None:
    """fsspec would take `::` for a chain of stores and `~` for the home folder."""
    monkeypatch.chdir(tmp_path)
    pack = gzip.compress if name.endswith("gz") else bytes
    (tmp_path / name).write_bytes(pack(lines_of(TEXTS[:3])))
    assert match_files(name) == [name]
    assert list(open_text(name, "text").texts()) == TEXTS[:3]


# ---------------------------------------------------------------------------------------------------
# What we rely on in fsspec and its codecs


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_streams_read_all_members_and_say_where_they_are_cut(tmp_path: Path, compression: str) -> None:
    pack = gzip.compress if compression == "gzip" else zstd
    suffix = "gz" if compression == "gzip" else "zst"
    whole, cut, broken = (tmp_path / f"{name}.{suffix}" for name in ("whole", "cut", "broken"))
    data = lines_of(TEXTS)
    whole.write_bytes(pack(data) + pack(data))
    cut.write_bytes(pack(data)[:-3])
    broken.write_bytes(b"no such thing" * 9)
    with open_stream(str(whole)) as (raw, stream):
        assert stream.read() == data + data and raw.tell() == whole.stat().st_size
    for file in (cut, broken):
        with pytest.raises((EOFError, gzip.BadGzipFile)), open_stream(str(file)) as (_, stream):
            stream.read()


def test_the_reader_of_zstd_is_ours_whatever_is_installed(tmp_path: Path, monkeypatch) -> None:
    """fsspec's fallback reads the first frame only and ends there without an error."""
    monkeypatch.setitem(compr, "zstd", compr["zstd"])
    register_compression("zstd", lambda file, mode: pytest.fail("the fallback"), "zst", force=True)
    (tmp_path / "a.zst").write_bytes(zstd(b"x" * 1000))
    with open_stream(str(tmp_path / "a.zst")) as (_, stream):
        assert stream.read() == b"x" * 1000


def test_an_open_file_holds_the_stored_file_first(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"text"))
    opened = OpenFile(LocalFileSystem(), str(tmp_path / "a.gz"), "rb", "gzip")
    with opened as stream:
        assert len(opened.fobjects) == 2 and opened.fobjects[1] is stream
        assert stream.read() == b"text" and opened.fobjects[0].tell() == (tmp_path / "a.gz").stat().st_size
    assert files_module.OpenFile is OpenFile
