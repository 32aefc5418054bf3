"""Transformer Engine's own Python over kernels in plain PyTorch (`stand_ins.py`), on gloo ranks, against one rank's
float64 code.

What a GPU would be told is told here, and what Transformer Engine makes of it, its modules, its tensor parallelism and
its four kinds of context parallelism, must be what the model means. Its kernels themselves wait for a card.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("transformer_engine.pytorch", exc_type=(ImportError, RuntimeError, OSError))

from cp.attention import build_attention
from cp.support import AttentionChoice, cells
from model.gpt import get_chunks
from parallel.tensor import TensorParallel
from tests.distributed.test_cp_attention import HEADS, cases, errors_of
from tests.distributed.test_model_parity import NEEDS, built, config_of, oracle, rows_of, run_steps
from tests.distributed.test_model_parity import grid_of as parity_grid_of
from tests.reference import BF16_ROUNDING, dense_attention, relative_error, worst
from tests.world import World

BF16 = 2e-2  # a rounding is 2e-3; a block that is left out, taken twice or masked wrongly is tens of percent off


@pytest.fixture(scope="module")
def world():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVTE_TORCH_COMPILE", "0")  # its small functions as they are written: compiling asks for a driver
        # As on one card; and gloo's own works cannot be waited for twice, which its ring does.
        with World(4, backend="staged") as world:
            yield world


def attention_errors(rank: int, choice: AttentionChoice, name: str, groups: int) -> list[float]:
    from tests.te_import.stand_ins import on_the_cpu

    with on_the_cpu():
        return errors_of(rank, choice, name, groups, "bf16")


def te_cells(cp_size: int) -> list:
    found = cells(device="cuda", cp_size=cp_size, heads=HEADS, groups=HEADS)
    return [
        pytest.param(choice, id=f"cp{cp_size}-{choice.method}-{choice.qkv_format}-{choice.layout}-a2a{choice.a2a_size}")
        for choice, _ in found
        if choice.backend == "te"
    ]


@pytest.mark.parametrize("choice", [cell for cp_size in (1, 2, 4) for cell in te_cells(cp_size)])
def test_attention_equals_one_rank(world: World, choice: AttentionChoice) -> None:
    """Its kernels leave NaN in padding; out of it comes nothing, and real tokens' numbers are right."""
    for name in cases(choice):
        for groups in (2, HEADS):
            if groups % choice.a2a_size:
                continue  # refused: its exchange divides key/value heads
            for errors in world.run(attention_errors, choice, name, groups):
                assert len(errors) == 4 and max(errors) <= BF16, (name, groups, errors)


def what_it_says_without_a_kernel(rank: int) -> str:
    """Of a shape that cuDNN refuses, as runtime/distributed.py has it."""
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    from tests.te_import.stand_ins import on_the_cpu

    choice = AttentionChoice(backend="te", method="p2p", qkv_format="bshd", layout="zigzag", cp_size=1)
    with on_the_cpu(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVTE_UNFUSED_ATTN", "0")
        patch.setattr(
            utils, "_get_fused_attn_backend", lambda **_: (int(utils.FusedAttnBackend["No_Backend"]), "too wide")
        )
        try:
            errors_of(rank, choice, "one", 2, "bf16")
        except ValueError as error:
            return str(error)
    return "nothing"


def test_it_says_so_where_no_fused_kernel_can(world: World) -> None:
    assert all(
        "No dot product attention backend is available" in said for said in world.run(what_it_says_without_a_kernel)
    )


# ---------------------------------------------------------------------------------------------------
# The whole model


def plain_attention(q, k, v, packed_seq, group, **_):
    """Whole rows on one cp rank; differentiable."""
    return dense_attention(q, k, v, packed_seq.lengths, packed_seq.padded_lengths, scale=q.shape[-1] ** -0.5)


def model_errors(rank: int, layout: str, dtype: str, implementation: str, changes: dict, **options) -> dict[str, float]:
    """Relative errors of loss, norm and every gradient; the te layers have Transformer Engine's attention, but for fp32
    on one cp rank.
    """
    from tests.te_import.stand_ins import on_the_cpu

    config, rows, grid = config_of(**(NEEDS.get(layout, {}) | changes)), rows_of("thd"), parity_grid_of(layout)
    attention = plain_attention if grid.size("cp") == 1 and dtype == "fp32" else None
    with on_the_cpu() if implementation == "te" else nullcontext():
        if attention is None and implementation == "te":
            choice = AttentionChoice(
                backend="te", method="p2p", qkv_format="thd", layout="zigzag", cp_size=grid.size("cp")
            )
            attention = build_attention(choice, head_dim=config.kv_channels)
        model = built(grid, config, dtype, attention=attention, implementation=implementation, **options)
        got = run_steps(model, grid, rows, 1, steps=1)
    want = oracle(config, rows, {n: w.shape for n, w in got["weights"].items()})
    errors = {name: relative_error(got["grads"][name], x) for name, x in want["grads"].items()}
    return errors | {what: abs(got[what] / want[what] - 1) for what in ("loss", "norm")}


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "tie_embeddings": True}], ids=str)
@pytest.mark.parametrize("layout", ["dp_shard 4", "tp 2 x dp_shard 2", "tp 4", "pp 2 x tp 2"])
def test_layers_equal_one_rank(world: World, layout: str, changes: dict, sequence_parallel: bool) -> None:
    if not sequence_parallel and "tp" not in layout:
        pytest.skip("nothing to be parallel over")
    for errors in world.run(model_errors, layout, "fp32", "te", changes, sequence_parallel=sequence_parallel):
        assert worst(errors) <= 1e-5, errors


def three_steps(rank: int, layout: str, recompute: str) -> tuple[list[float], list[int]]:
    """Losses over the oracle's less 1, and how often each layer of this rank put its gate and up together."""
    from model import te_layers
    from tests.te_import.stand_ins import on_the_cpu

    config, rows, grid = config_of(**NEEDS.get(layout, {})), rows_of("thd"), parity_grid_of(layout)
    joins: dict[int, int] = {}
    cat = torch.cat

    def counted(tensors, *args, **kwargs):
        if (
            len(tensors) == 2
            and tensors[0].ndim == 2
            and tensors[0].shape == (config.ffn_hidden_size // grid.size("tp"), config.hidden_size)
        ):
            joins[tensors[0].data_ptr()] = joins.get(tensors[0].data_ptr(), 0) + 1
        return cat(tensors, *args, **kwargs)

    with on_the_cpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(te_layers.torch, "cat", counted)
        model = built(grid, config, "fp32", attention=plain_attention, implementation="te", recompute=recompute)
        got = run_steps(model, grid, rows, 1, steps=3)
    want = oracle(config, rows, {n: w.shape for n, w in got["weights"].items()}, 3)
    return [abs(a / b - 1) for a, b in zip(got["losses"], want["losses"], strict=True)], sorted(joins.values())


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("layout", ["tp 4", "pp 4"])
def test_gate_and_up_are_joined_once_a_step(world: World, layout: str, recompute: str) -> None:
    """Four microbatches, on a pipeline up to four in flight, three steps: three joins a layer, and every step has its
    own weights.
    """
    layers = {"tp 4": [2] * 4, "pp 4": [2, 1, 1, 1]}[layout]
    for (errors, joins), count in zip(world.run(three_steps, layout, recompute), layers, strict=True):
        assert max(errors) <= 1e-4 and joins == [3] * count, (errors, joins)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("layout", ["dp_shard 2 x cp 2", "tp 2 x cp 2", "cp 4", "pp 2 x cp 2"])
def test_the_default_on_a_gpu_equals_one_rank(world: World, layout: str, recompute: str) -> None:
    """Its layers, its ring, bf16 under FSDP: within four times what our layers and our ring have."""
    for ours, errors in zip(
        world.run(model_errors, layout, "bf16", "torch", {}, recompute=recompute),
        world.run(model_errors, layout, "bf16", "te", {}, recompute=recompute),
        strict=True,
    ):
        mean = sum(ours.values()) / len(ours)
        assert {n: (x, ours[n]) for n, x in errors.items() if not x <= 4 * max(ours[n], mean, BF16_ROUNDING)} == {}


def saved_for_backward(layer: torch.nn.Module, x: torch.Tensor) -> int:
    """Bytes that a forward pass keeps beside its input and its weights."""
    known = {id_of(x), *(id_of(p) for p in layer.parameters())}
    kept: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(id_of(t), t), lambda t: t):
        out = layer(x, torch.zeros_like(x))
    del out
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in known)


def id_of(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


def bytes_kept(rank: int, planned: bool) -> int:
    from model import te_layers, torch_layers
    from planner.fake import MemoryLedger
    from planner.fused import TEMLP
    from tests.te_import.stand_ins import on_the_cpu

    size = dict(eps=1e-5, dtype=torch.bfloat16, tp=TensorParallel())
    if planned:
        with torch.device("meta"):
            layer, x = (
                torch_layers.LayerNormMLP(64, 176, **size),
                torch.empty(40, 64, dtype=torch.bfloat16, requires_grad=True),
            )
        layer.__class__, layer.ledger = TEMLP, MemoryLedger()
        return saved_for_backward(layer, x)
    with on_the_cpu():
        layer = te_layers.LayerNormMLP(64, 176, **size)
        return saved_for_backward(layer, torch.zeros(40, 64, dtype=torch.bfloat16, requires_grad=True))


def test_the_plan_counts_what_its_mlp_keeps(world: World) -> None:
    assert (
        world.run(bytes_kept, False)[0]
        == world.run(bytes_kept, True)[0]
        == 2 * (40 * (2 * 64 + 3 * 176) + 2 * 176 * 64) + 4 * 40
    )


# ---------------------------------------------------------------------------------------------------
# 8 bits

WIDE = dict(
    num_layers=3,
    hidden_size=256,
    ffn_hidden_size=512,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=64,
    init_std=0.05,
)
GRADIENT, LOSS = 0.25, 0.02  # E4M3 keeps four bits of a number; as in tests/gpu/test_layers.py


def errors_in_8_bits(
    rank: int, layout: str, fp8: str, recompute: str
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Relative errors of a step, and the scales after it."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from tests.te_import.stand_ins import on_the_cpu

    config, rows, grid = config_of(**WIDE), rows_of("thd"), parity_grid_of(layout)
    with on_the_cpu():
        FP8GlobalStateManager.reset()
        choice = AttentionChoice(backend="te", method="p2p", qkv_format="thd", layout="zigzag", cp_size=grid.size("cp"))
        attention = build_attention(choice, head_dim=config.kv_channels)
        model = built(grid, config, "bf16", attention=attention, implementation="te", fp8=fp8, recompute=recompute)
        got = run_steps(model, grid, rows, 1, steps=1)
        chunks = get_chunks(model)
        scales = {n: x.clone() for chunk in chunks for n, x in chunk.precision.state(chunk).items()}
    want = oracle(config, rows, {n: w.shape for n, w in got["weights"].items()})
    errors = {name: relative_error(got["grads"][name], x) for name, x in want["grads"].items()}
    return errors | {what: abs(got[what] / want[what] - 1) for what in ("loss", "norm")}, scales


@pytest.mark.parametrize(
    ("fp8", "recompute"),
    [("delayed", "none"), ("current", "none"), ("current", "full"), ("block", "none"), ("block", "selective")],
)
@pytest.mark.parametrize("layout", ["dp_shard 4", "tp 2 x cp 2", "pp 2 x tp 2"])
def test_8_bits_equal_one_rank_within_their_noise(world: World, layout: str, fp8: str, recompute: str) -> None:
    results = world.run(errors_in_8_bits, layout, fp8, recompute)
    for errors, scales in results:
        assert errors["loss"] < LOSS and worst(errors) < GRADIENT, errors
        assert worst(errors) > 0.02, "nothing was in 8 bits"
        assert bool(scales) == (fp8 == "delayed")
    for name, scale in results[0][
        1
    ].items():  # of delayed scaling: moved, and the same on every rank that holds the layer
        holders = [scales[name] for _, scales in results if name in scales]
        assert len(holders) == (2 if layout.startswith("pp") else 4) and all(
            torch.equal(scale, other) for other in holders
        ), name
    if fp8 == "delayed":
        assert any((x != 1).any() for n, x in results[0][1].items() if n.endswith("scaling_fwd.scale"))
