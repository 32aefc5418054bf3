"""Builds data, model and pipeline of a run from its configuration. Used by train.py, tools and benchmarks."""

from __future__ import annotations

import functools
import gc
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from config.progress import resolve_phases
from config.schema import ParallelConfig, RunConfig
from cp.attention import build_attention
from cp.flash_version import use_flash_attention
from cp.placement import degree_chain
from data.batch import BatchPlan
from data.build import build_dataset, train_tokenizer
from data.dataset import SampleDataset
from data.files import describe_left_out
from data.packing import PackingOptions
from data.sources import TextSource, find_tokenizer, list_opened, open_sources
from data.tokenizer import Tokenizer
from model.config import GPTConfig
from model.gpt import GPT, Stages, get_chunks
from model.init import initialise
from model.layers import build_precision
from model.transformer import GPTOptions
from parallel.collectives import WaitClock
from parallel.fsdp import Accumulation, shard_model
from parallel.fusion import compile_kernel, use_kernels
from parallel.grid import Grid, embedding_group, neighbour_groups, split_group
from parallel.pipeline import build_schedule
from parallel.stages import split_layers
from parallel.tensor import build_tensor_parallel
from runtime.distributed import check_compiler, collective_timeout, own_temporary_folder
from training.flops import attention_cost
from training.step import Pipeline
from utils.logger import log

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class RunData:
    """Attributes:
    valid: None without validation.
    is_tokenizer_trained: on --data-path, since no flag and no corpus names one.
    left_out: what lies in folders of text beside, in words.
    """

    tokenizer: Tokenizer
    train: SampleDataset
    valid: SampleDataset | None
    is_tokenizer_trained: bool = False
    left_out: str = ""

    def fingerprints(self) -> dict[str, str | None]:
        return {
            "tokenizer": self.tokenizer.fingerprint,
            "training documents": self.train.fingerprint(),
            "validation documents": self.valid.fingerprint() if self.valid else None,
        }


def build_data(config: RunConfig, *, builds_ahead: bool = False) -> RunData:
    """Tokenizer, training and validation samples. Rank 0 goes first: it fills the cache.

    Args:
        builds_ahead: of the training samples, as `open_dataset`'s.
    """
    data, cache_path = config.data, Path(config.data.data_cache_path)
    parts = open_sources(data.data_path, data.json_key)
    flag = "--valid-data-path"
    valid_parts = open_sources(data.valid_data_path, data.json_key, flag) if data.valid_data_path else []
    tokenizer = find_tokenizer(parts, valid_parts, config.tokenizer)
    is_trained = tokenizer is None
    if tokenizer is None:
        tokenizer = train_tokenizer(parts[0].content, vocab_size=data.tokenizer_vocab_size, cache_path=cache_path)
    if data.check_data and dist.get_rank() == 0:
        for part in list_opened([*parts, *valid_parts]):
            part.verify()
    packing = PackingOptions(
        seq_length=data.seq_length,
        method=data.packing,
        seed=config.training.seed,
        alignment=data.alignment,
        window=data.packing_window,
        one_document=data.qkv_format == "bshd",
    )
    train = build_dataset(
        parts,
        tokenizer,
        packing,
        split=data.data_split,
        which=0,
        flag="--data-path",
        cache_path=cache_path,
        starts=resolve_phases(data, config.training.batches),
        builds_ahead=builds_ahead,
    )
    valid = None
    if config.training.eval_interval:
        valid = build_dataset(
            valid_parts or list_opened(parts),
            tokenizer,
            packing,
            split=(1.0, 0.0, 0.0) if valid_parts else data.data_split,
            which=0 if valid_parts else 1,
            flag=flag if valid_parts else "--data-path",
            cache_path=cache_path,
        )
    text = [part.content for part in list_opened([*parts, *valid_parts]) if isinstance(part.content, TextSource)]
    left_out = ", ".join(describe_left_out(source.left_out) for source in text if source.left_out)
    return RunData(tokenizer, train, valid, is_tokenizer_trained=is_trained, left_out=left_out)


def build_batch_plan(config: RunConfig, architecture: GPTConfig, grid: Grid) -> BatchPlan:
    """Which samples this rank reads in each step, and which of their tokens it keeps."""
    cp_size = grid.size("cp")
    return BatchPlan(
        batches=config.training.batches,
        micro_batch_size=config.training.micro_batch_size,
        batch_size=grid.size("batch"),
        batch_rank=grid.rank("batch"),
        cp_size=cp_size,
        cp_rank=grid.rank("cp"),
        qkv_format=config.data.qkv_format,
        layout=config.parallel.cp_layout,
        pad_rows=config.data.pad_rows,
        row_unit=math.lcm(2 * cp_size, cp_size * grid.size("tp")),
        attention_cost=attention_cost(architecture),
        balance_work=config.data.balance_work,
        pp_size=config.parallel.pp_size,
        pp_schedule=config.parallel.pp_schedule,
        reads_tokens=grid.rank("pp") in (0, grid.size("pp") - 1),
    )


def build_model(
    config: RunConfig,
    architecture: GPTConfig,
    grid: Grid,
    device: torch.device,
    clock: WaitClock | None = None,
) -> GPT | Stages:
    """The model on this rank, or its stages: built on the meta device, sharded, then filled shard by shard.

    Args:
        clock: counts the time that native attention waits for other cp ranks.
    """
    model = build_meta_model(config, architecture, grid, device, clock)
    tp = get_chunks(model)[0].tp
    initialise(model, architecture, seed=config.training.seed, device=device, tp=tp)
    return model


def build_meta_model(
    config: RunConfig,
    architecture: GPTConfig,
    grid: Grid,
    device: torch.device,
    clock: WaitClock | None = None,
) -> GPT | Stages:
    """`build_model` without weights: sharded for `device`, still on the meta device."""
    parallel, model_flags, training = config.parallel, config.model, config.training
    compute_dtype, timeout = COMPUTE_DTYPES[training.dtype], collective_timeout(parallel)
    a2a_groups = None
    if parallel.attention.a2a_size > 1:
        a2a_groups = split_group(grid, "cp", parallel.attention.a2a_size, timeout=timeout)
    degree_groups = None
    if parallel.cp_layout == "hybrid" and parallel.attention.method != "all_gather":
        degree_groups = neighbour_groups(grid, "cp", degree_chain(parallel.cp_size), timeout=timeout)
    if model_flags.compile or model_flags.fused_kernels:
        own_temporary_folder()
    if model_flags.fused_kernels:
        check_compiler()
    use_kernels(compile_kernel if model_flags.fused_kernels else None)
    if device.type == "cuda" and parallel.attention.backend == "native":
        major = torch.cuda.get_device_capability(device)[0]
        warning = use_flash_attention(parallel.flash_attention, major)
        if warning and dist.get_rank() == 0:
            log(f"warning: {warning}")
    attention = build_attention(
        parallel.attention,
        head_dim=architecture.kv_channels,
        a2a_groups=a2a_groups,
        degree_groups=degree_groups,
        clock=clock,
    )
    tp = build_tensor_parallel(grid, architecture.num_query_groups, parallel.sequence_parallel, timeout)
    bf16_layers = (0, architecture.num_layers - 1) if model_flags.fp8_first_last_bf16 else ()
    precision = build_precision(model_flags.fp8, group=grid.group("stage"), bf16_layers=bf16_layers)
    options = GPTOptions(
        dtype=COMPUTE_DTYPES[training.parameter_dtype],
        compute_dtype=compute_dtype,
        recompute=training.recompute,
        offload_activations=training.offload_activations,
        dropout_seed=training.seed,
        implementation=model_flags.transformer_impl,
        precision=precision,
        loss_chunk_size=training.loss_chunk_size,
        z_loss=training.z_loss,
    )
    stages = split_layers(
        architecture.num_layers,
        parallel.pp_size * parallel.virtual_stages,
        first=parallel.first_stage_layers,
        last=parallel.last_stage_layers,
    )
    chunks = []
    for layers in stages[grid.rank("pp") :: parallel.pp_size]:
        with torch.device("meta"):
            chunk = GPT(
                architecture,
                attention=attention,
                cp_group=grid.group("cp"),
                options=options,
                tp=tp,
                layers=layers,
            )
        if model_flags.compile:
            chunk.compile_layers()
        shard_model(
            chunk,
            chunk.layers.values(),
            grid,
            device_type=device.type,
            compute_dtype=compute_dtype,
            reshard_after_forward=parallel.reshard_after_forward == "on",
            **chunk.edge_units(),
        )
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else Stages(chunks)


def build_accumulation(parallel: ParallelConfig) -> Accumulation:
    return Accumulation(
        reshards=parallel.reshard_after_forward == "on", reduces=parallel.reduce_every_microbatch == "on"
    )


def build_pipeline(config: RunConfig, model: GPT | Stages, grid: Grid, device: torch.device) -> Pipeline | None:
    """The pipeline over the stages of `build_model`; None with one stage."""
    parallel = config.parallel
    if parallel.pp_size == 1:
        return None
    chunks = get_chunks(model)
    shards = parallel.cp_size * (parallel.tp_size if parallel.sequence_parallel else 1)
    tokens = config.training.micro_batch_size * config.data.seq_length // shards

    @functools.lru_cache(maxsize=1)  # a schedule holds buffers for each of its microbatches
    def schedule(microbatches: int) -> Any:
        gc.collect()  # of the schedule before, whose stages refer to each other
        return build_schedule(
            chunks,
            grid.group("pp"),
            schedule=parallel.pp_schedule,
            microbatches=microbatches,
            hidden_shape=(tokens, chunks[0].config.hidden_size),
            dtype=chunks[0].compute_dtype,
            device=device,
        )

    tied_group = None
    if chunks[0].config.tie_embeddings:
        tied_group = embedding_group(grid, timeout=collective_timeout(parallel))
    return Pipeline(schedule, grid.group("pp"), tied_group)
