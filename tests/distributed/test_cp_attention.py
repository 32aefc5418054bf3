"""Every cell of cp/support.py's table against dense attention on one rank: outputs and the gradients of q, k and v."""

from __future__ import annotations

import functools
import itertools
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

import cp.blocks
from cp.attention import build_attention
from cp.layout import document_unit
from cp.packed_seq import build_packed_seq
from cp.placement import PlacedRow, Placement, degree_chain, degree_unit, pad_to
from cp.support import AttentionChoice, cells
from parallel.grid import Grid, GridSizes, build_grid, neighbour_groups, split_group
from planner.estimate import count_gathered, cp_bytes
from tests.reference import BF16_ROUNDING, dense_attention, random_documents, relative_error, unshard_indices
from tests.world import World

HEADS, HEAD_DIM = 4, 16
CUDA_CELLS = "native", "thd", "fp64"
LIMITS = {"fp64": 1e-10, "fp32": 1e-5}
Documents = tuple[np.ndarray, np.ndarray, Placement | None]
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def world():
    with World(4) as world:
        yield world


def whole(count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.full(count, length)
    return lengths, lengths


def documents_of(name: str, unit: int, cp_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Real and padded lengths; padded ones are multiples of `unit`, the row of 2 * cp."""
    if name == "two":
        return whole(2, 16 * cp_size)
    if name == "one":
        return whole(1, 32 * cp_size)
    if name == "ones":
        return np.ones(2 * cp_size, int), np.full(2 * cp_size, unit)
    if name == "empty":
        return np.zeros(2, int), np.array([2 * cp_size, 4 * cp_size])
    return random_documents(np.random.default_rng(int(name)), 32 * cp_size, unit)


def place_at(lengths, degrees, first_ranks, cp_size: int) -> PlacedRow:
    """A hybrid row of documents on these ranks; fillers make all ranks equal."""
    lengths, degrees, first_ranks = (np.asarray(x, np.int64) for x in (lengths, degrees, first_ranks))
    padded, used = pad_to(lengths, degree_unit(degrees)), np.zeros(cp_size, np.int64)
    for first, degree, length in zip(first_ranks, degrees, padded, strict=True):
        used[first : first + degree] += length // degree
    room = used.max() + 1 - used
    places = Placement(
        degrees=np.concatenate((degrees, np.ones(cp_size, np.int64))),
        first_ranks=np.concatenate((first_ranks, np.arange(cp_size))),
    )
    return PlacedRow(np.concatenate((lengths, np.zeros(cp_size, np.int64))), np.concatenate((padded, room)), places)


def mixed_degrees(name: str, cp_size: int) -> PlacedRow:
    """Documents of random degrees on random ranks: some ranks hold none, some lengths fill no chunk."""
    rng, count = np.random.default_rng(ord(name[0])), {"empty": 0, "one": 1, "two": 2}.get(name, 3 * cp_size)
    degrees = rng.choice(degree_chain(cp_size), count)
    if name == "one":
        degrees[:] = cp_size
    lengths = np.ones(count, int) if name == "ones" else rng.integers(1, 8 * degrees + 1)
    return place_at(lengths, degrees, rng.integers(0, cp_size // degrees) * degrees, cp_size)


THD_CASES = ["two", "one", "ones", "empty", *map(str, range(5))]


def documents_for(choice: AttentionChoice, name: str) -> Documents:
    """Real lengths, padded lengths, and the placement of a hybrid row."""
    if choice.layout == "hybrid":
        return mixed_degrees(name, choice.cp_size)
    return *documents_of(name, document_unit(choice.layout, choice.cp_size), choice.cp_size), None


def cases(choice: AttentionChoice) -> list[str]:
    return ["two", "one"] if choice.qkv_format == "bshd" else THD_CASES


def inputs(total: int, groups: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(total, HEADS), (total, groups), (total, groups), (total, HEADS)]
    return [torch.randn(*s, HEAD_DIM, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def real_rows(documents) -> torch.Tensor:
    """[T] bool: not padding."""
    return torch.from_numpy(np.concatenate([np.arange(p) < n for n, p in zip(*documents[:2], strict=True)]))


@functools.cache
def grid_of(cp_size: int) -> Grid:
    """The grid of cp groups of this size over all ranks. Cached per worker, because groups are never freed."""
    return build_grid(GridSizes(dp_shard=dist.get_world_size() // cp_size, cp=cp_size))


@functools.cache
def a2a_groups(cp_size: int, a2a_size: int):
    return split_group(grid_of(cp_size), "cp", a2a_size)


@functools.cache
def degree_groups(cp_size: int):
    return neighbour_groups(grid_of(cp_size), "cp", degree_chain(cp_size))


def run_attention(choice: AttentionChoice, documents, tensors) -> list[torch.Tensor]:
    """out, dq, dk, dv of the whole row in order, on every rank; all cp groups compute the same."""
    grid = grid_of(choice.cp_size)
    group, rank = grid.group("cp"), grid.rank("cp")
    groups = a2a_groups(choice.cp_size, choice.a2a_size) if choice.a2a_size > 1 else None
    attention = build_attention(
        choice, head_dim=HEAD_DIM, a2a_groups=groups, degree_groups=degree_groups(choice.cp_size)
    )
    lengths, padded, placement = documents
    place = dict(cp_size=choice.cp_size, layout=choice.layout, placement=placement)
    packed_seq, owned = build_packed_seq(lengths, padded, cp_rank=rank, qkv_format=choice.qkv_format, **place)
    q, k, v, dout = (x[torch.from_numpy(owned)] for x in tensors)
    v = torch.stack((v, v), 1)[:, 0]  # a strided view, as in the model
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    # No gradient ever flows into padding: nothing of it is in the loss.
    dout = dout * real_rows(documents)[owned][:, None, None]
    out = attention(q, k, v, packed_seq, group)
    out.backward(dout)
    order = torch.from_numpy(unshard_indices(padded, **place))
    gathered = []
    for x in (out.detach(), q.grad, k.grad, v.grad):
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(choice.cp_size)]
        dist.all_gather(parts, x.contiguous(), group=group)
        gathered.append(torch.cat(parts)[order])
    return gathered


def wanted(documents, tensors) -> list[torch.Tensor]:
    """out, dq, dk, dv in float64 on one rank."""
    q, k, v, dout = (x.to(torch.float64, copy=True).requires_grad_() for x in tensors)
    out = dense_attention(q, k, v, *documents[:2], scale=HEAD_DIM**-0.5)
    out.backward(dout.detach())
    return [out.detach(), q.grad, k.grad, v.grad]


def errors_of(rank: int, choice: AttentionChoice, name: str, groups: int, dtype: str) -> list[float]:
    documents = documents_for(choice, name)
    tensors = inputs(int(documents[1].sum()), groups, DTYPES[dtype])
    got, real = run_attention(choice, documents, tensors), real_rows(documents)[:, None, None]
    return [relative_error(g * real, w) for g, w in zip(got, wanted(documents, tensors), strict=True)]


def all_cells(cp_size: int) -> list:
    return [
        pytest.param(
            choice,
            dtype,
            id=f"cp{cp_size}-{choice.backend}-{choice.method}-{choice.qkv_format}-{choice.layout}-{dtype}",
        )
        for choice, dtype in cells(device="cpu", cp_size=cp_size, heads=HEADS, groups=2)
    ]


ALL_CELLS = [cell for cp_size in (1, 2, 4) for cell in all_cells(cp_size)]


@pytest.mark.parametrize(("choice", "dtype"), [c for c in ALL_CELLS if c.values[1] != "bf16"])
def test_attention_equals_one_rank(world: World, choice: AttentionChoice, dtype: str) -> None:
    for number, name in enumerate(cases(choice)):
        for groups in (1, 2, HEADS)[number % 3 :][:2] or (1,):
            for errors in world.run(errors_of, choice, name, groups, dtype):
                assert len(errors) == 4 and max(errors) <= LIMITS[dtype], (name, groups, errors)


def bf16_errors(rank: int, choice: AttentionChoice, name: str) -> list[float]:
    """Errors against float64 of the output and the gradients."""
    documents = documents_for(choice, name)
    tensors = inputs(int(documents[1].sum()), 2, torch.bfloat16)
    real, want = real_rows(documents)[:, None, None], wanted(documents, tensors)
    return [relative_error(x * real, w) for x, w in zip(run_attention(choice, documents, tensors), want, strict=True)]


@pytest.mark.parametrize(("choice", "dtype"), [c for c in ALL_CELLS if c.values[1] == "bf16"])
def test_bf16_is_as_close_as_rounding_allows(world: World, choice: AttentionChoice, dtype: str) -> None:
    for name in cases(choice):
        if name == "empty":
            continue
        for errors in world.run(bf16_errors, choice, name):
            assert max(errors) <= 8 * BF16_ROUNDING, (name, errors)


def check_isolation(rank: int, choice: AttentionChoice, dtype: str) -> bool:
    """Other values in document 1 change no bit of the outputs and gradients of documents 0 and 2."""
    unit = 2 * choice.cp_size
    documents: Documents = np.array([3 * unit - 1, 2 * unit, unit + 1]), np.array([3 * unit, 2 * unit, 3 * unit]), None
    if choice.layout == "hybrid":  # documents 0 and 1 share their ranks, document 2 lies on the last one
        size = choice.cp_size
        documents = place_at([3 * unit, 2 * unit, unit + 1], [size, size, 1], [0, 0, size - 1], size)
    total = int(documents[1].sum())
    first = inputs(total, 2, DTYPES[dtype])
    second = [x.clone() for x in first]
    for x, other in zip(second, inputs(total, 2, DTYPES[dtype], seed=1), strict=True):
        x[3 * unit : 5 * unit] = other[3 * unit : 5 * unit]
    before, after = run_attention(choice, documents, first), run_attention(choice, documents, second)
    others = real_rows(documents)
    others[3 * unit : 5 * unit] = False
    inside = torch.zeros_like(others)
    inside[3 * unit : 5 * unit] = True
    changed = any(not torch.equal(b[inside], a[inside]) for b, a in zip(before, after, strict=True))
    return changed and all(torch.equal(b[others], a[others]) for b, a in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("choice", "dtype"), [c for c in ALL_CELLS if c.values[0].qkv_format == "thd" and c.values[0].cp_size != 2]
)
def test_documents_do_not_see_each_other(world: World, choice: AttentionChoice, dtype: str) -> None:
    assert all(world.run(check_isolation, choice, dtype))


def check_padding_is_inert(rank: int, choice: AttentionChoice) -> bool:
    """Values in padding change no real token; if padding is not computed, its results are exactly 0."""
    unit = 2 * choice.cp_size
    documents: Documents = np.array([unit + 1, min(5, unit), 0]), np.array([2 * unit, unit, 3 * unit]), None
    if choice.layout == "hybrid":
        documents = place_at([unit + 1, 5], [choice.cp_size, 1], [0, 0], choice.cp_size)
    real = real_rows(documents)
    dtype = torch.bfloat16 if choice.backend == "ring" else torch.float32
    first = inputs(len(real), 2, dtype)
    second = [x.clone() for x in first]
    for x in second:
        x[~real] = 100.0
    before, after = run_attention(choice, documents, first), run_attention(choice, documents, second)
    same = all(torch.equal(b[real], a[real]) for b, a in zip(before, after, strict=True))
    return same and (choice.backend == "ring" or all((b[~real] == 0).all().item() for b in before))


@pytest.mark.parametrize(
    "choice", [c.values[0] for c in ALL_CELLS if c.values[0].qkv_format == "thd" and c.values[1] == "bf16"], ids=str
)
def test_padding_is_inert(world: World, choice: AttentionChoice) -> None:
    assert all(world.run(check_padding_is_inert, choice))


# ---------------------------------------------------------------------------------------------------
# The branches of CUDA: rows without gaps, padding computed with its document. A stand-in for the flash operators.


def _segments(*lengths: torch.Tensor) -> list[tuple[slice, slice]]:
    bounds = [list(itertools.pairwise(cu.tolist())) for cu in lengths]
    return [(slice(*q), slice(*k)) for q, k in zip(*bounds, strict=True)]


def _scores(q, k, causal: bool, scale: float) -> torch.Tensor:
    """[h, queries, keys]"""
    assert not causal or len(q) == len(k)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf) if causal else scores


def flash_forward(q, k, v, cu_q, cu_k, max_q, max_k, rate, causal, debug, *, scale):
    assert (cu_q[-1], cu_k[-1]) == (len(q), len(k)) and max_q >= cu_q.diff().max() and max_k >= cu_k.diff().max()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out, lse = torch.full_like(q, torch.nan), q.new_full((q.shape[1], len(q)), torch.nan)
    for at_q, at_k in _segments(cu_q, cu_k):
        if at_q.stop > at_q.start:
            assert at_k.stop > at_k.start, "the kernels' lse of no key differs"
            scores = _scores(q[at_q], k[at_k], causal, scale)
            lse[:, at_q] = scores.logsumexp(-1)
            out[at_q] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[at_k])
    return out, lse


def flash_backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, rate, causal, seed, unused, *, scale):
    groups, heads = k.shape[1], q.shape[1]
    k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
    dq, dk, dv = torch.full_like(q, torch.nan), torch.zeros_like(k), torch.zeros_like(v)
    for at_q, at_k in _segments(cu_q, cu_k):
        weights = (_scores(q[at_q], k[at_k], causal, scale) - lse[:, at_q, None]).exp()
        delta = (dout[at_q] * out[at_q]).sum(-1).T[..., None]
        dscores = weights * (torch.einsum("qhd,khd->hqk", dout[at_q], v[at_k]) - delta) * scale
        dq[at_q] = torch.einsum("hqk,khd->qhd", dscores, k[at_k])
        dk[at_k] = torch.einsum("hqk,qhd->khd", dscores, q[at_q])
        dv[at_k] = torch.einsum("hqk,qhd->khd", weights, dout[at_q])
    return dq, *(x.unflatten(1, (groups, -1)).sum(2) for x in (dk, dv))


def cuda_errors(rank: int, choice: AttentionChoice, name: str, groups: int, most: float) -> list[float]:
    """Errors of real tokens, and what padding gives: 0 whatever arrives in it."""
    documents = documents_for(choice, name)
    tensors, real = inputs(int(documents[1].sum()), groups, torch.float64), real_rows(documents)[:, None, None]
    with (
        mock.patch.object(cp.blocks, "takes_cu_seqlens", lambda device: True),
        mock.patch.object(cp.blocks, "MAX_PADDING", most),
        mock.patch.object(torch.ops.aten, "_flash_attention_forward", flash_forward),
        mock.patch.object(torch.ops.aten, "_flash_attention_backward", flash_backward),
        mock.patch(f"{__name__}.real_rows", lambda documents: torch.ones(len(real), dtype=torch.bool)),
    ):
        got = run_attention(choice, documents, tensors)
    wants = wanted(documents, [*tensors[:3], tensors[3] * real])
    assert all((x * ~real == 0).all() for x in got)
    return [relative_error(x, want) for x, want in zip(got, wants, strict=True)]


@pytest.mark.parametrize("most", [1.0, 1e9], ids=["real tokens", "with padding"])
@pytest.mark.parametrize(
    "choice",
    [c.values[0] for c in ALL_CELLS if (c.values[0].backend, c.values[0].qkv_format, c.values[1]) == CUDA_CELLS],
    ids=str,
)
def test_the_branches_of_cuda_equal_one_rank(world: World, choice: AttentionChoice, most: float) -> None:
    for number, name in enumerate(THD_CASES):
        for stride in {1, 2 if choice.method == "all_gather" else 1}:
            for errors in world.run(
                cuda_errors, replace(choice, heads_k_stride=stride), name, 2 + number % 2 * 2, most
            ):
                assert max(errors) <= LIMITS["fp64"], (name, errors)


# ---------------------------------------------------------------------------------------------------
# all_gather sends what is needed


def sent_bytes(rank: int, choice: AttentionChoice, documents) -> tuple[int, int]:
    """Bytes that this rank sends forward and backward, counted and by the formula."""
    from benchmarks.cp_attention import counting_sent

    sent = [0]
    with counting_sent(sent):
        run_attention(choice, documents, inputs(int(documents[1].sum()), 2, torch.float32))
    shape = dict(tokens=int(documents[1].sum()) // 4, heads=HEADS, groups=2, head_dim=HEAD_DIM, item=4)
    gathered = count_gathered(*documents[:2], cp_size=4, layout=choice.layout)[rank].tolist()
    return sent[0], sum(cp_bytes(choice, **shape, gathered=gathered))


@pytest.mark.parametrize(("layout", "most"), [("contiguous", 0.1), ("zigzag", 0.76)])
def test_all_gather_sends_only_what_is_needed(world: World, layout: str, most: float) -> None:
    lengths = np.array([40, *[64] * 31, 24])
    documents = lengths, -(-lengths // 8) * 8, None
    choice = AttentionChoice(backend="native", method="all_gather", qkv_format="thd", layout=layout, cp_size=4)
    counted, formula = zip(*world.run(sent_bytes, choice, documents), strict=True)
    assert counted == formula
    whole_row = 3 * 2 * (2048 // 4) * 2 * HEAD_DIM * (4 + 4 + 4)  # K and V to three ranks, twice, and gradients
    assert 0 < sum(counted) <= most * 4 * whole_row
    assert max(world.run(errors_of_documents, choice, documents)[0]) <= 1e-10


def errors_of_documents(rank: int, choice: AttentionChoice, documents) -> list[float]:
    tensors = inputs(int(documents[1].sum()), 2, torch.float64)
    got = run_attention(choice, documents, tensors)
    return [relative_error(g, w) for g, w in zip(got, wanted(documents, tensors), strict=True)]


# ---------------------------------------------------------------------------------------------------
# The ring-flash-attn library: the fault that its refusals rest on, and its import


def fp32_errors(rank: int, choice: AttentionChoice) -> list[float]:
    return errors_of(rank, choice, "one", 2, "fp32")


@pytest.mark.parametrize(("method", "layout"), [("zigzag", "zigzag"), ("ring", "doc_contiguous")])
def test_the_librarys_fp32_gradients_are_still_wrong(world: World, method: str, layout: str) -> None:
    """If this fails, a new release fixed `.to(torch.float32)`: allow fp32 in cp/support.py."""
    choice = AttentionChoice(backend="ring", method=method, qkv_format="thd", layout=layout, cp_size=4)
    out, *grads = world.run(fp32_errors, choice)[0]
    assert out <= 1e-5 and max(grads) > 0.1


def import_leaves_nothing_behind(rank: int) -> list[str]:
    from cp.ring_flash import load_library

    load_library("cpu")
    return [
        name
        for name in sys.modules
        if name == "flash_attn" or name.startswith(("flash_attn.", "ring_flash_attn.adapters"))
    ]


def test_stand_ins_are_gone_after_the_import(world: World) -> None:
    assert world.run(import_leaves_nothing_behind) == [[]] * 4


def options_after(rank: int) -> list:
    from torch.distributed.tensor.experimental._context_parallel import _attention as torch_cp

    options = torch_cp._cp_options
    before = (options.rotate_method, options.enable_load_balance, options.convert_to_f32)
    choice = AttentionChoice(
        backend="pytorch", method="alltoall", qkv_format="bshd", layout="doc_contiguous", cp_size=4
    )
    errors_of(rank, choice, "one", 2, "fp64")
    return [before, (options.rotate_method, options.enable_load_balance, options.convert_to_f32)]


def test_pytorchs_global_options_are_put_back(world: World) -> None:
    before, after = world.run(options_after)[0]
    assert before == after
