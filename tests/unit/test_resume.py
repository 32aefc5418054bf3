"""What a run starts from, and what it says about data that changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoint.resume import check_same_run, describe_data_change, find_start
from config.schema import CheckpointConfig, LoggingConfig


def write_checkpoint(save: Path, step: int) -> Path:
    folder = save / f"step_{step:07d}"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"step": step}))
    return folder


def start_of(run: Path, **flags: object) -> Path | None:
    plan = find_start(CheckpointConfig(run_dir=str(run), **flags), LoggingConfig())  # type: ignore[arg-type]
    return plan and plan.checkpoint


@pytest.mark.parametrize("weights_only", [False, True])
def test_load_counts_only_while_the_runs_own_folder_is_empty(tmp_path: Path, weights_only: bool) -> None:
    """The command of a requeued job is that of its first start, with --resume."""
    given = write_checkpoint(tmp_path / "given", 40)
    run = tmp_path / "run"
    flags = dict(load=str(given), load_weights_only=weights_only, resume=True)
    assert start_of(run, **flags) == given
    (run / "metrics.jsonl").parent.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text('{"step": 41}\n')  # killed before its first checkpoint
    assert start_of(run, **flags) == given
    own = write_checkpoint(run / "checkpoints", 45)
    assert start_of(run, **flags) == own
    (given / "run.json").unlink()
    assert start_of(run, **flags) == own
    with pytest.raises(ValueError, match=r"already holds step_0000045: resume that run with --resume"):
        start_of(run, load=str(write_checkpoint(tmp_path / "given", 50)))


def test_a_run_whose_checkpoints_lie_elsewhere_does_not_start_anew(tmp_path: Path) -> None:
    run, save = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"checkpoints": str(save)}))
    assert start_of(run, resume=True) is None  # killed before its first checkpoint
    own = write_checkpoint(save, 5)
    with pytest.raises(ValueError, match=f"this run's checkpoints are in {save}: add --save {save}"):
        start_of(run, resume=True)
    assert start_of(run, resume=True, save=str(save)) == own


def test_only_a_run_with_a_folder_is_advised_to_resume(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text("{}\n")
    for folder in (None, str(tmp_path / "run")):
        with pytest.raises(ValueError, match="is another run's") as refused:
            find_start(CheckpointConfig(run_dir=folder), LoggingConfig(metrics_file=str(tmp_path / "m.jsonl")))
        assert ("--resume" in str(refused.value)) == (folder is not None)


BLEND = [["a", "1", 0.5], ["b", "2", 0.25], ["c", "3", 0.25]]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ([["a", "1", 0.5], ["b", "9", 0.25], ["c", "3", 0.25]], "the documents of b are others"),
        ([["a", "1", 0.5], ["d", "4", 0.25], ["c", "3", 0.25]], "b is missing; d is new"),
        ([["a", "1", 0.5], ["b", "2", 0.25]], "c is missing"),
        (
            [["a", "1", 0.4], ["b", "2", 0.35], ["c", "3", 0.25]],
            "40.0000% of samples from a, in the checkpoint 50.0000%",
        ),
        ([["b", "2", 0.25], ["a", "1", 0.5], ["c", "3", 0.25]], "another order; the checkpoint's is a, b, c"),
    ],
)
def test_changed_data_is_named_by_source(wanted: list, words: str) -> None:
    assert words in describe_data_change(BLEND, wanted)
    saved = {"training documents": "x", "data sources": BLEND}
    new = {"training documents": "y", "data sources": wanted}
    with pytest.raises(ValueError, match="--data-path: ") as refused:
        check_same_run(saved, new, (), Path("c"))
    assert words in str(refused.value)
    (changed,) = check_same_run(saved, new, ("training documents",), Path("c"))
    assert words in changed


def test_a_source_that_moved_is_the_same_source() -> None:
    saved = {"training documents": "x", "data sources": [["a", "1", 1.0]]}
    assert check_same_run(saved, saved | {"data sources": [["/elsewhere/a", "1", 1.0]]}, (), Path("c")) == []
    with pytest.raises(ValueError, match="too old to say of which source"):
        check_same_run({"training documents": "z"}, saved, (), Path("c"))
