"""Every backend of the table on one GPU: alone, and over two and four ranks of the one card through `staged`."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch

import tools.verify
from config.schema import RunConfig
from cp.layout import shard_indices
from cp.ring_flash import load_library
from parallel.grid import Grid, GridSizes, build_grid
from tests.flags import resolve_config
from tests.launch import SMALL, write_corpus
from tests.world import World
from tools.verify import Verifier, cells_of, describe_layout

# Heads of 64 channels: what every CUDA kernel takes.
FLAGS = [
    *SMALL,
    "--hidden-size",
    "256",
    "--ffn-hidden-size",
    "512",
    "--num-attention-heads",
    "8",
    "--num-query-groups",
    "4",
]
FLAGS += [
    "--kv-channels",
    "64",
    "--device",
    "cuda",
    "--dtype",
    "bf16",
    "--transformer-impl",
    "torch",
    "--cp-backend",
    "native",
]
HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None


@pytest.fixture(scope="module", params=[1, 2, 4])
def world(request):
    with World(request.param, backend="staged", device="cuda") as world:
        yield world


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpus")
    return [*FLAGS, "--data-path", str(write_corpus(folder)), "--data-cache-path", str(folder / "cache")]


@functools.cache
def grid_of(cp_size: int) -> Grid:
    return build_grid(GridSizes(cp=cp_size))


def resolved(flags: list[str], cp_size: int) -> RunConfig:
    return resolve_config(*flags, "--cp-size", str(cp_size), "--global-batch-size", "1", world=cp_size, cuda=cp_size)


def all_cells(rank: int, flags: list[str], cp_size: int, device: str) -> list[tuple[str, bool, float]]:
    """(title, passed, worst error over its floor) of each cell whose library is there; on rank 0.

    Without flash-attn, the rings of ring-flash-attn run over `cp.flash_attn_cpu`, through the host.
    """
    args, libraries = resolved(flags, cp_size), tools.verify.CUDA_LIBRARIES
    if not HAS_FLASH_ATTN:
        libraries = tools.verify.LIBRARIES
        if importlib.util.find_spec("ring_flash_attn") is not None:
            load_library("cpu")
    verifier = Verifier(args, grid_of(cp_size), torch.device(device), layers=1, samples=1)
    with mock.patch.object(tools.verify, "CUDA_LIBRARIES", libraries):
        # Transformer Engine last: a kernel that breaks the device's memory fails every cell after it.
        runs = sorted(cells_of(args), key=lambda run: run.parallel.attention.backend == "te")
        return [cell for run in runs for cell in one_cell(verifier, run)]


def one_cell(verifier: Verifier, run: RunConfig) -> list[tuple[str, bool, float]]:
    """Its title, whether it passed and by how much; an error fails this cell and leaves the others."""
    try:
        report = verifier.verify(run)
    except Exception as error:
        return [
            (
                f"{describe_layout(run)}: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
                False,
                float("inf"),
            )
        ]
    return [] if report is None else [(report.title, report.passed, max(figure.ratio for figure in report.figures))]


def test_every_cell_of_the_table_agrees(world: World, flags: list[str], record: Callable) -> None:
    results = world.run(all_cells, flags, world.size, "cuda", timeout=200.0)[0]
    record(flash_attn=float(HAS_FLASH_ATTN), **{title: ratio for title, _, ratio in results})
    assert len(results) >= 8
    assert [title for title, passed, _ in results if not passed] == []


def partition(rank: int, cp_size: int) -> bool:
    """Whether its compiled index function deals out tokens as our zigzag does."""
    import transformer_engine.pytorch  # noqa: F401 - makes its extension known
    import transformer_engine_torch as tex

    padded = np.array([8, 24, 16, 40, 64])
    cu = torch.from_numpy(np.concatenate([[0], padded.cumsum()])).int().cuda()
    for part in range(cp_size):
        theirs = tex.thd_get_partitioned_indices(cu, int(padded.sum()), cp_size, part).cpu().numpy()
        if not np.array_equal(theirs, shard_indices(padded, cp_size=cp_size, cp_rank=part, layout="zigzag")):
            return False
    return True


def test_zigzag_is_transformer_engines_order(world: World) -> None:
    assert all(world.run(partition, world.size))
