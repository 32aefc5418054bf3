"""Layers of pipeline stages, microbatches of schedules, and dimensions of tensor-parallel shards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import GPTConfig
from model.gpt import GPT, Stages
from model.names import needs_tp_grad_sum, tp_dim
from model.transformer import GPTOptions
from parallel.stages import check_schedule, split_layers

CONFIG = GPTConfig(
    num_layers=5,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=50,
    padded_vocab_size=64,
    qk_norm=True,
)


@given(
    st.integers(1, 40),
    st.integers(1, 8),
    st.one_of(st.none(), st.integers(1, 5)),
    st.one_of(st.none(), st.integers(1, 5)),
)
@settings(max_examples=300, deadline=None)
def test_every_layer_has_one_stage(layers: int, stages: int, first: int | None, last: int | None) -> None:
    try:
        cut = split_layers(layers, stages, first=first, last=last)
    except ValueError as error:
        assert "\n" not in str(error)
        if first is None and last is None:
            assert layers < stages
        return
    assert [layer for stage in cut for layer in stage] == list(range(layers))
    assert len(cut) == stages and all(len(stage) >= 1 for stage in cut)
    if first is not None:
        assert len(cut[0]) == first
    if last is not None:
        assert len(cut[-1]) == last
    free = [
        len(s)
        for i, s in enumerate(cut)
        if not (i == 0 and first is not None) and not (i == stages - 1 and last is not None)
    ]
    assert not free or max(free) - min(free) <= 1


def test_what_schedules_take() -> None:
    for right in (("1f1b", 4, 1), ("gpipe", 4, 1), ("interleaved", 4, 2), ("1f1b", 1, 1)):
        check_schedule(*right)
    for wrong in (("1f1b", 2, 2), ("interleaved", 2, 1), ("1f1b", 1, 2)):
        with pytest.raises(ValueError, match="--"):
            check_schedule(*wrong)


@pytest.mark.parametrize("tied", [False, True])
def test_stages_hold_the_names_of_the_whole_model(tied: bool) -> None:
    config = GPTConfig(**{**vars(CONFIG), "tie_embeddings": tied})

    def stage(layers: range) -> GPT:
        with torch.device("meta"):
            return GPT(config, attention=None, cp_group=None, options=GPTOptions(dtype=torch.float32), layers=layers)  # type: ignore[arg-type]

    whole = {name: p.shape for name, p in stage(range(5)).named_parameters()}
    parts = [stage(layers) for layers in split_layers(5, 4)]
    names = [name for part in parts for name, _ in part.named_parameters()]
    copies = [name for part in parts for name, _ in part.named_parameters() if part.is_copy(name)]
    assert set(names) == set(whole) and len(names) == len(whole) + len(copies)
    assert copies == (["embedding.weight"] if tied else [])
    held = Stages([parts[0], parts[2]])
    assert [n for n, _ in held.named_parameters()] == [n for p in (parts[0], parts[2]) for n, _ in p.named_parameters()]
    assert len(list(held.parameters())) == len(list(parts[0].parameters())) + len(list(parts[2].parameters()))


def test_every_matrix_is_tp_sharded_and_no_vector() -> None:
    with torch.device("meta"):
        model = GPT(CONFIG, attention=None, cp_group=None, options=GPTOptions(dtype=torch.float32))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        assert (tp_dim(name) is not None) == (parameter.dim() == 2), name
        assert needs_tp_grad_sum(name, sequence_parallel=True) == (parameter.dim() == 1)
        assert needs_tp_grad_sum(name, sequence_parallel=False) == name.endswith(("q_norm.weight", "k_norm.weight"))
    # Matrices that write to the residual stream are sharded by inputs, all others by outputs.
    assert {name for name, _ in model.named_parameters() if tp_dim(name) == 1} == {
        f"layers.{i}.{part}" for i in range(5) for part in ("attention.output.weight", "mlp.fc2_weight")
    }
