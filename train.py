"""Pretrain a GPT on packed documents over five parallel dimensions.

torchrun --nproc-per-node 4 train.py --cp-size 4
python train.py --help

docs/architecture.md shows the rooms of this repository, the way of a batch and the way of a step.
"""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # until the imports are done: they make no garbage, and collections would take a tenth of their time

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from checkpoint.files import lock_dir
from checkpoint.local import LocalCopies, build_local_copies
from checkpoint.resume import TrainState, find_start, load_start, run_metadata
from checkpoint.saver import Saver
from config.cli import parse_run
from config.schema import RunConfig
from config.validate import resolve
from data.batch import Batch
from data.batch_schedule import BatchSchedule
from data.loader import build_loader, read_batches, translate_worker_death
from data.mixture import resume_samples
from metrics.banner import RunSummary
from metrics.log import MetricsLog, StepResult, count_rows
from metrics.profiler import StepProfiler
from metrics.reports import open_reports, print_end
from metrics.timers import Timers
from model.gpt import GPT, Stages
from parallel.collectives import WaitClock, sum_over
from parallel.fsdp import clip_grad_norm_
from planner.estimate import format_plan, make_plan, pack_rows, read_vocab_and_lengths
from runtime.consistency import verify_rows, verify_weights
from runtime.distributed import (
    Launch,
    broadcast_object,
    check_ranks_agree,
    cuda_device_count,
    max_memory_bytes,
    read_launch,
    read_ranks,
    run_on_rank_zero,
    run_on_rank_zero_first,
    start_ranks,
)
from runtime.garbage import ScheduledCollector, freeze_imports
from runtime.nonfinite import NonFiniteError, NonFiniteGuard
from runtime.run import Run, RunPaths
from runtime.signals import StopRequests, defer_worker_signals
from runtime.status import RunStatus
from training.build import RunData, build_accumulation, build_batch_plan, build_data, build_model, build_pipeline
from training.evaluate import Validator
from training.lr_schedule import build_lr_schedule
from training.optimizer import build_optimizer, set_lr, skip_update_if
from training.sample import TextSampler
from training.step import forward_backward, get_norm_owned_names
from utils.errors import UserError, run_and_exit
from utils.logger import guard_output, log


def main(argv: list[str], status: RunStatus) -> None:
    start_time = time.monotonic()
    freeze_imports()

    # ------------------------------------------------------------------------------------------------
    # Flags: refused before any process group exists

    launch = read_launch()
    config, chosen = parse_run(argv)
    device_count = cuda_device_count
    if planned := config.training.dry_run_ranks:
        launch, device_count = Launch(world_size=planned, local_world_size=min(planned, 8)), lambda: 8
    asked = config.flags()
    start = find_start(config.checkpoint, config.logging)
    if config.training.eval_only and start is None and (config.checkpoint.load or config.checkpoint.resume):
        where = config.checkpoint.save or f"{config.checkpoint.run_dir}/checkpoints"
        raise UserError(f"--eval-only: no checkpoint under {where}: nothing trained to validate")
    chosen += resolve(
        config,
        world_size=launch.world_size,
        local_world_size=launch.local_world_size,
        cuda_devices=device_count,
        resumed=start.metadata if start and not start.weights_only else None,
    )
    if config.training.dry_run or config.training.dry_run_ranks:
        if launch.rank == 0:
            vocab_size, lengths = read_vocab_and_lengths(config)
            architecture = config.model.architecture(vocab_size)
            plan = make_plan(config, architecture, pack_rows(config, architecture, lengths))
            log(format_plan(config, plan))
        return
    stops = StopRequests(
        interval=config.training.exit_interval,
        duration_minutes=config.training.exit_duration_in_mins,
        started=start_time,
        check_interval=config.training.stop_check_interval,
    )

    # ------------------------------------------------------------------------------------------------
    # Ranks and folders

    ranks = start_ranks(config.parallel, launch, config.flags(), status)
    start = broadcast_object(start)  # rank 0's view of the file system; `start_ranks` compared what follows from it
    paths = RunPaths.of(config, default_run_dir=broadcast_object(time.strftime("runs/%Y%m%d-%H%M%S")))
    if not config.training.eval_only:
        status.lock = run_on_rank_zero(lambda: lock_dir(paths.checkpoints))
    run = Run(config, argv, asked, ranks, paths, status)

    # ------------------------------------------------------------------------------------------------
    # Data

    waiting = ranks.watchdog.suspend_timeout("data preparation")
    data = run_on_rank_zero_first(lambda: build_data(config, builds_ahead=launch.local_rank == 0), waiting=waiting)
    check_ranks_agree(data.fingerprints(), "data")

    # ------------------------------------------------------------------------------------------------
    # Model and optimizer

    ranks.watchdog.heartbeat("building the model")
    architecture = config.model.architecture(data.tokenizer.vocab_size)
    timers = Timers(config.logging.timing_log_level, ranks.device)
    has_cp_clock = config.parallel.attention.backend == "native" and config.parallel.cp_size > 1
    cp_clock = WaitClock() if has_cp_clock else None
    model = build_model(config, architecture, ranks.grid, ranks.device, cp_clock)
    timers.watch_reductions(model)
    optimizer = build_optimizer(model, config.training)

    # ------------------------------------------------------------------------------------------------
    # Resume

    ranks.watchdog.heartbeat("loading")
    metadata = run_metadata(config, architecture, data.tokenizer, data.train)
    copies = build_local_copies(run, model, optimizer, start)
    state = None
    if copies is not None and config.checkpoint.resume:
        state = copies.load(metadata)
    if state is None and start is not None:
        state = load_start(
            start,
            metadata,
            model,
            optimizer,
            ranks.grid,
            save=paths.checkpoints,
            config=config,
            is_tokenizer_trained=data.is_tokenizer_trained,
            group=ranks.checkpoint_group,
        )
    state = state or TrainState()
    if state.is_resumed and not config.training.eval_only:
        data = replace(data, train=resume_samples(data.train, state.data))
    status.step = state.first_step

    # ------------------------------------------------------------------------------------------------
    # Reports

    metrics = open_reports(run, architecture, data, state, timers, cp_clock)
    watches_stop_file = ranks.is_writer and not config.training.eval_only
    stops.watch_file(
        paths.stop_file if watches_stop_file else None, ranks.control_group, is_restart=launch.restarts > 0
    )
    if ranks.is_writer:
        RunSummary(config, chosen, architecture, ranks, metrics.peak_tflops, data, state, paths).print()

    # ------------------------------------------------------------------------------------------------
    # Train, or validate once

    trainer = Trainer(run, data, model, optimizer, state, metadata, metrics, timers, stops, copies)
    done, stop = trainer.validate_only() if config.training.eval_only else trainer.run()

    # ------------------------------------------------------------------------------------------------
    # End

    metrics.close()
    if ranks.is_writer:
        print_end(run, data, done, stop, time.monotonic() - start_time)
    dist.barrier()
    ranks.watchdog.stop()
    dist.destroy_process_group()


@dataclass
class Trainer:
    """The loop, and what happens between steps. Every method is collective.

    Args:
        state: before the first step.
        metadata: of the run, for its checkpoints.
        copies: on the nodes' own disks, of --local-save-interval.
    """

    shared: Run
    data: RunData
    model: GPT | Stages
    optimizer: torch.optim.Optimizer
    state: TrainState
    metadata: dict[str, Any]
    metrics: MetricsLog
    timers: Timers
    stops: StopRequests
    copies: LocalCopies | None = None

    def __post_init__(self) -> None:
        config, ranks, paths = self.shared.config, self.shared.ranks, self.shared.paths
        self.config, self.ranks, self.grid, self.device = config, ranks, ranks.grid, ranks.device
        self.batch_plan = build_batch_plan(config, self.metrics.architecture, self.grid)
        self.pipeline = build_pipeline(config, self.model, self.grid, self.device)
        self.lr_schedule = build_lr_schedule(config.training, config.data.seq_length)
        self.norm_owned = get_norm_owned_names(self.model, self.grid)
        self.saver = Saver(
            paths.checkpoints,
            self.model,
            self.optimizer,
            self.grid,
            group=ranks.checkpoint_group,
            keep=config.checkpoint.keep_checkpoints,
            keep_every=config.checkpoint.keep_every,
            asynchronous=config.checkpoint.async_save,
            on_saved=lambda place: log(f"saved {place}"),
        )
        self.position: dict[str, Any] = {}  # in the data, of rank 0, which writes it into checkpoints
        whole = BatchSchedule.constant(config.training.global_batch_size)
        in_order = replace(self.batch_plan, balance_work=False, batches=whole)
        sizes = self.data.tokenizer.token_bytes() if self.data.valid else None
        token_bytes = None if sizes is None else torch.from_numpy(sizes)
        self.validator = Validator(
            self.model,
            self.data.valid,
            token_bytes,
            in_order,
            ranks,
            self.metrics,
            self.timers,
            config.training.eval_iters,
            self.stops,
        )
        self.sampler = TextSampler(self.model, self.data.tokenizer, config, ranks, self.metrics.writers)
        self.profiler = StepProfiler(
            config.logging.profile_steps if config.logging.profile else None,
            folder=paths.run_dir / "profile",
            rank=ranks.launch.rank,
            device=self.device,
        )
        batches = config.training.batches
        done = batches.first_sample(self.state.first_step)
        start = {} if config.training.eval_only else self.data.train.state_dict(done)
        self.guard = NonFiniteGuard(
            training=config.training,
            checks_each_step=self.device.type == "cpu" or config.training.on_nonfinite == "skip",
            model=self.model,
            grid=self.grid,
            folder=paths.nonfinite,
            metadata={
                "flags": self.shared.asked,
                "fingerprints": self.data.fingerprints(),
                "data": start | {"batches": batches.to_json(config.training.train_iters)},
                "checkpoints": str(paths.checkpoints.resolve()),
                "world_size": ranks.launch.world_size,
            },
        )

    def validate_only(self) -> tuple[int, str]:
        """Validate the loaded weights. Returns as `run`."""
        self.stops.restore_handlers()
        self.validator.run(self.state.first_step)
        return self.state.first_step, ""

    def run(self) -> tuple[int, str]:
        """Train to the last step or a request to stop.

        Returns:
            (number of finished steps, why the run stopped; empty at its end)
        """
        state = self.state
        self.stops.watch_interrupts()
        self.sampler.run(f"after step {state.first_step}" if state.is_resumed else "before training")
        if state.validation_due and (stop := self.validator.run(state.first_step)):
            return state.first_step, stop
        try:
            done, stop = self._loop(state.first_step)
        except NonFiniteError as error:
            self.metrics.flush()  # nothing is pending if the log found the step
            raise self.guard.explain(error, self.saver, self.metadata) from None
        if done >= self.config.training.train_iters:
            self.sampler.run("after training")
        self.saver.wait()
        if self.copies is not None:
            self.copies.remove()
        return done, stop

    def _loop(self, first_step: int) -> tuple[int, str]:
        config, training, logging = self.config, self.config.training, self.config.logging
        verify_before = first_step + logging.verify_steps
        steps = [s for s in range(first_step, training.train_iters) if not is_skipped(config, s + 1)]
        loader = build_loader(
            self.data.train,
            replace(self.batch_plan, hash_before_step=verify_before),
            steps=steps,
            num_workers=config.data.num_workers,
            pin_memory=self.device.type == "cuda",
            worker_init=defer_worker_signals,
        )
        batches_ahead = read_batches(loader)
        collector = ScheduledCollector(training.gc_interval)
        done, saved, stop = first_step, first_step, ""
        self.metrics.restart_clock()
        for step in steps:
            done = step + 1
            self.profiler.before(done)
            self.ranks.watchdog.heartbeat("training", step)
            result = self._train_step(step, batches_ahead, is_verified=step < verify_before)

            # Log; save if due; stop if asked.
            self.metrics.step(result)
            stop = self.stops.stop_reason(done)
            is_last = done == training.train_iters
            is_save_due = is_due(done, config.checkpoint.save_interval) or (is_last and config.checkpoint.save_final)
            is_copy_due = is_due(done, config.checkpoint.local_save_interval)
            if is_save_due or is_copy_due or stop:
                self.metrics.flush()
            if self.profiler.after(done, is_last=bool(stop) or is_last):
                self.metrics.restart_clock()
            validates = is_due(done, training.eval_interval) or (is_last and training.eval_interval > 0)
            is_requested = stop not in ("", "--exit-interval")
            if stop and not is_last:  # before a long validation: the run may be killed during it
                self.save(done, validation_due=validates and is_requested)
                saved = done
            if validates:
                request = self.validator.run(done)
                self.metrics.restart_clock()
                is_noted = is_requested and saved == done
                if request and not is_noted and (not is_last or config.checkpoint.save_final):
                    self.metrics.flush()
                    self.save(done, validation_due=True)
                    saved = done
                stop = request or stop
            if is_due(done, logging.sample_interval):
                self.sampler.run(f"after step {done}")
                self.metrics.restart_clock()
            if (is_save_due or is_copy_due) and saved != done:
                self.save(done, to=None if is_save_due else self.copies)
                saved = done
                self.metrics.restart_clock()
            self.ranks.watchdog.end_startup()
            collector.after(done)
            if stop:
                break
        batches_ahead.close()
        collector.stop()
        return done, stop

    def _train_step(self, step: int, batches_ahead: Iterator[Batch], *, is_verified: bool) -> StepResult:
        """Fetch, forward and backward, clip, update."""
        fetch_start = time.perf_counter()
        with self.timers("data"):
            batches = [next(batches_ahead) for _ in range(self.batch_plan.num_microbatches(step))]
        data_time = time.perf_counter() - fetch_start
        # The step's global count of labelled tokens divides the loss, and so the gradients.
        own_counts = count_rows(batches, self.batch_plan).to(self.device, non_blocking=True)
        counts = sum_over(own_counts, self.grid.group("batch"))
        loss_tokens = counts[0].clamp(min=1)
        if is_verified:
            verify_rows(batches, self.grid, self.device)

        # Gradients are summed over the ranks after the last microbatch.
        with self.timers("forward-backward"):
            cross_entropy = forward_backward(
                self.model,
                batches,
                loss_tokens=loss_tokens,
                device=self.device,
                accumulation=build_accumulation(self.config.parallel),
                pipeline=self.pipeline,
                timers=self.timers,
            )
        self.stops.start_sync()
        if self.ranks.is_writer:  # each step, as a blend counts all samples since it was asked last
            self.position = self.data.train.state_dict(self.config.training.batches.first_sample(step + 1))

        # Clip by the global norm; update unless something is not finite.
        with self.timers("gradient norm"):
            grad_norm = clip_grad_norm_(
                dict(self.model.named_parameters()),
                self.grid,
                max_norm=self.config.training.clip_grad,
                owned=self.norm_owned,
            )
        # `sum_over` works in place; pipeline stages before the last hold 0.
        loss = sum_over(sum_over(cross_entropy.clone(), self.grid.group("loss")), self.grid.group("pp")) / loss_tokens
        done = self.shared.status.step = step + 1
        lr = self.lr_schedule.at(step)
        set_lr(self.optimizer, lr)
        skip_update_if(self.optimizer, counts[0] == 0)  # no label in the whole step: weights would only decay
        with self.timers("optimizer"):
            if self.guard.should_update(done, loss, grad_norm, cross_entropy):
                self.optimizer.step()
            self.optimizer.zero_grad()
        if is_verified or is_due(done, self.config.parallel.check_weights_interval):
            tied_group = self.pipeline.tied_group if self.pipeline else None
            verify_weights(self.model, self.grid, self.device, self.optimizer, tied_group=tied_group)
        memory = max_memory_bytes(self.device)
        return StepResult(
            done,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            counts=counts,
            data_time=data_time,
            memory=memory,
            consumed_tokens=self.config.training.batches.first_sample(done) * self.config.data.seq_length,
            skipped_steps=self.guard.skipped,
        )

    def save(self, step: int, *, validation_due: bool = False, to: LocalCopies | None = None) -> None:
        """Write a checkpoint after `step` steps.

        Args:
            validation_due: the resumed run validates first.
            to: the nodes' own disks; None: the folder of checkpoints.
        """
        self.ranks.watchdog.heartbeat("a checkpoint", step)
        with self.timers("save"):
            due = {"validation_due": True} if validation_due else {}
            position = self.position | {"batches": self.config.training.batches.to_json(step)}
            (to or self.saver).save(step, self.metadata | {"data": position} | due)


def is_due(done: int, interval: int) -> bool:
    """Whether an action of this interval follows step `done`; 0: never."""
    return interval > 0 and done % interval == 0


def is_skipped(config: RunConfig, step: int) -> bool:
    """Whether --skip-steps names the step, counted from 1."""
    return any(step in steps for steps in config.data.skip_steps)


def run(argv: list[str]) -> None:
    """`main` with every error turned into one line, status.json and an exit code."""
    guard_output(ends=False)
    rank, local_rank = read_ranks()
    with RunStatus(rank=rank, local_rank=local_rank) as status, translate_worker_death():
        main(argv, status)


if __name__ == "__main__":
    run_and_exit(run)
