"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from config.schema import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class LRSchedule:
    """Linear warm-up to `lr`, then a decay to `min_lr` that ends at step `decay_iters`.

    `cosine` and `linear` decay all the way from the warm-up's end; `constant` does not; `wsd` (warm-up, stable,
    decay; arXiv:2404.06395) holds `lr` until the last `wsd_decay_iters` steps and then decays linearly. A longer
    warm-up shortens this decay. A `min_lr` of 0 is reached one step later: a step at 0 trains nothing (torchtitan and
    Megatron-LM also end above 0).
    """

    lr: float
    min_lr: float
    warmup_iters: int
    decay_iters: int
    style: str
    wsd_decay_iters: int = 0

    def at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        done = step + 1
        if done <= self.warmup_iters:
            return self.lr * done / self.warmup_iters
        if self.style == "constant":
            return self.lr
        begin, end = self.warmup_iters, self.decay_iters + (self.min_lr == 0)
        if self.style == "wsd":
            begin = max(begin, self.decay_iters - self.wsd_decay_iters)
        if done <= begin:
            return self.lr
        share = min(1.0, (done - begin) / max(1, end - begin))
        height = (1 + math.cos(math.pi * share)) / 2 if self.style == "cosine" else 1 - share
        return self.min_lr + (self.lr - self.min_lr) * height


def build_lr_schedule(training: TrainingConfig) -> LRSchedule:
    """The schedule of resolved flags."""
    return LRSchedule(
        lr=training.lr,
        min_lr=training.min_lr,
        warmup_iters=training.lr_warmup_iters,
        decay_iters=training.lr_decay_iters,
        style=training.lr_decay_style,
        wsd_decay_iters=training.lr_wsd_decay_iters,
    )
