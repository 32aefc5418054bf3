"""Local attention with dropout, by explicit scores: for kernels that cannot drop, or whose masks would depend on the layout.

Which probability is dropped is a function of the query's token, the key's position in its document and the head's number in
the whole model (`parallel/keyed_random.py`), so every way to cut a row drops the same ones. Dropout acts on normalised probabilities,
linearly in the values: partial results merge by their log-sum-exp as without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.keyed_random import keep_mask

# Scores that exist at a time.
SCORES = 1 << 22


@dataclass(frozen=True)
class AttentionDropout:
    """What attention needs to drop the same probabilities on every layout.

    Attributes:
        rate: share that is dropped; the others are scaled by 1 / (1 - rate).
        key: of the layer, from `parallel.keyed_random.key_of`.
        first_head: number, in the whole model, of the first query head at hand.
    """

    rate: float
    key: int
    first_head: int = 0

    def kept(self, query_ids: Tensor, key_positions: Tensor, heads: int) -> Tensor:
        """[heads, queries, keys] of 0 and 1 / (1 - rate), as bool times that."""
        numbers = torch.arange(self.first_head, self.first_head + heads, device=query_ids.device)
        columns = ((numbers[:, None] << 32) + key_positions).flatten()
        return keep_mask(self.key, query_ids, columns, self.rate).unflatten(1, (heads, -1)).transpose(0, 1)


@dataclass(frozen=True, eq=False)
class Segment:
    """Queries and keys of one document that meet in a block, as slices of storage rows."""

    q: slice
    k: slice


def _pieces(segment: Segment, heads: int) -> Iterator[tuple[slice, int]]:
    """The segment's queries, a few at a time, and how many came before."""
    keys = segment.k.stop - segment.k.start
    size = max(1, SCORES // max(1, heads * keys))
    for start in range(segment.q.start, segment.q.stop, size):
        yield slice(start, min(start + size, segment.q.stop)), start - segment.q.start


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, before: int) -> Tensor:
    """[g, r, queries, keys] of q [queries, hq, d] and k [keys, g, d], query i being number `before` + i of a square block if causal."""
    grouped = q.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)  # [g, r, queries, d]
    scores = torch.matmul(grouped, k.permute(1, 2, 0)[:, None]) * scale
    if causal:
        later = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu(before + 1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores


def dropped_forward(
    q: Tensor, k: Tensor, v: Tensor, segments: list[Segment], q_ids: Tensor, k_positions: Tensor, *, causal: bool, scale: float,
    dropout: AttentionDropout, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `cp.kernels.block_forward`: out [rows, hq, d] in q's dtype, lse [rows, hq] without dropout, segment after segment.

    Args:
        q: [t, hq, d]; k, v: [t', hkv, d] whole storage; q_ids [t], k_positions [t'] of its rows.
        dtype: of the computation.
    """
    heads, scaled = q.shape[1], 1 / (1 - dropout.rate)
    outs, lses = [], []
    for segment in segments:
        keys, values = (x[segment.k].to(dtype) for x in (k, v))
        for rows, before in _pieces(segment, heads):
            scores = _scores(q[rows].to(dtype), keys, scale, causal, before)
            lse = scores.logsumexp(-1, keepdim=True)  # [g, r, queries, 1]
            kept = dropout.kept(q_ids[rows], k_positions[segment.k], heads).view(scores.shape)
            weights = (scores - lse).exp_() * kept
            out = torch.matmul(weights, values.transpose(0, 1)[:, None]) * scaled  # [g, r, queries, d]
            outs.append(out.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype))
            lses.append(lse[..., 0].permute(2, 0, 1).flatten(1, 2))
    return torch.cat(outs), torch.cat(lses)


def dropped_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: list[Segment], q_ids: Tensor, k_positions: Tensor, *,
    causal: bool, scale: float, dropout: AttentionDropout, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `cp.kernels.block_backward`, from the final out and lse of the whole attention: dq, dk, dv of the segments' rows."""
    heads, scaled = q.shape[1], 1 / (1 - dropout.rate)
    dqs, dks, dvs = [], [], []
    for segment in segments:
        keys, values = (x[segment.k].to(dtype) for x in (k, v))
        dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
        for rows, before in _pieces(segment, heads):
            queries, grads = q[rows].to(dtype), dout[rows].to(dtype)
            scores = _scores(queries, keys, scale, causal, before)
            weights = (scores - lse[rows].to(dtype).T.reshape(*scores.shape[:2], -1, 1)).exp_()
            kept = dropout.kept(q_ids[rows], k_positions[segment.k], heads).view(scores.shape) * scaled
            by_group = grads.unflatten(1, (keys.shape[1], -1)).permute(1, 2, 0, 3)  # [g, r, queries, d]
            of_weights = torch.matmul(by_group, values.permute(1, 2, 0)[:, None]) * kept
            # The sum over all keys of the row, of other blocks too, is in the final out.
            row_sum = (grads * out[rows].to(dtype)).sum(-1).T.reshape(*scores.shape[:2], -1, 1)
            of_scores = weights * (of_weights - row_sum) * scale
            dqs.append(torch.matmul(of_scores, keys.transpose(0, 1)[:, None]).permute(2, 0, 1, 3).flatten(1, 2))
            grouped = queries.unflatten(1, (keys.shape[1], -1)).permute(1, 2, 0, 3)
            dk += torch.matmul(of_scores.transpose(2, 3), grouped).sum(1).transpose(0, 1)
            dv += torch.matmul((weights * kept).transpose(2, 3), by_group).sum(1).transpose(0, 1)
        dks.append(dk)
        dvs.append(dv)
    return torch.cat(dqs), torch.cat(dks), torch.cat(dvs)
