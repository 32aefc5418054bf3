"""Layers that compute with several of their weights as one tensor, and the cache of that tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Fuse(torch.autograd.Function):
    """Concatenate the rows of two weights, or return the cached result `fused`."""

    @staticmethod
    def forward(ctx, first: Tensor, second: Tensor, fused: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.rows = len(first), len(second)
        return torch.cat((first, second)) if fused is None else fused.detach()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return *grad.split(ctx.rows), None


class FusedWeights(nn.Module):
    """A layer that concatenates weights. `fused` caches the result while `is_cached` is set."""

    is_cached = False
    fused: Tensor | None = None


@contextmanager
def cache_fused_weights(models: Iterable[nn.Module]) -> Iterator[None]:
    """Concatenate each layer's weights once in this context, over all microbatches and recomputations.

    The weights must not change inside.
    """
    layers = [module for model in models for module in model.modules() if isinstance(module, FusedWeights)]
    try:
        for layer in layers:
            layer.is_cached = True
        yield
    finally:
        for layer in layers:
            layer.is_cached, layer.fused = False, None
