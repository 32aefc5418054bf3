"""Weights at step 0: the shards of every layout, and their distribution."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

import model.init as init_module
from model.config import GPTConfig
from model.gpt import GPT
from model.init import BLOCK_ROWS, initial_rows, initialise, local_rows
from model.transformer import GPTOptions

SHAPE = dict(
    num_layers=3,
    hidden_size=32,
    ffn_hidden_size=600,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=600,
    padded_vocab_size=640,
)


def built(seed: int = 7, **changes) -> dict[str, torch.Tensor]:
    config = GPTConfig(**(SHAPE | changes))  # type: ignore[arg-type]
    with torch.device("meta"):
        model = GPT(config, attention=None, cp_group=None, options=GPTOptions(dtype=torch.float32))  # type: ignore[arg-type]
    initialise(model, config, seed=seed, device=torch.device("cpu"))
    return {name: p.detach() for name, p in model.named_parameters()}


def test_mean_and_spread() -> None:
    for name, weight in built().items():
        if weight.dim() == 1:
            assert (weight == 1).all(), name
            continue
        # sqrt(2 * 3 layers), which is neither 2 * 3 / 2 nor 3: two layers could not tell.
        wanted = 0.02 / 6**0.5 if name.endswith(("attention.output.weight", "mlp.fc2_weight")) else 0.02
        assert weight.std().item() == pytest.approx(wanted, rel=0.06), name
        assert abs(weight.mean().item()) < 5 * wanted / weight.numel() ** 0.5, name
        assert weight.abs().max() < 6 * wanted


def test_no_two_weights_are_drawn_alike() -> None:
    """Equal seed and shape: layers, gate and up, embedding and output differ because their names differ."""
    rows = {}
    for name, weight in built().items():
        if weight.dim() == 2:
            for row in (0, len(weight) - 1):
                rows[(name, row)] = tuple((weight[row, :4] / weight.std()).tolist())
    assert all(a != pytest.approx(b, rel=1e-3) for a, b in itertools.combinations(rows.values(), 2))


def test_what_is_added_moves_nothing_else() -> None:
    """With more padding, tied embeddings, head norms or more layers, shared weights keep their initial values."""
    plain = built()
    for changes in ({"padded_vocab_size": 1280}, {"tie_embeddings": True}, {"qk_norm": True}):
        other = built(**changes)
        for name in plain.keys() & other.keys():
            rows = min(len(plain[name]), len(other[name]))
            assert torch.equal(plain[name][:rows], other[name][:rows]), (changes, name)
    deeper = built(num_layers=5)
    assert all(torch.equal(plain[n], deeper[n]) for n in plain if not n.endswith(("output.weight", "fc2_weight")))
    assert not torch.equal(built(seed=8)["embedding.weight"], plain["embedding.weight"])


class StandInMesh:
    def __init__(self, sizes: tuple[int, ...], coordinate: tuple[int, ...]) -> None:
        self.sizes, self.coordinate = sizes, coordinate

    def size(self, dim: int) -> int:
        return self.sizes[dim]

    def get_coordinate(self) -> list[int]:
        return list(self.coordinate)


class StandInDTensor:
    """The part of DTensor that `local_rows` reads; torch.chunk makes the shard, as in FSDP2."""

    def __init__(
        self, whole: torch.Tensor, sizes: tuple[int, ...], coordinate: tuple[int, ...], placements: tuple
    ) -> None:
        self.shape, self.placements, self.device_mesh = whole.shape, placements, StandInMesh(sizes, coordinate)
        for size, index, placement in zip(sizes, coordinate, placements, strict=True):
            if isinstance(placement, Shard):
                chunks = torch.chunk(whole, size)
                whole = chunks[index] if index < len(chunks) else whole[:0]
        self.local = whole

    def to_local(self) -> torch.Tensor:
        return self.local


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 8, 96, 600])
@pytest.mark.parametrize(
    ("sizes", "placements"),
    [
        ((4,), (Shard(0),)),
        ((3,), (Shard(0),)),
        ((2, 4), (Replicate(), Shard(0))),
        ((3, 2), (Shard(0), Shard(0))),
        ((2,), (Replicate(),)),
    ],
    ids=str,
)
def test_every_rank_knows_the_rows_it_holds(rows: int, sizes: tuple[int, ...], placements: tuple, monkeypatch) -> None:
    monkeypatch.setattr(init_module, "DTensor", StandInDTensor)
    whole = torch.arange(rows)[:, None]
    for coordinate in itertools.product(*(range(n) for n in sizes)):
        parameter = StandInDTensor(whole, sizes, coordinate, placements)
        start, stop = local_rows(parameter)  # type: ignore[arg-type]
        assert torch.equal(whole[start:stop], parameter.to_local())


def test_a_plain_tensor_is_held_whole() -> None:
    assert local_rows(torch.empty(5, 3)) == (0, 5)


@pytest.mark.parametrize("cut", [1, 3, BLOCK_ROWS, BLOCK_ROWS + 1, 500])
def test_pieces_put_together_are_the_whole(cut: int) -> None:
    whole = initial_rows(1, "w", 0, 600, 5, 0.02)
    starts = range(0, 600, cut)
    assert torch.equal(torch.cat([initial_rows(1, "w", s, min(s + cut, 600), 5, 0.02) for s in starts]), whole)
    assert torch.equal(initial_rows(1, "w", 0, 600, 5, 0.04), initial_rows(1, "w", 0, 600, 5, 0.02) * 2)


def test_drawing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    built()
    assert torch.equal(torch.rand(3), wanted)
