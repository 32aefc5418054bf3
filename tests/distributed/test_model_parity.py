"""The whole model over four ranks in every layout against one rank's float64 code that shares nothing with it.

Loss, every parameter's gradient, the gradient norm and the weights after AdamW steps; rows hold unequal
numbers of labelled tokens, so a wrong divisor or an average where a sum belongs shows.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from checkpoint.state import whole_tensors
from config.schema import RunConfig, TrainingConfig
from cp.attention import Attention, build_attention
from cp.packed_seq import build_packed_seq
from cp.support import AttentionChoice
from data.batch import Batch, build_batch
from data.dataset import PackedSample
from model.config import GPTConfig
from model.gpt import GPT, Stages, get_chunks
from model.init import initial_rows, initialise
from model.layers import build_precision
from model.names import tp_dim
from model.transformer import GPTOptions
from parallel.collectives import sum_over
from parallel.fsdp import Accumulation, clip_grad_norm_, local_tensor, shard_model
from parallel.fusion import compile_kernel, kernels, use_kernels
from parallel.grid import Grid, GridSizes, build_grid
from parallel.stages import split_layers
from parallel.tensor import TensorParallel, build_tensor_parallel
from tests.reference import BF16_ROUNDING, random_documents, reference_loss, relative_error, worst
from tests.world import World
from training.build import build_pipeline
from training.optimizer import build_optimizer
from training.step import Pipeline, forward_backward, get_norm_owned_names

ROWS, ROW_LENGTH, ALIGNMENT, SEED = 4, 64, 8, 7
MOST_GRAPHS = 12  # of a compiled step, which has 3 by --compile and 8 by --fused-kernels; more: sizes compile again
LAYOUTS = {
    "dp_shard 4": GridSizes(dp_shard=4),
    "dp_shard 2 x cp 2": GridSizes(dp_shard=2, cp=2),
    "dp_replicate 2 x cp 2": GridSizes(dp_replicate=2, cp=2),
    "dp_replicate 2 x dp_shard 2": GridSizes(dp_replicate=2, dp_shard=2),
    "cp 4": GridSizes(cp=4),
    "tp 2 x cp 2": GridSizes(tp=2, cp=2),
    "tp 2 x dp_shard 2": GridSizes(tp=2, dp_shard=2),
    "tp 2 x dp_replicate 2": GridSizes(tp=2, dp_replicate=2),
    "tp 4": GridSizes(tp=4),
    "pp 4": GridSizes(pp=4),
    "pp 2 x cp 2": GridSizes(pp=2, cp=2),
    "pp 2 x tp 2": GridSizes(pp=2, tp=2),
    "pp 2 x dp_shard 2": GridSizes(pp=2, dp_shard=2),
    "pp 2 x dp_replicate 2": GridSizes(pp=2, dp_replicate=2),
}
# What a layout needs of the model: a layer for each stage.
NEEDS: dict[str, dict] = {"pp 4": {"num_layers": 5}}
P2P = {
    f: AttentionChoice(backend="native", method="p2p", qkv_format=f, layout="zigzag", cp_size=1)
    for f in ("thd", "bshd")
}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


@functools.cache
def grid_of(layout: str) -> Grid:
    """Cached per worker, because groups are never freed."""
    return build_grid(LAYOUTS[layout])


@functools.cache
def tp_of(grid: Grid, query_groups: int, sequence_parallel: bool) -> TensorParallel:
    """Cached as `grid_of`."""
    return build_tensor_parallel(grid, query_groups, sequence_parallel)


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


def rows_of(qkv_format: str) -> list[PackedSample]:
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
        rows.append(PackedSample(tokens, labels, lengths, padded, first_id=row * ROW_LENGTH))
    return rows


def built(
    grid: Grid,
    config: GPTConfig,
    dtype: str,
    reshard: bool = False,
    qkv_format: str = "thd",
    sequence_parallel: bool = True,
    virtual_stages: int = 1,
    recompute: str = "none",
    attention: Attention | None = None,
    compiled: bool = False,
    device: str = "cpu",
    implementation: str = "torch",
    fp8: str = "none",
) -> GPT | Stages:
    compute = DTYPES[dtype]
    tp = tp_of(grid, config.num_query_groups, sequence_parallel and grid.size("tp") > 1)
    options = GPTOptions(
        dtype=torch.float64 if dtype == "fp64" else torch.float32,
        compute_dtype=compute,
        recompute=recompute,
        dropout_seed=SEED,
        implementation=implementation,
        precision=build_precision(fp8, group=grid.group("stage"), bf16_layers=()),
        loss_chunk_size=24,
    )
    chunks = []
    use_kernels(compile_kernel if device == "cuda" else None)
    stages = split_layers(config.num_layers, grid.size("pp") * virtual_stages)
    for layers in stages[grid.rank("pp") :: grid.size("pp")]:
        with torch.device("meta"):
            chunk = GPT(
                config,
                attention=attention or build_attention(P2P[qkv_format], head_dim=config.kv_channels),
                cp_group=grid.group("cp"),
                options=options,
                tp=tp,
                layers=layers,
            )
        if compiled:
            chunk.compile_layers()
        shard_model(
            chunk,
            chunk.layers.values(),
            grid,
            device_type=device,
            compute_dtype=compute,
            reshard_after_forward=reshard,
            **chunk.edge_units(),
        )
        chunks.append(chunk)
    model = chunks[0] if len(chunks) == 1 else Stages(chunks)
    initialise(model, config, seed=SEED, device=torch.device(device), tp=tp)
    return model


def device_of(model: GPT | Stages) -> torch.device:
    return next(model.parameters()).device


def pipeline_of(model: GPT | Stages, grid: Grid, batches: list[Batch], schedule: str = "1f1b") -> Pipeline | None:
    """The pipeline that train.py builds, for these rows."""
    config = RunConfig()
    config.parallel.pp_size, config.parallel.pp_schedule = grid.size("pp"), schedule
    config.parallel.cp_size, config.parallel.tp_size = grid.size("cp"), grid.size("tp")
    config.parallel.sequence_parallel = get_chunks(model)[0].tp.sequence_parallel
    config.data.seq_length = len(batches[0].tokens) * grid.size("cp")
    return build_pipeline(config, model, grid, device_of(model))


def full(model: GPT, grid: Grid, of: str = "weight") -> dict[str, torch.Tensor]:
    """Every weight or gradient, whole, by name."""
    parts = {name: p if of == "weight" else p.grad for name, p in model.named_parameters()}
    return whole_tensors({name: x for name, x in parts.items() if x is not None}, grid)


ONCE = Accumulation()  # gradients are reduced once a step


def run_steps(
    model: GPT | Stages,
    grid: Grid,
    rows: list[PackedSample],
    micro_batch: int,
    steps: int,
    accumulation: Accumulation = ONCE,
    qkv_format: str = "thd",
    schedule: str = "1f1b",
    lr: float = 1e-2,
    layout: str = "zigzag",
) -> dict:
    """`steps` AdamW steps on the same rows; facts of the first step and of the end."""
    optimizer = build_optimizer(model, TrainingConfig(lr=lr))
    size, rank = grid.size("batch"), grid.rank("batch")
    groups = [rows[i : i + micro_batch] for i in range(0, ROWS, micro_batch)]
    mine = groups[rank::size]
    place = dict(cp_size=grid.size("cp"), cp_rank=grid.rank("cp"), layout=layout)
    batches = [build_batch(g, qkv_format=qkv_format, attention_cost=0.1, **place) for g in mine]
    tokens = sum_over(
        torch.tensor(float(sum(b.loss_tokens for b in batches)), dtype=torch.float64), grid.group("batch")
    )
    result: dict = {"losses": [], "norms": []}
    options = dict(loss_tokens=tokens, device=device_of(model), accumulation=accumulation)
    options["pipeline"] = pipeline_of(model, grid, batches, schedule)
    for step in range(steps):
        total = forward_backward(model, batches, **options)
        loss = (sum_over(sum_over(total, grid.group("loss")), grid.group("pp")) / tokens).item()
        grads = full(model, grid, "grad") if step == 0 else None
        norm = clip_grad_norm_(
            dict(model.named_parameters()), grid, max_norm=1.0, owned=get_norm_owned_names(model, grid)
        ).item()
        result["losses"].append(loss)
        result["norms"].append(norm)
        if grads is not None:
            result |= {
                "loss": loss,
                "grads": grads,
                "norm": norm,
                "clipped": full(model, grid, "grad")["embedding.weight"],
            }
        optimizer.step()
        optimizer.zero_grad()
    result["weights"] = full(model, grid)
    return result


def steps_of(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    grid: Grid,
    rows: list[PackedSample],
    steps: int,
    *,
    keeps_gradients: bool = False,
) -> list[float]:
    """Losses of `steps` steps without clipping, a row a microbatch."""
    mine = rows[grid.rank("batch") :: grid.size("batch")]
    place = dict(cp_size=grid.size("cp"), cp_rank=grid.rank("cp"), layout="zigzag")
    batches = [build_batch([row], qkv_format="thd", **place) for row in mine]
    tokens = sum_over(
        torch.tensor(float(sum(b.loss_tokens for b in batches)), dtype=torch.float64), grid.group("batch")
    )
    losses = []
    options = dict(
        loss_tokens=tokens,
        device=device_of(model),
        accumulation=Accumulation(),
        pipeline=pipeline_of(model, grid, batches),
    )
    for _ in range(steps):
        total = forward_backward(model, batches, **options)
        losses.append((sum_over(sum_over(total, grid.group("loss")), grid.group("pp")) / tokens).item())
        optimizer.step()
        if not keeps_gradients:
            optimizer.zero_grad()
    return losses


def oracle(config: GPTConfig, rows: list[PackedSample], names_and_shapes, steps: int = 1, lr: float = 1e-2) -> dict:
    """One rank in float64 on the same rows and AdamW steps as `run_steps`: losses, norms, first gradients, last
    weights.
    """
    weights = {}
    for name, shape in names_and_shapes.items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape, dtype=torch.float64)
        else:
            scale = (2 * config.num_layers) ** 0.5 if name.endswith(("attention.output.weight", "fc2_weight")) else 1.0
            weights[name] = initial_rows(SEED, name, 0, shape[0], shape[1], config.init_std / scale).double()
        weights[name].requires_grad_()
    groups = [
        {"params": [w for w in weights.values() if (w.dim() > 1) == is_matrix], "weight_decay": 0.1 * is_matrix}
        for is_matrix in (1, 0)
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)
    result: dict = {"losses": [], "norms": []}
    for step in range(steps):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for row in rows:
            labels = torch.from_numpy(row.labels)
            total = total + reference_loss(
                weights,
                config,
                torch.from_numpy(row.tokens),
                labels,
                row.lengths,
                row.padded_lengths,
                first_id=row.first_id,
                seed=SEED,
            )
            count += int((labels >= 0).sum())
        loss = total / count
        loss.backward()
        result["losses"].append(loss.item())
        result["norms"].append(torch.nn.utils.clip_grad_norm_(list(weights.values()), 1e30).item())
        if step == 0:
            result |= {
                "loss": loss.item(),
                "grads": {n: w.grad.clone() for n, w in weights.items()},
                "norm": result["norms"][0],
            }
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return result | {"weights": {n: w.detach() for n, w in weights.items()}}


def check_layout(
    rank: int,
    layout: str,
    dtype: str,
    qkv_format: str,
    micro_batch: int,
    changes: dict,
    accumulation: Accumulation = ONCE,
    sequence_parallel: bool = True,
    schedule: str = "1f1b",
    virtual_stages: int = 1,
) -> dict:
    """Largest relative errors against the oracle."""
    config, rows = config_of(**(NEEDS.get(layout, {}) | changes)), rows_of(qkv_format)
    grid = grid_of(layout)
    model = built(grid, config, dtype, accumulation.reshards, qkv_format, sequence_parallel, virtual_stages)
    got = run_steps(model, grid, rows, micro_batch, 1, accumulation, qkv_format, schedule)
    want = oracle(config, rows, {n: w.shape for n, w in got["weights"].items()})
    errors = {name: relative_error(got["grads"][name], want["grads"][name]) for name in want["grads"]}
    clip = min(1.0, 1.0 / (want["norm"] + 1e-6))
    errors["clipped"] = relative_error(got["clipped"], want["grads"]["embedding.weight"] * clip)
    errors["loss"] = abs(got["loss"] / want["loss"] - 1)
    errors["norm"] = abs(got["norm"] / want["norm"] - 1)
    return errors


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("qkv_format", "dtype", "limit"),
    [
        ("thd", "fp64", 1e-10),
        ("thd", "fp32", 1e-5),
        ("bshd", "fp64", 1e-10),
        pytest.param("bshd", "fp32", 1e-5, marks=pytest.mark.full),
    ],
)
def test_loss_and_gradients_equal_one_rank(
    world: World, layout: str, qkv_format: str, dtype: str, limit: float
) -> None:
    for errors in world.run(check_layout, layout, dtype, qkv_format, 1, {}):
        assert worst(errors) <= limit, errors


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_embeddings": True},
        {"qk_norm": True},
        {"num_query_groups": 4},
        {"num_query_groups": 1},
        {"hidden_size": 33, "kv_channels": 6},
    ],
    ids=str,
)
def test_model_variants(world: World, changes: dict) -> None:
    """hidden 33: the ranks do not divide the matrices' rows, so shards are uneven."""
    for errors in world.run(check_layout, "dp_shard 2 x cp 2", "fp64", "thd", 1, changes):
        assert worst(errors) <= 1e-10, errors


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("layout", ["tp 2 x cp 2", "tp 4"])
@pytest.mark.parametrize(
    "changes",
    [
        {"tie_embeddings": True},
        {"qk_norm": True, "num_query_groups": 1},
        {"qk_norm": True, "num_query_groups": 4, "padded_vocab_size": 256},
    ],
    ids=str,
)
def test_tensor_parallel_variants(world: World, layout: str, changes: dict, sequence_parallel: bool) -> None:
    """One group, and two on four ranks, have heads that ranks share. A vocabulary of 61 padded to 256 leaves the last
    ranks with padded columns only.
    """
    for errors in world.run(check_layout, layout, "fp64", "thd", 2, changes, Accumulation(), sequence_parallel):
        assert worst(errors) <= 1e-10, errors


@pytest.mark.parametrize(
    ("schedule", "virtual_stages"),
    [("1f1b", 1), pytest.param("gpipe", 1, marks=pytest.mark.full), ("interleaved", 2)],
)
@pytest.mark.parametrize("layout", ["pp 2 x cp 2", "pp 2 x tp 2", "pp 2 x dp_shard 2"])
@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.full), True])
def test_pipeline_schedules(world: World, layout: str, schedule: str, virtual_stages: int, tied: bool) -> None:
    changes = {"num_layers": 5, "tie_embeddings": tied, "qk_norm": True}
    for errors in world.run(
        check_layout, layout, "fp64", "thd", 1, changes, Accumulation(), True, schedule, virtual_stages
    ):
        assert worst(errors) <= 1e-10, errors


@pytest.mark.parametrize(("schedule", "virtual_stages"), [("1f1b", 1), ("gpipe", 1), ("interleaved", 2)])
@pytest.mark.parametrize("layout", ["pp 2 x cp 2", pytest.param("pp 2 x dp_shard 2", marks=pytest.mark.full)])
def test_pipeline_schedules_with_weights_freed_after_forward(
    world: World, layout: str, schedule: str, virtual_stages: int
) -> None:
    for errors in world.run(
        check_layout,
        layout,
        "fp64",
        "thd",
        1,
        {"num_layers": 5},
        Accumulation(reshards=True),
        True,
        schedule,
        virtual_stages,
    ):
        assert worst(errors) <= 1e-10, errors


def lost_gradient_error(rank: int) -> str:
    """The error of a step in which one frozen weight gets no gradient; empty without an error."""
    grid = grid_of("pp 2 x cp 2")
    model = built(grid, config_of(num_layers=4), "fp64")
    dict(model.named_parameters())[f"layers.{2 * grid.rank('pp')}.mlp.fc2_weight"].requires_grad_(False)
    place = dict(cp_size=grid.size("cp"), cp_rank=grid.rank("cp"), layout="zigzag")
    batches = [build_batch([row], qkv_format="thd", **place) for row in rows_of("thd")]
    pipeline = pipeline_of(model, grid, batches)
    tokens = torch.tensor(float(sum(b.loss_tokens for b in batches)), dtype=torch.float64)
    options = dict(loss_tokens=tokens, device=device_of(model), accumulation=Accumulation(), pipeline=pipeline)
    try:
        forward_backward(model, batches, **options)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_lost_gradient_ends_the_step(world: World) -> None:
    """Every rank names its own weight: the optimiser would skip the weight silently."""
    for rank, message in enumerate(world.run(lost_gradient_error)):
        weight = f"layers.{2 * (rank // 2)}.mlp.fc2_weight"
        assert message.startswith(f"{weight} has no gradient after the backward pass on rank {rank}"), message


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("reshards", [False, True])
@pytest.mark.parametrize("qkv_format", ["thd", "bshd"])
def test_micro_batch_and_reshard_change_nothing(
    world: World, micro_batch: int, reshards: bool, qkv_format: str
) -> None:
    how = Accumulation(reshards)
    for errors in world.run(check_layout, "dp_replicate 2 x cp 2", "fp64", qkv_format, micro_batch, {}, how):
        assert worst(errors) <= 1e-10, errors


@pytest.mark.parametrize("reshards", [False, True])
@pytest.mark.parametrize("layout", ["dp_replicate 2 x cp 2", "dp_shard 2 x cp 2"])
def test_reducing_every_microbatch_changes_nothing(world: World, layout: str, reshards: bool) -> None:
    for errors in world.run(check_layout, layout, "fp64", "thd", 1, {}, Accumulation(reshards, reduces=True)):
        assert worst(errors) <= 1e-10, errors


def test_bf16_is_as_close_as_without_cp(world: World) -> None:
    alone = world.run(check_layout, "dp_shard 4", "bf16", "thd", 1, {})[0]
    for layout in ("dp_shard 2 x cp 2", "cp 4", "tp 2 x cp 2", "pp 2 x cp 2"):
        errors = world.run(check_layout, layout, "bf16", "thd", 1, {})[0]
        for name, error in errors.items():
            if name not in ("loss", "norm"):  # scalars can be right by luck in one layout
                assert error <= 4 * max(alone[name], BF16_ROUNDING), (layout, name, error, alone[name])
        assert errors["loss"] < 1e-2 and errors["norm"] < 5e-2


def compiled_step(
    rank: int, layout: str, dtype: str, recompute: str, with_kernels: bool
) -> tuple[int, dict[str, float]]:
    """Number of compiled graphs of --compile or of --fused-kernels, and errors against the oracle."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config, rows, grid = config_of(qk_norm=True), rows_of("thd"), grid_of(layout)
    model = built(grid, config, dtype, recompute=recompute, compiled=not with_kernels)
    # At its limit torch.compile would go on without kernels, and only warn.
    strict = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
    with kernels() if with_kernels else nullcontext(), strict:
        got = run_steps(model, grid, rows, 1, steps=1)
    want = oracle(config, rows, {n: w.shape for n, w in got["weights"].items()})
    errors = {name: relative_error(got["grads"][name], want["grads"][name]) for name in want["grads"]}
    return torch._dynamo.utils.counters["stats"]["unique_graphs"], errors | {
        "loss": abs(got["loss"] / want["loss"] - 1)
    }


@pytest.mark.parametrize(
    ("layout", "dtype", "recompute", "limit", "with_kernels"),
    [
        ("dp_shard 2 x cp 2", "fp64", "none", 1e-10, False),
        ("dp_shard 2 x cp 2", "fp64", "selective", 1e-10, True),
        pytest.param("tp 2 x cp 2", "fp64", "selective", 1e-10, False, marks=pytest.mark.full),
        pytest.param("pp 2 x tp 2", "fp32", "full", 1e-5, False, marks=pytest.mark.full),
        pytest.param("tp 2 x cp 2", "fp32", "full", 1e-5, True, marks=pytest.mark.full),
    ],
)
def test_compiled_layers_equal_one_rank(
    world: World, layout: str, dtype: str, recompute: str, limit: float, with_kernels: bool
) -> None:
    for graphs, errors in world.run(compiled_step, layout, dtype, recompute, with_kernels, timeout=400.0):
        assert 0 < graphs <= MOST_GRAPHS and worst(errors) <= limit, (graphs, errors)


def gradients(rank: int, layout: str, dtype: str, recompute: str, schedule: str) -> dict[str, torch.Tensor]:
    virtual_stages = 2 if schedule == "interleaved" else 1
    grid = grid_of(layout)
    model = built(grid, config_of(num_layers=4, qk_norm=True), dtype, False, "thd", True, virtual_stages, recompute)
    return run_steps(model, grid, rows_of("thd"), 1, steps=1, schedule=schedule)["grads"]


RECOMPUTED = [
    ("dp_shard 2 x cp 2", "1f1b"), ("tp 2 x cp 2", "1f1b"), ("cp 4", "1f1b"),
    ("pp 2 x cp 2", "interleaved"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "schedule"), [pytest.param(*x, marks=[pytest.mark.full] if x[0] == "cp 4" else []) for x in RECOMPUTED]
)
@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.full), "bf16"])
def test_recomputed_gradients_are_the_same_bits(world: World, layout: str, schedule: str, dtype: str) -> None:
    wanted = world.run(gradients, layout, dtype, "none", schedule)[0]
    for recompute in ("selective", "full"):
        got = world.run(gradients, layout, dtype, recompute, schedule)[0]
        assert got.keys() == wanted.keys() and all(torch.equal(got[n], wanted[n]) for n in wanted), recompute


def collectives(rank: int, layout: str, schedule: str, times: int) -> tuple[int, int, int]:
    """Microbatches, weight gathers and gradient reductions of a warm step over `times` copies of the rows."""
    grid = grid_of(layout)
    virtual_stages = 2 if schedule == "interleaved" else 1
    model = built(grid, config_of(num_layers=4), "fp32", virtual_stages=virtual_stages)
    place = dict(cp_size=grid.size("cp"), cp_rank=grid.rank("cp"), layout="zigzag")
    batches = [
        build_batch([row], qkv_format="thd", **place)
        for row in (rows_of("thd") * times)[grid.rank("batch") :: grid.size("batch")]
    ]
    options = dict(
        loss_tokens=torch.tensor(100.0, dtype=torch.float64), device=torch.device("cpu"), accumulation=Accumulation()
    )
    options["pipeline"] = pipeline_of(model, grid, batches, schedule)
    forward_backward(model, batches, **options)
    for parameter in model.parameters():
        parameter.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        forward_backward(model, batches, **options)
    names = [event.name for event in profile.events()]
    return len(batches), names.count("c10d::_allgather_base_"), names.count("c10d::_reduce_scatter_base_")


@pytest.mark.parametrize(
    ("layout", "schedule"),
    [("dp_shard 2 x cp 2", "1f1b"), ("pp 2 x dp_shard 2", "1f1b"), ("pp 2 x dp_shard 2", "interleaved")],
)
def test_weights_are_gathered_and_gradients_reduced_once_a_step(world: World, layout: str, schedule: str) -> None:
    """For any number of microbatches. FSDP units are each layer of the stage, embedding, and norm with head."""
    units = 4 + 2 if schedule == "1f1b" and "pp" not in layout else 2 + 1
    for times in (1, 4):
        microbatches, gathers, reductions = world.run(collectives, layout, schedule, times)[0]
        assert (microbatches, gathers, reductions) == (2 * times, units, units)


def check_replicas(rank: int, layout: str, dtype: str) -> tuple[tuple[int, ...], dict[str, bytes]]:
    """Bytes of this rank's shard of every weight after ten steps, and its coordinates along fsdp and tp."""
    grid = grid_of(layout)
    config = config_of()
    model = built(grid, config, dtype)
    run_steps(model, grid, rows_of("thd"), 1, steps=10)
    shards = {
        n: local_tensor(p.detach()).contiguous().view(torch.uint8).numpy().tobytes()
        for n, p in model.named_parameters()
    }
    return (grid.rank("fsdp"), grid.rank("tp"), grid.rank("pp")), shards


@pytest.mark.parametrize(
    "layout", ["dp_replicate 2 x cp 2", "dp_replicate 2 x dp_shard 2", "tp 2 x dp_replicate 2", "pp 2 x dp_replicate 2"]
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_replicas_hold_the_same_bits_after_ten_steps(world: World, layout: str, dtype: str) -> None:
    by_place: dict = {}
    for place, shards in world.run(check_replicas, layout, dtype):
        by_place.setdefault(place, []).append(shards)
    assert len(by_place) == 2 and all(len(copies) == 2 for copies in by_place.values())
    for first, second in by_place.values():
        assert first == second
    if "tp" in layout:  # what tp ranks hold whole is the same on both
        one, other = (copies[0] for copies in by_place.values())
        assert all(one[name] == other[name] for name in one if tp_dim(name) is None)


def weights_after_steps(rank: int, layout: str) -> dict:
    grid = grid_of(layout)
    return run_steps(built(grid, config_of(), "fp64"), grid, rows_of("thd"), 1, steps=10)["weights"]


@pytest.mark.full
def test_weights_after_ten_steps_are_the_same_in_every_layout(world: World) -> None:
    wanted = world.run(weights_after_steps, "dp_shard 4")[0]
    for layout in (
        "dp_shard 2 x cp 2",
        "dp_replicate 2 x cp 2",
        "cp 4",
        "tp 2 x cp 2",
        "tp 2 x dp_shard 2",
        "pp 2 x cp 2",
    ):
        for weights in world.run(weights_after_steps, layout):
            assert weights.keys() == wanted.keys()
            errors = {n: relative_error(weights[n], wanted[n]) for n in wanted}
            assert worst(errors) <= 1e-9, (layout, errors)


def initial_weights(rank: int, layout: str) -> dict:
    return full(
        built(grid_of(layout), config_of(vocab_size=600, padded_vocab_size=640, num_query_groups=4), "fp32"),
        grid_of(layout),
    )


def test_initial_weights_do_not_depend_on_the_layout(world: World) -> None:
    """640 rows are two and a half blocks; the shards of four ranks end inside a block."""
    wanted = world.run(initial_weights, "dp_replicate 2 x dp_shard 2")[0]
    for layout in ("dp_shard 4", "cp 4", "tp 4", "tp 2 x dp_shard 2", "pp 2 x tp 2"):
        for weights in world.run(initial_weights, layout):
            assert all(torch.equal(weights[n], wanted[n]) for n in wanted)
    table = wanted["embedding.weight"]
    assert torch.equal(table, initial_rows(SEED, "embedding.weight", 0, 640, 32, 0.2))


def embedding_gradients(rank: int, layout: str, dtype: str, other: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss-carrying logits of document 1's rows, gradients of its embeddings) on this rank, document 0 as it is or
    another.
    """
    grid, config = grid_of(layout), config_of()
    model = built(grid, config, dtype)
    rng = np.random.default_rng(5)
    lengths, padded = np.array([21, 30, 0]), np.array([24, 32, 8])
    tokens, labels = rng.integers(0, 61, ROW_LENGTH), rng.integers(0, 61, ROW_LENGTH)
    labels[21:24] = labels[54:] = -100
    if other:
        tokens[:21] = (tokens[:21] + 7) % 61
    batch = build_batch(
        [PackedSample(tokens, labels, lengths, padded)],
        cp_size=grid.size("cp"),
        cp_rank=grid.rank("cp"),
        qkv_format="thd",
        layout="zigzag",
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
        world.run(embedding_gradients, "cp 4", dtype, False),
        world.run(embedding_gradients, "cp 4", dtype, True),
        strict=True,
    ):
        assert all(len(b) and torch.equal(b, a) for b, a in zip(before, after, strict=True))
