"""The contract of a precision below the compute dtype: contexts around model and layer, and state for checkpoints."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn


class Precision:
    """Matrices multiply in the compute dtype. `model.te_layers.FP8` overrides this."""

    def model_context(self) -> AbstractContextManager:
        """Surrounds all layers in one microbatch's forward pass of training."""
        return nullcontext()

    def layer_context(self, number: int) -> AbstractContextManager:
        """Surrounds the layer of this number in the whole model, in the forward pass and in its recomputation."""
        return nullcontext()

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Live tensors by name that a checkpoint keeps, equal on every rank of a stage. May be collective."""
        return {}
