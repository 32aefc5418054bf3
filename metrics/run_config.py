"""The configuration of a run, as `<run-dir>/config.json` holds it and TensorBoard shows it."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from typing import Any

import torch

from config.schema import RunConfig
from model.config import GPTConfig, count_parameters
from parallel.grid import AXES


def configuration(
    config: RunConfig, argv: Sequence[str], architecture: GPTConfig, *, world_size: int
) -> dict[str, Any]:
    """What config.json holds: every resolved flag, command line, grid, model size, versions, start time."""
    return {
        "flags": config.flags(),
        "argv": list(argv),
        "layout": {axis: getattr(config.parallel, f"{axis}_size") for axis in AXES},
        "parameters": count_parameters(architecture),
        "vocab_size": architecture.vocab_size,
        "world_size": world_size,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def flags_as_text(flags: dict[str, Any]) -> str:
    """A Markdown table of the flags."""
    rows = [
        f"| --{name.replace('_', '-')} | {str(value).replace('|', chr(92) + '|')} |"
        for name, value in sorted(flags.items())
    ]
    return "\n".join(["| flag | value |", "|---|---|", *rows])
