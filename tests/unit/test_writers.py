"""TensorBoard's event files, the Weights & Biases run that copies them, histograms and the figure of the CP balance."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.dataset import BlendedDataset, Mixture, PackedDataset, PackingOptions
from data.indexed_dataset import IndexedDataset, write_indexed_dataset
from metrics.tensorboard import (
    TensorBoardWriter,
    as_floats,
    balance_figure,
    describe_data,
    describe_work,
    flags_as_text,
    length_bins,
    open_writers,
    start_wandb,
    work_figure,
)


def test_bins_double_beyond_the_longest() -> None:
    assert length_bins(5).tolist() == [1, 2, 4, 8] and length_bins(8).tolist() == [1, 2, 4, 8, 16]
    lengths = np.array([1, 1, 2, 3, 7, 8])
    assert np.histogram(lengths, length_bins(8))[0].tolist() == [2, 2, 1, 1]


def test_a_histogram_keeps_its_counts(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path, None)
    writer.histogram("lengths", np.array([1, 1, 2, 3, 7, 8]), length_bins(8))
    writer.histogram("nothing", np.array([]), length_bins(8))
    writer.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert found.Tags()["histograms"] == ["lengths"]
    value = found.Histograms("lengths")[0].histogram_value
    assert (value.num, value.sum, value.min, value.max, list(value.bucket)) == (6, 22, 1, 8, [2, 2, 1, 1])


def test_a_resumed_run_hides_what_comes_again(tmp_path: Path) -> None:
    for keep_before, steps in ((None, range(1, 6)), (3, range(4, 5))):
        writer = TensorBoardWriter(tmp_path, keep_before)
        for step in steps:
            writer.scalars({"loss": float(step)}, step)
        writer.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4]


def test_a_full_disk_ends_the_curves_and_not_the_run(tmp_path: Path, monkeypatch, capfd) -> None:
    """The error comes from TensorBoard's thread, and its traceback is hidden."""
    writer = TensorBoardWriter(tmp_path, None)
    file = writer.events.file_writer.event_writer._general_file_writer

    def full(content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file, "write", full)
    for step in range(30):  # more than TensorBoard's queue holds
        writer.scalars({"loss": 1.0}, step)
        time.sleep(0.01)
    writer.text("a", "b")
    writer.close()
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "No space left on device; training goes on without TensorBoard" in said, said


def test_the_figure_shows_each_rank_against_the_mean() -> None:
    figure = balance_figure(np.array([3.0, 1.0]), [5, 3], "contiguous")
    left, right = figure.axes
    assert [bar.get_height() for bar in right.patches] == [1.5, 0.5] and "max / mean work 1.500" in right.get_title()
    assert [bar.get_width() for bar in left.patches] == [5, 3] and "(2)" in left.get_title()


class WandbStandIn:
    """The names of wandb 0.31 that are used: the package needs an account."""

    def __init__(self, tensorboard_dir: Path) -> None:
        self.tensorboard_dir = tensorboard_dir
        self.calls: list[dict[str, Any]] = []
        self.event_files: list[int] = []

    def init(
        self,
        *,
        project: str | None = None,
        dir: str | None = None,
        id: str | None = None,
        name: str | None = None,
        config: dict[str, Any] | None = None,
        resume: str | None = None,
        sync_tensorboard: bool | None = None,
    ) -> WandbStandIn:
        self.calls.append(dict(project=project, dir=dir, id=id, name=name, config=config, resume=resume))
        assert sync_tensorboard is True
        self.event_files.append(len(list(self.tensorboard_dir.glob("events.*"))))
        return self

    def finish(self) -> None:
        self.calls.append({"finish": True})


def test_weights_and_biases_copies_the_event_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = WandbStandIn(tmp_path / "tb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    settings = {"flags": {"lr": 1}}
    (writer,) = open_writers(tmp_path / "tb", "p", run_dir=tmp_path / "one", settings=settings, keep_before=None)
    assert wandb.event_files == [0]  # the run starts before the first event file, or the file would not be copied
    assert wandb.calls[0]["project"] == "p" and wandb.calls[0]["config"] == settings
    assert wandb.calls[0]["dir"] == str(tmp_path / "one") and wandb.calls[0]["name"] == "one"
    writer.close()
    assert wandb.calls[1] == {"finish": True} and len(list((tmp_path / "tb").glob("events.*"))) == 1


def test_one_run_directory_is_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = WandbStandIn(tmp_path / "tb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for folder in (tmp_path / "one", tmp_path / "x" / ".." / "one", tmp_path / "other" / "one"):
        start_wandb("p", run_dir=folder, settings={})
    first, again, other = (call["id"] for call in wandb.calls)
    assert first == again != other and first.startswith("one-") and other.startswith("one-")
    assert [call["resume"] for call in wandb.calls] == ["allow"] * 3


def test_without_tensorboard_nothing_is_written(tmp_path: Path) -> None:
    assert open_writers(None, None, run_dir=tmp_path, settings={"flags": {}}, keep_before=None) == []
    assert list(tmp_path.iterdir()) == []


def test_sources_of_one_base_name_have_a_histogram_each(tmp_path: Path) -> None:
    sources = []
    for folder, lengths in (("en", [3, 3]), ("de", [5])):
        prefix = tmp_path / folder / "corpus_text_document"
        prefix.parent.mkdir()
        write_indexed_dataset(prefix, [np.arange(n) for n in lengths], vocab_size=100)
        packing = PackingOptions(seq_length=8, method="best-fit", seed=1, alignment=4)
        sources.append(PackedDataset(IndexedDataset(prefix), np.arange(len(lengths)), packing, pad_token=0))
    writer = TensorBoardWriter(tmp_path / "tb", None)
    describe_data([writer], BlendedDataset(sources, [Mixture(0, [1, 1], [0, 1])]), cp_size=2, layout="zigzag")
    writer.close()
    found = EventAccumulator(str(tmp_path / "tb"))
    found.Reload()
    names = [f"data/document_lengths_{folder}/corpus_text_document" for folder in ("en", "de")]
    assert found.Tags()["histograms"] == names
    assert [found.Histograms(name)[0].histogram_value.num for name in names] == [2, 1]
    assert found.Tags()["images"] == ["data/cp_balance_of_the_first_row"]


def test_the_work_of_a_step_is_drawn(tmp_path: Path) -> None:
    left, right = work_figure(np.array([8.0, 1.0, 8.0, 1.0]), 2).axes
    assert [bar.get_height() for bar in left.patches] == pytest.approx([16 / 9, 2 / 9])  # samples 0 and 2; 1 and 3
    assert [bar.get_height() for bar in right.patches] == pytest.approx([1.0, 1.0])
    writer = TensorBoardWriter(tmp_path / "tb", None)
    describe_work([writer], np.array([1.0, 2.0]), 1)
    describe_work([writer], np.array([1.0, 2.0]), 2)
    writer.close()
    found = EventAccumulator(str(tmp_path / "tb"))
    found.Reload()
    assert (
        found.Tags()["images"] == ["data/work_balance_of_the_first_step"]
        and len(found.Images(found.Tags()["images"][0])) == 1
    )


def test_only_numbers_are_curves() -> None:
    assert as_floats({"a": 1, "b": 2.5, "c": None, "d": "x", "e": True}) == {"a": 1.0, "b": 2.5}
    assert flags_as_text({"b_c": "x|y", "a": 1}).splitlines()[2:] == ["| --a | 1 |", "| --b-c | x\\|y |"]
