"""Pretrain a GPT on packed documents over five parallel dimensions.

torchrun --nproc-per-node 4 train.py --cp-size 4
python train.py --help
"""

from __future__ import annotations

import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from cp.attention import build_attention
from cp.plan import smallest_alignment
from data.build import build_tokenizer, build_tokens, split_documents
from data.corpus import open_source
from data.loader import BatchPlan, SequenceDataset, build_loader
from data.tokenizer import Tokenizer
from model.config import GPTConfig, padded_vocab_size
from model.gpt import GPT, Stages, chunks_of
from model.init import initialise
from model.layers import precision_of
from parallel.collectives import WaitClock, sum_over
from parallel.fsdp import clip_grad_norm_, shard_model
from parallel.grid import Grid, GridSizes, build_grid, ends_group, split_group
from parallel.pipeline import build_schedule
from parallel.stages import split_layers
from parallel.tensor import TensorParallel
from training.arguments import model_config, parse_arguments, parse_split, resolve
from training.banner import print_banner
from training.checkpoint import Saver
from training.checkpoint_files import checkpoints
from training.evaluate import evaluate
from training.flops import known_peak_tflops
from training.initialize import (
    broadcast_object,
    check_ranks_agree,
    cuda_device_count,
    group_backend,
    initialise_distributed,
    max_memory_bytes,
    on_rank_zero_first,
    read_launch,
)
from training.lr_schedule import LRSchedule
from training.metrics import MetricsLog, row_facts
from training.optimizer import build_optimizer, set_lr
from training.resume import Started, find_start, load_start, run_facts
from training.sample import generate
from training.step import Pipeline, counts_here, forward_backward
from training.verify_step import verify_rows, verify_weights

# Flags that may have another value on another node: where files lie there.
LOCAL_FLAGS = {"data_path", "data_cache_path", "tokenizer_model", "config"}
COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def build_data(args: Namespace) -> tuple[Tokenizer, SequenceDataset, SequenceDataset | None]:
    """Tokenizer, training and validation sequences; run on rank 0 first, which fills the cache."""
    cache = Path(args.data_cache_path)
    source = open_source(args.data_path, args.json_key)
    tokenizer = build_tokenizer(
        source,
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=args.tokenizer_model,
        vocab_size=args.tokenizer_vocab_size,
        cache_path=cache,
    )
    tokens = build_tokens(source, tokenizer, cache_path=cache)
    train, valid, _ = split_documents(len(tokens), parse_split(args.data_split))

    def sequences(documents: np.ndarray) -> SequenceDataset:
        return SequenceDataset(
            tokens,
            documents,
            seq_length=args.seq_length,
            packing=args.packing,
            alignment=args.document_alignment,
            seed=args.seed,
            pad_token=tokenizer.eod,
            cache_path=cache,
        )

    if args.eval_interval and not len(valid):
        raise ValueError(f"--data-split {args.data_split} leaves no validation document out of {len(tokens)}: use --eval-interval 0")
    train_sequences = sequences(train)
    valid_sequences = sequences(valid) if args.eval_interval else None
    for part, name in ((train_sequences, "train"), (valid_sequences, "validation")):
        if part is not None and not part.sequences_per_epoch:
            raise ValueError(
                f"--seq-length {args.seq_length}: the {name} documents hold {int(part.lengths.sum())} tokens, not one sequence"
            )
    return tokenizer, train_sequences, valid_sequences


def build_model(args: Namespace, config: GPTConfig, grid: Grid, device: torch.device, clock: WaitClock | None = None) -> GPT | Stages:
    """The model on this rank, or its stages: built on the meta device, sharded, then filled shard by shard."""
    compute_dtype = COMPUTE_DTYPES[args.dtype]
    parameter_dtype = torch.float64 if args.dtype == "fp64" else torch.float32
    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    backend = group_backend(device)
    a2a_groups = split_group(grid, "cp", args.attention.a2a_size, timeout=timeout, backend=backend) if args.attention.a2a_size > 1 else None
    attention = build_attention(args.attention, head_dim=config.kv_channels, a2a_groups=a2a_groups, clock=clock)
    tp = TensorParallel(grid.group("tp"), args.sequence_parallel)
    ends = (0, config.num_layers - 1) if args.fp8_first_last_bf16 else ()
    precision = precision_of(args.fp8, group=grid.group("stage"), bf16_layers=ends)
    stages = split_layers(config.num_layers, args.pp_size * args.virtual_stages, first=args.first_stage_layers, last=args.last_stage_layers)
    chunks = []
    for layers in stages[grid.rank("pp") :: args.pp_size]:
        with torch.device("meta"):
            chunk = GPT(
                config,
                attention=attention,
                cp_group=grid.group("cp"),
                dtype=parameter_dtype,
                tp=tp,
                loss_chunk_size=args.loss_chunk_size,
                z_loss=args.z_loss,
                compute_dtype=compute_dtype,
                layers=layers,
                recompute=args.recompute,
                dropout_seed=args.seed,
                implementation=args.transformer_impl,
                precision=precision,
            )
        if args.compile:
            chunk.compile_layers()
        shard_model(
            chunk,
            chunk.layers.values(),
            grid,
            device_type=device.type,
            compute_dtype=compute_dtype,
            reshard_after_forward=args.reshard_after_forward == "on",
        )
        chunks.append(chunk)
    model = chunks[0] if len(chunks) == 1 else Stages(chunks)
    initialise(model, config, seed=args.seed, device=device, tp=tp)
    return model


def build_pipeline(
    args: Namespace, model: GPT | Stages, config: GPTConfig, grid: Grid, device: torch.device, microbatches: int
) -> Pipeline | None:
    """The schedule over the stages of `build_model`; None where there is one stage."""
    if args.pp_size == 1:
        return None
    chunks = chunks_of(model)
    rows = args.micro_batch_size * args.seq_length // (args.cp_size * (args.tp_size if args.sequence_parallel else 1))
    schedule = build_schedule(
        chunks,
        grid.group("pp"),
        schedule=args.pp_schedule,
        microbatches=microbatches,
        hidden_shape=(rows, config.hidden_size),
        dtype=chunks[0].compute_dtype,
        device=device,
    )
    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    tied = ends_group(grid, "pp", timeout=timeout, backend=group_backend(device)) if config.tie_embeddings else None
    return Pipeline(schedule, grid.group("pp"), tied)


def main(argv: list[str]) -> None:
    start_time = time.time()

    # ------------------------------------------------------------------------------------------------
    # Flags, checked before any process group exists

    with one_line_refusals():
        launch = read_launch()
        args = parse_arguments(argv)
        start = find_start(args)
        chosen = resolve(
            args,
            world_size=launch.world_size,
            local_world_size=launch.local_world_size,
            cuda_devices=cuda_device_count,
            goes_on_from=start.facts if start and not start.weights_only else None,
        )

    # ------------------------------------------------------------------------------------------------
    # Ranks and their grid

    device = initialise_distributed(launch, args.device, timeout_minutes=args.distributed_timeout_minutes)
    is_writer = launch.rank == 0
    with one_line_refusals():
        check_ranks_agree({k: v for k, v in vars(args).items() if k not in LOCAL_FLAGS} | {"torch": torch.__version__}, "flags")
    sizes = GridSizes(pp=args.pp_size, dp_replicate=args.dp_replicate_size, dp_shard=args.dp_shard_size, cp=args.cp_size, tp=args.tp_size)
    grid = build_grid(sizes, timeout=timedelta(minutes=args.distributed_timeout_minutes), backend=group_backend(device))
    checkpoint_group = dist.new_group(backend="gloo", timeout=timedelta(minutes=args.distributed_timeout_minutes), group_desc="checkpoint")
    run_dir = Path(args.run_dir or broadcast_object(time.strftime("runs/%Y%m%d-%H%M%S")))
    start = broadcast_object(start)  # one rank's view of the file system
    save_dir = Path(args.save) if args.save else run_dir / "checkpoints"
    metrics_file = _optional_path(args.metrics_file, run_dir / "metrics.jsonl")
    tensorboard_dir = _optional_path(args.tensorboard_dir, run_dir / "tensorboard")

    # ------------------------------------------------------------------------------------------------
    # Data

    with one_line_refusals():
        tokenizer, train_sequences, valid_sequences = on_rank_zero_first(lambda: build_data(args))
        data_facts: dict = {"tokenizer": tokenizer.fingerprint, "training documents": train_sequences.fingerprint()}
        data_facts["validation documents"] = valid_sequences.fingerprint() if valid_sequences else None
        check_ranks_agree(data_facts, "data")
    batch_plan = BatchPlan(
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        batch_size=grid.size("batch"),
        batch_rank=grid.rank("batch"),
        cp_size=grid.size("cp"),
        cp_rank=grid.rank("cp"),
        qkv_format=args.qkv_format,
        layout=args.cp_layout,
        pad_rows=args.pad_rows,
        row_unit=math.lcm(2 * args.cp_size, args.cp_size * args.tp_size),
    )

    # ------------------------------------------------------------------------------------------------
    # Model, optimiser, schedule, and where they start from

    vocab = padded_vocab_size(tokenizer.vocab_size, args.make_vocab_size_divisible_by)
    config = model_config(args, vocab_size=tokenizer.vocab_size, padded_vocab_size=vocab)
    cp_clock = WaitClock() if args.attention.backend == "native" and args.cp_size > 1 else None
    with one_line_refusals():
        model = build_model(args, config, grid, device, cp_clock)
    pipeline = build_pipeline(args, model, config, grid, device, batch_plan.num_microbatches)
    optimizer = build_optimizer(
        model, lr=args.lr, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_eps, weight_decay=args.weight_decay
    )
    schedule = LRSchedule(
        lr=args.lr,
        min_lr=args.min_lr,
        warmup_iters=args.lr_warmup_iters,
        decay_iters=args.lr_decay_iters,
        style=args.lr_decay_style,
        wsd_decay_iters=args.lr_wsd_decay_iters,
    )
    counts = counts_here(model, grid)
    facts = run_facts(args, config, tokenizer, train_sequences)
    started = Started()
    if start is not None:
        with one_line_refusals():
            started = load_start(start, facts, model, optimizer, grid, save=save_dir, group=checkpoint_group)
    first_step = started.first_step
    saver = Saver(
        save_dir,
        model,
        optimizer,
        grid,
        group=checkpoint_group,
        keep=args.keep_checkpoints,
        asynchronous=args.async_save,
        tell=lambda place: print(f"saved {place}", flush=True),
    )

    peak_tflops = args.peak_tflops
    if peak_tflops is None and device.type == "cuda":
        peak_tflops = known_peak_tflops(torch.cuda.get_device_name(device))
    log = MetricsLog(
        config=config,
        world_size=launch.world_size,
        is_writer=is_writer,
        train_iters=args.train_iters,
        log_interval=args.log_interval,
        peak_tflops=peak_tflops,
        cp_clock=cp_clock,
        metrics_file=metrics_file,
        tensorboard_dir=tensorboard_dir,
        keep_before=first_step if started.goes_on else None,
    )
    if is_writer:
        print_banner(
            args,
            grid,
            chosen=chosen,
            config=config,
            device=device,
            peak_tflops=peak_tflops,
            train=train_sequences,
            valid=valid_sequences,
            started=started,
            paths={"checkpoints": save_dir, "TensorBoard": tensorboard_dir, "metrics": metrics_file},
        )

    def validate(step: int) -> None:
        if valid_sequences is None:
            return
        steps = min(args.eval_iters, -(-valid_sequences.sequences_per_epoch // args.global_batch_size))
        batches = build_loader(
            valid_sequences,
            batch_plan,
            first_step=0,
            last_step=steps,
            num_workers=0,
            pin_memory=False,
            limit=valid_sequences.sequences_per_epoch,
        )
        with one_line_refusals():
            log.validation(step, *evaluate(model, batches, grid, device))

    def sample(when: str) -> None:
        if not args.sample_tokens:
            return
        prompt = tokenizer.encode(args.sample_prompt).tolist() or [tokenizer.eod]
        ids = generate(
            model,
            prompt,
            num_tokens=args.sample_tokens,
            grid=grid,
            device=device,
            alignment=math.lcm(args.document_alignment, smallest_alignment("zigzag", args.cp_size), args.cp_size * args.tp_size),
            qkv_format=args.qkv_format,
            layout=args.cp_layout,
            pad_token=tokenizer.eod,
            eod=tokenizer.eod,
            seed=args.seed,
        )
        if is_writer:
            print(f"\n----- sample {when} -----\n{args.sample_prompt}{tokenizer.decode(ids)}\n-----\n", flush=True)

    # ------------------------------------------------------------------------------------------------
    # The loop

    sample("before training")
    verify_before = first_step + args.verify_steps
    loader = build_loader(
        train_sequences,
        replace(batch_plan, hash_before_step=verify_before),
        first_step=first_step,
        last_step=args.train_iters,
        num_workers=args.num_workers,
        pin_memory=device.type == "cuda",
    )
    batches_ahead = iter(loader)
    log.restart_clock()
    for step in range(first_step, args.train_iters):
        # Fetch the step's rows; their global token count divides the loss and so the gradients.
        fetch_start = time.perf_counter()
        batches = [next(batches_ahead) for _ in range(batch_plan.num_microbatches)]
        data_time = time.perf_counter() - fetch_start
        step_facts = sum_over(row_facts(batches).to(device, non_blocking=True), grid.group("batch"))
        loss_tokens = step_facts[0].clamp(min=1)
        if step < verify_before:
            verify_rows(batches, grid, device)

        # Forward and backward; gradients are summed over the ranks after the last microbatch.
        cross_entropy = forward_backward(
            model,
            batches,
            loss_tokens=loss_tokens,
            device=device,
            reshard_between=args.reshard_after_forward == "on",
            pipeline=pipeline,
        )

        # Clip by the global norm and step.
        grad_norm = clip_grad_norm_(dict(model.named_parameters()), grid, max_norm=args.clip_grad, counts=counts)
        lr = schedule.at(step)
        set_lr(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad()
        if step < verify_before:
            verify_weights(model, grid, device)

        loss = sum_over(sum_over(cross_entropy, grid.group("loss")), grid.group("pp")) / loss_tokens
        done = step + 1
        # A loss that is not finite ends the run, at the next line that is due.
        log.step(done, loss=loss, grad_norm=grad_norm, lr=lr, facts=step_facts, data_time=data_time, memory=max_memory_bytes(device))
        if args.eval_interval and (done % args.eval_interval == 0 or done == args.train_iters):
            validate(done)
            log.restart_clock()
        if (args.save_interval and done % args.save_interval == 0) or (args.save_final and done == args.train_iters):
            log.flush()  # a loss that is not finite ends the run before it is saved
            with one_line_refusals(OSError, exit_code=1):
                saver.save(done, facts)
            log.restart_clock()

    # ------------------------------------------------------------------------------------------------
    # The end

    sample("after training")
    with one_line_refusals(OSError, exit_code=1):
        saver.wait()
    log.close()
    if is_writer:
        found = checkpoints(save_dir)
        print(f"done in {time.time() - start_time:.0f} s")
        print(f"checkpoint:  {found[-1] if found else 'none (--save-interval 0, --no-save-final)'}")
        print(f"TensorBoard: {tensorboard_dir or 'off'}")
        print(f"metrics:     {metrics_file or 'off'}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def _optional_path(flag: str | None, default: Path | None) -> Path | None:
    return None if flag == "none" else Path(flag) if flag else default


@contextmanager
def one_line_refusals(kind: type[Exception] = ValueError, *, exit_code: int = 2) -> Iterator[None]:
    """An error of this kind in here is told in one line by local rank 0; every rank exits with the code."""
    try:
        yield
    except kind as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        raise SystemExit(exit_code) from None


if __name__ == "__main__":
    with one_line_refusals(FloatingPointError, exit_code=1):
        main(sys.argv[1:])
