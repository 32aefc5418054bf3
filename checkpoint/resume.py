"""How a run starts: fresh, resumed from a checkpoint, or fresh with a checkpoint's weights; what must match."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from checkpoint.files import (
    CorruptedCheckpoint,
    OpenedFile,
    find_checkpoint,
    list_checkpoints,
    list_older,
    quarantine,
    read_run_metadata,
    recorded_save,
)
from checkpoint.saver import from_rank_zero, load_checkpoint
from config.schema import CheckpointConfig, LoggingConfig, OnResume, RunConfig, option
from data.dataset import BlendedDataset, SampleDataset
from data.mixture import add_rows
from data.tokenizer import Tokenizer
from model.config import GPTConfig
from parallel.grid import Grid
from utils.errors import UserError

IMPORTED = "imported from"  # metadata of a checkpoint that has weights only (tools/convert_hf.py)
DOCUMENTS, SOURCES = "training documents", "data sources"  # metadata: one hash; name, hash and share of each source
OPTIMIZER = "--optimizer"  # metadata: which moments a checkpoint holds
KEPT: tuple[OnResume, ...] = ("fixed", "printed")  # flags that a checkpoint stores
# Metadata that may differ when a run is resumed; the banner prints each difference.
FREE_ON_RESUME = tuple(option(name) for name in RunConfig().flags("printed"))
# Metadata of the model that may differ when a new run loads only weights: the rotary embedding.
FREE_FOR_WEIGHTS = (
    "model rotary_base",
    "model rope_scaling",
    "model rope_scaling_factor",
    "model rope_original_seq_length",
)


@dataclass(frozen=True)
class LoadPlan:
    """The checkpoint to load.

    Attributes:
        metadata: content of its run.json.
        weights_only: a new run with its weights; else a resumed run.
        older: checkpoints to load instead where this one is corrupted, newest first.
        skipped: newer checkpoints with a corrupted run.json, each with the error.
    """

    checkpoint: Path
    metadata: dict[str, Any]
    weights_only: bool
    older: tuple[Path, ...] = ()
    skipped: tuple[tuple[Path, str], ...] = ()


@dataclass(frozen=True)
class TrainState:
    """State of a run before its first step.

    Attributes:
        checkpoint: loaded; None: a fresh run.
        first_step: number of steps that are done.
        notes: lines for the banner.
        changed: a line for each flag or source that is another than the checkpoint's.
        data: state of the data sources, from run.json.
        validation_due: a request to stop ended the validation after `first_step`.
    """

    checkpoint: Path | None = None
    first_step: int = 0
    notes: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    validation_due: bool = False

    @property
    def is_resumed(self) -> bool:
        return self.first_step > 0


def find_start(config: CheckpointConfig, logging: LoggingConfig) -> LoadPlan | None:
    """Return the checkpoint that `--resume` and `--load` name; None: a fresh run.

    With both, the run's own newest checkpoint comes first: a requeued job repeats the command of its first start.

    Raises:
        UserError: no checkpoint there, a corrupted one, or checkpoints or metrics of another run in the way.
    """
    save = Path(config.save) if config.save else Path(config.run_dir or "") / "checkpoints"
    found = list_checkpoints(save) if config.save or config.run_dir else []
    if config.resume and found:
        return _plan_load(found[-1], weights_only=False, fallback=config.load_fallback)
    if config.resume and config.run_dir and not config.save:
        elsewhere = recorded_save(Path(config.run_dir))
        if list_checkpoints(elsewhere):
            raise UserError(
                f"--run-dir {config.run_dir}: this run's checkpoints are in {elsewhere}: add --save {elsewhere}"
            )
    plan = None
    if config.load:
        checkpoint = find_checkpoint(Path(config.load))
        plan = _plan_load(checkpoint, weights_only=config.load_weights_only, fallback=config.load_fallback)
    resumed = None if plan is None or plan.weights_only else plan.checkpoint.resolve()
    if found and resumed != found[-1].resolve():
        raise UserError(
            f"--save {save} already holds {found[-1].name}: resume that run with --resume, or choose another folder"
        )
    metrics_file = logging.metrics_file or (config.run_dir and f"{config.run_dir}/metrics.jsonl")
    is_new = not resumed and not config.resume and metrics_file not in (None, "none")
    if is_new and metrics_file and Path(metrics_file).exists() and Path(metrics_file).stat().st_size:
        way = "resume that run with --resume, or " if config.save or config.run_dir else ""
        raise UserError(f"--metrics-file {metrics_file} is another run's: {way}choose another file or --run-dir")
    return plan


def _plan_load(checkpoint: Path, *, weights_only: bool, fallback: bool) -> LoadPlan:
    """Plan to load the checkpoint, or with `fallback` the newest older one whose run.json is readable."""
    older = list_older(checkpoint)
    candidates = (checkpoint, *older) if fallback else (checkpoint,)
    skipped: list[tuple[Path, str]] = []
    for number, candidate in enumerate(candidates, 1):
        try:
            metadata = read_run_metadata(candidate)
        except CorruptedCheckpoint as error:
            skipped.append((candidate, str(error)))
        else:
            if IMPORTED in metadata and not weights_only:
                raise UserError(f"--load {candidate}: has weights only, imported ones; add --load-weights-only")
            return LoadPlan(candidate, metadata, weights_only, candidates[number:], tuple(skipped))
    raise UserError(f"{skipped[-1][1]}{_hint_fallback(older, fallback)}")


def _hint_fallback(older: Collection[Path], fallback: bool) -> str:
    """Return the end of an error of a corrupted checkpoint: what else can be loaded."""
    if not older:
        return "; there is no older one beside it"
    return "" if fallback else f"; --load-fallback takes an older one, such as {next(iter(older)).name}"


def run_metadata(
    config: RunConfig, architecture: GPTConfig, tokenizer: Tokenizer, samples: SampleDataset
) -> dict[str, Any]:
    """Return what a resumed run must share with the run that wrote its checkpoint."""
    metadata = {option(name): value for kind in KEPT for name, value in config.flags(kind).items()}
    metadata |= {
        f"model {name}": value for name, value in asdict(architecture).items() if not name.endswith("_dropout")
    }
    metadata["weights' dtype"] = config.training.parameter_dtype
    metadata |= {"tokenizer": tokenizer.fingerprint, DOCUMENTS: samples.fingerprint()}
    later = samples.mixtures[1:] if isinstance(samples, BlendedDataset) else []
    phases = [[*row, mixture.first] for number, mixture in enumerate(later, 1) for row in samples.list_rows(number)]
    return metadata | {SOURCES: samples.list_rows(0) + phases}


def describe_data_change(saved: list[list] | None, wanted: list[list]) -> str:
    """Which source of the data is another one.

    Args:
        saved, wanted: [name, fingerprint, share] of each source, in later phases also the first sample; None: of an
            old checkpoint.
    """
    if saved is None:
        return "the documents are others; the checkpoint is too old to say of which source"
    before, now = (
        {" from sample ".join(map(str, [row[0], *row[3:]])): row[1:3] for row in rows} for rows in (saved, wanted)
    )
    changes = []
    for name in before | now:
        if name not in before or name not in now:
            changes.append(f"{name} is {'new' if name in now else 'missing'}")
        elif before[name][0] != now[name][0]:
            changes.append(f"the documents of {name} are others")
        elif before[name][1] != now[name][1]:
            changes.append(f"{now[name][1]:.4%} of samples from {name}, in the checkpoint {before[name][1]:.4%}")
    return "; ".join(changes) or f"the sources stand in another order; the checkpoint's is {', '.join(before)}"


def check_same_run(
    saved: dict[str, Any],
    wanted: dict[str, Any],
    free: Collection[str],
    checkpoint: Path,
    *,
    is_tokenizer_trained: bool = False,
) -> list[str]:
    """Refuse to load a checkpoint of another model or other data.

    Args:
        saved, wanted: metadata of the checkpoint and of this run, by flag (`--hidden-size`) or name.
        free: names that may differ, such as the learning rate.
        is_tokenizer_trained: this run's, since none is given.

    Returns:
        A line for each name of `free` that differs.

    Raises:
        UserError: names the first other difference, with both values.
    """
    changed = []
    saved = {
        OPTIMIZER: "adamw",
        "--rampup-batch-size": None,
        "--bos": False,
    } | saved  # of checkpoints from before the flags
    for name, value in wanted.items():
        if name == SOURCES or (name in saved and saved[name] == value):
            continue
        if name == DOCUMENTS and name in saved:
            why = f"--data-path: {describe_data_change(saved.get(SOURCES), wanted[SOURCES])}"
            if name not in free:
                raise UserError(
                    f"{why}; a resumed run reads the data of its checkpoint {checkpoint}: give those, allow the change "
                    "with --new-data, or start a new run from its weights with --load-weights-only"
                )
            changed.append(why)
        elif name in free:
            if IMPORTED not in saved or name in saved:
                changed.append(f"{name} {value} (the checkpoint: {saved.get(name, 'unknown')})")
        elif name in saved:
            why = "; no --tokenizer-model is given, so one was trained on --data-path: give the checkpoint's"
            end = why if name == "tokenizer" and is_tokenizer_trained else ""
            raise UserError(f"{name} {value}: the checkpoint {checkpoint} was made with {saved[name]}{end}")
        else:
            raise UserError(f"{name} {value}: the checkpoint {checkpoint} does not say with what it was made")
    return changed


def free_on_resume(config: RunConfig) -> set[str]:
    """Metadata that may differ when this run is resumed."""
    return {*FREE_ON_RESUME, *map(option, config.changeable), *([DOCUMENTS] if config.data.new_data else [])}


def load_start(
    plan: LoadPlan,
    wanted: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    grid: Grid,
    *,
    save: Path,
    config: RunConfig,
    is_tokenizer_trained: bool = False,
    group: dist.ProcessGroup | None = None,
) -> TrainState:
    """Load the checkpoint that `find_start` found, in place. Collective.

    Args:
        wanted: metadata of this run, from `run_metadata`.
        save: folder where the run saves; a corrupted checkpoint there is quarantined.
        config: says what may change.
        is_tokenizer_trained: as `check_same_run`'s.
        group: as `load_checkpoint`'s.

    Raises:
        UserError: another model or other data; or a corrupted checkpoint, without `--load-fallback` or an older one.
    """
    free = free_on_resume(config)
    if not config.keeps_data_order:
        free = {*FREE_ON_RESUME, *(option(name) for name in RunConfig().flags("fixed")), DOCUMENTS} - {OPTIMIZER}
    if plan.weights_only:
        of_model = {name for name in wanted if name.startswith("model ") or name == "tokenizer"}
        free = (wanted.keys() - of_model).union(FREE_FOR_WEIGHTS)
    skipped = list(plan.skipped)
    for checkpoint in (plan.checkpoint, *plan.older):
        try:
            opened: set[OpenedFile] = set()
            saved = from_rank_zero(partial(read_run_metadata, checkpoint, opened), group)
            changed = check_same_run(saved, wanted, free, checkpoint, is_tokenizer_trained=is_tokenizer_trained)
            state = None if plan.weights_only else optimizer
            step = load_checkpoint(checkpoint, model, state, grid, group=group, opened=opened)
            break
        except CorruptedCheckpoint as error:
            skipped.append((checkpoint, str(error)))
    else:
        raise UserError(f"{skipped[-1][1]}{_hint_fallback(list_older(checkpoint), bool(plan.older))}")
    notes = [f"passed over a corrupted checkpoint: {why}" for _, why in skipped]
    if dist.get_rank() == 0 and not plan.weights_only:
        ours = [path for path, _ in skipped if path.parent.resolve() == save.resolve()]
        notes += [f"quarantined as {quarantine(path).name}" for path in ours]
    first_step, due = (0, False) if plan.weights_only else (step, saved.get("validation_due") is True)
    trains_on = not plan.weights_only and not config.training.eval_only
    if trains_on and saved[DOCUMENTS] != wanted[DOCUMENTS] and SOURCES not in saved:
        raise UserError(f"--new-data: the checkpoint {checkpoint} is too old to say where its sources stood")
    data = add_rows(saved.get("data", {}), saved.get(SOURCES))
    return TrainState(checkpoint, first_step, notes, changed, data, due)
