"""What keeps a corpus of any size cheap to start from: facts in the cache, splits without a table, forced windows, an
index that is built ahead, and pipeline stages that read no tokens.
"""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import data.build as build_module
from data.batch import BatchPlan
from data.batch_schedule import BatchSchedule
from data.build import FORCED_WINDOW, build_dataset, open_dataset
from data.dataset import NOT_READ, BlendedDataset, Mixture, PackedDataset, PackingOptions
from data.indexed_dataset import IndexedDataset, token_file, write_indexed_dataset
from data.loader import MicrobatchDataset
from data.packing import Windows, build_epoch
from data.sources import open_sources
from data.split import DocumentRange, cached_split, count_documents
from data.tokenizer import ByteTokenizer
from metrics.banner import describe_sequences
from tests.unit.test_packed_rows import Tokens
from tests.unit.test_packed_rows import dataset as in_memory
from tools.index import main as index_main
from training.build import build_batch_plan
from utils.errors import UserError

SPLIT = (3.0, 1.0, 0.0)
PACKING = PackingOptions(seq_length=16, method="best-fit", seed=1, alignment=2)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus", np.random.default_rng(1).integers(1, 40, 200))


def write_corpus(prefix: Path, lengths: np.ndarray, shift: int = 0) -> Path:
    documents = ((np.arange(n) + number + shift) % 250 for number, n in enumerate(lengths.tolist()))
    write_indexed_dataset(prefix, documents, vocab_size=256)
    return prefix


def build(prefix: Path, **changes) -> PackedDataset:
    options = dict(split=SPLIT, which=0, flag="--data-path", cache_path=prefix.parent / "cache") | changes
    found = build_dataset(open_sources([str(prefix)], "text"), ByteTokenizer(), PACKING, **options)
    assert isinstance(found, PackedDataset)
    return found


# ---------------------------------------------------------------------------------------------------
# Splits without a table


def test_a_split_without_a_table_has_every_document_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("data.split.MAX_TABLE_DOCUMENTS", 1000)
    for count, weights in ((1001, SPLIT), (5003, (90.0, 5.0, 5.0))):
        parts = cached_split(count, weights, cache_path=tmp_path)
        assert all(isinstance(part, DocumentRange) for part in parts)
        assert [len(part) for part in parts] == count_documents(count, weights)
        assert np.array_equal(np.sort(np.concatenate([part[:] for part in parts])), np.arange(count))
        again = pickle.loads(pickle.dumps(parts[1]))
        assert np.array_equal(again[np.array([3, 0])], parts[1][:][[3, 0]]) and int(again[7]) == parts[1][:][7]
        assert np.array_equal(again[1::5], parts[1][:][1::5])
        assert not np.array_equal(np.sort(parts[1][:]), np.arange(len(parts[1])))  # drawn, not the first
        for outside in (len(again), -1):
            with pytest.raises(IndexError):
                again[outside]
    assert list(tmp_path.iterdir()) == []


def test_a_whole_corpus_is_in_its_own_order(tmp_path: Path) -> None:
    train, valid, _ = cached_split(7, (1.0, 0.0, 0.0), cache_path=tmp_path)
    assert list(train) == list(range(7)) and len(valid) == 0 and list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------
# Facts


def test_a_corpus_is_measured_once(prefix: Path, monkeypatch) -> None:
    """By rank 0; later ranks, and workers, read no whole index and no document for a fingerprint."""
    first = build(prefix)
    alone = PackedDataset(first.tokens, np.asarray(first.documents), PACKING, pad_token=first.pad_token)
    assert first.facts == alone.facts and first.fingerprint() == alone.fingerprint()
    monkeypatch.setattr(build_module, "measure_corpus", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(IndexedDataset, "_check_sequences", lambda self: pytest.fail("checked again"))
    again = build(prefix)
    assert again.facts == first.facts
    assert (pickle.loads(pickle.dumps(again)).sample(3).tokens == alone.sample(3).tokens).all()
    with pytest.raises(pytest.fail.Exception):
        build(prefix, which=1)


def test_a_rank_that_sees_other_data_measures_its_own(prefix: Path) -> None:
    """Same sizes, same name, same time of modification: ctime tells."""
    first, found = build(prefix).fingerprint(), os.stat(token_file(prefix))
    write_corpus(prefix, np.random.default_rng(1).integers(1, 40, 200), shift=1)
    os.utime(token_file(prefix), ns=(found.st_atime_ns, found.st_mtime_ns))
    assert os.stat(token_file(prefix)).st_size == found.st_size
    assert build(prefix).fingerprint() != first


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"longest": 3}'])
def test_corrupted_facts_are_named(prefix: Path, content: str) -> None:
    build(prefix)
    (file,) = prefix.parent.glob("cache/facts/*/facts.json")
    file.write_text(content)
    with pytest.raises(UserError, match=r"--data-cache-path: .*facts.* is broken"):
        build(prefix)


def test_a_command_fills_the_cache(prefix: Path, monkeypatch, capsys) -> None:
    """For a run of that many ranks: train.py then finds facts, split and indices of all epochs."""
    monkeypatch.setattr("data.dataset.MIN_STORED_PIECES", 0)
    cache = prefix.parent / "cache"
    words = f"--world-size 4 --epochs 3 --device cpu --cp-size 2 --data-path {prefix} --data-cache-path {cache}"
    words += " --tokenizer-type byte --seq-length 16 --seed 5 --global-batch-size 2 --data-split 3,1,0"
    assert index_main(words.split()) == 0
    assert "ready for 3 epochs" in capsys.readouterr().out
    stored = sorted(path.name for path in (cache / "packing").iterdir())
    monkeypatch.setattr(build_module, "measure_corpus", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr("data.dataset.build_epoch", lambda *_: pytest.fail("built again"))
    packing = replace(PACKING, seed=5, alignment=4)  # 2 * cp
    data = build_dataset(
        open_sources([str(prefix)], "text"), ByteTokenizer(), packing,
        split=SPLIT, which=0, flag="--data-path", cache_path=cache,
    )  # fmt: skip
    for n in range(3 * data.samples_per_epoch):
        data.sample(n)
    assert sorted(path.name for path in (cache / "packing").iterdir()) == stored


# ---------------------------------------------------------------------------------------------------
# Windows where an index would not fit


def test_windows_are_forced_on_a_corpus_of_many_documents(prefix: Path, monkeypatch) -> None:
    """Its fingerprint is another: no run from before resumes in another order."""
    few = build(prefix)
    monkeypatch.setattr(build_module, "MAX_TABLE_DOCUMENTS", 199)
    many = build(prefix)
    assert (few.packing.window, many.packing.window) == (None, FORCED_WINDOW)
    assert few.fingerprint() != many.fingerprint() and few.facts.lengths_hash == many.facts.lengths_hash
    assert "packed in windows of 100,000 documents" in describe_sequences(many)[0]
    assert "window" not in describe_sequences(few)[0]
    explicit = build_dataset(
        open_sources([str(prefix)], "text"), ByteTokenizer(), replace(PACKING, window=50),
        split=SPLIT, which=0, flag="--data-path", cache_path=prefix.parent / "cache",
    )  # fmt: skip
    assert explicit.fingerprint() == few.fingerprint()  # as before


# ---------------------------------------------------------------------------------------------------
# The next epoch's index


def test_the_next_epochs_index_is_built_ahead_by_one_process(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "corpus", np.full(10_000, 3))
    options = dict(split=(1.0, 0.0, 0.0), which=0, cache_path=tmp_path / "cache", pad_token=0)
    data = open_dataset(IndexedDataset(prefix), PACKING, builds_ahead=True, **options)
    data.sample(int(0.8 * data.samples_per_epoch))
    assert data._ahead == (0, None)
    data.sample(data.samples_per_epoch - 2)
    _, child = data._ahead
    data.sample(data.samples_per_epoch - 1)
    assert data._ahead == (1, child) and child is not None and child.wait(timeout=120) == 0
    folders = sorted((tmp_path / "cache/packing").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(folders) == 2
    wanted = build_epoch(data.lengths, PACKING, 1)
    assert np.array_equal(np.load(folders[1] / "pieces.npy"), wanted.pieces)  # type: ignore[union-attr]
    few = write_corpus(tmp_path / "few", np.full(100, 3))
    unstored = open_dataset(IndexedDataset(few), PACKING, builds_ahead=True, **options)
    unstored.sample(unstored.samples_per_epoch - 1)
    assert unstored._ahead == (1, None)


# ---------------------------------------------------------------------------------------------------
# Stages between the first and the last


class Unreadable(Tokens):
    """Tokens that may not be read."""

    def __init__(self, lengths: list[int]) -> None:
        super().__init__(lengths)
        del self.tokens

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        pytest.fail("read")


def stage_plan(**changes) -> BatchPlan:
    options = dict(batch_size=1, batch_rank=0, cp_size=2, cp_rank=1, qkv_format="thd", layout="zigzag")
    return BatchPlan(**(dict(batches=BatchSchedule.constant(4), micro_batch_size=2) | options | changes))


@pytest.mark.parametrize("packing", ["best-fit", "greedy", "concat"])
@pytest.mark.parametrize("pad_rows", ["full", "dynamic"])
def test_a_middle_stage_knows_its_rows_without_their_tokens(packing: str, pad_rows: str) -> None:
    lengths = np.random.default_rng(2).integers(1, 70, 30).tolist()
    whole = in_memory(lengths, seq_length=32, alignment=4, packing=packing)
    middle = in_memory(lengths, seq_length=32, alignment=4, packing=packing)
    middle.tokens = Unreadable(lengths)  # type: ignore[assignment]
    plan = stage_plan(pad_rows=pad_rows)
    for step in range(3):
        for number in range(2):
            want = MicrobatchDataset(BlendedDataset([whole, whole], [Mixture(0, [2, 1], [0, 1])]), plan)[(step, number)]
            got = MicrobatchDataset(
                BlendedDataset([middle, middle], [Mixture(0, [2, 1], [0, 1])]), replace(plan, reads_tokens=False)
            )[(step, number)]
            assert (got.loss_tokens, got.real_tokens) == (want.loss_tokens, want.real_tokens)
            assert got.tokens.shape == want.tokens.shape and set(got.tokens.tolist()) == {NOT_READ}
            assert set(got.labels.tolist()) == {NOT_READ}  # no label that the loss leaves out
            for name in ("lengths", "padded_lengths", "first_ids", "positions", "cu_seqlens", "cu_seqlens_padded"):
                assert getattr(got.packed_seq, name).tolist() == getattr(want.packed_seq, name).tolist()


def test_rows_that_are_compared_are_read_on_every_stage() -> None:
    data = in_memory([5, 40, 16, 9], seq_length=16, alignment=4)
    plan = stage_plan(hash_before_step=1)
    want, got = (MicrobatchDataset(data, replace(plan, reads_tokens=reads))[(0, 0)] for reads in (True, False))
    assert want.row_hash is not None and want.row_hash == got.row_hash and (want.tokens == got.tokens).all()


def test_the_first_and_the_last_stage_read_tokens(monkeypatch) -> None:
    monkeypatch.setattr("training.build.attention_cost", lambda _: 0.0)
    config = SimpleNamespace(
        training=SimpleNamespace(batches=BatchSchedule.constant(1), micro_batch_size=1),
        data=SimpleNamespace(qkv_format="thd", pad_rows="full", balance_work=True),
        parallel=SimpleNamespace(cp_layout="zigzag", pp_size=1, pp_schedule="1f1b"),
    )

    def reads(rank: int, size: int) -> bool:
        grid = SimpleNamespace(rank=lambda a: rank if a == "pp" else 0, size=lambda a: size if a == "pp" else 1)
        return build_batch_plan(config, None, grid).reads_tokens  # type: ignore[arg-type]

    assert [reads(rank, 4) for rank in range(4)] == [True, False, False, True]
    assert reads(0, 1) and reads(0, 2) and reads(1, 2)


def test_windows_read_lengths_without_readahead(prefix: Path, monkeypatch) -> None:
    """Of random documents: with readahead, a window of 100,000 in a large index would read 12 GiB."""
    seen, count = [], Windows.count_samples
    monkeypatch.setattr(Windows, "count_samples", lambda self: seen.append(tokens._is_random) or count(self))
    tokens = IndexedDataset(prefix)
    PackedDataset(tokens, np.arange(200), replace(PACKING, window=50), pad_token=0)
    assert seen == [True]
