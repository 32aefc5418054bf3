"""The model as train.py runs it, on one GPU: te layers cut over two ranks of the card, recomputed, in 8 bits; compiled
layers; train.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from cp.attention import build_attention
from cp.support import AttentionChoice
from parallel.grid import Grid, GridSizes, build_grid
from tests.distributed.test_model_parity import built, config_of, oracle, rows_of, run_steps
from tests.gpu.test_layers import FP8_GRADIENT, FP8_LOSS, SHAPE
from tests.launch import read_metrics, run_train
from tests.reference import BF16_ROUNDING, relative_error, worst
from tests.world import World

LAYOUTS = {
    "tp 2": GridSizes(tp=2),
    "cp 2": GridSizes(cp=2),
    "dp_shard 2": GridSizes(dp_shard=2),
    "pp 2": GridSizes(pp=2),
}


@pytest.fixture(scope="module")
def two():
    with World(2, backend="staged", device="cuda") as world:
        yield world


@functools.cache
def grid_of(layout: str) -> Grid:
    return build_grid(LAYOUTS[layout])


def errors_of(rank: int, layout: str, implementation: str, device: str, **options) -> dict[str, float]:
    """Relative errors of the first step's loss, norm and gradients: bf16, attention of the same maker as the layers."""
    grid, config, rows = grid_of(layout), config_of(**SHAPE), rows_of("thd")
    backend = "te" if implementation == "te" else "native"
    choice = AttentionChoice(backend=backend, method="p2p", qkv_format="thd", layout="zigzag", cp_size=grid.size("cp"))
    attention = build_attention(choice, head_dim=config.kv_channels)
    got = run_steps(
        built(grid, config, "bf16", attention=attention, device=device, implementation=implementation, **options),
        grid,
        rows,
        1,
        1,
    )
    want = oracle(config, rows, {n: w.shape for n, w in got["weights"].items()})
    errors = {name: relative_error(got["grads"][name], x) for name, x in want["grads"].items()}
    return errors | {what: abs(got[what] / want[what] - 1) for what in ("loss", "norm")}


@functools.cache
def floors(world: World, layout: str) -> list[dict[str, float]]:
    """Our layers and our ring, each rank's."""
    return world.run(errors_of, layout, "torch", "cuda", timeout=200.0)


def assert_near(floor: dict[str, float], errors: dict[str, float]) -> None:
    mean = sum(floor.values()) / len(floor)
    assert {n: (x, floor[n]) for n, x in errors.items() if not x <= 4 * max(floor[n], mean, BF16_ROUNDING)} == {}


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("tp 2", {"sequence_parallel": True}),
        ("tp 2", {"sequence_parallel": False}),
        ("cp 2", {}),
        ("cp 2", {"recompute": "full"}),
        ("dp_shard 2", {"recompute": "selective"}),
        ("pp 2", {}),
    ],
    ids=str,
)
def test_te_layers_over_two_ranks(two: World, record: Callable, layout: str, options: dict) -> None:
    for floor, errors in zip(
        floors(two, layout), two.run(errors_of, layout, "te", "cuda", timeout=200.0, **options), strict=True
    ):
        record(worst=worst(errors), ours=worst(floor))
        assert_near(floor, errors)


@pytest.mark.parametrize(
    ("layout", "options"),
    [("tp 2", {"fp8": "delayed"}), ("cp 2", {"fp8": "delayed"}), ("tp 2", {"fp8": "current", "recompute": "full"})],
    ids=str,
)
def test_8_bits_over_two_ranks(two: World, record: Callable, layout: str, options: dict) -> None:
    for errors in two.run(errors_of, layout, "te", "cuda", timeout=200.0, **options):
        record(worst=worst(errors), loss=errors["loss"])
        assert errors["loss"] < FP8_LOSS and worst(errors) < FP8_GRADIENT


def test_compiled_layers(two: World, record: Callable) -> None:
    for floor, errors in zip(
        floors(two, "cp 2"), two.run(errors_of, "cp 2", "torch", "cuda", timeout=300.0, compiled=True), strict=True
    ):
        record(worst=worst(errors), ours=worst(floor))
        assert_near(floor, errors)


def test_train_py_as_it_is_started(record: Callable, tmp_path: Path) -> None:
    """No flag of a backend: trains, validates, samples, saves, and goes on."""
    flags = [
        "--run-dir",
        str(tmp_path / "run"),
        "--data-cache-path",
        str(tmp_path / "cache"),
        "--resume",
        "--global-batch-size",
        "4",
    ]
    flags += ["--eval-interval", "20", "--save-interval", "20", "--sample-tokens", "8", "--lr-decay-iters", "60"]
    for steps in (40, 60):
        done = run_train(0, *flags, "--train-iters", str(steps))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert "--transformer-impl te" in done.stdout and "--cp-backend te" in done.stdout
    losses = {
        entry["step"]: entry["loss"] for entry in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in entry
    }
    record(first=losses[1], last=losses[60])
    assert list(losses) == list(range(1, 61)) and losses[60] < losses[1] - 1
