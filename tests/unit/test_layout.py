"""Token ownership: partition, inverse, chunk sizes, balance, and labels after sharding."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cp.layout import LAYOUTS, attention_pairs, balance, document_unit, ranges, shard_indices
from cp.packed_seq import build_packed_seq
from data.batch import build_batch
from data.dataset import PackedSample
from tests.reference import unshard_indices

cp_sizes = st.sampled_from([1, 2, 3, 4, 8])


@st.composite
def documents(draw) -> tuple[int, np.ndarray, np.ndarray]:
    """(cp, real lengths, padded lengths)."""
    cp_size = draw(cp_sizes)
    units = draw(st.lists(st.integers(1, 6), min_size=1, max_size=8))
    padded = np.array(units) * 2 * cp_size
    real = np.array([draw(st.integers(0, int(n))) for n in padded])
    return cp_size, real, padded


@given(documents())
@settings(max_examples=100, deadline=None)
def test_zigzag_is_a_partition_with_an_inverse(case) -> None:
    cp_size, _, padded = case
    shards = [shard_indices(padded, cp_size=cp_size, cp_rank=r, layout="zigzag") for r in range(cp_size)]
    row = np.concatenate(shards)
    assert sorted(row.tolist()) == list(range(int(padded.sum())))
    assert len({len(s) for s in shards}) == 1
    assert (row[unshard_indices(padded, cp_size=cp_size, layout="zigzag")] == np.arange(len(row))).all()
    # Rank r's part of each document: chunk r, then chunk 2*cp-1-r.
    start = 0
    for length in padded.tolist():
        chunks = np.arange(start, start + length).reshape(2 * cp_size, -1)
        for rank, shard in enumerate(shards):
            inside = shard[(shard >= start) & (shard < start + length)]
            assert (inside == np.concatenate((chunks[rank], chunks[2 * cp_size - 1 - rank]))).all()
        start += length


@given(cp_sizes, st.sampled_from(LAYOUTS), st.lists(st.integers(1, 9), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_every_layout_is_a_partition_with_an_inverse(cp_size: int, layout: str, units: list[int]) -> None:
    padded = np.array(units) * document_unit(layout, cp_size)
    if layout == "contiguous":  # documents of any length, in a row that divides
        padded = np.append(padded, cp_size - padded.sum() % cp_size)
    shards = [shard_indices(padded, cp_size=cp_size, cp_rank=r, layout=layout) for r in range(cp_size)]
    row = np.concatenate(shards)
    assert sorted(row.tolist()) == list(range(int(padded.sum()))) and len({len(s) for s in shards}) == 1
    assert (row[unshard_indices(padded, cp_size=cp_size, layout=layout)] == np.arange(len(row))).all()
    start = 0
    for length in padded.tolist():
        for rank, shard in enumerate(shards):
            inside = shard[(shard >= start) & (shard < start + length)] - start
            assert (np.diff(inside) > 0).all()  # a document's tokens stay in order on every rank
            if layout != "contiguous":
                assert len(inside) == length // cp_size
            if layout == "doc_contiguous":
                assert inside.tolist() == list(range(rank * length // cp_size, (rank + 1) * length // cp_size))
            if layout == "striped":
                assert inside.tolist() == list(range(rank, length, cp_size))
        start += length
    real = np.array([int(n) // 2 for n in padded])
    pairs = attention_pairs(real, padded, cp_size=cp_size, layout=layout)
    assert pairs.sum() == (real * (real + 1) // 2).sum()


def test_a_row_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="row of 7 tokens"):
        shard_indices(np.array([7]), cp_size=2, cp_rank=0, layout="contiguous")
    with pytest.raises(ValueError, match="padded length 7"):
        shard_indices(np.array([7]), cp_size=2, cp_rank=0, layout="striped")


@given(documents())
@settings(max_examples=100, deadline=None)
def test_positions_and_targets_are_those_of_one_rank(case) -> None:
    cp_size, real, padded = case
    total = int(padded.sum())
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 50, total)
    row = PackedSample(rng.integers(0, 50, total), labels, real, padded)

    def pairs(size: int) -> Counter:
        count: Counter = Counter()
        for rank in range(size):
            batch = build_batch([row], cp_size=size, cp_rank=rank, qkv_format="thd", layout="zigzag")
            count.update(
                zip(batch.packed_seq.positions.tolist(), batch.tokens.tolist(), batch.labels.tolist(), strict=True)
            )
        return count

    assert pairs(cp_size) == pairs(1)


@given(documents())
@settings(max_examples=50, deadline=None)
def test_work_is_counted_right(case) -> None:
    cp_size, real, padded = case
    pairs = attention_pairs(real, padded, cp_size=cp_size, layout="zigzag")
    assert pairs.sum() == (real * (real + 1) // 2).sum()
    for rank in range(cp_size):
        owned = set(shard_indices(padded, cp_size=cp_size, cp_rank=rank, layout="zigzag").tolist())
        count, start = 0, 0
        for length, stored in zip(real.tolist(), padded.tolist(), strict=True):
            count += sum(p + 1 for p in range(length) if start + p in owned)
            start += stored
        assert pairs[rank] == count


@pytest.mark.parametrize("cp_size", [1, 2, 4, 8])
def test_full_documents_are_balanced_exactly(cp_size: int) -> None:
    padded = np.array([2, 6, 40]) * 2 * cp_size
    assert balance(attention_pairs(padded, padded, cp_size=cp_size, layout="zigzag")) == 1.0


def test_ranges() -> None:
    assert ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert ranges(np.array([]), np.array([])).tolist() == []


def test_refusals() -> None:
    with pytest.raises(ValueError, match="padded length 6"):
        shard_indices(np.array([8, 6]), cp_size=2, cp_rank=0, layout="zigzag")
    with pytest.raises(ValueError, match="unknown layout"):
        shard_indices(np.array([8]), cp_size=2, cp_rank=0, layout="spiral")
    with pytest.raises(ValueError, match="real length"):
        build_packed_seq(np.array([9]), np.array([8]))


def test_packed_seq_holds_both_lengths() -> None:
    packed, owned = build_packed_seq(np.array([5, 3, 0]), np.array([8, 4, 4]), cp_size=2, cp_rank=1)
    assert packed.cu_seqlens.tolist() == [0, 5, 8, 8] and packed.cu_seqlens_padded.tolist() == [0, 8, 12, 16]
    assert packed.max_seqlen == 5 and packed.row_length == 16
    assert owned.tolist() == [2, 3, 4, 5, 9, 10, 13, 14]
    assert packed.positions.tolist() == [2, 3, 4, 5, 1, 2, 1, 2]


def test_zigzag_is_transformer_engines_order() -> None:
    """The example of Transformer Engine's documentation (context_parallel.py, attn_forward_func_with_cp): documents of
    8 and 4 over two ranks.
    """
    padded = np.array([8, 4])
    positions = np.concatenate([np.arange(n) for n in padded])
    for rank, wanted in enumerate(([0, 1, 6, 7, 0, 3], [2, 3, 4, 5, 1, 2])):
        owned = shard_indices(padded, cp_size=2, cp_rank=rank, layout="zigzag")
        assert positions[owned].tolist() == wanted
