"""Resolves how a run progresses: samples of each step, steps or tokens in all, and the learning rate's schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from config.schema import DataConfig, ParallelConfig, TrainingConfig, option
from data.batch_schedule import BatchSchedule, parse_rampup
from data.blend import parse_phases
from utils.errors import SizeError, UserError


def resolve_batches(
    training: TrainingConfig, parallel: ParallelConfig, saved: Mapping[str, Any], chosen: list[str]
) -> None:
    """Set `training.batches`, in place.

    Args:
        saved: metadata of the resumed checkpoint, which holds the batch sizes so far; empty: a fresh run.

    Raises:
        UserError: --rampup-batch-size does not lead to --global-batch-size, or the checkpoint is corrupted.
    """
    if training.global_batch_size is None:
        # The fewest that every schedule takes.
        training.global_batch_size = training.micro_batch_size * parallel.dp_size * parallel.pp_size
        chosen.append(
            f"--global-batch-size {training.global_batch_size} (the fewest; few samples make noisy gradients)"
        )
    rampup = parse_rampup(training.rampup_batch_size, training.global_batch_size)
    done = saved.get("step", 0)
    before = BatchSchedule.constant(saved.get("--global-batch-size", 1))
    if isinstance(saved.get("data"), dict) and "batches" in saved["data"]:  # not in an old checkpoint
        before = BatchSchedule.parse(saved["data"]["batches"])
    training.batches = BatchSchedule.build(training.global_batch_size, rampup, done=done, before=before.phases)


def resolve_phases(data: DataConfig, batches: BatchSchedule) -> list[int]:
    """First sample of each phase of --data-path after the first. Raises UserError: they do not ascend."""
    starts: list[int] = []
    first = 0
    words = data.data_path or [""]
    for unit, start, _ in parse_phases(words)[1:]:
        sample = start
        if unit == "tokens":
            sample = -(-start // data.seq_length)
        elif unit == "step":
            sample = batches.first_sample(max(0, start - 1))
        if sample <= first:
            raise UserError(
                f"--data-path {words[0]}: the phase from-{unit} {start} begins with sample {sample}, the one "
                f"before with sample {first}: phases must ascend"
            )
        starts.append(sample)
        first = sample
    return starts


def resolve_lr_schedule(training: TrainingConfig, seq_length: int) -> None:
    """Fill in the open flags of the learning rate's schedule and set --train-iters from --train-tokens, in place.

    Raises:
        UserError: flags of steps and of tokens are mixed, or the parts do not fit into the whole.
    """
    unit, other = ("iters", "tokens") if training.train_tokens is None else ("tokens", "iters")
    for name in ("warmup", "decay", "wsd_decay"):
        if getattr(training, f"lr_{name}_{other}") is not None:
            raise UserError(
                f"{option(f'lr_{name}_{other}')} does not go with --train-{unit}: give {option(f'lr_{name}_{unit}')}"
            )
    if training.train_tokens is not None:
        if training.train_iters != TrainingConfig.train_iters:
            raise UserError(f"--train-iters {training.train_iters} and --train-tokens: give one")
        training.train_iters = training.batches.steps_for(-(-training.train_tokens // seq_length))
    whole = training.train_iters if training.train_tokens is None else training.train_tokens
    twenty_steps = 20 if training.train_tokens is None else training.batches.first_sample(20) * seq_length
    warmup, decay, wsd_decay = (f"lr_{name}_{unit}" for name in ("warmup", "decay", "wsd_decay"))

    def fill(name: str, value: int) -> int:
        if getattr(training, name) is None:
            setattr(training, name, value)
        return getattr(training, name)

    has_decay_end = getattr(training, decay) is not None
    end = fill(decay, whole)
    start = fill(warmup, min(twenty_steps, end // 10))
    # A run shorter than its warm-up is a trial; a decay that ends inside the warm-up is a mistake.
    decays = training.lr_decay_style != "constant"
    if has_decay_end and decays and start >= end:
        raise SizeError(f"{option(warmup)} {start} leaves nothing of {option(decay)} {end}", **{warmup: [end - 1]})
    if decays and training.min_lr > training.lr:
        raise UserError(
            f"--min-lr {training.min_lr} is above --lr {training.lr}: give at most {training.lr}, or use "
            "--lr-decay-style constant"
        )
    if fill(wsd_decay, max(1, end // 10)) > end:
        raise UserError(f"{option(wsd_decay)} {getattr(training, wsd_decay)} is above {option(decay)} {end}")
