"""Text from a trained model, one token's forward pass a token: keys and values of what was read are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cp.packed_seq import PackedSeq, build_packed_seq
from model.gpt import GPT


class CachedAttention:
    """The `attention` of a GPT that reads one document bit by bit: first any number of tokens, then one at a time.

    Args:
        num_layers: which call it in turn.
        scale: of the scores.
    """

    def __init__(self, num_layers: int, scale: float) -> None:
        self.num_layers, self.scale = num_layers, scale
        self.length = 0  # tokens of which every layer holds keys and values
        self._calls = 0
        self._kept: list[tuple[Tensor, Tensor]] = []

    def clear(self, most: int) -> None:
        """Begin a document of at most so many tokens."""
        self.length, self.most, self._calls, self._kept = 0, most, 0, []

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, packed_seq: PackedSeq, group: dist.ProcessGroup, **options: Any
    ) -> Tensor:
        """q [t, hq, d]; k, v [t, g, d] of the next t tokens -> [t, hq, d]."""
        layer = self._calls % self.num_layers
        if layer == len(self._kept):
            self._kept.append((k.new_empty(self.most, *k.shape[1:]), v.new_empty(self.most, *v.shape[1:])))
        keys, values = self._kept[layer]
        end = self.length + len(k)
        assert len(q) == 1 or self.length == 0, "one token at a time after the first ones"
        keys[self.length : end], values[self.length : end] = k, v
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys[:end].transpose(0, 1)[None],
            values[:end].transpose(0, 1)[None],
            is_causal=len(q) > 1,
            scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        self._calls += 1
        if layer == self.num_layers - 1:
            self.length = end
        return out[0].transpose(0, 1)


def choose(logits: Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A token drawn from the smallest set of most likely ones that together reach `top_p`.

    Args:
        logits: [V].
        temperature: 0 takes the most likely.
        top_p: above 0; 1 draws from all.
        generator: of the host.
    """
    if temperature == 0:
        return int(logits.argmax())
    p, order = torch.softmax(logits.double().cpu() / temperature, -1).sort(descending=True, stable=True)
    kept = p.cumsum(0) - p < top_p  # those before which less than top_p was reached: never none
    return int(order[torch.multinomial(p * kept, 1, generator=generator)])


@torch.no_grad()
def continue_text(
    model: GPT,
    prompt: list[int],
    *,
    tokens: int,
    eod: int | None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """The ids that follow `prompt`, until there are `tokens` or `eod` is drawn, which is not given.

    Args:
        model: on one rank, in eval mode, with a `CachedAttention`.
        prompt: at least one id.
        seed: of the draws.
    """
    assert prompt and not model.training
    cache = model.layers["0"].attention.attention  # type: ignore[union-attr]
    assert isinstance(cache, CachedAttention)
    cache.clear(len(prompt) + tokens)
    generator = torch.Generator().manual_seed(seed)
    device = model.output_weight.device
    read = prompt
    for _ in range(tokens):
        packed_seq, _ = build_packed_seq(np.array([len(read)]), np.array([len(read)]), layout="contiguous")
        at = torch.arange(cache.length, cache.length + len(read), device=device)
        row = replace(packed_seq, positions=at)
        last = torch.tensor([len(read) - 1], device=device)
        logits = model(torch.tensor(read, device=device), row, logits_rows=last)
        assert isinstance(logits, Tensor)
        chosen = choose(logits[0], temperature=temperature, top_p=top_p, generator=generator)
        if chosen == eod:
            return
        yield chosen
        read = [chosen]
