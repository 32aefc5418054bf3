"""Pretrain a GPT on packed documents over five parallel dimensions.

torchrun --nproc-per-node 4 train.py --cp-size 4
python train.py --help
"""

from __future__ import annotations

from runtime.early import hold_back
from utils.errors import UserError

if __name__ == "__main__":
    hold_back()

import json
import math
import os
import sys
import time
import uuid
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoint.files import checkpoints, hold, step_folder
from checkpoint.resume import Started, find_start, load_start, run_facts
from checkpoint.saver import Saver
from config.arguments import model_config, parse_arguments, parse_profile_steps, parse_skips, parse_split, resolve
from cp.attention import build_attention
from cp.layout import document_unit
from data.batch import BatchPlan
from data.build import build_dataset, train_tokenizer
from data.dataset import BlendedDataset, PackingOptions, SampleDataset
from data.loader import build_loader, read_batches, translate_worker_death
from data.sources import Part, find_tokenizer, open_parts
from data.tokenizer import Tokenizer
from metrics.banner import describe_epochs, print_banner
from metrics.log import EVERYTHING, MetricsLog, NonFinite, row_facts
from metrics.profiler import StepProfiler
from metrics.tensorboard import Writer, configuration, describe_data, open_writers
from metrics.timers import Timers
from model.config import GPTConfig, padded_vocab_size
from model.gpt import GPT, Stages, get_chunks
from model.init import initialise
from model.layers import build_precision
from model.transformer import GPTOptions
from parallel.collectives import WaitClock, sum_over
from parallel.fsdp import clip_grad_norm_, shard_model
from parallel.grid import Grid, GridSizes, build_grid, embedding_group, split_group
from parallel.pipeline import build_schedule
from parallel.stages import split_layers
from parallel.tensor import TensorParallel
from planner.estimate import data_of, plan_text
from runtime.consistency import verify_rows, verify_weights
from runtime.distributed import (
    broadcast_object,
    check_ranks_agree,
    collective_timeout,
    cuda_device_count,
    group_backend,
    initialise_distributed,
    max_memory_bytes,
    on_one_rank,
    on_rank_zero_first,
    read_launch,
)
from runtime.nonfinite import NonFiniteGuard, save_step
from runtime.signals import StopRequests, outlive_a_broadcast
from runtime.status import Outcome, OutlivesItsReader, StatusFile, one_line, tell
from runtime.watchdog import Watchdog
from training.evaluate import evaluate
from training.flops import known_peak_tflops
from training.lr_schedule import LRSchedule
from training.optimizer import build_optimizer, set_lr
from training.sample import generate
from training.step import Pipeline, forward_backward, get_norm_owned_names
from utils.files import replace_synced

# Flags that may have another value on another node: where files lie there.
LOCAL_FLAGS = {"data_path", "valid_data_path", "data_cache_path", "tokenizer_model", "config"}
COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def build_tokenizer(args: Namespace) -> tuple[Tokenizer, list[Part], list[Part]]:
    """Tokenizer, opened parts of --data-path and of --valid-data-path."""
    parts = open_parts(args.data_path, args.json_key)
    others = open_parts(args.valid_data_path, args.json_key, "--valid-data-path") if args.valid_data_path else []
    tokenizer = find_tokenizer(
        parts, others, tokenizer_type=args.tokenizer_type, model=args.tokenizer_model, eod=args.tokenizer_eod
    ) or train_tokenizer(parts[0].content, vocab_size=args.tokenizer_vocab_size, cache_path=Path(args.data_cache_path))
    return tokenizer, parts, others


def build_data(args: Namespace) -> tuple[Tokenizer, SampleDataset, SampleDataset | None]:
    """Tokenizer, training and validation sequences; run on rank 0 first, which fills the cache."""
    split = parse_split(args.data_split)
    tokenizer, parts, others = build_tokenizer(args)
    if args.check_data and dist.get_rank() == 0:
        for part in (*parts, *others):
            part.check()
    packing = PackingOptions(
        seq_length=args.seq_length,
        method=args.packing,
        seed=args.seed,
        alignment=args.document_alignment if args.qkv_format == "thd" else 1,
        window=args.packing_window,
        one_document=args.qkv_format == "bshd",
    )

    def build(sources: list[Part], weights: tuple[float, ...], which: int, flag: str) -> SampleDataset:
        return build_dataset(
            sources, tokenizer, packing, split=weights, which=which, flag=flag, cache_path=Path(args.data_cache_path)
        )

    train = build(parts, split, 0, "--data-path")
    valid = None
    if args.eval_interval and others:
        valid = build(others, (1.0, 0.0, 0.0), 0, "--valid-data-path")
    elif args.eval_interval:
        valid = build(parts, split, 1, "--data-path")
    return tokenizer, train, valid


def build_model(
    args: Namespace, config: GPTConfig, grid: Grid, device: torch.device, clock: WaitClock | None = None
) -> GPT | Stages:
    """The model on this rank, or its stages: built on the meta device, sharded, then filled shard by shard."""
    compute_dtype = COMPUTE_DTYPES[args.dtype]
    parameter_dtype = torch.float64 if args.dtype == "fp64" else torch.float32
    timeout = collective_timeout(args)
    a2a_groups = (
        split_group(grid, "cp", args.attention.a2a_size, timeout=timeout) if args.attention.a2a_size > 1 else None
    )
    attention = build_attention(args.attention, head_dim=config.kv_channels, a2a_groups=a2a_groups, clock=clock)
    tp = TensorParallel(grid.group("tp"), args.sequence_parallel)
    ends = (0, config.num_layers - 1) if args.fp8_first_last_bf16 else ()
    precision = build_precision(args.fp8, group=grid.group("stage"), bf16_layers=ends)
    options = GPTOptions(
        dtype=parameter_dtype,
        compute_dtype=compute_dtype,
        recompute=args.recompute,
        dropout_seed=args.seed,
        implementation=args.transformer_impl,
        precision=precision,
        loss_chunk_size=args.loss_chunk_size,
        z_loss=args.z_loss,
    )
    stages = split_layers(
        config.num_layers,
        args.pp_size * args.virtual_stages,
        first=args.first_stage_layers,
        last=args.last_stage_layers,
    )
    chunks = []
    for layers in stages[grid.rank("pp") :: args.pp_size]:
        with torch.device("meta"):
            chunk = GPT(
                config,
                attention=attention,
                cp_group=grid.group("cp"),
                options=options,
                tp=tp,
                layers=layers,
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
    chunks = get_chunks(model)
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
    timeout = collective_timeout(args)
    tied = embedding_group(grid, timeout=timeout) if config.tie_embeddings else None
    return Pipeline(schedule, grid.group("pp"), tied)


def main(argv: list[str], outcome: Outcome) -> None:
    start_time = time.monotonic()

    # ------------------------------------------------------------------------------------------------
    # Flags, checked before any process group exists

    with one_line_refusals():
        launch = read_launch()
        args = parse_arguments(argv)
        asked = dict(vars(args))  # `resolve` fills in the others
        start = find_start(args)
        if args.eval_only and start is None and (args.load or args.resume):
            raise UserError(
                f"--eval-only: no checkpoint under {args.save or f'{args.run_dir}/checkpoints'}: nothing trained to validate"
            )
        chosen = resolve(
            args,
            world_size=launch.world_size,
            local_world_size=launch.local_world_size,
            cuda_devices=cuda_device_count,
            goes_on_from=start.facts if start and not start.weights_only else None,
        )
    if args.dry_run:
        if launch.rank == 0:
            size, lengths = data_of(args)
            padded = padded_vocab_size(size, args.make_vocab_size_divisible_by)
            print(plan_text(args, model_config(args, vocab_size=size, padded_vocab_size=padded), lengths), flush=True)
        return
    stops = StopRequests(interval=args.exit_interval, duration_minutes=args.exit_duration_in_mins, started=start_time)

    # ------------------------------------------------------------------------------------------------
    # Ranks and their grid

    timeout = collective_timeout(args)
    device, store = initialise_distributed(launch, args.device, timeout=timeout)
    is_writer = launch.rank == 0
    watchdog = outcome.watchdog = Watchdog(
        dist.PrefixStore("watchdog", store),
        rank=launch.rank,
        world_size=launch.world_size,
        startup_minutes=args.distributed_startup_timeout_minutes,
        minutes=args.distributed_timeout_minutes,
        on_stuck=outcome.stuck,
        parent=os.getppid() if launch.under_torchrun else None,
    )
    with one_line_refusals():
        check_ranks_agree(
            {k: v for k, v in vars(args).items() if k not in LOCAL_FLAGS} | {"torch": torch.__version__}, "flags"
        )
    sizes = GridSizes(
        pp=args.pp_size,
        dp_replicate=args.dp_replicate_size,
        dp_shard=args.dp_shard_size,
        cp=args.cp_size,
        tp=args.tp_size,
    )
    grid = build_grid(sizes, timeout=timeout, backend=group_backend(device))
    checkpoint_group = dist.new_group(backend="gloo", timeout=timeout, group_desc="checkpoint")
    control_group = dist.new_group(backend="gloo", timeout=timeout, group_desc="control")
    run_dir = Path(args.run_dir or broadcast_object(time.strftime("runs/%Y%m%d-%H%M%S")))
    start = broadcast_object(start)  # one rank's view of the file system
    save_dir = Path(args.save) if args.save else run_dir / "checkpoints"
    with one_line_refusals():
        outcome.lock = None if args.eval_only else on_one_rank(lambda: hold(save_dir))
    metrics_file = _optional_path(args.metrics_file, run_dir / "metrics.jsonl")
    tensorboard_dir = _optional_path(args.tensorboard_dir, run_dir / "tensorboard")

    # ------------------------------------------------------------------------------------------------
    # Data

    with one_line_refusals(), watchdog.patient("data preparation"):
        tokenizer, train_sequences, valid_sequences = on_rank_zero_first(lambda: build_data(args))
        data_facts: dict = {"tokenizer": tokenizer.fingerprint, "training documents": train_sequences.fingerprint()}
        data_facts["validation documents"] = valid_sequences.fingerprint() if valid_sequences else None
        check_ranks_agree(data_facts, "data")
    batch_plan = BatchPlan.from_grid(
        grid,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        qkv_format=args.qkv_format,
        layout=args.cp_layout,
        pad_rows=args.pad_rows,
    )

    # ------------------------------------------------------------------------------------------------
    # Model, optimiser, schedule, and where they start from

    watchdog.moved("building the model")
    vocab = padded_vocab_size(tokenizer.vocab_size, args.make_vocab_size_divisible_by)
    config = model_config(args, vocab_size=tokenizer.vocab_size, padded_vocab_size=vocab)
    cp_clock = WaitClock() if args.attention.backend == "native" and args.cp_size > 1 else None
    timers = Timers(args.timing_log_level, device)
    with one_line_refusals():
        model = build_model(args, config, grid, device, cp_clock)
    timers.watch_reductions(model)
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
    owned = get_norm_owned_names(model, grid)
    facts = run_facts(args, config, tokenizer, train_sequences)
    started = Started()
    if start is not None:
        watchdog.moved("loading")
        with one_line_refusals():
            started = load_start(start, facts, model, optimizer, grid, save=save_dir, group=checkpoint_group)
            if started.goes_on:
                train_sequences.load_state_dict(started.data)
    first_step = outcome.step = started.first_step
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

    # ------------------------------------------------------------------------------------------------
    # What the run tells

    status = StatusFile(run_dir / "status.json", attempt=broadcast_object(uuid.uuid4().hex), rank=launch.rank)
    settings = configuration(args, argv, config, world_size=launch.world_size)
    keep_before = EVERYTHING if args.eval_only else first_step if started.goes_on else None
    outcome.status = None if args.eval_only else status
    writers: list[Writer] = []
    if is_writer:
        with one_line_refusals(OSError, exit_code=1):
            run_dir.mkdir(parents=True, exist_ok=True)
            if not args.eval_only:
                status.write("running", step=first_step)
                replace_synced(run_dir / "config.json", json.dumps(settings, indent=1, default=str) + "\n")
                writers = open_writers(
                    tensorboard_dir, args.wandb_project, run_dir=run_dir, settings=settings, keep_before=keep_before
                )
        if writers and not started.goes_on:
            describe_data(writers, train_sequences, cp_size=args.cp_size, layout=args.cp_layout)
    stop_file = run_dir / "stop" if is_writer and not args.eval_only else None  # the folder may be a living run's
    with one_line_refusals(OSError, exit_code=1):
        stops.watch(stop_file, control_group, is_restart=launch.restarts > 0)
    peak_tflops = args.peak_tflops
    if peak_tflops is None and device.type == "cuda":
        peak_tflops = known_peak_tflops(torch.cuda.get_device_name(device))
    with one_line_refusals(OSError, exit_code=1):
        log = MetricsLog(
            config=config,
            world_size=launch.world_size,
            is_writer=is_writer,
            train_iters=args.train_iters,
            log_interval=args.log_interval,
            peak_tflops=peak_tflops,
            cp_clock=cp_clock,
            metrics_file=metrics_file,
            keep_before=keep_before,
            writers=writers,
            timers=timers,
            control_group=control_group,
            takes_nonfinite=args.on_nonfinite == "skip",
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
            paths={"run": run_dir, "checkpoints": save_dir, "TensorBoard": tensorboard_dir, "metrics": metrics_file},
        )

    def save_for_replay(step: int) -> str:
        """The weights before a step that ends the run, apart from the checkpoints that a run goes on from."""
        folder = run_dir / "nonfinite" / "checkpoints"
        watchdog.moved("a checkpoint", step)
        try:
            saver.wait()
            if broadcast_object(step_folder(save_dir, step).exists()):
                return ""
            Saver(folder, model, optimizer, grid, group=checkpoint_group, keep=1).save(step, facts | {"data": {}})
        except OSError as error:  # the same on every rank; the step itself is what the run ends of
            return f"; the weights before it could not be saved: {one_line(error)}"
        return f"; the weights before it are in {step_folder(folder, step)}"

    guard = NonFiniteGuard(
        skip=args.on_nonfinite == "skip",
        most=args.max_skipped_in_a_row,
        looks=device.type == "cpu" or args.on_nonfinite == "skip",
        model=model,
        grid=grid,
        folder=run_dir / "nonfinite",
        control_group=control_group,
        flush=log.flush,
        save_weights=save_for_replay,
        save=lambda place, step, told: save_step(
            place,
            step=step,
            told=told,
            sequences=train_sequences,
            numbers=range((step - 1) * args.global_batch_size, step * args.global_batch_size),
            facts={
                "flags": asked,
                "vocab_size": tokenizer.vocab_size,
                "checkpoints": str(save_dir.resolve()),
                "world_size": launch.world_size,
            },
        ),
    )
    profiler = StepProfiler(
        parse_profile_steps(args.profile_steps) if args.profile else None,
        folder=run_dir / "profile",
        rank=launch.rank,
        device=device,
    )

    def validate(step: int) -> None:
        if valid_sequences is None:
            return

        def loss_over(sequences: SampleDataset) -> tuple[float, int]:
            batches = build_loader(
                sequences,
                batch_plan,
                steps=range(min(args.eval_iters, -(-sequences.samples_per_epoch // args.global_batch_size))),
                num_workers=0,
                pin_memory=False,
                limit=sequences.samples_per_epoch,
            )
            return evaluate(model, watchdog.each(batches, "validation"), grid, device)

        parts = valid_sequences.sources if isinstance(valid_sequences, BlendedDataset) else []
        with one_line_refusals(), timers("eval"):
            log.validation(step, *loss_over(valid_sequences), sources={part.name: loss_over(part) for part in parts})

    def sample(when: str) -> None:
        if not args.sample_tokens:
            return
        watchdog.moved("a sample")
        prompt = tokenizer.encode(args.sample_prompt).tolist() or [tokenizer.eod]
        ids = generate(
            model,
            prompt,
            num_tokens=args.sample_tokens,
            grid=grid,
            device=device,
            alignment=math.lcm(
                args.document_alignment, document_unit("zigzag", args.cp_size), args.cp_size * args.tp_size
            ),
            qkv_format=args.qkv_format,
            layout=args.cp_layout,
            pad_token=tokenizer.eod,
            eod=tokenizer.eod,
            seed=args.seed,
        )
        if is_writer:
            text = args.sample_prompt + tokenizer.decode(ids)
            print(f"\n----- sample {when} -----\n{text}\n-----\n", flush=True)
            for writer in writers:
                writer.text(f"sample/{when.replace(' ', '_')}", text)

    def save(step: int) -> None:
        watchdog.moved("a checkpoint", step)
        with one_line_refusals(OSError, exit_code=1), timers("save"):
            saver.save(step, facts | {"data": train_sequences.state_dict(step * args.global_batch_size)})

    # ------------------------------------------------------------------------------------------------
    # The loop

    if args.eval_only:
        stops.stand_down()
        validate(first_step)
    else:
        stops.watch_interrupts()
        sample("before training")
    verify_before = first_step + args.verify_steps
    skipped = parse_skips(args.skip_steps, args.train_iters)
    steps = [step for step in range(first_step, args.train_iters) if step + 1 not in skipped and not args.eval_only]
    loader = build_loader(
        train_sequences,
        replace(batch_plan, hash_before_step=verify_before),
        steps=steps,
        num_workers=args.num_workers,
        pin_memory=device.type == "cuda",
        worker_init=outlive_a_broadcast,
    )
    batches_ahead = read_batches(loader)
    done, saved, stop = first_step, first_step, ""
    log.restart_clock()
    for step in steps:
        # Fetch the step's rows; their global token count divides the loss and so the gradients.
        profiler.before(step + 1)
        watchdog.moved("training", step)
        fetch_start = time.perf_counter()
        with timers("data"):
            batches = [next(batches_ahead) for _ in range(batch_plan.num_microbatches)]
        data_time = time.perf_counter() - fetch_start
        step_facts = sum_over(row_facts(batches).to(device, non_blocking=True), grid.group("batch"))
        loss_tokens = step_facts[0].clamp(min=1)
        if step < verify_before:
            verify_rows(batches, grid, device)

        # Forward and backward; gradients are summed over the ranks after the last microbatch.
        with timers("forward-backward"):
            cross_entropy = forward_backward(
                model,
                batches,
                loss_tokens=loss_tokens,
                device=device,
                reshard_between=args.reshard_after_forward == "on",
                pipeline=pipeline,
                timers=timers,
            )
        stops.start_agreeing()

        # Clip by the global norm and step, unless something is not finite.
        with timers("gradient norm"):
            grad_norm = clip_grad_norm_(dict(model.named_parameters()), grid, max_norm=args.clip_grad, owned=owned)
        loss = sum_over(sum_over(cross_entropy.clone(), grid.group("loss")), grid.group("pp")) / loss_tokens
        done = outcome.step = step + 1
        lr = schedule.at(step)
        set_lr(optimizer, lr)
        with timers("optimizer"):
            if guard.passes(done, loss, grad_norm, cross_entropy):
                optimizer.step()
            optimizer.zero_grad()
        if step < verify_before or (args.check_weights_interval and done % args.check_weights_interval == 0):
            verify_weights(model, grid, device, optimizer, tied_group=pipeline.tied_group if pipeline else None)

        memory = max_memory_bytes(device)
        with keeping_the_step_of(guard):  # on CUDA a loss that is not finite is found when a line is due
            log.step(
                done,
                loss=loss,
                grad_norm=grad_norm,
                lr=lr,
                facts=step_facts,
                data_time=data_time,
                memory=memory,
                skipped_steps=guard.skipped,
            )
            stop = stops.agreed(done)
            save_due = (args.save_interval and done % args.save_interval == 0) or (
                args.save_final and done == args.train_iters
            )
            if save_due or stop:
                log.flush()
        if profiler.after(done, is_last=bool(stop) or done == args.train_iters):
            if is_writer:
                print(f"profile in {profiler.folder}", flush=True)
            log.restart_clock()
        if stop and done < args.train_iters:  # whoever asked may end the run by force before a validation is over
            save(done)
            saved = done
        if args.eval_interval and (done % args.eval_interval == 0 or done == args.train_iters):
            validate(done)
            log.restart_clock()
        if args.sample_interval and done % args.sample_interval == 0:
            sample(f"after step {done}")
            log.restart_clock()
        if save_due and saved != done:
            save(done)
            saved = done
            log.restart_clock()
        watchdog.settled()
        if stop:
            break

    # ------------------------------------------------------------------------------------------------
    # The end

    batches_ahead.close()
    is_done = done >= args.train_iters or args.eval_only
    if is_done and not args.eval_only:
        sample("after training")
    with one_line_refusals(OSError, exit_code=1):
        saver.wait()
    log.close()
    if is_writer:
        found = checkpoints(save_dir)
        if not args.eval_only:
            status.write("done" if is_done else "requeue", step=done, reason=stop)
        if stop_file is not None:
            with suppress(OSError):
                stop_file.unlink()  # it has been heard
        print(
            f"done in {time.monotonic() - start_time:.0f} s"
            if is_done
            else f"stopped after step {done} ({stop}); --resume goes on"
        )
        print(f"data read:   {describe_epochs(train_sequences, done * args.global_batch_size)}")
        print(f"checkpoint:  {found[-1] if found else 'none (--save-interval 0, --no-save-final)'}")
        print(f"TensorBoard: {tensorboard_dir or 'off'}")
        print(f"metrics:     {metrics_file or 'off'}", flush=True)
    dist.barrier()
    watchdog.stop()
    dist.destroy_process_group()


def _optional_path(flag: str | None, default: Path | None) -> Path | None:
    return None if flag == "none" else Path(flag) if flag else default


@contextmanager
def keeping_the_step_of(guard: NonFiniteGuard) -> Iterator[None]:
    """A step that is only now found not to be finite is kept as the guard keeps those that it finds."""
    try:
        yield
    except NonFinite as error:
        raise NonFinite(
            error.step, error.loss, error.grad_norm, guard.keep(error.step, error.loss, error.grad_norm, [])
        ) from None


@contextmanager
def one_line_refusals(kind: type[Exception] = UserError, *, exit_code: int = 2) -> Iterator[None]:
    """An error of this kind in here is told in one line, by local rank 0; every rank exits with the code."""
    try:
        yield
    except kind as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            tell(one_line(error))
        raise SystemExit(exit_code) from error


def run(argv: list[str]) -> None:
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    sys.stdout = OutlivesItsReader(sys.stdout)  # type: ignore[assignment]
    with Outcome(rank=rank, local_rank=local_rank) as outcome, translate_worker_death():
        main(argv, outcome)


if __name__ == "__main__":
    run(sys.argv[1:])
