"""TensorBoard's and Weights & Biases' writers behind one interface, histograms and the picture of the balance."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metrics.tensorboard import TensorBoardWriter, WandbWriter, as_floats, balance_picture, flags_as_text, length_bins


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


def test_the_picture_shows_each_rank_against_the_mean() -> None:
    figure = balance_picture(np.array([3.0, 1.0]), [5, 3], "contiguous")
    left, right = figure.axes
    assert [bar.get_height() for bar in right.patches] == [1.5, 0.5] and "most / mean work 1.500" in right.get_title()
    assert [bar.get_width() for bar in left.patches] == [5, 3] and "(2)" in left.get_title()


def test_weights_and_biases_get_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in with the library's names: the package itself needs an account."""
    calls: list = []
    run = SimpleNamespace(
        log=lambda values, step=None: calls.append((values, step)), summary={}, finish=lambda: calls.append("finish")
    )
    fake = SimpleNamespace(
        init=lambda **options: calls.append(options) or run, Histogram=lambda np_histogram: np_histogram, Image=str
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writer = WandbWriter("project", folder=tmp_path / "one", configuration={"lr": 1})
    WandbWriter("project", folder=tmp_path / "other" / "one", configuration={})
    assert calls.pop(1)["id"] != calls[0]["id"]  # one of the same name elsewhere
    writer.scalars({"train/loss": 2.0}, 3)
    writer.histogram("lengths", np.array([1, 3]), length_bins(3))
    writer.picture("balance", balance_picture(np.array([1.0, 1.0]), [5, 3], "zigzag"))
    writer.text("sample", "words")
    writer.close()
    assert (
        calls[0]["project"] == "project"
        and calls[0]["id"].startswith("one-")
        and calls[0]["resume"] == "allow"
        and calls[0]["config"] == {"lr": 1}
    )
    assert calls[1] == ({"train/loss": 2.0}, 3) and calls[-1] == "finish"
    assert run.summary["sample"] == "words" and run.summary["lengths"][0].tolist() == [1, 1]


def test_only_numbers_are_curves() -> None:
    assert as_floats({"a": 1, "b": 2.5, "c": None, "d": "x", "e": True}) == {"a": 1.0, "b": 2.5}
    assert flags_as_text({"b_c": "x|y", "a": 1}).splitlines()[2:] == ["| --a | 1 |", "| --b-c | x\\|y |"]
