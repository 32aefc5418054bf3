"""What all parts of a run share: configuration, ranks, paths, status."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.schema import RunConfig
from runtime.distributed import Ranks
from runtime.status import RunStatus


@dataclass(frozen=True)
class RunPaths:
    """Where a run writes. Attributes: tensorboard, metrics: None if off."""

    run_dir: Path
    checkpoints: Path
    tensorboard: Path | None
    metrics: Path | None

    @staticmethod
    def of(config: RunConfig, default_run_dir: str) -> RunPaths:
        """The paths of resolved flags. Args: default_run_dir: without --run-dir; the same on every rank."""
        run_dir = Path(config.checkpoint.run_dir or default_run_dir)
        return RunPaths(
            run_dir=run_dir,
            checkpoints=Path(config.checkpoint.save) if config.checkpoint.save else run_dir / "checkpoints",
            tensorboard=_optional(config.logging.tensorboard_dir, run_dir / "tensorboard"),
            metrics=_optional(config.logging.metrics_file, run_dir / "metrics.jsonl"),
        )

    @property
    def status(self) -> Path:
        return self.run_dir / "status.json"

    @property
    def stop_file(self) -> Path:
        return self.run_dir / "stop"

    @property
    def nonfinite(self) -> Path:
        """Records of steps that are not finite, and the weights before the step that ended the run."""
        return self.run_dir / "nonfinite"


def _optional(flag: str | None, default: Path) -> Path | None:
    if flag == "none" or not flag:
        return None if flag else default
    return Path(flag).resolve() if Path(flag).is_symlink() else Path(flag)  # a link that the user names is followed


@dataclass(frozen=True)
class Run:
    """One run on this rank.

    Attributes:
        asked: the flags as given, before `resolve`, by name.
    """

    config: RunConfig
    argv: list[str]
    asked: dict[str, Any]
    ranks: Ranks
    paths: RunPaths
    status: RunStatus
