"""Steps, validations and corpora without a label: documents of one token have none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.prepare import main as prepare
from tests.launch import SMALL, run_train, train

FLAGS = [flag for flag in SMALL if flag not in ("--tokenizer-type", "byte")]
# A sample holds one document, a step two.
SHORT = [
    "--seq-length",
    "8",
    "--global-batch-size",
    "2",
    "--train-iters",
    "12",
    "--weight-decay",
    "0.5",
    "--device",
    "cpu",
    "--dtype",
    "fp64",
]


def corpus(folder: Path, name: str, texts: list[str]) -> str:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prefix = str(file.with_suffix(""))
    assert (
        prepare(["--input", str(file), "--output-prefix", prefix, "--tokenizer-type", "byte", "--no-append-eod"]) == 0
    )
    return prefix


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpus")
    prefix = corpus(folder, "rare", ["a" if n % 5 < 3 else "abcdefgh"[: 2 + n % 6] for n in range(60)])
    return [*FLAGS, *SHORT, "--data-cache-path", str(folder / "cache"), "--data-path", prefix]


@pytest.fixture(scope="module")
def one_rank(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    train(0, folder, *base, "--save-interval", "1", "--keep-checkpoints", "20")
    return folder


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_and_moments(run: Path, step: int) -> list[bytes]:
    return [path.read_bytes() for path in sorted((run / "checkpoints" / f"step_{step:07d}").glob("*.distcp"))]


def test_a_step_without_a_label_changes_nothing_and_is_counted(base, one_rank: Path) -> None:
    found = records(one_rank)
    empty = [r["step"] for r in found if r["loss_tokens"] == 0]
    assert len(empty) >= 2 and empty[0] > 1 and len(empty) < len(found), empty
    for record in found:
        assert (record["loss"] is None) == (record["step"] in empty)
        assert record["skipped_steps"] == sum(step <= record["step"] for step in empty)
        if record["step"] > 1:
            states = [weights_and_moments(one_rank, record["step"] - back) for back in (1, 0)]
            assert (states[0] == states[1]) == (record["step"] in empty), record["step"]


@pytest.mark.parametrize(
    "flags",
    [
        "--dp-shard-size 2",
        "--dp-replicate-size 2 --dp-shard-size 1",
        "--pp-size 2",
        "--tp-size 2",
        "--cp-size 2",
    ],
)
def test_every_layout_skips_the_same_steps(base, one_rank: Path, tmp_path: Path, flags: str) -> None:
    result = run_train(2, "--run-dir", str(tmp_path), *base, *flags.split(), "--check-weights-interval", "1")
    assert result.returncode == 0, result.stdout + result.stderr
    got, want = records(tmp_path), records(one_rank)
    assert "has a label: the weights are not updated" in result.stdout
    assert ("compares nothing" in result.stdout) == ("replicate" not in flags and "tp" not in flags)
    for a, b in zip(got, want, strict=True):
        assert (a["loss"] is None) == (b["loss"] is None) and a["skipped_steps"] == b["skipped_steps"]
        assert a["loss"] is None or a["loss"] == pytest.approx(b["loss"], rel=1e-9)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-9)


def test_a_run_resumed_at_such_a_step_is_the_run(base, one_rank: Path, tmp_path: Path) -> None:
    want = records(one_rank)
    empty = next(r["step"] for r in want if r["loss"] is None)
    flags = ["--save-interval", "1", "--exit-interval"]
    train(0, tmp_path, *base, *flags, str(empty))
    got = train(0, tmp_path, *base, *flags, "12", "--resume")
    assert [(r["loss"], r["grad_norm"]) for r in got] == [(r["loss"], r["grad_norm"]) for r in want]
    assert weights_and_moments(tmp_path, 12) == weights_and_moments(one_rank, 12)


def test_a_validation_without_a_label_has_no_loss(base, tmp_path: Path) -> None:
    """Its first samples have none; the corpus has some."""
    valid = corpus(tmp_path, "valid", ["a"] * 400 + ["ab"])
    flags = ["--valid-data-path", valid, "--eval-interval", "6", "--eval-iters", "1"]
    result = run_train(0, "--run-dir", str(tmp_path), *base, *flags)
    assert result.returncode == 0 and "validation after step 6: no token with a label, over 0" in result.stdout
    found = [r["validation_loss"] for r in records(tmp_path) if "validation_loss" in r]
    assert found == [None, None]


@pytest.mark.parametrize("flag", ["--data-path", "--valid-data-path"])
def test_a_corpus_without_a_label_is_refused(base, tmp_path: Path, flag: str) -> None:
    flags = [
        *base,
        flag,
        corpus(tmp_path, "none", ["a", "b", "c"] * 5),
        *(["--eval-interval", "4"] * ("valid" in flag)),
    ]
    if flag == "--data-path":
        del flags[flags.index("--data-path") : flags.index("--data-path") + 2]
    result = run_train(0, "--run-dir", str(tmp_path / "run"), *flags)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and flag in result.stderr and "is one token: no label" in result.stderr
