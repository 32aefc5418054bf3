"""Whose layers the model is made of: one name for each module that offers them, and the precision they compute in."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType

import torch.distributed as dist
from torch import Tensor, nn


class Precision:
    """What matrices are multiplied in beside the compute dtype. This one says nothing; `te_layers.FP8` does."""

    def of_model(self) -> AbstractContextManager:
        """Around all layers of a training step's forward pass over one row."""
        return nullcontext()

    def of_layer(self, number: int) -> AbstractContextManager:
        """Around one layer, of this number in the whole model; again when it is computed again."""
        return nullcontext()

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """What training goes on from beside weights and optimiser, by name, live: the same on every rank of a stage. May be collective."""
        return {}


class JoinsWeights(nn.Module):
    """A layer that computes with several of its weights as one tensor. `joined` is that tensor while the weights stay as they are."""

    keeps = False
    joined: Tensor | None = None


@contextmanager
def weights_stay(models: Iterable[nn.Module]) -> Iterator[None]:
    """No weight changes in here: what layers join is joined once, whatever the microbatches and what is computed again."""
    layers = [module for model in models for module in model.modules() if isinstance(module, JoinsWeights)]
    try:
        for layer in layers:
            layer.keeps = True
        yield
    finally:
        for layer in layers:
            layer.keeps, layer.joined = False, None


def layers_of(implementation: str) -> ModuleType:
    """`model.torch_layers`, or `model.te_layers`, whose library is imported only here.

    Both offer RMSNorm, ColumnParallelLinear, RowParallelLinear, LayerNormLinear, LayerNormMLP and VocabParallelEmbedding with the same
    constructors, parameters and calls, and `rotary_tables` and `apply_rotary`, of which the first makes what the second takes.

    Args:
        implementation: a resolved value of `--transformer-impl`.
    """
    if implementation == "te":
        from model import te_layers

        return te_layers
    from model import torch_layers

    assert implementation == "torch"
    return torch_layers


def precision_of(fp8: str, *, group: dist.ProcessGroup, bf16_layers: Collection[int]) -> Precision:
    """What `--fp8` asks for.

    Args:
        group: the ranks that hold the same layers; delayed scaling takes the largest value over it.
        bf16_layers: numbers of layers that stay in bf16.

    Raises:
        ValueError: one line; this card or its software cannot.
    """
    if fp8 == "none":
        return Precision()
    from model import te_layers

    return te_layers.FP8(fp8, group=group, bf16_layers=bf16_layers)
