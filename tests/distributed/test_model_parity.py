"""The whole model over four ranks in every layout against one rank's float64 code that shares nothing with it.

Loss, every parameter's gradient, the gradient norm and the weights after AdamW steps; rows hold unequal
numbers of labelled tokens, so a wrong divisor or an average where a sum belongs shows.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from cp.attention import build_attention
from cp.packed_seq import build_packed_seq
from cp.plan import AttentionChoice
from data.loader import Sequence, build_batch
from model.config import GPTConfig
from model.gpt import GPT
from model.init import initial_rows, initialise
from parallel.collectives import sum_over
from parallel.fsdp import clip_grad_norm_, local_tensor, shard_model
from parallel.grid import Grid, GridSizes, build_grid
from tests.reference import random_documents, reference_loss, relative_error
from tests.world import World
from training.optimizer import build_optimizer
from training.step import forward_backward

ROWS, ROW_LENGTH, ALIGNMENT, SEED = 4, 64, 8, 7
LAYOUTS = {
    "dp_shard 4": GridSizes(dp_shard=4),
    "dp_shard 2 x cp 2": GridSizes(dp_shard=2, cp=2),
    "dp_replicate 2 x cp 2": GridSizes(dp_replicate=2, cp=2),
    "dp_replicate 2 x dp_shard 2": GridSizes(dp_replicate=2, dp_shard=2),
    "cp 4": GridSizes(cp=4),
}
P2P = {f: AttentionChoice(backend="native", method="p2p", qkv_format=f, layout="zigzag", cp_size=1) for f in ("thd", "bshd")}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


@functools.cache
def grid_of(layout: str) -> Grid:
    """Made once in each worker: groups are dear, and stay."""
    return build_grid(LAYOUTS[layout])


@pytest.fixture(scope="module")
def world():
    with World(4) as world:
        yield world


def config_of(**changes) -> GPTConfig:
    shape = dict(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        vocab_size=61,
        padded_vocab_size=64,
        init_std=0.2,
    )
    return GPTConfig(**(shape | changes))


def rows_of(qkv_format: str) -> list[Sequence]:
    rng = np.random.default_rng(3)
    rows = []
    for row in range(ROWS):
        if qkv_format == "bshd":
            lengths = padded = np.array([ROW_LENGTH])
        else:
            lengths, padded = random_documents(rng, ROW_LENGTH, ALIGNMENT)
        tokens, labels = rng.integers(0, 61, ROW_LENGTH), rng.integers(0, 61, ROW_LENGTH)
        real = np.concatenate([np.arange(p) < n for n, p in zip(lengths, padded, strict=True)])
        labels[~real] = -100
        labels[rng.random(ROW_LENGTH) < 0.2 * row] = -100  # rows weigh differently
        rows.append(Sequence(tokens, labels, lengths, padded))
    return rows


def built(grid: Grid, config: GPTConfig, dtype: str, reshard: bool = False, qkv_format: str = "thd") -> GPT:
    compute = DTYPES[dtype]
    with torch.device("meta"):
        model = GPT(
            config,
            attention=build_attention(P2P[qkv_format], head_dim=config.kv_channels),
            cp_group=grid.group("cp"),
            dtype=torch.float64 if dtype == "fp64" else torch.float32,
            loss_chunk_size=24,
        )
    shard_model(model, model.layers, grid, device_type="cpu", compute_dtype=compute, reshard_after_forward=reshard)
    initialise(model, config, seed=SEED, device=torch.device("cpu"))
    return model


def full(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def run_steps(
    model: GPT, grid: Grid, rows: list[Sequence], micro_batch: int, steps: int, reshard: bool = False, qkv_format: str = "thd"
) -> dict:
    """`steps` AdamW steps on the same rows; facts of the first step and of the end."""
    optimizer = build_optimizer(model, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    size, rank = grid.size("batch"), grid.rank("batch")
    groups = [rows[i : i + micro_batch] for i in range(0, ROWS, micro_batch)]
    mine = groups[rank::size]
    place = dict(cp_size=grid.size("cp"), cp_rank=grid.rank("cp"), layout="zigzag")
    batches = [build_batch(g, qkv_format=qkv_format, **place) for g in mine]
    tokens = sum_over(torch.tensor(float(sum(b.loss_tokens for b in batches)), dtype=torch.float64), grid.group("batch"))
    result: dict = {}
    for step in range(steps):
        total = forward_backward(model, batches, loss_tokens=tokens, device=torch.device("cpu"), reshard_between=reshard)
        loss = (sum_over(total, grid.group("loss")) / tokens).item()
        grads = {n: full(p.grad).clone() for n, p in model.named_parameters()} if step == 0 else None
        norm = clip_grad_norm_(model.parameters(), grid, max_norm=1.0).item()
        if grads is not None:
            result = {"loss": loss, "grads": grads, "norm": norm, "clipped": full(next(model.parameters()).grad).clone()}
        optimizer.step()
        optimizer.zero_grad()
    result["weights"] = {n: full(p.detach()) for n, p in model.named_parameters()}
    return result


def oracle(config: GPTConfig, rows: list[Sequence], names_and_shapes) -> dict:
    """Loss and gradients of the same rows on one rank in float64."""
    weights = {}
    for name, shape in names_and_shapes.items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape, dtype=torch.float64)
        else:
            scale = (2 * config.num_layers) ** 0.5 if name.endswith(("attention.output.weight", "fc2_weight")) else 1.0
            weights[name] = initial_rows(SEED, name, 0, shape[0], shape[1], config.init_std / scale).double()
        weights[name].requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for row in rows:
        labels = torch.from_numpy(row.labels)
        total = total + reference_loss(weights, config, torch.from_numpy(row.tokens), labels, row.lengths, row.padded_lengths)
        count += int((labels >= 0).sum())
    loss = total / count
    loss.backward()
    grads = {n: w.grad for n, w in weights.items()}
    norm = torch.stack([g.norm() for g in grads.values()]).norm().item()
    return {"loss": loss.item(), "grads": grads, "norm": norm}


def check_layout(rank: int, layout: str, dtype: str, qkv_format: str, micro_batch: int, changes: dict, reshard: bool) -> dict:
    """Largest relative errors against the oracle."""
    config, rows = config_of(**changes), rows_of(qkv_format)
    grid = grid_of(layout)
    model = built(grid, config, dtype, reshard, qkv_format)
    got = run_steps(model, grid, rows, micro_batch, steps=1, reshard=reshard, qkv_format=qkv_format)
    want = oracle(config, rows, {n: p.shape for n, p in model.named_parameters()})
    errors = {name: relative_error(got["grads"][name], want["grads"][name]) for name in want["grads"]}
    clip = min(1.0, 1.0 / (want["norm"] + 1e-6))
    errors["clipped"] = relative_error(got["clipped"], want["grads"]["embedding.weight"] * clip)
    errors["loss"] = abs(got["loss"] / want["loss"] - 1)
    errors["norm"] = abs(got["norm"] / want["norm"] - 1)
    return errors


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("qkv_format", ["thd", "bshd"])
@pytest.mark.parametrize(("dtype", "limit"), [("fp64", 1e-10), ("fp32", 1e-5)])
def test_loss_and_gradients_equal_one_rank(world: World, layout: str, qkv_format: str, dtype: str, limit: float) -> None:
    for errors in world.run(check_layout, layout, dtype, qkv_format, 1, {}, False):
        assert max(errors.values()) <= limit, errors


@pytest.mark.parametrize(
    "changes",
    [{"tie_embeddings": True}, {"qk_norm": True}, {"num_query_groups": 4}, {"num_query_groups": 1}, {"hidden_size": 33, "kv_channels": 6}],
    ids=str,
)
def test_model_variants(world: World, changes: dict) -> None:
    """hidden 33: rows that do not divide by the ranks, so shards are uneven."""
    for errors in world.run(check_layout, "dp_shard 2 x cp 2", "fp64", "thd", 1, changes, False):
        assert max(errors.values()) <= 1e-10, errors


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.parametrize("qkv_format", ["thd", "bshd"])
def test_micro_batch_and_reshard_change_nothing(world: World, micro_batch: int, reshard: bool, qkv_format: str) -> None:
    for errors in world.run(check_layout, "dp_replicate 2 x cp 2", "fp64", qkv_format, micro_batch, {}, reshard):
        assert max(errors.values()) <= 1e-10, errors


def test_bf16_is_as_close_as_without_cp(world: World) -> None:
    alone = world.run(check_layout, "dp_shard 4", "bf16", "thd", 1, {}, False)[0]
    for layout in ("dp_shard 2 x cp 2", "cp 4"):
        errors = world.run(check_layout, layout, "bf16", "thd", 1, {}, False)[0]
        for name, error in errors.items():
            if name not in ("loss", "norm"):  # scalars can be right by luck in one layout
                assert error <= 4 * alone[name], (layout, name, error, alone[name])
        assert errors["loss"] < 1e-2 and errors["norm"] < 5e-2


def check_replicas(rank: int, layout: str, dtype: str) -> tuple[tuple[int, ...], dict[str, bytes]]:
    """This rank's shard of every weight after ten steps, as bytes, and its place within fsdp."""
    grid = grid_of(layout)
    config = config_of()
    model = built(grid, config, dtype)
    run_steps(model, grid, rows_of("thd"), 1, steps=10)
    shards = {n: local_tensor(p.detach()).contiguous().view(torch.uint8).numpy().tobytes() for n, p in model.named_parameters()}
    return (grid.rank("fsdp"),), shards


@pytest.mark.parametrize("layout", ["dp_replicate 2 x cp 2", "dp_replicate 2 x dp_shard 2"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_replicas_hold_the_same_bits_after_ten_steps(world: World, layout: str, dtype: str) -> None:
    by_place: dict = {}
    for place, shards in world.run(check_replicas, layout, dtype):
        by_place.setdefault(place, []).append(shards)
    assert len(by_place) == 2 and all(len(copies) == 2 for copies in by_place.values())
    for first, second in by_place.values():
        assert first == second


def weights_after_steps(rank: int, layout: str, reshard: bool) -> dict:
    grid = grid_of(layout)
    model = built(grid, config_of(), "fp64", reshard)
    return run_steps(model, grid, rows_of("thd"), 1, steps=10, reshard=reshard)["weights"]


def test_weights_after_ten_steps_are_the_same_in_every_layout(world: World) -> None:
    wanted = world.run(weights_after_steps, "dp_shard 4", False)[0]
    for layout in ("dp_shard 2 x cp 2", "dp_replicate 2 x cp 2", "cp 4"):
        for weights in world.run(weights_after_steps, layout, False):
            assert weights.keys() == wanted.keys()
            worst = max(relative_error(weights[n], wanted[n]) for n in wanted)
            assert worst <= 1e-9, (layout, worst)


def initial_weights(rank: int, layout: str) -> dict:
    model = built(grid_of(layout), config_of(vocab_size=600, padded_vocab_size=640), "fp32")
    return {n: full(p.detach()) for n, p in model.named_parameters()}


def test_initial_weights_do_not_depend_on_the_layout(world: World) -> None:
    """640 rows are two and a half blocks, cut over four ranks inside a block."""
    wanted = world.run(initial_weights, "dp_replicate 2 x dp_shard 2")[0]
    for layout in ("dp_shard 4", "cp 4"):
        for weights in world.run(initial_weights, layout):
            assert all(torch.equal(weights[n], wanted[n]) for n in wanted)
    table = wanted["embedding.weight"]
    assert torch.equal(table, initial_rows(SEED, "embedding.weight", 0, 640, 32, 0.2))


def embedding_gradients(rank: int, layout: str, dtype: str, other: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss-carrying logits of document 1's rows, gradients of its embeddings) on this rank, document 0 as it is or another."""
    grid, config = grid_of(layout), config_of()
    model = built(grid, config, dtype)
    rng = np.random.default_rng(5)
    lengths, padded = np.array([21, 30, 0]), np.array([24, 32, 8])
    tokens, labels = rng.integers(0, 61, ROW_LENGTH), rng.integers(0, 61, ROW_LENGTH)
    labels[21:24] = labels[54:] = -100
    if other:
        tokens[:21] = (tokens[:21] + 7) % 61
    batch = build_batch(
        [Sequence(tokens, labels, lengths, padded)], cp_size=grid.size("cp"), cp_rank=grid.rank("cp"), qkv_format="thd", layout="zigzag"
    )
    kept: list[torch.Tensor] = []
    handle = model.embedding.register_forward_hook(lambda module, args, out: kept.append(out) or out.retain_grad())
    loss, _ = model(batch.tokens, batch.packed_seq, labels=batch.labels)
    loss.backward()
    handle.remove()
    _, owned = build_packed_seq(lengths, padded, cp_size=grid.size("cp"), cp_rank=grid.rank("cp"))
    mine = torch.from_numpy((owned >= 24) & (owned < 54))
    assert kept[0].grad is not None
    with torch.no_grad():
        logits = model(batch.tokens, batch.packed_seq, logits_rows=torch.nonzero(mine)[:, 0])
    return logits, kept[0].grad[mine]


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_another_document_beside_it_changes_no_bit(world: World, dtype: str) -> None:
    for before, after in zip(
        world.run(embedding_gradients, "cp 4", dtype, False), world.run(embedding_gradients, "cp 4", dtype, True), strict=True
    ):
        assert all(len(b) and torch.equal(b, a) for b, a in zip(before, after, strict=True))
