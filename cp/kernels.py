"""Local attention between rows of Q and rows of one K/V shard, with its log-sum-exp: PyTorch's flash kernels.

Two ATen operators serve, forward and backward, each taking an `out` and a log-sum-exp from outside,
which is what a merged (ring) attention needs:

- CPU: `_scaled_dot_product_flash_attention_for_cpu`: one call a run of equal documents; fp64, fp32, bf16.
- CUDA: `_flash_attention_forward` with cu_seqlens: one call a block, all documents; bf16.

The autograd formulas that PyTorch puts around these operators drop the gradient of the log-sum-exp, so
only the raw operators are used here, below an autograd Function of our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cp.dropout_attention import AttentionDropout, Segment, dropped_backward, dropped_forward
from cp.layout import ranges
from cp.packed_seq import to_device

Rows = slice | Tensor


@dataclass(frozen=True)
class Run:
    """`count` pairs of segments of equal lengths at equal distances: one batched CPU kernel call."""

    count: int
    q_start: int
    q_stride: int
    q_length: int
    k_start: int
    k_stride: int
    k_length: int


@dataclass(frozen=True, eq=False)
class Block:
    """One step's attention: segment i of the queries against segment i of the keys.

    `causal` asks for the lower triangle and is only used on square segments (query and key lengths
    equal), where the kernels' two conventions for ragged ones agree.

    Attributes:
        runs: the segments in storage rows, for the CPU kernel.
        q_rows, k_rows: rows that take part, ascending; a slice where they are contiguous.
        cu_q, cu_k: [segments + 1] int32 running sums of the lengths; CUDA only.
        max_q, max_k: longest segments.
        places: where a row drops attention: ids of the query tokens [t] and positions of the keys in their documents [t'], by storage row.
    """

    causal: bool
    runs: tuple[Run, ...]
    q_rows: Rows
    k_rows: Rows
    cu_q: Tensor | None
    cu_k: Tensor | None
    max_q: int
    max_k: int
    places: tuple[Tensor, Tensor] | None = None

    def segments(self) -> list[Segment]:
        """The runs taken apart."""
        return [
            Segment(
                slice(run.q_start + i * run.q_stride, run.q_start + i * run.q_stride + run.q_length),
                slice(run.k_start + i * run.k_stride, run.k_start + i * run.k_stride + run.k_length),
            )
            for run in self.runs
            for i in range(run.count)
        ]


def _rows(starts: np.ndarray, lengths: np.ndarray, device: torch.device) -> Rows:
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
    places: tuple[np.ndarray, np.ndarray] | None = None,
) -> Block | None:
    """A `Block` from segments in storage rows; segments without queries or keys are left out. None if none is left.

    Args:
        places: as `Block`'s, int64.
    """
    segments = np.stack((q_starts, q_lengths, k_starts, k_lengths), 1).astype(np.int64)
    segments = segments[(segments[:, 1] > 0) & (segments[:, 3] > 0)]
    if not len(segments):
        return None
    assert not causal or (segments[:, 1] == segments[:, 3]).all(), "causal blocks are square"
    on_cuda = device.type == "cuda"

    def running_sum(lengths: np.ndarray) -> Tensor:
        return to_device(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32), device)

    return Block(
        causal=causal,
        runs=() if on_cuda else _group_runs(segments),
        q_rows=_rows(segments[:, 0], segments[:, 1], device),
        k_rows=_rows(segments[:, 2], segments[:, 3], device),
        cu_q=running_sum(segments[:, 1]) if on_cuda else None,
        cu_k=running_sum(segments[:, 3]) if on_cuda else None,
        max_q=int(segments[:, 1].max()),
        max_k=int(segments[:, 3].max()),
        places=None if places is None else (to_device(places[0], device), to_device(places[1], device)),
    )


def take_rows(x: Tensor, rows: Rows) -> Tensor:
    """x[rows]: a view for a slice, a gathered copy for indices."""
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def add_rows_(x: Tensor, rows: Rows, values: Tensor) -> None:
    """x[rows] += values, in x's dtype. `rows` has no repeats, so the order of summation is fixed."""
    if isinstance(rows, slice):
        x[rows] += values
    else:
        x.index_add_(0, rows, values.to(x.dtype))


def fill_rows_(x: Tensor, rows: Rows, values: Tensor) -> None:
    """x[rows] = values in x's dtype and 0 elsewhere, each element written once where `rows` is a slice."""
    if isinstance(rows, slice):
        x[: rows.start].zero_()
        x[rows] = values
        x[rows.stop :].zero_()
    else:
        x.zero_().index_copy_(0, rows, values.to(x.dtype))


def spread_rows(values: Tensor, rows: Rows, size: int) -> Tensor:
    """[size, ...] that holds `values` in `rows` and 0 elsewhere; `values` itself where they fill it."""
    if len(values) == size:
        return values
    out = values.new_zeros((size, *values.shape[1:]))
    out[rows] = values
    return out


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What partial results are merged in: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------------------------------------------
# CPU


def _run_view(x: Tensor, count: int, start: int, stride: int, length: int) -> Tensor:
    """[t, h, d] -> [count, h, length, d] view of `count` segments."""
    row, head, channel = x.stride()
    return x.as_strided(
        (count, x.shape[1], length, x.shape[2]),
        (stride * row, head, row, channel),
        x.storage_offset() + start * row,
    )


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for run in block.runs:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _run_view(q, run.count, run.q_start, run.q_stride, run.q_length),
            _run_view(k, run.count, run.k_start, run.k_stride, run.k_length),
            _run_view(v, run.count, run.k_start, run.k_stride, run.k_length),
            0.0,
            block.causal,
            scale=scale,
        )
        outs.append(out.transpose(1, 2).flatten(0, 1))  # [count * length, h, d]
        lses.append(lse.transpose(1, 2).flatten(0, 1))  # [count * length, h]
    return _cat(outs), _cat(lses)


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grads: tuple[list[Tensor], ...] = ([], [], [])
    for run in block.runs:
        at_q = (run.count, run.q_start, run.q_stride, run.q_length)
        at_k = (run.count, run.k_start, run.k_stride, run.k_length)
        run_grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _run_view(dout, *at_q),
            _run_view(q, *at_q),
            _run_view(k, *at_k),
            _run_view(v, *at_k),
            _run_view(out, *at_q),
            _run_view(lse[..., None], *at_q)[..., 0],
            0.0,
            block.causal,
            scale=scale,
        )
        for parts, grad in zip(grads, run_grads, strict=True):
            parts.append(grad.transpose(1, 2).flatten(0, 1))
    return _cat(grads[0]), _cat(grads[1]), _cat(grads[2])


# ---------------------------------------------------------------------------------------------------
# CUDA. The log-sum-exp of a packed call is [h, rows].


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        take_rows(q, block.q_rows),
        take_rows(k, block.k_rows),
        take_rows(v, block.k_rows),
        block.cu_q,
        block.cu_k,
        block.max_q,
        block.max_k,
        0.0,
        block.causal,
        False,
        scale=scale,
    )
    return out, lse.transpose(0, 1)


def _cuda_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # Without dropout the kernel reads neither the random state nor the tensor after it.
    no_random_state = torch.empty(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        take_rows(dout, block.q_rows).contiguous(),
        take_rows(q, block.q_rows),
        take_rows(k, block.k_rows),
        take_rows(v, block.k_rows),
        take_rows(out, block.q_rows),
        take_rows(lse, block.q_rows).transpose(0, 1).contiguous(),
        block.cu_q,
        block.cu_k,
        block.max_q,
        block.max_k,
        0.0,
        block.causal,
        no_random_state,
        unused,
        scale=scale,
    )


# ---------------------------------------------------------------------------------------------------


def block_forward(
    q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float, dropout: AttentionDropout | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of the block's query rows over its key rows.

    Args:
        q: [t, hq, d]; k, v: [t, hkv, d] whole storage, hkv divides hq.
        dropout: by explicit scores instead of the kernel; CPU only.

    Returns:
        out [rows, hq, d] in q's dtype and lse [rows, hq] (natural log) in the accumulator's, for `block.q_rows`.
    """
    if dropout is not None:
        assert block.places is not None and not q.is_cuda
        where = (block.segments(), *block.places)
        return dropped_forward(
            q, k, v, *where, causal=block.causal, scale=scale, dropout=dropout, dtype=accumulator_dtype(q.dtype)
        )
    forward = _cuda_forward if q.is_cuda else _cpu_forward
    return forward(q, k, v, block, scale)


def block_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block: Block,
    scale: float,
    dropout: AttentionDropout | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's part of the gradients, given the *final* out and lse of the whole attention.

    Args:
        dout, q, out: [t, hq, d]; k, v: [t, hkv, d]; lse: [t, hq]; whole storage.

    Returns:
        dq for `block.q_rows`, dk and dv for `block.k_rows`.
    """
    if dropout is not None:
        assert block.places is not None and not q.is_cuda
        where = (block.segments(), *block.places)
        dtype = accumulator_dtype(q.dtype)
        return dropped_backward(
            dout, q, k, v, out, lse, *where, causal=block.causal, scale=scale, dropout=dropout, dtype=dtype
        )
    backward = _cuda_backward if q.is_cuda else _cpu_backward
    return backward(dout, q, k, v, out, lse, block, scale)
