"""What a run shows of itself: validation by source and alone, timers, traces, TensorBoard, and the rows of a step that
went wrong.
"""

from __future__ import annotations

import gzip
import json
import math
import os
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.forked import run_script
from tests.launch import SMALL, environment, read_metrics, run_train, train, write_corpus

# Everything that this file looks at, in one run of two ranks.
RUN = (
    "--cp-size",
    "2",
    "--train-iters",
    "6",
    "--log-interval",
    "2",
    "--eval-interval",
    "3",
    "--eval-iters",
    "2",
    "--save-interval",
    "6",
    "--sample-tokens",
    "2",
    "--sample-interval",
    "4",
    "--timing-log-level",
    "2",
    "--profile",
    "--profile-steps",
    "2-3",
    "--check-weights-interval",
    "2",
    "--device",
    "cpu",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("observe")
    (folder / "other").mkdir()
    first, second = write_corpus(folder), write_corpus(folder / "other")
    lines = second.read_text().splitlines()
    (folder / "b.jsonl").write_text("\n".join(line.upper().replace('"TEXT"', '"text"') for line in lines) + "\n")
    data = [
        "--data-path",
        "2",
        str(first),
        "1",
        str(folder / "b.jsonl"),
        "--data-split",
        "60,40,0",
        "--data-cache-path",
        str(folder / "c"),
    ]
    return [*SMALL, *data]


@pytest.fixture(scope="module")
def observed(base, tmp_path_factory) -> tuple[Path, str]:
    place = tmp_path_factory.mktemp("observed") / "run"
    result = run_train(2, *base, *RUN, "--tensorboard-dir", str(place / "tensorboard"), "--run-dir", str(place))
    assert result.returncode == 0, result.stdout + result.stderr
    return place, result.stdout


def records(place: Path, kind: str) -> list[dict]:
    return [r for r in read_metrics(place / "metrics.jsonl") if kind in r]


def test_each_source_is_validated_and_other_layouts_say_the_same(base, observed, tmp_path: Path) -> None:
    place, said = observed
    last = records(place, "validation_loss")[-1]
    assert last["step"] == 6 and {Path(name).name for name in last["validation"]} == {"corpus.jsonl", "b.jsonl"}
    own = {Path(name).name: part["loss"] for name, part in last["validation"].items()}
    assert own["b.jsonl"] > own["corpus.jsonl"]  # half as often seen, in other letters
    assert min(own.values()) < last["validation_loss"] < max(own.values()) and "perplexity" in said
    before = (place / "metrics.jsonl").read_text()
    (place / "stop").touch()  # asked of the run that the folder belongs to
    alone = run_train(
        0, *base, *RUN[2:], "--run-dir", str(place), "--resume", "--eval-only", "--tensorboard-dir", "none"
    )
    assert alone.returncode == 0, alone.stdout + alone.stderr
    after = (place / "metrics.jsonl").read_text()
    assert after.startswith(before) and (place / "stop").exists()  # nothing of the run is dropped
    (place / "stop").unlink()
    (again,) = [json.loads(line) for line in after[len(before) :].splitlines()]
    assert again["validation_tokens"] == last["validation_tokens"]
    assert again["validation_loss"] == pytest.approx(last["validation_loss"], rel=1e-6)
    assert again["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=1e-6)
    for name, part in last["validation"].items():
        assert again["validation"][name]["loss"] == pytest.approx(part["loss"], rel=1e-6)
    assert json.loads((place / "status.json").read_text())["status"] == "done"


def test_eval_only_needs_weights() -> None:
    result = run_train(0, *SMALL, "--eval-interval", "1", "--eval-only")
    assert result.returncode == 2 and "--eval-only needs --load or --resume" in result.stderr


def test_timers_tell_phases_and_the_slowest(observed) -> None:
    place, said = observed
    timed = records(place, "timers")
    assert [r["step"] for r in timed] == [1, 2, 4, 6] and [r["timed_steps"] for r in timed] == [1, 1, 2, 2]
    for record in timed:
        phases = record["timers"]
        assert {"data", "forward-backward", "cp wait", "optimizer", "gradient reduction", "gradient norm"} <= set(
            phases
        )
        assert all(most > 0 and least <= most and rank in (0, 1) for least, most, rank in phases.values())
        assert phases["gradient reduction"][1] < phases["forward-backward"][1]
    assert "eval" in timed[-2]["timers"] and "ms a step, min..max over ranks: data" in said


def test_every_rank_leaves_a_trace(observed) -> None:
    place, _ = observed
    for rank in (0, 1):
        with gzip.open(place / "profile" / f"trace_rank{rank}.json.gz", "rt") as file:
            events = json.load(file)["traceEvents"]
        assert sum(e.get("name") == "ring_attention" or "flash_attention" in e.get("name", "") for e in events) > 0
        assert "CPU Mem" in (place / "profile" / f"memory_rank{rank}.txt").read_text()


def test_tensorboard_has_more_than_curves(observed) -> None:
    place, _ = observed
    found = EventAccumulator(str(place / "tensorboard"))
    found.Reload()
    tags = found.Tags()
    assert {
        "train/loss",
        "validation/loss",
        "validation/bits_per_byte",
        "validation/b.jsonl",
        "timers/cp_wait_ms",
    } <= set(tags["scalars"])
    assert tags["images"] == ["data/cp_balance_of_the_first_row"]
    assert {"data/document_lengths_corpus.jsonl", "data/document_lengths_b.jsonl"} == set(tags["histograms"])
    text = found.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| --cp-size | 2 |" in text and any(tag.startswith("sample/after_step_4") for tag in tags["tensors"])


def test_the_configuration_and_the_end_are_written(observed) -> None:
    place, said = observed
    config = json.loads((place / "config.json").read_text())
    assert config["flags"]["cp_size"] == 2 and config["layout"] == {
        "pp": 1,
        "dp_replicate": 1,
        "dp_shard": 1,
        "cp": 2,
        "tp": 1,
    }
    assert config["world_size"] == 2 and config["parameters"] > 10_000 and "after step 4" in said


def test_a_run_that_diverges_is_replayed(base, tmp_path: Path) -> None:
    """A rate of 1e30 makes the loss infinite by itself; the kept rows and weights give the same on another layout.

    Flags from a preset count, also when it is gone; checkpoints of the run there are none.
    """
    (tmp_path / "preset.yaml").write_text("min_lr: 1e30\nlr_warmup_iters: 0\nclip_grad: 0\nrotary_base: 5000\n")
    flags = ["--config", str(tmp_path / "preset.yaml"), "--lr", "1e30", "--train-iters", "8"]
    result = run_train(2, *base, *flags, "--cp-size", "2", "--device", "cpu", "--run-dir", str(tmp_path))
    assert (
        result.returncode == 1
        and "tools/replay.py" in result.stderr
        and 'Traceback (most recent call last):\n  File "train' not in result.stderr
    )
    (file,) = (tmp_path / "nonfinite").glob("step_*.json")
    step = json.loads(file.read_text())
    assert step["ranks"] and f"step {step['step']}:" in json.loads((tmp_path / "status.json").read_text())["reason"]
    (tmp_path / "preset.yaml").unlink()
    command = ["tools/replay.py", str(file), "--cp-size", "1"]
    replay = run_script(*command, environment=environment(), timeout=120)
    assert replay.returncode == 1, replay.stdout + replay.stderr
    assert (
        "here:     loss nan" in replay.stdout
        or "gradient norm nan" in replay.stdout
        or "gradient norm inf" in replay.stdout
    )
    assert "layers.0" in replay.stdout and "updates before" not in replay.stdout
    assert f"weights: {tmp_path}/nonfinite/checkpoints/step_{step['step'] - 1:07d}" in replay.stdout
    assert f"here:     loss {step['loss']}" in replay.stdout or not math.isfinite(step["loss"])
    fresh = run_script(*command, "--fresh", environment=environment(), timeout=120)
    assert fresh.returncode == 0 and os.linesep in fresh.stdout  # with the initial weights the same rows are fine


def test_a_run_that_skips_goes_on(base, tmp_path: Path) -> None:
    """Every step diverges from the first update on: skipping has an end."""
    flags = ["--lr", "1e30", "--min-lr", "1e30", "--lr-warmup-iters", "0", "--clip-grad", "0", "--train-iters", "20"]
    more = ["--on-nonfinite", "skip", "--max-skipped-in-a-row", "3", "--run-dir", str(tmp_path)]
    result = run_train(0, *base, *flags, *more, "--device", "cpu")
    assert result.returncode == 1 and "4 such steps in a row (--max-skipped-in-a-row 3)" in result.stderr
    assert result.stdout.count(": skipped, loss") == 3


@pytest.mark.full
def test_curves_without_tensorboard_are_the_same_run(base, tmp_path: Path) -> None:
    plain = train(0, tmp_path / "plain", *base, "--device", "cpu")
    timed = train(
        0, tmp_path / "timed", *base, "--device", "cpu", "--timing-log-level", "2", "--profile", "--profile-steps", "3"
    )
    assert [r["loss"] for r in plain] == [r["loss"] for r in timed if "loss" in r]
