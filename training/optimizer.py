"""AdamW (arXiv:1711.05101) with weight decay on matrices only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from config.schema import TrainingConfig


def build_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over this rank's shards, with PyTorch's fused kernel. Norm weights (vectors) are not decayed."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (training.adam_beta1, training.adam_beta2)
    return torch.optim.AdamW(groups, lr=training.lr, betas=betas, eps=training.adam_eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def skip_update_if(optimizer: torch.optim.AdamW, is_skipped: Tensor) -> None:
    """The next step changes no weight, moment or step count where the scalar is True. The host does not wait for it.

    `found_inf` is how `torch.amp.GradScaler` tells a fused optimizer to skip.
    """
    optimizer.found_inf = is_skipped.to(torch.float32)  # type: ignore[attr-defined]
