"""Dropout masks are functions of token ids: equal on every layout and in recomputation."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from cp.attention import build_attention
from cp.placement import degree_chain
from cp.support import AttentionChoice
from model.dropout import HiddenDropout
from model.gpt import get_chunks
from parallel.grid import neighbour_groups, split_group
from tests.distributed.test_model_parity import built, config_of, grid_of, oracle, rows_of, run_steps
from tests.reference import relative_error, worst
from tests.world import World

CONFIG = dict(hidden_dropout=0.1, attention_dropout=0.2, num_layers=2, num_query_groups=2)
METHODS: dict[str, dict] = {
    "p2p": dict(method="p2p"),
    "all_gather": dict(method="all_gather", heads_k_stride=1),
    "a2a": dict(method="a2a", a2a_size=2),
    "a2a+p2p": dict(method="a2a+p2p", a2a_size=2),
    "hybrid": dict(method="p2p", layout="hybrid"),
    "hybrid all_gather": dict(method="all_gather", layout="hybrid"),
}


@pytest.fixture(scope="module")
def world():
    with World(4) as world:
        yield world


@functools.cache
def attention_of(layout: str, method: str):
    grid = grid_of(layout)
    how = dict(backend="native", qkv_format="thd", layout="zigzag", cp_size=grid.size("cp")) | METHODS[method]
    choice = AttentionChoice(**how)  # type: ignore[arg-type]
    groups = split_group(grid, "cp", choice.a2a_size) if choice.a2a_size > 1 else None
    degrees = neighbour_groups(grid, "cp", degree_chain(choice.cp_size)) if choice.layout == "hybrid" else None
    return build_attention(choice, head_dim=8, a2a_groups=groups, degree_groups=degrees)


@functools.cache
def wanted(layers: int, **changes) -> dict:
    config = config_of(**(CONFIG | changes))
    model = built_shapes(config)
    return oracle(config, rows_of("thd"), model)


def built_shapes(config) -> dict[str, torch.Size]:
    from tests.distributed.test_five_axes import shape_model

    return {name: p.shape for name, p in shape_model(config).items()}


def run(
    rank: int,
    layout: str,
    method: str,
    micro_batch: int,
    sequence_parallel: bool,
    recompute: str,
    dtype: str,
    changes: dict,
) -> dict:
    grid = grid_of(layout)
    model = built(
        grid,
        config_of(**(CONFIG | changes)),
        dtype,
        sequence_parallel=sequence_parallel,
        recompute=recompute,
        attention=attention_of(layout, method),
    )
    cp_layout = METHODS[method].get("layout", "zigzag")
    return run_steps(model, grid, rows_of("thd"), micro_batch, steps=1, layout=cp_layout)


CASES = [
    ("dp_shard 4", "p2p", 1, True),
    ("dp_shard 2 x cp 2", "p2p", 1, True),
    ("dp_shard 2 x cp 2", "p2p", 2, True),
    ("cp 4", "p2p", 1, True),
    ("cp 4", "all_gather", 4, True),
    ("dp_shard 2 x cp 2", "a2a", 1, True),
    ("cp 4", "a2a+p2p", 2, True),
    ("tp 2 x cp 2", "p2p", 1, True),
    ("tp 2 x cp 2", "all_gather", 2, False),
    ("pp 2 x cp 2", "p2p", 1, True),
    ("pp 2 x tp 2", "p2p", 1, True),
    ("dp_shard 2 x cp 2", "hybrid", 2, True),
    ("cp 4", "hybrid", 4, True),
    ("cp 4", "hybrid all_gather", 4, True),
    ("tp 2 x cp 2", "hybrid", 2, True),
    ("pp 2 x cp 2", "hybrid", 1, True),
]


@pytest.mark.parametrize(("layout", "method", "micro_batch", "sequence_parallel"), CASES)
def test_every_layout_drops_what_one_rank_drops(
    world: World, layout: str, method: str, micro_batch: int, sequence_parallel: bool
) -> None:
    changes = {"num_query_groups": 1} if "tp" in layout else {}  # a key/value head that ranks share
    want = wanted(2, **changes)
    got = world.run(run, layout, method, micro_batch, sequence_parallel, "none", "fp64", changes)[0]
    assert abs(got["loss"] / want["loss"] - 1) <= 1e-10
    errors = {name: relative_error(got["grads"][name], grad) for name, grad in want["grads"].items()}
    assert worst(errors) <= 1e-10, errors


def test_dropout_is_there_and_is_right_on_average() -> None:
    """Both rates change the oracle's loss; a module's mean output over many seeds is its input."""
    losses = {wanted(2, **change)["loss"] for change in ({}, {"hidden_dropout": 0.0}, {"attention_dropout": 0.0})}
    assert len(losses) == 3
    x = torch.randn(16, 8, dtype=torch.float64)
    total = torch.zeros_like(x)
    for seed in range(4000):
        dropout = HiddenDropout(0.25, seed=seed, name="x")
        total += dropout(x, torch.arange(16))
    # Each element's mean deviates by |x| sqrt(p / (1 - p) / 4000) = 0.9 % of it.
    assert ((total / 4000 - x) / x).abs().max() < 5 * 0.0092
    assert torch.equal(HiddenDropout(0.25, seed=1, name="x").eval()(x, None), x)


@pytest.mark.parametrize("layout", ["dp_shard 2 x cp 2", "tp 2 x cp 2", "pp 2 x cp 2"])
@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.full), "bf16"])
def test_recomputed_masks_are_the_same(world: World, layout: str, dtype: str) -> None:
    runs = [
        world.run(run, layout, "p2p", 1, True, recompute, dtype, {})[0]["grads"]
        for recompute in ("none", "selective", "full")
    ]
    assert all(torch.equal(other[name], grad) for other in runs[1:] for name, grad in runs[0].items())


def masks(rank: int, layout: str, sequence_parallel: bool) -> dict:
    """Masks of this rank after the embedding and the MLPs (attention's output is 0 in padding), and its coordinates."""
    grid = grid_of(layout)
    model = built(grid, config_of(**CONFIG), "fp64", sequence_parallel=sequence_parallel)
    seen: dict[str, torch.Tensor] = {}
    for name, module in get_chunks(model)[0].named_modules():
        if isinstance(module, HiddenDropout) and not name.endswith("after_attention"):
            module.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, (out == 0).clone()))
    run_steps(model, grid, rows_of("thd"), 4 // grid.size("batch"), steps=1)
    return {"masks": seen, "cp": grid.rank("cp"), "tp": grid.rank("tp")}


def agreement(a: dict, b: dict) -> list[float]:
    return [(a["masks"][name] == b["masks"][name]).double().mean().item() for name in a["masks"]]


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_shards_of_a_row_drop_differently_and_copies_alike(world: World, sequence_parallel: bool) -> None:
    """cp and sequence-parallel shards have different tokens; without it tp ranks have equal tokens."""
    ranks = world.run(masks, "tp 2 x cp 2", sequence_parallel)
    for rank in ranks:
        for name, mask in rank["masks"].items():
            assert mask.shape == (64 if sequence_parallel else 128, 32) and 0.07 < mask.double().mean() < 0.13, name
    for first, second in itertools.combinations(ranks, 2):
        if first["cp"] == second["cp"] and not sequence_parallel:
            assert set(agreement(first, second)) == {1.0}
        else:
            assert all(0.77 < share < 0.87 for share in agreement(first, second))  # 0.9 * 0.9 + 0.1 * 0.1 by chance
