"""Layers that compute with several of their weights as one tensor, and the cache of that tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


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
