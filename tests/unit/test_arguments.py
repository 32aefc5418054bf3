"""Flags: every refusal in one line with the flag, both numbers and a legal value; presets; what auto means."""

from __future__ import annotations

import dataclasses
import importlib.util
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from checkpoint.resume import check_same_run
from config.cli import DEMO_PRESET, EXAMPLES, build_parser, parse_arguments, parse_run
from config.schema import RunConfig
from config.validate import resolve
from model.config import GPTConfig
from runtime.distributed import Launch, read_launch
from tests.flags import flatten, resolve_config, resolved
from utils.errors import HelpFormatter, UserError

REFUSALS = [
    (["--cp-sise", "2"], 1, ["unknown flag --cp-sise", "--cp-size"]),
    (["--skip-steps", "1-99999999999"], 1, ["--skip-steps 1-99999999999", "--train-iters 200"]),
    (["--skip-steps", "200"], 1, ["--skip-steps 200", "--train-iters 200"]),
    (["--cp-size", "two"], 1, ["--cp-size", "two"]),
    (["--cp-backend", "magic"], 1, ["--cp-backend", "magic", "native"]),
    (["--cp-size", "3"], 4, ["4 ranks", "3", "--nproc-per-node 3"]),
    (["--dp-shard-size", "2", "--cp-size", "2"], 8, ["ask for 4 ranks", "there are 8", "--nproc-per-node 4"]),
    (["--cp-size", "0"], 1, ["--cp-size 0", "at least 1"]),
    (["--dp-shard-size", "0"], 1, ["--dp-shard-size 0"]),
    (["--tp-size", "8"], 8, ["--tp-size 8", "--num-query-groups 2", "--num-attention-heads 4", "4, 2 or 1"]),
    (
        shlex.split("--tp-size 3 --num-attention-heads 6 --num-query-groups 1 --kv-channels 40"),
        3,
        ["--tp-size 3", "80 key and value channels", "use --tp-size 1"],
    ),
    (["--tp-size", "2", "--ffn-hidden-size", "49"], 2, ["--ffn-hidden-size 49", "--tp-size 2", "48"]),
    (
        ["--tp-size", "2", "--make-vocab-size-divisible-by", "7"],
        2,
        ["--make-vocab-size-divisible-by 7", "--tp-size 2", "8"],
    ),
    (["--tp-size", "2", "--cp-size", "4", "--cp-comm-type", "a2a"], 8, ["--cp-size 4", "2 query heads", "2 or 1"]),
    (["--pp-size", "2", "--global-batch-size", "2", "--pad-rows", "dynamic"], 2, ["--pad-rows dynamic", "--pp-size"]),
    (["--pp-size", "4", "--num-layers", "3", "--global-batch-size", "4"], 4, ["--num-layers 3", "4 stages"]),
    (["--pp-size", "2", "--first-stage-layers", "6", "--global-batch-size", "2"], 2, ["--num-layers 6", "2 stages"]),
    (["--first-stage-layers", "2"], 1, ["--first-stage-layers 2", "--pp-size"]),
    (
        ["--pp-size", "2", "--virtual-stages", "2", "--global-batch-size", "2"],
        2,
        ["--pp-schedule 1f1b", "--virtual-stages 2"],
    ),
    (["--virtual-stages", "2"], 1, ["--virtual-stages 2", "--pp-size"]),
    (["--sequence-parallel"], 1, ["--sequence-parallel", "--tp-size"]),
    (["--tp-size", "2", "--seq-length", "2050", "--cp-size", "2"], 4, ["--seq-length 2050", "4", "2048"]),
    (["--seq-length", "2050", "--cp-size", "4"], 4, ["--seq-length 2050", "8", "2048"]),
    (["--document-alignment", "12", "--cp-size", "4"], 4, ["--document-alignment 12", "8"]),
    (["--document-alignment", "24", "--seq-length", "2048"], 1, ["--seq-length 2048", "24", "2040"]),
    (
        ["--num-attention-heads", "6", "--num-query-groups", "4"],
        1,
        ["--num-attention-heads 6", "--num-query-groups 4", "3"],
    ),
    (
        ["--hidden-size", "250", "--num-attention-heads", "8", "--num-query-groups", "8"],
        1,
        ["--hidden-size 250", "8", "256"],
    ),
    (["--kv-channels", "31"], 1, ["--kv-channels 31", "even", "32"]),
    (["--rampup-batch-size", "2", "3"], 1, ["--rampup-batch-size 2 3", "START INCREMENT SAMPLES"]),
    (["--rampup-batch-size", "2", "3", "9", "--global-batch-size", "6"], 1, ["--rampup-batch-size 2 3 9", "6"]),
    (
        ["--rampup-batch-size", "0", "3", "9", "--global-batch-size", "6"],
        1,
        ["--rampup-batch-size 0 3 9", "at least 1"],
    ),
    (["--train-tokens", "4096", "--lr-warmup-iters", "2"], 1, ["--lr-warmup-iters", "give --lr-warmup-tokens"]),
    (["--lr-decay-tokens", "2"], 1, ["--lr-decay-tokens", "give --lr-decay-iters"]),
    (["--train-tokens", "4096", "--train-iters", "7"], 1, ["--train-iters 7", "--train-tokens"]),
    (["--data-path", "no/such"], 1, ["--data-path no/such"]),
    (["--tokenizer-model", "no/such"], 1, ["--tokenizer-model no/such", "no such file"]),
    (["--tokenizer-type", "byte", "--tokenizer-model", "x"], 1, ["--tokenizer-model x", "byte"]),
    (["--data-split", "1,2"], 1, ["--data-split 1,2"]),
    (["--data-split", "0,1,0"], 1, ["--data-split 0,1,0"]),
    (["--data-split", "1,0,0"], 1, ["--data-split 1,0,0", "--eval-interval 0"]),
    (["--packing", "best-fit", "--qkv-format", "bshd"], 1, ["--packing best-fit", "bshd", "concat or greedy"]),
    (["--device", "cuda"], 1, ["--device cuda"]),
    (["--lr", "nan"], 1, ["--lr nan"]),
    (["--lr", "inf"], 1, ["--lr inf"]),
    (["--min-lr", "1", "--lr", "0.1"], 1, ["--min-lr 1", "--lr 0.1"]),
    (["--adam-beta2", "1"], 1, ["--adam-beta2 1"]),
    (["--train-iters", "0"], 1, ["--train-iters 0"]),
    (["--clip-grad", "-1"], 1, ["--clip-grad -1"]),
    (["--rotary-base", "0"], 1, ["--rotary-base 0"]),
    (["--resume"], 1, ["--resume", "--run-dir"]),
    (["--transformer-impl", "te"], 1, ["--transformer-impl te", "cuda", "--transformer-impl torch"]),
    (["--cp-backend", "te"], 1, ["--cp-backend te", "cuda"]),
    (["--fp8", "delayed"], 1, ["--fp8 delayed", "--transformer-impl te", "torch"]),
    (["--fp8-first-last-bf16"], 1, ["--fp8-first-last-bf16", "--fp8"]),
    (["--load-weights-only"], 1, ["--load-weights-only", "--load"]),
    (["--load-fallback"], 1, ["--load-fallback", "--load or --resume"]),
    (
        ["--attention-dropout", "0.1", "--cp-backend", "pytorch", "--qkv-format", "bshd"],
        1,
        ["--attention-dropout 0.1", "pytorch", "native"],
    ),
    (
        ["--attention-dropout", "0.1", "--cp-backend", "ring", "--dtype", "bf16", "--cp-size", "2"],
        2,
        ["--attention-dropout 0.1", "ring", "native"],
    ),
    (["--attention-dropout", "1"], 1, ["--attention-dropout 1", "below 1"]),
    (["--hidden-dropout", "nan"], 1, ["--hidden-dropout nan"]),
    (["--rope-scaling", "yarn"], 1, ["--rope-scaling", "yarn", "linear"]),
    (["--rope-scaling-factor", "0"], 1, ["--rope-scaling-factor 0"]),
    (["--config", "no/such.yaml"], 1, ["--config no/such.yaml"]),
    (["--log-interval", "0"], 1, ["--log-interval 0"]),
    (["--cp-backend", "pytorch"], 1, ["--qkv-format thd", "pytorch", "bshd"]),
    (["--cp-backend", "ring"], 1, ["--dtype fp32", "ring", "bf16"]),
    (["--cp-backend", "ring", "--dtype", "bf16"], 1, ["--cp-size 2 or more", "not 1"]),
    (["--cp-backend", "ring", "--ring-attn-func", "stripe"], 1, ["--qkv-format thd", "stripe", "bshd"]),
    (
        ["--cp-backend", "ring", "--ring-attn-func", "llama3", "--qkv-format", "bshd"],
        1,
        ["--qkv-format bshd", "llama3", "thd"],
    ),
    (["--ring-attn-func", "zigzag"], 1, ["--ring-attn-func zigzag", "ring", "native"]),
    (["--cp-backend", "ring", "--cp-comm-type", "a2a"], 1, ["--cp-comm-type a2a", "native", "ring"]),
    (["--cp-layout", "striped"], 1, ["--cp-layout striped", "zigzag"]),
    (
        ["--cp-comm-type", "a2a", "--cp-size", "3", "--seq-length", "1536"],
        3,
        ["--cp-size 3", "4 query heads", "use --cp-size 1"],
    ),
    (["--cp-comm-type", "a2a+p2p", "--cp-size", "4"], 4, ["--cp-a2a-size", "4"]),
    (
        ["--cp-comm-type", "a2a+p2p", "--cp-size", "4", "--cp-a2a-size", "3"],
        4,
        ["--cp-a2a-size 3", "--cp-size 4", "4, 2 or 1"],
    ),
    (["--cp-a2a-size", "2"], 1, ["--cp-a2a-size 2", "a2a+p2p"]),
    (["--heads-k-stride", "2", "--cp-comm-type", "p2p"], 1, ["--heads-k-stride 2", "p2p"]),
    (
        ["--cp-comm-type", "all_gather", "--heads-k-stride", "3"],
        1,
        ["--heads-k-stride 3", "2 key/value heads", "2 or 1"],
    ),
    (["--verify-steps", "-1"], 1, ["--verify-steps -1"]),
    (["--lr-warmup-iters", "30", "--lr-decay-iters", "30"], 1, ["--lr-warmup-iters 30", "--lr-decay-iters 30", "29"]),
    (["--run-dir", "README.md/x"], 1, ["--run-dir README.md/x", "not a folder"]),
    (["--save", "README.md"], 1, ["--save README.md", "not a folder"]),
    (["--data-cache-path", "README.md/x"], 1, ["--data-cache-path README.md/x", "not a folder"]),
    (["--metrics-file", "docs"], 1, ["--metrics-file docs", "is a folder"]),
]


@pytest.mark.parametrize(
    ("flags", "world", "words"), REFUSALS, ids=lambda x: " ".join(x) if isinstance(x, list) else str(x)
)
def test_refusals(flags: list[str], world: int, words: list[str]) -> None:
    with pytest.raises(ValueError) as refused:
        resolved(*flags, world=world)
    message = str(refused.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_more_ranks_than_devices() -> None:
    with pytest.raises(ValueError, match="4 ranks on this node but 2 CUDA devices: use torchrun --nproc-per-node 2"):
        resolved(world=4, cuda=2)
    assert resolved("--device", "cpu", "--cp-size", "4", world=4, cuda=2).device == "cpu"


def test_cuda_dtypes_and_heads() -> None:
    with pytest.raises(ValueError, match=r"--dtype fp32.*bf16"):
        resolved("--dtype", "fp32", cuda=1)
    with pytest.raises(ValueError, match=r"--kv-channels 12.*multiples of 8"):
        resolved("--kv-channels", "12", cuda=1)
    assert resolved("--kv-channels", "12").kv_channels == 12


def test_a_missing_package_is_said_with_a_way_out(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match=r"--tokenizer-type sentencepiece needs .*pip install"):
        resolved()
    byte = ["--tokenizer-type", "byte"]
    resolved(*byte)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--tensorboard-dir needs the tensorboard package: pip install"):
        resolved(*byte)
    resolved(*byte, "--tensorboard-dir", "none")
    with pytest.raises(ValueError, match=r"--wandb-project copies .*--tensorboard-dir none"):
        resolved(*byte, "--tensorboard-dir", "none", "--wandb-project", "p")
    with pytest.raises(ValueError, match="--cp-backend ring needs the package ring-flash-attn"):
        resolved(*byte, "--cp-backend", "ring", "--dtype", "bf16", "--cp-size", "2", world=2)


TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node",
    "MASTER_PORT": "1",
}


def test_what_the_environment_says(monkeypatch) -> None:
    for name in (*TORCHRUN, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "left-over")  # by itself it starts nothing
    assert read_launch() == Launch()
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(ValueError, match="8 copies without torchrun"):
        read_launch()
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert read_launch() == Launch(rank=3, local_rank=1, world_size=4, local_world_size=2, under_torchrun=True)
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(ValueError, match="RANK but not MASTER_PORT"):
        read_launch()


def test_auto_says_what_it_chose() -> None:
    config = parse_arguments(["--cp-size", "2", "--global-batch-size", "4"])
    chosen = resolve(config, world_size=8, local_world_size=4, cuda_devices=lambda: 0)
    for words in ("--device cpu", "--dtype fp32", "--dp-shard-size 4", "--cp-backend native", "--document-alignment 4",
                  "--packing best-fit", "--reshard-after-forward off ("):  # fmt: skip
        assert any(words in line for line in chosen), (words, chosen)


LARGE = ["--hidden-size", "4096", "--num-layers", "32", "--num-attention-heads", "32", "--num-query-groups", "8"]


@pytest.mark.parametrize(
    "words, value, reason",
    [
        ([], "off", "0.00823 GiB of gathered weights a rank"),
        (LARGE, "on", "10.5 GiB of gathered weights a rank, above 8 GiB"),
        ([*LARGE, "--tp-size", "2"], "off", "5.25 GiB of gathered weights a rank"),
        ([*LARGE, "--pp-size", "2", "--tp-size", "2"], "off", "--pp-size above 1: weights are gathered once a step"),
        ([*LARGE, "--dp-replicate-size", "8"], "off", "no weight is sharded"),
        ([*LARGE, "--reshard-after-forward", "off"], "off", ""),
    ],
)
def test_resharding_is_chosen_by_pipeline_and_memory(words: list[str], value: str, reason: str) -> None:
    config = parse_arguments([*words, "--device", "cuda", "--transformer-impl", "torch"])
    chosen = resolve(config, world_size=8, local_world_size=4, cuda_devices=lambda: 4)
    assert config.parallel.reshard_after_forward == value
    said = [line for line in chosen if line.startswith("--reshard-after-forward")]
    assert said == ([f"--reshard-after-forward {value} ({reason})"] if reason else [])


@pytest.mark.parametrize("second", [["--data-path", "c"], ["--data-path=c"]])
def test_a_list_that_is_given_twice_is_refused(tmp_path: Path, second: list[str]) -> None:
    """argparse keeps the last one: half of the data would be missing."""
    with pytest.raises(UserError, match="--data-path is given 2 times; give it once, with all its values"):
        parse_arguments(["--data-path", "a", "b", "--seq-length", "64", *second])
    preset = tmp_path / "p.yaml"
    preset.write_text("data-path: [a, b]\n")
    assert parse_arguments(["--config", str(preset), *second]).data.data_path == ["c"]  # the command line wins


@pytest.mark.parametrize(
    "flags", ["", "--cp-size 4 --hidden-size 64", "--sample-tokens 0", "--dp-shard-size 4", "--train-tokens 99999"]
)
def test_the_default_run_has_a_preset(flags: str) -> None:
    config, notes = parse_run(flags.split())
    assert notes == ["--config configs/standard_library.yaml"] and config.training.optimizer == "muon"
    assert config.model.hidden_size == (64 if "64" in flags else config.model.hidden_size)
    resolve(config, world_size=4, local_world_size=4, cuda_devices=lambda: 0)


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("preset", ["standard_library", "half_hour"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_make_train_takes_any_number_of_ranks(ranks: int, preset: str, cuda: bool) -> None:
    config, _ = parse_run(["--cp-size", str(ranks), "--config", str(DEMO_PRESET.with_stem(preset))])
    resolve(config, world_size=ranks, local_world_size=ranks, cuda_devices=lambda: ranks if cuda else 0)


@pytest.mark.parametrize(
    "flags", ["--data-path a", "--eval-only --valid-data-path a", "--config {preset}", "--config={preset}"]
)
def test_other_runs_keep_the_flags_defaults(tmp_path: Path, flags: str) -> None:
    preset = tmp_path / "p.yaml"
    preset.write_text("hidden-size: 128\n")
    argv = flags.format(preset=preset).split()
    assert parse_run(argv) == (parse_arguments(argv), [])
    assert parse_run(argv)[0].training.optimizer == "adamw"


def test_presets(tmp_path: Path) -> None:
    preset = tmp_path / "p.yaml"
    preset.write_text("hidden-size: 128\nqk_norm: true\ntie-embeddings: false\nlr: 1.0e-3\nseq-length: 512\n")
    args = flatten(parse_arguments(["--seq-length", "1024", "--config", str(preset)]))
    assert (args.hidden_size, args.qk_norm, args.tie_embeddings, args.lr, args.seq_length) == (
        128,
        True,
        False,
        1e-3,
        1024,
    )
    for text, words in (
        ("hiden-size: 3", "unknown key 'hiden-size'; did you mean --hidden-size?"),
        ("qk-norm: 3", "qk-norm must be true or false"),
        ("hidden-size: [1]", "hidden-size must be one value"),
        ("hidden-size: many", "--hidden-size"),
        ("- a", "mapping"),
        ("a: [", "not YAML"),
    ):
        preset.write_text(text)
        with pytest.raises(ValueError) as refused:
            parse_arguments(["--config", str(preset)])
        assert words in str(refused.value) and "\n" not in str(refused.value)


def test_flags_that_the_issue_names_exist() -> None:
    wanted = """
        pp-size dp-replicate-size dp-shard-size cp-size tp-size sequence-parallel cp-backend cp-comm-type
        qkv-format packing document-alignment num-layers hidden-size ffn-hidden-size num-attention-heads
        num-query-groups kv-channels seq-length micro-batch-size global-batch-size train-iters seed dtype save
        load save-interval eval-interval eval-iters log-interval tensorboard-dir metrics-file data-path
        data-cache-path tokenizer-type tokenizer-model num-workers device transformer-impl ring-attn-func
        heads-k-stride cp-rotate-method cp-a2a-size verify-steps pad-rows save-final async-save
        keep-checkpoints load-weights-only load-fallback rope-scaling recompute config resume clip-grad
        lr-decay-style z-loss loss-chunk-size reshard-after-forward peak-tflops
    """
    known = {option for action in build_parser()._actions for option in action.option_strings}
    assert {f"--{name}" for name in wanted.split()} <= known


def test_every_flag_has_help() -> None:
    assert all(action.help for action in build_parser()._actions)


def test_help_fits_eighty_columns_and_breaks_no_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = build_parser().format_help().splitlines()
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if line.endswith("-")] == []
    assert "  --distributed-startup-timeout-minutes X" in lines and "  --virtual-stages N    pipeline" in "\n".join(
        lines
    )


@pytest.mark.parametrize("group", [group.name for group in dataclasses.fields(RunConfig)])
def test_each_group_of_help_has_an_example_that_parses(group: str) -> None:
    assert f"\n  {EXAMPLES[group]}\n" in build_parser().format_help()
    parse_arguments(EXAMPLES[group].partition("train.py")[2].split())


def test_help_fills_paragraphs_and_keeps_indented_ones() -> None:
    text = HelpFormatter("x", width=30)._fill_text(
        "one two three four five six --seven-eight\n\nsay:\n    a  b", 30, ""
    )
    assert text == "one two three four five six\n--seven-eight\n\nsay:\n    a  b"


def test_contiguous_takes_documents_of_any_length() -> None:
    args = resolved("--cp-comm-type", "all_gather", "--cp-layout", "contiguous", "--cp-size", "4", world=4)
    assert args.document_alignment == 1


def test_a_run_that_goes_on_keeps_the_checkpoints_alignment() -> None:
    def on(facts: dict, *flags: str, world: int) -> int:
        return resolve_config(*flags, world=world, resumed=facts).data.document_alignment

    facts = {"--document-alignment": 8}
    assert on(facts, "--cp-size", "2", world=2) == on(facts, "--cp-size", "4", world=4) == on(facts, world=1) == 8
    with pytest.raises(ValueError, match=r"--document-alignment 4.*use --document-alignment 8"):
        on(facts, "--document-alignment", "4", "--cp-size", "2", world=2)
    with pytest.raises(ValueError) as refused:
        on(facts, "--cp-size", "8", world=8)
    assert all(w in str(refused.value) for w in ("--cp-size 8", "16", "--document-alignment 8", "contiguous"))
    assert (
        on(
            facts,
            *shlex.split("--cp-size 8 --num-query-groups 4 --cp-comm-type all_gather --cp-layout contiguous"),
            world=8,
        )
        == 8
    )


def test_a_final_checkpoint_is_the_default_unless_there_are_none() -> None:
    for flags, wanted in (
        ([], True),
        (["--save-interval", "0"], False),
        (["--save-interval", "0", "--save-final"], True),
    ):
        assert resolved(*flags).save_final is wanted
    assert resolved("--no-save-final").save_final is False


def test_a_scaling_that_is_off_leaves_no_trace_in_the_model() -> None:
    def architecture(*flags: str) -> GPTConfig:
        return resolve_config(*flags).model.architecture(vocab_size=10)

    assert architecture("--rope-scaling-factor", "3") == architecture()
    assert architecture("--rope-scaling", "linear", "--rope-scaling-factor", "3").rope_scaling_factor == 3
    assert architecture("--rope-scaling", "llama3").rope_original_seq_length == 8192


def test_the_default_batch_is_the_smallest_that_the_layout_can_work_on() -> None:
    """The command of README's layouts runs as it stands; a run that goes on keeps the checkpoint's."""
    for flags, world, wanted in (
        ("--cp-size 4", 4, 1),
        ("--pp-size 2 --tp-size 2 --cp-size 2", 8, 2),
        ("--pp-size 2 --cp-size 2", 8, 4),
        ("", 4, 4),
        ("--micro-batch-size 3 --pp-size 2", 4, 12),
    ):
        assert resolved(*flags.split(), world=world).global_batch_size == wanted
    assert resolve_config(world=2, resumed={"--global-batch-size": 6}).training.global_batch_size == 6


def test_transformer_engine_is_the_default_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, in bf16, installed; what is asked for and not there is refused with the line that installs it."""
    real = importlib.util.find_spec

    def resolve_on(installed: bool, *flags: str) -> SimpleNamespace:
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name: (object() if installed else None) if "transformer" in name else real(name),
        )
        return resolved(*flags, cuda=1)

    args = resolve_on(True)
    assert (args.transformer_impl, args.cp_backend, args.attention.backend, args.cp_comm_type) == (
        "te",
        "te",
        "te",
        "p2p",
    )
    args = resolve_on(False)
    assert (args.transformer_impl, args.cp_backend) == ("torch", "native")
    assert resolve_on(True, "--transformer-impl", "torch").cp_backend == "native"
    assert resolve_on(True, "--cp-backend", "native").transformer_impl == "te"
    assert resolve_on(True, "--device", "cpu").transformer_impl == "torch"
    for flags in (["--transformer-impl", "te"], ["--cp-backend", "te"]):
        with pytest.raises(ValueError, match=r"requirements-gpu\.txt"):
            resolve_on(False, *flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", []),
        ("--fp8-first-last-bf16", []),
        ("--recompute full", ["--fp8 delayed", "--recompute full", "--fp8 current"]),
        ("--pad-rows dynamic", ["--pad-rows dynamic", "16"]),
        ("--ffn-hidden-size 680", ["--ffn-hidden-size 680", "16", "use --ffn-hidden-size 688 or 672"]),
        ("--kv-channels 6 --hidden-size 256", ["query channels", "24", "16"]),
        ("--seq-length 2056", ["--seq-length 2056", "16", "use --seq-length 2064 or 2048"]),
        ("--compile", ["--compile", "--transformer-impl torch"]),
        ("--dtype fp32", ["--fp8 delayed", "--transformer-impl te"]),
    ],
)
def test_what_8_bits_need(monkeypatch: pytest.MonkeyPatch, flags: str, words: list[str]) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name == "transformer_engine" else real(name)
    )
    if not words:
        assert resolved("--fp8", "delayed", *shlex.split(flags), cuda=1).fp8 == "delayed"
        return
    with pytest.raises(ValueError) as refusal:
        resolved("--fp8", "delayed", *shlex.split(flags), cuda=1)
    assert all(word in str(refusal.value) for word in words) and "\n" not in str(refusal.value)


def test_the_last_of_several_presets_wins_and_the_command_line_over_all(tmp_path: Path) -> None:
    for name, text in (("a", "num-layers: 3\nlr: 1\nseed: 5\n"), ("b", "lr: 2\nseed: 6\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
    config = parse_arguments(["--config", str(tmp_path / "a.yaml"), "--seed", "7", f"--config={tmp_path / 'b.yaml'}"])
    assert (config.model.num_layers, config.training.lr, config.training.seed) == (3, 2.0, 7)


def test_a_vocabulary_of_the_model_is_kept_on_resume() -> None:
    byte = ["--tokenizer-type", "byte"]
    architecture = dataclasses.asdict(resolve_config(*byte, "--vocab-size", "300").model.architecture(257))
    saved = {f"model {name}": value for name, value in architecture.items()}
    assert resolve_config(*byte, resumed=saved).model.architecture(257).vocab_size == 300
    with pytest.raises(
        ValueError, match=r"--vocab-size 301: the checkpoint was made with other values.*--vocab-size 300"
    ):
        resolve_config(*byte, "--vocab-size", "301", resumed=saved)


def test_a_vocabulary_below_that_of_a_tokenizer_that_would_be_trained() -> None:
    with pytest.raises(UserError, match=r"--vocab-size 512: no --tokenizer-model is given, so .* of .* 4096 tokens"):
        resolve_config("--vocab-size", "512")
    assert resolve_config("--vocab-size", "512", "--tokenizer-vocab-size", "512").model.vocab_size == 512


def test_another_tokenizer_than_the_checkpoints_that_was_trained() -> None:
    saved, wanted = {"tokenizer": "a"}, {"tokenizer": "b"}
    with pytest.raises(UserError, match="c was made with a; no --tokenizer-model is given, so one was trained on"):
        check_same_run(saved, wanted, (), Path("c"), is_tokenizer_trained=True)
    with pytest.raises(UserError, match=r"c was made with a$"):
        check_same_run(saved, wanted, (), Path("c"))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--keep-every", "5"], "--keep-every 5 needs --keep-checkpoints"),
        (
            ["--local-save-interval", "5", "--local-save-dir", "copies"],
            "--local-save-dir copies: must be an absolute path",
        ),
    ],
)
def test_flags_that_would_do_nothing_or_depend_on_the_working_folder(words: list[str], why: str) -> None:
    with pytest.raises(UserError, match=why):
        resolve(parse_arguments(words), world_size=1, local_world_size=1, cuda_devices=lambda: 0)


@pytest.mark.parametrize("words", [["--local-save-interval", "5"], ["--local-save-dir", "/dev/shm/copies"]])
def test_local_copies_need_an_interval_and_a_folder(words: list[str]) -> None:
    with pytest.raises(UserError, match=r"--local-save-interval . and --local-save-dir .*: give both, or neither"):
        resolve(parse_arguments(words), world_size=1, local_world_size=1, cuda_devices=lambda: 0)
