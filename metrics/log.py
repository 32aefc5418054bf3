"""What a run tells: one line every few steps, one JSON object a step, TensorBoard scalars.

Values that live on the device are kept as tensors until a line is due, so that logging does not make a
step wait for the device.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import Batch
from metrics import timers as timers_module
from metrics.tensorboard import Writer, as_floats
from metrics.timers import Timers
from model.config import GPTConfig
from parallel.collectives import WaitClock
from training.flops import training_flops
from utils.files import replace_synced

EVERYTHING = sys.maxsize  # of a metrics file: another run may be writing it

# Per-row facts that are summed over a step's rows, in this order, in one float64 tensor.
ROW_FACTS = ("loss_tokens", "real_tokens", "squared_lengths", "row_tokens", "cp_balance", "rows")


def row_facts(batches: list[Batch]) -> Tensor:
    """[len(ROW_FACTS)] float64 sums over this rank's rows of a step."""
    sums = [0.0] * len(ROW_FACTS)
    for batch in batches:
        lengths = batch.packed_seq.lengths
        facts = (
            batch.loss_tokens,
            batch.real_tokens,
            (lengths**2).sum(),
            batch.packed_seq.row_length,
            batch.cp_balance,
            1,
        )
        sums = [a + float(b) for a, b in zip(sums, facts, strict=True)]
    return torch.tensor(sums, dtype=torch.float64)


@dataclass
class _Pending:
    """A step that is done but not yet written."""

    step: int
    loss: Tensor
    grad_norm: Tensor
    lr: float
    facts: Tensor
    step_time: float
    data_time: float
    cp_wait: float | None
    skipped_steps: int


class NonFinite(FloatingPointError):
    """A loss or gradient norm of a step, counted from 1, is not finite."""

    def __init__(self, step: int, loss: float, grad_norm: float, more: str = "") -> None:
        super().__init__(f"step {step}: loss {loss}, gradient norm {grad_norm}{more}")
        self.step, self.loss, self.grad_norm = step, loss, grad_norm


class MetricsLog:
    """Writes a run's metrics. Every rank holds one; only rank 0's writes.

    Args:
        peak_tflops: of one rank, dense; None leaves MFU out.
        cp_clock: what attention's waits are counted on; None leaves them out.
        keep_before: drop records of the metrics file from this step on (a resumed run writes them again);
            None starts the file anew, EVERYTHING only adds to it.
        writers: of the writing rank.
        timers, control_group: phases, and the ranks that they are compared over (host memory).
        takes_nonfinite: such steps are passed over by the run, so they are written like others.
    """

    def __init__(
        self,
        *,
        config: GPTConfig,
        world_size: int,
        is_writer: bool,
        train_iters: int,
        log_interval: int,
        peak_tflops: float | None,
        cp_clock: WaitClock | None,
        metrics_file: Path | None,
        keep_before: int | None,
        writers: Sequence[Writer] = (),
        timers: Timers | None = None,
        control_group: dist.ProcessGroup | None = None,
        takes_nonfinite: bool = False,
    ) -> None:
        self.config, self.world_size, self.is_writer = config, world_size, is_writer
        self.train_iters, self.log_interval, self.peak_tflops, self.cp_clock = (
            train_iters,
            log_interval,
            peak_tflops,
            cp_clock,
        )
        self.pending: list[_Pending] = []
        self.last_time, self.memory = time.perf_counter(), 0
        self.file: TextIO | None = None
        self.writers, self.timers, self.control_group, self.takes_nonfinite = (
            writers,
            timers,
            control_group,
            takes_nonfinite,
        )
        self.show_bar = is_writer and sys.stdout.isatty()
        if is_writer and metrics_file is not None:
            self.file = open_metrics_file(metrics_file, keep_before)

    def restart_clock(self) -> None:
        """Leave out of step times what was done since the last step (validation, a checkpoint)."""
        self.last_time = time.perf_counter()
        if self.cp_clock is not None:
            self.cp_clock.read()

    def step(
        self,
        step: int,
        *,
        loss: Tensor,
        grad_norm: Tensor,
        lr: float,
        facts: Tensor,
        data_time: float,
        memory: int,
        skipped_steps: int = 0,
    ) -> None:
        """Take in one finished step, counted from 1; write when a line is due.

        Args:
            loss, grad_norm: scalars, already of the whole grid.
            facts: `row_facts` summed over the `batch` axis.
            data_time: seconds this rank waited for its batches.
            memory: peak bytes so far.
            skipped_steps: so far, because they were not finite.

        Raises:
            NonFinite: a loss or gradient norm that is not finite.
        """
        due = step == 1 or step % self.log_interval == 0 or step == self.train_iters
        if due and loss.is_cuda:
            torch.cuda.synchronize()  # a line's times cover finished work
        now = time.perf_counter()
        # On CUDA the waits can only be read where the device is in step: a line's sum is spread over its steps.
        cp_wait = self.cp_clock.read() if self.cp_clock is not None and (due or not loss.is_cuda) else None
        if self.timers is not None:
            self.timers.add("cp wait", cp_wait or 0.0)
        self.pending.append(
            _Pending(step, loss, grad_norm, lr, facts, now - self.last_time, data_time, cp_wait, skipped_steps)
        )
        self.last_time, self.memory = now, memory
        if due:
            self._write(memory)
        elif self.show_bar:
            self._bar(step)

    def flush(self) -> None:
        """Write what is pending, so that a loss that is not finite is found now.

        Raises:
            NonFinite: as `step`.
        """
        if self.pending:
            self._write(self.memory)

    def _write(self, memory: int) -> None:
        # A step's own time is only its share where the device runs behind the host: even it out.
        pending, self.pending = self.pending, []
        if pending[0].loss.is_cuda:
            mean = sum(p.step_time for p in pending) / len(pending)
            waited = pending[-1].cp_wait
            for p in pending:
                p.step_time = mean
                p.cp_wait = None if waited is None else waited / len(pending)
        records = [self._record(p, memory) for p in pending]
        for record in records:
            if self.file is not None:
                self.file.write(json.dumps(record) + "\n")
            for writer in self.writers:
                writer.scalars({f"train/{k}": v for k, v in as_floats(record).items() if k != "step"}, record["step"])
        if self.file is not None:
            self.file.flush()
        if self.is_writer:
            self._print(records, pending)
        bad = next((r for r in records if not all(abs(r[k]) < float("inf") for k in ("loss", "grad_norm"))), None)
        if bad is not None and not self.takes_nonfinite:
            raise NonFinite(bad["step"], bad["loss"], bad["grad_norm"])
        if self.timers is not None and self.timers.level:
            self._write_timers(records[-1]["step"], len(records))

    def _record(self, p: _Pending, memory: int) -> dict[str, Any]:
        facts = dict(zip(ROW_FACTS, p.facts.tolist(), strict=True))
        flops = training_flops(self.config, tokens=facts["real_tokens"], squared_lengths=facts["squared_lengths"])
        tflops = flops / p.step_time / 1e12 / self.world_size
        return {
            "step": p.step,
            "loss": p.loss.item(),
            "grad_norm": p.grad_norm.item(),
            "lr": p.lr,
            "tokens": int(facts["real_tokens"]),
            "loss_tokens": int(facts["loss_tokens"]),
            "step_time_s": p.step_time,
            "tokens_per_s": facts["real_tokens"] / p.step_time,
            "tflops_per_rank": tflops,
            "mfu": tflops / self.peak_tflops if self.peak_tflops else None,
            "packing_efficiency": facts["real_tokens"] / facts["row_tokens"],
            "cp_balance": facts["cp_balance"] / facts["rows"],
            "data_share": p.data_time / p.step_time,
            "cp_wait_share": None if p.cp_wait is None else p.cp_wait / p.step_time,
            "max_memory_bytes": memory,
            "skipped_steps": p.skipped_steps,
        }

    def _print(self, records: list[dict[str, Any]], pending: list[_Pending]) -> None:
        last, seconds = records[-1], sum(p.step_time for p in pending)
        speed = sum(r["tokens"] for r in records) / seconds
        tflops = sum(r["tflops_per_rank"] * r["step_time_s"] for r in records) / seconds
        mfu = f"{tflops / self.peak_tflops:6.1%}" if self.peak_tflops else "n/a"
        waits = [r["cp_wait_share"] * r["step_time_s"] for r in records if r["cp_wait_share"] is not None]
        cp_wait = f"cp wait {sum(waits) / seconds:5.1%} | " if waits else ""
        skipped = f"skipped {last['skipped_steps']} | " if last["skipped_steps"] else ""
        left = int((self.train_iters - last["step"]) * seconds / len(records))
        width = len(str(self.train_iters))
        line = (
            f"step {last['step']:{width}d}/{self.train_iters} | loss {last['loss']:8.5f} | grad norm {last['grad_norm']:7.3f} | "
            f"lr {last['lr']:.2e} | {speed:9,.0f} tok/s ({speed / self.world_size:,.0f} a rank) | "
            f"{tflops:7.3f} TFLOP/s a rank | MFU {mfu} | packing {last['packing_efficiency']:6.2%} | "
            f"cp balance {last['cp_balance']:.3f} | {cp_wait}{skipped}data {sum(p.data_time for p in pending) / seconds:5.1%} | "
            f"mem {last['max_memory_bytes'] / 2**30:6.2f} GiB | {left // 3600:d}:{left // 60 % 60:02d}:{left % 60:02d} left"
        )
        if self.show_bar:
            line = "\r\033[K" + line
        print(line, flush=True)

    def _bar(self, step: int) -> None:
        done = 30 * step // self.train_iters
        print(f"\r\033[K[{'#' * done}{'.' * (30 - done)}] step {step}/{self.train_iters}", end="", flush=True)

    def _write_timers(self, step: int, steps: int) -> None:
        assert self.timers is not None and self.control_group is not None
        found = self.timers.read(self.control_group)
        if not (found and self.is_writer):
            return
        print(timers_module.in_words(found, steps=steps), flush=True)
        if self.file is not None:
            self.file.write(json.dumps({"step": step, "timed_steps": steps, "timers": found}) + "\n")
            self.file.flush()
        for writer in self.writers:
            writer.scalars(
                {f"timers/{phase.replace(' ', '_')}_ms": 1000 * most / steps for phase, (_, most, _) in found.items()},
                step,
            )

    def validation(
        self, step: int, loss: float, tokens: int, sources: Mapping[str, tuple[float, int]] | None = None
    ) -> None:
        """Report a validation after `step` steps.

        Args:
            loss: over all `tokens` labelled tokens.
            sources: the same of each source of a blend by itself.
        """
        if not self.is_writer:
            return
        sources = sources or {}
        start = "\r\033[K" if self.show_bar else ""
        lines = [
            f"validation after step {step}: loss {loss:.5f}, perplexity {perplexity(loss):,.2f}, over {tokens:,} held-out tokens"
        ]
        lines += [
            f"  {name}: loss {own:.5f}, perplexity {perplexity(own):,.2f}, over {count:,}"
            for name, (own, count) in sources.items()
        ]
        print(start + "\n".join(lines), flush=True)
        if self.file is not None:
            record: dict[str, Any] = {"step": step, "validation_loss": loss, "validation_tokens": tokens}
            if sources:
                record["validation"] = {name: {"loss": own, "tokens": count} for name, (own, count) in sources.items()}
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        values = {"validation/loss": loss, "validation/perplexity": perplexity(loss)}
        values |= {f"validation/{Path(name).name}": own for name, (own, _) in sources.items()}
        for writer in self.writers:
            writer.scalars(values, step)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        for writer in self.writers:
            writer.close()


def perplexity(loss: float) -> float:
    """exp of the mean loss; inf where that is too large."""
    return math.exp(loss) if loss < 700 else math.inf


def open_metrics_file(path: Path, keep_before: int | None) -> TextIO:
    """The file, open at its end; only whole records of steps up to `keep_before` are kept (`EVERYTHING`: not touched).

    None: a fresh start, whose records are not those of an earlier one, which go under another name. What is dropped goes by one rename: a
    run that dies here, or a disk that is full, leaves the records as they were.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if keep_before == EVERYTHING:
        return path.open("a")
    before = path.read_text("utf-8", errors="replace") if path.exists() else ""
    if keep_before is None:
        if before:
            place = put_by(path)
            path.rename(place)
            print(
                f"there was no checkpoint to go on from: the records of an earlier start are now in {place}", flush=True
            )
        return path.open("a")
    kept: list[str] = []
    for line in before.splitlines():
        try:
            if json.loads(line)["step"] <= keep_before:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # the line that was being written when the run died
    if "".join(kept) != before:
        replace_synced(path, "".join(kept))
    return path.open("a")


def put_by(path: Path) -> Path:
    """A name that is free, for the records of an earlier start."""
    for number in itertools.count(1):
        place = path.with_name(f"{path.name}.before-{number}")
        if not place.exists():
            return place
    raise AssertionError
