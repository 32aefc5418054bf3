"""The CUDA branches on meta tensors: kernels, bytes, waits of the host and graph breaks, as ceilings.

A change that adds a pass over memory fails here. One that removes a pass lowers its ceiling.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.kernel_counts import (
    CASES,
    EIGHT_B,
    LONG_ROW,
    Case,
    Moved,
    count_layer,
    count_loss,
    count_update,
    floor_bytes,
    run_step,
    without_data,
)
from cp.packed_seq import build_packed_seq
from model.loss import chunked_cross_entropy
from parallel import fusion
from parallel.fusion import kernels
from parallel.grid import GridSizes, build_grid
from planner.counter import KernelCounter, Launch, counted_kernel
from planner.fake import MemoryLedger, fake_step, fake_world
from planner.fused import fused_rms_norm, plan_kernels
from planner.memory import measure_step
from planner.step_time import LOGIT_BYTES
from tests.flags import resolve_config
from training.build import COMPUTE_DTYPES, build_meta_model

LONG = Case(EIGHT_B, LONG_ROW, 131072)
METHODS = {
    "p2p": "--cp-comm-type p2p",
    "all_gather": "--cp-comm-type all_gather",
    "a2a": "--cp-comm-type a2a",
    "hybrid": "--cp-comm-type p2p --cp-layout hybrid",
}
ALL = [*CASES, *(replace(LONG, cp_size=size, flags=flags) for flags in METHODS.values() for size in (1, 2))]
# Case: kernels, and GB of everything but products and flash attention, forward and backward.
CEILINGS = {
    "1B, 8192, cp 1, torch": (14, 29, 0.639, 1.057),
    "1B, 8192, cp 1, te layers": (16, 29, 0.738, 1.149),
    "8B, 8192, cp 1, torch": (14, 29, 1.621, 2.701),
    "8B, 8192, cp 1, te layers": (16, 29, 1.883, 2.957),
    "8B, 131072, cp 8, p2p": (34, 94, 7.972, 11.724),
    "8B, 131072, cp 8, all_gather": (26, 71, 6.940, 17.594),
    "8B, 131072, cp 8, all_gather heads-k-stride 8": (20, 52, 6.938, 17.320),
    "8B, 131072, cp 8, a2a": (22, 35, 4.589, 6.615),
    "8B, 131072, cp 8, p2p cp-layout hybrid": (31, 83, 5.664, 8.426),
    "8B, 131072, cp 1, p2p": (14, 29, 25.939, 43.220),
    "8B, 131072, cp 2, p2p": (24, 50, 20.785, 33.440),
    "8B, 131072, cp 1, all_gather": (16, 35, 32.381, 52.884),
    "8B, 131072, cp 2, all_gather": (33, 79, 22.130, 40.025),
    "8B, 131072, cp 1, a2a": (14, 29, 25.939, 43.220),
    "8B, 131072, cp 2, a2a": (22, 37, 18.342, 26.983),
    "8B, 131072, cp 1, p2p cp-layout hybrid": (14, 29, 25.939, 43.220),
    "8B, 131072, cp 2, p2p cp-layout hybrid": (16, 36, 12.969, 23.237),
}
TIGHT = 1.01  # ceiling over count; a ceiling above is lowered


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launches(work: Callable[[], object]) -> list[Launch]:
    with KernelCounter() as counter:
        work()
    return counter.launches


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_a_layer_stays_below_its_ceiling(case: Case) -> None:
    forward, backward = count_layer(case)
    found = forward.kernels, backward.kernels, forward.bytes / 1e9, backward.bytes / 1e9
    for number, ceiling in zip(found, CEILINGS[case.name], strict=True):
        assert number <= ceiling * 1.0005 and ceiling <= number * TIGHT, found
    assert all(moved.bytes >= floor for moved, floor in zip((forward, backward), floor_bytes(case), strict=True))


def test_the_loss_and_the_update_stay_below_their_ceilings() -> None:
    loss, update = count_loss(Case(EIGHT_B, (8192,), 8192)), count_update(Case(EIGHT_B, (8192,), 8192), 8)
    for moved, launched, gigabytes in ((loss, 73, 12.10), (update, 231, 40.16)):
        assert moved.kernels <= launched <= moved.kernels * TIGHT
        assert moved.bytes / 1e9 <= gigabytes <= moved.bytes / 1e9 * TIGHT


@pytest.mark.parametrize(("dtype", "build"), [("bf16", plan_kernels(MemoryLedger())), ("fp32", None)])
def test_the_step_time_counts_the_same_bytes_a_logit(dtype: str, build: Callable | None) -> None:
    moved = []
    for rows in (16384, 32768):  # what more columns add
        hidden, weight = (meta(size, 64, dtype=COMPUTE_DTYPES[dtype]).requires_grad_() for size in (2048, rows))
        with without_data(), kernels(build), KernelCounter() as counter:
            chunked_cross_entropy(hidden, weight, meta(2048).long(), vocab_size=rows, chunk_size=2048)[0].backward()
        moved.append(Moved.of(counter.launches).bytes)
    assert (moved[1] - moved[0]) / (16384 * 2048) == pytest.approx(LOGIT_BYTES[dtype], rel=0.1)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_the_host_never_waits(case: Case) -> None:
    assert run_step(case, 2).host_waits == []


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: torch.nonzero(x),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x.copy_(torch.zeros(8)),
        lambda x: torch.zeros(8).to(x.device, non_blocking=True),
    ],
    ids=["item", "bool", "nonzero", "boolean index", "to the host", "from the host", "not pinned"],
)
def test_a_wait_of_the_host_is_seen(work: Callable[[Tensor], object]) -> None:
    # A meta tensor has no value to give.
    with KernelCounter() as counter, contextlib.suppress(NotImplementedError, RuntimeError):
        work(meta(8))
    assert len(counter.host_waits) == 1 and "test_cuda_counts.py:" in counter.host_waits[0]


def test_a_pinned_copy_is_no_wait() -> None:
    with KernelCounter() as counter:
        torch.zeros(8).pin_memory().to("meta", non_blocking=True)
    assert counter.host_waits == [] and counter.launches == []


A, B = (lambda: meta(64, 32)), (lambda: meta(64, 32, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("work", "bytes_", "kernels"),
    [
        (lambda: A() + A(), 3 * 8192, 1),
        (lambda: A() + B(), 8192 + 4096 + 8192, 1),
        (lambda: A().add_(1), 2 * 8192, 1),
        (lambda: A().zero_(), 8192, 1),
        (lambda: A().copy_(B()), 4096 + 8192, 1),
        (lambda: torch.mul(A(), 2, out=A()), 2 * 8192, 1),
        (lambda: A() + meta(1, 32).expand(64, 32), 2 * 8192 + 128, 1),
        (lambda: A().view(-1)[5:9].view(2, 2).t(), 0, 0),
        (lambda: A()[:, :0].fill_(1.0), 0, 0),
        (lambda: A().reshape(32, 64), 0, 0),
        (lambda: A().t().reshape(-1), 2 * 8192, 1),
        (lambda: A().index_select(0, meta(4).long()), 2 * 512 + 32 + 16 + 32, 2),
        (lambda: torch._foreach_mul_([A(), A()], 2.0), 4 * 8192, 1),
        (lambda: torch._foreach_mul_([A() for _ in range(40)], 2.0), 80 * 8192, 2),
    ],
)
def test_kernels_and_bytes_of_an_operator(work: Callable[[], object], bytes_: int, kernels: int) -> None:
    found = launches(work)
    assert (sum(x.bytes for x in found), sum(x.kernels for x in found)) == (bytes_, kernels)


def test_products_and_flash_attention_count_apart() -> None:
    found = launches(lambda: (A() @ meta(32, 16), torch.addmm(meta(64, 16), A(), meta(32, 16))))
    assert [x.kind for x in found] == ["gemm"] * 2
    q, k = meta(8, 4, 64, dtype=torch.bfloat16), meta(8, 2, 64, dtype=torch.bfloat16)
    cu = meta(2).int()
    found = launches(lambda: torch.ops.aten._flash_attention_forward(q, k, k, cu, cu, 8, 8, 0.0, True, False))
    assert [x.kind for x in found] == ["flash"]


def test_a_function_of_one_kernel_counts_once() -> None:
    def work() -> None:
        x, total = B(), A()
        with counted_kernel("sum", x, total) as outputs:
            total += (x * 2).exp()
            outputs.append(x.sum(1))

    (launch,) = launches(work)
    assert (launch.kernels, launch.bytes, launch.written) == (1, 4096 + 2 * 8192 + 128, 8192 + 128)

    def merge() -> None:
        x, rows, values = A(), meta(4).long(), meta(4, 32)
        with counted_kernel("merge", x, rows, values):
            x.index_copy_(0, rows, x.index_select(0, rows) + values)

    found = [x for x in launches(merge) if x.name == "merge"]
    assert [(x.bytes, x.written) for x in found] == [(512 + 32 + 512 + 512, 512)]  # the rows only
    norm = launches(lambda: fused_rms_norm(B(), None, meta(32, dtype=torch.bfloat16), 1e-5))
    assert [(x.name, x.bytes) for x in norm] == [("rms_norm", 2 * 4096 + 64 + 256)]


@pytest.mark.parametrize("flags", [*METHODS.values(), "--cp-comm-type all_gather --heads-k-stride 8"])
def test_the_plan_holds_what_a_layer_keeps(flags: str) -> None:
    """The planner runs the CPU's attention under FSDP; here CUDA's branches run without. One more layer keeps the same.

    One document of a row, as the planner assumes.
    """
    case = Case(EIGHT_B, (131072,), 131072, flags, cp_size=8)
    config, architecture = case.resolve()
    config.model.fused_kernels = True
    kept = {}
    for layers in (1, 2):
        plan = measure_step(config, replace(architecture, num_layers=layers), 0, 1)["logits and loss"]
        counted = run_step(case, layers).peaks["logits and loss"]
        kept[layers] = plan["activations"], counted["activations"]
    planned, counted = (kept[2][way] - kept[1][way] for way in (0, 1))
    assert abs(planned / counted - 1) < 0.01 and counted > 2e9


def test_a_plan_for_cuda_has_no_product_in_bf16() -> None:
    """At the loss: the weights' gradient in fp32, the hidden states' in bf16; a chunk's logits and their gradient."""
    case = Case(EIGHT_B, (8192,), 8192)
    config, architecture = case.resolve()
    config.model.fused_kernels, config.training.loss_chunk_size = True, 2048
    with kernels(lambda function: function):
        before = fusion._build
        plan = measure_step(config, replace(architecture, num_layers=1), 0, 1)["logits and loss"]["logits and loss"]
        assert fusion._build is before
    vocab, width = architecture.padded_vocab_size, architecture.hidden_size
    assert 0 <= plan - (4 * vocab * width + 2 * 8192 * width + 2 * 2 * 2048 * vocab) < 2**20


def test_a_kernel_that_fails_leaves_the_ledger_counting() -> None:
    def fail() -> None:
        raise ValueError

    ledger = MemoryLedger()
    with pytest.raises(ValueError):
        plan_kernels(ledger)(fail)()
    ledger.enter("after")
    with fake_step(ledger):
        assert torch.empty(5).nbytes == ledger.peaks["after"]["after"] == 20


def test_compiled_layers_break_at_attention_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three graphs a layer: to q, k and v; from attention's output; the MLP. A break would make more."""
    traced: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, dynamic=False))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    tokens, lengths = torch.zeros(64, dtype=torch.int64), np.array([40, 24])
    flags = "--num-layers 1 --hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --dtype fp32 --compile"
    config = resolve_config(*flags.split(), "--device", "cpu")
    with fake_world(rank=0, world_size=1):
        grid = build_grid(GridSizes(), backend="fake")
        model = build_meta_model(config, config.model.architecture(257), grid, torch.device("cpu"))
        model.to_empty(device="cpu")
        model(tokens, build_packed_seq(lengths, lengths)[0], labels=tokens)[0].backward()
    assert torch._dynamo.utils.counters["graph_break"] == {} and len(traced) == 3
