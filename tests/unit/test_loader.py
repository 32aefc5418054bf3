"""Labels, tails and the order of samples, on a token file where token 100*d + i is token i of document d."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cp.packed_seq import IGNORE_LABEL
from data.batch import BatchPlan, build_batch
from data.batch_schedule import BatchSchedule
from data.dataset import PackedDataset
from data.indexed_dataset import IndexedDataset, write_indexed_dataset
from data.loader import DataError, build_loader, read_batches, translate_worker_death
from data.packing import PackingOptions

LENGTHS = [5, 40, 16, 1, 33, 8, 17, 4]
SEQ, ALIGNMENT, PAD = 16, 4, 9999


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> IndexedDataset:
    prefix = tmp_path_factory.mktemp("tokens") / "tokens"
    write_indexed_dataset(prefix, (np.arange(n) + 100 * d for d, n in enumerate(LENGTHS)), vocab_size=10000)
    return IndexedDataset(prefix)


def dataset(
    tokens: IndexedDataset, packing: str = "best-fit", cache: Path | None = None, seed: int = 1
) -> PackedDataset:
    return PackedDataset(
        tokens,
        np.arange(len(LENGTHS)),
        PackingOptions(seq_length=SEQ, method=packing, seed=seed, alignment=ALIGNMENT),
        pad_token=PAD,
        cache_path=cache,
    )


def test_labels_are_the_next_token_of_the_same_document(tokens: IndexedDataset) -> None:
    data = dataset(tokens)
    labelled = 0
    for n in range(data.samples_per_epoch):
        sequence = data.sample(n)
        assert sequence.padded_lengths.sum() == SEQ and (sequence.padded_lengths % ALIGNMENT == 0).all()
        at = 0
        for length, stored in zip(sequence.lengths, sequence.padded_lengths, strict=True):
            for i in range(at, at + stored):
                token, label = sequence.tokens[i], sequence.labels[i]
                if i >= at + length:
                    assert token == PAD and label == IGNORE_LABEL
                elif token % 100 == LENGTHS[token // 100] - 1:
                    assert label == IGNORE_LABEL  # the document's true end
                else:
                    assert label == token + 1  # also at a cut, one token ahead
                    labelled += 1
            at += stored
    assert labelled == sum(LENGTHS) - len(LENGTHS)


def test_a_tail_is_a_document_of_real_length_0(tokens: IndexedDataset) -> None:
    data = dataset(tokens)
    tails = [s for s in (data.sample(n) for n in range(data.samples_per_epoch)) if s.lengths[-1] == 0]
    assert tails and all((s.lengths[:-1] > 0).all() for s in tails)


def test_bshd_is_one_stream_whose_labels_cross_documents(tokens: IndexedDataset) -> None:
    data = dataset(tokens, "concat")
    crossings = 0
    for n in range(data.samples_per_epoch):
        sequence = data.sample(n)
        assert sequence.lengths.tolist() == sequence.padded_lengths.tolist() == [SEQ]
        assert (sequence.labels[:-1] == sequence.tokens[1:]).all() and IGNORE_LABEL not in sequence.labels
        if n + 1 < data.samples_per_epoch:
            assert sequence.labels[-1] == data.sample(n + 1).tokens[0]
        crossings += int((sequence.labels // 100 != sequence.tokens // 100).sum())
    assert crossings >= 3


def plan(batch_size: int, batch_rank: int, micro: int, global_batch: int = 12, cp: int = 1) -> BatchPlan:
    return BatchPlan(
        batches=BatchSchedule.constant(global_batch), micro_batch_size=micro, batch_size=batch_size,
        batch_rank=batch_rank, cp_size=cp, cp_rank=0, qkv_format="thd", layout="zigzag",
    )  # fmt: skip


@pytest.mark.parametrize(("batch_size", "micro"), [(1, 1), (1, 12), (2, 3), (4, 3), (3, 2), (12, 1)])
def test_every_plan_reads_the_steps_sequences_once(batch_size: int, micro: int) -> None:
    for step in (0, 7):
        read = []
        for rank in range(batch_size):
            p = plan(batch_size, rank, micro)
            for row in p.assign_samples(step, np.ones(12)):
                read += row
        assert sorted(read) == list(range(12 * step, 12 * (step + 1)))


def same(a, b) -> bool:
    pairs = [(a.tokens, b.tokens), (a.labels, b.labels), (a.packed_seq.positions, b.packed_seq.positions)]
    return (
        all(torch.equal(x, y) for x, y in pairs) and a.loss_tokens == b.loss_tokens and a.real_tokens == b.real_tokens
    )


def batches(data: PackedDataset, workers: int, first: int = 0, last: int = 5, **options) -> list:
    loader = build_loader(
        data, plan(1, 0, 1, 2, cp=2), steps=range(first, last), num_workers=workers, pin_memory=False, **options
    )
    return list(loader)


def test_workers_and_a_later_start_give_the_same_batches(tokens: IndexedDataset, tmp_path: Path) -> None:
    data = dataset(tokens, cache=tmp_path)
    here = batches(data, 0)
    assert len(here) == 10  # more than an epoch
    assert all(same(a, b) for a, b in zip(here, batches(data, 2), strict=True))
    assert all(same(a, b) for a, b in zip(here[6:], batches(data, 0, first=3), strict=True))


def test_an_epochs_index_is_cached_once(tokens: IndexedDataset, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("data.dataset.MIN_STORED_PIECES", 0)
    first = dataset(tokens, cache=tmp_path).sample(0)
    monkeypatch.setattr("data.packing.pack_epoch", lambda *_, **__: pytest.fail("built again"))
    again = dataset(tokens, cache=tmp_path).sample(0)
    assert (first.tokens == again.tokens).all()
    monkeypatch.undo()
    assert not (
        dataset(tokens, cache=tmp_path, seed=2).epoch(0).pieces == dataset(tokens, cache=tmp_path).epoch(0).pieces
    ).all()


@pytest.mark.parametrize("packing", ["best-fit", "greedy", "concat"])
@pytest.mark.parametrize("id_", [-1, IGNORE_LABEL, 500, 2**31 - 1, -(2**31)])
def test_ids_outside_the_vocabulary_are_named_wherever_they_are_read(tmp_path: Path, packing: str, id_: int) -> None:
    """As a token, as a label only (one token ahead of a cut), and in any of a row's documents."""
    for document, at in ((1, 0), (1, 16), (1, 39), (4, 7), (7, 3)):
        ids = [np.arange(n, dtype=np.int64) for n in LENGTHS]
        ids[document][at] = id_
        write_indexed_dataset(tmp_path / "t", ids, vocab_size=100_000)
        data = PackedDataset(
            IndexedDataset(tmp_path / "t"),
            np.arange(len(LENGTHS)),
            PackingOptions(seq_length=SEQ, method=packing, seed=1, alignment=ALIGNMENT),
            pad_token=0,
            vocab_size=500,
        )
        faults = []
        for n in range(data.samples_per_epoch):
            held = [(int(data.documents[d]), s, length) for d, s, length in data.epoch(0).sample_pieces(n).tolist()]
            ahead = 0 if packing == "concat" else 1
            if any(d == document and s <= at < min(s + length + ahead, LENGTHS[d]) for d, s, length in held):
                with pytest.raises(
                    ValueError, match=rf"t\.bin: token {id_} in document {document}, but the tokenizer's are 0 to 499"
                ):
                    data.sample(n)
                faults.append(n)
            else:
                data.sample(n)
        assert faults or packing == "concat"  # whose stream's end is left over


@pytest.mark.parametrize("packing", ["best-fit", "greedy", "concat"])
@pytest.mark.parametrize("pad_rows", ["full", "dynamic"])
def test_labelled_tokens_are_counted_as_they_are(tokens: IndexedDataset, packing: str, pad_rows: str) -> None:
    data = dataset(tokens, packing)
    options = dict(cp_size=1, cp_rank=0, qkv_format="thd", layout="zigzag", pad_rows=pad_rows)
    for n in range(data.samples_per_epoch):
        row = build_batch([data.sample(n), data.empty_sample(), data.sample(n + 1)], **options)
        assert row.loss_tokens == int((row.labels != IGNORE_LABEL).sum()) > 0


def test_sequences_beyond_the_limit_are_empty(tokens: IndexedDataset) -> None:
    data = dataset(tokens)
    whole = batches(data, 0, last=1, limit=1)
    assert whole[0].loss_tokens > 0 and whole[1].loss_tokens == whole[1].real_tokens == 0


def test_a_row_of_several_sequences_is_their_concatenation(tokens: IndexedDataset) -> None:
    data = dataset(tokens)
    parts = [data.sample(n) for n in (0, 1)]
    row = build_batch(parts, cp_size=1, cp_rank=0, qkv_format="thd", layout="zigzag")
    assert row.tokens.tolist() == parts[0].tokens.tolist() + parts[1].tokens.tolist()
    assert row.packed_seq.row_length == 2 * SEQ


def test_dynamic_rows_hold_the_same_documents_without_tails(tokens: IndexedDataset) -> None:
    data = dataset(tokens)
    options = dict(cp_size=2, cp_rank=0, qkv_format="thd", layout="zigzag")
    sequences = [data.sample(n) for n in range(data.samples_per_epoch)]
    full = build_batch(sequences, **options)
    short = build_batch(sequences, pad_rows="dynamic", **options)
    real = full.packed_seq.lengths > 0
    assert short.packed_seq.lengths.tolist() == full.packed_seq.lengths[real].tolist()
    assert short.packed_seq.row_length < full.packed_seq.row_length and short.packed_seq.row_length % 4 == 0
    assert (short.loss_tokens, short.real_tokens) == (full.loss_tokens, full.real_tokens)
    kept = full.labels != IGNORE_LABEL
    assert short.labels[short.labels != IGNORE_LABEL].tolist() == full.labels[kept].tolist()
    assert short.tokens[short.labels != IGNORE_LABEL].tolist() == full.tokens[kept].tolist()
    empty = build_batch([data.empty_sample()], pad_rows="dynamic", **options)
    assert empty.packed_seq.row_length == 4 and empty.loss_tokens == 0


def test_row_hashes_differ_between_rows(tokens: IndexedDataset) -> None:
    data = dataset(tokens)

    def row_hash(n: int, cp_rank: int = 0, changed: bool = False) -> int | None:
        s = data.sample(n)
        if changed:
            s.labels[3] += 1
        return build_batch([s], cp_size=2, cp_rank=cp_rank, qkv_format="thd", layout="zigzag", hash_row=True).row_hash

    assert row_hash(0, 0) == row_hash(0, 1) is not None
    assert row_hash(0) != row_hash(1) and row_hash(0) != row_hash(0, changed=True)


def test_a_worker_that_dies_while_the_rank_computes_is_reported_the_same(tokens: IndexedDataset) -> None:
    """PyTorch raises from its handler of SIGCHLD, so in the middle of whatever the rank does, not where it asks for a
    batch.
    """
    plan = BatchPlan(
        batches=BatchSchedule.constant(2),
        micro_batch_size=1,
        batch_size=1,
        batch_rank=0,
        cp_size=1,
        cp_rank=0,
        qkv_format="thd",
        layout="zigzag",
    )
    before = set(multiprocessing.active_children())
    with pytest.raises(DataError, match=r"a data worker died.*--num-workers 0"), translate_worker_death():
        batches = read_batches(build_loader(dataset(tokens), plan, steps=range(1000), num_workers=1, pin_memory=False))
        next(batches)
        (worker,) = set(multiprocessing.active_children()) - before
        worker.kill()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            sum(range(1000))
    with pytest.raises(RuntimeError, match="something else"), translate_worker_death():
        raise RuntimeError("something else")


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError()])
def test_a_worker_that_dies_while_it_sends_a_batch_is_reported_the_same(error: Exception) -> None:
    """The pipe to a dead worker may end before SIGCHLD arrives."""

    def loader():
        yield "a batch"
        raise error

    batches = read_batches(loader())  # type: ignore[arg-type]
    assert next(batches) == "a batch"
    with pytest.raises(DataError, match=r"a data worker died.*--num-workers 0"):
        next(batches)


@pytest.mark.parametrize("has_shared_memory", [True, False])
def test_a_dead_worker_names_what_may_be_full(tmp_path: Path, monkeypatch, has_shared_memory: bool) -> None:
    """Docker gives /dev/shm 64 MiB, and a write beyond them is a bus error."""
    monkeypatch.setattr("data.loader.SHARED_MEMORY", tmp_path if has_shared_memory else tmp_path / "none")
    death = "DataLoader worker (pid 5) is killed by signal: Bus error.\nIt is possible that ..."
    with pytest.raises(DataError, match=r"Bus error.*--num-workers 0") as caught, translate_worker_death():
        raise RuntimeError(death)
    assert "\n" not in str(caught.value)
    assert (f"of {tmp_path}, which holds" in str(caught.value)) is has_shared_memory
