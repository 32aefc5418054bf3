"""The exchange of needed K and V: every rank gets what its queries need, once, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cp.layout import document_unit, shard_indices
from cp.needed_keys import NeededKeys
from cp.placement import Placement, pad_to, place

SIZES = st.sampled_from([1, 2, 3, 4, 6, 12])


@st.composite
def cases(draw) -> tuple[int, str, np.ndarray, np.ndarray, Placement | None]:
    """(cp, layout, real lengths, padded lengths, placement)."""
    cp_size, layout = draw(SIZES), draw(st.sampled_from(["zigzag", "contiguous", "hybrid"]))
    if layout == "hybrid":
        lengths = np.array(draw(st.lists(st.integers(1, 40), min_size=1, max_size=12)))
        row = place(
            lengths,
            row_length=int(pad_to(lengths, 2 * cp_size).sum()),
            cp_size=cp_size,
            attention_cost=draw(st.sampled_from([0.0, 0.1, 10.0])),
            sample_numbers=np.zeros_like(lengths),
            num_samples=1,
        )
        assert row is not None
        return cp_size, layout, *row
    unit = document_unit(layout, cp_size)
    padded = np.array(draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))) * unit
    padded = np.append(padded, -padded.sum() % (2 * cp_size))
    real = np.array([draw(st.integers(0, int(length))) for length in padded])
    return cp_size, layout, real, padded, None


def wanted(
    rank: int, cp_size: int, layout: str, real: np.ndarray, padded: np.ndarray, placement: Placement | None
) -> set[int]:
    """Real tokens of the row that lie before a piece of the rank, in the piece's document, token by token."""
    owned = shard_indices(padded, cp_size=cp_size, cp_rank=rank, layout=layout, placement=placement).tolist()
    ends = np.cumsum(padded).tolist()
    found = set()
    for at, token in enumerate(owned):
        document = next(d for d, end in enumerate(ends) if token < end)
        start = ends[document] - int(padded[document])
        is_first = at == 0 or owned[at - 1] != token - 1 or token == start
        if is_first and token < start + real[document]:
            found |= set(range(start, token))
    return found


@given(cases())
@settings(max_examples=150, deadline=None)
def test_every_rank_receives_what_it_needs_in_the_rows_order(case) -> None:
    cp_size, layout, real, padded, placement = case
    keys = NeededKeys(real, padded, cp_size=cp_size, layout=layout, placement=placement)
    exchanges = [keys.build_exchange(rank) for rank in range(cp_size)]
    needs = [wanted(rank, cp_size, layout, real, padded, placement) for rank in range(cp_size)]
    if not any(needs):
        assert exchanges == [None] * cp_size
        return
    # Each rank's tokens by receiver, as an all-to-all deals them.
    parts = [np.split(keys.shards[r][e.send], np.cumsum(e.sent)[:-1]) for r, e in enumerate(exchanges)]
    for rank, exchange in enumerate(exchanges):
        received = [parts[sender][rank] for sender in range(cp_size)]
        assert [len(part) for part in received] == exchange.received.tolist()
        assert np.concatenate(received)[exchange.order].tolist() == sorted(needs[rank])
    own = [set(keys.shards[rank].tolist()) for rank in range(cp_size)]
    counts = [[0 if a == b else len(needs[b] & own[a]) for b in range(cp_size)] for a in range(cp_size)]
    assert keys.count_exchanged().tolist() == counts


@given(cases())
@settings(max_examples=100, deadline=None)
def test_pieces_are_the_real_tokens_of_a_rank(case) -> None:
    cp_size, layout, real, padded, placement = case
    keys = NeededKeys(real, padded, cp_size=cp_size, layout=layout, placement=placement)
    is_real = np.concatenate([np.arange(stored) < length for length, stored in zip(real, padded, strict=True)])
    for pieces, owned in zip(keys.pieces, keys.shards, strict=True):
        tokens = [owned[start : start + length] for start, length in zip(pieces.start, pieces.length, strict=True)]
        assert np.concatenate([*tokens, []]).tolist() == owned[is_real[owned]].tolist()
        assert all((np.diff(token) == 1).all() for token in tokens)


def test_short_documents_send_nearly_nothing_and_zigzag_three_quarters() -> None:
    lengths, cp_size = np.full(64, 100), 4
    contiguous = NeededKeys(lengths, lengths, cp_size=cp_size, layout="contiguous").count_exchanged()
    assert contiguous.sum() == 0  # 16 whole documents a rank
    lengths = np.array([90, *[100] * 63, 10])
    contiguous = NeededKeys(lengths, lengths, cp_size=cp_size, layout="contiguous").count_exchanged()
    assert contiguous.sum(1).tolist() == [10, 10, 10, 0]  # the end of a rank's last document, to the next
    whole = np.full(10, 640)
    zigzag = NeededKeys(whole, whole, cp_size=cp_size, layout="zigzag").count_exchanged()
    assert zigzag.sum() == pytest.approx(0.75 * 6400 * (cp_size - 1))
    assert (zigzag.sum(1) + zigzag.sum(0)).tolist() == [800 * 3 * (cp_size - 1)] * cp_size
