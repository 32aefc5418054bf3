"""What a plan says: parameters, bytes, rows, legal sizes, ranked layouts. Its memory is measured in
tests/distributed/test_memory.py.
"""

from __future__ import annotations

import json
import time
from argparse import Namespace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from config.arguments import model_config

from cp.support import AttentionChoice
from model.config import GPTConfig
from planner.communication import cp_bytes
from planner.estimate import describe_rows, make_plan, parse_lengths
from planner.memory import Ledger, rank_memory, stage_parameters
from tests.launch import SMALL, run_train, write_corpus
from tools import plan as plan_tool

WORDS = [
    "--num-layers",
    "4",
    "--hidden-size",
    "64",
    "--num-attention-heads",
    "4",
    "--num-query-groups",
    "2",
    "--seq-length",
    "512",
    "--tokenizer-type",
    "byte",
    "--device",
    "cpu",
]


def planned(*words: str, world: int = 1) -> tuple[Namespace, GPTConfig]:
    args = plan_tool.resolved([*WORDS, *words], world, min(world, 8))
    return args, model_config(args, vocab_size=257, padded_vocab_size=384)


def test_the_ledger_counts_what_is_alive() -> None:
    ledger = Ledger()
    meta = torch.device("meta")
    with ledger:
        a = torch.empty(100, device=meta)
        with ledger.for_("others"):
            b = torch.empty(50, device=meta)
        view = a.view(10, 10)
        del a
        c = torch.empty(25, device=meta)  # `view` still holds the first 400 bytes
        del view, b
        d = torch.empty(10, device=meta)
    assert (ledger.peak, ledger.parts) == (700, {"activations": 500, "others": 200}) and len(c) + len(d) == 35
    assert sum(ledger.live.values()) == 140


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--tie-embeddings"],
        ["--qk-norm"],
        ["--tp-size", "2"],
        ["--pp-size", "2"],
        ["--virtual-stages", "2", "--pp-size", "2", "--pp-schedule", "interleaved"],
    ],
)
def test_parameters_of_a_stage_are_those_of_the_model(words: list[str]) -> None:
    """rank_memory itself asserts that the formula is what it built."""
    args, config = planned(*words, world=2)
    stages = [rank_memory(args, config, stage) for stage in range(args.pp_size)]
    assert all(sum(m.parts.values()) == m.peak for m in stages)
    assert all(stage_parameters(args, config, stage) > 0 for stage in range(args.pp_size))


PIPELINE = ["--pp-size", "4", "--num-layers", "32", "--global-batch-size", "16"]


@pytest.mark.parametrize(
    "words",
    [
        ["--num-layers", "16"],
        ["--num-layers", "16", "--recompute", "full"],
        [
            "--num-layers",
            "16",
            "--dtype",
            "bf16",
            "--reshard-after-forward",
            "on",
            "--dp-shard-size",
            "4",
            "--global-batch-size",
            "16",
        ],
        PIPELINE,
        [*PIPELINE, "--recompute", "full"],
        [*PIPELINE, "--recompute", "selective", "--dtype", "bf16"],
        [*PIPELINE, "--pp-schedule", "gpipe"],
        [*PIPELINE, "--pp-schedule", "interleaved", "--virtual-stages", "2"],
    ],
    ids=" ".join,
)
def test_layers_and_microbatches_beyond_a_few_are_continued_exactly(words: list[str]) -> None:
    """As all of them would be: sixteen layers counted from three and two, and one by one."""
    args, config = planned(*words, world=4)
    quick = rank_memory(args, config)
    with mock.patch("planner.memory.FEW_LAYERS", 32), mock.patch("planner.memory.FEW_IN_FLIGHT", 16):
        whole = rank_memory(args, config)
    if "gpipe" in words:  # which microbatch's backward pass is the fullest moment changes with their number
        assert quick.peak == pytest.approx(whole.peak, rel=0.005)
    else:
        assert quick.peak == whole.peak and quick.parts == whole.parts


@pytest.mark.parametrize(
    ("more", "less"),
    [
        (["--recompute", "none"], ["--recompute", "selective"]),
        (["--recompute", "selective"], ["--recompute", "full"]),
        (["--micro-batch-size", "2"], ["--micro-batch-size", "1"]),
        (["--loss-chunk-size", "512"], ["--loss-chunk-size", "64"]),
        (["--dtype", "fp32"], ["--dtype", "bf16"]),
    ],
)
def test_what_costs_more_is_planned_larger(more: list[str], less: list[str]) -> None:
    batch = ["--global-batch-size", "2", "--make-vocab-size-divisible-by", "128"]
    assert rank_memory(*planned(*batch, *more)).peak > rank_memory(*planned(*batch, *less)).peak


def test_a_large_model_is_planned_in_seconds() -> None:
    words = ["--num-layers", "80", "--hidden-size", "8192", "--num-attention-heads", "64", "--num-query-groups", "8"]
    args, config = planned(
        *words, "--tp-size", "8", "--cp-size", "8", "--seq-length", "131072", "--dtype", "bf16", world=64
    )
    start = time.monotonic()
    memory = rank_memory(args, config)
    assert time.monotonic() - start < 20 and 10 * 2**30 < memory.peak < 2**40


def choice(method: str, cp: int, a2a: int = 1) -> AttentionChoice:
    return AttentionChoice(backend="native", method=method, qkv_format="thd", layout="zigzag", cp_size=cp, a2a_size=a2a)


@pytest.mark.parametrize(
    ("method", "cp", "a2a", "forward", "backward"),
    [
        (
            "p2p",
            4,
            1,
            3 * 64,
            3 * 64 + 4 * 2 * 64,
        ),  # kv = 2 * 4 tokens * 2 heads * 2 channels * 2 bytes = 64; gradients in 4 bytes
        ("all_gather", 4, 1, 3 * 64, 3 * 64 + 3 * 2 * 64),
        ("a2a", 2, 2, 96, 96),  # half of q, k, v, out: 4 tokens * (2 * 4 + 2 * 2) heads * 2 channels * 2 bytes / 2
    ],
)
def test_bytes_of_attention_by_hand(method: str, cp: int, a2a: int, forward: int, backward: int) -> None:
    assert cp_bytes(choice(method, cp, a2a), tokens=4, heads=4, groups=2, head_dim=2, item=2) == (forward, backward)


def test_bytes_of_a_step_by_hand() -> None:
    args, config = planned("--dp-shard-size", "2", "--global-batch-size", "4", world=2)
    p = stage_parameters(args, config, 0)
    assert make_plan(args, config, None).sent == {
        "fsdp": p // 2 * (4 + 4)
    }  # one gather, one reduction, half to the other rank
    args, config = planned("--dp-shard-size", "2", "--global-batch-size", "4", "--reshard-after-forward", "on", world=2)
    assert make_plan(args, config, None).sent == {"fsdp": p // 2 * (2 * 2 * 4 + 4)}
    args, config = planned("--tp-size", "2", world=2)
    assert make_plan(args, config, None).sent == {
        "tp": 4 * 8 * 512 * 64 * 4 // 2
    }  # layers * gathers and scatters * [t, h] / 2


def test_rows_of_a_distribution() -> None:
    args, _ = planned("--cp-size", "2", world=2)
    rows = describe_rows(args, parse_lengths("fixed:256", np.random.default_rng(0)))
    assert (rows.packing_efficiency, rows.cp_balance, rows.squared_lengths) == (1.0, 1.0, 2 * 256**2)
    assert describe_rows(
        args, parse_lengths("fixed:300", np.random.default_rng(0))
    ).packing_efficiency == pytest.approx(300 / 512)
    assert describe_rows(args, None).squared_lengths == 512**2


def test_lengths_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "lengths").write_text("5\n7\n")
    assert parse_lengths(str(tmp_path / "lengths"), np.random.default_rng(0)).tolist() == [5, 7]
    assert parse_lengths("lognormal:1000,1", np.random.default_rng(0)).mean() == pytest.approx(1000, rel=0.05)
    for text in ("nowhere", "fixed:x", "lognormal:5", "fixed:0"):
        with pytest.raises(ValueError, match="--lengths"):
            parse_lengths(text, np.random.default_rng(0))


def test_legal_sizes_are_those_that_train_takes() -> None:
    legal = plan_tool.legal_values(WORDS, 8, 8)
    assert legal == {"pp": [1, 2, 4], "dp_replicate": [1, 2, 4, 8], "cp": [1, 2, 4, 8], "tp": [1, 2]}


def test_layouts_that_fit_come_in_the_order_of_the_estimate() -> None:
    best = plan_tool.ranked([*WORDS, "--num-layers", "2", "--global-batch-size", "8"], 4, 4, 0.05, 257, None)
    assert len(best) > 3 and [b[0] for b in best] == sorted(b[0] for b in best)
    assert all(plan.memory.peak <= 0.9 * 0.05 * 2**30 for _, _, plan in best)
    assert all(a.pp_size * a.tp_size * a.cp_size * a.dp_shard_size == 4 for _, a, _ in best)
    peaks = sorted(plan.memory.peak for _, _, plan in best)
    fewer = plan_tool.ranked(
        [*WORDS, "--num-layers", "2", "--global-batch-size", "8"], 4, 4, peaks[5] / 0.9 / 2**30, 257, None
    )
    assert [plan.memory.peak for _, _, plan in fewer] == [
        plan.memory.peak for _, _, plan in best if plan.memory.peak <= peaks[5]
    ]


def test_the_command(capsys) -> None:
    assert plan_tool.main(["--world-size", "4", "--gpu-memory", "1", *WORDS, "--cp-size", "2"]) == 0
    said = capsys.readouterr().out
    assert "dp_shard 2 x cp 2" in said and "fits" in said and "legal sizes" in said
    assert plan_tool.main(["--world-size", "4", "--json", *WORDS]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["peak"] > 0
    with pytest.raises(SystemExit):
        plan_tool.main(["--world-size", "4", "--gpu-memory", "0.0001", "--rank-layouts", *WORDS])
    assert "no layout of 4 ranks fits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpu-memory", "-5"], "--gpu-memory -5: must be finite and above 0"),
        (["--gpu-memory", "0"], "--gpu-memory 0: must be finite and above 0"),
        (["--gpu-memory", "nan"], "--gpu-memory nan: must be finite and above 0"),
        (["--gpu-memory", "inf"], "--gpu-memory inf: must be finite and above 0"),
        (["--vocab-size", "-3"], "--vocab-size -3: must be at least 1"),
        (["--vocab-size", "0"], "--vocab-size 0: must be at least 1"),
        (["--rank-layouts", "--gpu-memory", "1", "--most", "-1"], "--most -1: must be at least 1"),
        (["--node-size", "-1"], "--node-size -1: must be at least 1"),
        (["--node-size", "0"], "--node-size 0: must be at least 1"),
        (["--world-size", "0"], "--world-size 0: must be at least 1"),
    ],
)
def test_numbers_that_are_none_are_refused_in_one_line(flags: list[str], words: str, capsys) -> None:
    with pytest.raises(SystemExit) as refused:
        plan_tool.main(["--world-size", "4", *flags, *WORDS])
    said = capsys.readouterr()
    assert refused.value.code == 2 and said.out == "" and words in said.err and said.err.count("\n") == 1


def test_ranked_layouts_as_json(capsys) -> None:
    flags = [
        "--world-size",
        "4",
        "--gpu-memory",
        "1",
        "--rank-layouts",
        "--most",
        "2",
        *WORDS,
        "--global-batch-size",
        "8",
    ]
    assert plan_tool.main([*flags, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["layouts"]) == 2 < told["fitting"]
    first, second = told["layouts"]
    assert first["estimated_seconds"] <= second["estimated_seconds"] and 0 < first["plan"]["memory"]["peak"] < 2**30
    assert (
        first["pp_size"] * first["dp_replicate_size"] * first["dp_shard_size"] * first["cp_size"] * first["tp_size"]
        == 4
    )
    assert plan_tool.main(flags) == 0
    assert f"{told['fitting']} layouts fit" in capsys.readouterr().out


def test_a_dry_run_says_the_same_and_trains_nothing(tmp_path: Path) -> None:
    flags = [
        "--data-path",
        str(write_corpus(tmp_path)),
        "--device",
        "cpu",
        "--cp-size",
        "2",
        "--run-dir",
        str(tmp_path / "run"),
        "--dry-run",
    ]
    result = run_train(2, *SMALL, *flags)
    assert result.returncode == 0, result.stderr
    assert (
        "cp 2 x tp 1 = 2 ranks" in result.stdout and "activations" in result.stdout and not (tmp_path / "run").exists()
    )


def test_te_layers_are_planned_without_the_package() -> None:
    """Gate and up once more in bf16, whatever the microbatches in flight; three channels of the MLP a token instead of
    four.
    """
    words = ("--device", "cuda", "--pp-size", "2", "--global-batch-size", "4", "--ffn-hidden-size", "256")
    (args, config), (ours, _) = (
        planned("--transformer-impl", "te", "--fp8", "current", *words, world=2),
        planned(*words, world=2),
    )
    assert (args.transformer_impl, ours.transformer_impl, args.fp8) == ("te", "torch", "none")
    te, torch_layers = rank_memory(args, config).parts, rank_memory(ours, config).parts
    assert te["joined weights"] == 2 * (2 * 256 * 64) * 2  # layers of the stage, elements, bytes
    assert (
        torch_layers["activations"] - te["activations"] == 3 * 512 * 256 * 2
    )  # layers in flight, the fourth in its backward pass


def test_norms_keep_less_on_a_gpu() -> None:
    """Of each norm the input and a number a row, where a CPU also keeps the input in fp32 and what it is before its
    weight.
    """
    parts = [
        rank_memory(*planned("--dtype", "bf16", "--device", device)).parts["activations"] for device in ("cpu", "cuda")
    ]
    assert parts[0] - parts[1] == (2 * 4 + 1) * 512 * 64 * (4 + 2)  # norms, tokens, channels, bytes
