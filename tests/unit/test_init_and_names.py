"""Initial weights as a function of (seed, name, rows)."""

from __future__ import annotations

import pytest
import torch

from model.config import GPTConfig
from model.gpt import GPT
from model.init import BLOCK_ROWS, initial_rows, initialise
from model.transformer import GPTOptions

CONFIG = GPTConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=400,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=600,
    padded_vocab_size=640,
    qk_norm=True,
)


def model() -> GPT:
    with torch.device("meta"):
        return GPT(CONFIG, attention=None, cp_group=None, options=GPTOptions(dtype=torch.float32))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 10), (250, 260), (0, 700), (BLOCK_ROWS, 2 * BLOCK_ROWS), (300, 300), (511, 513)]
)
def test_any_rows_are_a_slice_of_the_whole(start: int, stop: int) -> None:
    whole = initial_rows(5, "w", 0, 700, 8, 0.02)
    assert torch.equal(initial_rows(5, "w", start, stop, 8, 0.02), whole[start:stop])


def test_seed_name_and_block_all_matter() -> None:
    whole = initial_rows(5, "w", 0, 2 * BLOCK_ROWS, 8, 0.02)
    assert not torch.equal(whole[:BLOCK_ROWS], whole[BLOCK_ROWS:])
    assert not torch.equal(whole, initial_rows(6, "w", 0, 2 * BLOCK_ROWS, 8, 0.02))
    assert not torch.equal(whole, initial_rows(5, "v", 0, 2 * BLOCK_ROWS, 8, 0.02))


def test_spread_of_weights() -> None:
    built = model()
    initialise(built, CONFIG, seed=1, device=torch.device("cpu"))
    for name, parameter in built.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all()
            continue
        scaled = name.endswith(("attention.output.weight", "mlp.fc2_weight"))
        wanted = 0.02 / 2 if scaled else 0.02  # sqrt(2 * 2 layers) = 2
        assert parameter.std().item() == pytest.approx(wanted, rel=0.1), name
