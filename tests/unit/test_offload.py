"""`--offload-activations`: the same bits, only inputs of layers go to the host, and a long row fits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from benchmarks.kernel_counts import EIGHT_B
from parallel.grid import Grid, GridSizes, build_grid
from planner.memory import rank_memory
from tests.flags import resolved
from tests.unit.test_bf16_sums import SAMPLES, SEQ_LENGTH, gradients
from tests.unit.test_planning import planned

OFFLOADED = ("--recompute", "full", "--offload-activations")
LONG = """--seq-length 1048576 --cp-size 8 --cp-comm-type p2p --device cuda --recompute full
    --reshard-after-forward on --offload-activations"""


@pytest.fixture
def grid() -> Iterator[Grid]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield build_grid(GridSizes())
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_are_the_same_bits(grid: Grid, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.Tensor] = []

    class Counted(save_on_cpu):
        def __init__(self, pin_memory: bool) -> None:
            assert pin_memory
            saved_tensors_hooks.__init__(self, self.pack, lambda kept: kept)

        def pack(self, x: torch.Tensor) -> torch.Tensor:
            sent.append(x)
            return x.clone()

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Counted)
    wanted, micro_batch = gradients(grid, dtype, 16), 16
    got = gradients(grid, dtype, micro_batch, *OFFLOADED)
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)
    layers, microbatches = 2, SAMPLES // micro_batch
    assert [x.shape for x in sent if x.numel()] == layers * microbatches * [(micro_batch * SEQ_LENGTH, 64)]


def test_pytorchs_own_hooks_give_the_same_bits(grid: Grid) -> None:
    wanted, got = gradients(grid, "bf16", 16), gradients(grid, "bf16", 16, *OFFLOADED)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_the_plan_leaves_inputs_of_layers_out() -> None:
    words = [
        "--dtype",
        "bf16",
        "--device",
        "cuda",
        "--recompute",
        "full",
        "--num-layers",
        "12",
        "--seq-length",
        "16384",
    ]
    kept, offloaded = (rank_memory(*planned(*words, *more)) for more in ([], ["--offload-activations"]))
    saved = kept.peak - offloaded.peak
    assert 9 * 16384 * 64 * 2 <= saved <= 12 * 16384 * 64 * 2  # layers, tokens, channels, bytes


def test_a_million_tokens_of_an_8b_model_fit_eight_gpus() -> None:
    config, _ = planned(*EIGHT_B.flags.split(), *LONG.split(), world=8)
    memory = rank_memory(config, config.model.architecture(EIGHT_B.vocab_size))
    assert memory.peak < 70 * 2**30, memory


def test_without_recomputation_nothing_is_offloaded() -> None:
    with pytest.raises(ValueError, match="--offload-activations needs --recompute full, not selective"):
        resolved("--offload-activations", "--recompute", "selective")
