"""Where a run starts: fresh, from a checkpoint, or from a checkpoint's weights alone, and what must be the same then."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from checkpoint.files import DamagedCheckpoint, checkpoints, find_checkpoint, older_than, read_run_facts, set_aside
from checkpoint.saver import load_checkpoint
from config.schema import CheckpointConfig, LoggingConfig, OnResume, RunConfig, option
from data.dataset import SampleDataset
from data.tokenizer import Tokenizer
from model.config import GPTConfig
from parallel.grid import Grid
from utils.errors import UserError

KEPT: tuple[OnResume, ...] = ("fixed", "printed")  # flags that a checkpoint stores
# Those that may change when a run goes on from a checkpoint; what changed is printed.
FREE_FACTS = tuple(option(name) for name in RunConfig().flags("printed"))
# What a new run that takes only the weights may change of the model: how positions turn.
FREE_OF_WEIGHTS = (
    "model rotary_base",
    "model rope_scaling",
    "model rope_scaling_factor",
    "model rope_original_seq_length",
)


@dataclass(frozen=True)
class Start:
    """A checkpoint to start from.

    Attributes:
        facts: its run.json.
        weights_only: a new run from its weights; else the same run goes on.
        older: checkpoints that may be taken instead if it is damaged, newest first.
        damaged: those that were passed over already, each with why.
    """

    checkpoint: Path
    facts: dict[str, Any]
    weights_only: bool
    older: tuple[Path, ...]
    damaged: tuple[tuple[Path, str], ...] = ()


def find_start(checkpoint: CheckpointConfig, logging: LoggingConfig) -> Start | None:
    """What `--resume`, `--load` and their kin mean here; None: a fresh start.

    Raises:
        ValueError: no checkpoint there, a damaged one, or another run's checkpoints or metrics in the way.
    """
    save = Path(checkpoint.save) if checkpoint.save else Path(checkpoint.run_dir or "") / "checkpoints"
    found = checkpoints(save) if checkpoint.save or checkpoint.run_dir else []
    if checkpoint.resume and found:
        return _newest_readable(found[-1], weights_only=False, fallback=checkpoint.load_fallback)
    start = None
    if checkpoint.load:
        start = _newest_readable(
            find_checkpoint(Path(checkpoint.load)),
            weights_only=checkpoint.load_weights_only,
            fallback=checkpoint.load_fallback,
        )
    goes_on = start is not None and not start.weights_only
    if found and not (goes_on and start is not None and start.checkpoint.resolve() == found[-1].resolve()):
        raise UserError(
            f"--save {save} already holds {found[-1].name}: resume it with --resume, or choose another folder"
        )
    metrics_file = logging.metrics_file or (checkpoint.run_dir and f"{checkpoint.run_dir}/metrics.jsonl")
    is_new = not goes_on and not checkpoint.resume and metrics_file not in (None, "none")
    if is_new and metrics_file and Path(metrics_file).exists() and Path(metrics_file).stat().st_size:
        raise UserError(
            f"--metrics-file {metrics_file} is another run's: --resume it, or choose another file or --run-dir"
        )
    return start


def _newest_readable(checkpoint: Path, *, weights_only: bool, fallback: bool) -> Start:
    """The checkpoint, or with `fallback` the newest older one, whose run.json can be read."""
    older = older_than(checkpoint)
    damaged: tuple[tuple[Path, str], ...] = ()
    for number, candidate in enumerate((checkpoint, *older)):
        try:
            facts = read_run_facts(candidate)
        except DamagedCheckpoint as error:
            if not fallback or number == len(older):
                raise UserError(f"{error}{_way_out(older)}") from error
            damaged += ((candidate, str(error)),)
            continue
        return Start(candidate, facts, weights_only, tuple(older[number:]) if fallback else (), damaged)
    raise AssertionError("the last candidate returns or raises")


def _way_out(older: Collection[Path]) -> str:
    return (
        f"; --load-fallback takes an older one, such as {next(iter(older)).name}"
        if older
        else "; there is no older one beside it"
    )


def run_facts(
    config: RunConfig, architecture: GPTConfig, tokenizer: Tokenizer, sequences: SampleDataset
) -> dict[str, Any]:
    """What a run that goes on from a checkpoint must share with the one that wrote it."""
    facts = {option(name): value for kind in KEPT for name, value in config.flags(kind).items()}
    facts |= {f"model {name}": value for name, value in asdict(architecture).items() if not name.endswith("_dropout")}
    facts["weights' dtype"] = config.training.parameter_dtype
    return facts | {"tokenizer": tokenizer.fingerprint, "training documents": sequences.fingerprint()}


def check_same_run(facts: dict[str, Any], wanted: dict[str, Any], free: Collection[str], checkpoint: Path) -> list[str]:
    """Refuse to go on with another model or other data than the checkpoint's.

    Args:
        facts, wanted: the checkpoint's and the run's, by flag (`--hidden-size`) or name.
        free: those that may change on purpose, such as the learning rate.

    Returns:
        A line for each of `free` that did change.

    Raises:
        ValueError: names the first other that differs or that the checkpoint does not have, with both values.
    """
    changed = []
    for name, value in wanted.items():
        if name in facts and facts[name] == value:
            continue
        if name in free:
            changed.append(f"{name} {value} (the checkpoint: {facts.get(name, 'unknown')})")
        elif name in facts:
            raise UserError(f"{name} {value}: the checkpoint {checkpoint} was made with {facts[name]}")
        else:
            raise UserError(f"{name} {value}: the checkpoint {checkpoint} does not say with what it was made")
    return changed


@dataclass(frozen=True)
class Started:
    """Where a run stands after loading: the checkpoint it came from, its first step, lines for the banner, where its data stand."""

    checkpoint: Path | None = None
    first_step: int = 0
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def goes_on(self) -> bool:
        return self.first_step > 0


def load_start(
    start: Start,
    wanted: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    grid: Grid,
    *,
    save: Path,
    group: dist.ProcessGroup | None = None,
) -> Started:
    """Load what `find_start` found, in place. Collective.

    Args:
        wanted: the run's own facts, from `run_facts`.
        save: where the run saves; a damaged checkpoint that was passed over there is set aside under another name.
        group: as `load_checkpoint`'s.

    Raises:
        ValueError: another model or other data; or a damaged checkpoint without `--load-fallback` or an older whole one.
    """
    free: Collection[str] = FREE_FACTS
    if start.weights_only:
        free = [
            name for name in wanted if name in FREE_OF_WEIGHTS or not (name.startswith("model ") or name == "tokenizer")
        ]
    damaged = list(start.damaged)
    candidates = (start.checkpoint, *start.older)
    for number, checkpoint in enumerate(candidates, 1):
        try:
            facts = read_run_facts(checkpoint)
            changed = check_same_run(facts, wanted, free, checkpoint)
            step = load_checkpoint(checkpoint, model, None if start.weights_only else optimizer, grid, group=group)
        except DamagedCheckpoint as error:
            if number == len(candidates):
                raise UserError(f"{error}{'' if start.older else _way_out(older_than(checkpoint))}") from error
            damaged.append((checkpoint, str(error)))
            continue
        notes = [f"passed over a damaged checkpoint: {why}" for _, why in damaged]
        if dist.get_rank() == 0 and not start.weights_only:
            notes += [
                f"set aside as {set_aside(path).name}" for path, _ in damaged if path.parent.resolve() == save.resolve()
            ]
        return Started(
            checkpoint,
            0 if start.weights_only else step,
            notes + [f"changed: {line}" for line in changed],
            facts.get("data", {}),
        )
    raise AssertionError("the last candidate returns or raises")
