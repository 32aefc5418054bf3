"""Two and eight ranks: three AdamW steps in every layout against one rank's float64 code that shares nothing with the
model.

Loss and gradient norm of each step, every gradient of the first and every weight after the last; replicas hold the same
bits. `test_model_parity.py` does the same for four ranks and more variants; the three lists together cover every pair
of axes.
"""

from __future__ import annotations

import functools
import hashlib
import itertools

import pytest
import torch

from cp.layout import shard_indices
from data.dataset import PackedSample
from model.names import tp_dim
from parallel.fsdp import local_tensor
from parallel.grid import AXES, Grid, GridSizes, build_grid
from tests.distributed import test_model_parity as parity
from tests.distributed.test_model_parity import built, config_of, oracle, rows_of, run_steps
from tests.reference import BF16_ROUNDING, relative_error, worst
from tests.world import World

TWO = {f"{axis} 2": GridSizes(**{axis: 2}) for axis in AXES}
EIGHT = {
    "pp 2 x tp 2 x cp 2": GridSizes(pp=2, tp=2, cp=2),
    "pp 2 x dp_shard 2 x cp 2": GridSizes(pp=2, dp_shard=2, cp=2),
    "dp_replicate 2 x dp_shard 2 x cp 2": GridSizes(dp_replicate=2, dp_shard=2, cp=2),
    "tp 2 x dp_shard 2 x cp 2": GridSizes(tp=2, dp_shard=2, cp=2),
    "pp 2 interleaved x cp 2 x tp 2": GridSizes(pp=2, cp=2, tp=2),
    "pp 2 interleaved x dp_shard 2 x tp 2": GridSizes(pp=2, dp_shard=2, tp=2),
    "dp_replicate 2 x cp 2 x tp 2": GridSizes(dp_replicate=2, cp=2, tp=2),
    "pp 2 x dp_replicate 2 x tp 2": GridSizes(pp=2, dp_replicate=2, tp=2),
    "pp 2 x dp_replicate 2 x cp 2": GridSizes(pp=2, dp_replicate=2, cp=2),
    "cp 4 x tp 2": GridSizes(cp=4, tp=2),
    "pp 4 x cp 2": GridSizes(pp=4, cp=2),
}
SCHEDULES = {
    "pp 2 interleaved x cp 2 x tp 2": ("interleaved", 2),
    "pp 2 interleaved x dp_shard 2 x tp 2": ("interleaved", 2),
}
# On every push: those that the issue names, one axis each, and the rest with `make test-full`.
PUSH = [*list(EIGHT)[:6]]
STEPS = 3
LIMITS = {"fp64": 1e-9, "fp32": 1e-5}


@pytest.fixture(scope="module")
def two():
    with World(2) as world:
        yield world


@pytest.fixture(scope="module")
def eight():
    with World(8) as world:
        yield world


@functools.cache
def grid_of(layout: str) -> Grid:
    return build_grid({**TWO, **EIGHT}[layout])


def rows_with(labels: str) -> list[PackedSample]:
    """The rows of test_model_parity, all labels there or none where one data rank, or one cp rank of two, looks."""
    rows = rows_of("thd")
    for number, row in enumerate(rows):
        if labels == "none on data rank 1" and number % 2:
            row.labels[:] = -100
        if labels == "none on cp rank 0":
            row.labels[shard_indices(row.padded_lengths, cp_size=2, cp_rank=0, layout="zigzag")] = -100
    return rows


def config_for(layout: str, tied: bool):
    layers = {"pp 4 x cp 2": 5}.get(layout, 4 if layout in SCHEDULES else 3)
    return config_of(num_layers=layers, tie_embeddings=tied, qk_norm=tied)


def run(rank: int, layout: str, dtype: str, labels: str, tied: bool) -> dict:
    """What one rank of the layout saw; the whole tensors from rank 0 alone, digests of its shards from each."""
    grid = grid_of(layout)
    schedule, virtual_stages = SCHEDULES.get(layout, ("1f1b", 1))
    model = built(grid, config_for(layout, tied), dtype, virtual_stages=virtual_stages)
    got = run_steps(model, grid, rows_with(labels), 1, steps=STEPS, schedule=schedule)
    shards = {
        n: hashlib.sha256(local_tensor(p.detach()).contiguous().view(torch.uint8).numpy().tobytes()).digest()
        for n, p in model.named_parameters()
    }
    if rank:
        got = {key: got[key] for key in ("losses", "norms")}
    return got | {"shards": shards, "place": tuple(grid.rank(axis) for axis in AXES)}


def errors_of(got: dict, want: dict) -> dict[str, float]:
    """Relative, by what."""
    errors = {
        f"{what} {n}": abs(a / b - 1)
        for what in ("losses", "norms")
        for n, (a, b) in enumerate(zip(got[what], want[what], strict=True))
    }
    for what in ("grads", "weights"):
        assert got[what].keys() == want[what].keys()
        errors |= {f"{what} {n}": relative_error(got[what][n], x) for n, x in want[what].items()}
    return errors


@functools.cache
def wanted(layers: int, labels: str, tied: bool) -> dict:
    config = config_of(num_layers=layers, tie_embeddings=tied, qk_norm=tied)
    shapes = {n: p.shape for n, p in shape_model(config).items()}
    return oracle(config, rows_with(labels), shapes, STEPS)


def shape_model(config) -> dict[str, torch.Tensor]:
    """Names and shapes of the canonical weights, on the meta device."""
    from model.gpt import GPT
    from model.transformer import GPTOptions

    with torch.device("meta"):
        model = GPT(config, attention=lambda *_: None, cp_group=None, options=GPTOptions(dtype=torch.float64))  # type: ignore[arg-type, return-value]
    return dict(model.named_parameters())


def check(world: World, layout: str, dtype: str, labels: str, tied: bool) -> None:
    results = world.run(run, layout, dtype, labels, tied)
    errors = errors_of(results[0], wanted(config_for(layout, tied).num_layers, labels, tied))
    assert worst(errors) <= LIMITS[dtype], {name: error for name, error in errors.items() if not error <= LIMITS[dtype]}
    for result in results[1:]:
        assert (result["losses"], result["norms"]) == (results[0]["losses"], results[0]["norms"])
    # Replicas, and what tp ranks hold whole, are the same bits.
    for first, second in itertools.combinations(results, 2):
        differ = {axis for axis, a, b in zip(AXES, first["place"], second["place"], strict=True) if a != b}
        if differ <= {"dp_replicate"}:
            assert first["shards"] == second["shards"]
        if differ <= {"dp_replicate", "tp"}:
            assert all(first["shards"][n] == second["shards"][n] for n in first["shards"] if tp_dim(n) is None)


@pytest.mark.parametrize("layout", TWO)
@pytest.mark.parametrize("tied", [False, True])
def test_one_axis(two: World, layout: str, tied: bool) -> None:
    check(two, layout, "fp64", "all", tied)


@pytest.mark.parametrize(
    ("labels", "layout"),
    [("none on data rank 1", "dp_shard 2"), ("none on data rank 1", "dp_replicate 2"), ("none on cp rank 0", "cp 2")],
)
def test_a_rank_without_any_label(two: World, labels: str, layout: str) -> None:
    check(two, layout, "fp64", labels, False)


@pytest.mark.parametrize("layout", [pytest.param(x, marks=[] if x in PUSH else [pytest.mark.full]) for x in EIGHT])
@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.full)])
def test_three_axes(eight: World, layout: str, tied: bool) -> None:
    check(eight, layout, "fp64", "all", tied)


@pytest.mark.parametrize(
    ("labels", "layout"),
    [("none on data rank 1", "pp 2 x dp_shard 2 x cp 2"), ("none on cp rank 0", "tp 2 x dp_shard 2 x cp 2")],
)
def test_a_rank_without_any_label_among_eight(eight: World, labels: str, layout: str) -> None:
    check(eight, layout, "fp64", labels, True)


@pytest.mark.parametrize("layout", [pytest.param(x, marks=[] if x == PUSH[0] else [pytest.mark.full]) for x in EIGHT])
def test_fp32(eight: World, layout: str) -> None:
    check_first_step(eight, layout)


def check_first_step(world: World, layout: str) -> None:
    """In fp32: losses and norms of all steps, and first gradients. An element's first AdamW step is its gradient's
    sign, so an element near 0 moves by its rounding alone: weights are held to what that can do, the losses after it to
    ten times the limit.
    """
    got = world.run(run, layout, "fp32", "all", False)[0]
    errors = errors_of(got, wanted(config_for(layout, False).num_layers, "all", False))
    later = {
        name: error for name, error in errors.items() if name[:-1] in ("losses ", "norms ") and not name.endswith("0")
    }
    assert worst(later) <= 10 * LIMITS["fp32"], later
    kept = {name: error for name, error in errors.items() if name.startswith(("losses 0", "norms 0", "grads"))}
    assert worst(kept) <= LIMITS["fp32"], kept


@pytest.mark.parametrize(
    "layout", [pytest.param(x, marks=[] if x == PUSH[0] else [pytest.mark.full]) for x in list(EIGHT)[:5]]
)
def test_bf16_is_at_most_four_times_as_noisy_as_one_rank(two: World, eight: World, layout: str) -> None:
    """`dp_shard 2` computes each row whole on one rank."""
    layers = config_for(layout, False).num_layers
    alone = errors_of(two.run(run_with_layers, layers)[0], wanted(layers, "all", False))
    errors = errors_of(eight.run(run, layout, "bf16", "all", False)[0], wanted(layers, "all", False))
    for name, error in errors.items():
        if name.startswith("grads"):
            assert error <= 4 * max(alone[name], BF16_ROUNDING), (name, error, alone[name])
    assert errors["losses 0"] < 1e-2 and errors["norms 0"] < 5e-2


def run_with_layers(rank: int, layers: int) -> dict:
    grid = grid_of("dp_shard 2")
    return run_steps(built(grid, config_of(num_layers=layers), "bf16"), grid, rows_with("all"), 1, steps=STEPS)


def test_the_lists_cover_every_pair_of_axes() -> None:
    tables = [TWO, parity.LAYOUTS, EIGHT]
    assert {size.world_size for table in tables for size in table.values()} == {2, 4, 8}
    pairs = set()
    for sizes in (size for table in tables for size in table.values()):
        used = [axis for axis in AXES if getattr(sizes, axis) > 1]
        pairs |= {frozenset(pair) for pair in itertools.combinations(used, 2)}
    assert pairs == {frozenset(pair) for pair in itertools.combinations(AXES, 2)}
