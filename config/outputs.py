"""Refuses checkpoints, folders and outputs that cannot be had, before any process group exists."""

from __future__ import annotations

import os
from pathlib import Path

from config.schema import CheckpointConfig, LoggingConfig, RunConfig, TrainingConfig
from utils.errors import MissingPackageError, UserError, is_installed


def resolve_outputs(config: RunConfig) -> None:
    """Give the flags of checkpoints and logging their values, in place, and check them and every folder.

    Raises:
        UserError: the first flag that cannot be used.
    """
    _resolve_checkpoint(config.checkpoint)
    if config.logging.wandb_project in ("", "none"):
        config.logging.wandb_project = None
    _check_paths(config)
    _check_outputs(config.training, config.checkpoint, config.logging)


def _resolve_checkpoint(checkpoint: CheckpointConfig) -> None:
    if checkpoint.save_final is None:
        checkpoint.save_final = checkpoint.save_interval > 0
    if checkpoint.keep_every and not checkpoint.keep_checkpoints:
        raise UserError(f"--keep-every {checkpoint.keep_every} needs --keep-checkpoints: without it, all are kept")
    if checkpoint.local_save_dir and not Path(checkpoint.local_save_dir).is_absolute():
        raise UserError(
            f"--local-save-dir {checkpoint.local_save_dir}: must be an absolute path on each node's own disk"
        )
    if (checkpoint.local_save_interval > 0) != (checkpoint.local_save_dir is not None):
        raise UserError(
            f"--local-save-interval {checkpoint.local_save_interval} and --local-save-dir {checkpoint.local_save_dir}: "
            "give both, or neither; the folder is on each node's own disk"
        )
    if checkpoint.load_weights_only and not checkpoint.load:
        raise UserError("--load-weights-only needs --load, which names the checkpoint")
    if checkpoint.load_fallback and not (checkpoint.load or checkpoint.resume):
        raise UserError("--load-fallback needs --load or --resume")
    if checkpoint.resume and not (checkpoint.save or checkpoint.run_dir):
        raise UserError(
            "--resume needs --save or --run-dir: without one every start has a new folder and nothing to resume"
        )


def _check_paths(config: RunConfig) -> None:
    logging = config.logging
    folders = {
        "--run-dir": config.checkpoint.run_dir,
        "--save": config.checkpoint.save,
        "--data-cache-path": config.data.data_cache_path,
    }
    if logging.tensorboard_dir != "none":
        folders["--tensorboard-dir"] = logging.tensorboard_dir
    if logging.metrics_file not in (None, "none"):
        assert logging.metrics_file is not None
        if Path(logging.metrics_file).is_dir():
            raise UserError(f"--metrics-file {logging.metrics_file}: is a folder")
        folders["--metrics-file"] = str(Path(logging.metrics_file).parent)
    for name in ("tensorboard", "nonfinite", "profile"):
        inside = Path(config.checkpoint.run_dir or "") / name
        if config.checkpoint.run_dir and inside.is_symlink():
            advice = f", and give its target with --{name}-dir" if name == "tensorboard" else ""
            raise UserError(
                f"--run-dir {config.checkpoint.run_dir}: {inside} is a link, which is not followed; remove it{advice}"
            )
    for flag, folder in folders.items():
        # A filled cache may be read-only; a missing entry is refused when it is needed.
        if folder is not None and not (flag == "--data-cache-path" and Path(folder).is_dir()):
            _check_can_be_made(flag, Path(folder))


def _check_can_be_made(flag: str, folder: Path) -> None:
    """Refuse a folder that does not exist and cannot be made, or that exists and cannot be written to."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists() or p.is_symlink())
    if not existing.is_dir():
        raise UserError(f"{flag} {folder}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {folder}: no permission to write in {existing}")


def _check_outputs(training: TrainingConfig, checkpoint: CheckpointConfig, logging: LoggingConfig) -> None:
    if training.eval_only and not (checkpoint.load or checkpoint.resume):
        raise UserError("--eval-only needs --load or --resume: there is nothing trained to validate")
    if training.eval_only and not training.eval_interval:
        raise UserError("--eval-only with --eval-interval 0: nothing would be validated")
    if logging.profile and logging.profile_steps.start > training.train_iters:
        first = logging.profile_steps.start
        raise UserError(f"--profile-steps {first}: begins after the last step, --train-iters {training.train_iters}")
    if logging.tensorboard_dir != "none" and not is_installed("tensorboard"):
        raise MissingPackageError(
            "--tensorboard-dir needs the tensorboard package: pip install -r requirements.txt, or --tensorboard-dir "
            "none"
        )
    if logging.wandb_project and logging.tensorboard_dir == "none":
        raise UserError("--wandb-project copies the TensorBoard files: leave out --tensorboard-dir none")
    if logging.wandb_project and not is_installed("wandb"):
        raise MissingPackageError("--wandb-project needs the wandb package: pip install wandb, or --wandb-project none")
