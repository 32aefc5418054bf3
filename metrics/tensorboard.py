"""Where a run's curves go beside its own metrics file: TensorBoard, Weights & Biases, behind one small interface."""

from __future__ import annotations

import hashlib
import math
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from config.schema import RunConfig
from cp.layout import attention_pairs
from data.dataset import BlendedDataset, PackedDataset, SampleDataset
from model.config import GPTConfig, count_parameters
from parallel.grid import AXES

MOST_LENGTHS = 1_000_000  # in a histogram


class Writer(Protocol):
    def scalars(self, values: dict[str, float], step: int) -> None:
        """Curves by name, such as `train/loss`."""
        ...

    def text(self, name: str, markdown: str) -> None: ...

    def histogram(self, name: str, values: np.ndarray, bins: np.ndarray) -> None:
        """Args: bins: [n + 1] edges."""
        ...

    def picture(self, name: str, figure: Any) -> None:
        """A matplotlib figure, which is closed."""
        ...

    def close(self) -> None: ...


class TensorBoardWriter:
    """Args: keep_before: of a run that goes on: what was written for later steps is hidden."""

    def __init__(self, folder: Path, keep_before: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=None if keep_before is None else keep_before + 1)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def text(self, name: str, markdown: str) -> None:
        self.writer.add_text(name, markdown)

    def histogram(self, name: str, values: np.ndarray, bins: np.ndarray) -> None:
        counts, edges = np.histogram(values, bins=bins)
        total = int(counts.sum())
        if total:
            self.writer.add_histogram_raw(
                name,
                min=float(values.min()),
                max=float(values.max()),
                num=total,
                sum=float(values.sum(dtype=np.float64)),
                sum_squares=float(np.square(values, dtype=np.float64).sum()),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=counts.tolist(),
            )

    def picture(self, name: str, figure: Any) -> None:
        self.writer.add_figure(name, figure)

    def close(self) -> None:
        self.writer.close()


class WandbWriter:
    """Weights & Biases. One run there for one run directory, also when it goes on.

    Args:
        configuration: flags by name.
    """

    def __init__(self, project: str, *, folder: Path, configuration: dict[str, Any]) -> None:
        import wandb  # an optional library

        self.wandb = wandb
        name = folder.resolve().name
        number = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[
            :8
        ]  # runs/a/seed-1 and runs/b/seed-1 are two
        self.run = wandb.init(
            project=project, dir=str(folder), name=name, id=f"{name}-{number}", resume="allow", config=configuration
        )

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def text(self, name: str, markdown: str) -> None:
        self.run.summary[name] = markdown

    def histogram(self, name: str, values: np.ndarray, bins: np.ndarray) -> None:
        self.run.summary[name] = self.wandb.Histogram(np_histogram=np.histogram(values, bins=bins))

    def picture(self, name: str, figure: Any) -> None:
        import matplotlib.pyplot as plt

        self.run.log({name: self.wandb.Image(figure)})
        plt.close(figure)

    def close(self) -> None:
        self.run.finish()


def flags_as_text(flags: dict[str, Any]) -> str:
    """A Markdown table of the configuration."""
    rows = [
        f"| --{name.replace('_', '-')} | {str(value).replace('|', chr(92) + '|')} |"
        for name, value in sorted(flags.items())
    ]
    return "\n".join(["| flag | value |", "|---|---|", *rows])


def length_bins(longest: int) -> np.ndarray:
    """Edges that double: 1, 2, 4, ... beyond the longest."""
    return 2.0 ** np.arange(0, math.ceil(math.log2(max(longest, 1) + 1)) + 1)


def balance_picture(pairs: np.ndarray, lengths: Sequence[int], layout: str) -> Any:
    """Work of each cp rank on one row, beside the row's documents.

    Args:
        pairs: [cp] query-key pairs that each rank computes.
        lengths: of the row's documents, in tokens.

    Returns:
        A matplotlib figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), width_ratios=(2, 1), layout="constrained")
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    left.barh(
        [0] * len(lengths), lengths, left=starts, color=["#0072B2", "#56B4E9"] * (len(lengths) // 2 + 1), height=0.5
    )
    left.set(title=f"documents of the first row ({len(lengths)})", xlabel="token", yticks=[])
    mean = pairs.mean()
    right.bar(np.arange(len(pairs)), pairs / mean, color="#E69F00")
    right.axhline(1.0, color="black", linewidth=0.8)
    right.set(
        title=f"{layout}: most / mean work {pairs.max() / mean:.3f}", xlabel="cp rank", ylabel="attention work / mean"
    )
    return figure


def as_floats(values: dict[str, Any]) -> dict[str, float]:
    """What of a record is a number."""
    return {
        k: float(v) for k, v in values.items() if isinstance(v, (int, float, torch.Tensor)) and not isinstance(v, bool)
    }


def configuration(
    config: RunConfig, argv: Sequence[str], architecture: GPTConfig, *, world_size: int
) -> dict[str, Any]:
    """What `<run-dir>/config.json` holds: every resolved flag, the grid, the model's size, versions."""
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


def open_writers(
    tensorboard_dir: Path | None,
    wandb_project: str | None,
    *,
    run_dir: Path,
    settings: dict[str, Any],
    keep_before: int | None,
) -> list[Writer]:
    """Those that the flags ask for, with the configuration written.

    Args:
        settings: from `configuration`.
        keep_before: of a run that goes on: its first step; None: a new run.
    """
    writers: list[Writer] = []
    if tensorboard_dir is not None:
        writers.append(TensorBoardWriter(tensorboard_dir, keep_before))
    if wandb_project is not None:
        writers.append(WandbWriter(wandb_project, folder=run_dir, configuration=settings))
    for writer in writers:
        writer.text("configuration", flags_as_text(settings["flags"]))
    return writers


def describe_data(writers: Sequence[Writer], sequences: SampleDataset, *, cp_size: int, layout: str) -> None:
    """A histogram of document lengths, and the work of cp ranks on the first row."""
    sources = sequences.sources if isinstance(sequences, BlendedDataset) else [sequences]
    for source in sources:
        assert isinstance(source, PackedDataset)
        every = max(1, len(source.documents) // MOST_LENGTHS)
        lengths = source.tokens.lengths[source.documents[::every]].astype(np.int64)
        for writer in writers:
            writer.histogram(f"data/document_lengths_{Path(source.name).name}", lengths, length_bins(source.longest))
    row = sequences.sample(0)
    if cp_size == 1:
        return
    pairs = attention_pairs(row.lengths, row.padded_lengths, cp_size=cp_size, layout=layout)
    for writer in writers:
        writer.picture("data/cp_balance_of_the_first_row", balance_picture(pairs, row.lengths.tolist(), layout))
