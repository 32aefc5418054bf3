"""Files that data is read from and cached in: formats to the byte, sources, tokenizers, builds that are whole or
absent.
"""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from data.build import build_tokens, train_tokenizer
from data.indexed_dataset import IndexedDataset, write_indexed_dataset
from data.sources import TextSource, open_stdlib, open_text
from data.split import cached_split, split_documents
from data.tokenizer import ByteTokenizer, SentencePieceTokenizer, train_sentencepiece
from utils.files import build_once


def test_index_bytes_are_megatrons(tmp_path: Path) -> None:
    write_indexed_dataset(tmp_path / "t", [np.array([7, 8, 9]), np.array([1])], vocab_size=100)
    wanted = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3) + struct.pack("<2i2q3q", 3, 1, 0, 6, 0, 1, 2)
    assert (tmp_path / "t.idx").read_bytes() == wanted
    assert (tmp_path / "t.bin").read_bytes() == struct.pack("<4H", 7, 8, 9, 1)


@pytest.mark.parametrize("vocab_size", [100, 100_000])
def test_documents_come_back(tmp_path: Path, vocab_size: int) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, vocab_size, n) for n in (5, 1, 300)]
    write_indexed_dataset(tmp_path / "t", documents, vocab_size=vocab_size)
    data = IndexedDataset(tmp_path / "t")
    assert len(data) == 3
    for number, document in enumerate(documents):
        assert data.read(number, 0, len(document)).tolist() == document.tolist()
    assert data.read(2, 100, 7).tolist() == documents[2][100:107].tolist()


def test_corrupted_files_are_refused(tmp_path: Path) -> None:
    write_indexed_dataset(tmp_path / "t", [np.arange(10)], vocab_size=100)
    index, tokens = (tmp_path / "t.idx").read_bytes(), (tmp_path / "t.bin").read_bytes()
    for broken, words in (
        (index[:20], "less than a header"),
        (index[:-8], "promises"),
        (b"X" + index[1:], "not a Megatron"),
    ):
        (tmp_path / "t.idx").write_bytes(broken)
        with pytest.raises(ValueError, match=words):
            IndexedDataset(tmp_path / "t")
    (tmp_path / "t.idx").write_bytes(index)
    (tmp_path / "t.bin").write_bytes(tokens[:-2])
    with pytest.raises(ValueError, match="past the end"):
        IndexedDataset(tmp_path / "t")


def test_sources(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "two.jsonl").write_text('{"text": "a"}\n\n{"text": "b", "id": 1}\n{"text": ""}\n')
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert list(open_text(str(tmp_path / "one.txt"), "text").texts()) == ["one"]
    assert list(open_text(str(tmp_path / "two.jsonl"), "text").texts()) == ["a", "b"]
    assert list(open_text(str(tmp_path), "text").texts()) == ["one", "a", "b"]
    for name, words in (("missing", "no such file"), ("empty.txt", "is empty")):
        with pytest.raises(ValueError, match=words):
            open_text(str(tmp_path / name), "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="no text"):
        open_text(str(tmp_path / "folder"), "text")


@pytest.mark.parametrize("line", ['{"text": 5}', '{"txt": "x"}', "[1]", "{broken", '{"text": "\\ud8'])
def test_bad_records_are_named_by_file_and_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl:2"):
        list(open_text(str(tmp_path / "bad.jsonl"), "text").texts())


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="not UTF-8"):
        list(open_text(str(tmp_path / "latin.txt"), "text").texts())


def test_the_default_corpus_is_there_and_leaves_installed_packages_out() -> None:
    source = open_stdlib()
    assert len(source.files) > 200
    assert not any("site-packages" in Path(file).parts for file in source.files)
    assert list(source.files) == sorted(source.files, key=Path)


def test_a_source_that_changes_is_another_source(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("one")
    before = open_text(str(file), "text").cache_facts()
    file.write_text("one and more")
    assert open_text(str(file), "text").cache_facts() != before


@pytest.mark.parametrize("how", ["in place", "by rename"])
def test_an_edit_that_keeps_size_and_time_is_another_source(tmp_path: Path, how: str) -> None:
    """What `cp -p`, `rsync -t`, `tar` and `mv` do: tokens of the old text would be used."""
    file, new = tmp_path / "one.txt", tmp_path / "new"
    file.write_text("one")
    new.write_text("two")
    for each in (file, new):
        os.utime(each, ns=(1, 1))
    before = [open_text(str(file), "text").cache_facts() for _ in range(2)]
    assert before[0] == before[1]
    time.sleep(0.02)  # the clock of the file system ticks every 10 ms
    if how == "in place":
        file.write_text("two")
        os.utime(file, ns=(1, 1))
    else:
        os.rename(file, tmp_path / "old")
        os.rename(new, file)
    assert file.read_text() == "two" and file.stat().st_mtime_ns == 1 and file.stat().st_size == 3
    assert open_text(str(file), "text").cache_facts() != before[0]


def test_a_cache_key_depends_on_files_and_options(tmp_path: Path, monkeypatch) -> None:
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text("one")
    monkeypatch.chdir(tmp_path)
    before = open_text("one.txt", "text").cache_facts()
    assert open_text(f"../{tmp_path.name}/one.txt", "text").cache_facts() == before  # however it is spelled
    assert open_text("one.txt", "body").cache_facts() != before
    assert open_text("two.txt", "text").cache_facts() != before
    assert TextSource("one.txt", ("one.txt",), kind="jsonl").cache_facts() != before
    stat = (tmp_path / "one.txt").stat()
    os.utime(tmp_path / "one.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # as long as before
    assert open_text("one.txt", "text").cache_facts() != before
    assert open_stdlib().cache_facts() != TextSource("all", open_stdlib().files).cache_facts()


TEXT = 'def f(x):\n\treturn "grüße, 世界 🎉"  # two  spaces\r\n\n    x = 1\n' * 3


def test_tokenizers_return_the_text_exactly(tmp_path: Path) -> None:
    model = tmp_path / "m.model"
    model.write_bytes(train_sentencepiece([TEXT, "a few other words for the model"], vocab_size=300))
    for tokenizer in (ByteTokenizer(), SentencePieceTokenizer(model)):
        ids = tokenizer.encode(TEXT)
        assert tokenizer.decode(ids.tolist()) == TEXT
        assert ids.dtype == np.int32 and ids.max() < tokenizer.vocab_size and tokenizer.eod not in ids


def test_a_file_that_is_no_model_and_a_corpus_too_small_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        SentencePieceTokenizer(tmp_path / "m.model")
    (tmp_path / "small.txt").write_text("ab")
    source = open_text(str(tmp_path / "small.txt"), "text")
    with pytest.raises(ValueError, match="--tokenizer-vocab-size 4096"):
        train_tokenizer(source, vocab_size=4096, cache_path=tmp_path)


def test_a_build_is_whole_or_absent_and_done_once(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError("interrupted")

    place = tmp_path / "cache" / "thing"
    with pytest.raises(RuntimeError):
        build_once(place, fail)
    assert list((tmp_path / "cache").iterdir()) == []

    def build(folder: Path) -> None:
        (folder / "whole").write_text("first")
        # Another job finishes first: its folder stays, ours is dropped.
        if not place.exists():
            place.mkdir()
            (place / "whole").write_text("second")

    build_once(place, build)
    assert (place / "whole").read_text() == "second"
    build_once(place, fail)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["thing"]


def test_what_is_built_survives_a_loss_of_power(tmp_path: Path, monkeypatch) -> None:
    """Contents, then names, are on disk before the folder is in its place, and its own name after."""
    done: list[str] = []
    real, rename = os.fsync, os.rename
    names = lambda handle: os.path.basename(os.readlink(f"/proc/self/fd/{handle}")).split(".", 2)  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(".".join(names(handle)[:2])) or real(handle))
    monkeypatch.setattr(os, "rename", lambda *where: done.append("rename") or rename(*where))

    def build(folder: Path) -> None:
        (folder / "one").write_text("1")
        (folder / "two").write_text("2")

    build_once(tmp_path / "cache" / "thing", build)
    assert sorted(done[:2]) == ["one", "two"] and done[2:] == [".thing", "rename", "cache"]


def test_what_killed_builders_left_is_removed_after_a_day(tmp_path: Path) -> None:
    old, busy, fresh = (tmp_path / name for name in (".key.abc", ".other.def", ".key.ghi"))
    for folder in (old, busy, fresh):
        folder.mkdir()
        (folder / "part").write_text("half")
    for path in (old / "part", old, busy):  # one of its files is still being written
        os.utime(path, (time.time() - 90_000,) * 2)
    build_once(tmp_path / "key", lambda folder: None)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".key.ghi", ".other.def", "key"]


@pytest.mark.parametrize("part", ["split", "tokens", "tokenizer"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_corrupted_cache_entries_are_named(tmp_path: Path, part: str, how: str) -> None:
    (tmp_path / "d.txt").write_text(TEXT * 20)
    source, cache = open_text(str(tmp_path / "d.txt"), "text"), tmp_path / "cache"

    def build() -> None:
        build_tokens(source, train_tokenizer(source, vocab_size=300, cache_path=cache), cache_path=cache)
        cached_split(10, (8.0, 1.0, 1.0), cache_path=cache)

    build()
    (folder,) = (cache / part).iterdir()
    for file in list(folder.iterdir()):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        if how == "missing":
            file.unlink()
        with pytest.raises(ValueError, match=r"--data-cache-path: .* is broken .*remove that folder") as refused:
            build()
        assert str(folder) in str(refused.value)
        file.write_bytes(content)
    build()


def test_splits_are_cached_by_their_weights(tmp_path: Path) -> None:
    for count, weights in ((10, (9.0, 1.0, 0.0)), (10, (5.0, 5.0, 0.0)), (10, (5.0, 4.0, 1.0)), (12, (5.0, 4.0, 1.0))):
        parts = cached_split(count, weights, cache_path=tmp_path)
        assert [p.tolist() for p in parts] == [p.tolist() for p in split_documents(count, weights)]


@pytest.mark.parametrize("count", [1, 2, 3, 10, 1000])
def test_splits_cover_without_overlap(count: int) -> None:
    train, valid, test = split_documents(count, (95.0, 5.0, 0.0))
    assert sorted([*train, *valid, *test]) == list(range(count))
    assert len(test) == 0 and len(train) >= 1
    assert len(valid) == (0 if count == 1 else max(1, round(count * 0.05)))
