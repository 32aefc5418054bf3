"""What a CPU can check of the CUDA paths: shapes of products, events, threads, where a rank waits, graph breaks."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoint.saver import background_thread
from cp.blocks import add_tokens_
from metrics import log as log_module
from model.loss import chunked_cross_entropy
from parallel.collectives import WaitClock
from parallel.fsdp import Accumulation
from parallel.tensor import TensorParallel
from runtime import signals
from runtime.watchdog import describe_frame
from training.step import Pipeline, forward_backward


class Calls(TorchDispatchMode):
    """Records the operators and their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen.append((func.overloadpacket.__name__, [x for x in (*args, out) if isinstance(x, torch.Tensor)]))
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab_size", [257, 1000, 50257])
def test_products_of_the_loss_fit_tensor_cores(vocab_size: int, dtype: torch.dtype) -> None:
    """Rows of 257 bf16 numbers begin at odd addresses: cuBLAS then takes kernels without tensor cores."""
    padded = -(-vocab_size // 128) * 128
    hidden = torch.randn(24, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(padded, 16, dtype=dtype, requires_grad=True)
    with Calls() as calls:
        loss, _ = chunked_cross_entropy(
            hidden, weight, torch.randint(0, vocab_size, (24,)), vocab_size=vocab_size, chunk_size=8
        )
    products = [tensors for name, tensors in calls.seen if name in ("mm", "addmm", "addmm_")]
    assert len(products) == 9  # three a chunk
    assert all(max(x.stride()) % 8 == 0 for tensors in products for x in tensors)
    loss.backward()
    assert (weight.grad[vocab_size:] == 0).all() and bool(weight.grad.isfinite().all())


def test_the_weights_gradient_is_summed_in_its_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA no [V, h] product in bf16 is written and read again; PyTorch 2.11 and 2.13 have the operator."""
    schema = str(torch.ops.aten.addmm.dtype_out._schema)
    assert schema.startswith("aten::addmm.dtype_out(Tensor self, Tensor mat1, Tensor mat2, ScalarType out_dtype, *")
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    product = mock.Mock()
    monkeypatch.setattr(torch, "addmm", product)  # PyTorch 2.11 has no meta kernel of it
    hidden, weight = (torch.empty(n, 16, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (24, 128))
    labels = torch.empty(24, dtype=torch.int64, device="meta")
    with Calls() as calls:
        chunked_cross_entropy(hidden, weight, labels, vocab_size=100, chunk_size=8)
    whole = {name for name, tensors in calls.seen if tensors and tensors[-1].shape == weight.shape}
    assert whole == {"zeros", "detach"}
    for (total, *factors), options in product.call_args_list:
        assert options["out"] is total and total.dtype == options["out_dtype"] == torch.float32
        assert [x.dtype for x in factors] == 2 * [torch.bfloat16]
    assert product.call_count == 3


@pytest.mark.parametrize("device", [torch.device("cuda", 3), torch.device("cpu")])
def test_the_thread_of_a_save_has_the_ranks_gpu(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    chosen: list[tuple[int, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append((threading.get_ident(), device)))
    with background_thread(device) as pool:
        thread = pool.submit(threading.get_ident).result(10)
    assert chosen == ([(thread, device)] if device.type == "cuda" else [])


def frame_in(file: str, function: str) -> FrameType:
    """A frame of a function of that name in that file."""
    space: dict[str, Callable[[], FrameType]] = {"get_frame": lambda: sys._getframe(1)}  # type: ignore[dict-item]
    exec(compile(f"def {function}():\n    return get_frame()\n", file, "exec"), space)
    return space[function]()


@pytest.mark.parametrize(
    ("file", "function", "waits"),
    [
        (torch.cuda.__file__, "synchronize", True),
        (str(Path(torch.cuda.__file__).with_name("streams.py")), "wait", True),
        (signals.__file__, "request", True),
        (signals.__file__, "_requested_here", False),  # a stop file on a dead store
        (log_module.__file__, "_record", True),
        (torch.nn.functional.__file__, "linear", False),
    ],
)
def test_a_rank_in_front_of_its_gpu_waits_for_others(file: str, function: str, waits: bool) -> None:
    """The host is ahead of the GPU, which waits in a collective: the watchdog must ask who is missing."""
    assert describe_frame(frame_in(file, function))[1] is waits


class Event:
    """A CUDA event that the GPU reaches when `now` is its time."""

    made = 0
    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        Event.made += 1

    def record(self) -> None:
        Event.now += 0.5
        self.time = Event.now

    def query(self) -> bool:
        return self.time <= Event.now - Event.behind

    def elapsed_time(self, other: Event) -> float:
        return 1000 * (other.time - self.time)

    behind = 0.0


@pytest.mark.parametrize(("behind", "most"), [(0.0, 2), (20.0, 44)])
def test_the_clock_uses_events_again(monkeypatch: pytest.MonkeyPatch, behind: float, most: int) -> None:
    """A hundred steps of a large model have a million waits."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.made, Event.now, Event.behind = 0, 0.0, behind
    clock = WaitClock()
    for _ in range(2):
        for _ in range(1000):
            with clock.measure(cuda=True):
                pass
        assert clock.read() == pytest.approx(500.0) and clock.read() == 0
    assert Event.made <= most


def test_a_pipeline_is_fed_from_the_device() -> None:
    schedule = mock.Mock()
    model = mock.MagicMock(is_first=True, is_last=True)
    model.named_parameters.return_value = []
    model.tp = SimpleNamespace(group=None)
    with mock.patch("training.step.get_chunks", return_value=[model]), mock.patch("training.step.cache_fused_weights"):
        forward_backward(
            model,
            [mock.MagicMock(), mock.MagicMock()],
            loss_tokens=torch.ones(()),
            device=torch.device("meta"),
            accumulation=Accumulation(),
            pipeline=Pipeline(lambda microbatches: schedule, group=mock.Mock()),
        )
    (numbers,), targets = schedule.step.call_args
    assert numbers.device.type == targets["target"].device.type == "meta" and len(numbers) == 2


def test_one_tensor_parallel_rank_breaks_no_graph() -> None:
    tp = TensorParallel()
    explained = torch._dynamo.explain(lambda x: tp.exit_parallel_region(tp.enter_parallel_region(x + 1) * 2) + 1)(
        torch.ones(4)
    )
    assert explained.graph_break_count == 0 and explained.graph_count == 1


def test_a_sum_into_a_slice_is_written_once() -> None:
    x = torch.zeros(8, 4, 2)
    with Calls() as calls:
        add_tokens_(x[:, 1:3], slice(2, 5), torch.ones(3, 2, 2))
    names = [name for name, _ in calls.seen]
    assert names.count("add_") == 1 and "copy_" not in names
    assert x.sum() == 12 and x[2:5, 1:3].eq(1).all()
