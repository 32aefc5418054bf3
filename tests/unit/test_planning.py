"""Plans: parameters, bytes, rows, legal sizes, ranked layouts. test_memory.py measures their memory."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import train as train_py
from config.schema import RunConfig
from cp.support import AttentionChoice
from model.config import GPTConfig
from planner.estimate import (
    cp_bytes,
    least_memory,
    max_rank_memory,
    pack_rows,
    parse_lengths,
    stage_parameters,
    step_bytes,
)
from planner.fake import MemoryLedger, fake_step, fake_world
from planner.memory import Memory, measure_step, rank_memory
from runtime.status import RunStatus
from tests.launch import SMALL, run_train, write_corpus
from tools import plan as plan_tool
from utils.errors import UserError, run_tool

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


def planned(*words: str, world: int = 1) -> tuple[RunConfig, GPTConfig]:
    config = plan_tool.resolve_without_devices([*WORDS, *words], world, min(world, 8))
    return config, config.model.architecture(257)


def test_the_ledger_counts_live_bytes_by_label() -> None:
    ledger = MemoryLedger()
    with fake_step(ledger):
        ledger.enter("activations")
        a = torch.empty(100)
        b = torch.empty(50)
        ledger.relabel(b, "others")
        view = a.view(10, 10)
        del a
        c = torch.empty(25)  # `view` still holds the first 400 bytes
        ledger.enter("later")
        d = torch.empty(10)
        assert ledger.peaks["later"] == {"activations": 500, "others": 200, "later": 40}
        del view, b
        e = torch.empty(20)
        e.untyped_storage().resize_(0)
        f = torch.empty(100)
    assert ledger.peaks["activations"] == {"activations": 500, "others": 200}
    assert ledger.peaks["later"] == {"activations": 500, "others": 200, "later": 40}, "340 bytes less, 400 more"
    assert len(c) + len(d) + len(f) == 135 and len(e) == 20


def test_shapes_that_dtensor_computes_take_no_memory() -> None:
    """It does so on fake tensors of the whole size, all tensors of an optimizer's update at once."""
    ledger = MemoryLedger()
    with fake_world(rank=0, world_size=8):
        mesh = init_device_mesh("cpu", (8,))
        with fake_step(ledger):
            shards = [DTensor.from_local(torch.empty(100), mesh, [Shard(0)]) for _ in range(4)]
            ledger.enter("update")
            sums = torch._foreach_mul(shards, 2.5)
            assert ledger.peaks["update"] == {"weights": 1600, "update": 1600} and len(sums) == 4


def test_a_fake_world_leaves_nothing_behind() -> None:
    hook = sys.excepthook
    with fake_world(rank=3, world_size=8):
        assert (dist.get_rank(), dist.get_world_size()) == (3, 8)
        with pytest.raises(AssertionError), fake_world(rank=0, world_size=1):
            pass
    assert not dist.is_initialized() and sys.excepthook is hook


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (1, []),
        (1, ["--tie-embeddings"]),
        (1, ["--qk-norm"]),
        (2, ["--tp-size", "2"]),
        (2, ["--pp-size", "2"]),
        (2, ["--pp-size", "2", "--tie-embeddings"]),
        (2, ["--virtual-stages", "2", "--pp-size", "2", "--pp-schedule", "interleaved"]),
    ],
)
def test_parameters_of_a_stage_are_those_of_the_model(world: int, words: list[str]) -> None:
    config, architecture = planned(*words, world=world)
    for stage in range(config.parallel.pp_size):
        memory = rank_memory(config, architecture, stage)
        assert sum(memory.parts.values()) == memory.peak
        assert memory.parts["weights"] == 4 * stage_parameters(config, architecture, stage)


PIPELINE = ["--pp-size", "2", "--num-layers", "12", "--global-batch-size", "6"]
ACCUMULATED = ["--dtype", "bf16", "--reshard-after-forward", "on", "--dp-shard-size", "2", "--global-batch-size", "6"]


@pytest.mark.parametrize(
    ("words", "tolerance"),
    [
        (["--num-layers", "8"], 0),
        (["--num-layers", "8", "--recompute", "full"], 0),
        (["--num-layers", "8", "--recompute", "selective", "--dtype", "bf16", "--device", "cuda"], 0),
        (["--num-layers", "8", *ACCUMULATED], 0),
        (PIPELINE, 0.005),
        ([*PIPELINE, "--recompute", "full"], 0.02),  # a sent message more, of less in all
        ([*PIPELINE, "--pp-schedule", "gpipe"], 0),
        ([*PIPELINE, "--pp-schedule", "interleaved", "--virtual-stages", "2"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_extrapolation_equals_all_layers_and_microbatches(words: list[str], tolerance: float) -> None:
    run = planned(*words, world=2)
    for stage in {0, run[0].parallel.pp_size - 1}:
        quick = rank_memory(*run, stage)
        with (
            mock.patch("planner.memory.FEW_LAYERS", 32),
            mock.patch("planner.memory.enough_microbatches", lambda config, stage: 16),
        ):
            whole = rank_memory(*run, stage)
        assert quick.peak == pytest.approx(whole.peak, rel=tolerance, abs=1024)


@pytest.mark.parametrize(
    "words",
    [
        ["--cp-size", "2", "--recompute", "selective", "--dtype", "bf16", "--device", "cuda"],
        ["--tp-size", "2", "--recompute", "full", "--optimizer", "muon"],
        [*PIPELINE, "--offload-activations", "--recompute", "full"],
    ],
)
def test_meta_kernels_give_what_fake_tensor_mode_gives(words: list[str]) -> None:
    run = planned(*words, "--num-layers", "2", world=2)
    quick = rank_memory(*run)
    with mock.patch("planner.fake._call", lambda func, inputs, options: func(*inputs, **options)):
        assert rank_memory(*run).parts == pytest.approx(quick.parts, abs=1024)


def test_no_stage_is_measured_after_one_above_the_limit() -> None:
    run = planned("--pp-size", "2", "--global-batch-size", "4", world=2)
    with mock.patch("planner.estimate.rank_memory", wraps=rank_memory) as measured:
        most = max_rank_memory(*run)
        assert measured.call_count == 2 and max_rank_memory(*run, 2 * most.peak).stage == most.stage
        assert measured.call_count == 4 and max_rank_memory(*run, 1.0).stage == 0
        assert measured.call_count == 5


def test_a_few_chunks_of_the_loss_take_the_memory_of_all() -> None:
    run = planned("--loss-chunk-size", "32", "--make-vocab-size-divisible-by", "4096")
    few = rank_memory(*run)
    with mock.patch("planner.memory.FEW_CHUNKS", 16):
        assert rank_memory(*run) == few


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (2, ["--dp-shard-size", "2", "--global-batch-size", "2"]),
        (2, ["--dp-shard-size", "2", "--global-batch-size", "8"]),
        (2, ["--cp-size", "2", "--recompute", "selective"]),
        (2, ["--tp-size", "2", "--recompute", "full", "--global-batch-size", "4"]),
        (2, ["--recompute", "full", "--offload-activations"]),
        (2, ["--pp-size", "2", "--global-batch-size", "8"]),
        (2, ["--pp-size", "2", "--pp-schedule", "interleaved", "--virtual-stages", "2", "--global-batch-size", "4"]),
    ],
)
def test_the_bound_from_sizes_is_below_the_measured_memory(world: int, words: list[str]) -> None:
    shape = ["--num-layers", "4", "--dtype", "bf16", "--device", "cuda", "--seq-length", "4096"]
    config, architecture = planned(*shape, *words, world=world)
    bound, measured = least_memory(config, architecture), rank_memory(config, architecture).peak
    assert (0.08 if config.training.offload_activations else 0.25) * measured < bound <= measured


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


def test_whole_gradients_do_not_live_between_microbatches() -> None:
    flags = ["--dp-shard-size", "8", "--global-batch-size", "16", "--reshard-after-forward", "on"]
    kept, reduced = (planned(*flags, "--reduce-every-microbatch", word, world=8) for word in ("off", "on"))
    whole = 4 * stage_parameters(*kept, 0)
    assert rank_memory(*kept).peak - rank_memory(*reduced).peak > whole * 0.6


def test_tables_of_the_vocabulary_are_gathered_apart() -> None:
    """The embedding for the forward pass, the head from the last layer to its own backward pass."""
    flags = ["--num-layers", "3", "--dp-shard-size", "4", "--reshard-after-forward", "on", "--dtype", "bf16"]
    peaks = {}
    for tied in ([], ["--tie-embeddings"]):
        config, _ = planned(*flags, *tied, world=4)
        architecture = config.model.architecture(2**16)  # a table of 8 MiB in bf16, a layer of 0.1 MiB
        assert architecture.tie_embeddings == bool(tied)
        peaks[bool(tied)] = measure_step(config, architecture, 0, 1)
    table = 2**16 * 64 * 2
    middle, first = ("backward pass of a middle layer", "backward pass of the first layer")
    assert peaks[True][first]["gathered weights"] >= table and "gathered weights" not in peaks[False][first]
    # In fp32 this rank's shard of the head's gradient, beside those of layers; tied, nothing is reduced yet.
    assert peaks[False][middle]["gradients"] >= table * 2 / 4 > 10 * peaks[True][middle]["gradients"]


@pytest.mark.parametrize(
    ("device", "layers", "batch", "more", "reduces"),
    [
        ("cuda", 32, 16, [], True),  # 8 billion weights
        ("cuda", 32, 8, [], False),  # one microbatch
        ("cuda", 2, 16, [], False),
        ("cuda", 2, 16, ["--reduce-every-microbatch", "on"], True),
        ("cuda", 32, 16, ["--reduce-every-microbatch", "off"], False),
        ("cuda", 32, 16, ["--tp-size", "8"], False),
        ("cuda", 32, 16, ["--pp-size", "2"], False),
        ("cpu", 32, 16, [], False),
    ],
)
def test_gradients_are_reduced_every_microbatch_where_they_are_large(
    device: str, layers: int, batch: int, more: list[str], reduces: bool
) -> None:
    shape = [
        "--num-layers",
        str(layers),
        "--hidden-size",
        "4096",
        "--num-attention-heads",
        "32",
        "--num-query-groups",
        "8",
    ]
    config, _ = planned(*shape, "--global-batch-size", str(batch), "--device", device, *more, world=8)
    assert config.parallel.reduce_every_microbatch == ("on" if reduces else "off")


def test_a_large_model_is_planned_in_seconds() -> None:
    words = ["--num-layers", "80", "--hidden-size", "8192", "--num-attention-heads", "64", "--num-query-groups", "8"]
    config, architecture = planned(
        *words, "--tp-size", "8", "--cp-size", "8", "--seq-length", "131072", "--dtype", "bf16", world=64
    )
    start = time.monotonic()
    memory = rank_memory(config, architecture)
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
    run = planned("--dp-shard-size", "2", "--global-batch-size", "4", world=2)
    p = stage_parameters(*run, 0)
    assert step_bytes(*run) == {"fsdp": p // 2 * (4 + 4)}  # one gather, one reduction, half to the other rank
    run = planned("--dp-shard-size", "2", "--global-batch-size", "4", "--reshard-after-forward", "on", world=2)
    tables = 2 * run[1].padded_vocab_size * 64 + 64  # embedding; norm and head: once a microbatch
    assert step_bytes(*run) == {"fsdp": (2 * (2 * p - tables) * 4 + p * 4) // 2}
    flags = ["--dp-shard-size", "2", "--global-batch-size", "4", "--reduce-every-microbatch", "on"]
    assert step_bytes(*planned(*flags, world=2)) == {"fsdp": p // 2 * (4 + 2 * 4)}
    run = planned("--tp-size", "2", world=2)
    assert step_bytes(*run) == {"tp": 4 * 8 * 512 * 64 * 4 // 2}  # layers * gathers and scatters * [t, h] / 2
    # Two ranks share a head: of the 64 channels of its group each sends half to the other, and of their gradients.
    run = planned("--tp-size", "4", world=4)
    assert step_bytes(*run) == {"tp": 4 * 512 * (8 * 64 * 3 // 4 + 2 * 32) * 4}
    assert run[0].parallel.attention.cp_size == 1 and rank_memory(*run).peak > 0


def test_rows_of_a_distribution() -> None:
    config, architecture = planned("--cp-size", "2", world=2)
    rows = pack_rows(config, architecture, parse_lengths("fixed:256", np.random.default_rng(0)))
    assert (rows.packing_efficiency, rows.cp_balance, rows.squared_lengths) == (1.0, 1.0, 2 * 256**2)
    rows = pack_rows(config, architecture, parse_lengths("fixed:300", np.random.default_rng(0)))
    assert rows.packing_efficiency == pytest.approx(300 / 512)
    assert pack_rows(config, architecture, None).squared_lengths == 512**2


def test_bytes_of_all_gather_follow_the_documents() -> None:
    """256 tokens of a rank; in `contiguous` no document of 128 crosses ranks, and half of one of 200 + 56 may."""
    words = ["--cp-size", "2", "--cp-comm-type", "all_gather"]
    run = planned(*words, "--cp-layout", "contiguous", "--document-alignment", "1", world=2)
    for text, tokens in (("fixed:128", 0), ("fixed:171", 85)):
        rows = pack_rows(*run, parse_lengths(text, np.random.default_rng(0)))
        assert rows.gathered == (tokens, 0) and rows.documents == 10_000
    layers, kv = 4, 2 * 2 * 16 * 4  # K and V of a token: 2 heads of 16 channels in 4 bytes
    assert step_bytes(*run, rows)["cp"] == 2 * layers * tokens * kv
    # Chunk 0 goes to rank 1, chunks 1 and 2 to rank 0.
    assert pack_rows(*planned(*words, world=2), None).gathered == (1 * 128, 2 * 128)


def test_the_balance_over_all_ranks_of_a_step() -> None:
    lengths = parse_lengths("lognormal:100,1.5", np.random.default_rng(0))
    flags = ["--dp-shard-size", "4", "--global-batch-size", "16"]
    dealt, in_order = (
        pack_rows(*planned(*flags, word, world=4), lengths).work_balance
        for word in ("--balance-work", "--no-balance-work")
    )
    assert 1 <= dealt < in_order and dealt < 1.01
    assert pack_rows(*planned(*flags, world=4), None).work_balance == pytest.approx(1.0)


def test_bytes_of_a_hybrid_row() -> None:
    """Documents of a rank's room travel nowhere; one long document goes over all ranks, as in zigzag."""
    shape = ["--cp-size", "4", "--micro-batch-size", "4", "--global-batch-size", "4", "--cp-comm-type", "p2p"]
    hybrid, zigzag = (planned(*shape, "--cp-layout", layout, world=4) for layout in ("hybrid", "zigzag"))
    short = pack_rows(*hybrid, parse_lengths("fixed:64", np.random.default_rng(0)))
    assert short.rings == {} and "cp" not in step_bytes(*hybrid, short)
    one = planned("--cp-size", "4", "--cp-comm-type", "p2p", "--cp-layout", "hybrid", world=4)
    whole = pack_rows(*one, None)
    assert whole.rings == {4: 128} and step_bytes(*one, whole)["cp"] * 4 == step_bytes(*zigzag)["cp"]


def test_lengths_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "lengths").write_text("5\n7\n")
    assert parse_lengths(str(tmp_path / "lengths"), np.random.default_rng(0)).tolist() == [5, 7]
    assert parse_lengths("lognormal:1000,1", np.random.default_rng(0)).mean() == pytest.approx(1000, rel=0.05)
    for text in ("nowhere", "fixed:x", "lognormal:5", "fixed:0"):
        with pytest.raises(ValueError, match="--lengths"):
            parse_lengths(text, np.random.default_rng(0))


def test_a_plan_says_how_the_batch_grows_and_where_phases_begin(tmp_path: Path, capsys) -> None:
    file = tmp_path / "phases.yaml"
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("words " * 50)
    file.write_text("phases:\n- sources: [{path: a.txt}]\n- from-tokens: 5000\n  sources: [{path: b.txt}]\n")
    flags = ["--data-path", str(file), "--global-batch-size", "8", "--rampup-batch-size", "2", "6", "10"]
    with (
        mock.patch("planner.estimate.max_rank_memory", return_value=Memory(2**30, {"weights": 2**30}, 0)),
        mock.patch("tools.plan.find_legal_sizes", return_value={}),
    ):
        assert plan_tool.main([*WORDS, *flags, "--eval-interval", "0"]) == 0
    said = capsys.readouterr().out
    assert "2 from step 1, 8 from step 6" in said and "another from sample 10 on (step 6)" in said
    assert "a step of 2 samples at first, 5 steps to the last" in said


def test_legal_sizes_are_those_that_train_takes() -> None:
    legal = plan_tool.find_legal_sizes(WORDS, 8, 8)
    assert legal == {"pp": [1, 2, 4], "dp_replicate": [1, 2, 4, 8], "cp": [1, 2, 4, 8], "tp": [1, 2, 4]}


def ranked(gib: float, most: int) -> tuple[list[plan_tool.Layout], int]:
    words = [*WORDS, "--num-layers", "2", "--global-batch-size", "8"]
    ranking = plan_tool.rank_layouts(words, 2, 2, 257, None, gpu_memory=gib)
    return list(ranking.find_fitting(most)), len(ranking.layouts)


def test_layouts_that_fit_come_in_the_order_of_the_estimate() -> None:
    best, legal = ranked(0.05, 100)
    assert 3 < len(best) <= legal and [b.seconds for b in best] == sorted(b.seconds for b in best)
    assert all(b.plan.memory.peak <= 0.9 * 0.05 * 2**30 for b in best)
    assert all(b.config.parallel.world_size == 2 for b in best)
    limit = sorted(b.plan.memory.peak for b in best)[3]
    fewer, again = ranked(limit / 0.9 / 2**30 * 1.0001, 100)
    assert again == legal and [b.plan for b in fewer] == [b.plan for b in best if b.plan.memory.peak <= limit]
    assert [b.plan for b in ranked(0.05, 3)[0]] == [b.plan for b in best[:3]]


def test_the_estimate_knows_device_recomputation_and_balance() -> None:
    def seconds(*flags: str, balance: float = 1.0) -> float:
        config = plan_tool.resolve_without_devices([*WORDS, "--cp-size", "2", *flags], 2, 2)
        architecture = config.model.architecture(257)
        rows = replace(pack_rows(config, architecture, None), work_balance=balance)
        return plan_tool.estimate_seconds(config, architecture, rows, (64.0,), 2)

    assert seconds() > 10 * seconds("--device", "cuda")
    assert seconds("--recompute", "full") > 1.1 * seconds()
    assert seconds(balance=1.5) == 1.5 * seconds()


def test_the_list_measures_no_more_than_needed() -> None:
    with mock.patch("tools.plan.max_rank_memory", wraps=plan_tool.max_rank_memory) as measured:
        best, _ = ranked(1, 2)
    assert len(best) == measured.call_count == 2


def test_the_list_measures_nothing_that_cannot_fit() -> None:
    with mock.patch("tools.plan.max_rank_memory", wraps=plan_tool.max_rank_memory) as measured:
        best, legal = ranked(0.003, 100)
    assert len(best) <= measured.call_count < legal


@pytest.mark.parametrize(
    ("part", "words", "flag"),
    [
        ("activations", [], "--recompute full"),
        ("activations", ["--recompute", "full"], "--offload-activations"),
        ("gradients", ["--dp-shard-size", "2"], "--reduce-every-microbatch on"),
        ("logits and loss", [], "a smaller --loss-chunk-size"),
        ("weights", ["--pp-size", "2"], "a larger --tp-size"),
    ],
)
def test_advice_for_the_largest_part(part: str, words: list[str], flag: str) -> None:
    config, _ = planned("--global-batch-size", "4", *words, world=2)
    said = plan_tool.advise(config, Memory(3, {part: 2, "others": 1}, 0))
    assert said.startswith(f"most of it is {part}: {flag}")


def test_a_dry_run_of_any_number_of_ranks(capsys) -> None:
    with mock.patch("train.cuda_device_count", return_value=0):
        train_py.main([*SMALL, "--dry-run-ranks", "64", "--dtype", "bf16", "--global-batch-size", "64"], RunStatus())
    assert "dp_shard 64 x cp 1 x tp 1 = 64 ranks" in capsys.readouterr().out


def test_the_command(capsys) -> None:
    assert plan_tool.main(["--world-size", "4", "--gpu-memory", "1", *WORDS, "--cp-size", "2"]) == 0
    said, told = capsys.readouterr()
    assert told == "--config configs/standard_library.yaml, as train.py without --data-path and --config\n"
    assert "dp_shard 2 x cp 2" in said and "fits" in said and "legal sizes" in said and "s a step on CPU" in said
    assert plan_tool.main(["--world-size", "4", "--json", *WORDS]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["peak"] > 0
    with pytest.raises(UserError, match="no layout of 4 ranks fits"):
        plan_tool.main(["--world-size", "4", "--gpu-memory", "0.0001", "--rank-layouts", *WORDS])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpu-memory", "-5"], "--gpu-memory -5: must be finite and above 0"),
        (["--gpu-memory", "0"], "--gpu-memory 0: must be finite and above 0"),
        (["--gpu-memory", "nan"], "--gpu-memory nan: must be finite and above 0"),
        (["--gpu-memory", "inf"], "--gpu-memory inf: must be finite and above 0"),
        (["--rank-layouts", "--gpu-memory", "1", "--most", "-1"], "--most -1: must be at least 1"),
        (["--node-size", "-1"], "--node-size -1: must be at least 1"),
        (["--node-size", "0"], "--node-size 0: must be at least 1"),
        (["--world-size", "0"], "--world-size 0: must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused_in_one_line(flags: list[str], words: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py", "--world-size", "4", *flags, *WORDS])
    code = run_tool(plan_tool.main)
    said = capsys.readouterr()
    assert code == 2 and said.out == "" and words in said.err and said.err.count("\n") == 1


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
    assert len(told["layouts"]) == 2 < told["legal"]
    first, second = told["layouts"]
    assert first["estimated_seconds"] <= second["estimated_seconds"] and 0 < first["plan"]["memory"]["peak"] < 2**30
    assert (
        first["pp_size"] * first["dp_replicate_size"] * first["dp_shard_size"] * first["cp_size"] * first["tp_size"]
        == 4
    )
    assert plan_tool.main(flags) == 0
    assert f"of {told['legal']} legal layouts the first 2 that fit" in capsys.readouterr().out


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
    """Gate and up once more in bf16, whatever is in flight; three channels of the MLP a token, not four, as with fused
    kernels.
    """
    words = ["--device", "cuda", "--pp-size", "2", "--global-batch-size", "4", "--ffn-hidden-size", "256"]
    te = planned("--transformer-impl", "te", "--fp8", "current", *words, world=2)
    plain, fused = planned("--no-fused-kernels", *words, world=2), planned(*words, world=2)
    assert (te[0].model.transformer_impl, plain[0].model.transformer_impl) == ("te", "torch")
    assert te[0].model.fp8 == "none"
    te_parts, plain_parts, fused_parts = (rank_memory(*plan).parts for plan in (te, plain, fused))
    assert te_parts["fused weights"] == 2 * (2 * 256 * 64) * 2  # layers of the stage, elements, bytes
    # Two layers of two microbatches in flight, one of them in its backward pass.
    saved = 512 * 256 * 2
    for parts in (te_parts, fused_parts):
        assert 3 * saved <= plain_parts["activations"] - parts["activations"] <= 4 * saved


def test_intermediate_results_of_a_kernel_take_no_memory() -> None:
    """Of a chunk's logits, only they and their gradient exist, in bf16; without kernels fp32 copies beside."""
    words = ["--dtype", "bf16", "--device", "cuda", "--vocab-size", "65536"]
    fused, plain = (planned(*words, *more)[0] for more in ([], ["--no-fused-kernels"]))
    peaks = [rank_memory(config, config.model.architecture(257)).peak for config in (fused, plain)]
    assert peaks[1] - peaks[0] >= 5 * 512 * 65536  # bytes, tokens, vocabulary


def test_norms_save_less_on_a_gpu() -> None:
    """Of each norm the input and a number a row; a CPU also saves the input in fp32 and what precedes the weight."""
    words = ["--dtype", "bf16", "--no-fused-kernels", "--device"]
    peaks = [rank_memory(*planned(*words, device)).parts for device in ("cpu", "cuda")]
    saved = [parts["activations"] + parts.get("logits and loss", 0) for parts in peaks]
    assert saved[0] - saved[1] == (2 * 4 + 1) * 512 * 64 * (4 + 2)  # norms, tokens, channels, bytes
