"""Epochs, from lengths to batches: best-fit against a naive one, every token once, steps that no setting moves."""

from __future__ import annotations

import errno
import pickle
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cp.packed_seq import IGNORE_LABEL
from data.batch import BatchPlan
from data.batch_schedule import BatchSchedule
from data.dataset import PackedDataset
from data.indexed_dataset import IndexedDataset, write_indexed_dataset
from data.loader import build_loader
from data.packing import PackingOptions, best_fit_decreasing, concat_epoch, cut_documents, pack_epoch
from tests.unit.test_packed_rows import Tokens, dataset
from utils.files import CacheNotWritable


def naive_best_fit(sizes: list[int], capacity: int) -> list[int]:
    """Free room of every bin at the end, sorted; bins searched one by one."""
    free: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [index for index, room in enumerate(free) if room >= size]
        if fitting:
            free[min(fitting, key=lambda index: free[index])] -= size
        else:
            free.append(capacity - size)
    return sorted(free)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.sampled_from([30, 31, 64]), st.randoms())
@settings(max_examples=200, deadline=None)
def test_best_fit_equals_a_naive_one(sizes: list[int], capacity: int, random) -> None:
    random.shuffle(sizes)
    bins = best_fit_decreasing(np.array(sizes), capacity)
    load = np.bincount(bins, weights=sizes)
    assert sorted(capacity - load) == naive_best_fit(sizes, capacity)


def test_the_fullest_bin_is_taken() -> None:
    """Worst-fit would put the 3 beside the 4 and need a third bin."""
    assert best_fit_decreasing(np.array([7, 4, 3, 2, 2, 2]), 10).max() == 1


def test_padding_is_nearly_nothing_on_a_long_tailed_corpus() -> None:
    """Alignment costs what it costs; packing adds less than a thousandth."""
    lengths = np.random.default_rng(5).lognormal(np.log(600), 1.5, 30000).astype(np.int64) + 1
    rows = len(pack_epoch(lengths, seed=3, epoch=2, seq_length=8192, alignment=8))
    stored = (-(-cut_documents(lengths, 8192).length // 8) * 8).sum()
    assert rows / -(-stored // 8192) < 1.001


@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=25),
    units=st.integers(1, 8),
    alignment=st.sampled_from([1, 2, 8]),
    epoch=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_an_epoch_reads_every_token_and_labels_every_token_but_the_ends(
    lengths, units: int, alignment: int, epoch: int
) -> None:
    data = dataset(lengths, seq_length=units * alignment, alignment=alignment)
    count = data.samples_per_epoch
    tokens: Counter = Counter()
    labelled: Counter = Counter()
    for n in range(epoch * count, (epoch + 1) * count):
        s = data.sample(n)
        assert len(s.tokens) == len(s.labels) == s.padded_lengths.sum() == units * alignment
        assert (s.padded_lengths > 0).all() and (s.lengths[:-1] > 0).all()  # no empty document but a tail
        at = 0
        for length, stored in zip(s.lengths, s.padded_lengths, strict=True):
            tokens.update(s.tokens[at : at + length].tolist())
            assert stored - length < alignment or length == 0
            assert (s.labels[at + length : at + stored] == IGNORE_LABEL).all()
            at += stored
        counted = s.labels != IGNORE_LABEL
        assert (s.labels[counted] == s.tokens[counted] + 1).all()
        labelled.update(s.tokens[counted].tolist())
    total, ends = sum(lengths), np.cumsum(lengths) - 1
    assert tokens == Counter(range(total))
    assert labelled == Counter(set(range(total)) - set(ends.tolist()))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(1, 32), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_a_stream_is_read_end_to_end(lengths, seq_length: int, number: int) -> None:
    data = dataset(lengths, seq_length=seq_length, alignment=1, packing="concat")
    epoch = concat_epoch(np.array(lengths), seed=3, epoch=number, seq_length=seq_length)
    assert data.samples_per_epoch == len(epoch) == (sum(lengths) - 1) // seq_length
    first = Tokens(lengths).first
    stream = np.concatenate([np.arange(lengths[d]) + first[d] for d in epoch.documents])
    for n in range(len(epoch)):
        s = data.sample(number * len(epoch) + n)
        assert s.tokens.tolist() == stream[n * seq_length : (n + 1) * seq_length].tolist()
        assert s.labels.tolist() == stream[n * seq_length + 1 : (n + 1) * seq_length + 1].tolist()
    assert epoch.left_over == len(stream) - len(epoch) * seq_length >= 1


def test_edges() -> None:
    nothing = np.array([], np.int64)
    packed = pack_epoch(nothing, seed=0, epoch=0, seq_length=8, alignment=2)
    assert (len(packed), packed.pieces.shape) == (0, (0, 3))
    stream = concat_epoch(nothing, seed=0, epoch=0, seq_length=8)
    assert (len(stream), stream.left_over) == (0, 0)
    one = pack_epoch(np.array([8]), seed=0, epoch=0, seq_length=8, alignment=2)
    assert one.sample_pieces(0).tolist() == [[0, 0, 8]]  # exactly full: no tail
    assert dataset([8], seq_length=8, alignment=2).sample(0).lengths.tolist() == [8]
    assert cut_documents(np.array([0, 3]), 8).length.tolist() == [3]  # a document without tokens is no piece


# ---------------------------------------------------------------------------------------------------
# Batches of a step

LENGTHS = [5, 40, 16, 1, 33, 8, 17, 4, 90, 2, 2, 61, 30]
GLOBAL_BATCH = 6


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> IndexedDataset:
    prefix = tmp_path_factory.mktemp("tokens") / "tokens"
    first = np.cumsum(LENGTHS) - LENGTHS
    write_indexed_dataset(prefix, (np.arange(n) + f for n, f in zip(LENGTHS, first, strict=True)), vocab_size=2000)
    return IndexedDataset(prefix)


def on_disk(tokens: IndexedDataset, cache: Path | None = None, **changes) -> PackedDataset:
    packing = PackingOptions(**(dict(seq_length=16, method="best-fit", alignment=4, seed=1) | changes))
    return PackedDataset(tokens, np.arange(len(LENGTHS)), packing, pad_token=1999, cache_path=cache)


def step_contents(
    data: PackedDataset, step: int, *, batch_size: int, micro: int, cp_size: int, workers: int = 0
) -> Counter:
    """(position, token, target) of everything that the grid reads in a step."""
    held: Counter = Counter()
    for batch_rank in range(batch_size):
        for cp_rank in range(cp_size):
            plan = BatchPlan(
                batches=BatchSchedule.constant(GLOBAL_BATCH),
                micro_batch_size=micro,
                batch_size=batch_size,
                batch_rank=batch_rank,
                cp_size=cp_size,
                cp_rank=cp_rank,
                qkv_format="thd",
                layout="zigzag",
            )
            loader = build_loader(data, plan, steps=[step], num_workers=workers, pin_memory=False)
            batches = list(loader)
            assert len(batches) == len(loader) == GLOBAL_BATCH // (micro * batch_size)
            for batch in batches:
                held.update(
                    zip(batch.packed_seq.positions.tolist(), batch.tokens.tolist(), batch.labels.tolist(), strict=True)
                )
    return held


@pytest.mark.parametrize("step", [0, 2, 5])
def test_a_steps_tokens_do_not_depend_on_how_it_is_spread(tokens: IndexedDataset, step: int) -> None:
    data = on_disk(tokens)
    assert data.samples_per_epoch % GLOBAL_BATCH, "a step should straddle two epochs"
    wanted = step_contents(data, step, batch_size=1, micro=1, cp_size=1)
    assert wanted.total() == GLOBAL_BATCH * 16
    for batch_size, micro, cp_size in ((1, 6, 1), (2, 3, 1), (3, 1, 2), (6, 1, 1), (2, 1, 2), (1, 2, 2)):
        assert step_contents(on_disk(tokens), step, batch_size=batch_size, micro=micro, cp_size=cp_size) == wanted


def test_a_step_does_not_depend_on_what_was_read_before(tokens: IndexedDataset) -> None:
    forwards, backwards = on_disk(tokens), on_disk(tokens)
    numbers = range(3 * forwards.samples_per_epoch)
    want = {n: forwards.sample(n).tokens.tolist() for n in numbers}
    assert {n: backwards.sample(n).tokens.tolist() for n in reversed(numbers)} == want


def test_a_step_over_an_epochs_border_builds_each_index_once(tokens: IndexedDataset, monkeypatch) -> None:
    data, built = on_disk(tokens), []
    load = PackedDataset._load_epoch
    monkeypatch.setattr(PackedDataset, "_load_epoch", lambda self, n: built.append(n) or load(self, n))
    border = data.samples_per_epoch
    for n in (border - 1, border, border - 2, border + 1, 2 * border, border + 2, 2 * border + 1):
        data.sample(n)
    assert built == [1, 2]  # epoch 0 is there from the start


def test_a_worker_reads_the_same(tokens: IndexedDataset, tmp_path: Path) -> None:
    data = on_disk(tokens, tmp_path)
    data.sample(0)
    copy = pickle.loads(pickle.dumps(data))  # as a spawned worker gets it: names, not maps
    assert copy.samples_per_epoch == data.samples_per_epoch
    for n in (0, data.samples_per_epoch + 1):
        assert (copy.sample(n).tokens == data.sample(n).tokens).all()
    assert len(pickle.dumps(data)) < 10_000
    assert step_contents(data, 1, batch_size=1, micro=1, cp_size=1, workers=1) == step_contents(
        data, 1, batch_size=1, micro=1, cp_size=1
    )


def test_epochs_of_different_data_or_shape_never_share_a_cache(
    tokens: IndexedDataset, tmp_path: Path, monkeypatch
) -> None:
    """Each of these packs otherwise; a key that left one out would hand back another's index."""
    monkeypatch.setattr("data.dataset.MIN_STORED_PIECES", 0)
    built = {}
    for changes in ({}, {"seq_length": 32}, {"alignment": 8}, {"seed": 2}):
        data = on_disk(tokens, tmp_path, **changes)
        for number in (0, 1):
            index = data.epoch(number)
            alone = on_disk(tokens, None, **changes).epoch(number)
            assert (index.pieces == alone.pieces).all() and (index.first == alone.first).all()
            built[(str(changes), number)] = index.pieces.tobytes()
    assert len(set(built.values())) == len(built) == len(list((tmp_path / "packing").iterdir()))
    other = PackedDataset(
        tokens,
        np.array([1, 4]),
        PackingOptions(seq_length=16, method="best-fit", seed=1, alignment=4),
        pad_token=0,
        cache_path=tmp_path,
    )
    assert set(other.epoch(0).pieces[:, 0].tolist()) == {0, 1}


def test_packings_and_windows_never_share_a_cache(tokens: IndexedDataset, tmp_path: Path, monkeypatch) -> None:
    """Greedy, and one stream of documents that need no alignment, store arrays of the same names."""
    monkeypatch.setattr("data.dataset.MIN_STORED_PIECES", 0)
    packings = [{"method": p, "alignment": 1} for p in ("best-fit", "greedy", "concat")]
    for changes in (*packings, {"window": 3}, {"window": 5}, {"window": 5, "seed": 2}, {"window": 5, "alignment": 8}):
        data, alone = (on_disk(tokens, cache, **changes) for cache in (tmp_path, None))
        assert data.samples_per_epoch == alone.samples_per_epoch
        for n in range(2 * alone.samples_per_epoch):
            assert (data.sample(n).tokens == alone.sample(n).tokens).all()
    assert len(list((tmp_path / "packing").iterdir())) == 3 * 2 + 4


def test_small_epochs_are_not_stored(tokens: IndexedDataset, tmp_path: Path) -> None:
    """A source of a few documents may be read for thousands of epochs."""
    for packing in ("best-fit", "greedy", "concat"):
        data = on_disk(tokens, tmp_path, method=packing)
        for number in range(20):
            data.epoch(number)
    assert not (tmp_path / "packing").exists()


@pytest.mark.parametrize(("packing", "pieces"), [("best-fit", 27), ("greedy", 13), ("concat", 13)])
def test_epochs_are_stored_from_so_many_pieces(
    tokens: IndexedDataset, tmp_path: Path, monkeypatch, packing: str, pieces: int
) -> None:
    for least, stored in ((pieces + 1, False), (pieces, True)):
        monkeypatch.setattr("data.dataset.MIN_STORED_PIECES", least)
        data = on_disk(tokens, tmp_path / str(least), method=packing)
        assert len(getattr(data.epoch(0), "pieces" if packing == "best-fit" else "documents")) == pieces
        assert (tmp_path / str(least)).exists() == stored


@pytest.mark.parametrize("packing", ["best-fit", "greedy", "concat"])
@pytest.mark.parametrize("why", ["read-only", "full disk"])
def test_a_cache_that_cannot_be_written_does_not_end_a_run_at_an_epochs_border(
    tokens: IndexedDataset, tmp_path: Path, monkeypatch, packing: str, why: str
) -> None:
    """Later epochs are built in memory: the same rows, also in workers. The first is refused at the start, where that
    costs nothing.
    """
    monkeypatch.setattr("data.dataset.MIN_STORED_PIECES", 0)
    count = on_disk(tokens, tmp_path, method=packing).samples_per_epoch  # fills it with the first epoch
    if why == "read-only":
        refuse = Mock(side_effect=PermissionError(errno.EACCES, "Permission denied"))
        monkeypatch.setattr("utils.files._remove_abandoned", refuse)  # the first write of a new entry
    else:
        monkeypatch.setattr(np, "save", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    data, free = on_disk(tokens, tmp_path, method=packing), on_disk(tokens, None, method=packing)
    for n in range(3 * count):
        assert (data.sample(n).tokens == free.sample(n).tokens).all()
    steps = step_contents(free, count // GLOBAL_BATCH + 1, batch_size=1, micro=1, cp_size=1)
    assert step_contents(data, count // GLOBAL_BATCH + 1, batch_size=1, micro=1, cp_size=1, workers=1) == steps
    assert len(list((tmp_path / "packing").glob("[!.]*"))) == 1
    with pytest.raises((CacheNotWritable, OSError)):
        on_disk(tokens, tmp_path, method=packing, seed=9)


@pytest.mark.parametrize("packing", ["best-fit", "greedy", "concat", "windows"])
@pytest.mark.parametrize("how", ["missing", "empty", "cut", "zeroed", "other"])
def test_a_corrupted_index_is_named(
    tokens: IndexedDataset, tmp_path: Path, monkeypatch, packing: str, how: str
) -> None:
    monkeypatch.setattr("data.dataset.MIN_STORED_PIECES", 0)
    changes = {"window": 4} if packing == "windows" else {"method": packing}
    on_disk(tokens, tmp_path, **changes)
    (folder,) = (tmp_path / "packing").iterdir()
    for file in list(folder.iterdir()):
        content = file.read_bytes()
        if how == "missing":
            file.unlink()
        elif how == "other":
            np.save(file, np.load(file)[:-1])
        else:
            file.write_bytes({"empty": b"", "cut": content[:-8], "zeroed": bytes(len(content))}[how])
        with pytest.raises(ValueError, match=r"--data-cache-path: .* is broken .*remove that folder") as refused:
            on_disk(tokens, tmp_path, **changes)
        assert str(folder) in str(refused.value) and "\n" not in str(refused.value)
        file.write_bytes(content)
    on_disk(tokens, tmp_path, **changes)


def test_fingerprints_depend_on_content_and_documents(tmp_path: Path) -> None:
    """Lengths alone are not enough: another tokenizer gives similar ones."""
    for name, shift in (("a", 0), ("b", 1)):
        write_indexed_dataset(tmp_path / name, (np.arange(n) + shift for n in LENGTHS), vocab_size=2000)
    a, b = (IndexedDataset(tmp_path / name) for name in "ab")
    assert on_disk(a).fingerprint() == on_disk(a).fingerprint() != on_disk(b).fingerprint()
    changed = np.fromfile(tmp_path / "a.bin", np.uint16)
    changed[sum(LENGTHS[:8])] += 1  # the first token of a document in the middle
    changed.tofile(tmp_path / "b.bin")
    assert on_disk(IndexedDataset(tmp_path / "b")).fingerprint() != on_disk(a).fingerprint()
    for name, more in (("c", 0), ("d", 1)):  # beyond the first 64 tokens of documents
        write_indexed_dataset(tmp_path / name, [np.arange(n + more) for n in (70, 90)], vocab_size=2000)
    ends = [
        PackedDataset(
            IndexedDataset(tmp_path / name),
            np.arange(2),
            PackingOptions(seq_length=16, method="best-fit", seed=1, alignment=4),
            pad_token=0,
        ).fingerprint()
        for name in "cd"
    ]
    assert ends[0] != ends[1]
    some = [
        PackedDataset(
            a, np.array(d), PackingOptions(seq_length=16, method="best-fit", seed=1, alignment=4), pad_token=0
        ).fingerprint()
        for d in ([0, 1], [1, 0], [0, 2], [0])
    ]
    assert len(set(some)) == 4


def test_a_split_reads_its_own_documents(tokens: IndexedDataset) -> None:
    """Pieces count documents within the split; the file counts them over all."""
    data = PackedDataset(
        tokens, np.array([2, 6]), PackingOptions(seq_length=16, method="best-fit", seed=1, alignment=4), pad_token=1999
    )
    read = {int(t) for n in range(data.samples_per_epoch) for t in data.sample(n).tokens} - {1999}
    first = np.cumsum(LENGTHS) - LENGTHS
    assert read == {*range(first[2], first[2] + LENGTHS[2]), *range(first[6], first[6] + LENGTHS[6])}


def test_an_empty_sample_counts_nothing(tokens: IndexedDataset) -> None:
    data = on_disk(tokens)
    empty = data.empty_sample()
    assert (empty.labels == IGNORE_LABEL).all() and (empty.tokens == 1999).all()
    assert empty.lengths.tolist() == [0] and empty.padded_lengths.tolist() == [16]


def test_rows_are_hashed_before_a_step_and_not_after(tokens: IndexedDataset) -> None:
    plan = BatchPlan(
        batches=BatchSchedule.constant(2),
        micro_batch_size=1,
        batch_size=1,
        batch_rank=0,
        cp_size=1,
        cp_rank=0,
        qkv_format="thd",
        layout="zigzag",
        hash_before_step=2,
    )
    batches = list(build_loader(on_disk(tokens), plan, steps=range(3), num_workers=0, pin_memory=False))
    assert [b.row_hash is not None for b in batches] == [True, True, True, True, False, False]
    hashes = torch.tensor(
        [b.row_hash for b in batches[:4]], dtype=torch.int64
    )  # signed 64 bits: ranks exchange them as such
    assert len(set(hashes.tolist())) == 4
