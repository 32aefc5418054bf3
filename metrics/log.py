"""Metrics of a run: a log line every few steps, a JSON record a step, TensorBoard scalars.

Values on the device stay tensors until a line is due, so that no step waits for the device.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import mmap
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from config.schema import LoggingConfig, TrainingConfig
from data.batch import Batch, BatchPlan
from metrics.tensorboard import TensorBoardWriter, as_floats
from metrics.timers import Timers, describe_phases
from model.config import GPTConfig
from parallel.collectives import WaitClock
from runtime.nonfinite import NonFiniteError
from training.flops import training_flops
from utils.errors import UserError
from utils.files import open_regular, parse_json, replace_synced
from utils.logger import join_parts, log, log_error
from utils.names import distinct_suffixes

APPEND_ONLY = sys.maxsize  # keep_before of a metrics file that another run may be writing
NEWLINE = b"\n"
COPIED_BYTES = 1 << 20  # of the metrics file at a time

# Counts of a row, summed over a step's rows, in this order, in one float64 tensor.
ROW_COUNTS = (
    "loss_tokens",
    "real_tokens",
    "squared_lengths",
    "row_tokens",
    "cp_balance",
    "rows",
    "work",
    "fallback_rows",
)

# Part of a log line, its meaning, and the step or steps that it is of.
SINCE = "since the last line"
LEGEND = (
    ("step", "finished steps / `--train-iters`", ""),
    ("loss", "mean cross-entropy of the labelled tokens of all ranks, in nats, without z-loss", "this step"),
    ("grad norm", "norm of the whole gradient before clipping", "this step"),
    ("lr", "learning rate", "this step"),
    ("tok/s", "tokens a second of all ranks, padding not counted; in brackets: a rank", SINCE),
    ("TFLOP/s a rank", "model FLOPs a second (backward = 2 x forward, no recomputation, causal attention)", SINCE),
    ("MFU", "these FLOPs over the device's peak; only if the peak is known (`--peak-tflops`)", SINCE),
    ("packing", "tokens of documents over tokens of rows", "this step"),
    ("cp balance", "attention work of the busiest cp rank over the mean of its group; 1 is even", "this step"),
    ("work balance", "work of the busiest rank over the mean of all ranks; 1 is even", "this step"),
    ("fallback rows", "rows that `--cp-layout hybrid` could not place evenly; only if there are any", SINCE),
    ("cp wait", "share of the time in which rank 0's attention waited for cp ranks (native p2p and all_gather)", SINCE),
    ("skipped", "steps without an update so far; only if there are any", "the run"),
    ("data", "share of the time in which rank 0 waited for its batches", SINCE),
    ("mem", "largest memory of rank 0 so far: tensors on CUDA, the process on CPUs", "this start"),
    ("left", "hours:minutes:seconds to the last step at this speed, without validation and checkpoints", SINCE),
)


def legend_table() -> str:
    """`LEGEND` for the docs."""
    rows = [f"| {part} | {meaning} | {steps} |" for part, meaning, steps in LEGEND]
    return "\n".join(["| part | meaning | of |", "|---|---|---|", *rows])


def count_rows(batches: list[Batch], plan: BatchPlan) -> Tensor:
    """[len(ROW_COUNTS) + data ranks] float64 sums over this rank's rows of a step.

    The last numbers are the work of each data rank's busiest cp rank, 0 for other data ranks: a sum over the ranks
    gathers them.
    """
    sums = [0.0] * (len(ROW_COUNTS) + plan.batch_size)
    for batch in batches:
        squares = (batch.packed_seq.lengths**2).sum()
        row_length = batch.packed_seq.row_length
        work, busiest = plan.row_work(batch)
        placement = batch.packed_seq.placement
        is_fallback = placement is not None and placement.is_fallback
        counts = (batch.loss_tokens, batch.real_tokens, squares, row_length, batch.cp_balance, 1, work, is_fallback)
        sums[: len(ROW_COUNTS)] = [a + float(b) for a, b in zip(sums, counts, strict=False)]
        sums[len(ROW_COUNTS) + plan.batch_rank] += busiest
    return torch.tensor(sums, dtype=torch.float64)


@dataclass
class StepResult:
    """A finished step.

    Attributes:
        step: counted from 1.
        loss, grad_norm: scalars of the whole grid, on the device.
        counts: `count_rows` summed over the `batch` axis.
        data_time: seconds that this rank waited for its batches.
        memory: peak bytes so far.
        consumed_tokens: of all steps so far, padding counted.
        skipped_steps: steps skipped so far because they were not finite; the log adds those without a label.
        step_time, cp_wait: seconds of the step and of its waits for cp ranks; set by `MetricsLog`.
    """

    step: int
    loss: Tensor
    grad_norm: Tensor
    lr: float
    counts: Tensor
    data_time: float
    memory: int
    consumed_tokens: int
    skipped_steps: int = 0
    step_time: float = 0.0
    cp_wait: float | None = None


@dataclass(frozen=True)
class HeldOut:
    """Loss of held-out text.

    Attributes:
        loss: mean of the labelled tokens, in nats; None: there are none.
        tokens, text_bytes: number of labelled tokens, and of the bytes of UTF-8 that they stand for.
    """

    loss: float | None
    tokens: int
    text_bytes: int

    @property
    def bits_per_byte(self) -> float | None:
        """The loss in bits over the bytes of the text: comparable between tokenizers, and with a compressor."""
        if self.loss is None or not self.text_bytes:
            return None
        return self.loss * self.tokens / self.text_bytes / math.log(2)

    def describe(self) -> str:
        if self.loss is None:
            return "no token with a label"
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits a byte"
        return f"loss {self.loss:.5f}{bits}, perplexity {perplexity(self.loss):,.2f}"


class MetricsLog:
    """Writes a run's metrics. Every rank holds one; only rank 0's writes.

    Args:
        peak_tflops: dense peak of one rank; None: no MFU.
        cp_clock: counts attention's waits for cp ranks; None: none are reported.
        metrics_file: None on ranks that don't write.
        keep_before: of a resumed run: later records of the metrics file are dropped, for they are written again; None:
            a new file; APPEND_ONLY: everything is kept.
        writers: empty on ranks that don't write.
        mixtures: step -> words for the mixture that begins with it.
        timers, control_group: phases, and the gloo group over which they are compared.
    """

    def __init__(
        self,
        *,
        architecture: GPTConfig,
        training: TrainingConfig,
        logging: LoggingConfig,
        control_group: dist.ProcessGroup,
        timers: Timers,
        peak_tflops: float | None = None,
        cp_clock: WaitClock | None = None,
        metrics_file: Path | None = None,
        keep_before: int | None = None,
        writers: Sequence[TensorBoardWriter] = (),
        mixtures: Mapping[int, str] | None = None,
    ) -> None:
        self.mixtures = mixtures or {}
        self.architecture, self.control_group, self.timers = architecture, control_group, timers
        self.world_size, self.is_writer = control_group.size(), control_group.rank() == 0
        self.train_iters, self.log_interval = training.train_iters, logging.log_interval
        self.skips_nonfinite = training.on_nonfinite == "skip"
        self.peak_tflops, self.cp_clock, self.writers = peak_tflops, cp_clock, writers
        self.pending: list[StepResult] = []
        self.unlabelled_steps = 0
        self.last_time = time.perf_counter()
        self.step_seconds = 0.0  # mean of the last line's steps
        self.show_bar = self.is_writer and sys.stdout.isatty()
        self.file: FileIO | None = None
        self.unwritten = b""  # of the metrics file
        if self.is_writer and metrics_file is not None:
            self.file = open_metrics_file(metrics_file, keep_before)

    def restart_clock(self) -> None:
        """Leave out of step times what was done since the last step (validation, a checkpoint)."""
        self.last_time = time.perf_counter()
        if self.cp_clock is not None:
            self.cp_clock.read()

    def step(self, result: StepResult) -> None:
        """Take a finished step; write when a line is due.

        Raises:
            NonFiniteError: a loss or gradient norm is not finite.
        """
        is_due = result.step == 1 or result.step % self.log_interval == 0 or result.step == self.train_iters
        is_cuda = result.loss.is_cuda
        if is_due and is_cuda:
            torch.cuda.synchronize()  # a line's times cover finished work
        now = time.perf_counter()
        # On CUDA waits are read where the device is synchronised, and spread over the steps of the line.
        if self.cp_clock is not None and (is_due or not is_cuda):
            result.cp_wait = self.cp_clock.read()
        self.timers.add("cp wait", result.cp_wait or 0.0)
        result.step_time = now - self.last_time
        self.last_time = now
        self.pending.append(result)
        if is_due:
            self.flush()
        elif self.show_bar:
            step, total = result.step, self.train_iters
            self._show_bar(step, total, f"step {step}/{total}, {self._describe_left(step)}")

    def flush(self) -> None:
        """Write the pending steps, so that a loss that is not finite is found now.

        Raises:
            NonFiniteError: as `step`.
        """
        pending, self.pending = self.pending, []
        if not pending:
            return
        if pending[0].loss.is_cuda:
            _spread_times(pending)
        records = [self._record(result, pending[-1].memory) for result in pending]
        for record in records:
            self._write_record(record)
            if self.is_writer and (mixture := self.mixtures.get(record["step"])):
                self._write_record({"step": record["step"], "changed": mixture})
                log(self._over_bar(f"from step {record['step']}: {mixture}"))
            for writer in self.writers:
                numbers = {f"train/{k}": v for k, v in as_floats(record).items() if k != "step"}
                writer.scalars(numbers, record["step"])
        if self.is_writer:
            self._print_line(records, pending)
        wrong = next(
            (r for r in records if not (math.isfinite(r["loss"] or 0) and math.isfinite(r["grad_norm"]))), None
        )
        if wrong is not None and not self.skips_nonfinite:
            raise NonFiniteError(wrong["step"], wrong["loss"], wrong["grad_norm"])
        if self.timers.level:
            self._write_timers(records[-1]["step"], len(records))

    def _record(self, result: StepResult, memory: int) -> dict[str, Any]:
        numbers = result.counts.tolist()
        counts, busiest = dict(zip(ROW_COUNTS, numbers, strict=False)), numbers[len(ROW_COUNTS) :]
        flops = training_flops(
            self.architecture, tokens=counts["real_tokens"], squared_lengths=counts["squared_lengths"]
        )
        is_labelled = counts["loss_tokens"] > 0
        self.unlabelled_steps += not is_labelled
        seconds = result.step_time
        tflops = flops / seconds / 1e12 / self.world_size
        return {
            "step": result.step,
            "loss": result.loss.item() if is_labelled else None,
            "grad_norm": result.grad_norm.item(),
            "lr": result.lr,
            "tokens": int(counts["real_tokens"]),
            "loss_tokens": int(counts["loss_tokens"]),
            "consumed_tokens": result.consumed_tokens,
            "step_time_s": seconds,
            "tokens_per_s": counts["real_tokens"] / seconds,
            "tflops_per_rank": tflops,
            "mfu": tflops / self.peak_tflops if self.peak_tflops else None,
            "packing_efficiency": counts["real_tokens"] / counts["row_tokens"],
            "cp_balance": counts["cp_balance"] / counts["rows"],
            "work_balance": max(busiest) * len(busiest) / counts["work"],
            "cp_fallback_rows": int(counts["fallback_rows"]),
            "data_share": result.data_time / seconds,
            "cp_wait_share": None if result.cp_wait is None else result.cp_wait / seconds,
            "max_memory_bytes": memory,
            "skipped_steps": result.skipped_steps + self.unlabelled_steps,
        }

    def _write_record(self, record: dict[str, Any]) -> None:
        """Write the record; on an I/O error keep it, to be written with the next one: training goes on."""
        if self.file is None:
            return
        failed_before = bool(self.unwritten)
        if not failed_before and _ends_in_half_a_line(self.file):  # of a writer that died
            self.unwritten = NEWLINE
        self.unwritten += json.dumps(record).encode() + b"\n"
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            if not failed_before:
                log_error(f"{self.file.name}: {error.strerror}; training goes on, and records wait in memory")
        else:
            if failed_before:
                log(f"{self.file.name} can be written again: no record is missing")

    def _print_line(self, records: list[dict[str, Any]], pending: list[StepResult]) -> None:
        last, seconds = records[-1], sum(r.step_time for r in pending)
        speed = sum(r["tokens"] for r in records) / seconds
        tflops = sum(r["tflops_per_rank"] * r["step_time_s"] for r in records) / seconds
        waits = [r.cp_wait for r in pending if r.cp_wait is not None]
        self.step_seconds = seconds / len(records)
        fallbacks = sum(r["cp_fallback_rows"] for r in records)
        parts = [
            f"step {last['step']:{len(str(self.train_iters))}d}/{self.train_iters}",
            f"loss {'none' if last['loss'] is None else format(last['loss'], '8.5f')}",
            f"grad norm {last['grad_norm']:7.3f}",
            f"lr {last['lr']:.2e}",
            f"{speed:9,.0f} tok/s ({speed / self.world_size:,.0f} a rank)",
            f"{tflops:6.4g} TFLOP/s a rank",
            *([f"MFU {tflops / self.peak_tflops:6.1%}"] if self.peak_tflops else []),
            f"packing {last['packing_efficiency']:6.2%}",
            f"cp balance {last['cp_balance']:.3f}",
            f"work balance {last['work_balance']:.3f}",
            *([f"fallback rows {fallbacks}"] if fallbacks else []),
            *([f"cp wait {sum(waits) / seconds:5.1%}"] if waits else []),
            *([f"skipped {last['skipped_steps']}"] if last["skipped_steps"] else []),
            f"data {sum(r.data_time for r in pending) / seconds:5.1%}",
            f"mem {last['max_memory_bytes'] / 2**30:6.2f} GiB",
            self._describe_left(last["step"]),
        ]
        log(self._over_bar(join_parts(parts, " | ", indent=2)))
        if unlabelled := [r["step"] for r in records if r["loss"] is None]:
            log(f"no token of step {', '.join(map(str, unlabelled))} has a label: the weights are not updated")

    def _over_bar(self, text: str) -> str:
        """A line that replaces the progress bar on a terminal."""
        return f"\r\033[K{text}" if self.show_bar else text

    def _describe_left(self, step: int) -> str:
        left = int((self.train_iters - step) * self.step_seconds)
        return f"{left // 3600:d}:{left // 60 % 60:02d}:{left % 60:02d} left"

    def _show_bar(self, done: int, total: int, text: str) -> None:
        share = 30 * done // total
        print(self._over_bar(f"[{'#' * share}{'.' * (30 - share)}] {text}"), end="", flush=True)

    def show_progress(self, batches: Iterable[Batch], total: int) -> Iterator[Batch]:
        """The batches of a validation, on a terminal with a bar of those that are done."""
        for done, batch in enumerate(batches):
            if self.show_bar:
                self._show_bar(done, total, f"validation: batch {done}/{total}")
            yield batch

    def _write_timers(self, step: int, num_steps: int) -> None:
        phases = self.timers.read(self.control_group)
        if not (phases and self.is_writer):
            return
        log(describe_phases(phases, num_steps=num_steps))
        self._write_record({"step": step, "timed_steps": num_steps, "timers": phases})
        for writer in self.writers:
            maxima = {
                f"timers/{name.replace(' ', '_')}_ms": 1000 * most / num_steps for name, (_, most, _) in phases.items()
            }
            writer.scalars(maxima, step)

    def validation(self, step: int, whole: HeldOut, sources: Mapping[str, HeldOut] | None = None) -> None:
        """Report a validation after `step` steps, and of each source of a blend."""
        if not self.is_writer:
            return
        sources = sources or {}
        lines = [f"validation after step {step}: {whole.describe()}, over {whole.tokens:,} held-out tokens"]
        lines += [f"  {name}: {own.describe()}, over {own.tokens:,}" for name, own in sources.items()]
        log(self._over_bar("\n".join(lines)))
        record: dict[str, Any] = {"step": step, "validation_loss": whole.loss, "validation_tokens": whole.tokens}
        record["bits_per_byte"] = whole.bits_per_byte
        if sources:
            record["validation"] = {
                name: {"loss": own.loss, "tokens": own.tokens, "bits_per_byte": own.bits_per_byte}
                for name, own in sources.items()
            }
        self._write_record(record)
        values = {"loss": whole.loss, "perplexity": None if whole.loss is None else perplexity(whole.loss)}
        values["bits_per_byte"] = whole.bits_per_byte
        names = distinct_suffixes(list(sources), taken=list(values))
        values |= {name: own.loss for name, own in zip(names, sources.values(), strict=True)}
        for writer in self.writers:
            writer.scalars({f"validation/{name}": value for name, value in as_floats(values).items()}, step)

    def close(self) -> None:
        if self.file is not None:
            if self.unwritten:
                log_error(f"{self.file.name}: {self.unwritten.count(NEWLINE)} records could not be written")
            self.file.close()
        for writer in self.writers:
            writer.close()


def _spread_times(pending: list[StepResult]) -> None:
    """On CUDA the host runs ahead: one step's time is its mean share of the line's, as are its waits."""
    mean = sum(result.step_time for result in pending) / len(pending)
    waited = pending[-1].cp_wait
    for result in pending:
        result.step_time = mean
        result.cp_wait = None if waited is None else waited / len(pending)


def perplexity(loss: float) -> float:
    """exp of the mean loss; inf where that is too large."""
    return math.exp(loss) if loss < 700 else math.inf


def open_metrics_file(path: Path, keep_before: int | None) -> FileIO:
    """The file, open for appending without a buffer.

    Only whole records of steps up to `keep_before` are kept (APPEND_ONLY: all). They replace the file by one rename: a
    run that dies here, or a full disk, leaves the records as they were. None: a fresh start, which renames the records
    of an earlier start.

    Raises:
        UserError: a link, or a file that is not this user's alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if keep_before != APPEND_ONLY and path.exists():
            _keep_records(path, keep_before)
        return cast(FileIO, open_regular(path, "ab+", buffering=0))
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EPERM):
            raise
        raise UserError(f"{path}: {error.strerror}; --metrics-file FILE or none writes elsewhere") from error


def _ends_in_half_a_line(file: FileIO) -> bool:
    end = os.fstat(file.fileno()).st_size
    return end > 0 and os.pread(file.fileno(), 1, end - 1) != NEWLINE


def _keep_records(path: Path, keep_before: int | None) -> None:
    """Keep the records of `open_metrics_file`: the file up to the last of them, for steps ascend."""
    with open_regular(path) as file:
        found = os.fstat(file.fileno())
        if keep_before is not None:
            end = _end_of_records(file, keep_before) if found.st_size else 0
            # Another may have made the file, or linked a copy.
            is_ours_alone = found.st_nlink == 1 and found.st_uid == os.geteuid()
            if end != found.st_size or not is_ours_alone:
                replace_synced(path, (file.read(min(COPIED_BYTES, end - at)) for at in range(0, end, COPIED_BYTES)))
        elif found.st_size:
            backup = _free_name(path)
            path.rename(backup)
            log(f"no checkpoint to resume: the records of an earlier start are now in {backup}")


def _end_of_records(file: IO[bytes], keep_before: int) -> int:
    """Bytes up to the end of the last whole record of a step up to `keep_before`; reads backwards."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as records:
        end = records.rfind(NEWLINE) + 1  # the line behind was being written when the run died
        while end:
            begin = records.rfind(NEWLINE, 0, end - 1) + 1
            with suppress(ValueError, KeyError, TypeError):  # half a record of an earlier death
                if parse_json(records[begin:end])["step"] <= keep_before:
                    break
            end = begin
        return end


def _free_name(path: Path) -> Path:
    """`path`.before-N for the smallest N that is free."""
    names = (path.with_name(f"{path.name}.before-{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())
