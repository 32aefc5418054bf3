"""Reference attention, documents and loss, written independently of `cp/`; and the inverse of its sharding."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cp.layout import invert, shard_indices
from cp.placement import Placement
from parallel.keyed_random import keep_mask, key_of

# Root mean square error of rounding one value to bf16. An error measured on one rank can be exactly 0 (documents of one
# token), so a limit in multiples of it needs this floor.
BF16_ROUNDING = torch.finfo(torch.bfloat16).eps / 8


def unshard_indices(
    padded_lengths: np.ndarray, *, cp_size: int, layout: str, placement: Placement | None = None
) -> np.ndarray:
    """The inverse of `shard_indices`: [T] int64 indices into the concatenated shards that restore the row's order."""
    own = dict(cp_size=cp_size, layout=layout, placement=placement)
    return invert(np.concatenate([shard_indices(padded_lengths, cp_rank=rank, **own) for rank in range(cp_size)]))


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths, padded_lengths, *, scale: float, kept: Tensor | None = None
) -> Tensor:
    """Causal attention within each document by an explicit [T, T] mask.

    q [T, hq, d]; k, v [T, hkv, d] of the whole row in order. Padding is 0. kept: [hq, T, T] factor of the
    probabilities.
    """
    document = np.full(int(np.sum(padded_lengths)), -1)
    at = 0
    for index, (real, padded) in enumerate(zip(lengths, padded_lengths, strict=True)):
        document[at : at + real] = index
        at += padded
    document = torch.from_numpy(document)
    order = torch.arange(len(document))
    allowed = (document[:, None] == document[None, :]) & (document[:, None] >= 0) & (order[:, None] >= order[None, :])
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores.masked_fill(~allowed, float("-inf"))
    # A row of padding has no key: softmax of all -inf is nan, so give it weight 0 by hand.
    weights = torch.softmax(scores.masked_fill(~allowed.any(1)[:, None], 0.0), -1) * allowed
    if kept is not None:
        weights = weights * kept
    return torch.einsum("hqk,khd->qhd", weights, v)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Frobenius norm of the difference over the norm of `want` (or the plain norm where `want` is 0)."""
    want = want.double()
    difference = (got.double() - want).norm().item()
    size = want.norm().item()
    return difference / size if size else difference


def worst(errors: dict[str, float]) -> float:
    """The largest error; infinite if one is NaN, which `max` would skip."""
    return max(error if error == error else float("inf") for error in errors.values())


def random_documents(rng: np.random.Generator, row_length: int, alignment: int) -> tuple[np.ndarray, np.ndarray]:
    """Real and padded lengths that fill a row: ragged, some of length 1, often with a tail of real length 0."""
    real: list[int] = []
    padded: list[int] = []
    left = row_length
    while left:
        longest = left if rng.random() < 0.3 else min(left, 4 * alignment)
        length = 1 if rng.random() < 0.2 else int(rng.integers(1, longest + 1))
        size = -(-length // alignment) * alignment
        if rng.random() < 0.1:  # tail
            length, size = 0, left
        real.append(length)
        padded.append(size)
        left -= size
    return np.array(real), np.array(padded)


def reference_loss(
    weights: dict[str, Tensor],
    config,
    tokens: Tensor,
    labels: Tensor,
    lengths,
    padded_lengths,
    *,
    first_id: int = 0,
    seed: int = 0,
) -> Tensor:
    """Sum of the labelled tokens' cross-entropies of one row, from canonical weights; plain float64 code of its own.

    weights: by canonical name; tokens, labels [T] of the whole row in order. first_id, seed: of dropout's masks, whose
    hash is the only thing shared with the code under test.
    """
    ids = first_id + torch.arange(len(tokens))
    within = torch.cat([torch.arange(n) for n in padded_lengths])

    def dropped(x: Tensor, place: str) -> Tensor:
        rate = config.hidden_dropout
        return x * keep_mask(key_of(seed, f"dropout {place}"), ids, torch.arange(x.shape[1]), rate) / (1 - rate)

    def kept_scores(layer: int) -> Tensor:
        rate, key = config.attention_dropout, key_of(seed, f"dropout layers.{layer}.scores")
        return torch.stack(
            [keep_mask(key, ids, head * 2**32 + within, rate) for head in range(config.num_attention_heads)]
        ) / (1 - rate)

    groups, per_group, dim = (
        config.num_query_groups,
        config.num_attention_heads // config.num_query_groups,
        config.kv_channels,
    )

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.norm_epsilon) * weight

    position = torch.cat([torch.arange(n) for n in padded_lengths]).double()
    frequency = torch.tensor([config.rotary_base ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
    turn = torch.polar(torch.ones(len(position), dim // 2, dtype=torch.float64), position[:, None] * frequency)[:, None]

    def rotate(x: Tensor) -> Tensor:
        turned = torch.complex(x[..., : dim // 2].contiguous(), x[..., dim // 2 :].contiguous()) * turn
        return torch.cat((turned.real, turned.imag), -1)

    x = dropped(weights["embedding.weight"][tokens], "embedding")
    for layer in range(config.num_layers):
        w = {name.split(".", 2)[2]: value for name, value in weights.items() if name.startswith(f"layers.{layer}.")}
        normed = norm(x, w["attention.qkv.layer_norm_weight"])
        queries, keys, values = [], [], []
        rows = iter(w["attention.qkv.weight"].split(dim))  # head by head: per group its queries, its key, its value
        for _ in range(groups):
            queries += [normed @ next(rows).T for _ in range(per_group)]
            keys.append(normed @ next(rows).T)
            values.append(normed @ next(rows).T)
        q, k, v = (torch.stack(heads, 1) for heads in (queries, keys, values))
        if config.qk_norm:
            q, k = norm(q, w["attention.q_norm.weight"]), norm(k, w["attention.k_norm.weight"])
        out = dense_attention(
            rotate(q), rotate(k), v, lengths, padded_lengths, scale=dim**-0.5, kept=kept_scores(layer)
        )
        x = x + dropped(out.flatten(1) @ w["attention.output.weight"].T, f"layers.{layer}.attention")
        normed = norm(x, w["mlp.layer_norm_weight"])
        gate, up = normed @ w["mlp.gate_weight"].T, normed @ w["mlp.up_weight"].T
        x = x + dropped((gate * torch.sigmoid(gate) * up) @ w["mlp.fc2_weight"].T, f"layers.{layer}.mlp")
    head = weights["embedding.weight"] if config.tie_embeddings else weights["lm_head.weight"]
    logits = norm(x, weights["final_norm.weight"]) @ head[: config.vocab_size].T
    counted = labels >= 0
    return -torch.log_softmax(logits, -1)[counted].gather(1, labels[counted][:, None]).sum()
