"""train.py on prepared corpora: blends, other packings, validation data, skipped steps, resumed anywhere, corrupted
data.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data.indexed_dataset import IndexedDataset, index_file, token_file
from data.prepare import main as prepare
from tests.forked import run_script
from tests.launch import ROOT, SMALL, environment, read_metrics, run_train, train, write_corpus

FLAGS = [flag for flag in SMALL if flag not in ("--tokenizer-type", "byte")]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> list[Path]:
    """Two corpora of one byte tokenizer."""
    folder = tmp_path_factory.mktemp("corpora")
    first = write_corpus(folder)
    second = folder / "other.jsonl"
    with second.open("w") as out:
        for number in range(30):
            out.write(json.dumps({"text": f"{number} " * (5 + 17 * number % 90)}) + "\n")
    for file in (first, second):
        assert (
            prepare(
                [
                    "--input",
                    str(file),
                    "--output-prefix",
                    str(file.with_suffix("")),
                    "--tokenizer-type",
                    "byte",
                    "--append-eod",
                ]
            )
            == 0
        )
    return [first.with_suffix(""), second.with_suffix("")]


@pytest.fixture(scope="module")
def base(corpora, tmp_path_factory) -> list[str]:
    return [*FLAGS, "--device", "cpu", "--dtype", "fp64", "--data-cache-path", str(tmp_path_factory.mktemp("cache"))]


def blend(corpora: list[Path]) -> list[str]:
    return ["--data-path", "0.7", str(corpora[0]), "0.3", str(corpora[1])]


def losses(metrics: list[dict]) -> dict[int, tuple[float, float]]:
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in metrics if "loss" in r}


def close(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for step in a:
        assert a[step] == pytest.approx(b[step], rel=1e-9)


def test_a_prepared_corpus_gives_the_run_of_its_text(base, corpora, tmp_path: Path) -> None:
    text = train(
        0, tmp_path / "text", *base, "--data-path", str(corpora[0].with_suffix(".jsonl")), "--tokenizer-type", "byte"
    )
    assert losses(train(0, tmp_path / "tokens", *base, "--data-path", str(corpora[0]))) == losses(text)


def test_a_blend_resumes_anywhere_on_any_grid(base, corpora, tmp_path: Path) -> None:
    """Ten steps at once on one rank; five on two data ranks, saved with where each source stands, five on cp 2 with
    workers.
    """
    flags = [*base, *blend(corpora), "--save-interval", "5"]
    whole = train(0, tmp_path / "whole", *flags)
    train(2, tmp_path / "part", *flags, "--train-iters", "5", "--lr-decay-iters", "10")
    state = json.loads((tmp_path / "part" / "checkpoints" / "step_0000005" / "run.json").read_text())["data"]
    assert state["sequences"] == 20 and [s["name"] for s in state["sources"]] == [str(c) for c in corpora]
    assert len(json.dumps(state)) < 1000
    resumed = train(2, tmp_path / "part", *flags, "--resume", "--cp-size", "2", "--num-workers", "2")
    close(losses(resumed), losses(whole))


def test_other_weights_are_another_run(base, corpora, tmp_path: Path) -> None:
    flags = [*base, "--train-iters", "2", "--save-interval", "2", "--run-dir", str(tmp_path)]
    assert run_train(0, *flags, *blend(corpora)).returncode == 0
    result = run_train(
        0, *flags, "--train-iters", "4", "--resume", "--data-path", "0.6", str(corpora[0]), "0.4", str(corpora[1])
    )
    assert result.returncode == 2 and "60.0000% of samples from" in result.stderr, result.stderr


PACKINGS = [
    "--packing greedy",
    "--packing best-fit --packing-window 8",
    "--packing concat",
    "--qkv-format bshd --packing greedy",
]


@pytest.mark.parametrize(
    "flags", [PACKINGS[1], *(pytest.param(flags, marks=pytest.mark.full) for flags in PACKINGS if flags != PACKINGS[1])]
)
def test_every_packing_trains_the_same_on_cp_ranks(base, corpora, tmp_path: Path, flags: str) -> None:
    options = [*base, *blend(corpora), *flags.split(), "--train-iters", "4", "--lr-decay-iters", "10"]
    close(losses(train(2, tmp_path / "b", *options, "--cp-size", "2")), losses(train(0, tmp_path / "a", *options)))


def test_validation_data_of_its_own(base, corpora, tmp_path: Path) -> None:
    file = tmp_path / "blend.yaml"
    file.write_text(f"sources:\n  - {{path: {corpora[0]}, weight: 2}}\n  - {{path: {corpora[1]}, weight: 1}}\n")
    flags = [
        *base,
        "--data-path",
        str(file),
        "--valid-data-path",
        str(corpora[1]),
        "--train-iters",
        "2",
        "--eval-interval",
        "2",
    ]
    metrics = train(0, tmp_path, *flags)
    assert [r["step"] for r in metrics if "validation_loss" in r] == [2]


def test_skipped_steps_are_not_read_and_the_others_do_not_change(base, corpora, tmp_path: Path) -> None:
    """With no learning, a step's loss depends on its sequences alone."""
    flags = [*base, *blend(corpora), "--lr", "0", "--min-lr", "0", "--weight-decay", "0"]
    whole, skipped = (
        losses(train(0, tmp_path / "a", *flags)),
        losses(train(0, tmp_path / "b", *flags, "--skip-steps", "3-5,8")),
    )
    assert skipped == {step: whole[step] for step in (1, 2, 6, 7, 9, 10)}


@pytest.fixture
def damaged(corpora, tmp_path: Path):
    """A copy of the first corpus, and a function that changes its files."""
    prefix = tmp_path / "damaged"
    for file in (index_file, token_file):
        file(prefix).write_bytes(file(corpora[0]).read_bytes())
    (tmp_path / "damaged.json").write_bytes(Path(f"{corpora[0]}.json").read_bytes())
    return prefix


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.full), 1])
def test_tokens_outside_the_vocabulary_end_the_run_with_their_file(
    base, damaged: Path, tmp_path: Path, workers: int
) -> None:
    """Those that the start does not see: it reads the first 64 tokens of documents."""
    lengths, tokens = IndexedDataset(damaged).lengths, np.fromfile(token_file(damaged), np.uint16)
    for first, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
        tokens[first + 64 : first + length] = 5000
    tokens.tofile(token_file(damaged))
    started = time.monotonic()
    result = run_train(
        0, *base, "--data-path", str(damaged), "--num-workers", str(workers), "--run-dir", str(tmp_path / "run")
    )
    assert time.monotonic() - started < 20  # a data worker that is not ended lives for 25 s
    said = [line for line in result.stderr.splitlines() if line.startswith("train.py:")]
    assert result.returncode == 1 and len(said) == 1
    assert "rank 0: " in said[0] and "damaged.bin: token 5000" in said[0] and "Traceback" not in result.stderr


@pytest.mark.parametrize(("file", "words"), [(".idx", "promises"), (".bin", "past the end")])
def test_cut_files_are_refused_before_anything_starts(
    base, damaged: Path, tmp_path: Path, file: str, words: str
) -> None:
    path = Path(f"{damaged}{file}")
    path.write_bytes(path.read_bytes()[:-8])
    result = run_train(0, *base, "--data-path", str(damaged), "--run-dir", str(tmp_path / "run"))
    assert result.returncode == 2 and words in result.stderr and not (tmp_path / "run").exists()


def test_a_corpus_of_another_tokenizer_is_refused(base, corpora, damaged: Path, tmp_path: Path) -> None:
    facts = json.loads((tmp_path / "damaged.json").read_text())
    (tmp_path / "damaged.json").unlink()
    result = run_train(0, *base, "--data-path", str(damaged))
    assert result.returncode == 2 and "does not say whose" in result.stderr
    facts["tokenizer"]["fingerprint"] = "another"
    (tmp_path / "damaged.json").write_text(json.dumps(facts))
    result = run_train(0, *base, "--data-path", str(damaged))
    assert result.returncode == 2 and "not the tokenizer" in result.stderr


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(p) for p in found.read_text().split()] if found.exists() else []


def test_a_dead_data_worker_ends_the_run_within_seconds(base, corpora, tmp_path: Path) -> None:
    flags = [*base, *blend(corpora), "--train-iters", "1000000", "--num-workers", "1", "--run-dir", str(tmp_path)]
    run = subprocess.Popen(
        [sys.executable, "train.py", *flags],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "metrics.jsonl").exists() or not read_metrics(tmp_path / "metrics.jsonl"):
            assert time.monotonic() < deadline and run.poll() is None
            time.sleep(0.2)
        worker = next(pid for pid in children(run.pid) if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(worker, signal.SIGKILL)
        start = time.monotonic()
        _, said = run.communicate(timeout=60)
        assert time.monotonic() - start < 20
        assert run.returncode == 1 and "rank 0: a data worker died" in said
    finally:
        run.kill()
        run.wait()


def test_a_read_only_cache_that_is_filled_is_used(base, corpora, tmp_path: Path) -> None:
    """One job fills the cache; jobs without write permission use it, past the ends of epochs too; a missing first epoch
    is refused.
    """
    cache = tmp_path / "cache"
    flags = [*FLAGS, "--device", "cpu", *blend(corpora)]
    read_only = "mock.patch('utils.files._remove_abandoned', side_effect=PermissionError(13, 'Permission denied'))"

    def run(folder: str, *more: str, around: str = "nullcontext()", place: Path = cache):
        code = "import sys, train, data.dataset\nfrom contextlib import nullcontext\nfrom unittest import mock\n"
        code += f"with mock.patch('data.dataset.MIN_STORED_PIECES', 0), {around}:\n train.run(sys.argv[1:])"
        script = tmp_path / f"{folder}.py"
        script.write_text(code)
        places = ["--run-dir", str(tmp_path / folder), "--data-cache-path", str(place)]
        return run_script(str(script), *flags, *places, *more, environment=environment())

    assert run("a", "--train-iters", "2").returncode == 0
    filled = len(list((cache / "packing").iterdir()))
    assert filled == 2  # each source's first epoch
    again = run("b", "--train-iters", "40", around=read_only)
    assert again.returncode == 0, again.stderr
    free = run("c", "--train-iters", "40", place=tmp_path / "another")
    assert free.returncode == 0, free.stderr
    assert losses(read_metrics(tmp_path / "b/metrics.jsonl")) == losses(read_metrics(tmp_path / "c/metrics.jsonl"))
    assert len(list((tmp_path / "another/packing").iterdir())) > len(list((cache / "packing").iterdir())) == filled
    other = run("d", "--train-iters", "2", "--seed", "5", around=read_only)
    assert other.returncode == 2
    assert "--data-cache-path" in other.stderr and "cannot be made" in other.stderr
