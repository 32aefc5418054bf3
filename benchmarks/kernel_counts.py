"""What a microbatch launches and moves on CUDA, counted on meta tensors: the table of docs/gpu.md (tools/docs.py).

The run's own code and CUDA branches run: model, attention, loss, clipping and optimizer of resolved flags. Stand-ins
take the place of what needs data or a device: transfers between cp ranks, RMSNorm's kernel, and for Transformer Engine
its layers by their shapes (planner/fused.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from config.cli import parse_arguments
from config.schema import RunConfig
from config.validate import resolve
from data.batch import build_batch
from data.dataset import PackedSample
from model import loss
from model.config import GPTConfig
from model.gpt import GPT, Stages, get_chunks
from parallel.fsdp import clip_grad_norm_
from parallel.fusion import kernels
from parallel.grid import GridSizes, build_grid
from planner.counter import KernelCounter, Launch
from planner.fake import MemoryLedger, fake_world, fused_on_meta
from planner.fused import cuda_kernels, plan_kernels, te_attention, te_rotary, use_te_mlp
from planner.memory import label_moments
from training import build
from training.flops import attention_cost
from training.optimizer import build_optimizer
from training.step import forward_backward

META, ALIGNMENT = torch.device("meta"), 16
# Tokens of the documents of two rows, of 8192 and of 131072 tokens: files of a standard library, four bytes a token.
SHORT_ROW = (2140, 5248, 795)
LONG_ROW = (
    2140, 5257, 1497, 21952, 9876, 13813, 609, 1883, 125, 265, 8605, 2170, 6584, 6159, 7088, 2342, 978, 2170, 6853,
    11926, 3379, 15241,
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A model's flags and vocabulary."""

    name: str
    flags: str
    vocab_size: int


ONE_B = Model(
    "1B",
    "--num-layers 24 --hidden-size 1792 --ffn-hidden-size 4864 --num-attention-heads 14 --num-query-groups 2 "
    "--make-vocab-size-divisible-by 1024",
    32000,
)
EIGHT_B = Model(
    "8B",
    "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --num-query-groups 8",
    128256,
)


@dataclass(frozen=True)
class Case:
    """A model on a row of documents. `is_te`: layers and attention of Transformer Engine, on one rank."""

    model: Model
    documents: tuple[int, ...]
    row_length: int
    flags: str = ""
    cp_size: int = 1
    is_te: bool = False

    @property
    def name(self) -> str:
        what = "te layers" if self.is_te else self.flags.replace("--cp-comm-type ", "").replace("--", "") or "torch"
        return f"{self.model.name}, {self.row_length}, cp {self.cp_size}, {what}"

    def resolve(self) -> tuple[RunConfig, GPTConfig]:
        """Flags as train.py resolves them, and the model's shape."""
        size = self.cp_size
        run = f"--seq-length {self.row_length} --cp-size {size} --dtype bf16 --device cuda"
        words = f"{self.model.flags} {run} --transformer-impl torch --cp-backend native {self.flags}"
        words += " --no-fused-kernels"  # stand-ins are the kernels
        config = parse_arguments(words.split())
        resolve(config, world_size=size, local_world_size=size, cuda_devices=lambda: size)
        return config, config.model.architecture(self.model.vocab_size)

    @property
    def sample(self) -> PackedSample:
        """Padded documents; the longest gives way where the padding makes the row too long."""
        lengths = np.array(self.documents)
        padded = -(-lengths // ALIGNMENT) * ALIGNMENT
        padded[padded.argmax()] -= padded.sum() - self.row_length
        ids = np.zeros(self.row_length, np.int64)
        return PackedSample(ids, ids, np.minimum(lengths, padded), padded)


@dataclass(frozen=True)
class Moved:
    """Totals: kernels of all kinds, bytes of everything but products and flash attention.

    Attributes: flash_results: bytes that the calls of flash attention write.
    """

    kernels: int
    bytes: int
    flash_calls: int
    flash_results: int

    @classmethod
    def of(cls, launches: Sequence[Launch]) -> Moved:
        flash = [x for x in launches if x.kind == "flash"]
        return cls(
            kernels=sum(x.kernels for x in launches),
            bytes=sum(x.bytes for x in launches if x.kind == "other"),
            flash_calls=len(flash),
            flash_results=sum(x.written for x in flash),
        )

    def __sub__(self, less: Moved) -> Moved:
        return Moved(**{name: value - getattr(less, name) for name, value in vars(self).items()})


class Step(NamedTuple):
    """Launches of the forward and of the backward pass of a microbatch, operators that the host waits for, and bytes of
    tensors as `MemoryLedger.peaks`."""

    forward: list[Launch]
    backward: list[Launch]
    host_waits: list[str]
    peaks: dict[str, dict[str, int]]


@cache
def run_step(case: Case, num_layers: int) -> Step:
    """A microbatch of the cp rank in the middle, in a model of this number of layers."""
    config, architecture = case.resolve()
    # The loss in one chunk: its chunks add nothing to a layer, and `count_loss` counts them.
    config = replace(config, training=replace(config.training, loss_chunk_size=case.row_length))
    size = case.cp_size
    rank, cost = (size - 1) // 2, attention_cost(architecture)
    place: dict[str, Any] = dict(cp_size=size, cp_rank=rank, layout=config.parallel.cp_layout, attention_cost=cost)
    batch = build_batch([case.sample], qkv_format="thd", **place)
    counter, ledger, forward_ends = KernelCounter(), MemoryLedger(ignored=None), []
    with fake_world(rank=rank, world_size=size), without_data(), kernels(None):
        grid = build_grid(GridSizes(cp=size), backend="fake")
        model = build.build_meta_model(config, replace(architecture, num_layers=num_layers), grid, META)
        if case.is_te:
            _use_te(model)
        ledger.add(list(model.parameters()))
        label_moments(model, ledger)
        model.register_forward_hook(lambda *_: forward_ends.append(len(counter.launches)))
        with ledger, counter, kernels(plan_kernels(ledger)):
            forward_backward(
                model,
                [batch.pin_memory()],
                loss_tokens=torch.ones((), device=META),
                device=META,
                accumulation=build.build_accumulation(config.parallel),
            )
    (end,) = forward_ends
    return Step(counter.launches[:end], counter.launches[end:], counter.host_waits, ledger.peaks)


@contextmanager
def without_data() -> Iterator[None]:
    """The CUDA branches run on meta tensors: no transfer, no kernel of RMSNorm.

    Weights have the compute dtype, in which FSDP hands them to forward and backward.
    """

    def cast(model: nn.Module, *_: Any, compute_dtype: torch.dtype, **__: Any) -> None:
        model.to(compute_dtype)

    done = SimpleNamespace(wait=lambda: None)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(build, "shard_model", cast))
        stack.enter_context(mock.patch.object(dist, "batch_isend_irecv", lambda operations: [done]))
        stack.enter_context(mock.patch.object(dist, "all_to_all_single", lambda *_, **__: done))
        stack.enter_context(cuda_kernels())
        yield


def _use_te(model: GPT | Stages) -> None:
    use_te_mlp(model, MemoryLedger())
    for layer in get_chunks(model)[0].layers.values():
        layer.attention.apply_rotary = te_rotary  # type: ignore[union-attr]
        layer.attention.attention = te_attention  # type: ignore[union-attr]


def count_layer(case: Case) -> tuple[Moved, Moved]:
    """Forward and backward of one layer: what a second layer adds."""
    one, two = run_step(case, 1), run_step(case, 2)
    return Moved.of(two.forward) - Moved.of(one.forward), Moved.of(two.backward) - Moved.of(one.backward)


@cache
def count_loss(case: Case) -> Moved:
    """Forward and backward of the loss, with its products, for this rank's tokens of the row."""
    config, architecture = case.resolve()
    tokens = case.row_length // case.cp_size
    shape = architecture.padded_vocab_size, architecture.hidden_size
    hidden, weight = (
        torch.empty(size, shape[1], dtype=torch.bfloat16, device=META, requires_grad=True)
        for size in (tokens, shape[0])
    )
    labels = torch.empty(tokens, dtype=torch.int64, device=META)
    with without_data(), kernels(plan_kernels(MemoryLedger())), KernelCounter() as counter:
        total, _ = loss.chunked_cross_entropy(
            hidden,
            weight,
            labels,
            vocab_size=architecture.vocab_size,
            chunk_size=config.training.loss_chunk_size,
        )
        total.backward()
    return Moved.of(counter.launches)


@cache
def count_update(case: Case, shards: int) -> Moved:
    """Clipping and optimizer step of one of the `shards` that FSDP cuts the weights into."""
    config, architecture = case.resolve()
    with fake_world(rank=0, world_size=1), kernels(None), torch.device(META):
        grid = build_grid(GridSizes(), backend="fake")
        with mock.patch.object(build, "shard_model"):
            model = build.build_meta_model(replace(case, cp_size=1).resolve()[0], architecture, grid, META)
        shapes = {name: (-(-len(p) // shards), *p.shape[1:]) for name, p in model.named_parameters()}
        part = nn.ParameterDict({name.replace(".", "-"): torch.empty(shape) for name, shape in shapes.items()})
        for parameter in part.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizer = build_optimizer(part, config.training)
        named = dict(part.named_parameters())
        with fused_on_meta():
            optimizer.step()  # the first makes the moments
            with KernelCounter() as counter:
                clip_grad_norm_(named, grid, max_norm=1.0, owned=frozenset(named))
                optimizer.step()
    return Moved.of(counter.launches)


def floor_bytes(case: Case) -> tuple[int, int]:
    """Bytes that one layer must move beside its products and flash attention, forward and backward.

    What a product or an attention kernel writes is read once, and what the next one takes is written once, in bf16:
    addition with norm, rotary positions, SwiGLU, and the sum of what several attention kernels give.
    """
    _, shape = case.resolve()
    tokens, queries = case.row_length // case.cp_size, shape.query_size
    keys = shape.num_query_groups * shape.kv_channels
    per_token = 2 * 4 * shape.hidden_size + 2 * (queries + keys)
    found = []
    for moved, ffn, sums in zip(count_layer(case), (3, 5), (queries, queries + 2 * keys), strict=True):
        joined = moved.flash_results + 2 * tokens * sums if moved.flash_calls > 1 else 0
        found.append(2 * tokens * (per_token + ffn * shape.ffn_hidden_size) + joined)
    return found[0], found[1]


def _pair(values: Sequence[float], digits: int) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in values)


def layers_table() -> str:
    """Kernels and bytes of a layer."""
    lines = ["| model, tokens of a row, layout | kernels | GB | floor |", "|---|---|---|---|"]
    for case in CASES:
        layer = count_layer(case)
        kernels = _pair([x.kernels for x in layer], 0)
        moved, floor = (_pair([n / 1e9 for n in sizes], 1) for sizes in ([x.bytes for x in layer], floor_bytes(case)))
        lines.append(f"| {case.name} | {kernels} | {moved} | {floor} |")
    return "\n".join(lines)


def once_table() -> str:
    """The loss of 8192 tokens of the 8B model, and the update of one of `SHARDS` parts of its weights."""
    case, (_, shape) = EIGHT_B_SHORT, EIGHT_B_SHORT.resolve()
    once, update = count_loss(case), count_update(case, SHARDS)
    floor = case.row_length * (4 * shape.padded_vocab_size + 4 * shape.hidden_size)  # logits in, gradient out, in bf16
    return "\n".join(
        (
            "| once a microbatch or step, 8B | kernels | GB | floor |",
            "|---|---|---|---|",
            f"| loss of 8192 tokens | {once.kernels} | {once.bytes / 1e9:.1f} | {floor / 1e9:.1f} |",
            f"| clipping and AdamW, 1/{SHARDS} of the weights | {update.kernels} | {update.bytes / 1e9:.1f} | "
            f"{update.bytes / 1e9:.1f} |",
        )
    )


def counts_table() -> str:
    """For docs/gpu.md."""
    return f"{layers_table()}\n\n{once_table()}"


EIGHT_B_SHORT = Case(EIGHT_B, SHORT_ROW, 8192)
SHARDS = 8  # ranks that share the weights, for the update
_LONG = Case(EIGHT_B, LONG_ROW, 131072, "--cp-comm-type p2p", 8)
CASES = (  # of the table
    Case(ONE_B, SHORT_ROW, 8192),
    Case(ONE_B, SHORT_ROW, 8192, is_te=True),
    EIGHT_B_SHORT,
    Case(EIGHT_B, SHORT_ROW, 8192, is_te=True),
    _LONG,
    replace(_LONG, flags="--cp-comm-type all_gather"),
    replace(_LONG, flags="--cp-comm-type all_gather --heads-k-stride 8"),
    replace(_LONG, flags="--cp-comm-type a2a"),
    replace(_LONG, flags="--cp-comm-type p2p --cp-layout hybrid"),
)
