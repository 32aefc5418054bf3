"""The registry of layer implementations and of their precisions."""

from __future__ import annotations

from collections.abc import Collection
from types import ModuleType

import torch.distributed as dist

from model import torch_layers
from model.precision import Precision


def get_layers(implementation: str) -> ModuleType:
    """The module that `--transformer-impl` names; Transformer Engine is imported only here and in `build_precision`.

    Both offer the same layers, with the same constructors, parameters and calls, and `rotary_tables`, whose result
    their `apply_rotary` takes.
    """
    if implementation == "te":
        from model import te_layers

        return te_layers
    assert implementation == "torch"
    return torch_layers


def build_precision(fp8: str, *, group: dist.ProcessGroup, bf16_layers: Collection[int]) -> Precision:
    """The precision that `--fp8` names.

    Args:
        group: the ranks that hold the same layers; delayed scaling reduces amax over this group.
        bf16_layers: numbers of the layers that stay in bf16.

    Raises:
        UserError: the GPU or its software lacks the recipe.
    """
    if fp8 == "none":
        return Precision()
    from model import te_layers

    return te_layers.FP8(fp8, group=group, bf16_layers=bf16_layers)
