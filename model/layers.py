"""Whose layers the model is made of: one name for each module that offers them."""

from __future__ import annotations

from types import ModuleType


def layers_of(implementation: str) -> ModuleType:
    """`model.torch_layers`, or `model.te_layers`, whose library is imported only here.

    Both offer RMSNorm, ColumnParallelLinear, RowParallelLinear, LayerNormLinear, LayerNormMLP and VocabParallelEmbedding with the same
    constructors, parameters and calls.

    Args:
        implementation: a resolved value of `--transformer-impl`.
    """
    if implementation == "te":
        from model import te_layers

        return te_layers
    from model import torch_layers

    assert implementation == "torch"
    return torch_layers
