"""Learning rate as a pure function of the step, or of the tokens that steps read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from config.schema import TrainingConfig
from data.batch_schedule import BatchSchedule


@dataclass(frozen=True, kw_only=True)
class LRSchedule:
    """Linear warm-up to `lr`, then a decay to `min_lr` that ends at `decay_end`.

    `cosine` and `linear` decay all the way from the warm-up's end; `constant` does not; `wsd` (warm-up, stable,
    decay; arXiv:2404.06395) holds `lr` until the last `wsd_decay` before `decay_end` and then decays linearly. A longer
    warm-up shortens this decay. A `min_lr` of 0 is reached one step later: a step at 0 trains nothing (torchtitan and
    Megatron-LM also end above 0).

    Attributes:
        warmup, decay_end, wsd_decay: in steps; with `batches` in samples.
        batches: samples of each step; None: the rate follows steps.
    """

    lr: float
    min_lr: float
    warmup: float
    decay_end: float
    style: str
    wsd_decay: float = 0
    batches: BatchSchedule | None = None

    def at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        done = step + 1 if self.batches is None else self.batches.first_sample(step + 1)
        if done <= self.warmup:
            return self.lr * done / self.warmup
        if self.style == "constant":
            return self.lr
        last = 1 if self.batches is None else self.batches.size(step)
        begin, end = self.warmup, self.decay_end + last * (self.min_lr == 0)
        if self.style == "wsd":
            begin = max(begin, self.decay_end - self.wsd_decay)
        if done <= begin:
            return self.lr
        share = min(1.0, (done - begin) / max(last, end - begin))
        height = (1 + math.cos(math.pi * share)) / 2 if self.style == "cosine" else 1 - share
        return self.min_lr + (self.lr - self.min_lr) * height


def build_lr_schedule(training: TrainingConfig, seq_length: int) -> LRSchedule:
    """The schedule of resolved flags."""
    in_tokens = training.train_tokens is not None

    def length(name: str) -> float:
        if in_tokens:
            return getattr(training, f"lr_{name}_tokens") / seq_length
        return getattr(training, f"lr_{name}_iters")

    return LRSchedule(
        lr=training.lr,
        min_lr=training.min_lr,
        warmup=length("warmup"),
        decay_end=length("decay"),
        style=training.lr_decay_style,
        wsd_decay=length("wsd_decay"),
        batches=training.batches if in_tokens else None,
    )
