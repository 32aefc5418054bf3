"""Runs that change course: growing and changed batches, data ranks that do not divide the batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch import SMALL, read_metrics, run_train, train, write_corpus

RAMP = ["--rampup-batch-size", "1", "1", "12"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpus")
    return [
        *SMALL, "--device", "cpu", "--dtype", "fp64", "--data-path", str(write_corpus(folder)),
        "--data-cache-path", str(folder / "cache"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def one_rank(base, tmp_path_factory) -> dict[str, list[dict]]:
    """A run with a ramp, and one with one batch size, on one rank."""
    folder = tmp_path_factory.mktemp("one")
    return {"ramp": train(0, folder / "ramp", *base, *RAMP), "constant": train(0, folder / "constant", *base)}


def assert_same(got: list[dict], want: list[dict], limit: float = 1e-9) -> None:
    assert [r["step"] for r in got] == [r["step"] for r in want]
    for a, b in zip(got, want, strict=True):
        assert (a["tokens"], a["loss_tokens"]) == (b["tokens"], b["loss_tokens"])
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=limit)


LAYOUTS = [
    ("constant", 3, ""),
    ("constant", 3, "--pp-size 3 --num-layers 3"),
    ("ramp", 3, "--dp-replicate-size 3 --no-balance-work"),
    ("ramp", 2, "--micro-batch-size 3 --cp-size 2 --pad-rows dynamic"),
    ("ramp", 2, "--pp-size 2"),
]


@pytest.mark.parametrize(("kind", "ranks", "flags"), LAYOUTS, ids=[f"{kind} {flags}" for kind, _, flags in LAYOUTS])
def test_every_layout_has_the_losses_of_one_rank(
    base, one_rank, tmp_path: Path, kind: str, ranks: int, flags: str
) -> None:
    """Three data ranks with four samples a step, fewer samples than stages, rows of three samples with two in them."""
    options = [*base, *(RAMP if kind == "ramp" else []), *flags.split()]
    want = (
        train(0, tmp_path / "one", *options[: -len(flags.split())], "--num-layers", "3") if "layers" in flags else None
    )
    assert_same(train(ranks, tmp_path / "many", *options), want or one_rank[kind])


def test_a_changed_batch_goes_on_where_the_samples_stood(base, tmp_path: Path) -> None:
    """Four samples a step, six from step 5 on; on other ranks; the bits do not depend on further stops."""
    first = ["--train-iters", "4", "--lr-decay-iters", "10", "--save-interval", "2"]
    changed = ["--resume", "--global-batch-size", "6", "--new-batch", "--save-interval", "2", "--save-final"]
    train(0, tmp_path / "one", *base, *first)
    whole = train(0, tmp_path / "one", *base, *changed)
    assert [r["consumed_tokens"] for r in whole] == [256 * n for n in (4, 8, 12, 16, 22, 28, 34, 40, 46, 52)]

    train(3, tmp_path / "three", *base, *first)
    refused = run_train(0, "--run-dir", str(tmp_path / "three"), *base, "--resume", "--global-batch-size", "6")
    assert refused.returncode == 2 and "--new-batch" in refused.stderr, refused.stderr
    train(3, tmp_path / "three", *base, *changed, "--train-iters", "7", "--lr-decay-iters", "10")
    run = json.loads((tmp_path / "three" / "checkpoints" / "step_0000007" / "run.json").read_text())
    assert run["data"]["batches"] == [[0, 0, 4], [4, 16, 6]] and run["data"]["sequences"] == 34
    again = train(3, tmp_path / "three", *base, "--resume", "--global-batch-size", "6")
    assert_same(again, whole)

    stopped = tmp_path / "stopped"
    train(0, stopped, *base, *first)
    train(0, stopped, *base, *changed, "--train-iters", "6", "--lr-decay-iters", "10")
    train(0, stopped, *base, "--resume", "--global-batch-size", "6")
    keys = ("loss", "grad_norm", "consumed_tokens")
    bits = [
        [[r[key] for key in keys] for r in read_metrics(run / "metrics.jsonl")] for run in (stopped, tmp_path / "one")
    ]
    assert bits[0] == bits[1]
