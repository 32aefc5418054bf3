"""Runs that change course: growing and changed batches, data ranks that do not divide the batch, other mixtures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data.prepare import main as prepare
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


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> list[Path]:
    """Three corpora of one byte tokenizer."""
    folder, corpora = tmp_path_factory.mktemp("corpora"), []
    for number in range(3):
        file = folder / f"{number}.jsonl"
        texts = (f"{number} {n} " * (5 + (17 * n + 31 * number) % 90) for n in range(30))
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prefix = file.with_suffix("")
        assert prepare(["--input", str(file), "--output-prefix", str(prefix), "--tokenizer-type", "byte"]) == 0
        corpora.append(prefix)
    return corpora


def test_another_mixture_from_here_on(base, corpora, tmp_path: Path) -> None:
    """0.7 of A and 0.3 of B; after five steps 0.2 of B and 0.8 of C: B goes on where it stood. On one rank and on two,
    and with stops before, at and after the change.
    """
    at = base.index("--data-path")
    flags = [*base[:at], *base[at + 2 :], "--save-interval", "1"]
    flags = [flag for flag in flags if flag not in ("--tokenizer-type", "byte")]
    a, b, c = map(str, corpora)
    before, after = ["--data-path", "0.7", a, "0.3", b], ["--resume", "--new-data", "--data-path", "0.2", b, "0.8", c]
    until = ["--lr-decay-iters", "10", "--train-iters"]

    train(0, tmp_path / "one", *flags, *before, *until, "5")
    for name in ("two", "stops"):
        shutil.copytree(tmp_path / "one", tmp_path / name)
    refused = run_train(0, "--run-dir", str(tmp_path / "one"), *flags, "--resume", *after[2:])
    assert refused.returncode == 2 and "--new-data" in refused.stderr and f"{c} is new" in refused.stderr
    whole = train(0, tmp_path / "one", *flags, *after)
    assert_same(train(2, tmp_path / "two", *flags, *after, "--cp-size", "2"), whole)

    result = run_train(0, "--run-dir", str(tmp_path / "stops"), *flags, *after, *until, "6")
    assert result.returncode == 0 and "changed: --data-path" in result.stdout, result.stdout
    train(0, tmp_path / "stops", *flags, *after, *until, "8")  # as a job that is requeued with the same command
    keys = ("loss", "grad_norm", "tokens")
    bits = [[[r[key] for key in keys] for r in train(0, tmp_path / "stops", *flags, "--resume", *after[2:])]]
    assert bits[0] == [[r[key] for key in keys] for r in whole]

    states = [
        json.loads((tmp_path / "one" / "checkpoints" / f"step_{n:07d}" / "run.json").read_text())["data"]
        for n in (5, 10)
    ]
    stood = [{s["name"]: s["position"] for s in state["sources"]} for state in states]
    assert stood[1][b] - stood[0][b] == 4 and stood[1][c] == 16  # of the twenty samples since
    assert states[1]["mixture"] == {"sequences": 20, "counts": [stood[0][b], 0, 0]}


@pytest.fixture(scope="module")
def by_hand(base, corpora, tmp_path_factory) -> tuple[list[str], str, list[dict]]:
    """Flags without data; a file of three phases; the metrics of a run whose mixture is changed by hand after steps 5
    and 8. A leaves and returns, B goes on.
    """
    folder = tmp_path_factory.mktemp("by_hand")
    a, b, c = map(str, corpora)
    at = base.index("--data-path")
    flags = [*base[:at], *base[at + 2 :], "--lr-decay-iters", "10"]
    flags = [flag for flag in flags if flag not in ("--tokenizer-type", "byte")]
    mixtures = [["0.7", a, "0.3", b], ["0.2", b, "0.8", c], ["1", c, "1", b, "1", a]]
    more: list[str] = []
    for mixture, steps in zip(mixtures, ("5", "8", "10"), strict=True):
        whole = train(0, folder / "run", *flags, "--data-path", *mixture, "--train-iters", steps, "--save-final", *more)
        more = ["--resume", "--new-data"]
    lines = ["phases:"]
    for mixture, start in zip(mixtures, ("", "from-samples: 20", "from-step: 9"), strict=True):
        pairs = zip(mixture[::2], mixture[1::2], strict=True)
        lines.append(f"- sources: [{', '.join(f'{{path: {path}, weight: {weight}}}' for weight, path in pairs)}]")
        lines += [f"  {start}"] if start else []
    (folder / "phases.yaml").write_text("\n".join(lines) + "\n")
    return flags, str(folder / "phases.yaml"), whole


def bits_of(records: list[dict]) -> list[list]:
    return [[r[key] for key in ("step", "loss", "grad_norm", "tokens")] for r in records if "loss" in r]


def test_phases_in_one_command_are_the_changes_by_hand(by_hand, tmp_path: Path) -> None:
    """To the bit, with a stop before, at and after the change; phases that were read may not change."""
    flags, phases, whole = by_hand
    run = [*flags, "--run-dir", str(tmp_path / "run"), "--save-final", "--resume", "--data-path"]
    for steps in ("4", "5", "7"):
        result = run_train(0, *run, phases, "--train-iters", steps)
        assert result.returncode == 0, result.stdout + result.stderr
    assert "from step 6: --data-path: from sample 20 on 20.0000%" in result.stdout
    other = tmp_path / "other.yaml"
    other.write_text(Path(phases).read_text().replace("from-samples: 20", "from-samples: 24"))
    refused = [run_train(0, *run, str(other), *more) for more in ([], ["--new-data"])]
    assert [one.returncode for one in refused] == [2, 2]
    assert "--new-data" in refused[0].stderr and "phases before sample 28 are not those" in refused[1].stderr
    records = train(0, tmp_path / "run", *run, phases)
    assert bits_of(records) == bits_of(whole)
    assert [r["step"] for r in records if "changed" in r] == [6, 9]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_0000010" / "run.json").read_text())["data"]
    assert [first for first, _ in state["mixtures"]] == [0, 20, 32]
    assert state["sequences"] == 40 == sum(place["position"] for place in state["sources"])


@pytest.mark.parametrize("layout", ["--tp-size 2", "--pp-size 2", "--cp-size 2", "--dp-replicate-size 2"])
def test_phases_have_the_losses_of_one_rank(by_hand, tmp_path: Path, layout: str) -> None:
    flags, phases, whole = by_hand
    records = train(2, tmp_path / "run", *flags, "--data-path", phases, *layout.split())
    assert_same([r for r in records if "loss" in r], whole)
