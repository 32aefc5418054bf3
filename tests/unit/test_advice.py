"""Whoever follows a refusal's advice must get past it: every advice is followed, on fresh and on resumed runs."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import config.advice as advice
from checkpoint.resume import FREE_ON_RESUME, check_same_run, run_metadata
from config.schema import RunConfig
from cp.layout import LAYOUTS
from cp.support import BACKENDS, METHOD_FLAGS, methods
from tests.flags import resolve_config
from utils.errors import SizeError, UserError

VOCAB = 257
SAMPLES = SimpleNamespace(fingerprint=lambda: "same", list_rows=lambda _: [["corpus", "same", 1.0]])
FAST = shlex.split("--data-path README.md --tokenizer-type byte")


def metadata_of(config: RunConfig) -> dict[str, Any]:
    """What a checkpoint of this run stores."""
    return run_metadata(config, config.model.architecture(VOCAB), SimpleNamespace(fingerprint="same"), SAMPLES)  # type: ignore[arg-type]


def ways(message: str) -> list[str]:
    """Each way that a refusal advises, as words of a command line."""
    if ": use " not in message:
        return []
    text = re.sub(r" on each of the \d+ nodes$", "", message.rpartition(": use ")[2].replace("torchrun ", ""))
    found: list[str] = []
    for one in re.split(r", or (?=--)", text):
        first, *others = re.split(r", | or ", one)
        flag = first.partition(" ")[0]
        found += [first, *(other if other.startswith("--") else f"{flag} {other}" for other in others)]
    return found


def start(
    flags: list[str], world: int, *, saved: dict[str, Any] | None = None, local: int | None = None, cuda: int = 0
) -> RunConfig:
    """As train.py starts: `resolve`, then the comparison with the checkpoint."""
    config = resolve_config(*FAST, *flags, world=world, resumed=saved, local=local, cuda=cuda)
    if saved:
        check_same_run(saved, metadata_of(config), FREE_ON_RESUME, Path("c"))
    return config


def follow_all(
    flags: list[str], world: int, saved: dict[str, Any] | None = None, *, local: int | None = None, cuda: int = 0
) -> str:
    """Start; where the start is refused, start again in each advised way. Returns the refusal, or nothing."""
    try:
        start(flags, world, saved=saved, local=local, cuda=cuda)
    except UserError as error:
        message = str(error)
    else:
        return ""
    assert "\n" not in message
    for way in ways(message):
        words, ranks, local_now = shlex.split(way), world, local
        if "--nproc-per-node" in words:
            at = words.index("--nproc-per-node")
            ranks = int(words[at + 1])
            del words[at : at + 2]
            if local:
                ranks, local_now = ranks * world // local, ranks
        start([*flags, *words], ranks, saved=saved, local=local_now, cuda=cuda)  # raises what it is refused with
    return message


# ---------------------------------------------------------------------------------------------------
# Resumed runs

THREE_GROUPS = "--hidden-size 72 --num-query-groups 3 --seq-length 384"
SHAPE = shlex.split("--num-layers 4 --hidden-size 48 --num-attention-heads 6 --seq-length 256 --num-query-groups 2")


@pytest.mark.parametrize(
    ("saved_flags", "saved_world", "flags", "world", "words"),
    [
        ("", 1, "--cp-size 3", 3, "--cp-size"),
        # The vocabulary of 257 is padded to 384, a multiple of 3, or to 272, which is none.
        (THREE_GROUPS, 1, f"{THREE_GROUPS} --tp-size 3", 3, "use --make-vocab-size-divisible-by 384"),
        (
            f"{THREE_GROUPS} --make-vocab-size-divisible-by 16",
            1,
            f"{THREE_GROUPS} --make-vocab-size-divisible-by 16 --tp-size 3",
            3,
            "use --tp-size 1",
        ),
        ("--num-layers 4 --global-batch-size 4", 1, "--pp-size 5", 5, "use --pp-size 1"),
        ("", 1, "--cp-size 2", 2, "--cp-comm-type all_gather --cp-layout contiguous"),
        ("--seq-length 128 --seed 3", 1, "", 1, "use --seq-length 128 --seed 3"),
        ("--qkv-format thd --cp-size 2", 2, "--cp-backend pytorch --cp-size 2", 2, "--qkv-format thd is not offered"),
        ("--qk-norm --dtype fp64", 1, "", 1, "--qk-norm"),
        ("--qk-norm", 1, "--no-qk-norm", 1, "use --qk-norm"),
        ("--data-split 90,10,0", 1, "--data-split 95,5,0 --cp-size 2", 2, "--data-split 90,10,0 --cp-"),
        ("", 1, "--rope-scaling llama3", 1, "use --rope-scaling none"),
        ("--dtype bf16", 1, "--dtype fp64", 1, "use --dtype auto"),
    ],
)
def test_a_resumed_run_is_advised_what_its_checkpoint_leaves_free(
    saved_flags: str, saved_world: int, flags: str, world: int, words: str
) -> None:
    saved = metadata_of(start([*SHAPE, *shlex.split(saved_flags)], saved_world))
    message = follow_all([*SHAPE, *shlex.split(flags)], world, saved)
    assert words in message, message
    assert ways(message), message


def test_open_flags_take_the_checkpoints_values() -> None:
    """--ffn-hidden-size depends on --tp-size, --data-split on --valid-data-path, both by default only."""
    flags = [*SHAPE, *shlex.split(THREE_GROUPS), "--make-vocab-size-divisible-by", "48"]
    saved = metadata_of(start([*flags, "--document-alignment", "6"], 1))
    resumed = start([*flags, "--valid-data-path", "README.md", "--tp-size", "3"], 3, saved=saved)
    assert resumed.model.ffn_hidden_size == saved["model ffn_hidden_size"] == 192
    assert (resumed.data.data_split, resumed.data.document_alignment) == ((95.0, 5.0, 0.0), 6)


@pytest.mark.parametrize(
    "wrong",
    [{"--data-split": 5}, {"--document-alignment": 0}, {"--global-batch-size": "4"}, {"model ffn_hidden_size": None},
     {"model vocab_size": "x"}, {"--packing": ["x"]}, {"model kv_channels": 1.5}, {"--seq-length": {}}],
)  # fmt: skip
def test_corrupted_metadata_is_a_refusal(wrong: dict[str, Any]) -> None:
    saved = metadata_of(start(SHAPE, 1)) | wrong
    try:
        resolve_config(*FAST, *SHAPE, resumed=saved)
    except UserError as error:
        assert "\n" not in str(error)


SIZES = st.sampled_from([1, 2, 3, 4, 5, 6, 8])
SAVED = st.fixed_dictionaries(
    {
        "--tp-size": st.sampled_from([1, 2]),
        "--cp-size": st.sampled_from([1, 2, 4]),
        "--pp-size": st.sampled_from([1, 2]),
        "--num-query-groups": st.sampled_from([2, 6]),
        "--make-vocab-size-divisible-by": st.sampled_from([2, 16, 128]),
        "--global-batch-size": st.sampled_from([4, 6, 8]),
        "--qkv-format": st.sampled_from(["thd", "bshd"]),
    }
)
CHANGED = st.fixed_dictionaries(
    {},
    optional={
        "--tp-size": SIZES,
        "--cp-size": SIZES,
        "--pp-size": SIZES,
        "--dp-replicate-size": SIZES,
        "--micro-batch-size": st.sampled_from([1, 2, 3]),
        "--virtual-stages": st.sampled_from([1, 2]),
        "--seq-length": st.sampled_from([256, 250]),
        "--seed": st.sampled_from([1, 1234]),
        "--cp-backend": st.sampled_from(BACKENDS),
        "--cp-layout": st.sampled_from(LAYOUTS),
        "--dtype": st.sampled_from(["fp32", "fp64", "bf16"]),
        "--document-alignment": st.sampled_from([1, 3, 8]),
    },
)


def words_of(flags: dict[str, Any]) -> list[str]:
    return [word for name, value in flags.items() for word in (name, str(value))]


@given(SAVED, st.sampled_from([1, 2, 4]), CHANGED, SIZES)
@settings(max_examples=100, deadline=None)
def test_every_advice_to_a_resumed_run_starts(
    saved_flags: dict[str, Any], copies: int, changed: dict[str, Any], world: int
) -> None:
    saved_world = copies * saved_flags["--tp-size"] * saved_flags["--cp-size"] * saved_flags["--pp-size"]
    try:
        saved = metadata_of(start([*SHAPE, *words_of(saved_flags)], saved_world))
    except UserError:
        assume(False)
    kept = {n: v for n, v in saved_flags.items() if n not in ("--tp-size", "--cp-size", "--pp-size")}
    follow_all([*SHAPE, *words_of(kept), *words_of(changed)], world, saved)


# ---------------------------------------------------------------------------------------------------
# Fresh runs

FRESH = st.fixed_dictionaries(
    {},
    optional={
        "--tp-size": SIZES,
        "--cp-size": SIZES,
        "--pp-size": SIZES,
        "--dp-replicate-size": SIZES,
        "--dp-shard-size": st.sampled_from([-1, 0, 1, 2, 3]),
        "--virtual-stages": st.sampled_from([1, 2, 3]),
        "--pp-schedule": st.sampled_from(["1f1b", "interleaved"]),
        "--first-stage-layers": st.sampled_from([1, 5]),
        "--micro-batch-size": st.sampled_from([1, 2, 3]),
        "--global-batch-size": st.sampled_from([1, 6, 7, 16]),
        "--num-layers": st.sampled_from([1, 6, 7]),
        "--hidden-size": st.sampled_from([48, 50, 256]),
        "--ffn-hidden-size": st.sampled_from([49, 64]),
        "--num-attention-heads": SIZES,
        "--num-query-groups": SIZES,
        "--kv-channels": st.sampled_from([7, 8, 12]),
        "--make-vocab-size-divisible-by": st.sampled_from([1, 7, 128]),
        "--seq-length": st.sampled_from([1, 250, 256, 1000]),
        "--document-alignment": st.sampled_from([1, 3, 8]),
        "--qkv-format": st.sampled_from(["thd", "bshd"]),
        "--packing": st.sampled_from(["best-fit", "concat", "greedy"]),
        "--packing-window": st.just(10),
        "--pad-rows": st.sampled_from(["full", "dynamic"]),
        "--cp-backend": st.sampled_from(BACKENDS),
        "--cp-layout": st.sampled_from(LAYOUTS),
        "--cp-a2a-size": st.sampled_from([1, 2, 3]),
        "--heads-k-stride": st.sampled_from([1, 2, 3]),
        "--dtype": st.sampled_from(["fp32", "fp64", "bf16"]),
        "--attention-dropout": st.just(0.1),
        "--device": st.sampled_from(["cpu", "cuda"]),
        "--transformer-impl": st.sampled_from(["torch", "te"]),
        "--fp8": st.sampled_from(["delayed", "block"]),
        "--recompute": st.sampled_from(["full", "none"]),
        "--lr-warmup-iters": st.sampled_from([0, 5, 30]),
        "--lr-decay-iters": st.sampled_from([5, 30]),
    },
)


@given(FRESH, SIZES, st.sampled_from([0, 4]), st.sampled_from(BACKENDS), st.data())
@settings(max_examples=120, deadline=None)
def test_every_advice_starts(flags: dict[str, Any], world: int, cuda: int, backend: str, data: st.DataObject) -> None:
    if data.draw(st.booleans()):
        flags |= {METHOD_FLAGS[backend]: data.draw(st.sampled_from(methods(backend)))}
    real = importlib.util.find_spec
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            importlib.util, "find_spec", lambda name: object() if name == "transformer_engine" else real(name)
        )
        follow_all(["--num-layers", "6", *words_of(flags)], world, cuda=cuda)


def test_advice_on_several_nodes_counts_ranks_of_a_node() -> None:
    message = follow_all(["--cp-size", "6", "--seq-length", "2520", "--document-alignment", "24"], 16, local=8)
    assert message.endswith("use torchrun --nproc-per-node 9, 6 or 12 on each of the 2 nodes")


def test_advice_takes_two_seconds_at_most(monkeypatch) -> None:
    """Every rank searches, and the job waits."""
    clock = iter(range(10**6))
    monkeypatch.setattr(advice.time, "monotonic", lambda: float(next(clock)))  # a trial takes a second
    tried: list[advice.Change] = []
    attempt = lambda change: tried.append(change) or UserError("no")  # noqa: E731
    error = SizeError("too many", cp_size=range(1, 100), seq_length=range(1, 100))
    found = advice.find_advice(error, attempt, config=start([], 1), ranks=8, nodes=64, is_resumed=True)
    assert found == "no near value mends this" and len(tried) <= 2
