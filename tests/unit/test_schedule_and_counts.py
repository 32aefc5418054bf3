"""Learning rate at known steps; FLOPs and parameters against counts by hand and the real model."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from config.schema import LR_DECAY_STYLES
from metrics.banner import count_parameters
from model.config import GPTConfig, padded_vocab_size
from model.gpt import GPT
from model.transformer import GPTOptions
from tests.flags import resolve_config
from training.flops import known_peak_tflops, training_flops
from training.lr_schedule import LRSchedule, build_lr_schedule
from utils.errors import UserError


def schedule(style: str, **changes) -> LRSchedule:
    return LRSchedule(**(dict(lr=1.0, min_lr=0.1, warmup=10, decay_end=110, style=style) | changes))


@pytest.mark.parametrize(
    ("style", "step", "wanted"),
    [
        ("cosine", 0, 0.1), ("cosine", 9, 1.0), ("cosine", 59, 0.55), ("cosine", 109, 0.1), ("cosine", 500, 0.1),
        ("linear", 4, 0.5), ("linear", 34, 0.775), ("linear", 109, 0.1),
        ("constant", 9, 1.0), ("constant", 500, 1.0),
        ("wsd", 89, 1.0), ("wsd", 99, 0.55), ("wsd", 109, 0.1),
    ],
)  # fmt: skip
def test_learning_rate(style: str, step: int, wanted: float) -> None:
    assert schedule(style, wsd_decay=20).at(step) == pytest.approx(wanted)


def test_no_warmup_starts_at_the_top() -> None:
    assert schedule("constant", warmup=0).at(0) == 1.0


def test_a_warm_up_that_reaches_into_the_decay_of_wsd_shortens_it() -> None:
    rates = [schedule("wsd", wsd_decay=60, warmup=80).at(step) for step in (78, 79, 80, 94, 109)]
    assert rates == pytest.approx([79 / 80, 1.0, 0.97, 0.55, 0.1])


steps = st.integers(0, 60)


@settings(max_examples=400, deadline=None)
@given(
    style=st.sampled_from(LR_DECAY_STYLES),
    train_iters=st.integers(1, 60),
    warmup=st.none() | steps,
    decay=st.none() | st.integers(1, 60),
    wsd=st.none() | st.integers(1, 60),
    min_lr=st.sampled_from([0.0, 1e-4, 0.5, 1.0]),
)
def test_every_schedule_is_continuous_and_as_documented_at_its_corners(
    style: str, train_iters: int, warmup: int | None, decay: int | None, wsd: int | None, min_lr: float
) -> None:
    given = {"--lr-warmup-iters": warmup, "--lr-decay-iters": decay, "--lr-wsd-decay-iters": wsd}
    flags = [word for name, value in given.items() if value is not None for word in (name, str(value))]
    flags += ["--lr", "1", "--min-lr", str(min_lr), "--train-iters", str(train_iters), "--lr-decay-style", style]
    try:
        training = resolve_config(*flags).training
    except UserError:
        assume(False)
    warmup, decay = training.lr_warmup_iters, training.lr_decay_iters
    rates = [build_lr_schedule(training, 2048).at(step) for step in range(train_iters)]

    up, down = rates[: warmup or 1], rates[max(warmup - 1, 0) :]
    assert up == sorted(up) and down == sorted(down, reverse=True) and max(rates) <= 1.0
    assert min(rates[: min(decay, train_iters)]) > 0  # every step up to the decay's end trains
    assert not down or down[-1] >= min_lr
    if 0 < warmup <= train_iters:
        assert rates[warmup - 1] == 1.0
    if style != "constant" and min_lr and warmup < decay <= train_iters:
        assert rates[decay - 1 :] == pytest.approx([min_lr] * (train_iters - decay + 1))
    # No jump: at most the steepest slope of a warm-up or of a cosine over the shortest decay.
    shortest = decay - max(warmup, decay - training.lr_wsd_decay_iters) if style == "wsd" else decay - warmup
    slope = max(1 / max(warmup, 1), (1 - min_lr) * math.pi / 2 / max(shortest, 1))
    assert all(abs(b - a) <= slope + 1e-12 for a, b in itertools.pairwise(rates))


@pytest.mark.parametrize("style", ["cosine", "linear", "wsd"])
def test_the_last_step_trains_where_the_decay_ends_at_0(style: str) -> None:
    rates = [schedule(style, min_lr=0.0, wsd_decay=20).at(step) for step in (108, 109, 110)]
    assert rates[0] > rates[1] > 0 == rates[2]


def test_a_rate_below_the_smallest_is_refused_only_where_it_decays() -> None:
    assert resolve_config("--lr", "1e-5", "--lr-decay-style", "constant").training.lr == 1e-5
    with pytest.raises(UserError, match=r"--min-lr 0.0001 is above --lr 1e-05: give at most 1e-05.*constant"):
        resolve_config("--lr", "1e-5")


def config(**changes) -> GPTConfig:
    shape = dict(
        num_layers=3, hidden_size=16, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=2, kv_channels=6,
        vocab_size=50, padded_vocab_size=64,
    )  # fmt: skip
    return GPTConfig(**(shape | changes))


def test_flops_by_hand() -> None:
    lengths = [7, 3]
    multiply_adds = 0
    for n in lengths:
        matrices = 3 * (16 * 24 + 2 * 16 * 12 + 24 * 16 + 3 * 16 * 40) + 16 * 64
        multiply_adds += n * matrices
        multiply_adds += 3 * (2 * 24 * n * n) / 2  # scores and weighted sum, half the square
    got = training_flops(config(), tokens=10, squared_lengths=49 + 9)
    assert got == 6 * multiply_adds


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"qk_norm": True}, {"num_query_groups": 4}])
def test_parameter_count_is_the_models(changes: dict) -> None:
    with torch.device("meta"):
        model = GPT(config(**changes), attention=None, cp_group=None, options=GPTOptions(dtype=torch.float32))  # type: ignore[arg-type]
    assert count_parameters(config(**changes)) == sum(p.numel() for p in model.parameters())


def test_padded_vocabulary() -> None:
    assert [padded_vocab_size(n, 128) for n in (1, 128, 129)] == [128, 128, 256]


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H200", 989.0), ("NVIDIA H20", 148.0), ("NVIDIA H100 PCIe", 756.0), ("Some CPU", None)]
)
def test_peaks(name: str, peak: float | None) -> None:
    assert known_peak_tflops(name) == peak
