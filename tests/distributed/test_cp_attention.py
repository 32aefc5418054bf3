"""The ring against dense attention on one rank: outputs and the gradients of q, k and v."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cp.attention import build_attention
from cp.layout import unshard_indices
from cp.packed_seq import build_packed_seq
from tests.reference import dense_attention, random_documents, relative_error
from tests.world import World

HEADS, HEAD_DIM = 4, 16
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def world():
    with World(4) as world:
        yield world


def bshd(row_length: int, sequences: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.full(sequences, row_length // sequences)
    return lengths, lengths


def documents_of(name: str, cp_size: int) -> tuple[np.ndarray, np.ndarray]:
    unit = 2 * cp_size
    if name == "bshd":
        return bshd(8 * unit, 2)
    if name == "one":
        return bshd(16 * unit, 1)
    if name == "ones":
        return np.ones(6, int), np.full(6, unit)
    if name == "short":  # real tokens end within the first half of some rank's chunks
        return np.array([unit * 4 // 2 - 1, 3, 0]), np.array([unit * 4, unit * 2, unit * 3])
    if name == "empty":
        return np.zeros(2, int), np.array([unit, unit * 2])
    return random_documents(np.random.default_rng(int(name)), 16 * unit, unit)


CASES = ["bshd", "one", "ones", "short", "empty", *map(str, range(8))]


def inputs(total: int, groups: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(total, HEADS), (total, groups), (total, groups), (total, HEADS)]
    return [torch.randn(*s, HEAD_DIM, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


@functools.cache
def first_ranks(size: int) -> dist.ProcessGroup:
    """Made once in each worker."""
    return dist.new_group(list(range(size)))


def run_ring(rank: int, cp_size: int, documents, tensors) -> list[torch.Tensor] | None:
    """The ring over the first cp_size ranks; whole out, dq, dk, dv in row order, on rank 0."""
    group = first_ranks(cp_size)
    if rank >= cp_size:
        return None
    lengths, padded = documents
    packed_seq, owned = build_packed_seq(lengths, padded, cp_size=cp_size, cp_rank=rank)
    q, k, v, dout = (x[torch.from_numpy(owned)] for x in tensors)
    # As in the model, v arrives as a strided view.
    v = torch.stack((v, v), 1)[:, 0]
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = build_attention("native", "p2p", head_dim=HEAD_DIM)(q, k, v, packed_seq, group)
    out.backward(dout)
    order = torch.from_numpy(unshard_indices(padded, cp_size=cp_size, layout="zigzag"))
    whole = []
    for x in (out.detach(), q.grad, k.grad, v.grad):
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(cp_size)]
        dist.all_gather(parts, x.contiguous(), group=group)
        whole.append(torch.cat(parts)[order])
    return whole


def check_case(rank: int, cp_size: int, name: str, groups: int, dtype: torch.dtype) -> dict[str, float]:
    documents = documents_of(name, cp_size)
    tensors = inputs(int(documents[1].sum()), groups, dtype)
    whole = run_ring(rank, cp_size, documents, tensors)
    if whole is None or rank:
        return {}
    q, k, v, dout = (x.double().clone().requires_grad_() for x in tensors)
    want = dense_attention(q, k, v, *documents, scale=HEAD_DIM**-0.5)
    want.backward(dout.detach())
    wanted = (want.detach(), q.grad, k.grad, v.grad)
    names = ("out", "dq", "dk", "dv")
    return {n: relative_error(g, w) for n, g, w in zip(names, whole, wanted, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_ring_equals_dense_attention(world: World, cp_size: int, dtype: torch.dtype) -> None:
    for name in CASES:
        for groups in (1, 2, HEADS):
            errors = world.run(check_case, cp_size, name, groups, dtype)[0]
            assert len(errors) == 4
            assert max(errors.values()) <= LIMITS[dtype], (name, groups, errors)


@pytest.mark.parametrize("cp_size", [2, 4])
def test_bf16_ring_is_as_close_as_one_rank(world: World, cp_size: int) -> None:
    """Documents of the same tokens; the error may be at most four times that of one rank in bf16."""
    for name in ("one", "1", "2", "3"):
        documents = documents_of(name, cp_size)
        errors = world.run(check_bf16, cp_size, documents)[0]
        for ours, one_rank in errors:
            assert ours <= 4 * one_rank, (name, errors)


def check_bf16(rank: int, cp_size: int, documents) -> list[tuple[float, float]]:
    tensors = inputs(int(documents[1].sum()), 2, torch.bfloat16)
    ring = run_ring(rank, cp_size, documents, tensors)
    alone = run_ring(rank, 1, documents, tensors)
    if rank:
        return []
    q, k, v, dout = (x.double().clone().requires_grad_() for x in tensors)
    want = dense_attention(q, k, v, *documents, scale=HEAD_DIM**-0.5)
    want.backward(dout.detach())
    wanted = (want.detach(), q.grad, k.grad, v.grad)
    return [(relative_error(r, w), relative_error(a, w)) for r, a, w in zip(ring, alone, wanted, strict=True)]


def check_isolation(rank: int, cp_size: int, dtype: torch.dtype) -> bool:
    """Other values in document 1 leave outputs and gradients of documents 0 and 2 bit for bit as they were."""
    unit = 2 * cp_size
    documents = np.array([3 * unit - 1, 2 * unit, unit + 1]), np.array([3 * unit, 2 * unit, 3 * unit])
    first = inputs(8 * unit, 2, dtype)
    second = [x.clone() for x in first]
    for x, other in zip(second, inputs(8 * unit, 2, dtype, seed=1), strict=True):
        x[3 * unit : 5 * unit] = other[3 * unit : 5 * unit]
    before, after = run_ring(rank, cp_size, documents, first), run_ring(rank, cp_size, documents, second)
    others = torch.ones(8 * unit, dtype=torch.bool)
    others[3 * unit : 5 * unit] = False
    if before is None or after is None:
        return True
    changed = any(not torch.equal(b[~others], a[~others]) for b, a in zip(before, after, strict=True))
    return changed and all(torch.equal(b[others], a[others]) for b, a in zip(before, after, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cp_size", [1, 4])
def test_documents_do_not_see_each_other(world: World, cp_size: int, dtype: torch.dtype) -> None:
    assert all(world.run(check_isolation, cp_size, dtype))


def check_padding_is_inert(rank: int, cp_size: int) -> bool:
    """Values in padding change nothing, and their gradients are exactly 0."""
    unit = 2 * cp_size
    documents = np.array([unit + 1, 5, 0]), np.array([2 * unit, unit, 3 * unit])
    padding = torch.ones(6 * unit, dtype=torch.bool)
    padding[: unit + 1] = False
    padding[2 * unit : 2 * unit + min(5, unit)] = False
    documents[0][1] = min(5, unit)
    first = inputs(6 * unit, 2, torch.float32)
    second = [x.clone() for x in first]
    for x in second:
        x[padding] = 1e4
    before, after = run_ring(rank, cp_size, documents, first), run_ring(rank, cp_size, documents, second)
    if before is None or after is None:
        return True
    same = all(torch.equal(b, a) for b, a in zip(before, after, strict=True))
    return same and all((b[padding] == 0).all().item() for b in before)


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_padding_is_inert(world: World, cp_size: int) -> None:
    assert all(world.run(check_padding_is_inert, cp_size))
