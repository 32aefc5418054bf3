"""A step that is not finite: which rank had it, what is recorded, and that a record leads to the same samples."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from config.cli import parse_arguments
from config.schema import TrainingConfig
from parallel.grid import AXES, DERIVED_AXES, Grid, GridSizes, build_grid
from runtime import nonfinite
from runtime.nonfinite import NonFiniteError, NonFiniteGuard, find_nonfinite_gradients
from tools.replay import LEFT_OUT, check_same_data, newest_before, read_record
from utils.errors import UserError


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


METADATA = {"flags": {"lr": 1.0}, "fingerprints": {"tokenizer": "a"}, "checkpoints": "somewhere", "world_size": 2}


def build_guard(grid: Grid, folder: Path, on_nonfinite: str = "stop") -> NonFiniteGuard:
    return NonFiniteGuard(
        training=TrainingConfig(on_nonfinite=on_nonfinite, max_skipped_in_a_row=2),
        checks_each_step=True,
        model=model_with(math.nan),
        grid=grid,
        folder=folder,
        metadata=METADATA,
    )


def scalars(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(v, dtype=torch.float64) for v in values]


def test_a_finite_step_is_updated(grid: Grid, tmp_path: Path) -> None:
    assert build_guard(grid, tmp_path).should_update(3, *scalars(1.0, 2.0, 3.0)) and not list(tmp_path.iterdir())


def test_what_one_rank_sees_reaches_all(grid: Grid, tmp_path: Path, monkeypatch) -> None:
    """The sums go over each axis once."""
    summed: list[str] = []
    monkeypatch.setattr(nonfinite, "sum_over", lambda x, axis: summed.extend(DERIVED_AXES.get(axis, (axis,))))
    guard = build_guard(grid, tmp_path)
    guard.grid = SimpleNamespace(group=lambda axis: axis)  # type: ignore[assignment]
    assert guard.should_update(3, *scalars(1.0, 2.0, 3.0)) and sorted(summed) == sorted(AXES)


@pytest.mark.parametrize("values", [(math.nan, 1.0, 1.0), (1.0, math.inf, 1.0)])
def test_the_first_one_ends_the_run_and_is_recorded(grid: Grid, tmp_path: Path, values: tuple) -> None:
    words = (
        r"step 3: .*gradients not finite on rank 0 \(.*: weight\); tools/replay.py .*step_0000003.json runs it again"
    )
    with pytest.raises(NonFiniteError, match=words) as ended:
        build_guard(grid, tmp_path).should_update(3, *scalars(*values))
    assert not ended.value.is_updated
    stored = json.loads((tmp_path / "step_0000003.json").read_text())
    assert stored["ranks"][0]["first_bad_gradients"] == ["weight"] and stored["flags"] == {"lr": 1.0}
    record = read_record(tmp_path / "step_0000003.json")
    assert record["step"] == 3 and record["fingerprints"] == {"tokenizer": "a"} and record["checkpoints"] == "somewhere"
    assert all(
        got == want or got != got for got, want in zip((record["loss"], record["grad_norm"]), values, strict=False)
    )


def test_skipping_has_an_end(grid: Grid, tmp_path: Path) -> None:
    guard = build_guard(grid, tmp_path, "skip")
    bad, good = scalars(math.nan, 1.0, 1.0), scalars(1.0, 1.0, 1.0)
    updates = [guard.should_update(s, *x) for s, x in ((1, bad), (2, bad), (3, good), (4, bad), (5, bad))]
    assert updates == [False, False, True, False, False] and guard.skipped == 4
    with pytest.raises(NonFiniteError, match=r"3 such steps in a row \(--max-skipped-in-a-row 2\)"):
        guard.should_update(6, *bad)


def test_a_loss_of_one_rank_comes_before_gradients_of_all(grid: Grid, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="loss not finite on rank 0"):
        build_guard(grid, tmp_path).should_update(3, *scalars(math.nan, math.nan, math.nan))


def test_nonfinite_gradients_are_named() -> None:
    assert find_nonfinite_gradients(model_with(math.inf)) == ["weight"]
    assert find_nonfinite_gradients(model_with(0.0)) == []


def test_a_record_that_cannot_be_written_does_not_hide_the_step(
    grid: Grid, tmp_path: Path, monkeypatch, capsys
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nonfinite, "replace_synced", full)
    assert not build_guard(grid, tmp_path, "skip").should_update(3, *scalars(math.nan, 1.0, 1.0))
    printed = capsys.readouterr().out
    assert "step 3: skipped" in printed and "could not be written to" in printed and "No space left" in printed


@pytest.mark.parametrize("text", ["{}", "[]", "half", '{"flags": []}', '{"step": 1, "flags": {}, "loss": 0}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "step.json").write_text(text)
    with pytest.raises(UserError, match="not the record of a step"):
        read_record(tmp_path / "step.json")


def test_other_data_are_refused() -> None:
    data = SimpleNamespace(
        fingerprints=lambda: {"tokenizer": "a", "training documents": "b", "validation documents": None}
    )
    recorded = {"tokenizer": "a", "training documents": "b", "validation documents": "c"}
    check_same_data(data, recorded)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the training documents differ from the run's: b, the run had d"):
        check_same_data(data, recorded | {"training documents": "d"})  # type: ignore[arg-type]


def test_a_replay_takes_the_runs_data_and_not_its_outputs() -> None:
    words = [
        "--data-path",
        "0.5",
        "a",
        "0.5",
        "b",
        "--lr=1",
        "--run-dir",
        "r",
        "--resume",
        "--cp-size",
        "2",
        "--save=s",
        "--profile",
        "--skip-steps",
        "3-4,6",
    ]
    flags = json.loads(json.dumps(parse_arguments(words).flags()))
    taken = {name: value for name, value in flags.items() if name not in LEFT_OUT}
    again = parse_arguments(["--cp-size", "1"], defaults=taken)
    assert again == parse_arguments(["--lr=1", "--cp-size", "1", "--data-path", "0.5", "a", "0.5", "b"])
    assert set(flags) >= LEFT_OUT


def test_the_newest_weights_before_a_step_are_taken(tmp_path: Path) -> None:
    for folder, step in (("run", 4), ("run", 8), ("run", 12), ("kept", 9)):
        place = tmp_path / folder / f"step_{step:07d}"
        place.mkdir(parents=True)
        (place / "run.json").write_text(json.dumps({"step": step}))
    both = [tmp_path / "kept", tmp_path / "run"]
    assert newest_before(both, 10).parent.name == "kept" and newest_before(both, 9).name == "step_0000008"
    with pytest.raises(UserError, match="no checkpoint before step 3"):
        newest_before(both, 3)
