"""Requests to stop: signals, a stop file, a duration, a step. All ranks agree on the step after which they stop."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

# In ascending precedence: of several requests the last is the reason. A request to any rank is a request to all.
REASONS = (
    "",
    "--exit-interval",
    "--exit-duration-in-mins",
    "the stop file",
    "SIGUSR1",
    "SIGHUP",
    "SIGTERM",
    "Ctrl-C",
)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_REASON_OF_SIGNAL = {
    signal.SIGUSR1: "SIGUSR1",
    signal.SIGHUP: "SIGHUP",
    signal.SIGTERM: "SIGTERM",
    signal.SIGINT: "Ctrl-C",
}
REPEAT_SECONDS = 2.0  # torchrun repeats a Ctrl-C of the terminal at once
AGREEMENT_SECONDS = 5.0  # longest time between two agreements of the ranks: torchrun and SLURM kill 30 s after SIGTERM
RANKS_PER_STEP = 256  # an all-reduce over 4096 ranks takes half a second of their gloo threads
WORKER_SECONDS = 25.0  # a data worker's life after SIGTERM; torchrun kills its ranks after 30


class StopRequested(Exception):
    """All ranks leave what they do, for the reason in the message. Raised on every rank."""


class StopRequests:
    """Requests to stop this run.

    Handles SIGTERM, SIGUSR1 and SIGHUP from its construction on (a SIGHUP that nohup ignores stays ignored), Ctrl-C
    from `watch_interrupts` on. A second Ctrl-C, after two seconds, ends the process at once.

    Args:
        interval: stop after each multiple of this number of steps; None: off.
        duration_minutes: stop after the step during which the run reaches this age; None: off.
        check_interval: steps from one agreement to the next, fewer if they take 5 s; None: by the number of ranks.
        started: start of the run in seconds of `time.monotonic`.
    """

    def __init__(
        self,
        *,
        interval: int | None,
        duration_minutes: float | None,
        started: float,
        check_interval: int | None = None,
    ) -> None:
        self.interval, self.duration_minutes, self.started = interval, duration_minutes, started
        self.stop_file: Path | None = None
        self.requested = 0  # index into REASONS
        self._interrupted: float | None = None
        self.check_interval = check_interval
        self._steps, self._steps_between, self._agreed = 0, 1, started
        self._buffer = torch.zeros(2, dtype=torch.int32)  # the request; minus the steps until the next agreement
        self._group: dist.ProcessGroup | None = None
        self._work: dist.Work | None = None
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def watch_interrupts(self) -> None:
        signal.signal(signal.SIGINT, self._on_signal)

    def restore_handlers(self) -> None:
        """Let signals end the process again, and no duration: there is nothing to save.

        Raises:
            KeyboardInterrupt: a stop was requested already.
        """
        for number in STOP_SIGNALS:
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, signal.SIG_DFL)
        self.duration_minutes = None
        if self.requested:
            raise KeyboardInterrupt

    def watch_file(self, stop_file: Path | None, group: dist.ProcessGroup, *, is_restart: bool = False) -> None:
        """Watch for the stop file from now on. An existing file was for an earlier start, and is removed.

        Args:
            stop_file: None on ranks that don't watch.
            group: a gloo group over all ranks, used by nothing else at the same time.
            is_restart: torchrun restarted the ranks of this job: an existing file is for this job.

        Raises:
            OSError: the file exists and cannot be removed.
        """
        self.stop_file, self._group = stop_file, group
        if stop_file is not None and not is_restart:
            stop_file.unlink(missing_ok=True)

    def start_sync(self) -> None:
        """Begin the exchange of requests while training continues, if one is due. Collective."""
        assert self._group is not None
        self._steps += 1
        if self._steps < self._steps_between:
            return
        now = time.monotonic()
        steps_in_time = int(AGREEMENT_SECONDS * self._steps / max(now - self._agreed, 1e-3))
        between = min(self.check_interval or max(1, self._group.size() // RANKS_PER_STEP), max(1, steps_in_time))
        self._steps, self._agreed = 0, now
        self._buffer[:] = torch.tensor([self._requested_here(), -between])
        if self._group.size() > 1:
            self._work = dist.all_reduce(self._buffer, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def request(self) -> str:
        """The request to stop on which all ranks agreed last; empty: none. Collective, after `start_sync`."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        self._steps_between = -int(self._buffer[1])
        return REASONS[int(self._buffer[0])]

    def stop_reason(self, done: int) -> str:
        """Why all ranks stop after step `done`; empty: they continue. Collective, after `start_sync`."""
        is_round = self.interval is not None and done % self.interval == 0
        return self.request() or (REASONS[1] if is_round else "")

    def _requested_here(self) -> int:
        is_late = self.duration_minutes is not None and time.monotonic() - self.started >= 60 * self.duration_minutes
        requests = [self.requested, REASONS.index("--exit-duration-in-mins") if is_late else 0]
        with suppress(OSError):  # I/O errors are ignored: no stop file
            if self.stop_file is not None and self.stop_file.exists():
                requests.append(REASONS.index("the stop file"))
        return max(requests)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is not None and now - self._interrupted > REPEAT_SECONDS:
                raise KeyboardInterrupt
            self._interrupted = now if self._interrupted is None else self._interrupted
        self.requested = max(self.requested, REASONS.index(_REASON_OF_SIGNAL[signal.Signals(number)]))


def defer_worker_signals(worker: int) -> None:
    """Called first in each data worker: a signal to the whole job must not break the step that the ranks finish.

    Ctrl-C, SIGUSR1 and SIGHUP are ignored. SIGTERM starts a timer of `WORKER_SECONDS`, whose SIGALRM ends the worker.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.setitimer(signal.ITIMER_REAL, WORKER_SECONDS))
