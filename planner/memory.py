"""Memory of one rank: the project's own model and step run on fake tensors, and every byte is counted.

FSDP2, tensor and context parallelism and PyTorch's pipeline schedules are real; the other ranks are a fake process
group (planner/fake.py). Memory is linear in layers and in microbatches once there are a few: few are run, the rest is
extrapolated.

Not counted: the allocator's rounding and fragmentation, buffers of NCCL and of the CUDA context, kernels' workspaces.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from config.schema import RunConfig
from cp import support
from cp.support import AttentionChoice
from data.batch import build_batch
from data.dataset import PackedSample
from model import loss
from model.config import GPTConfig
from model.gpt import GPT, Stages, get_chunks
from parallel.fsdp import clip_grad_norm_
from parallel.fusion import kernels
from parallel.grid import AXES, GridSizes, build_grid, rank_of
from parallel.stages import split_layers
from planner.fake import HostMemory, MemoryLedger, fake_step, fake_world, held_messages
from planner.fused import cuda_kernels, plan_kernels, use_te_mlp
from training.build import COMPUTE_DTYPES, build_accumulation, build_meta_model, build_pipeline
from training.optimizer import build_optimizer
from training.step import forward_backward, get_norm_owned_names

FEW_CHUNKS = 3  # of the loss that are run: each frees what it made
FEW_LAYERS = 3  # layers of a stage that are run; its difference to one layer less is extrapolated
Peaks = dict[str, dict[str, int]]  # moment of a step -> bytes by label at the moment's peak


@dataclass(frozen=True)
class Memory:
    """Peak of one rank in bytes; `parts` sum to the peak."""

    peak: int
    parts: dict[str, int]
    stage: int


def rank_memory(config: RunConfig, architecture: GPTConfig, stage: int = 0) -> Memory:
    """The peak of a rank of one pipeline stage, and its parts.

    Args:
        config: resolved flags.
        stage: pp rank.
    """
    parallel = config.parallel
    counts = [len(layers) for layers in rank_layers(config, architecture, stage)]
    few = FEW_LAYERS if len(counts) == 1 else FEW_LAYERS - 1

    def measure(num_microbatches: int) -> Peaks:
        if max(counts) <= few:
            return measure_step(config, architecture, stage, num_microbatches)
        more, less = (measure_step(*_shorten(config, architecture, n), stage, num_microbatches) for n in (few, few - 1))
        return _extrapolate(more, less, sum(counts) / len(counts) - few)

    enough = enough_microbatches(config, stage)
    peaks, added = measure(min(config.num_microbatches, enough)), config.num_microbatches - enough
    if added > 0 and parallel.pp_size > 1 and parallel.pp_schedule == "gpipe":
        peaks = _extrapolate(peaks, measure(enough - 1), added)
    elif added > 0 and parallel.pp_size > 1:
        buffers = added * _microbatch_buffers(config, architecture, stage)
        # Interleaved schedules also hold what was sent until the step's end.
        sent = buffers if len(counts) > 1 else 0
        zero = dict.fromkeys(("pipeline buffers", "sent messages"), 0)
        for parts in peaks.values():
            parts |= zero | parts
            parts["pipeline buffers"] += buffers
            parts["sent messages"] += sent
    parts = {label: size for label, size in max(peaks.values(), key=lambda p: sum(p.values())).items() if size}
    return Memory(sum(parts.values()), parts, stage)


def rank_layers(config: RunConfig, architecture: GPTConfig, stage: int) -> list[range]:
    """Layers of each stage that a pp rank holds."""
    parallel = config.parallel
    stages = split_layers(
        architecture.num_layers,
        parallel.pp_size * parallel.virtual_stages,
        first=parallel.first_stage_layers,
        last=parallel.last_stage_layers,
    )
    return stages[stage :: parallel.pp_size]


def enough_microbatches(config: RunConfig, stage: int) -> int:
    """Microbatches of a step beyond which each adds the same: two accumulate gradients, a pipeline fills up first."""
    parallel = config.parallel
    if parallel.virtual_stages > 1:
        return 2 * parallel.pp_size
    is_full = stage > 0 and parallel.pp_schedule == "1f1b"  # fewer are in flight there than stages exist
    return parallel.pp_size + (not is_full)


def _microbatch_buffers(config: RunConfig, architecture: GPTConfig, stage: int) -> int:
    """Bytes of the buffers in which PyTorch's stages receive one microbatch, kept until the step's end."""
    parallel = config.parallel
    shards = parallel.cp_size * (parallel.tp_size if parallel.sequence_parallel else 1)
    tokens = config.training.micro_batch_size * config.data.seq_length // shards
    is_end = (stage == 0) + (stage == parallel.pp_size - 1)  # nothing is received there from outside the pipeline
    hidden_states = 2 * parallel.virtual_stages - is_end
    return hidden_states * tokens * architecture.hidden_size * COMPUTE_DTYPES[config.training.dtype].itemsize


def _shorten(config: RunConfig, architecture: GPTConfig, layers: int) -> tuple[RunConfig, GPTConfig]:
    """The same run with this number of layers in every stage."""
    parallel = replace(config.parallel, first_stage_layers=None, last_stage_layers=None)
    total = layers * parallel.pp_size * parallel.virtual_stages
    return replace(config, parallel=parallel), replace(architecture, num_layers=total)


def _extrapolate(more: Peaks, less: Peaks, times: float) -> Peaks:
    """The difference from `less` to `more`, added `times` more; moments that only `more` has lie between others."""
    return {
        moment: {
            label: parts.get(label, 0) + round(times * (parts.get(label, 0) - less[moment].get(label, 0)))
            for label in {*parts, *less[moment]}
        }
        for moment, parts in more.items()
        if moment in less
    }


def measure_step(config: RunConfig, architecture: GPTConfig, stage: int, num_microbatches: int) -> Peaks:
    """One step of one rank of the pipeline stage, on fake tensors."""
    parallel, training = config.parallel, config.training
    sizes = GridSizes(**{axis: getattr(parallel, f"{axis}_size") for axis in AXES})
    rank = rank_of(sizes, dict.fromkeys(AXES, 0) | {"pp": stage})
    attention = _nearest_native(parallel.attention)
    fake = replace(
        config,
        parallel=replace(parallel, attention=attention),
        model=replace(
            config.model,
            transformer_impl="torch",
            fp8="none",
            fp8_first_last_bf16=False,
            compile=False,
            fused_kernels=False,
        ),
    )
    ids, lengths = np.zeros(config.data.seq_length, np.int64), np.array([config.data.seq_length])
    samples = [PackedSample(ids, ids, lengths, lengths)] * training.micro_batch_size
    row = dict(cp_size=parallel.cp_size, cp_rank=0, qkv_format="thd", layout=attention.layout)
    ledger, device, is_te = MemoryLedger(), torch.device("cpu"), config.model.transformer_impl == "te"
    cuda = cuda_kernels() if parallel.device == "cuda" or is_te else nullcontext()
    with fake_world(rank=rank, world_size=sizes.world_size), cuda, kernels(None):
        grid = build_grid(sizes, backend="fake")
        model = build_meta_model(fake, architecture, grid, device)
        fusion = kernels(plan_kernels(ledger)) if config.model.fused_kernels else nullcontext()
        host = mock.patch.object(torch.autograd.graph, "save_on_cpu", HostMemory)
        chunks = mock.patch.object(loss, "chunk_starts", lambda n, size: range(0, min(n, FEW_CHUNKS * size), size))
        gloo = held_messages() if parallel.device == "cpu" else nullcontext()
        with fake_step(ledger), fusion, host, gloo, chunks:
            model.to_empty(device=device)
            if is_te:
                use_te_mlp(model, ledger)
            optimizer = build_optimizer(model, training)
            _make_optimizer_states(optimizer, ledger)
            pipeline = build_pipeline(fake, model, grid, device)
            label_moments(model, ledger)
            ledger.enter("activations" if pipeline is None else "pipeline buffers")
            forward_backward(
                model,
                [build_batch(samples, **row)] * num_microbatches,  # type: ignore[arg-type]
                loss_tokens=torch.ones(()),
                device=device,
                accumulation=build_accumulation(parallel),
                pipeline=pipeline,
            )
            ledger.enter("update")
            owned = get_norm_owned_names(model, grid)
            clip_grad_norm_(dict(model.named_parameters()), grid, max_norm=1.0, owned=owned)
            optimizer.step()
    return ledger.peaks


def _nearest_native(choice: AttentionChoice) -> AttentionChoice:
    """The native method nearest to that of a library, which need not be installed."""
    if choice.backend == "native":
        return choice
    method = choice.method if choice.method in support.methods("native") else "p2p"
    return replace(choice, backend="native", method=method, layout="zigzag")


def _make_optimizer_states(optimizer: torch.optim.Optimizer, ledger: MemoryLedger) -> None:
    """The moments, which a run has from its first step on."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    ledger.enter("optimiser states")
    optimizer.step()
    optimizer.zero_grad()
    ledger.peaks.clear()


def label_moments(model: GPT | Stages, ledger: MemoryLedger) -> None:
    """Hooks that tell the ledger where the step is: forward pass, loss, backward pass of which layer."""

    def start_forward(*_: Any) -> None:
        if ledger.label == "backward pass":
            ledger.relabel_all("backward pass", "gradients")
        ledger.enter("activations")

    def start_loss(*_: Any) -> None:
        ledger.enter("logits and loss")

    def start_backward(*_: Any) -> None:
        ledger.enter("backward pass")

    def watch_backward(layer: nn.Module, place: str) -> None:
        def watch(module: nn.Module, inputs: Any, out: torch.Tensor) -> None:
            if out.requires_grad:
                out.register_hook(lambda _: ledger.enter("backward pass", f"backward pass of {place} layer"))

        layer.register_forward_hook(watch)

    for chunk in get_chunks(model):
        chunk.register_forward_pre_hook(start_forward, prepend=True)
        chunk.register_forward_hook(start_backward)
        if chunk.final_norm is not None:
            chunk.final_norm.register_forward_hook(start_loss)
        layers = list(chunk.layers.values())
        for number, layer in enumerate(layers):
            watch_backward(layer, "the last" if number == len(layers) - 1 else "a middle" if number else "the first")
        for parameter in chunk.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.relabel(p.grad, "gradients"))
