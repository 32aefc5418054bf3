"""tools/verify.py says yes to what is right and no to each backend when it is broken on purpose."""

from __future__ import annotations

import functools
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

import cp.hybrid
import cp.native_a2a
import cp.native_all_gather
import cp.native_p2p
import data.batch
from config.schema import RunConfig
from parallel.collectives import Transfer
from parallel.grid import Grid, GridSizes, build_grid
from tests.flags import resolve_config
from tests.launch import SMALL, run_torchrun, write_corpus
from tests.world import World
from tools.leak_probe import Leak
from tools.verify import Verifier, cells_of

# Its rows are ragged: documents of one corpus, aligned to 2 * cp.
FLAGS = [*SMALL, "--device", "cpu", "--dtype", "fp64", "--cp-size", "4", "--global-batch-size", "1"]


@pytest.fixture(scope="module")
def world():
    with World(4) as world:
        yield world


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpus")
    return [*FLAGS, "--data-path", str(write_corpus(folder)), "--data-cache-path", str(folder / "cache")]


def resolved(flags: list[str]) -> RunConfig:
    return resolve_config(*flags, world=4)


# ---------------------------------------------------------------------------------------------------
# Ways to break attention


@contextmanager
def stale_kv():
    """K and V of the first hop are used for every hop; gathered K and V are 0."""

    def wait(self, clock=None):
        for work in self.works:
            work.wait()
        return self.sent if self.sent.shape == self.received.shape else self.received.zero_()

    with mock.patch.object(Transfer, "wait", wait):
        yield


@contextmanager
def missing_merge():
    """What comes after the first block is dropped."""
    nothing = lambda out, lse, block_out, block_lse: None  # noqa: E731
    with mock.patch("cp.native_p2p.merge_", nothing), mock.patch("cp.native_all_gather.merge_", nothing):
        yield


@contextmanager
def wrong_positions():
    """Every rank counts positions within its own shard."""
    real = data.batch.build_packed_seq

    def build(*args, **kwargs):
        packed_seq, owned = real(*args, **kwargs)
        packed_seq.positions.copy_(torch.arange(len(packed_seq.positions)))
        return packed_seq, owned

    with mock.patch("data.batch.build_packed_seq", build):
        yield


@contextmanager
def joined_documents(number: int):
    """Document `number` and the next are one, with the padding between: the second sees the first."""
    real = data.batch.build_packed_seq

    def build(lengths, padded_lengths, *, first_ids, **kwargs):
        documents = np.flatnonzero(lengths)
        if kwargs["cp_size"] > 1 and len(documents) > number + 1:
            first, second = documents[number : number + 2]
            kept = np.delete(np.arange(len(lengths)), np.s_[first + 1 : second + 1])
            padded_lengths, first_ids = np.add.reduceat(padded_lengths, kept), first_ids[kept]
            lengths = padded_lengths
        return real(lengths, padded_lengths, first_ids=first_ids, **kwargs)

    with mock.patch("data.batch.build_packed_seq", build):
        yield


def padded_taken_for_real():
    """Padding takes part in attention as if it were text, and the text behind it sees it."""
    return joined_documents(0)


@contextmanager
def seen_future():
    """Attention within a block is not causal."""
    real = cp.native_p2p.block_forward
    blind = lambda q, k, v, block, options: real(q, k, v, replace(block, causal=False), options)  # noqa: E731
    with mock.patch.object(cp.native_p2p, "block_forward", blind):
        yield


@contextmanager
def dropped_dk():
    """One rank's contribution to dK does not arrive."""

    def breaking(module):
        real = module.block_backward

        def backward(*args):
            dq, dk, dv = real(*args)
            return dq, dk * 0 if dist.get_rank() == 1 else dk, dv

        return mock.patch.object(module, "block_backward", backward)

    with breaking(cp.native_p2p), breaking(cp.native_all_gather):
        yield


@contextmanager
def library_loses_a_hop():
    """In the libraries' own rings: what is received is not what was sent."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as torch_cp

    from cp.ring_flash import load_library

    load_library("cpu")
    utils = sys.modules["ring_flash_attn.utils"]
    real_gather = torch_cp._AllGatherRotater.next_buffer
    real_rotate = torch_cp._AllToAllRotater.next_buffer
    real_wait, real_all_gather = utils.RingComm.wait, utils.AllGatherComm.all_gather

    def ring_wait(self):
        received = [op.tensor for op in self._ops if op.op is dist.irecv]
        real_wait(self)
        for x in received:
            x.zero_()

    sent = []

    def all_gather(self, output, x):
        sent.append(x * 0)  # kept alive while it is under way
        real_all_gather(self, output, sent[-1])

    with (
        mock.patch.object(torch_cp._AllGatherRotater, "next_buffer", lambda self: real_gather(self) * 0),
        mock.patch.object(torch_cp._AllToAllRotater, "next_buffer", lambda self: real_rotate(self) * 0),
        mock.patch.object(utils.RingComm, "wait", ring_wait),
        mock.patch.object(utils.AllGatherComm, "all_gather", all_gather),
    ):
        yield


@contextmanager
def lost_local_documents():
    """Documents on one rank are not computed."""
    real = cp.hybrid.build_ring_blocks

    def build(packed_seq, **place):
        blocks = real(packed_seq, **place)
        nothing = replace(blocks.rows, queries=slice(0, 0), padding=None)
        return replace(blocks, steps=[None], rows=nothing) if place["cp_size"] == 1 else blocks

    with mock.patch.object(cp.hybrid, "build_ring_blocks", build):
        yield


BREAKS = {
    "lost_local_documents": lost_local_documents,
    "stale_kv": stale_kv,
    "missing_merge": missing_merge,
    "wrong_positions": wrong_positions,
    "padded_taken_for_real": padded_taken_for_real,
    "joined_1_and_2": partial(joined_documents, 1),
    "seen_future": seen_future,
    "dropped_dk": dropped_dk,
    "library_loses_a_hop": library_loses_a_hop,
}


@functools.cache
def grid_of(dp_shard: int, cp_size: int) -> Grid:
    """Made once in each worker: groups are dear, and stay."""
    return build_grid(GridSizes(dp_shard=dp_shard, cp=cp_size))


@functools.cache
def sound_verifier(flags: tuple[str, ...]) -> tuple[Verifier, RunConfig]:
    """One that has passed the layout unbroken, and so holds one rank's outcomes from before anything is broken."""
    args = resolved([*flags])
    verifier = Verifier(args, grid_of(1, 4), torch.device("cpu"), layers=2, samples=None)
    report = verifier.verify(args)
    assert dist.get_rank() or (report is not None and report.passed), report
    return verifier, args


def verified(rank: int, flags: list[str], broken: str) -> bool | None:
    """Whether verify passes a broken layout; None on ranks other than 0."""
    verifier, args = sound_verifier(tuple(flags))
    with BREAKS[broken]():
        report = verifier.verify(args)
    return None if report is None else report.passed


def leak_of(rank: int, flags: list[str], broken: str) -> Leak | None:
    verifier, args = sound_verifier(tuple(flags))
    with BREAKS[broken]():
        report = verifier.verify(args)
    return None if report is None else report.leak


NATIVE = {"p2p": [], "all_gather": [], "a2a": [], "a2a+p2p": ["--cp-a2a-size", "2"]}
HYBRID = ["--cp-layout", "hybrid", "--micro-batch-size", "8", "--global-batch-size", "8"]


@pytest.mark.parametrize(
    ("method", "broken"),
    [
        ("p2p", "stale_kv"),
        ("p2p", "missing_merge"),
        ("p2p", "wrong_positions"),
        ("p2p", "padded_taken_for_real"),
        ("p2p", "dropped_dk"),
        ("all_gather", "stale_kv"),
        ("all_gather", "missing_merge"),
        ("all_gather", "wrong_positions"),
        ("all_gather", "dropped_dk"),
        ("all_gather", "padded_taken_for_real"),
        ("a2a", "wrong_positions"),
        ("a2a", "dropped_dk"),
        ("a2a", "padded_taken_for_real"),
        ("a2a+p2p", "stale_kv"),
        ("a2a+p2p", "missing_merge"),
        ("a2a+p2p", "dropped_dk"),
        ("a2a+p2p", "wrong_positions"),
    ],
)
def test_broken_native_attention_is_found(world: World, flags: list[str], method: str, broken: str) -> None:
    own = [*flags, "--cp-comm-type", method, *NATIVE[method]]
    assert world.run(verified, own, broken)[0] is False


@pytest.mark.parametrize(
    ("method", "broken"),
    [
        ("p2p", "missing_merge"),
        ("p2p", "wrong_positions"),
        ("p2p", "dropped_dk"),
        ("p2p", "lost_local_documents"),
        ("all_gather", "missing_merge"),
        ("all_gather", "dropped_dk"),
    ],
)
def test_broken_hybrid_attention_is_found(world: World, flags: list[str], method: str, broken: str) -> None:
    assert world.run(verified, [*flags, "--cp-comm-type", method, *HYBRID], broken)[0] is False


@pytest.mark.parametrize("method", NATIVE)
@pytest.mark.parametrize(
    ("broken", "direction"), [("padded_taken_for_real", "changed"), ("joined_1_and_2", "gradients")]
)
def test_joined_documents_leak(world: World, flags: list[str], method: str, broken: str, direction: str) -> None:
    """A change reaches the odd document behind an even one; an odd document gets a gradient from the even behind it."""
    two_samples = ["--global-batch-size", "2", "--micro-batch-size", "2"]
    leak = world.run(leak_of, [*flags, "--cp-comm-type", method, *NATIVE[method], *two_samples], broken)[0]
    assert getattr(leak, direction) > 0 and not leak.passed


def test_a_seen_future_leaks(world: World, flags: list[str]) -> None:
    leak = world.run(leak_of, [*flags, "--cp-comm-type", "p2p"], "seen_future")[0]
    assert leak.changed > 0 and not leak.passed


def test_lost_keys_and_values_are_not_reached() -> None:
    assert Leak(others=9, changed=0, gradients=0, later=10, reached=9).passed
    assert not Leak(others=9, changed=0, gradients=0, later=10, reached=8).passed
    assert not Leak(others=9, changed=1, gradients=0, later=0, reached=0).passed


@pytest.mark.parametrize(
    "library",
    [
        "--cp-backend ring --ring-attn-func zigzag --dtype bf16",
        "--cp-backend ring --ring-attn-func llama3 --dtype fp32",
        "--cp-backend ring --ring-attn-func ring --dtype bf16",
        "--cp-backend ring --ring-attn-func stripe --dtype bf16 --qkv-format bshd",
        "--cp-backend pytorch --cp-rotate-method allgather --qkv-format bshd",
        "--cp-backend pytorch --cp-rotate-method alltoall --qkv-format bshd --cp-layout doc_contiguous",
    ],
)
@pytest.mark.parametrize("broken", ["library_loses_a_hop", "wrong_positions"])
def test_broken_libraries_are_found(world: World, flags: list[str], library: str, broken: str) -> None:
    assert world.run(verified, [*flags, *library.split()], broken)[0] is False


def all_cells(rank: int, flags: list[str], dp_shard: int, cp_size: int) -> list[tuple[str, bool]] | None:
    args = resolved([*flags, "--cp-size", str(cp_size), "--global-batch-size", str(dp_shard)])
    verifier = Verifier(args, grid_of(dp_shard, cp_size), torch.device("cpu"), layers=1, samples=None)
    reports = [verifier.verify(run) for run in cells_of(args)]
    found = [report for report in reports if report is not None]
    assert all(report.leak.others > 0 and report.leak.later > 0 for report in found)
    return None if rank else [(report.title, report.passed) for report in found]


@pytest.mark.parametrize(("dp_shard", "cp_size"), [pytest.param(1, 4, marks=pytest.mark.full), (2, 2)])
def test_every_cell_of_the_table_agrees(world: World, flags: list[str], dp_shard: int, cp_size: int) -> None:
    results = world.run(all_cells, flags, dp_shard, cp_size, timeout=400.0)[0]
    assert len(results) >= 30
    assert [title for title, passed in results if not passed] == []


def test_the_command_ends_with_0_and_writes_json(flags: list[str], tmp_path) -> None:
    out = tmp_path / "v.json"
    result = run_torchrun(4, "tools/verify.py", *flags, "--json", str(out))
    assert result.returncode == 0 and "agrees with one rank" in result.stdout and out.exists(), (
        result.stdout + result.stderr
    )
