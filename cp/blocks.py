"""Blocks of attention: which tokens of Q meet which tokens of one K/V shard, document by document.

All indices count tokens in storage: positions within the local shard [t, h, d], or within the gathered row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cp.layout import ranges
from cp.packed_seq import to_device

Tokens = slice | Tensor
StartsAndLengths = tuple[np.ndarray, np.ndarray]  # of segments, [n] each
MAX_PADDING = 1.05  # (query, key) pairs with padding over pairs of real tokens


class Segments(NamedTuple):
    """Segments of equal lengths at equal distances; the distance of a single segment has no meaning."""

    start: int
    distance: int
    length: int

    def slices(self, count: int) -> list[slice]:
        starts = (self.start + number * self.distance for number in range(count))
        return [slice(start, start + self.length) for start in starts]


@dataclass(frozen=True)
class Run:
    """`count` segments of queries and of keys: one batched CPU kernel call."""

    count: int
    q: Segments
    k: Segments


@dataclass(frozen=True, eq=False)
class Block:
    """One step's attention: segment i of the queries against segment i of the keys.

    `causal` asks for the lower triangle. Causal segments are square, because the kernels' conventions for ragged
    causal masks differ.

    Attributes:
        runs: the segments for the CPU kernel.
        k_tokens: the keys of all segments, ascending. The queries of all segments are all rows of queries.
        cu_q, cu_k: [segments + 1] int32 running sums of the lengths; CUDA only.
        max_q, max_k: longest segments.
        dropout_ids: ids of the query tokens [t], and positions of the keys in their documents [t']; dropout only.
    """

    causal: bool
    runs: tuple[Run, ...]
    k_tokens: Tokens
    cu_q: Tensor | None
    cu_k: Tensor | None
    max_q: int
    max_k: int
    dropout_ids: tuple[Tensor, ...] | None = None

    def segments(self) -> list[tuple[slice, slice]]:
        """Queries and keys of each segment, in order."""
        runs = (zip(run.q.slices(run.count), run.k.slices(run.count), strict=True) for run in self.runs)
        return [segment for run in runs for segment in run]


def find_tokens(starts: np.ndarray, lengths: np.ndarray, device: torch.device) -> Tokens:
    """The tokens of these segments, [n] starts and lengths: a slice if they follow one another without gaps."""
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    if not len(starts):
        return slice(0, 0)
    if (starts[1:] == starts[:-1] + lengths[:-1]).all():
        return slice(int(starts[0]), int(starts[-1] + lengths[-1]))
    return to_device(ranges(starts, lengths), device)


@dataclass(frozen=True, eq=False)
class Rows:
    """The queries of a rank: rows that blocks take as they are, gathered once for several blocks.

    Attributes:
        queries: this rank's tokens that are rows.
        later: the rows that blocks after the first ones take.
        padding: rows that are padding; None: none.
    """

    queries: Tokens
    later: Tokens
    padding: Tensor | None

    @classmethod
    def build(
        cls, tokens: StartsAndLengths, later: StartsAndLengths, is_padding: np.ndarray, device: torch.device
    ) -> Rows:
        """`is_padding`: of this rank's tokens, [t] bool."""
        padding = np.flatnonzero(is_padding[ranges(*tokens)])
        found = find_tokens(*tokens, device), find_tokens(*later, device)
        return cls(*found, to_device(padding, device) if len(padding) else None)

    def finish(self, out: Tensor, lse: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Results of `size` tokens from those of the rows, which it changes: 0 in padding and in tokens without a row.

        Padding's lse becomes infinite: its probabilities, and so all its gradients, are 0 in the backward pass.
        """
        if self.padding is not None:
            out.index_fill_(0, self.padding, 0.0)
            lse.index_fill_(0, self.padding, float("inf"))
        return spread_tokens(out, self.queries, size), spread_tokens(lse, self.queries, size)


def takes_cu_seqlens(device: torch.device) -> bool:
    """Whether the kernels take documents by cu_seqlens, from rows without gaps: CUDA, for which meta stands."""
    return device.type != "cpu"


def computed_lengths(lengths: np.ndarray, padded_lengths: np.ndarray, device: torch.device) -> np.ndarray:
    """[documents] tokens that attention computes of each document: the real ones; on CUDA its padding too.

    With their padding, documents follow one another without gaps, so that no kernel gathers rows. Under the causal mask
    no real query sees padding. Only the row's tail is left out, and padding that costs more than `MAX_PADDING` pairs.
    """
    kept = np.where(np.cumsum(lengths[::-1])[::-1] > 0, padded_lengths, 0)
    is_cheap = (kept**2).sum() <= MAX_PADDING * (lengths**2).sum()
    return kept if takes_cu_seqlens(device) and is_cheap else lengths


def _group_runs(segments: np.ndarray) -> tuple[Run, ...]:
    """Join neighbouring segments of equal lengths and distances. segments: [n, 4] q_start, q_len, k_start, k_len."""
    runs: list[Run] = []
    last_q = last_k = 0
    for q_start, q_length, k_start, k_length in segments.tolist():
        q_distance, k_distance = q_start - last_q, k_start - last_k
        last_q, last_k = q_start, k_start
        if runs:
            last, q, k = runs[-1], runs[-1].q, runs[-1].k
            has_equal_distances = last.count == 1 or (q_distance, k_distance) == (q.distance, k.distance)
            if (q_length, k_length) == (q.length, k.length) and has_equal_distances:
                q, k = q._replace(distance=q_distance), k._replace(distance=k_distance)
                runs[-1] = Run(last.count + 1, q, k)
                continue
        runs.append(Run(1, Segments(q_start, q_length, q_length), Segments(k_start, k_length, k_length)))
    return tuple(runs)


def _cover_keys(table: np.ndarray) -> np.ndarray:
    """Give keys between two segments to a segment without queries, so that all keys are one slice of the shard.

    Flash attention 2, 3 and 4 write zeros to the gradients of keys without queries.
    """
    q_ends, k_ends = table[:-1, 0] + table[:-1, 1], table[:-1, 2] + table[:-1, 3]
    gaps = table[1:, 2] - k_ends
    if (gaps < 0).any() or gaps.sum() > table[:, 3].sum():  # a gather moves less
        return table
    between = np.stack((q_ends, np.zeros_like(gaps), k_ends, gaps), 1)
    return np.insert(table, np.arange(1, len(table))[gaps > 0], between[gaps > 0], 0)


def build_block(
    segments: Sequence[np.ndarray],
    *,
    causal: bool,
    device: torch.device,
    dropout_ids: tuple[np.ndarray, np.ndarray] | None = None,
) -> Block | None:
    """Build a `Block`; segments without queries or keys are left out. None if none is left.

    Args:
        segments: [n] starts and lengths of the queries, starts and lengths of the keys.
        dropout_ids: as in `Block`, int64 on the host.
    """
    table = np.stack(segments, 1).astype(np.int64)
    table = table[(table[:, 1] > 0) & (table[:, 3] > 0)]
    if not len(table):
        return None
    assert not causal or (table[:, 1] == table[:, 3]).all(), "causal blocks are square"
    on_cuda = takes_cu_seqlens(device)
    if on_cuda and not causal:
        table = _cover_keys(table)

    def running_sum(lengths: np.ndarray) -> Tensor:
        return to_device(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32), device)

    return Block(
        causal=causal,
        runs=() if on_cuda else _group_runs(table),
        k_tokens=find_tokens(table[:, 2], table[:, 3], device),
        cu_q=running_sum(table[:, 1]) if on_cuda else None,
        cu_k=running_sum(table[:, 3]) if on_cuda else None,
        max_q=int(table[:, 1].max()),
        max_k=int(table[:, 3].max()),
        dropout_ids=None if dropout_ids is None else tuple(to_device(ids, device) for ids in dropout_ids),
    )


def take_tokens(x: Tensor, tokens: Tokens) -> Tensor:
    """x[tokens]: a view for a slice, a gathered copy for indices."""
    return x[tokens] if isinstance(tokens, slice) else x.index_select(0, tokens)


def put_tokens_(x: Tensor, tokens: Tokens, values: Tensor) -> None:
    """x[tokens] = values, which are changed copies of `take_tokens(x, tokens)`; a view has changed x already."""
    if not isinstance(tokens, slice):
        x.index_copy_(0, tokens, values)


def add_tokens_(x: Tensor, tokens: Tokens, values: Tensor) -> None:
    """x[tokens] += values, in x's dtype. Without repeats in `tokens`, the order of summation is fixed on CUDA too."""
    if isinstance(tokens, slice):
        x[tokens].add_(values)  # `x[tokens] += values` would also copy the sum onto itself
    else:
        x.index_add_(0, tokens, values.to(x.dtype))


def fill_tokens_(x: Tensor, tokens: Tokens, values: Tensor) -> None:
    """x[tokens] = values in x's dtype and 0 elsewhere; for a slice, each element is written once."""
    if isinstance(tokens, slice):
        x[: tokens.start].zero_()
        x[tokens] = values
        x[tokens.stop :].zero_()
    else:
        x.zero_().index_copy_(0, tokens, values.to(x.dtype))


def spread_tokens(values: Tensor, tokens: Tokens, size: int) -> Tensor:
    """[size, ...] with `values` at `tokens` and 0 elsewhere; `values` itself if they fill the size."""
    if len(values) == size:
        return values
    out = values.new_empty((size, *values.shape[1:]))
    fill_tokens_(out, tokens, values)
    return out


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that partial results are merged in: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
