"""train.py from outside: the same losses in every layout, resume, refusals."""

from __future__ import annotations

import fcntl
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest

from checkpoint.files import list_checkpoints
from tests.launch import ROOT, SMALL, read_metrics, run_torchrun, run_train, train, write_corpus
from tools.checkpoint import find_differences


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> list[str]:
    """Flags that every run of this module shares: one corpus, one cache."""
    folder = tmp_path_factory.mktemp("corpus")
    return [
        *SMALL,
        "--device",
        "cpu",
        "--data-path",
        str(write_corpus(folder)),
        "--data-cache-path",
        str(folder / "cache"),
    ]


def on_other_data(base: list[str], data: str) -> list[str]:
    at = base.index("--data-path") + 1
    return [*base[:at], data, *base[at + 1 :]]


LAYOUTS = {
    "cp 2": (2, "--cp-size 2"),
    "cp 4": (4, "--cp-size 4"),
    "dp_shard 2 x cp 2": (4, "--dp-shard-size 2 --cp-size 2"),
    "dp_replicate 2 x cp 2": (4, "--dp-replicate-size 2 --cp-size 2"),
    "tp 2 x cp 2": (4, "--tp-size 2 --cp-size 2"),
    "tp 2 x dp_shard 2, whole stream": (4, "--tp-size 2 --no-sequence-parallel"),
    "pp 2 x cp 2": (4, "--pp-size 2 --cp-size 2"),
}
# Every layout at both row sizes and in both dtypes; on every push the ones that differ most.
EVERY_PUSH = [
    ("cp 4", "fp64", 1), ("dp_shard 2 x cp 2", "fp32", 2), ("tp 2 x cp 2", "fp64", 2),
]  # fmt: skip
REST = [(layout, dtype, micro) for layout in LAYOUTS for dtype, micro in (("fp64", 1), ("fp64", 2), ("fp32", 2))]
RUNS = EVERY_PUSH + [pytest.param(*run, marks=pytest.mark.full) for run in REST if run not in EVERY_PUSH]
LIMITS = {"fp64": 1e-9, "fp32": 1e-5}


GOLDEN = json.loads((ROOT / "tests" / "assets" / "golden_losses.json").read_text())["runs"]


def assert_golden(got: list[dict], layout: str) -> None:
    """The numbers of the day they were written down: a change of the code that moves one is no refactor
    (tests/golden.py).
    """
    for record, (loss, grad_norm) in zip([r for r in got if "loss" in r], GOLDEN[layout], strict=True):
        assert abs(record["loss"] / loss - 1) <= 1e-9 and abs(record["grad_norm"] / grad_norm - 1) <= 1e-9, (
            layout,
            record["step"],
        )


def assert_same_run(got: list[dict], want: list[dict], limit: float) -> None:
    got = [r for r in got if "loss" in r]
    assert [r["step"] for r in got] == [r["step"] for r in want] == list(range(1, 11))
    for ours, theirs in zip(got, want, strict=True):
        for name in ("loss", "grad_norm"):
            assert abs(ours[name] / theirs[name] - 1) <= limit, (ours["step"], name, ours[name], theirs[name])
        for name in ("tokens", "loss_tokens", "packing_efficiency"):
            assert ours[name] == theirs[name]


@pytest.fixture(scope="module")
def one_rank(base, tmp_path_factory) -> dict[str, list[dict]]:
    """`python train.py` alone, in each dtype."""
    return {dtype: train(0, tmp_path_factory.mktemp("one"), *base, "--dtype", dtype) for dtype in LIMITS}


@pytest.mark.parametrize(("layout", "dtype", "micro"), RUNS)
def test_every_layout_has_the_losses_of_one_rank(
    base, one_rank, tmp_path: Path, layout: str, dtype: str, micro: int
) -> None:
    ranks, flags = LAYOUTS[layout]
    metrics = train(ranks, tmp_path, *base, "--dtype", dtype, *flags.split(), "--micro-batch-size", str(micro))
    assert_same_run(metrics, one_rank[dtype], LIMITS[dtype])
    if dtype == "fp64" and layout in GOLDEN:
        assert_golden(metrics, layout)


def test_work_is_dealt_evenly_and_changes_no_loss(base, one_rank, tmp_path: Path) -> None:
    flags = [*base, "--dtype", "fp64", "--dp-shard-size", "2", "--global-batch-size", "4"]
    dealt = train(2, tmp_path / "dealt", *flags)
    in_order = train(2, tmp_path / "order", *flags, "--no-balance-work")
    assert_same_run(dealt, one_rank["fp64"], 1e-9)
    assert_same_run(in_order, one_rank["fp64"], 1e-9)
    pairs = [(a["work_balance"], b["work_balance"]) for a, b in zip(dealt, in_order, strict=True)]
    assert all(1 <= a <= b + 1e-12 for a, b in pairs) and max(a for a, _ in pairs) < max(b for _, b in pairs)


# Eight ranks, the sizes permuted over the axes.
PERMUTED = [
    "--pp-size 2 --tp-size 2 --cp-size 2",
    "--pp-size 2 --dp-shard-size 2 --cp-size 2",
    "--tp-size 2 --dp-replicate-size 2 --cp-size 2",
    "--tp-size 2 --dp-shard-size 2 --cp-size 2",
    "--pp-size 2 --cp-size 4",
    "--tp-size 2 --cp-size 4",
]


def printed_losses(output: str) -> list[str]:
    return re.findall(r"\| loss +(\S+) \|", output)


@pytest.mark.parametrize(
    "flags", [pytest.param(f, marks=[] if f in PERMUTED[:1] else [pytest.mark.full]) for f in PERMUTED]
)
def test_eight_ranks_however_permuted_print_the_losses_of_one(base, one_rank, tmp_path: Path, flags: str) -> None:
    """With validation, samples and the comparison of ranks on, at the first one."""
    more = "--sample-tokens 3 --eval-interval 10 --verify-steps 2" if flags == PERMUTED[0] else ""
    fixed = [*base, "--dtype", "fp64", "--log-interval", "1", "--run-dir", str(tmp_path)]
    result = run_train(8, *fixed, *flags.split(), *more.split())
    printed = printed_losses(result.stdout)
    assert printed == [f"{r['loss']:.5f}" for r in one_rank["fp64"]] and len(printed) == 10, (
        result.stdout + result.stderr
    )
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert_same_run(metrics, one_rank["fp64"], LIMITS["fp64"])
    if flags == PERMUTED[0]:
        assert_golden(metrics, "pp 2 x tp 2 x cp 2")


@pytest.mark.full
def test_micro_batch_size_changes_nothing(base, one_rank, tmp_path: Path) -> None:
    assert_same_run(train(0, tmp_path, *base, "--dtype", "fp64", "--micro-batch-size", "4"), one_rank["fp64"], 1e-9)


@pytest.mark.full
def test_the_same_command_twice_gives_the_same_bits(base, tmp_path: Path) -> None:
    flags = [*base, "--dtype", "fp32", "--cp-size", "2", "--micro-batch-size", "2", "--num-workers", "1"]
    runs = [train(2, tmp_path / name, *flags) for name in ("a", "b")]
    kept = [
        [{k: v for k, v in r.items() if k in ("step", "loss", "grad_norm", "lr", "tokens", "cp_balance")} for r in run]
        for run in runs
    ]
    assert kept[0] == kept[1] and len(kept[0]) == 10


def test_the_default_command_for_three_steps(tmp_path: Path) -> None:
    """`make train`'s own flags: the standard library, a SentencePiece model, a sample before and after, everything
    written.
    """
    cache = ["--data-cache-path", str(tmp_path / "cache")]
    flags = ["--cp-size", "4", "--train-iters", "3", "--run-dir", str(tmp_path / "run"), *cache]
    result = run_torchrun(4, "train.py", *flags, timeout=300)
    output = result.stdout
    assert result.returncode == 0, output + result.stderr
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) == 3 and losses[0] == pytest.approx(6.93, abs=0.1)  # ln(1024) for a model that knows nothing
    assert (
        "validation_loss" in records[-1] and records[0]["packing_efficiency"] > 0.95 and records[0]["cp_balance"] < 1.1
    )
    assert (
        output.index("sample before training")
        < output.index("step   1/3".replace("   ", " "))
        < output.index("sample after training")
    )
    for line, place in (
        ("checkpoint:", "checkpoints/step_0000003"),
        ("TensorBoard:", "tensorboard"),
        ("metrics:", "metrics.jsonl"),
    ):
        assert (tmp_path / "run" / place).exists()
        assert any(text.startswith(line) and text.endswith(place) for text in output.splitlines())


def test_loss_falls_and_flops_do_not_depend_on_cp(base, one_rank, tmp_path: Path) -> None:
    metrics = one_rank["fp32"]
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5
    cp2 = train(2, tmp_path, *base, "--dtype", "fp32", "--cp-size", "2")
    for a, b in zip(metrics, cp2, strict=True):
        # per rank: two ranks share the same count
        assert a["tflops_per_rank"] * a["step_time_s"] == pytest.approx(
            2 * b["tflops_per_rank"] * b["step_time_s"], rel=1e-12
        )
    wanted = {
        "step",
        "loss",
        "grad_norm",
        "lr",
        "tokens",
        "loss_tokens",
        "consumed_tokens",
        "step_time_s",
        "tokens_per_s",
        "tflops_per_rank",
        "mfu",
        "packing_efficiency",
        "cp_balance",
        "max_memory_bytes",
    }
    assert wanted <= metrics[0].keys() and metrics[0]["mfu"] is None


BACKENDS = {
    "all_gather": (4, "--cp-comm-type all_gather --cp-size 4"),
    "all_gather contiguous": (2, "--cp-comm-type all_gather --cp-layout contiguous --cp-size 2 --pad-rows dynamic"),
    "a2a": (2, "--cp-comm-type a2a --cp-size 2"),
    "a2a+p2p": (4, "--cp-comm-type a2a+p2p --cp-a2a-size 2 --cp-size 4"),
    "ring llama3": (2, "--cp-backend ring --ring-attn-func llama3 --cp-size 2 --dtype fp32"),
    "hybrid": (4, "--cp-layout hybrid --cp-size 2 --tp-size 2 --micro-batch-size 4 --verify-steps 2 --sample-tokens 2"),
    "hybrid all_gather": (
        4,
        "--cp-layout hybrid --cp-comm-type all_gather --pp-size 2 --cp-size 2 --micro-batch-size 2",
    ),
    "hybrid dynamic": (4, "--cp-layout hybrid --dp-shard-size 2 --cp-size 2 --micro-batch-size 2 --pad-rows dynamic"),
}


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(b, marks=[] if b in ("all_gather contiguous", "a2a", "hybrid") else [pytest.mark.full])
        for b in BACKENDS
    ],
)
def test_every_backend_has_the_losses_of_one_rank(base, one_rank, tmp_path: Path, backend: str) -> None:
    ranks, flags = BACKENDS[backend][0], BACKENDS[backend][1].split()
    dtype = "fp32" if "fp32" in flags else "fp64"
    metrics = train(ranks, tmp_path, *base, "--dtype", dtype, *flags)
    for ours, theirs in zip(metrics, one_rank[dtype], strict=True):
        for name in ("loss", "grad_norm"):
            assert abs(ours[name] / theirs[name] - 1) <= LIMITS[dtype], (ours["step"], name, ours[name], theirs[name])
        assert (ours["tokens"], ours["loss_tokens"]) == (theirs["tokens"], theirs["loss_tokens"])


@pytest.mark.full
def test_pytorchs_backend_has_the_losses_of_one_rank(base, tmp_path: Path) -> None:
    flags = [*base, "--qkv-format", "bshd", "--dtype", "fp64"]
    want = train(0, tmp_path / "one", *flags)
    assert_same_run(
        train(2, tmp_path / "cp", *flags, "--cp-size", "2", "--cp-backend", "pytorch", "--sample-tokens", "2"),
        want,
        1e-9,
    )


@pytest.mark.full
def test_bshd_has_the_same_losses_over_cp(base, tmp_path: Path) -> None:
    flags = [*base, "--qkv-format", "bshd", "--dtype", "fp64"]
    want = train(0, tmp_path / "one", *flags)
    assert_same_run(train(2, tmp_path / "cp", *flags, "--cp-size", "2"), want, 1e-9)
    assert all(r["packing_efficiency"] == 1 for r in want)


def test_resume_is_bit_identical(base, tmp_path: Path) -> None:
    """Ten steps in one go; the same ten, killed after seven and started again with the same command."""
    # A validation and a sample right before what is saved and compared: both leave weights gathered if they do not tidy
    # up.
    flags = [
        *base,
        "--dtype",
        "fp32",
        "--cp-size",
        "2",
        "--save-interval",
        "5",
        "--eval-interval",
        "5",
        "--eval-iters",
        "2",
    ]
    flags += ["--sample-tokens", "3", "--verify-steps", "2"]
    whole = train(2, tmp_path / "whole", *flags)
    # A run that stops at 7 of 10: its own last step saves, so remove that one to be left with step 5.
    first = [*flags, "--lr-decay-iters", "10"]
    train(2, tmp_path / "parts", *first, "--train-iters", "7", "--resume")
    folder = tmp_path / "parts" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_0000005", "step_0000007"]
    shutil.rmtree(folder / "step_0000007")
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as out:
        out.write('{"step": 8, "lo')  # as a run that dies leaves it
    parts = train(2, tmp_path / "parts", *first, "--resume")

    def losses(records: list[dict]) -> list[tuple]:
        return [(r["step"], r.get("loss"), r.get("grad_norm"), r.get("lr"), r.get("validation_loss")) for r in records]

    # The first part validated once more, at its own last step 7, which the second part did not keep.
    assert losses(parts) == losses(whole)
    assert read_metrics(tmp_path / "parts" / "metrics.jsonl") == parts


@pytest.mark.full
def test_a_run_goes_on_under_another_layout(base, one_rank, tmp_path: Path) -> None:
    flags = [
        *base,
        "--dtype",
        "fp64",
        "--save-interval",
        "5",
        "--run-dir",
        str(tmp_path),
        "--lr-decay-iters",
        "10",
        "--resume",
    ]
    run = run_train(4, *flags, "--tp-size", "2", "--cp-size", "2", "--train-iters", "5")
    assert "saved" in run.stdout, run.stderr
    metrics = train(2, tmp_path, *flags, "--cp-size", "2")
    assert_same_run(metrics, one_rank["fp64"], 1e-9)


@pytest.mark.full
def test_load_starts_from_a_named_checkpoint_and_refuses_another_model(base, tmp_path: Path) -> None:
    flags = [*base, "--train-iters", "4", "--save-interval", "2"]
    whole = train(0, tmp_path / "whole", *flags)
    start = str(tmp_path / "whole" / "checkpoints" / "step_0000002")
    loaded = train(0, tmp_path / "loaded", *flags, "--load", start)
    assert [(r["step"], r["loss"]) for r in loaded] == [(r["step"], r["loss"]) for r in whole[2:]]
    for flag, name in (
        ("--hidden-size 64", "use --hidden-size 32"),
        ("--seed 5", "--seed"),
        ("--seq-length 512", "--seq-length"),
    ):
        result = run_train(0, *flags, "--run-dir", str(tmp_path / "other"), "--load", start, *flag.split())
        assert result.returncode == 2 and name in result.stderr and result.stderr.count("\n") == 1, result.stderr


@pytest.mark.full
def test_saving_beside_training_changes_nothing_and_keeps_two(base, one_rank, tmp_path: Path) -> None:
    flags = [
        *base,
        "--dtype",
        "fp64",
        "--cp-size",
        "2",
        "--save-interval",
        "2",
        "--async-save",
        "--keep-checkpoints",
        "2",
    ]
    assert_same_run(train(2, tmp_path, *flags), one_rank["fp64"], 1e-9)
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step_0000008", "step_0000010"]
    start = str(tmp_path / "checkpoints" / "step_0000008")
    assert_same_run(
        [*one_rank["fp64"][:8], *train(0, tmp_path / "on", *base, "--dtype", "fp64", "--load", start)],
        one_rank["fp64"],
        1e-9,
    )


@pytest.mark.full
def test_a_damaged_checkpoint_is_refused_and_passed_over_on_demand(base, tmp_path: Path) -> None:
    """The newest has a flipped byte, the one before no run.json."""
    flags = [*base, "--dtype", "fp64", "--train-iters", "3", "--save-interval", "1", "--cp-size", "2"]
    whole = train(2, tmp_path / "whole", *flags)
    folder = tmp_path / "whole" / "checkpoints"
    data = folder / "step_0000003" / "__1_0.distcp"
    content = bytearray(data.read_bytes())
    content[100] ^= 4
    data.write_bytes(content)
    load = [*base, "--dtype", "fp64", "--train-iters", "4", "--load", str(folder)]
    result = run_train(0, *load, "--run-dir", str(tmp_path / "a"))
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert all(
        w in result.stderr for w in ("step_0000003/__1_0.distcp", "checksum", "--load-fallback", "step_0000002")
    ), result.stderr
    (folder / "step_0000002" / "run.json").unlink()
    result = run_train(0, *load, "--run-dir", str(tmp_path / "b"), "--load-fallback")
    assert result.returncode == 0, result.stderr
    assert "step 1, from" in result.stdout and result.stdout.count("passed over a corrupted checkpoint") == 2, (
        result.stdout
    )
    losses = [r["loss"] for r in read_metrics(tmp_path / "b" / "metrics.jsonl")]
    assert losses[:2] == pytest.approx([r["loss"] for r in whole[1:]], rel=1e-9)
    result = run_train(0, *load, "--run-dir", str(tmp_path / "c"), "--load", str(folder / "step_0000002"))
    assert result.returncode == 2 and "step_0000002/run.json" in result.stderr and "step_0000001" in result.stderr, (
        result.stderr
    )
    # The run itself goes on where it can, and what it saves is neither hidden nor thrown out by the damaged ones above
    # it.
    result = run_train(
        0,
        *load[:-2],
        "--run-dir",
        str(tmp_path / "whole"),
        "--resume",
        "--load-fallback",
        "--save-interval",
        "1",
        "--keep-checkpoints",
        "1",
    )
    assert result.returncode == 0 and "step 1, from" in result.stdout and "step_0000003.damaged" in result.stdout, (
        result.stdout + result.stderr
    )
    assert [p.name for p in list_checkpoints(folder)] == ["step_0000004"] and (
        folder / "latest"
    ).read_text() == "step_0000004\n"


@pytest.mark.full
def test_weights_alone_start_a_longer_context(base, tmp_path: Path) -> None:
    """Twice the length, another base, linear scaling; a new optimizer; the run can be requeued as it stands."""
    train(0, tmp_path / "short", *base, "--dtype", "fp64", "--save-interval", "10")
    start = str(tmp_path / "short" / "checkpoints")
    longer = shlex.split(
        "--dtype fp64 --seq-length 512 --rotary-base 40000 --rope-scaling linear --rope-scaling-factor 2 "
        "--train-iters 3"
    )
    flags = [*base, *longer, "--load", start, "--load-weights-only", "--resume", "--save-interval", "2", "--lr", "0"]
    flags += ["--min-lr", "0", "--verify-steps", "0"]
    first = train(0, tmp_path / "long", *flags)
    assert [r["step"] for r in first] == [1, 2, 3] and first[0]["lr"] == 0
    # Without an update the weights are the checkpoint's, bit for bit, and AdamW has counted three steps of its own.
    differing = [
        line.split(":")[0]
        for line in find_differences(
            tmp_path / "short/checkpoints/step_0000010", tmp_path / "long/checkpoints/step_0000003"
        )
    ]
    assert not [name for name in differing if name.startswith("model.")], differing
    assert {"--seq-length", "model rotary_base", "model rope_scaling", "step"} <= set(differing)
    moments = [name for name in differing if name.startswith("optimizer.")]
    assert moments and not [name for name in moments if "weight.step" not in name and "exp_avg" not in name]
    # The same command again goes on from its own checkpoint.
    again = run_train(0, *flags, "--run-dir", str(tmp_path / "long"), "--train-iters", "4")
    assert again.returncode == 0 and "step 3, from" in again.stdout, again.stdout + again.stderr
    # Other heads are another model, with or without the optimiser.
    result = run_train(
        0,
        *base,
        "--num-query-groups",
        "4",
        "--load",
        start,
        "--load-weights-only",
        "--run-dir",
        str(tmp_path / "other"),
    )
    assert result.returncode == 2 and "model num_query_groups 4" in result.stderr, result.stderr


@pytest.mark.full
def test_data_order_is_the_list_checkpoints(base, tmp_path: Path) -> None:
    """--document-alignment comes from the checkpoint where it is not given; a layout that cannot keep it is refused."""
    plain = [*base, "--dtype", "fp64", "--train-iters", "2", "--save-interval", "1"]
    at = plain.index("--document-alignment")
    del plain[at : at + 2]
    first = train(2, tmp_path / "two", *plain, "--cp-size", "2")
    start = str(tmp_path / "two" / "checkpoints" / "step_0000001")
    result = run_train(0, *plain, "--load", start, "--run-dir", str(tmp_path / "one"))
    assert result.returncode == 0 and "--document-alignment 4 (the checkpoint's)" in result.stdout, (
        result.stdout + result.stderr
    )
    (one,) = read_metrics(tmp_path / "one" / "metrics.jsonl")
    assert one["loss"] == pytest.approx(first[1]["loss"], rel=1e-9)
    result = run_train(4, *plain, "--cp-size", "4", "--load", start, "--run-dir", str(tmp_path / "four"))
    assert (
        result.returncode != 0
        and "--document-alignment 4" in result.stderr
        and "--cp-layout contiguous" in result.stderr
    ), result.stderr


@pytest.mark.full
def test_validation_loss_does_not_depend_on_the_layout(base, tmp_path: Path) -> None:
    """Fewer held-out sequences than a batch: the rest is empty and counts nothing."""
    flags = [*base, "--dtype", "fp64", "--train-iters", "1", "--eval-interval", "1", "--data-split", "80,20,0"]
    runs = [
        train(0, tmp_path / "one", *flags),
        train(4, tmp_path / "grid", *flags, "--cp-size", "2", "--dp-replicate-size", "2"),
    ]
    runs.append(train(4, tmp_path / "stages", *flags, "--pp-size", "2", "--tp-size", "2"))
    (_, one), *others = runs
    for _, grid in others:
        assert one["validation_tokens"] == grid["validation_tokens"] > 0
        assert one["validation_loss"] == pytest.approx(grid["validation_loss"], rel=1e-9)


@pytest.mark.parametrize("asynchronous", [pytest.param(False, marks=pytest.mark.full), True])
def test_a_loss_that_is_not_finite_ends_the_run_unsaved(base, tmp_path: Path, asynchronous: bool) -> None:
    """The save under way is finished."""
    flags = ["--async-save"] * asynchronous + [
        "--lr",
        "1e30",
        "--clip-grad",
        "0",
        "--save-interval",
        "1",
        "--run-dir",
        str(tmp_path),
        "--cp-size",
        "2",
    ]
    result = run_train(2, *base, *flags)
    assert result.returncode != 0 and result.stderr.count("train.py: step") == 1, result.stderr
    assert 'File "train.py"' not in result.stderr
    records = read_metrics(tmp_path / "metrics.jsonl")
    bad = int(
        re.search(r"train.py: step (\d+): loss", result.stderr).group(1)
    )  # it is kept by itself, before its update
    assert [r["step"] for r in records] == list(range(1, bad)) and all(math.isfinite(r["loss"]) for r in records)
    assert json.loads((tmp_path / "nonfinite" / f"step_{bad:07d}.json").read_text())["step"] == bad
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["status"] == "failed" and f"step {bad}: loss" in status["reason"]
    saved = [p.name for p in list_checkpoints(tmp_path / "checkpoints")]
    assert saved == [f"step_{n:07d}" for n in range(1, bad)]


@pytest.mark.full
def test_what_may_change_on_the_way_is_told(base, tmp_path: Path) -> None:
    flags = [*base, "--train-iters", "2", "--save-interval", "2"]
    train(0, tmp_path / "a", *flags)
    start = str(tmp_path / "a" / "checkpoints")
    result = run_train(
        0, *base, "--train-iters", "3", "--load", start, "--lr", "0.02", "--run-dir", str(tmp_path / "b")
    )
    assert result.returncode == 0 and "--lr 0.02 (the checkpoint: 0.01)" in result.stdout, result.stdout + result.stderr
    for more, words in (
        (["--dtype", "fp64"], "use --dtype auto"),
        (["--save", str(tmp_path / "c" / "checkpoints")], "already holds step_0000001"),
    ):
        if "c" in str(more):
            train(0, tmp_path / "c", *base, "--train-iters", "1", "--save-interval", "1")
        result = run_train(0, *base, "--train-iters", "3", "--load", start, "--run-dir", str(tmp_path / "d"), *more)
        assert result.returncode == 2 and words in result.stderr, result.stderr


def test_another_runs_metrics_are_not_overwritten(base, tmp_path: Path) -> None:
    train(0, tmp_path, *base, "--train-iters", "1")
    result = run_train(0, *base, "--train-iters", "1", "--run-dir", str(tmp_path))
    assert result.returncode == 2 and "metrics.jsonl is another run's" in result.stderr
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


REFUSALS = {
    "misspelt flag": (["--cp-sise", "2"], ["--cp-sise", "--cp-size"]),
    "world size": (["--cp-size", "3"], ["cp * tp = 3", "use torchrun --nproc-per-node 3"]),
    "sequence length": (["--seq-length", "255"], ["--seq-length 255", "256"]),
    "missing data": (["--data-path", "no/such/file"], ["--data-path no/such/file"]),
    "missing checkpoint": (["--load", "no/such/checkpoint"], ["--load no/such/checkpoint"]),
    "cuda": (["--device", "cuda"], ["--device cuda"]),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_one_line_and_exit_code_2(base, tmp_path: Path, name: str) -> None:
    flags, words = REFUSALS[name]
    if "--device" in flags:
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("this machine has a CUDA device")
    start = run_torchrun if name == "misspelt flag" else run_train  # one from a fresh interpreter
    script = ["train.py"] if name == "misspelt flag" else []
    if "--data-path" in flags:
        base, flags = on_other_data(base, flags[1]), []
    result = start(0, *script, *base, "--run-dir", str(tmp_path / "run"), *flags)
    assert result.returncode == 2
    assert result.stdout == "" and result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr
    assert not (tmp_path / "run").exists()


def test_refusal_under_torchrun_is_printed_once(base, tmp_path: Path) -> None:
    result = run_torchrun(2, "train.py", *base, "--run-dir", str(tmp_path), "--cp-size", "3")
    assert result.returncode != 0
    assert (
        result.stderr.count("train.py: ") == 1
        and 'Traceback (most recent call last):\n  File "train.py' not in result.stderr
    )


def test_fresh_start_over_old_checkpoints_is_refused(base, tmp_path: Path) -> None:
    flags = [*base, "--train-iters", "1", "--save-interval", "1"]
    train(0, tmp_path, *flags)
    result = run_train(0, "--run-dir", str(tmp_path), *flags)
    assert result.returncode == 2 and "--resume" in result.stderr


def test_broken_data_is_refused_on_every_rank(base, tmp_path: Path) -> None:
    """The fault is found by rank 0 while the others wait for it."""
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": 5}\n')
    flags = on_other_data(base, str(tmp_path / "bad.jsonl"))
    result = run_train(2, *flags, "--run-dir", str(tmp_path / "run"), "--cp-size", "2")
    assert result.returncode != 0 and "bad.jsonl:2" in result.stderr


def test_what_a_start_that_has_nothing_to_do_says(base: list[str], tmp_path: Path) -> None:
    """Beyond its last step a run is done, not to be queued again; nothing is validated where nothing is loaded; records
    are never lost.
    """
    run, flags = tmp_path / "run", [*base, "--run-dir", str(tmp_path / "run"), "--resume", "--save-interval", "5"]
    assert run_train(0, *flags, "--train-iters", "6").returncode == 0
    again = run_train(0, *flags, "--train-iters", "4")
    assert again.returncode == 0 and json.loads((run / "status.json").read_text())["status"] == "done", again.stdout
    assert (run / "metrics.jsonl").read_text().count("\n") == 6
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    refused = run_train(0, *flags, "--eval-only", "--eval-interval", "5")
    assert refused.returncode == 2 and f"--eval-only: no checkpoint under {run}/checkpoints" in refused.stderr
    assert run_train(0, *flags, "--train-iters", "2").returncode == 0
    assert (run / "metrics.jsonl").read_text().count("\n") == 2 and (run / "metrics.jsonl.before-1").read_text().count(
        "\n"
    ) == 6


def test_two_starts_on_one_folder(base: list[str], tmp_path: Path) -> None:
    """The second is refused after a while, and the first is not disturbed."""
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".checkpoints.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused = run_train(2, *base, "--cp-size", "2", "--run-dir", str(tmp_path / "run"))
    assert refused.returncode and refused.stderr.count("another run is writing checkpoints there") == 1
    assert not (tmp_path / "run" / "status.json").exists()


def test_a_stop_saves_before_it_validates(base: list[str], tmp_path: Path) -> None:
    done = run_train(0, *base, "--run-dir", str(tmp_path / "run"), "--eval-interval", "4", "--exit-interval", "4")
    assert done.returncode == 0 and 0 < done.stdout.index("saved ") < done.stdout.index("validation after step 4"), (
        done.stdout
    )
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "requeue"
