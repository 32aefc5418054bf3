"""Input files: corrupted content is counted, unreadable files end the run, reading resumes at any row."""

from __future__ import annotations

import errno
import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import fsspec.implementations.local
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data.readers as readers_module
from data.prepare import main
from data.readers import BadRecord, FileOffset, decode_text, detect_format, read_records
from data.sources import TextSource, open_text
from tests.unit.test_prepare import BYTE, TEXTS, lines_of, run, texts_in, zstd


class Failing:
    """A file on a disk that fails behind its first bytes."""

    def __init__(self, raw: BinaryIO, code: int, after: int) -> None:
        self.raw, self.code, self.after = raw, code, after

    def read(self, size: int = -1) -> bytes:
        self._fail_at(self.after if size < 0 else self.raw.tell())
        return self.raw.read(min(size, self.after))

    def __iter__(self) -> Iterator[bytes]:
        for line in iter(self.raw.readline, b""):
            self._fail_at(self.raw.tell())
            yield line

    def _fail_at(self, place: int) -> None:
        if place >= self.after:
            raise OSError(self.code, "the system's words")

    def __getattr__(self, name: str):
        return getattr(self.raw, name)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt"])
def test_a_disk_that_fails_ends_the_run_also_with_skip(
    tmp_path: Path, monkeypatch, capsys, name: str, code: int
) -> None:
    """Counted as bad records, the rest of a corpus would be missing silently."""
    data = lines_of(TEXTS * 50)
    (tmp_path / name).write_bytes({".gz": gzip.compress, ".zst": zstd}.get(Path(name).suffix, bytes)(data))

    def open_failing(path: str, mode: str) -> BinaryIO | Failing:
        return Failing(open(path, mode), code, 100) if Path(path).name == name else open(path, mode)

    monkeypatch.setattr(fsspec.implementations.local, "open", open_failing, raising=False)
    flags = [
        "--input",
        str(tmp_path / name),
        "--output-prefix",
        str(tmp_path / "p"),
        *BYTE,
        "--workers",
        "0",
        "--on-error",
        "skip",
    ]
    assert main([*flags, "--format", "text" if name.endswith("txt") else "jsonl"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert name in said and f"[Errno {code}]" in said and not (tmp_path / "p.idx").exists()
    source = TextSource("s", (str(tmp_path / name),), kind="text" if name.endswith("txt") else "jsonl")
    with pytest.raises(ValueError, match=rf"--data-path: .*{name}"):
        list(source.texts(skip=lambda error: None))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_corrupted_content_leaves_out_the_rest_of_the_file(tmp_path: Path, name: str) -> None:
    """The first part of it is kept."""
    texts = [random.Random(n).randbytes(500).hex() for n in range(4000)]
    if name.endswith("parquet"):
        texts = [f"{n} {n * n % 7919} {n**3 % 104729}" * 20 for n in range(4000)]
        pq.write_table(pa.table({"text": texts}), tmp_path / name, row_group_size=500)
        data = bytearray((tmp_path / name).read_bytes())
        middle = len(data) // 2
        data[middle : middle + 20_000] = b"\x07" * 20_000
        (tmp_path / name).write_bytes(data)
    else:
        data = lines_of(texts)
        packed = gzip.compress(data) if name.endswith("gz") else bytes(pa.compress(data, codec="zstd", asbytes=True))
        (tmp_path / name).write_bytes(packed[: len(packed) // 2])
    progress = run(
        "--input", tmp_path / name, "--output-prefix", tmp_path / "p", *BYTE, "--workers", 0, "--on-error", "skip"
    )
    assert 0 < progress.documents < 4000 and progress.bad == 1
    assert texts_in(tmp_path / "p") == texts[: progress.documents]
    assert f"{name}:{progress.documents + 1} the rest of the file cannot be read on" in progress.shown[0]


@pytest.mark.parametrize("start", [0, 1, 6, 7, 1023, 1024, 1025, 2500, 2999, 3000])
def test_parquet_resumes_at_any_row(tmp_path: Path, start: int) -> None:
    file, texts = tmp_path / "a.parquet", [f"row {n}" for n in range(3000)]
    pq.write_table(pa.table({"text": texts}), file, row_group_size=700)
    records = list(read_records(str(file), kind="parquet", json_key="text", start=FileOffset(start, start)))
    assert [decode_text("a", r, kind="parquet", json_key="text") for r in records] == texts[start:]
    assert [r.number for r in records] == [r.end for r in records] == list(range(start + 1, 3001))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), file)
    with pytest.raises(BadRecord, match="has 2 columns 'text'"):
        list(read_records(str(file), kind="parquet", json_key="text"))


@pytest.mark.parametrize("name", ["a.json", "a.data", "a.jsonl"])
def test_a_mark_of_utf8_before_json_is_no_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + lines_of(["one", "grüße"]))
    assert detect_format(str(tmp_path / name)) == "jsonl"
    assert list(open_text(str(tmp_path / name), "text").texts()) == ["one", "grüße"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_other_encodings_are_not_guessed(tmp_path: Path, encoding: str) -> None:
    """A line of UTF-16 ends in the middle of a character: some would be read, others lost."""
    record = readers_module.Record(json.dumps({"text": "x"}).encode(encoding), 1, 0, 0)
    with pytest.raises(BadRecord, match="not a JSON record in UTF-8"):
        decode_text("a", record, kind="jsonl", json_key="text")
