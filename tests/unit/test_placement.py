"""The layout hybrid: where documents lie, as properties of `cp/placement.py`, and rows built by it."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cp.hybrid import build_degree_rows
from cp.layout import attention_pairs, balance, document_unit, held_documents, shard_indices
from cp.packed_seq import IGNORE_LABEL, build_packed_seq
from cp.placement import EVEN, PlacedRow, degree_chain, degree_unit, place, sample_degree
from data.batch import Batch, BatchPlan, build_batch
from data.batch_schedule import BatchSchedule
from data.dataset import PackedSample
from data.packing import pack_epoch
from tests.flags import resolve_config
from tests.reference import unshard_indices

CP_SIZES = (1, 2, 3, 4, 6, 8, 12)


def test_degrees_divide_each_other() -> None:
    assert [degree_chain(n) for n in (1, 2, 6, 8, 12)] == [(1,), (1, 2), (1, 2, 6), (1, 2, 4, 8), (1, 2, 4, 12)]
    assert [sample_degree(8, n) for n in (1, 2, 3, 4, 8, 16, 24)] == [8, 4, 8, 2, 1, 1, 1]
    # Four samples want blocks of 3 ranks, which the chain of 12 does not have.
    assert [sample_degree(12, n) for n in (3, 4, 6, 12)] == [4, 12, 2, 1]


@st.composite
def rows(draw) -> tuple[int, np.ndarray, np.ndarray, int, int]:
    """cp size, real lengths, their samples, number of samples and tokens of a row whose samples are aligned."""
    cp_size, num_samples = draw(st.sampled_from(CP_SIZES)), draw(st.integers(1, 12))
    unit = document_unit("hybrid", cp_size, num_samples)
    most = draw(st.sampled_from([2, 20, 300]))
    samples = draw(
        st.lists(st.lists(st.integers(1, most * unit), max_size=8), min_size=num_samples, max_size=num_samples)
    )
    step = np.lcm(unit, cp_size)
    longest = max(sum(-(-n // unit) * unit for n in own) for own in samples)
    seq_length = -(-max(longest, 1) // step) * step
    lengths = np.array([n for own in samples for n in own], np.int64)
    numbers = np.repeat(np.arange(num_samples), [len(own) for own in samples])
    return cp_size, lengths, numbers, num_samples, int(seq_length * num_samples)


def place_row(case, cost: float = 1e-3) -> PlacedRow | None:
    cp_size, lengths, numbers, num_samples, row_length = case
    return place(
        lengths, row_length=row_length, cp_size=cp_size, attention_cost=cost, sample_numbers=numbers,
        num_samples=num_samples,
    )  # fmt: skip


@given(rows(), st.sampled_from([0.0, 1e-4, 1.0]))
@example((4, np.array([64]), np.array([0]), 1, 64), 1e-3)  # one document over all ranks
@example((6, np.ones(48, np.int64), np.zeros(48, np.int64), 1, 576), 1e-3)  # documents of one token
@settings(max_examples=300, deadline=None)
def test_every_row_is_placed_in_equal_parts(case, cost: float) -> None:
    cp_size, lengths, _, _, row_length = case
    placed = place_row(case, cost)
    assert placed is not None  # the samples' own padding is a placement
    padded, (degrees, first) = placed.padded_lengths, (placed.placement.degrees, placed.placement.first_ranks)
    assert placed.lengths[: len(lengths)].tolist() == lengths.tolist() and not placed.lengths[len(lengths) :].any()
    assert (placed.lengths <= padded).all() and padded.sum() == row_length
    assert set(degrees) <= set(degree_chain(cp_size)) and (first % degrees == 0).all()
    assert (padded % degree_unit(degrees) == 0).all() and (first + degrees <= cp_size).all()
    again = place_row(case, cost)
    assert again is not None and again.padded_lengths.tolist() == padded.tolist()
    assert again.placement.first_ranks.tolist() == first.tolist()

    own = dict(cp_size=cp_size, layout="hybrid", placement=placed.placement)
    shards = [shard_indices(padded, cp_rank=rank, **own) for rank in range(cp_size)]
    assert {len(shard) for shard in shards} == {row_length // cp_size}
    row = np.concatenate(shards)
    assert sorted(row.tolist()) == list(range(row_length))
    assert (row[unshard_indices(padded, **own)] == np.arange(row_length)).all()
    # Each document lies on its own ranks alone, and all agree which.
    document = np.repeat(np.arange(len(padded)), padded)
    for rank, shard in enumerate(shards):
        if cp_size > 1:
            held = held_documents(placed.placement, rank)
            assert list(dict.fromkeys(document[shard].tolist())) == held.tolist()
            assert ((first[held] <= rank) & (rank < first[held] + degrees[held])).all()
    pairs = attention_pairs(placed.lengths, padded, **own)
    wanted = [0] * cp_size
    for rank, shard in enumerate(shards):
        position = shard - (np.cumsum(padded) - padded)[document[shard]]
        wanted[rank] = int((position + 1)[position < placed.lengths[document[shard]]].sum())
    assert pairs.tolist() == wanted


@given(rows())
@settings(max_examples=60, deadline=None)
def test_each_degree_is_a_zigzag_row_of_its_own(case) -> None:
    placed = place_row(case)
    cp_size = case[0]
    assert placed is not None
    for rank in range(cp_size):
        packed_seq, owned = build_packed_seq(
            placed.lengths, placed.padded_lengths, cp_size=cp_size, cp_rank=rank, layout="hybrid",
            placement=placed.placement, first_ids=100 * np.arange(len(placed.lengths)),
        )  # fmt: skip
        if cp_size == 1:
            continue
        ids, positions = packed_seq.token_ids_and_positions(cp_size=cp_size, cp_rank=rank)
        assert positions.tolist() == packed_seq.positions.tolist()
        parts = build_degree_rows(packed_seq, cp_size=cp_size, cp_rank=rank)
        assert [part.degree for part in parts] == sorted({part.degree for part in parts}, reverse=True)
        assert parts[-1].tokens.stop == len(owned)
        for part in parts:
            place_in_part = dict(cp_size=part.degree, cp_rank=rank % part.degree)
            own_ids, own_positions = part.packed_seq.token_ids_and_positions(**place_in_part)
            assert own_ids.tolist() == ids[part.tokens].tolist()
            assert own_positions.tolist() == positions[part.tokens].tolist()


def real_rows(cp_size: int, num_samples: int, count: int, *, seq_length: int, median: int, alignment: int):
    """Rows of samples that best-fit packing makes of documents with log-normal lengths."""
    rng = np.random.default_rng(1)
    lengths = np.maximum(1, rng.lognormal(np.log(median), 1.5, 2 * count * num_samples * seq_length // median)).astype(
        int
    )
    epoch = pack_epoch(lengths, seed=1, epoch=0, seq_length=seq_length, alignment=alignment)
    for row in range(count):
        samples = [epoch.sample_pieces(n)[:, 2] for n in range(row * num_samples, (row + 1) * num_samples)]
        numbers = np.repeat(np.arange(num_samples), [len(own) for own in samples])
        yield cp_size, np.concatenate(samples), numbers, num_samples, num_samples * seq_length


@pytest.mark.parametrize(
    ("cp_size", "num_samples", "seq_length", "median"), [(8, 8, 8192, 600), (8, 32, 4096, 300), (16, 16, 8192, 600)]
)
def test_packed_rows_are_even_where_the_grids_are_not(
    cp_size: int, num_samples: int, seq_length: int, median: int
) -> None:
    cost, found = 4e-5, []
    for case in real_rows(cp_size, num_samples, 6, seq_length=seq_length, median=median, alignment=16):
        placed = place_row(case, cost)
        assert placed is not None and not placed.placement.is_fallback
        pairs = attention_pairs(
            placed.lengths, placed.padded_lengths, cp_size=cp_size, layout="hybrid", placement=placed.placement
        )
        work = seq_length * num_samples / cp_size + 2 * cost * pairs
        found.append(balance(work))
    assert max(found) <= EVEN + 0.01  # which counts a document's work as equal on its ranks


def test_a_row_of_64_ranks_is_placed_within_milliseconds() -> None:
    case = next(iter(real_rows(64, 64, 1, seq_length=8192, median=600, alignment=16)))
    seconds = []
    for _ in range(3):
        start = time.process_time()
        placed = place_row(case, 4e-5)
        seconds.append(time.process_time() - start)
    assert placed is not None and not placed.placement.is_fallback
    assert min(seconds) < 0.3  # measured alone: docs/work_balance.md


def test_a_row_without_an_even_placement_keeps_its_samples_apart() -> None:
    """Two samples of one long document and no free token: each one keeps its two ranks."""
    lengths, numbers = np.array([32, 31, 1]), np.array([0, 1, 1])
    case = (4, lengths, numbers, 2, 64)
    placed = place_row((4, np.array([32, 32]), np.array([0, 1]), 2, 64))
    assert placed is not None and placed.placement.degrees.tolist() == [2, 2]
    tight = place_row((4, np.array([17, 15, 31, 1]), np.array([0, 0, 1, 1]), 2, 64))
    assert place_row(case) is None and tight is None  # they are not aligned to 4
    aligned = place_row((4, np.array([28, 4, 24, 8]), np.array([0, 0, 1, 1]), 2, 64), 1.0)
    assert aligned is not None


# ---------------------------------------------------------------------------------------------------
# Rows of the batch builder


def sample(rng: np.random.Generator, lengths: list[int], seq_length: int, unit: int) -> PackedSample:
    """Tokens of their own; the label of a token is its successor."""
    padded = [-(-n // unit) * unit for n in lengths]
    tail = seq_length - sum(padded)
    real, stored = np.array([*lengths, *([0] if tail else [])]), np.array([*padded, *([tail] if tail else [])])
    tokens = rng.integers(0, 10**6, seq_length)
    labels = np.append(tokens[1:], 0)
    start = 0
    for n, p in zip(real.tolist(), stored.tolist(), strict=True):
        labels[max(start + n - 1, start) : start + p] = IGNORE_LABEL
        start += p
    return PackedSample(tokens, labels, real, stored, first_id=int(rng.integers(1, 10**9)))


def held(batch: Batch, cp_size: int, cp_rank: int) -> list[tuple]:
    """(id, position, token, label) of a rank's real tokens."""
    ids, positions = batch.packed_seq.token_ids_and_positions(cp_size=cp_size, cp_rank=cp_rank)
    real = ~batch.packed_seq.padding(cp_size=cp_size, cp_rank=cp_rank)
    columns = (ids, positions, batch.tokens.numpy(), batch.labels.numpy())
    assert (batch.labels.numpy()[~real] == IGNORE_LABEL).all()
    return list(zip(*(column[real].tolist() for column in columns), strict=True))


@pytest.mark.parametrize("pad_rows", ["full", "dynamic"])
@pytest.mark.parametrize("cp_size", [2, 3, 4, 6])
def test_a_hybrid_row_holds_the_tokens_of_its_samples(cp_size: int, pad_rows: str) -> None:
    rng = np.random.default_rng(cp_size)
    for _ in range(10):
        seq_length = 48 * cp_size
        samples = []
        for _ in range(cp_size):
            lengths: list[int] = []
            while sum(-(-n // 12) * 12 for n in lengths) < seq_length - 60:
                lengths.append(int(rng.integers(1, 50)))
            samples.append(sample(rng, lengths, seq_length, 12))
        options = dict(qkv_format="thd", pad_rows=pad_rows, attention_cost=0.01)
        ranks = [
            build_batch(samples, cp_size=cp_size, cp_rank=rank, layout="hybrid", hash_row=True, **options)
            for rank in range(cp_size)
        ]
        one = build_batch(samples, cp_size=1, cp_rank=0, layout="contiguous", **options)
        together = [token for rank, batch in enumerate(ranks) for token in held(batch, cp_size, rank)]
        assert sorted(together) == sorted(held(one, 1, 0))
        assert len({batch.row_hash for batch in ranks}) == 1 and len({len(batch.tokens) for batch in ranks}) == 1
        assert {(b.loss_tokens, b.real_tokens) for b in ranks} == {(one.loss_tokens, one.real_tokens)}
        if pad_rows == "dynamic":
            assert ranks[0].packed_seq.row_length <= cp_size * seq_length
        other = [sample(rng, s.lengths[s.lengths > 0].tolist(), seq_length, 12) for s in samples]
        moved = build_batch(other, cp_size=cp_size, cp_rank=0, layout="hybrid", hash_row=True, **options)
        assert moved.row_hash != ranks[0].row_hash


def test_documents_without_room_for_their_padding_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"--cp-layout hybrid: a row of 16 tokens .* a multiple of 8"):
        build_batch([sample(rng, [5, 5, 6], 16, 1)], cp_size=4, cp_rank=0, qkv_format="thd", layout="hybrid")


def test_rows_of_padding_alone() -> None:
    empty = sample(np.random.default_rng(0), [], 32, 8)
    for pad_rows in ("full", "dynamic"):
        batch = build_batch([empty], cp_size=4, cp_rank=1, qkv_format="thd", layout="hybrid", pad_rows=pad_rows)
        assert batch.real_tokens == 0 and batch.cp_balance == 1.0 and len(batch.tokens) > 0


def test_work_of_a_pool_beside_that_of_its_grid() -> None:
    """`row_work` is read from the placement: a long document on one rank counts there alone."""
    rng = np.random.default_rng(0)
    samples = [sample(rng, [64], 64, 16), sample(rng, [16, 16, 16, 16], 64, 16)]
    plan = BatchPlan(
        batches=BatchSchedule.constant(2), micro_batch_size=2, batch_size=1, batch_rank=0, cp_size=2, cp_rank=0,
        qkv_format="thd", layout="hybrid", attention_cost=1.0,
    )  # fmt: skip
    batch = plan.build_batch(samples, step=0)
    degrees = batch.packed_seq.placement.degrees  # type: ignore[union-attr]
    assert degrees[0] == 2 and batch.cp_balance < 1.1  # 64 * 64 against 4 * 16 * 16: only sharing evens it
    mean, busiest = plan.row_work(batch)
    assert mean == pytest.approx((128 + 64**2 + 4 * 16**2) / 2) and busiest < 1.1 * mean


# ---------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize(
    ("cp_size", "micro_batch", "wanted"),
    [(4, 1, 8), (4, 4, 8), (8, 1, 16), (64, 64, 16), (64, 8, 64), (16, 1, 32), (1, 1, 2)],
)
def test_default_alignment(cp_size: int, micro_batch: int, wanted: int) -> None:
    flags = f"--cp-layout hybrid --cp-size {cp_size} --micro-batch-size {micro_batch} --seq-length 4096"
    config = resolve_config(*flags.split(), world=cp_size)
    assert (config.data.document_alignment, config.parallel.cp_layout) == (wanted, "hybrid")


def test_alignments_that_allow_no_fallback_are_refused() -> None:
    flags = "--cp-layout hybrid --cp-size 4 --seq-length 4096 --document-alignment 4 --micro-batch-size"
    assert resolve_config(*flags.split(), "4", world=4).data.document_alignment == 4
    assert resolve_config(*flags.split(), "2", world=4).data.document_alignment == 4
    with pytest.raises(ValueError, match="--document-alignment 4 is not a multiple of 8"):
        resolve_config(*flags.split(), "1", world=4)
    for other in ("--cp-comm-type a2a", "--qkv-format bshd", "--cp-backend pytorch --qkv-format bshd"):
        flags = f"--cp-layout hybrid --cp-size 2 {other}"
        with pytest.raises(ValueError, match="--cp-layout hybrid is not offered"):
            resolve_config(*flags.split(), world=2)
