"""The `staged` backend of tests/gpu on CPU tensors: every collective that the suite calls, and the model over it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel.grid import GridSizes, build_grid, embedding_group, split_group
from tests.distributed.test_model_parity import check_layout
from tests.gpu.test_context_parallel import FLAGS, all_cells
from tests.launch import write_corpus
from tests.reference import worst
from tests.world import World


@pytest.fixture(scope="module")
def world():
    with World(4, backend="staged") as world:
        yield world


def calls(rank: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """This rank's result of each collective, from tensors that encode sender and receiver."""
    mine = torch.arange(8).view(4, 2).to(dtype) + 10 * rank
    found = {}
    for name, operation in (("sum", dist.ReduceOp.SUM), ("max", dist.ReduceOp.MAX)):
        found[name] = mine.clone()
        dist.all_reduce(found[name], op=operation)
    found["broadcast"] = mine.clone()
    dist.broadcast(found["broadcast"], src=2)
    found["gather"] = torch.empty(16, 2, dtype=dtype)
    dist.all_gather_into_tensor(found["gather"], mine)
    found["scatter"] = torch.empty(1, 2, dtype=dtype)
    dist.reduce_scatter_tensor(found["scatter"], mine)
    found["exchange"] = torch.empty_like(mine)
    dist.all_to_all_single(found["exchange"], mine)
    found["uneven"] = torch.empty(4 * (rank + 1), 2, dtype=dtype)  # rank r gives r' + 1 rows to rank r'
    given = torch.cat([torch.full((to + 1, 2), 10 * rank + to).to(dtype) for to in range(4)])
    dist.all_to_all_single(found["uneven"], given, [rank + 1] * 4, [1, 2, 3, 4])
    found["ring"] = torch.empty_like(mine)
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, mine, (rank + 1) % 4), dist.P2POp(dist.irecv, found["ring"], (rank - 1) % 4)]
    )
    for work in works:
        work.wait()
    dist.barrier()
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_calls(world: World, dtype: torch.dtype) -> None:
    each = [(torch.arange(8).view(4, 2) + 10 * rank) for rank in range(4)]
    for rank, got in enumerate(world.run(calls, dtype)):
        want = {
            "sum": sum(each),
            "max": each[3],
            "broadcast": each[2],
            "gather": torch.cat(each),
            "scatter": sum(each)[rank : rank + 1],
            "exchange": torch.stack([x[rank] for x in each]),
            "uneven": torch.cat([torch.full((rank + 1, 2), 10 * sender + rank) for sender in range(4)]),
            "ring": each[(rank - 1) % 4],
        }
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], x.to(dtype)) for name, x in want.items()), rank


def backends_of_parts(rank: int) -> list[str]:
    grid = build_grid(GridSizes(pp=2, cp=2))
    groups = [*split_group(grid, "cp", 2), embedding_group(grid)]
    return [dist.get_backend(group) for group in groups]


def test_parts_of_an_axis_have_its_backend(world: World) -> None:
    """The device's default, NCCL, refuses several ranks on one GPU."""
    assert world.run(backends_of_parts) == [["staged"] * 3] * 4


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2])
def test_the_cells_of_the_table_over_it(tmp_path: Path, ranks: int) -> None:
    flags = [
        *FLAGS,
        "--data-path",
        str(write_corpus(tmp_path)),
        "--data-cache-path",
        str(tmp_path / "cache"),
        "--device",
        "cpu",
    ]
    with World(ranks, backend="staged") as world:
        results = world.run(all_cells, [*flags, "--dtype", "fp32"], ranks, "cpu", timeout=500.0)[0]
    assert len(results) >= 8
    assert [title for title, passed, _ in results if not passed] == []


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "layout", ["dp_shard 2 x cp 2", *(pytest.param(x, marks=pytest.mark.full) for x in ("tp 2 x cp 2", "pp 2 x cp 2"))]
)
def test_the_model_over_it(world: World, layout: str) -> None:
    for errors in world.run(check_layout, layout, "fp64", "thd", 1, {}):
        assert worst(errors) <= 1e-10, errors
