"""Attention of one block with dropout, by explicit scores. CPU only.

The flash kernels cannot drop, or draw masks that depend on the layout. Here the mask is a function of the query token's
id, the key's position in its document and the head's number in the whole model (`parallel/keyed_random.py`), so every
layout drops the same probabilities. Dropout acts on normalised probabilities and is linear in the values: partial
results merge by their log-sum-exp as without dropout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cp.blocks import Block, accumulator_dtype
from parallel.collectives import WaitClock
from parallel.keyed_random import keep_mask

# Scores that exist at a time.
MAX_SCORES = 1 << 22


@dataclass(frozen=True)
class AttentionDropout:
    """The dropout of one layer.

    Attributes:
        rate: probability of a drop; kept probabilities are scaled by 1 / (1 - rate).
        key: of the layer, from `parallel.keyed_random.key_of`.
        first_head: number, in the whole model, of this rank's first query head.
    """

    rate: float
    key: int
    first_head: int = 0

    @property
    def scale(self) -> float:
        return 1 / (1 - self.rate)

    def kept(self, query_ids: Tensor, key_positions: Tensor, heads: int) -> Tensor:
        """[heads, queries, keys] bool: the probabilities that are kept."""
        numbers = torch.arange(self.first_head, self.first_head + heads, device=query_ids.device)
        columns = ((numbers[:, None] << 32) + key_positions).flatten()
        return keep_mask(self.key, query_ids, columns, self.rate).unflatten(1, (heads, -1)).transpose(0, 1)


def _chunks(queries: slice, keys: slice, heads: int) -> Iterator[tuple[slice, int]]:
    """Chunks of the queries with at most `MAX_SCORES` scores, and the number of queries before each."""
    size = max(1, MAX_SCORES // max(1, heads * (keys.stop - keys.start)))
    for start in range(queries.start, queries.stop, size):
        yield slice(start, min(start + size, queries.stop)), start - queries.start


def _group(x: Tensor, groups: int) -> Tensor:
    """[queries, hq, d] -> [g, r, queries, d], r query heads for each of g key/value heads."""
    return x.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, before: int) -> Tensor:
    """q [queries, hq, d], k [keys, g, d] -> [g, r, queries, keys]; causal: q starts at query `before` of a square."""
    scores = torch.matmul(_group(q, k.shape[1]), k.permute(1, 2, 0)[:, None]) * scale
    if causal:
        later = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu(before + 1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores


@dataclass(frozen=True)
class AttentionOptions:
    """How attention computes.

    Attributes:
        scale: of the softmax.
        dropout: of the probabilities; CPU only.
        clock: measures the time that computation waits for K, V and their gradients.
        heads_k_stride: key/value heads that `all_gather` gathers at a time; divides their number.
    """

    scale: float
    dropout: AttentionDropout | None = None
    clock: WaitClock | None = None
    heads_k_stride: int = 1

    def for_heads(self, first: int) -> AttentionOptions:
        """The options of a slice of the query heads that begins with head `first`."""
        if self.dropout is None:
            return self
        return replace(self, dropout=replace(self.dropout, first_head=self.dropout.first_head + first))


def dropout_forward(q: Tensor, k: Tensor, v: Tensor, block: Block, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """As `cp.kernels.block_forward`; the log-sum-exp is that without dropout."""
    dropout, scale = options.dropout, options.scale
    assert block.dropout_ids is not None and dropout is not None and not q.is_cuda
    (q_ids, k_positions), dtype, heads = block.dropout_ids, accumulator_dtype(q.dtype), q.shape[1]
    outs, lses = [], []
    for at_q, at_k in block.segments():
        keys, values = (x[at_k].to(dtype) for x in (k, v))
        for tokens, before in _chunks(at_q, at_k, heads):
            scores = _scores(q[tokens].to(dtype), keys, scale, block.causal, before)
            lse = scores.logsumexp(-1, keepdim=True)  # [g, r, queries, 1]
            kept = dropout.kept(q_ids[tokens], k_positions[at_k], heads).view(scores.shape)
            weights = (scores - lse).exp_() * kept
            out = torch.matmul(weights, values.transpose(0, 1)[:, None]) * dropout.scale  # [g, r, queries, d]
            outs.append(out.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype))
            lses.append(lse[..., 0].permute(2, 0, 1).flatten(1, 2))
    return torch.cat(outs), torch.cat(lses)


def dropout_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block, options: AttentionOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cp.kernels.block_backward`."""
    dropout, scale = options.dropout, options.scale
    assert block.dropout_ids is not None and dropout is not None and not q.is_cuda
    (q_ids, k_positions), dtype, heads = block.dropout_ids, accumulator_dtype(q.dtype), q.shape[1]
    dqs, dks, dvs = [], [], []
    for at_q, at_k in block.segments():
        keys, values = (x[at_k].to(dtype) for x in (k, v))
        groups = keys.shape[1]
        dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
        for tokens, before in _chunks(at_q, at_k, heads):
            queries, grads = q[tokens].to(dtype), dout[tokens].to(dtype)
            scores = _scores(queries, keys, scale, block.causal, before)
            head_shape = (*scores.shape[:2], -1, 1)  # [g, r, queries, 1]
            weights = (scores - lse[tokens].to(dtype).T.reshape(head_shape)).exp_()
            kept = dropout.kept(q_ids[tokens], k_positions[at_k], heads).view(scores.shape) * dropout.scale
            grouped_grads = _group(grads, groups)
            dweights = torch.matmul(grouped_grads, values.permute(1, 2, 0)[:, None]) * kept
            # The softmax's sum runs over all keys, those of other blocks too: the final out holds it.
            delta = (grads * out[tokens].to(dtype)).sum(-1).T.reshape(head_shape)
            dscores = weights * (dweights - delta) * scale
            dqs.append(torch.matmul(dscores, keys.transpose(0, 1)[:, None]).permute(2, 0, 1, 3).flatten(1, 2))
            dk += torch.matmul(dscores.transpose(2, 3), _group(queries, groups)).sum(1).transpose(0, 1)
            dv += torch.matmul((weights * kept).transpose(2, 3), grouped_grads).sum(1).transpose(0, 1)
        dks.append(dk)
        dvs.append(dv)
    return torch.cat(dqs), torch.cat(dks), torch.cat(dvs)
