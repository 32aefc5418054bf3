"""Blocks of attention: which tokens of Q meet which tokens of one K/V shard, document by document.

All indices count tokens in storage: positions within the local shard [t, h, d], or within the gathered row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cp.layout import ranges
from cp.packed_seq import to_device

Tokens = slice | Tensor


@dataclass(frozen=True)
class Run:
    """`count` segments of equal lengths at equal distances: one batched CPU kernel call."""

    count: int
    q_start: int
    q_stride: int
    q_length: int
    k_start: int
    k_stride: int
    k_length: int


@dataclass(frozen=True, eq=False)
class Segment:
    """One document's queries and keys in a block."""

    q: slice
    k: slice


@dataclass(frozen=True, eq=False)
class Block:
    """One step's attention: segment i of the queries against segment i of the keys.

    `causal` asks for the lower triangle. Causal segments are square, because the kernels' conventions for ragged
    causal masks differ.

    Attributes:
        runs: the segments for the CPU kernel.
        q_tokens, k_tokens: tokens of all segments, ascending; a slice where they are contiguous.
        cu_q, cu_k: [segments + 1] int32 running sums of the lengths; CUDA only.
        max_q, max_k: longest segments.
        dropout_ids: ids of the query tokens [t] and positions of the keys in their documents [t']; dropout only.
    """

    causal: bool
    runs: tuple[Run, ...]
    q_tokens: Tokens
    k_tokens: Tokens
    cu_q: Tensor | None
    cu_k: Tensor | None
    max_q: int
    max_k: int
    dropout_ids: tuple[Tensor, Tensor] | None = None

    def segments(self) -> list[Segment]:
        """The runs' segments, in order."""
        return [
            Segment(
                slice(run.q_start + i * run.q_stride, run.q_start + i * run.q_stride + run.q_length),
                slice(run.k_start + i * run.k_stride, run.k_start + i * run.k_stride + run.k_length),
            )
            for run in self.runs
            for i in range(run.count)
        ]


def _tokens(starts: np.ndarray, lengths: np.ndarray, device: torch.device) -> Tokens:
    if (starts[1:] == starts[:-1] + lengths[:-1]).all():
        return slice(int(starts[0]), int(starts[-1] + lengths[-1]))
    return to_device(ranges(starts, lengths), device)


def _group_runs(segments: np.ndarray) -> tuple[Run, ...]:
    """Join neighbouring segments of equal lengths and distances. segments: [n, 4] q_start, q_len, k_start, k_len."""
    runs: list[Run] = []
    for q_start, q_length, k_start, k_length in segments.tolist():
        if runs:
            last = runs[-1]
            q_stride, k_stride = q_start - last.q_start, k_start - last.k_start
            if last.count > 1:
                q_stride -= (last.count - 1) * last.q_stride
                k_stride -= (last.count - 1) * last.k_stride
            same_lengths = (q_length, k_length) == (last.q_length, last.k_length)
            if same_lengths and (last.count == 1 or (q_stride, k_stride) == (last.q_stride, last.k_stride)):
                runs[-1] = Run(last.count + 1, last.q_start, q_stride, q_length, last.k_start, k_stride, k_length)
                continue
        runs.append(Run(1, q_start, q_length, q_length, k_start, k_length, k_length))
    return tuple(runs)


def build_block(
    q_starts: np.ndarray,
    q_lengths: np.ndarray,
    k_starts: np.ndarray,
    k_lengths: np.ndarray,
    *,
    causal: bool,
    device: torch.device,
    dropout_ids: tuple[np.ndarray, np.ndarray] | None = None,
) -> Block | None:
    """Build a `Block` from [segments] arrays; segments without queries or keys are left out. None if none is left.

    Args:
        dropout_ids: as in `Block`, int64 on the host.
    """
    segments = np.stack((q_starts, q_lengths, k_starts, k_lengths), 1).astype(np.int64)
    segments = segments[(segments[:, 1] > 0) & (segments[:, 3] > 0)]
    if not len(segments):
        return None
    assert not causal or (segments[:, 1] == segments[:, 3]).all(), "causal blocks are square"
    on_cuda = device.type == "cuda"

    def running_sum(lengths: np.ndarray) -> Tensor:
        return to_device(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32), device)

    ids = None
    if dropout_ids is not None:
        ids = to_device(dropout_ids[0], device), to_device(dropout_ids[1], device)
    return Block(
        causal=causal,
        runs=() if on_cuda else _group_runs(segments),
        q_tokens=_tokens(segments[:, 0], segments[:, 1], device),
        k_tokens=_tokens(segments[:, 2], segments[:, 3], device),
        cu_q=running_sum(segments[:, 1]) if on_cuda else None,
        cu_k=running_sum(segments[:, 3]) if on_cuda else None,
        max_q=int(segments[:, 1].max()),
        max_k=int(segments[:, 3].max()),
        dropout_ids=ids,
    )


def take_tokens(x: Tensor, tokens: Tokens) -> Tensor:
    """x[tokens]: a view for a slice, a gathered copy for indices."""
    return x[tokens] if isinstance(tokens, slice) else x.index_select(0, tokens)


def add_tokens_(x: Tensor, tokens: Tokens, values: Tensor) -> None:
    """x[tokens] += values, in x's dtype. `tokens` has no repeats, so the order of summation is fixed."""
    if isinstance(tokens, slice):
        x[tokens] += values
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
    out = values.new_zeros((size, *values.shape[1:]))
    out[tokens] = values
    return out


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that partial results are merged in: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
