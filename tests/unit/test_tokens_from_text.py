"""From files to tokens: text round-trips byte for byte, caches hold the right content, corrupted files are refused."""

from __future__ import annotations

import errno
import fcntl
import json
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data.sources as sources_module
from data.build import build_tokens, train_tokenizer
from data.dataset import PackedDataset
from data.indexed_dataset import HEADER, IndexedDataset, write_indexed_dataset
from data.packing import PackingOptions
from data.sources import TextSource, open_text
from data.split import split_documents
from data.tokenizer import ByteTokenizer, SentencePieceTokenizer, train_sentencepiece
from tests.launch import ROOT
from utils.files import build_once, cache_key

WORDS = "a ring of ranks turns once and every token knows its place in the row; "
WORDS += "padding is silent, five axes make one loss. "


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("model") / "m.model"
    path.write_bytes(train_sentencepiece([WORDS, "def f(x):\n\treturn x\n\n" * 5, "    indented\n"], vocab_size=330))
    return SentencePieceTokenizer(path)


text = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)


@given(text)
@example("")
@example("\n")
@example(" \t\n\r\n  trailing ")
@example("\x00\x7f\x85\u2028\ufeff\ufffd")
@example("<unk></s><s><0x41>")
@example("e\u0301 é ﬁ Å ①")  # what any normalisation would change
@example("lower\u2581one eighth")  # SentencePiece's own sign for a space
@settings(max_examples=300, deadline=None)
def test_sentencepiece_returns_any_text(trained: SentencePieceTokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.eod not in ids and (ids < trained.vocab_size).all() and ids.dtype == np.int32
    assert trained.decode(ids.tolist()) == text


@given(text)
@settings(max_examples=100, deadline=None)
def test_bytes_return_any_text(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text).tolist() == list(text.encode())
    assert tokenizer.decode([*tokenizer.encode(text).tolist(), tokenizer.eod]) == text


def test_a_text_may_be_decoded_in_parts(trained: SentencePieceTokenizer) -> None:
    """Generated text continues a prompt: no space may be put in front of a text, or taken off one."""
    ids = trained.encode(WORDS).tolist()
    assert [trained.decode(ids[:cut]) + trained.decode(ids[cut:]) for cut in range(len(ids))] == [WORDS] * len(ids)
    assert len(ids) < 0.7 * len(WORDS)


def test_line_ends_are_learned(trained: SentencePieceTokenizer) -> None:
    """A corpus cut into lines without their ends would leave every line end to the byte fallback, one by one."""
    assert len(trained.encode("\n\n")) == 1


def test_a_model_without_an_end_is_refused(tmp_path: Path) -> None:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS]), model_writer=model, vocab_size=40, model_type="bpe", eos_id=-1, minloglevel=2
    )
    (tmp_path / "m.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match=r"--tokenizer-model .*end-of-sentence"):
        SentencePieceTokenizer(tmp_path / "m.model")


# ---------------------------------------------------------------------------------------------------
# Records and sources


def source_of(path: Path, *records: str) -> TextSource:
    path.write_text("".join(json.dumps({"text": r}) + "\n" for r in records))
    return open_text(str(path), "text")


def tokenizer_of(source: TextSource, cache: Path, **changes):
    if changes.get("tokenizer_type") == "byte":
        return ByteTokenizer()
    return train_tokenizer(source, vocab_size=changes.get("vocab_size", 300), cache_path=cache)


@pytest.mark.parametrize("tokenizer_type", ["byte", "sentencepiece"])
@pytest.mark.parametrize("escape", ["\\ud800", "\\udcff"])
def test_half_a_surrogate_is_named_by_file_and_line(tmp_path: Path, tokenizer_type: str, escape: str) -> None:
    """Legal JSON, common in crawled text, and no Unicode text: no tokenizer can take it."""
    path = tmp_path / "crawl.jsonl"
    path.write_text(json.dumps({"text": WORDS * 3}) + "\n" + f'{{"text": "half {escape} a pair"}}\n')
    with pytest.raises(ValueError, match=r"crawl\.jsonl:2"):
        source = open_text(str(path), "text")
        build_tokens(source, tokenizer_of(source, tmp_path, tokenizer_type=tokenizer_type), cache_path=tmp_path)


@pytest.mark.parametrize("tokenizer_type", ["byte", "sentencepiece"])
@pytest.mark.parametrize("line", ['{"text": 5}', "{broken", "[]"])
def test_a_bad_line_is_named_by_its_first_reader(tmp_path: Path, tokenizer_type: str, line: str) -> None:
    """Training a model reads the corpus too, and blames the vocabulary for everything."""
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"text": WORDS * 3}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl:2"):
        source = open_text(str(path), "text")
        build_tokens(source, tokenizer_of(source, tmp_path, tokenizer_type=tokenizer_type), cache_path=tmp_path)


@pytest.mark.parametrize("tokenizer_type", ["byte", "sentencepiece"])
def test_a_file_without_a_document_is_a_fault_of_the_data(tmp_path: Path, tokenizer_type: str) -> None:
    source = source_of(tmp_path / "hollow.jsonl", "", "")
    with pytest.raises(ValueError) as refused:
        build_tokens(source, tokenizer_of(source, tmp_path, tokenizer_type=tokenizer_type), cache_path=tmp_path)
    assert str(refused.value).startswith("--data-path") and "hollow.jsonl" in str(refused.value)


def test_other_keys_and_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"body": "one\\r\\ntwo", "text": "no"}\r\n  \r\n{"body": "three"}')
    assert list(open_text(str(path), "body").texts()) == ["one\r\ntwo", "three"]
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:2"):
        list(open_text(str(tmp_path / "bad.jsonl"), "text").texts())


def test_a_text_file_is_read_to_the_byte(tmp_path: Path) -> None:
    """Line ends are part of a document: what Windows wrote stays."""
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert list(open_text(str(tmp_path / "a.txt"), "text").texts()) == ["one\r\ntwo\rthree\n"]


def test_a_folder_is_read_in_one_order(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a.md", "b/1.py", "c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "c"}' if name.endswith("l") else name)
    assert list(open_text(str(tmp_path), "text").texts()) == ["a.md", "b/1.py", "b/2.txt", "c"]


# ---------------------------------------------------------------------------------------------------
# Caches


def test_tokenizer_and_tokens_are_built_once_and_again_when_the_data_changes(tmp_path: Path, monkeypatch) -> None:
    trainings = []
    real = sources_module.train_sentencepiece
    monkeypatch.setattr(sources_module, "train_sentencepiece", lambda *a, **k: trainings.append(1) or real(*a, **k))
    cache = tmp_path / "cache"
    source = source_of(tmp_path / "d.jsonl", WORDS * 2, "short", WORDS)
    for _ in range(2):
        tokenizer = tokenizer_of(source, cache)
        tokens = build_tokens(source, tokenizer, cache_path=cache)
        assert [tokenizer.decode(tokens.read(d, 0, int(n) - 1).tolist()) for d, n in enumerate(tokens.lengths)] == list(
            source.texts()
        )
        assert all(tokens.read(d, int(n) - 1, 1).tolist() == [tokenizer.eod] for d, n in enumerate(tokens.lengths))
    assert len(trainings) == 1
    tokenizer_of(source, cache, vocab_size=310)
    assert len(trainings) == 2
    changed = source_of(tmp_path / "d.jsonl", WORDS * 2, "longer", "and other words", WORDS)
    assert len(build_tokens(changed, tokenizer_of(changed, cache), cache_path=cache)) == 4
    assert len(trainings) == 3
    # Another tokenizer over the same text is another token file.
    assert build_tokens(changed, ByteTokenizer(), cache_path=cache).read(1, 0, 7).tolist() == [*b"longer", 256]


def test_of_builders_at_the_same_time_one_builds(tmp_path: Path) -> None:
    place, builds = tmp_path / "deep" / "er" / "thing", []

    def build(folder: Path) -> None:
        time.sleep(0.5)  # the others come meanwhile
        (folder / "part").write_text("x" * 1000)
        builds.append(folder)

    in_turn(4, place, build)
    assert len(builds) == 1 and (place / "part").read_text() == "x" * 1000
    assert [p.name for p in place.parent.iterdir()] == ["thing"]
    assert place.stat().st_mode & 0o777 == 0o755  # others may read a shared cache


def without_locks(monkeypatch, lease_seconds: float) -> None:
    def refuse(file, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr("utils.files.LEASE_SECONDS", lease_seconds)


def test_where_locks_are_missing_one_builds_and_others_wait(tmp_path: Path, monkeypatch) -> None:
    """For longer than a lease lasts without a sign of life."""
    without_locks(monkeypatch, 0.5)
    place, builds = tmp_path / "thing", []

    def build(folder: Path) -> None:
        builds.append(folder)
        time.sleep(1.5)
        (folder / "part").write_text("x" * 1000)

    in_turn(4, place, build)
    assert len(builds) == 1 and (place / "part").read_text() == "x" * 1000
    assert [p.name for p in place.parent.iterdir()] == ["thing"]


def test_a_dead_builders_lease_is_taken_over(tmp_path: Path, monkeypatch) -> None:
    without_locks(monkeypatch, 0.5)
    (tmp_path / ".thing.lease").mkdir()
    start = time.monotonic()
    build_once(tmp_path / "thing", lambda folder: (folder / "part").write_text("whole"))
    assert time.monotonic() - start > 0.5
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_a_builder_that_is_killed_is_followed_by_the_next(tmp_path: Path) -> None:
    place = tmp_path / "thing"
    code = f"import time; from pathlib import Path; from utils.files import build_once\nplace = Path({str(place)!r})\n"
    code += "build_once(place, lambda folder: print('in', flush=True) or time.sleep(60))"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "in\n"
        later = threading.Thread(target=build_once, args=(place, lambda folder: (folder / "part").write_text("whole")))
        later.start()
        time.sleep(0.5)
        assert not place.exists()
        first.kill()
    later.join(timeout=20)
    assert (place / "part").read_text() == "whole"


def in_turn(count: int, place: Path, build: Callable[[Path], None]) -> None:
    threads = [threading.Thread(target=build_once, args=(place, build)) for _ in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "thing").write_text("a file where the folder should be")
    with pytest.raises((OSError, ValueError)):
        build_once(tmp_path / "thing", lambda folder: None)
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_keys_do_not_depend_on_the_order_of_facts() -> None:
    assert cache_key(a=1, b=[2, "x"]) == cache_key(b=[2, "x"], a=1)
    assert len({cache_key(a=1), cache_key(a=2), cache_key(b=1), cache_key(a="1")}) == 4


part_weight = st.sampled_from([0.0, 1.0, 2.0, 5.0, 10.0, 25.0, 45.0, 95.0])


@given(st.integers(1, 400), st.tuples(part_weight.filter(bool), part_weight, part_weight))
@example(3, (1.0, 1.0, 2.0))  # the held-out parts round up to all there is
@example(4, (1.0, 5.0, 95.0))
@settings(max_examples=200, deadline=None)
def test_splits_part_the_documents(count: int, weights: tuple[float, float, float]) -> None:
    parts = split_documents(count, weights)
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    for part, weight in zip(parts, weights, strict=True):
        assert (np.diff(part) > 0).all()
        if count >= 3:
            assert (len(part) > 0) == (weight > 0)
        if weight and count >= 3:
            assert abs(len(part) - count * weight / sum(weights)) <= 2
    again = split_documents(count, tuple(2 * w for w in weights))
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))


# ---------------------------------------------------------------------------------------------------
# Token files that lie

LENGTHS_AT = HEADER.size
OFFSETS_AT = HEADER.size + 4 * 3


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (LENGTHS_AT + 4, struct.pack("<i", 1000)),  # the middle document runs past the end
        (LENGTHS_AT + 4, struct.pack("<i", -1)),
        (OFFSETS_AT + 8, struct.pack("<q", -4)),
        (OFFSETS_AT + 8, struct.pack("<q", 10**9)),
        (OFFSETS_AT + 16, struct.pack("<q", 10**9)),  # the last one
        (9, struct.pack("<Q", 2)),  # version
        (17, b"\x63"),  # token type
    ],
    ids=[
        "length beyond",
        "negative length",
        "negative offset",
        "offset beyond",
        "last offset beyond",
        "version",
        "token type",
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, at: int, value: bytes) -> None:
    """When it is opened, or where opening would have to read it all, when the document is."""
    write_indexed_dataset(tmp_path / "t", [np.arange(5), np.arange(7), np.arange(3)], vocab_size=100)
    index = bytearray((tmp_path / "t.idx").read_bytes())
    index[at : at + len(value)] = value
    (tmp_path / "t.idx").write_bytes(index)
    with pytest.raises(ValueError, match=r"t\.(idx|bin)"):
        data = IndexedDataset(tmp_path / "t")
        for document, length in enumerate(data.lengths):
            if length >= 0:
                data.read(document, 0, int(length))
        PackedDataset(data, np.arange(3), PackingOptions(seq_length=8, method="best-fit", seed=1), pad_token=0)


@pytest.mark.parametrize("missing", ["t.idx", "t.bin"])
def test_half_a_pair_is_refused_by_name(tmp_path: Path, missing: str) -> None:
    write_indexed_dataset(tmp_path / "t", [np.arange(5)], vocab_size=100)
    (tmp_path / missing).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=missing):
        IndexedDataset(tmp_path / "t")


def test_an_index_of_nothing(tmp_path: Path) -> None:
    write_indexed_dataset(tmp_path / "t", [], vocab_size=100)
    assert len(IndexedDataset(tmp_path / "t")) == 0
    (tmp_path / "t.idx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"t\.idx"):
        IndexedDataset(tmp_path / "t")


def test_a_prefix_may_hold_dots(tmp_path: Path) -> None:
    write_indexed_dataset(tmp_path / "corpus.v1", [np.arange(5)], vocab_size=100)
    write_indexed_dataset(tmp_path / "corpus.v2", [np.arange(7)], vocab_size=100)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "corpus.v1.bin",
        "corpus.v1.idx",
        "corpus.v2.bin",
        "corpus.v2.idx",
    ]
    assert IndexedDataset(tmp_path / "corpus.v1").lengths.tolist() == [5]
