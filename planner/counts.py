"""What a step launches and moves on CUDA: a layer and the loss, forward and backward, counted on meta tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from config.cli import parse_arguments
from config.schema import RunConfig
from config.validate import resolve
from cp.layout import document_unit
from data.batch import Batch, build_batch
from data.dataset import PackedSample
from model.gpt import GPT
from parallel.grid import AXES, GridSizes, build_grid
from planner.counter import KernelCounter, Launch
from planner.fake import fake_world
from planner.fused import fused_rms_norm
from training import build
from training.build import build_accumulation, build_meta_model
from training.flops import attention_cost
from training.step import forward_backward

ALIGNMENT = 16
META = torch.device("meta")
ONE_B = "--hidden-size 1792 --ffn-hidden-size 4864 --num-attention-heads 14 --num-query-groups 2"
EIGHT_B = "--hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --num-query-groups 8"
# Tokens of the documents of two rows, of 8192 and of 131072 tokens: files of a standard library, four bytes a token.
SHORT_ROW = (2140, 5248, 795)
LONG_ROW = (
    2140, 5257, 1497, 21952, 9876, 13813, 609, 1883, 125, 265, 8605, 2170, 6584, 6159, 7088, 2342, 978, 2170, 6853,
    11926, 3379, 15241,
)  # fmt: skip


@dataclass(frozen=True)
class Moved:
    """Attributes: kernels and bytes of everything but matrix products and flash attention; and those apart."""

    kernels: int = 0
    bytes: int = 0
    gemms: int = 0
    gemm_bytes: int = 0
    gemm_flops: int = 0
    flash_kernels: int = 0
    flash_bytes: int = 0

    @classmethod
    def of(cls, launches: list[Launch]) -> Moved:
        other, gemm, flash = ([x for x in launches if x.kind == kind] for kind in ("other", "gemm", "flash"))
        return cls(
            sum(x.kernels for x in other),
            sum(x.bytes for x in other),
            len(gemm),
            sum(x.bytes for x in gemm),
            sum(x.flops for x in gemm),
            sum(x.kernels for x in flash),
            sum(x.bytes for x in flash),
        )

    def minus(self, less: Moved) -> Moved:
        return Moved(**{name: value - getattr(less, name) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Case:
    """A model and a row; the layout hybrid if `flags` say so."""

    name: str
    shape: str
    vocab_size: int
    documents: tuple[int, ...]
    row_length: int
    flags: str = ""
    cp_size: int = 1

    def resolve(self) -> tuple[RunConfig, Any]:
        words = f"{self.shape} --seq-length {self.row_length} --cp-size {self.cp_size} --dtype bf16 --device cuda"
        config = parse_arguments([*words.split(), "--transformer-impl", "torch", *self.flags.split()])
        size = self.cp_size
        resolve(config, world_size=size, local_world_size=size, cuda_devices=lambda: size)
        return config, config.model.architecture(self.vocab_size)


@dataclass(frozen=True)
class Step:
    """One microbatch. Attributes: launches of the forward and of the backward pass; waits of the host."""

    forward: list[Launch]
    backward: list[Launch]
    host_waits: list[str]


def run_step(case: Case, num_layers: int) -> Step:
    """Forward and backward of rank cp_size / 2 - 1."""
    config, architecture = case.resolve()
    rank, size = max(case.cp_size // 2 - 1, 0), case.cp_size
    layout = config.parallel.cp_layout
    batch = build_batch(
        [_sample(case)],
        cp_size=size,
        cp_rank=rank,
        qkv_format="thd",
        layout=layout,
        attention_cost=attention_cost(architecture),
    )
    counter, forward_ends = KernelCounter(), []
    with fake_world(rank=rank, world_size=size), _no_data():
        grid = build_grid(GridSizes(cp=size), backend="fake")
        model = build_meta_model(config, replace(architecture, num_layers=num_layers), grid, META)
        model.register_forward_hook(lambda *_: forward_ends.append(len(counter.launches)))
        with counter:
            forward_backward(
                model,
                [batch.pin_memory()],
                loss_tokens=torch.ones((), device=META),
                device=META,
                accumulation=build_accumulation(config.parallel),
            )
    (end,) = forward_ends
    return Step(counter.launches[:end], counter.launches[end:], counter.host_waits)


def _sample(case: Case) -> PackedSample:
    """Documents padded to multiples of 16; the longest gives way where the padding makes the row too long."""
    lengths = np.array(case.documents)
    padded = -(-lengths // ALIGNMENT) * ALIGNMENT
    padded[padded.argmax()] -= padded.sum() - case.row_length
    ids = np.zeros(case.row_length, np.int64)
    return PackedSample(ids, ids, np.minimum(lengths, padded), padded)


@contextmanager
def _no_data() -> Iterator[None]:
    """Weights in the compute dtype, as FSDP gives them to the forward pass; transfers and norms without data."""

    def cast(model: nn.Module, *_: Any, compute_dtype: torch.dtype, **__: Any) -> None:
        model.to(compute_dtype)

    done = SimpleNamespace(wait=lambda: None)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(build, "shard_model", cast))
        stack.enter_context(mock.patch.object(dist, "batch_isend_irecv", lambda operations: [done]))
        stack.enter_context(mock.patch.object(dist, "all_to_all_single", lambda *_, **__: done))
        stack.enter_context(mock.patch.object(functional, "rms_norm", fused_rms_norm))
        yield


def count_layer(case: Case) -> tuple[Moved, Moved]:
    """Forward and backward of one layer: what a second layer adds."""
    one, two = run_step(case, 1), run_step(case, 2)
    return (
        Moved.of(two.forward).minus(Moved.of(one.forward)),
        Moved.of(two.backward).minus(Moved.of(one.backward)),
    )
