"""Transformer Engine's layers against ours on one GPU: a whole step of the model, and twenty, each beside one rank's
own float64 code.

A step's error may be four times what our layers have in bf16. FP8 has no such floor: E4M3 keeps four bits of a number,
so a product is
so a product is off by some percent, and what is held is stated beside each limit. Rows of 64 tokens, learned by heart,
are chaotic at a high learning rate: twenty steps take 1e-4, at which bf16 and 8 bits emulated on the CPU were off by
0.004 and 0.035 to 0.064 in a loss of 4.5 to 3.7.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoint.saver import Saver, load_checkpoint
from config.schema import TrainingConfig
from cp.attention import build_attention
from cp.support import AttentionChoice
from model.config import FP8_RECIPES
from parallel.grid import Grid, GridSizes, build_grid
from tests.distributed.test_model_parity import built, config_of, oracle, rows_of, run_steps
from tests.reference import relative_error, worst
from tests.world import World
from training.optimizer import build_optimizer

SHAPE = dict(
    num_layers=3,
    hidden_size=256,
    ffn_hidden_size=512,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=64,
    init_std=0.05,
)
NATIVE = AttentionChoice(backend="native", method="p2p", qkv_format="thd", layout="zigzag", cp_size=1)
TE = AttentionChoice(backend="te", method="p2p", qkv_format="thd", layout="zigzag", cp_size=1)
# Largest relative error of a gradient and of the first loss in 8 bits; largest error of a loss within twenty steps, in
# bf16 and in 8 bits.
FP8_GRADIENT, FP8_LOSS = 0.25, 0.02
TWENTY, FP8_TWENTY = 0.02, 0.15
LR = 1e-4


@pytest.fixture(scope="module")
def one():
    with World(1, backend="staged", device="cuda") as world:
        yield world


@functools.cache
def grid() -> Grid:
    return build_grid(GridSizes())


def model_on(device: str, implementation: str, backend: str, fp8: str = "none"):
    """On the meta device first; three layers of 256 channels in bf16."""
    config = config_of(**SHAPE)
    attention = build_attention(TE if backend == "te" else NATIVE, head_dim=config.kv_channels)
    return built(grid(), config, "bf16", attention=attention, device=device, implementation=implementation, fp8=fp8)


def errors_of_steps(
    rank: int, device: str, implementation: str, backend: str, fp8: str, steps: int
) -> tuple[dict, list[float]]:
    """Relative errors of the first step's loss, norm and gradients, and each step's loss less the oracle's."""
    torch.manual_seed(0)
    rows = rows_of("thd")
    got = run_steps(model_on(device, implementation, backend, fp8), grid(), rows, 1, steps=steps, lr=LR)
    want = oracle(config_of(**SHAPE), rows, {n: w.shape for n, w in got["weights"].items()}, steps, LR)
    errors = {name: relative_error(got["grads"][name], x) for name, x in want["grads"].items()}
    errors |= {"loss": abs(got["loss"] / want["loss"] - 1), "norm": abs(got["norm"] / want["norm"] - 1)}
    return errors, [abs(a - b) for a, b in zip(got["losses"], want["losses"], strict=True)]


@functools.cache
def floor(world: World) -> dict[str, float]:
    """Our layers and our attention in bf16."""
    return world.run(errors_of_steps, "cuda", "torch", "native", "none", 1, timeout=400.0)[0][0]


@pytest.mark.parametrize(
    ("implementation", "backend"), [("torch", "native"), ("te", "native"), ("torch", "te"), ("te", "te")]
)
def test_a_step_in_bf16(one: World, record: Callable, implementation: str, backend: str) -> None:
    errors, _ = one.run(errors_of_steps, "cuda", implementation, backend, "none", 1, timeout=400.0)[0]
    least = floor(one)
    gradients = {name: error for name, error in errors.items() if name not in ("loss", "norm")}
    record(
        loss=errors["loss"],
        norm=errors["norm"],
        worst_gradient=worst(gradients),
        ours=worst({n: least[n] for n in gradients}),
    )
    assert errors["loss"] < 1e-2 and errors["norm"] < 5e-2
    mean = sum(least[n] for n in gradients) / len(gradients)
    far = {n: (error, least[n]) for n, error in gradients.items() if not error <= 4 * max(least[n], mean)}
    assert not far, far


@pytest.mark.parametrize("fp8", FP8_RECIPES[1:])
def test_a_step_in_8_bits(one: World, record: Callable, fp8: str) -> None:
    """Delayed scaling starts from a scale of 1, so its first step is its worst."""
    errors, _ = one.run(errors_of_steps, "cuda", "te", "te", fp8, 1, timeout=400.0)[0]
    gradients = {name: error for name, error in errors.items() if name not in ("loss", "norm")}
    record(loss=errors["loss"], norm=errors["norm"], worst_gradient=worst(gradients))
    assert errors["loss"] < FP8_LOSS and worst(gradients) < FP8_GRADIENT


@pytest.mark.parametrize(("implementation", "fp8"), [("torch", "none"), *(("te", fp8) for fp8 in FP8_RECIPES)])
def test_the_losses_of_twenty_steps(one: World, record: Callable, implementation: str, fp8: str) -> None:
    backend = "te" if implementation == "te" else "native"
    _, losses = one.run(errors_of_steps, "cuda", implementation, backend, fp8, 20, timeout=500.0)[0]
    record(**{f"step_{n}": losses[n - 1] for n in (1, 5, 10, 20)})
    assert max(losses) < (FP8_TWENTY if fp8 != "none" else TWENTY), losses


def resumed(rank: int, device: str, first: str, second: str, fp8: str, folder: str) -> tuple[list[float], list[float]]:
    """Losses of steps 3 and 4 where `first`'s layers go on, and where `second`'s take over from a checkpoint."""
    rows, losses = rows_of("thd"), []
    for implementation, start in ((first, None), (second, Path(folder) / "step_0000002")):
        model = model_on(device, implementation, implementation if implementation == "te" else "native", fp8)
        optimizer = build_optimizer(model, TrainingConfig(lr=LR))
        if start is None:
            steps_with(model, optimizer, rows, 2)
            Saver(Path(folder), model, optimizer, grid()).save(2, {})
        else:
            load_checkpoint(start, model, optimizer, grid())
        losses.append(steps_with(model, optimizer, rows, 2))
    return losses[0], losses[1]


def steps_with(model, optimizer, rows, steps: int) -> list[float]:
    from tests.distributed.test_model_parity import steps_of

    return steps_of(model, optimizer, grid(), rows, steps)


@pytest.mark.parametrize(
    ("first", "second", "fp8", "limit"),
    [
        ("te", "torch", "none", 2e-2),
        ("torch", "te", "none", 2e-2),
        ("te", "te", "delayed", 1e-3),
        ("te", "te", "none", 1e-3),
    ],
)
def test_a_checkpoint_moves_between_them(
    one: World, record: Callable, tmp_path: Path, first: str, second: str, fp8: str, limit: float
) -> None:
    went_on, moved = one.run(resumed, "cuda", first, second, fp8, str(tmp_path), timeout=400.0)[0]
    difference = max(abs(a / b - 1) for a, b in zip(went_on, moved, strict=True))
    record(difference=difference)
    assert difference < limit


def rotary_errors(rank: int) -> tuple[float, float]:
    """The fused kernel against our tables in float64: at short positions and about a million."""
    from model import rope, te_layers

    found = []
    for start in (0, 1_000_000):
        positions = start + torch.arange(512, device="cuda")
        frequencies = rope.rotary_frequencies(config_of(kv_channels=64, rotary_base=5e5), positions.device)
        x = torch.randn(
            512, 2, 4, 64, device="cuda", dtype=torch.bfloat16, generator=torch.Generator("cuda").manual_seed(1)
        )
        wide = x.double().requires_grad_()
        exact = rope.apply_rotary(wide, *rope.rotary_tables(positions, frequencies, dtype=torch.float64))
        own = x[:, :, :3].clone().requires_grad_()  # a view of a wider tensor, as queries are
        got = te_layers.apply_rotary(own, *te_layers.rotary_tables(positions, frequencies, dtype=torch.float32))
        grad = torch.randn_like(got)
        got.backward(grad)
        exact[:, :, :3].backward(grad.double())
        assert wide.grad is not None and own.grad is not None
        found.append(max(relative_error(got, exact[:, :, :3]), relative_error(own.grad, wide.grad[:, :, :3])))
    return found[0], found[1]


def test_the_fused_rotary_kernel(one: World, record: Callable) -> None:
    near, far = one.run(rotary_errors)[0]
    record(near=near, far=far)
    assert near < 4e-3 and far < 4e-3  # bf16's own rounding is 2e-3


def errors_of_sums(rank: int, vocab: int, width: int, tokens: int) -> tuple[bool, float]:
    """Whether the loss's sum of a bf16 product stays in its tensor, and the sum's error against float64."""
    from model.loss import _add_product_

    generator = torch.Generator("cuda").manual_seed(0)
    total = torch.randn(vocab, width, device="cuda", generator=generator)
    grad = torch.randn(tokens, vocab, device="cuda", generator=generator).bfloat16()
    hidden = torch.randn(tokens, width, device="cuda", generator=generator).bfloat16()
    want = total.double() + grad.T.double() @ hidden.double()
    address = total.data_ptr()
    _add_product_(total, grad.T, hidden)
    return total.data_ptr() == address and total.dtype == torch.float32, relative_error(total, want)


@pytest.mark.parametrize("tokens", [1, 8, 136, 2048])
def test_a_product_is_summed_in_place(one: World, record: Callable, tokens: int) -> None:
    """`addmm` with `out_dtype` takes an fp32 sum of bf16 factors only on CUDA: no CPU test computes it."""
    is_in_place, error = one.run(errors_of_sums, 1024, 264, tokens)[0]
    record(error=error)
    assert is_in_place and error < 1e-5  # a product rounded to bf16 is off by 1e-3
