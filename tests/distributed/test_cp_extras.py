"""Around context-parallel attention: agreement of ranks, recompute, several rows."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from cp.attention import build_attention
from cp.packed_seq import build_packed_seq
from cp.placement import degree_chain
from cp.support import AttentionChoice, cells
from parallel.collectives import WaitClock
from parallel.grid import Grid, GridSizes, build_grid, embedding_group, neighbour_groups, split_group
from runtime.consistency import check_agreement, verify_weights
from runtime.distributed import check_ranks_agree
from tests.world import RankError, World


@pytest.fixture(scope="module")
def world():
    with World(4) as world:
        yield world


@functools.cache
def grid_of(**sizes: int) -> Grid:
    return build_grid(GridSizes(**sizes))


def disagree(rank: int, axis: str, odd: int) -> None:
    grid = grid_of(dp_replicate=2, cp=2)
    check_agreement(-7 if rank == odd else 5, grid, axis, "the rows", torch.device("cpu"))


def test_a_rank_that_differs_is_named(world: World) -> None:
    world.run(disagree, "cp", 99)
    with pytest.raises(RankError, match=r"the rows differ along cp: ranks \[3\] from rank 2"):
        world.run(disagree, "cp", 3)
    with pytest.raises(RankError, match=r"the rows differ along dp_replicate: ranks \[3\] from rank 1"):
        world.run(disagree, "dp_replicate", 3)


class OneWeight(torch.nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([value, 1.0]))


def flipped(rank: int) -> None:
    verify_weights(OneWeight(1.0 if rank != 2 else 1.0 + 2**-23), grid_of(dp_replicate=4), torch.device("cpu"))


def test_one_flipped_bit_in_a_replica_is_found(world: World) -> None:
    with pytest.raises(RankError, match=r"the weights of weight differ along dp_replicate: ranks \[2\] from rank 0"):
        world.run(flipped)


class TiedWeight(torch.nn.Module):
    def __init__(self, value: float, name: str) -> None:
        super().__init__()
        self.embedding = torch.nn.Linear(2, 1, bias=False)
        self.register_parameter(name, torch.nn.Parameter(torch.tensor([7.0 * len(name)])))  # a stage's own
        with torch.no_grad():
            self.embedding.weight.copy_(torch.tensor([[value, 1.0]]))


def tied_apart(rank: int, odd: int) -> None:
    grid = grid_of(pp=2, dp_shard=2)
    model = TiedWeight(1.0 if rank != odd else 1.0 + 2**-23, "first" if grid.rank("pp") == 0 else "last_")
    verify_weights(model, grid, torch.device("cpu"), tied_group=embedding_group(grid))


def test_a_tied_copy_that_differs_is_found(world: World) -> None:
    world.run(tied_apart, 99)
    with pytest.raises(
        RankError, match=r"embedding.weight differ along pp, between its ends,: ranks \[3\] from rank 1 .* not known"
    ):
        world.run(tied_apart, 3)


@functools.cache
def a2a_groups(size: int):
    return split_group(grid_of(cp=4), "cp", size)


@functools.cache
def degree_groups():
    return neighbour_groups(grid_of(cp=4), "cp", degree_chain(4))


def recomputed(rank: int, choice: AttentionChoice, dtype: torch.dtype) -> bool:
    """Two rows, with and without recomputation of attention: bitwise equal gradients."""
    groups = a2a_groups(choice.a2a_size) if choice.a2a_size > 1 else None
    own_ranks = degree_groups() if choice.layout == "hybrid" else None
    attention = build_attention(choice, head_dim=8, a2a_groups=groups, degree_groups=own_ranks)
    group = grid_of(cp=4).group("cp")
    padded = np.array([16, 32]) if choice.qkv_format == "thd" else np.array([24, 24])
    lengths = padded - 3 if choice.qkv_format == "thd" else padded
    results = []
    for recompute in (False, True):
        grads = torch.zeros(12, 4, 8, dtype=dtype)
        for seed in (0, 1):
            packed_seq, _ = build_packed_seq(
                lengths, padded, cp_size=4, cp_rank=rank, qkv_format=choice.qkv_format, layout=choice.layout
            )
            generator = torch.Generator().manual_seed(10 * rank + seed)
            q, k, v = (torch.randn(12, h, 8, generator=generator).to(dtype).requires_grad_() for h in (4, 2, 2))
            call = functools.partial(attention, packed_seq=packed_seq, group=group)
            out = checkpoint(call, q, k, v, use_reentrant=False) if recompute else call(q, k, v)
            out.square().sum().backward()
            grads += q.grad
            grads[:, :2] += k.grad + v.grad
        results.append(grads)
    return torch.equal(*results)


@pytest.mark.parametrize(
    ("choice", "dtype"),
    [
        pytest.param(
            c,
            {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}[d],
            id=f"{c.backend}-{c.method}-{c.qkv_format}-{c.layout}",
        )
        for c, d in cells(device="cpu", cp_size=4, heads=4, groups=2)
        if d == "bf16"
    ],
)
def test_recompute_changes_no_bit(world: World, choice: AttentionChoice, dtype: torch.dtype) -> None:
    assert world.run(recomputed, choice, dtype) == [True] * 4


def waited(rank: int) -> tuple[float, float]:
    clock = WaitClock()
    choice = AttentionChoice(backend="native", method="p2p", qkv_format="thd", layout="zigzag", cp_size=4)
    attention = build_attention(choice, head_dim=8, clock=clock)
    packed_seq, _ = build_packed_seq(np.array([64]), np.array([64]), cp_size=4, cp_rank=rank)
    attention(*(torch.randn(16, h, 8) for h in (4, 2, 2)), packed_seq, grid_of(cp=4).group("cp"))
    return clock.read(), clock.read()


def test_the_clock_counts_waits_and_starts_anew(world: World) -> None:
    for first, second in world.run(waited):
        assert 0 < first < 10 and second == 0


def facts_of(rank: int, odd: int) -> None:
    facts = {"lr": 1e-3, "tokenizer": "a" if rank != odd else "b", "seed": 5 if rank != odd else 6}
    check_ranks_agree(facts, "data")


def test_ranks_that_were_started_otherwise_are_named(world: World) -> None:
    world.run(facts_of, 99)
    with pytest.raises(
        RankError,
        match=r"data differ between ranks: tokenizer, seed .* 'a' on rank 0 but 'b' on rank 2.* from rank 0: 2$",
    ):
        world.run(facts_of, 2)


def times_out(rank: int) -> float:
    """Rank 1 stays away from a collective of a grid's group whose limit is one second."""
    grid = build_grid(GridSizes(dp_shard=2, cp=2), timeout=timedelta(seconds=1))
    start = time.monotonic()
    if rank != 1:
        with contextlib.suppress(RuntimeError):
            dist.all_reduce(torch.ones(1), group=grid.group("loss"))
            return 0.0
    return time.monotonic() - start


def test_a_group_gives_up_after_its_timeout() -> None:
    with World(4) as own:  # its ranks are out of step afterwards
        waited = own.run(times_out, timeout=60)
    assert waited[1] < 1 and all(0.5 < seconds < 30 for rank, seconds in enumerate(waited) if rank != 1), waited


def hang(rank: int, seconds: float) -> int:
    time.sleep(seconds if rank == 1 else 0)
    return os.getpid()


def test_a_world_whose_ranks_are_out_of_step_is_replaced() -> None:
    with World(2) as own:
        first = own.run(hang, 0.0)
        with pytest.raises(RankError, match="rank 1 did not answer"):
            own.run(hang, 30.0, timeout=1.0)
        again = own.run(hang, 0.0)
    assert not set(first) & set(again)
