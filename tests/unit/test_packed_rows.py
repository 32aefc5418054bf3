"""Packed rows under every layout: the cp ranks together hold what one rank holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cp.layout import LAYOUTS, attention_pairs, balance, document_unit, shard_indices
from cp.packed_seq import IGNORE_LABEL, build_packed_seq
from data.batch import Batch, build_batch
from data.dataset import PackedDataset
from data.packing import PackingOptions


class Tokens:
    """An in-memory token file of distinct tokens, consecutive along a document."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths, np.int32)
        self.first = np.cumsum(self.lengths) - self.lengths
        self.tokens = np.arange(int(self.lengths.sum()))
        self.prefix, self.is_checked = Path("in memory"), True

    def expect_random_reads(self) -> None:
        pass

    def prefetch(self, begin: int, count: int) -> None:
        assert begin >= 0 and begin + count <= len(self.tokens)

    def __len__(self) -> int:
        return len(self.lengths)

    def locate(self, document: int, start: int, length: int) -> int:
        assert start >= 0 and length >= 0 and start + length <= self.lengths[document]
        return int(self.first[document]) + start

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        return self.tokens[self.first[document] + start :][:length]


def dataset(lengths: list[int], *, seq_length: int, alignment: int, packing: str = "best-fit", **more) -> PackedDataset:
    options = PackingOptions(seq_length=seq_length, method=packing, seed=3, alignment=alignment, **more)
    return PackedDataset(Tokens(lengths), np.arange(len(lengths)), options, pad_token=10**6)  # type: ignore[arg-type]


def held(batch: Batch, counted_only: bool = False) -> Counter:
    """(position, token, target) of each of a rank's tokens."""
    packed_seq = batch.packed_seq
    assert len(batch.tokens) == len(batch.labels) == len(packed_seq.positions)
    triples = zip(packed_seq.positions.tolist(), batch.tokens.tolist(), batch.labels.tolist(), strict=True)
    return Counter(t for t in triples if not counted_only or t[2] != IGNORE_LABEL)


@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=12),
    cp_size=st.sampled_from([1, 2, 3, 4]),
    layout=st.sampled_from(LAYOUTS),
    packing=st.sampled_from(["best-fit", "concat"]),
    pad_rows=st.sampled_from(["full", "dynamic"]),
    micro_batch=st.integers(1, 3),
)
@settings(max_examples=150, deadline=None)
def test_ranks_hold_what_one_rank_holds(
    lengths: list[int], cp_size: int, layout: str, packing: str, pad_rows: str, micro_batch: int
) -> None:
    alignment = document_unit(layout, cp_size, micro_batch)
    data = dataset(lengths, seq_length=4 * max(alignment, cp_size), alignment=alignment, packing=packing)
    if not data.samples_per_epoch:
        return
    row = [data.sample(n) for n in range(micro_batch)]
    options = dict(qkv_format="thd" if packing == "best-fit" else "bshd", layout=layout)
    batches = [build_batch(row, cp_size=cp_size, cp_rank=rank, pad_rows=pad_rows, **options) for rank in range(cp_size)]
    one = build_batch(row, cp_size=1, cp_rank=0, **options)

    assert len({len(b.tokens) for b in batches}) == 1
    for batch in batches:  # facts of the whole row are the same on every rank
        assert (batch.loss_tokens, batch.real_tokens) == (one.loss_tokens, one.real_tokens)
        assert batch.packed_seq.cu_seqlens.tolist() == batches[0].packed_seq.cu_seqlens.tolist()
        assert batch.packed_seq.row_length == cp_size * len(batch.tokens)
    together = sum((held(b) for b in batches), Counter())
    if pad_rows == "full" and layout != "hybrid":  # which pads documents anew
        assert together == held(one)
    counted = sum((held(b, counted_only=True) for b in batches), Counter())
    assert counted == held(one, counted_only=True) and counted.total() == one.loss_tokens
    # Shifted before the cut: each target is the token after, never a neighbour in a rank's storage.
    assert all(target == token + 1 or packing == "concat" for _, token, target in counted)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from([1, 2, 4]))
@settings(max_examples=50, deadline=None)
def test_positions_restart_at_each_stored_document(lengths: list[int], cp_size: int) -> None:
    alignment = 2 * cp_size
    data = dataset(lengths, seq_length=4 * alignment, alignment=alignment)
    sequence = data.sample(0)
    batch = build_batch([sequence], cp_size=1, cp_rank=0, qkv_format="thd", layout="zigzag")
    wanted = [p for n in sequence.padded_lengths for p in range(n)]
    assert batch.packed_seq.positions.tolist() == wanted


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_work_of_every_layout_by_brute_force(data) -> None:
    cp_size, layout = data.draw(st.sampled_from([1, 2, 3, 4])), data.draw(st.sampled_from(LAYOUTS))
    unit = document_unit(layout, cp_size)
    padded = [n * unit for n in data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))]
    if layout == "contiguous":
        padded.append(-sum(padded) % cp_size or cp_size)
    real = [data.draw(st.integers(0, n)) for n in padded]
    owner = np.empty(sum(padded), int)
    for rank in range(cp_size):
        owner[shard_indices(np.array(padded), cp_size=cp_size, cp_rank=rank, layout=layout)] = rank
    wanted, start = [0] * cp_size, 0
    for length, stored in zip(real, padded, strict=True):
        for query in range(length):
            wanted[owner[start + query]] += sum(1 for key in range(length) if key <= query)
        start += stored
    assert attention_pairs(np.array(real), np.array(padded), cp_size=cp_size, layout=layout).tolist() == wanted


def test_balance_is_the_slowest_rank_over_the_mean() -> None:
    assert balance(np.array([3, 1])) == 1.5
    assert balance(np.array([4, 0, 0, 0])) == 4.0
    assert balance(np.array([0, 0])) == 1.0  # an empty row is balanced
    # One full document of 8 over two ranks without load balancing: 1 + .. + 4 = 10 pairs against 26.
    pairs = attention_pairs(np.array([8]), np.array([8]), cp_size=2, layout="doc_contiguous")
    assert pairs.tolist() == [10, 26] and balance(pairs) == 26 / 18


@pytest.mark.parametrize("cp_size", [2, 3, 4, 16])
def test_zigzag_balances_full_documents_exactly_and_the_others_do_not(cp_size: int) -> None:
    padded = np.array([1, 3, 7]) * 2 * cp_size
    measured = {
        layout: balance(attention_pairs(padded, padded, cp_size=cp_size, layout=layout))
        for layout in LAYOUTS
        if layout != "contiguous"
    }
    assert measured["zigzag"] == 1.0 < measured["striped"] < measured["doc_contiguous"]


@pytest.mark.parametrize(
    ("lengths", "padded", "words"),
    [
        ([4], [4, 4], "real lengths beside"),
        ([[4]], [[4]], "real lengths beside"),
        ([4, 5], [4, 4], "between 0 and"),  # one bad among good ones
        ([4, -1], [4, 4], "between 0 and"),
        ([4, 4], [4, 6], "padded length 6"),
    ],
)
def test_lengths_that_make_no_row_are_refused(lengths: list, padded: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_packed_seq(np.array(lengths), np.array(padded), cp_size=2)


def test_a_row_of_padding_alone() -> None:
    packed_seq, owned = build_packed_seq(np.array([0, 0]), np.array([4, 8]), cp_size=2, cp_rank=0)
    assert packed_seq.max_seqlen == 0 and packed_seq.cu_seqlens.tolist() == [0, 0, 0] and len(owned) == 6
    one_rank, everything = build_packed_seq(np.array([3]), np.array([5]), layout="contiguous")  # defaults: cp 1, rank 0
    assert everything.tolist() == one_rank.positions.tolist() == list(range(5))


@pytest.mark.parametrize("real", [1, 2, 3, 5, 7, 8])
def test_dynamic_rows_are_the_shortest_that_can_be_cut(real: int) -> None:
    """With the contiguous layout documents have any length: only the row's end is padded, to 2 * cp."""
    data = dataset([real], seq_length=16, alignment=1)
    batches = [
        build_batch(
            [data.sample(0)], cp_size=2, cp_rank=rank, qkv_format="thd", layout="contiguous", pad_rows="dynamic"
        )
        for rank in range(2)
    ]
    assert batches[0].packed_seq.row_length == -(-real // 4) * 4
    assert sum(len(b.tokens) for b in batches) == -(-real // 4) * 4
