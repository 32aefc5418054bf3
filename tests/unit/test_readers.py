"""Input files: corrupted content is counted, unreadable files end the run, reading resumes at any row."""

from __future__ import annotations

import errno
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import fsspec.implementations.local
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports.zstd import CompressionParameter, ZstdCompressor
from fsspec.spec import AbstractBufferedFile

import data.readers as readers_module
from data.files import open_stream
from data.prepare import main
from data.readers import BadRecord, FileOffset, _limited_lines, decode_text, detect_format, read_records
from data.sources import TextSource, open_text
from tests.unit.test_prepare import BYTE, TEXTS, lines_of, run, texts_in, zstd

ROOT = Path(__file__).resolve().parent.parent.parent


class Failing:
    """A file on a disk that fails behind its first bytes."""

    def __init__(self, raw: BinaryIO, code: int, after: int) -> None:
        self.raw, self.code, self.after = raw, code, after

    def read(self, size: int = -1) -> bytes:
        self._fail_at(self.raw.tell() if 0 <= size <= 1 << 20 else self.after)
        return self.raw.read(min(size, self.after))

    def readline(self, size: int = -1) -> bytes:
        line = self.raw.readline(size)
        self._fail_at(self.raw.tell())
        return line

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


# ---------------------------------------------------------------------------------------------------
# Kinds of Parquet columns


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
        pa.dictionary(pa.int32(), pa.binary()),
    ],
    ids=str,
)
def test_columns_of_text_may_be_bytes_or_a_dictionary(tmp_path: Path, kind: pa.DataType) -> None:
    texts = ["one", "grüße", None, "one", "", "two"] * 20
    values = pa.array([None if t is None else t.encode() for t in texts], pa.binary())
    if not pa.types.is_dictionary(kind):
        values = values.cast(kind)
    else:
        values = values.cast(kind.value_type).dictionary_encode().cast(kind)
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet", row_group_size=50)
    assert pq.ParquetFile(tmp_path / "a.parquet").schema_arrow.field("text").type.id in (kind.id, pa.string().id)
    records = list(read_records(str(tmp_path / "a.parquet"), kind="parquet", json_key="text"))
    assert [None if r.content is None else r.content.decode() for r in records] == texts
    bad: list[BadRecord] = []
    source = open_text(str(tmp_path / "a.parquet"), "text")
    assert list(source.texts(bad.append)) == [t for t in texts if t] and len(bad) == 20


def test_bytes_that_are_no_text_are_named_by_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([b"fine", b"\xff\xfe"], pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet:2 is not UTF-8 text"):
        list(open_text(str(tmp_path / "a.parquet"), "text").texts())


@pytest.mark.parametrize("kind", [pa.int64(), pa.list_(pa.string()), pa.dictionary(pa.int32(), pa.int64())], ids=str)
def test_other_columns_are_no_text(tmp_path: Path, kind: pa.DataType) -> None:
    values = pa.array([[b"1"]] if pa.types.is_list(kind) else [1], kind if not pa.types.is_dictionary(kind) else None)
    values = values.dictionary_encode() if pa.types.is_dictionary(kind) else values
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    with pytest.raises(BadRecord, match=r"column 'text' holds .*, no text"):
        list(read_records(str(tmp_path / "a.parquet"), kind="parquet", json_key="text"))


# ---------------------------------------------------------------------------------------------------
# Zstandard


def test_a_wide_window_is_read(tmp_path: Path) -> None:
    """`zstd --long=31`."""
    options = {CompressionParameter.window_log: 31, CompressionParameter.content_size_flag: 0}
    compressor, data = ZstdCompressor(options=options), lines_of(TEXTS)
    # In pieces, without a size in the header: a frame of known size has a window of that size.
    packed = b"".join(compressor.compress(data[at : at + 100]) for at in range(0, len(data), 100)) + compressor.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    assert list(open_text(str(tmp_path / "a.jsonl.zst"), "text").texts()) == TEXTS


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.97])
def test_a_cut_frame_gives_all_its_whole_blocks(tmp_path: Path, keep: float) -> None:
    """A block of Zstandard, up to 128 KiB of text, is the least that can be unpacked."""
    data = lines_of([random.Random(n).randbytes(400).hex() for n in range(2000)])
    packed = zstd(data)
    (tmp_path / "a.jsonl.zst").write_bytes(packed[: int(len(packed) * keep)])
    bad: list[BadRecord] = []
    texts = list(open_text(str(tmp_path / "a.jsonl.zst"), "text").texts(bad.append))
    read = len(lines_of(texts))
    assert len(bad) == 1 and len(data) * keep - read < (128 << 10) + 1000


# ---------------------------------------------------------------------------------------------------
# A limit on the bytes of a record


@pytest.fixture
def small_limit(monkeypatch) -> int:
    monkeypatch.setattr(readers_module, "MAX_RECORD_BYTES", 1000)
    return 1000


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt", "a.txt.zst"])
def test_a_record_that_is_too_long_is_left_out_and_the_next_is_read(tmp_path: Path, small_limit, name: str) -> None:
    texts = ["first", "x" * 5000, "last"]
    pack = {".gz": gzip.compress, ".zst": zstd}.get(Path(name).suffix, bytes)
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": texts}), tmp_path / name)
    elif ".txt" in name:
        (tmp_path / name).write_bytes(pack(texts[1].encode()))
    else:
        (tmp_path / name).write_bytes(pack(lines_of(texts)))
    bad: list[BadRecord] = []
    source = open_text(str(tmp_path / name), "text")
    assert list(source.texts(bad.append)) == ([] if ".txt" in name else ["first", "last"])
    where = name if ".txt" in name else f"{name}:2"
    assert [str(b) for b in bad] == [
        f"{tmp_path / where} is longer than 1,000 bytes, the most that a document may have"
    ]
    if name.endswith("jsonl"):
        records = list(read_records(str(tmp_path / name), kind="jsonl", json_key="text"))
        assert records[-1].end == (tmp_path / name).stat().st_size
        rest = read_records(str(tmp_path / name), kind="jsonl", json_key="text", start=FileOffset(records[1].end, 2))
        assert [r.number for r in rest] == [3]


def test_a_compressed_parquet_file_is_held_in_memory_to_a_limit(tmp_path: Path, small_limit) -> None:
    pq.write_table(pa.table({"text": [random.Random(0).randbytes(2000).hex()]}), tmp_path / "a")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a").read_bytes()))
    with pytest.raises(BadRecord, match="unpacks to more than 1,000 bytes"):
        list(read_records(str(tmp_path / "a.parquet.gz"), kind="parquet", json_key="text"))


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.data.zst"])
def test_a_bomb_takes_no_memory(tmp_path: Path, name: str) -> None:
    """512 MiB of zeros in one line."""
    compressor, piece = ZstdCompressor(), bytes(16 << 20)
    with (tmp_path / name).open("wb") as out:
        for _ in range(32):
            out.write(compressor.compress(piece))
        out.write(compressor.flush())
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import data.readers
data.readers.MAX_RECORD_BYTES = 16 << 20
from data.sources import open_text
bad = []
assert list(open_text({str(tmp_path / name)!r}, "text").texts(bad.append)) == []
assert len(bad) == 1 and "longer than" in str(bad[0]), bad
print(next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300


@pytest.mark.parametrize("length", [100, 3 << 20])
def test_few_rows_of_parquet_are_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    file, texts = tmp_path / "a.parquet", [random.Random(n).randbytes(length) for n in range(64)]
    pq.write_table(pa.table({"text": pa.array(texts, pa.binary())}), file)
    asked: list[int] = []
    read_batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda self, **how: asked.append(how["batch_size"]) or read_batches(self, **how)
    )
    assert [r.content for r in read_records(str(file), kind="parquet", json_key="text")] == texts
    assert asked == [32 if length == 100 else 10]


def test_no_flipped_bit_of_parquet_ends_the_process(tmp_path: Path) -> None:
    """pyarrow aborts on some of these footers where it is asked for the sizes of a row group."""
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet", store_schema=False)
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from data.readers import BadRecord, read_records
file = Path({str(tmp_path / "a.parquet")!r})
content = file.read_bytes()
outcomes = []
for bit in range(8 * len(content)):
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    file.write_bytes(flipped)
    try:
        outcomes.append(len(list(read_records(str(file), kind="parquet", json_key="text"))))
    except BadRecord:
        outcomes.append(-1)
assert {{-1, 1}} <= set(outcomes), set(outcomes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Stored(AbstractBufferedFile):
    """A remote store's file: its `readline` takes no size."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.kwargs["content"][start:end]


def test_lines_of_a_remote_stores_file(monkeypatch: pytest.MonkeyPatch) -> None:
    content = b'{"text": "a"}\n{"text": "b"}\n' + b"x" * 100
    file = Stored(SimpleNamespace(blocksize=7), "a.jsonl", size=len(content), content=content)
    store = SimpleNamespace(open=lambda *_, **__: file)
    monkeypatch.setattr("data.files.open_store", lambda name: (store, name))
    with open_stream("s3://bucket/a.jsonl") as (_, stream):
        lines = list(_limited_lines(stream))
    assert lines == [(line, len(line)) for line in content.splitlines(keepends=True)]


def test_a_key_within_another(tmp_path: Path) -> None:
    """`meta.text` in JSON lines and Parquet; a field of that very name comes first."""
    rows = [{"meta": {"text": "a"}}, {"meta": {"text": "b"}}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.table({"meta": [row["meta"] for row in rows]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert list(open_text(str(tmp_path / name), "meta.text").texts()) == ["a", "b"]

    (tmp_path / "b.jsonl").write_text(json.dumps({"meta.text": "flat", "meta": {"text": "deep"}}) + "\n")
    pq.write_table(pa.table({"meta": [{"text": "deep"}], "meta.text": ["flat"]}), tmp_path / "b.parquet")
    for name in ("b.jsonl", "b.parquet"):
        assert list(open_text(str(tmp_path / name), "meta.text").texts()) == ["flat"]

    (tmp_path / "c.jsonl").write_text('{"meta": "text"}\n')
    pq.write_table(
        pa.table({"meta": pa.array([None, {"text": "x"}], pa.struct({"text": pa.string()}))}), tmp_path / "c.parquet"
    )
    pq.write_table(pa.table({"meta": ["x"]}), tmp_path / "d.parquet")
    pq.write_table(pa.table({"meta": [{"body": "x"}]}), tmp_path / "e.parquet")
    for name in ("c.jsonl", "c.parquet", "d.parquet", "e.parquet"):
        with pytest.raises(ValueError, match=r"'meta\.text'"):
            list(open_text(str(tmp_path / name), "meta.text").texts())
