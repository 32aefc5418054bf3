"""Learning rate at known steps; FLOPs and parameters against counts by hand and the real model."""

from __future__ import annotations

import pytest
import torch

from metrics.banner import count_parameters
from model.config import GPTConfig, padded_vocab_size
from model.gpt import GPT
from model.transformer import GPTOptions
from training.flops import known_peak_tflops, training_flops
from training.lr_schedule import LRSchedule


def schedule(style: str, **changes) -> LRSchedule:
    return LRSchedule(**(dict(lr=1.0, min_lr=0.1, warmup_iters=10, decay_iters=110, style=style) | changes))


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
    assert schedule(style, wsd_decay_iters=20).at(step) == pytest.approx(wanted)


def test_no_warmup_starts_at_the_top() -> None:
    assert schedule("constant", warmup_iters=0).at(0) == 1.0


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
