"""Packing loses nothing, overfills nothing, and depends on the seed and the epoch only."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import best_fit_decreasing, concat_epoch, cut_documents, pack_epoch


def covered(pieces: np.ndarray, lengths: np.ndarray) -> None:
    """Every token of every document exactly once."""
    seen = [np.zeros(n, int) for n in lengths]
    for document, start, length in pieces.tolist():
        seen[document][start : start + length] += 1
    assert all((s == 1).all() for s in seen)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.sampled_from([8, 16, 32]))
@settings(max_examples=100, deadline=None)
def test_cutting_loses_nothing(lengths: list[int], seq_length: int) -> None:
    pieces = cut_documents(np.array(lengths), seq_length)
    assert (pieces.length <= seq_length).all() and (pieces.length > 0).all()
    covered(np.stack(pieces, 1), np.array(lengths))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=80), st.randoms())
@settings(max_examples=100, deadline=None)
def test_best_fit_is_valid_and_its_count_does_not_depend_on_order(sizes: list[int], random) -> None:
    bins = best_fit_decreasing(np.array(sizes), 20)
    load = np.bincount(bins, weights=sizes)
    assert load.max() <= 20 and load.min() > 0
    other = sizes.copy()
    random.shuffle(other)
    assert best_fit_decreasing(np.array(other), 20).max() == bins.max()
    # No item of a later, emptier bin would have fitted into an earlier one as it is at the end: best fit is first fit's
    # equal here.
    assert len(load) <= np.ceil(sum(sizes) / 20) * 1.5 + 1


def log_normal(count: int) -> np.ndarray:
    return np.maximum(1, np.random.default_rng(0).lognormal(np.log(600), 1.5, count)).astype(np.int64)


@pytest.mark.parametrize("seq_length", [8192, 32768])
def test_best_fit_reaches_the_lower_bound(seq_length: int) -> None:
    lengths, alignment = log_normal(20000), 8
    index = pack_epoch(lengths, seed=1, epoch=0, seq_length=seq_length, alignment=alignment)
    padded = -(-cut_documents(lengths, seq_length).length // alignment) * alignment
    assert len(index) == -(-padded.sum() // seq_length)
    assert lengths.sum() / (len(index) * seq_length) > 0.99


def test_an_epoch_is_a_function_of_seed_and_epoch() -> None:
    lengths = log_normal(300)
    options = dict(seq_length=1024, alignment=8)
    first = pack_epoch(lengths, seed=1, epoch=0, **options)
    again = pack_epoch(lengths, seed=1, epoch=0, **options)
    assert (first.pieces == again.pieces).all() and (first.first == again.first).all()
    for seed, epoch in ((1, 1), (2, 0)):
        other = pack_epoch(lengths, seed=seed, epoch=epoch, **options)
        assert len(other) == len(first) and not (other.pieces == first.pieces).all()
    covered(first.pieces, lengths)
    for n in range(len(first)):
        assert (-(-first.sample_pieces(n)[:, 2] // 8) * 8).sum() <= 1024


@pytest.mark.parametrize("lengths", [[5, 9, 1, 30, 2], [40], [7, 7]])
def test_stream_sequences_overlap_by_one_token(lengths: list[int]) -> None:
    epoch = concat_epoch(np.array(lengths), seed=3, epoch=0, seq_length=6)
    whole = [(d, t) for d in epoch.documents.tolist() for t in range(lengths[d])]
    for n in range(len(epoch)):
        tokens = [(d, t) for d, start, length in epoch.sample_pieces(n).tolist() for t in range(start, start + length)]
        assert tokens == whole[6 * n : 6 * n + 7]
    assert len(epoch) == (sum(lengths) - 1) // 6
    assert epoch.left_over == sum(lengths) - 6 * len(epoch) >= 1


def test_edges() -> None:
    assert len(pack_epoch(np.array([], np.int64), seed=0, epoch=0, seq_length=8, alignment=2)) == 0
    assert len(pack_epoch(np.array([1]), seed=0, epoch=0, seq_length=8, alignment=2)) == 1
    assert len(concat_epoch(np.array([6]), seed=0, epoch=0, seq_length=6)) == 0
    assert len(concat_epoch(np.array([7]), seed=0, epoch=0, seq_length=6)) == 1
