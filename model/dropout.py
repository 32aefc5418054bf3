"""Dropout before each addition to the residual stream, equal on every layout (`parallel/keyed_random.py`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from parallel.keyed_random import keep_mask, key_of


class HiddenDropout(nn.Module):
    """Zero each channel of each token with probability `rate` in training, and scale the others by 1 / (1 - rate).

    Masks of different names, numbered in the whole model, are independent.
    """

    def __init__(self, rate: float, *, seed: int, name: str) -> None:
        super().__init__()
        self.rate, self.key = rate, key_of(seed, f"dropout {name}")

    def forward(self, x: Tensor, token_ids: Tensor | None) -> Tensor:
        """x [t, h] of the tokens `token_ids` [t]; None: no dropout."""
        if not self.rate or not self.training:
            return x
        assert token_ids is not None
        kept = keep_mask(self.key, token_ids, torch.arange(x.shape[1], device=x.device), self.rate)
        return x * kept * (1 / (1 - self.rate))
