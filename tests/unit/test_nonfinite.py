"""A step that is not finite: who had it, what is kept, and that what is kept gives the same rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from config.arguments import parse_arguments
from torch import nn

from metrics.log import NonFinite
from parallel.grid import Grid, GridSizes, build_grid
from runtime.nonfinite import NonFiniteGuard, StoredSequences, bad_gradients, save_step
from tests.unit.test_packed_rows import dataset
from tools.replay import LEFT_OUT, newest_before, read_step, without_places


@pytest.fixture(scope="module")
def grid() -> Iterator[Grid]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield build_grid(GridSizes())
    dist.destroy_process_group()


def model_with(gradient: float) -> nn.Module:
    model = nn.Linear(2, 2)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert model.weight.grad is not None
    model.weight.grad[1, 0] = gradient
    return model


def guard(grid: Grid, folder: Path, kept: list, gradient: float = math.nan, **changes) -> NonFiniteGuard:
    options = dict(
        skip=False,
        most=2,
        looks=True,
        model=model_with(gradient),
        grid=grid,
        folder=folder,
        control_group=grid.group("batch"),
    )
    return NonFiniteGuard(**(options | changes), save=lambda *told: kept.append(told))  # type: ignore[arg-type]


def scalars(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(v, dtype=torch.float64) for v in values]


def test_a_finite_step_passes(grid: Grid, tmp_path: Path) -> None:
    kept: list = []
    assert guard(grid, tmp_path, kept).passes(3, *scalars(1.0, 2.0, 3.0)) and not kept


@pytest.mark.parametrize("values", [(math.nan, 1.0, 1.0), (1.0, math.inf, 1.0)])
def test_the_first_one_ends_the_run_with_its_place(grid: Grid, tmp_path: Path, values: tuple) -> None:
    kept: list = []
    with pytest.raises(
        NonFinite, match=r"step 3: .*gradients not finite on rank 0 \(.*: weight\); its rows are in .*step_0000003.json"
    ):
        guard(grid, tmp_path, kept).passes(3, *scalars(*values))
    ((place, step, facts),) = kept
    assert (place, step) == (tmp_path / "step_0000003.json", 3) and facts["ranks"][0]["first_bad_gradients"] == [
        "weight"
    ]


def test_skipping_has_an_end(grid: Grid, tmp_path: Path) -> None:
    kept: list = []
    own = guard(grid, tmp_path, kept, skip=True)
    bad, good = scalars(math.nan, 1.0, 1.0), scalars(1.0, 1.0, 1.0)
    assert [own.passes(s, *x) for s, x in ((1, bad), (2, bad), (3, good), (4, bad), (5, bad))] == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert own.skipped == 4
    with pytest.raises(NonFinite, match=r"3 such steps in a row \(--max-skipped-in-a-row 2\)"):
        own.passes(6, *bad)


def test_a_loss_of_one_rank_comes_before_gradients_of_all(grid: Grid, tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match="loss not finite on rank 0"):
        guard(grid, tmp_path, []).passes(3, *scalars(math.nan, math.nan, math.nan))


def test_bad_gradients_are_named() -> None:
    assert bad_gradients(model_with(math.inf)) == ["weight"] and bad_gradients(model_with(0.0)) == []


def test_the_rows_come_back_as_they_were(tmp_path: Path) -> None:
    sequences = dataset([8, 17, 16, 3, 5, 5], seq_length=16, alignment=4)
    place = tmp_path / "step_0000002.json"
    facts = {"flags": {"lr": 1.0}, "vocab_size": 9, "checkpoints": "somewhere", "world_size": 2}
    told = {"loss": math.nan, "grad_norm": math.inf, "ranks": []}
    save_step(place, step=2, told=told, sequences=sequences, numbers=range(1, 3), facts=facts)
    again = StoredSequences(place.with_suffix(".npz"))
    assert again.samples_per_epoch == 2 and again.seq_length == 16
    for number in (0, 1):
        mine, theirs = again.sample(number), sequences.sample(number + 1)
        for name in ("tokens", "labels", "lengths", "padded_lengths"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
        assert mine.first_id == theirs.first_id
    step = read_step(place)
    assert step["step"] == 2 and math.isnan(step["loss"]) and step["flags"] == {"lr": 1.0}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_0000002.json", "step_0000002.npz"]


def test_rows_that_would_run_code_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "evil.npz", tokens=np.array([print], dtype=object))
    with pytest.raises(ValueError, match="not the rows of a step"):
        StoredSequences(tmp_path / "evil.npz")
    (tmp_path / "step.json").write_text("{}")
    with pytest.raises(ValueError, match="not the file of a step"):
        read_step(tmp_path / "step.json")
    with pytest.raises(ValueError, match="no checkpoint before step 3"):
        newest_before([tmp_path], 3)


def test_a_replay_leaves_places_out() -> None:
    words = ["--data-path", "0.5", "a", "0.5", "b", "--lr=1", "--run-dir", "r", "--resume", "--cp-size", "2", "--save=s", "--profile",
             "--valid-data-path", "v", "--tokenizer-type", "sentencepiece"]  # fmt: skip
    flags = json.loads(json.dumps(vars(parse_arguments(words))))
    again = parse_arguments(["--cp-size", "1"], defaults=without_places(flags))
    assert again == parse_arguments(["--lr=1", "--cp-size", "1", "--tokenizer-type", "byte"])


def test_every_flag_of_a_place_is_a_flag() -> None:
    assert set(vars(parse_arguments([]))) >= LEFT_OUT


def test_the_weights_are_kept_when_the_run_ends_and_not_before(grid: Grid, tmp_path: Path) -> None:
    asked: list[int] = []

    def save_weights(step: int) -> str:
        asked.append(step)
        return "; in a folder"

    own = guard(grid, tmp_path, [], skip=True, save_weights=save_weights)
    bad = scalars(math.nan, 1.0, 1.0)
    assert [own.passes(s, *bad) for s in (4, 5)] == [False, False] and not asked
    with pytest.raises(NonFinite, match="; in a folder"):
        own.passes(6, *bad)
    assert asked == [5]


def test_the_newest_weights_before_a_step_are_taken(tmp_path: Path) -> None:
    for folder, step in (("run", 4), ("run", 8), ("run", 12), ("kept", 9)):
        place = tmp_path / folder / f"step_{step:07d}"
        place.mkdir(parents=True)
        (place / "run.json").write_text(json.dumps({"step": step}))
    both = [tmp_path / "kept", tmp_path / "run"]
    assert newest_before(both, 10).parent.name == "kept" and newest_before(both, 9).name == "step_0000008"


def test_rows_that_cannot_be_kept_do_not_hide_the_step(grid: Grid, tmp_path: Path, monkeypatch, capsys) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    made = guard(grid, tmp_path, [], skip=True)
    monkeypatch.setattr(made, "save", full)
    assert not made.passes(3, *scalars(math.nan, 1.0, 1.0))
    assert (
        "step 3: skipped" in (said := capsys.readouterr().out)
        and "could not be kept in" in said
        and "No space left" in said
    )
