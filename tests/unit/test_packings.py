"""Greedy, concat and windowed packing: nothing lost, nothing twice, rows full, the same whatever is read first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cp.packed_seq import IGNORE_LABEL
from data.packing import (
    PackingOptions,
    Windows,
    best_fit_decreasing,
    concat_epoch,
    greedy_epoch,
    mixed_order,
    pack_epoch,
    windowed_epoch,
)
from tests.unit.test_packed_rows import dataset
from tests.unit.test_packing import covered, log_normal

lengths_lists = st.lists(st.integers(0, 90), min_size=1, max_size=40).filter(any)


def windows_of(window: int, **options: int) -> PackingOptions:
    return PackingOptions(method="best-fit", window=window, **options)


def all_pieces(epoch) -> np.ndarray:
    return np.concatenate([epoch.sample_pieces(n) for n in range(len(epoch))])


@given(lengths_lists, st.sampled_from([1, 2, 8]), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_greedy_keeps_order_and_leaves_room_in_the_last_sequence_only(
    lengths: list[int], alignment: int, units: int, epoch: int
) -> None:
    seq_length = 8 * units
    index = greedy_epoch(np.array(lengths), seed=5, epoch=epoch, seq_length=seq_length, alignment=alignment)
    pieces = all_pieces(index)
    covered(pieces, np.array(lengths))
    order = [d for d in index.documents.tolist() if lengths[d]]
    assert list(dict.fromkeys(pieces[:, 0].tolist())) == order  # in the epoch's order, each in consecutive pieces
    for n in range(len(index)):
        stored = int((-(-index.sample_pieces(n)[:, 2] // alignment) * alignment).sum())
        assert stored == seq_length or (n == len(index) - 1 and 0 < stored < seq_length)


@pytest.mark.parametrize("epochs", [range(4)])
def test_every_epoch_has_as_many_sequences(epochs: range) -> None:
    lengths = log_normal(500)
    counts = {len(greedy_epoch(lengths, seed=1, epoch=e, seq_length=1024, alignment=8)) for e in epochs}
    windows = Windows(lambda d: lengths[d], len(lengths), windows_of(64, seed=1, seq_length=1024, alignment=8))
    assert len(counts) == 1 and len({len(windowed_epoch(windows, windows.count_samples(), e)) for e in epochs}) == 1


@given(lengths_lists, st.integers(1, 50), st.integers(0, 2))
@settings(max_examples=100, deadline=None)
def test_windows_hold_every_token_once(lengths: list[int], window: int, epoch: int) -> None:
    array = np.array(lengths)
    windows = Windows(lambda d: array[d], len(array), windows_of(window, seed=3, seq_length=32, alignment=4))
    index = windowed_epoch(windows, windows.count_samples(), epoch)
    covered(all_pieces(index), array)
    backwards = windowed_epoch(windows, windows.count_samples(), epoch)
    for n in reversed(range(len(index))):
        assert (backwards.sample_pieces(n) == index.sample_pieces(n)).all()


def test_epochs_of_windows_differ_and_are_nearly_as_full() -> None:
    lengths = log_normal(20000)
    windows = Windows(lambda d: lengths[d], len(lengths), windows_of(4096, seed=3, seq_length=8192, alignment=8))
    counts = windows.count_samples()
    whole = len(pack_epoch(lengths, seed=3, epoch=0, seq_length=8192, alignment=8))
    assert counts.sum() <= 1.005 * whole
    first, second = (windowed_epoch(windows, counts, e) for e in (0, 1))
    partners = [{frozenset(e.sample_pieces(n)[:, 0].tolist()) for n in range(200)} for e in (first, second)]
    assert len(partners[0] & partners[1]) < 10


def test_every_seed_and_epoch_has_an_order_of_its_own() -> None:
    lengths, options = log_normal(300), dict(seq_length=1024)
    for build, more in ((greedy_epoch, {"alignment": 8}), (concat_epoch, {})):
        orders = [build(lengths, seed=s, epoch=e, **options, **more).documents.tolist() for s in (1, 2) for e in (0, 1)]
        assert len({tuple(o) for o in orders}) == 4 and all(sorted(o) == list(range(300)) for o in orders)
        assert orders[0] == build(lengths, seed=1, epoch=0, **options, **more).documents.tolist()


def test_windows_follow_the_seed(monkeypatch) -> None:
    """The seed decides the documents of a window, the order of windows, and which documents share a sample."""
    lengths = log_normal(600)

    def windows(seed: int) -> Windows:
        return Windows(lambda d: lengths[d], len(lengths), windows_of(60, seed=seed, seq_length=1024, alignment=8))

    assert set(windows(1).pack(0, 0).pieces[:, 0].tolist()) != set(windows(2).pack(0, 0).pieces[:, 0].tolist())
    orders = [windowed_epoch(windows(s), windows(s).count_samples(), e).order.tolist() for s in (1, 2) for e in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    monkeypatch.setattr("data.packing.mixed_order", lambda count, seed: lambda places: places)
    packed = [windows(s).pack(0, e).pieces.tobytes() for s in (1, 2) for e in (0, 1)]
    assert len(set(packed)) == 4 and packed[0] == windows(1).pack(0, 0).pieces.tobytes()


@given(st.integers(1, 3000), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_the_order_without_memory_is_a_permutation(count: int, seed: int) -> None:
    order = mixed_order(count, seed)
    places = order(np.arange(count))
    assert sorted(places.tolist()) == list(range(count))
    assert order(np.array([count - 1])).tolist() == [places[-1]]


def test_the_order_without_memory_is_mixed() -> None:
    places = mixed_order(10000, 1)(np.arange(10000))
    assert abs(np.corrcoef(places, np.arange(10000))[0, 1]) < 0.05
    assert (np.abs(np.diff(places)) < 10).mean() < 0.01
    assert (places != mixed_order(10000, 2)(np.arange(10000))).mean() > 0.99


def one_by_one(sizes: np.ndarray, capacity: int) -> list[int]:
    """Best fit item by item; of equally full bins the one that was touched last."""
    order = np.argsort(-sizes, kind="stable")
    stacks: dict[int, list[int]] = {}
    bins, result = 0, np.empty(len(sizes), int)
    for item in order.tolist():
        size = int(sizes[item])
        gaps = [gap for gap, stack in stacks.items() if stack and gap >= size]
        gap = min(gaps, default=None)
        if gap is None:
            gap, chosen, bins = capacity, bins, bins + 1
        else:
            chosen = stacks[gap].pop()
        result[item] = chosen
        stacks.setdefault(gap - size, []).append(chosen) if gap > size else None
    return result.tolist()


@given(st.lists(st.integers(1, 24), max_size=80), st.sampled_from([24, 25, 60]))
@settings(max_examples=300, deadline=None)
def test_items_of_one_size_at_once_are_placed_as_one_by_one(sizes: list[int], capacity: int) -> None:
    """Golden losses depend on which documents share a sample."""
    assert best_fit_decreasing(np.array(sizes, int), capacity).tolist() == one_by_one(np.array(sizes, int), capacity)


@pytest.mark.parametrize("count", [128, 129, 300])
def test_bins_are_counted_beyond_the_narrow_dtype(monkeypatch, count: int) -> None:
    """At 2^31 bins int32 ends; here int8 ends at 2^7."""
    monkeypatch.setattr("data.packing.BIN_DTYPES", (np.int8, np.int64))
    bin_of = best_fit_decreasing(np.full(count, 10), 10)
    assert sorted(bin_of.tolist()) == list(range(count)) and bin_of.dtype == (np.int8 if count == 128 else np.int64)
    lengths = np.full(count, 10)
    wanted = pack_epoch(lengths, seed=1, epoch=0, seq_length=10, alignment=1).pieces
    monkeypatch.undo()
    assert (pack_epoch(lengths, seed=1, epoch=0, seq_length=10, alignment=1).pieces == wanted).all()


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=20),
    packing=st.sampled_from(["best-fit", "greedy", "windowed"]),
    alignment=st.sampled_from([1, 4]),
)
@settings(max_examples=100, deadline=None)
def test_every_token_and_every_label_once_an_epoch(lengths: list[int], packing: str, alignment: int) -> None:
    options = {"packing": "best-fit", "window": 3} if packing == "windowed" else {"packing": packing}
    data = dataset(lengths, seq_length=16, alignment=alignment, **options)
    first = np.cumsum(lengths) - lengths
    tokens, labels = [], []
    for n in range(data.samples_per_epoch):
        s = data.sample(n)
        assert s.padded_lengths.sum() == 16 and (np.cumsum(s.padded_lengths) > 0).all() and (s.padded_lengths > 0).all()
        real = np.concatenate([np.arange(p) < r for r, p in zip(s.lengths, s.padded_lengths, strict=True)])
        tokens += s.tokens[real].tolist()
        labels += s.labels[s.labels != IGNORE_LABEL].tolist()
        assert (
            (s.labels == s.tokens + 1) | (s.labels == IGNORE_LABEL)
        ).all()  # Tokens counts up within and over documents
    assert sorted(tokens) == list(range(sum(lengths)))
    assert sorted(labels) == sorted(set(range(sum(lengths))) - set(first.tolist()))


def test_one_document_a_sequence_for_bshd() -> None:
    lengths = [10, 30, 7]
    data = dataset(lengths, seq_length=16, alignment=1, packing="greedy", one_document=True)
    rows = [data.sample(n) for n in range(data.samples_per_epoch)]
    assert [(s.lengths.tolist(), s.padded_lengths.tolist()) for s in rows] == [([16], [16]), ([16], [16]), ([15], [16])]
    assert (np.concatenate([s.labels for s in rows]) != IGNORE_LABEL).sum() == sum(lengths) - len(lengths)
