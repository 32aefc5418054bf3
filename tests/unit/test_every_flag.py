"""Rules that hold for every flag, also the next one: numbers out of range, advice that works, presets that can be
overruled.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from config.cli import build_parser, parse_arguments
from config.schema import fields_of_flags, parse_split
from config.validate import resolve
from cp.layout import LAYOUTS
from model.config import GPTConfig
from tests.flags import flatten, resolve_config, resolved

ACTIONS = [action for action in build_parser()._actions if action.dest not in ("help", "config")]
NUMBERS = [action.option_strings[0] for action in ACTIONS if action.type in (int, float)]
SWITCHES = [action.option_strings[0] for action in ACTIONS if action.nargs == 0]
# Flags for which 0 means something (off, none, the first); for any other number it is refused.
ZERO_IS_LEGAL = {
    "--num-workers",
    "--seed",
    "--z-loss",
    "--min-lr",
    "--lr-warmup-iters",
    "--lr-wsd-decay-iters",
    "--weight-decay",
    "--adam-beta1",
    "--adam-beta2",
    "--clip-grad",
    "--eval-interval",
    "--save-interval",
    "--verify-steps",
    "--sample-tokens",
    "--keep-checkpoints",
    "--keep-every",
    "--hidden-dropout",
    "--attention-dropout",
    "--check-weights-interval",
    "--sample-interval",
    "--max-skipped-in-a-row",
    "--gc-interval",
    "--local-save-interval",
    "--timing-log-level",
}


def refusal(*flags: str, world: int = 1, local: int | None = None) -> str | None:
    """What a run with these flags is told, or None where it may start."""
    try:
        resolved(*flags, world=world, local=local)
    except ValueError as error:
        assert "\n" not in str(error)
        return str(error)
    return None


# ---------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("flag", NUMBERS)
def test_numbers_that_mean_nothing_are_refused_by_flag(flag: str) -> None:
    is_float = next(a.type for a in ACTIONS if a.option_strings[0] == flag) is float
    bad = ["-2", "-7", *(["nan", "inf", "-inf", "1e999"] if is_float else ["1.5", "1e3", "many"])]
    if flag not in ZERO_IS_LEGAL:
        bad.append("0")
    for value in bad:
        # A rate of 0 is legal by itself; beside the default --min-lr it is not.
        message = refusal(f"{flag}={value}")
        assert message is not None and flag in message, (flag, value, message)


@pytest.mark.parametrize("flag", sorted(ZERO_IS_LEGAL))
def test_zero_turns_off(flag: str) -> None:
    assert refusal(f"{flag}=0") is None


# ---------------------------------------------------------------------------------------------------
# Advice. Whoever follows the line must get past it.


def advice(message: str) -> int:
    """The first value that is advised: the nearest."""
    found = re.search(r": use --[\w-]+ (\d+)", message)
    assert found is not None, message
    return int(found[1])


@given(
    seq_length=st.integers(1, 300),
    cp_size=st.integers(1, 8),
    multiple=st.integers(1, 5),
    layout=st.sampled_from(["zigzag", "contiguous"]),
)
@settings(max_examples=200, deadline=None)
def test_the_sequence_length_that_is_advised_is_legal_and_near(
    seq_length: int, cp_size: int, multiple: int, layout: str
) -> None:
    alignment = multiple * (2 * cp_size if layout == "zigzag" else 1)
    flags = [
        "--cp-comm-type",
        "all_gather",
        "--cp-layout",
        layout,
        "--cp-size",
        str(cp_size),
        "--document-alignment",
        str(alignment),
    ]
    message = refusal(*flags, "--seq-length", str(seq_length), world=cp_size)
    legal = [n for n in range(1, 700) if n % alignment == 0 and n % cp_size == 0]
    if seq_length in legal:
        assert message is None
        return
    assert message is not None and f"--seq-length {seq_length}" in message
    advised = advice(message)
    assert advised in legal, message
    assert abs(advised - seq_length) == min(abs(n - seq_length) for n in legal), message


@given(st.integers(1, 100), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_the_alignment_that_is_advised_is_legal_and_near(alignment: int, cp_size: int) -> None:
    message = refusal("--document-alignment", str(alignment), "--cp-size", str(cp_size), world=cp_size)
    if cp_size == 1 or alignment % (2 * cp_size) == 0:  # one rank cuts nothing
        assert message is None or "--seq-length" in message
        return
    assert message is not None and f"--document-alignment {alignment}" in message
    assert (
        refusal("--document-alignment", str(advice(message)), "--cp-size", str(cp_size), world=cp_size) is None
        and abs(advice(message) - alignment) <= 2 * cp_size
    ) or "--seq-length" in message


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_any_batch_goes_on_any_ranks(batch: int, micro: int, shards: int, replicas: int) -> None:
    flags = ["--micro-batch-size", str(micro), "--dp-replicate-size", str(replicas)]
    config = resolve_config(*flags, "--global-batch-size", str(batch), world=shards * replicas)
    unit = micro * shards * replicas
    assert 0 <= config.num_microbatches * unit - batch < unit


@given(st.integers(1, 32), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_the_query_groups_that_are_advised_are_legal_and_near(heads: int, groups: int) -> None:
    flags = ["--num-attention-heads", str(heads), "--kv-channels", "8"]
    message = refusal(*flags, "--num-query-groups", str(groups))
    if heads % groups == 0:
        assert message is None
        return
    assert (
        message is not None
        and f"--num-attention-heads {heads}" in message
        and f"--num-query-groups {groups}" in message
    )
    assert abs(advice(message) - groups) == min(abs(g - groups) for g in range(1, heads + 1) if heads % g == 0)
    assert refusal(*flags, "--num-query-groups", str(advice(message))) is None


@given(st.integers(1, 200), st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_the_hidden_size_that_is_advised_is_legal_and_near(hidden: int, heads: int) -> None:
    """Legal is what gives heads of an even number of channels."""
    flags = ["--num-attention-heads", str(heads), "--num-query-groups", "1"]
    message = refusal(*flags, "--hidden-size", str(hidden))
    if hidden % (2 * heads) == 0:
        assert message is None
        return
    assert message is not None and ("--hidden-size" in message or "--kv-channels" in message)
    if hidden % heads:
        assert refusal(*flags, "--hidden-size", str(advice(message))) is None, message
        assert abs(advice(message) - hidden) == min(abs(n - hidden) for n in range(2 * heads, 400, 2 * heads)), message


def test_an_odd_head_is_refused_with_an_even_one() -> None:
    assert advice(refusal("--kv-channels", "33") or "") == 34


@given(st.integers(1, 64), st.integers(1, 9), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_the_number_of_ranks_that_is_advised_starts(world: int, cp_size: int, replicas: int) -> None:
    flags = ["--cp-size", str(cp_size), "--dp-replicate-size", str(replicas), "--seq-length", "2520"]
    assume(2520 % (2 * cp_size) == 0)
    unit = cp_size * replicas

    def told(ranks: int) -> str | None:
        return refusal(*flags, world=ranks)

    message = told(world)
    if world % unit == 0:
        assert message is None
        return
    assert message is not None and str(world) in message and str(unit) in message
    advised = int(re.search(r"--nproc-per-node (\d+)", message)[1])  # type: ignore[index]
    assert told(advised) is None
    assert abs(advised - world) == min(abs(n - world) for n in range(unit, 200, unit))


def test_advice_for_several_nodes_counts_ranks_of_a_node() -> None:
    """Two nodes of 8: the flag of torchrun is per node, and its value times the nodes must be legal."""
    for flags, total in ((["--dp-shard-size", "1", "--cp-size", "4"], 4), (["--cp-size", "6"], 18)):
        message = refusal(*flags, "--seq-length", "2520", "--document-alignment", "24", world=16, local=8)
        assert message is not None
        per_node = re.search(r"--nproc-per-node (\d+)", message)
        assert per_node is None or 2 * int(per_node[1]) == total, message


def test_more_ranks_than_devices_says_how_many_there_are() -> None:
    with pytest.raises(ValueError, match=r"8 ranks on this node but 4 CUDA devices.*--nproc-per-node 4"):
        resolved(world=16, local=8, cuda=4)
    assert resolved("--global-batch-size", "16", world=16, local=8, cuda=8).device == "cuda"


# ---------------------------------------------------------------------------------------------------
# What open defaults become


def test_open_defaults() -> None:
    args = resolved(
        "--hidden-size", "768", "--num-attention-heads", "12", "--num-query-groups", "4", "--train-iters", "350"
    )
    assert (args.kv_channels, args.ffn_hidden_size) == (64, 2048)
    assert resolved("--hidden-size", "104").ffn_hidden_size == 288  # 277.3 up to a multiple of 16
    assert (args.lr_decay_iters, args.lr_wsd_decay_iters) == (350, 35)
    assert resolved("--train-iters", "5").lr_wsd_decay_iters == 1
    assert (args.num_workers, resolved(cuda=1).num_workers) == (0, 2)
    assert resolved("--num-workers", "3").num_workers == 3 and resolved("--ffn-hidden-size", "40").ffn_hidden_size == 40
    assert (args.cp_comm_type, args.cp_layout, args.packing, args.document_alignment) == (
        "p2p",
        "zigzag",
        "best-fit",
        2,
    )
    assert resolved("--qkv-format", "bshd").packing == "concat"
    assert resolved("--cp-size", "2", "--global-batch-size", "4", world=8).dp_shard_size == 4


@pytest.mark.parametrize("world", [1, 4])
def test_nothing_is_left_on_auto(world: int) -> None:
    config = parse_arguments(["--cp-size", str(world)])
    before = config.flags()
    chosen = " ".join(resolve(config, world_size=world, local_world_size=world, cuda_devices=lambda: 0))
    args = flatten(config)
    for name, value in vars(args).items():
        assert value != "auto", name
        if before.get(name) == "auto":  # said in the banner
            assert f"--{name.replace('_', '-')} {value}" in chosen
    for name in ("cp_comm_type", "document_alignment", "num_workers"):
        assert f"--{name.replace('_', '-')} {getattr(args, name)}" in chosen


def test_equal_limits_are_legal() -> None:
    assert refusal("--lr", "1e-4", "--min-lr", "1e-4") is None
    assert refusal("--lr-decay-iters", "10", "--lr-wsd-decay-iters", "10") is None
    message = refusal("--lr-decay-iters", "10", "--lr-wsd-decay-iters", "11")
    assert message is not None and "--lr-wsd-decay-iters 11" in message and "--lr-decay-iters 10" in message


def test_either_folder_is_enough_to_resume() -> None:
    assert refusal("--resume", "--save", "somewhere") is None
    assert refusal("--resume", "--run-dir", "somewhere") is None


def test_a_tokenizer_file_is_opened_before_any_rank_starts(tmp_path: Path) -> None:
    (tmp_path / "m.model").write_bytes(b"no model")
    message = refusal("--tokenizer-model", str(tmp_path / "m.model"))
    assert message is not None and "--tokenizer-model" in message and "not a SentencePiece model" in message


@pytest.mark.parametrize("text", ["", "95", "95,5", "95,5,0,0", "a,b,c", "-1,1,1", "nan,1,1", "1,inf,0", "0,1,1"])
def test_splits_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="--data-split"):
        parse_split(text)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_offered_where_some_method_takes_them(layout: str) -> None:
    action = next(a for a in ACTIONS if a.dest == "cp_layout")
    assert layout in action.choices


# ---------------------------------------------------------------------------------------------------
# Misspelt words and presets


@pytest.mark.parametrize("action", ACTIONS, ids=lambda a: a.dest)
def test_a_slip_of_the_finger_finds_its_flag(action: argparse.Action) -> None:
    flag = action.option_strings[0]
    slip = flag[:-2] + flag[-1] + flag[-2] + "x"
    message = refusal(*([slip] if action.nargs == 0 else [slip, "1"]))
    assert message is not None and message.startswith(f"unknown flag {slip}")
    # --save and --seed are too short to be guessed for sure; any flag that exists will do there.
    suggested = re.search(r"did you mean (--[\w-]+)\?", message)
    if len(flag) > 8:
        assert suggested is not None and suggested[1] in [a.option_strings[0] for a in ACTIONS]


def test_a_flag_is_written_out() -> None:
    """The beginning of a flag is no flag: a later flag with the same beginning would change its meaning."""
    for flag in ("--hidden", "--cp", "--train", "--conf"):
        message = refusal(flag, "8")
        assert message is not None and message.startswith(f"unknown flag {flag}")


def preset(tmp_path: Path, text: str | bytes) -> list[str]:
    path = tmp_path / "preset.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return ["--config", str(path)]


@pytest.mark.parametrize("action", [a for a in ACTIONS if a.choices], ids=lambda a: a.dest)
def test_a_preset_takes_every_choice_as_it_is_written(action: argparse.Action, tmp_path: Path) -> None:
    """`on` and `off` among them, which YAML reads as true and false."""
    for choice in action.choices or ():
        flags = preset(tmp_path, f"{action.option_strings[0][2:]}: {choice}\n")
        assert parse_arguments(flags).flags()[action.dest] == choice


@pytest.mark.parametrize("action", [a for a in ACTIONS if a.type in (int, float) and not a.nargs], ids=lambda a: a.dest)
def test_the_command_line_wins_over_a_preset_number(action: argparse.Action, tmp_path: Path) -> None:
    flag = action.option_strings[0]
    flags = preset(tmp_path, f"{flag[2:].replace('-', '_')}: 3\n")
    assert parse_arguments(flags).flags()[action.dest] == 3
    assert parse_arguments([flag, "5", *flags]).flags()[action.dest] == 5
    assert parse_arguments([*flags, f"{flag}=5"]).flags()[action.dest] == 5
    for text in ("true", "[3]", "{a: 1}", "many", "", "3 4"):
        message = refusal(*preset(tmp_path, f"{flag[2:]}: {text}\n"))
        assert message is not None and flag[2:] in message, (text, message)


@pytest.mark.parametrize("flag", SWITCHES)
def test_the_command_line_wins_over_a_preset_switch(flag: str, tmp_path: Path) -> None:
    dest = flag[2:].replace("-", "_")
    on, off = preset(tmp_path, f"{flag[2:]}: true\n"), f"--no-{flag[2:]}"
    assert parse_arguments(on).flags()[dest] is True
    assert parse_arguments([off, *on]).flags()[dest] is False


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"lr: \xff\xfe\n", ["--config", "preset.yaml"]),
        ("lr: 0.1\nlr: 0.2\n", ["--config", "lr"]),  # YAML would silently take the second
        ("hidden-size: 128\nhidden_size: 256\n", ["--config", "hidden"]),
        ("config: other.yaml\n", ["--config", "config"]),
        ("help: true\n", ["--config", "help"]),
        ("3: 4\n", ["--config", "3"]),
        ("save: null\n", ["--config", "save"]),
        ("lr: 0.1\n---\nlr: 0.2\n", ["--config"]),
        ("cp-backend: magic\n", ["--cp-backend", "magic"]),
    ],
)
def test_presets_that_cannot_be_meant_are_refused(text: str | bytes, words: list[str], tmp_path: Path) -> None:
    message = refusal(*preset(tmp_path, text))
    assert message is not None and all(word in message for word in words), message


def test_an_empty_preset_changes_nothing(tmp_path: Path) -> None:
    assert parse_arguments(preset(tmp_path, "# nothing\n")) == parse_arguments([])


def test_every_flag_of_the_models_shape_reaches_the_model() -> None:
    """A `model_flag` that `GPTConfig` does not have would neither change the model nor be compared on resume."""
    names = {f.name for f in dataclasses.fields(GPTConfig)}
    elsewhere = {"make_vocab_size_divisible_by": "padded_vocab_size", "init_method_std": "init_std"}
    model_flags = [name for _, name, flag in fields_of_flags() if flag.on_resume == "model"]
    assert model_flags and {elsewhere.get(name, name) for name in model_flags} <= names
