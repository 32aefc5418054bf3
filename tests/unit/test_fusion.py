"""Functions under `fused`, compiled by inductor for the CPU: against float64, and how often a new size compiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from cp.native_p2p import _add_, _add_up, merge_
from model import loss
from model.rope import _rotate
from model.torch_layers import add_norm, swiglu
from parallel.fusion import compile_kernel, fused, kernels
from tests.reference import BF16_ROUNDING, relative_error

HEADS, CHANNELS, VOCAB, PADDED = 3, 16, 61, 64


@pytest.fixture(autouse=True)
def graphs() -> Iterator[Callable[[], int]]:
    """Graphs that were compiled since the test began."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_kernel.cache_clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert not torch._dynamo.utils.counters["graph_break"]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def labels(tokens: int) -> tuple[Tensor, Tensor]:
    """Targets [t, 1] in this rank's part of the vocabulary, and whether they are."""
    target = torch.randint(-20, VOCAB, (tokens, 1), generator=torch.Generator().manual_seed(1))
    return target * (target >= 0), target >= 0


def rotary(tokens: int) -> list[Any]:
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] * 0.7 ** torch.arange(CHANNELS // 2)
    qkv = random(tokens, 2, HEADS + 2, CHANNELS)  # queries are a slice
    return [qkv[:, :, :HEADS], angle.cos().float(), angle.sin().float()]


def merged(*args: Any) -> tuple[Tensor, ...]:
    out, lse = args[0].clone(), args[1].clone()
    merge_(out, lse, *args[2:])
    return out, lse


def added(total: Tensor, *values: Tensor) -> Tensor:
    _add_(total, *values)
    return total


def parts(tokens: int) -> list[Any]:
    own, block = (random(tokens, HEADS, dtype=torch.float32, seed=n).T.contiguous().T for n in (1, 3))  # by head
    return [random(tokens, HEADS, CHANNELS).float(), own, random(tokens, HEADS, CHANNELS, seed=2), block]


def log_probs(tokens: int) -> tuple[Any, ...]:
    return loss._log_softmax(random(tokens, PADDED), *labels(tokens), VOCAB, torch.float32)


# name: (function, its arguments for a number of tokens)
CASES: dict[str, tuple[Callable, Callable[[int], list[Any]]]] = {
    "rotary positions": (_rotate, rotary),
    "SwiGLU": (swiglu, lambda t: [random(t, 24), random(t, 24, seed=1)]),
    "addition and norm": (add_norm, lambda t: [random(t, 24), random(t, 24, seed=1), random(24, seed=2), 1e-5]),
    "merge": (merged, parts),
    "gradients of blocks": (added, lambda t: [random(t, 8).float(), random(t, 8, seed=1), random(t, 8, seed=2)]),
    "first gradients": (_add_up, lambda t: [torch.float32, random(t, 8), random(t, 8, seed=1)]),
    "loss": (
        loss._log_softmax_and_grad,
        lambda t: [random(t, PADDED) * 4, *labels(t), VOCAB, torch.float32, 1e-2, torch.bfloat16],
    ),
    "log softmax": (loss._log_softmax, lambda t: [random(t, PADDED) * 4, *labels(t), VOCAB, torch.float32]),
    "evaluation": (loss._log_softmax_at_target, lambda t: [random(t, PADDED) * 4, *labels(t), VOCAB, torch.float32]),
    "gradient of logits": (
        loss._grad_of_logits,
        lambda t: [*log_probs(t)[:2], *labels(t), 1e-2, torch.bfloat16],
    ),
    "scaled": (loss._scaled, lambda t: [random(t, 24), torch.tensor(1 / 2040), torch.bfloat16]),
}


def run(function: Callable, args: list[Any]) -> list[Tensor]:
    """Results and gradients of the floating-point arguments, where the function has a gradient."""
    args = [x.clone() if isinstance(x, Tensor) and not x.is_leaf else x for x in args]
    if function not in (swiglu, add_norm):
        with torch.no_grad():
            out = function(*(x.clone() if isinstance(x, Tensor) and x.is_contiguous() else x for x in args))
        return list(out) if isinstance(out, tuple) else [out]
    args = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in args]
    out, inputs = function(*args), [x for x in args if isinstance(x, Tensor)]
    out = out if isinstance(out, tuple) else (out,)
    grads = [random(*x.shape, dtype=x.dtype, seed=9 + number) for number, x in enumerate(out)]
    return [*(x.detach() for x in out), *torch.autograd.grad(out, inputs, grads)]


def widened(args: list[Any]) -> list[Any]:
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    return [torch.float64 if isinstance(x, torch.dtype) else x for x in wide]


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_as_near_to_float64_as_plain_operations(name: str, graphs: Callable[[], int]) -> None:
    function, arguments = CASES[name]
    for tokens in (40, 41, 7, 96, 33, 64):
        args = arguments(tokens)
        want, plain = run(function, widened(args)), run(function, args)
        with kernels():
            got = run(function, args)
        assert [x.dtype for x in got] == [x.dtype for x in plain] and [x.shape for x in got] == [x.shape for x in plain]
        for result, one_rank, wanted in zip(got, plain, want, strict=True):
            finite = wanted.isfinite()
            assert torch.equal(result[~finite].double(), wanted[~finite])
            errors = [relative_error(x[finite], wanted[finite]) for x in (result, one_rank)]
            floor = BF16_ROUNDING if result.dtype == torch.bfloat16 else 1e-7
            assert errors[0] <= 4 * max(errors[1], floor), (tokens, errors)
    assert graphs() == 1, "each number of tokens compiles again"


def test_sizes_but_the_first_are_constants_and_gradients_make_no_graph(graphs: Callable[[], int]) -> None:
    with kernels(), torch.no_grad():
        for number, heads in enumerate((8, 2, 4), 1):
            for tokens, needs_grad in ((40, False), (7, True), (41, True)):
                x, cos, sin = rotary(tokens)
                x = random(tokens, heads, x.shape[-1]).requires_grad_(needs_grad)
                _rotate(x, cos, sin)
            assert graphs() == number


def test_the_kernel_of_evaluation_writes_no_log_probs() -> None:
    arguments = [random(40, PADDED), *labels(40), VOCAB, torch.float32]
    written = {}
    for function in (loss._log_softmax, loss._log_softmax_at_target):
        _, (code,) = run_and_get_code(torch.compile(function, dynamic=False), *arguments)
        written[function.__name__] = f"((40, {PADDED}), ({PADDED}, 1), torch.float32)" in code
    assert written == {"_log_softmax": True, "_log_softmax_at_target": False}


def test_kernels_are_off_unless_turned_on(graphs: Callable[[], int]) -> None:
    assert torch.equal(swiglu(random(8, 24), random(8, 24)), torch.nn.functional.silu(random(8, 24)) * random(8, 24))
    assert graphs() == 0 and math.isnan(fused(lambda x: x * math.nan)(1.0))


def test_inside_compiled_code_a_function_is_part_of_that_code(graphs: Callable[[], int]) -> None:
    with kernels():
        torch.compile(lambda x, y: swiglu(x + 1, y), fullgraph=True)(random(8, 24), random(8, 24))
    assert graphs() == 1
