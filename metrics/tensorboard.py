"""TensorBoard event files of a run: curves, flags, document lengths, CP balance; Weights & Biases copies them."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cp.layout import attention_pairs
from data.balance import deal
from data.dataset import BlendedDataset, PackedDataset, SampleDataset
from utils.logger import log_error
from utils.names import distinct_suffixes

MAX_LENGTHS = 1_000_000  # in a histogram


class TensorBoardWriter:
    """Writes event files.

    Args:
        keep_before: steps that a resumed run has done; later steps of an earlier attempt are hidden. None: a new run.
        wandb_run: from `start_wandb`, which comes before this writer; ends with it.
    """

    def __init__(self, folder: Path, keep_before: int | None, *, wandb_run: Any = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.is_broken = folder, False
        self.events = SummaryWriter(str(folder), purge_step=None if keep_before is None else keep_before + 1)
        self.wandb_run = wandb_run
        threading.excepthook = _hide_writer_errors

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add a point to each curve, named such as `train/loss`."""
        with self._survives():
            for name, value in values.items():
                self.events.add_scalar(name, value, step)

    def text(self, name: str, markdown: str) -> None:
        with self._survives():
            self.events.add_text(name, markdown)

    @contextmanager
    def _survives(self) -> Iterator[None]:
        """An I/O error ends the curves of this start, which is said once; training goes on."""
        try:
            yield
        except OSError as error:
            if not self.is_broken:
                log_error(f"{self.folder}: {error.strerror or error}; training goes on without TensorBoard")
            self.is_broken = True

    def histogram(self, name: str, values: np.ndarray, bins: np.ndarray) -> None:
        """Add counts of `values` between the [n + 1] edges `bins`; nothing where all values lie outside."""
        counts, edges = np.histogram(values, bins=bins)
        total = int(counts.sum())
        if total:
            self.events.add_histogram_raw(
                name,
                min=float(values.min()),
                max=float(values.max()),
                num=total,
                sum=float(values.sum(dtype=np.float64)),
                sum_squares=float(np.square(values, dtype=np.float64).sum()),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=counts.tolist(),
            )

    def close(self) -> None:
        with self._survives():
            self.events.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


def _hide_writer_errors(failed: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread leaves its I/O error to the next call, which raises it."""
    if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__name__ == "_AsyncWriterThread"):
        threading.__excepthook__(failed)


def start_wandb(project: str, *, run_dir: Path, settings: dict[str, Any]) -> Any:
    """Start, or resume, the Weights & Biases run of a run directory: it copies every event file opened from now on."""
    import wandb  # an optional library

    name = run_dir.resolve().name
    digest = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:8]  # runs/a/seed-1 and runs/b/seed-1 differ
    return wandb.init(
        project=project,
        dir=str(run_dir.resolve()),
        name=name,
        id=f"{name}-{digest}",
        resume="allow",
        config=settings,
        sync_tensorboard=True,
    )


def flags_as_text(flags: dict[str, Any]) -> str:
    """A Markdown table of the flags."""
    rows = [
        f"| --{name.replace('_', '-')} | {str(value).replace('|', chr(92) + '|')} |"
        for name, value in sorted(flags.items())
    ]
    return "\n".join(["| flag | value |", "|---|---|", *rows])


def open_writers(
    tensorboard_dir: Path | None,
    wandb_project: str | None,
    *,
    run_dir: Path,
    settings: dict[str, Any],
    keep_before: int | None,
) -> list[TensorBoardWriter]:
    """The TensorBoard writer with the flags as text, or none. `settings` come from `configuration`."""
    if tensorboard_dir is None:
        assert wandb_project is None, "config refuses --wandb-project without TensorBoard"
        return []
    wandb_run = None if wandb_project is None else start_wandb(wandb_project, run_dir=run_dir, settings=settings)
    writer = TensorBoardWriter(tensorboard_dir, keep_before, wandb_run=wandb_run)
    writer.text("configuration", flags_as_text(settings["flags"]))
    return [writer]


def as_floats(values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record."""
    return {
        k: float(v) for k, v in values.items() if isinstance(v, (int, float, torch.Tensor)) and not isinstance(v, bool)
    }


def length_bins(longest: int) -> np.ndarray:
    """Edges 1, 2, 4, ... up to the first power of two above `longest`."""
    return 2.0 ** np.arange(0, math.ceil(math.log2(max(longest, 1) + 1)) + 1)


def balance_figure(pairs: np.ndarray, lengths: Sequence[int], layout: str) -> Any:
    """A matplotlib figure of one row: its documents, and the attention work of each cp rank.

    Args:
        pairs: [cp] query-key pairs of each rank.
        lengths: tokens of each document.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    left.barh([0] * len(lengths), lengths, left=np.cumsum(lengths) - lengths, edgecolor="white")
    left.set(title=f"documents of the first row ({len(lengths)})", xlabel="token", yticks=[])
    work = pairs / pairs.mean()
    right.bar(np.arange(len(work)), work)
    right.set(title=f"{layout}: max / mean work {work.max():.3f}", xlabel="cp rank", ylabel="attention work / mean")
    return figure


def work_figure(work: np.ndarray, data_ranks: int) -> Any:
    """A matplotlib figure of one step: the work of each data rank, in the order of samples and dealt.

    Args:
        work: [samples] of the step.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    shares = {"in order": np.arange(len(work)).reshape(-1, data_ranks).T, "dealt": np.array(deal(work, data_ranks))}
    for axes, (name, samples) in zip(figure.subplots(1, 2, sharey=True), shares.items(), strict=True):
        loads = work[samples].sum(1) * data_ranks / work.sum()
        axes.bar(np.arange(data_ranks), loads)
        axes.set(title=f"{name}: max / mean work {loads.max():.3f}", xlabel="data rank", ylabel="work / mean")
    return figure


def describe_work(writers: Sequence[TensorBoardWriter], work: np.ndarray, data_ranks: int) -> None:
    """Write `work_figure` of the first step. Nothing for one data rank."""
    for writer in writers if data_ranks > 1 else ():
        writer.events.add_figure("data/work_balance_of_the_first_step", work_figure(work, data_ranks))


def describe_data(writers: Sequence[TensorBoardWriter], dataset: SampleDataset, *, cp_size: int, layout: str) -> None:
    """Write a histogram of each source's document lengths, and a figure of the CP balance of the first row.

    No figure for the layout hybrid, whose shares depend on all samples of a row.
    """
    sources = dataset.sources if isinstance(dataset, BlendedDataset) else [dataset]
    packed = [source for source in sources if isinstance(source, PackedDataset)]
    names = distinct_suffixes([source.name for source in packed])
    for writer in writers:
        for name, source in zip(names, packed, strict=True):
            stride = max(1, len(source.documents) // MAX_LENGTHS)
            lengths = source.tokens.lengths[source.documents[::stride]].astype(np.int64)
            writer.histogram(f"data/document_lengths_{name}", lengths, length_bins(source.facts.longest))
        if cp_size > 1 and layout != "hybrid":
            row = dataset.sample(0)
            pairs = attention_pairs(row.lengths, row.padded_lengths, cp_size=cp_size, layout=layout)
            figure = balance_figure(pairs, row.lengths.tolist(), layout)
            writer.events.add_figure("data/cp_balance_of_the_first_row", figure)
