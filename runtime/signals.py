"""Requests to stop: signals, a file, a time, a step. All ranks agree on the step after which they do."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from runtime.early import HELD_BACK

# In order of precedence. What is asked of any rank is asked of all.
REASONS = ("", "--exit-interval", "--exit-duration-in-mins", "the stop file", "SIGUSR1", "SIGHUP", "SIGTERM", "Ctrl-C")
_OF_SIGNAL = {signal.SIGUSR1: "SIGUSR1", signal.SIGHUP: "SIGHUP", signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
AGAIN_SECONDS = 2.0  # torchrun sends a Ctrl-C of the terminal a second time at once


class StopRequests:
    """What asks this run to stop.

    SIGTERM, SIGUSR1 and SIGHUP from now on, also those that `hold_back` has kept waiting, Ctrl-C from `watch_interrupts` on; a second
    Ctrl-C, after two seconds, ends the process at once. A SIGHUP that is ignored, under nohup, stays so.

    Args:
        interval: stop after each multiple of it; None: no.
        duration_minutes: stop after the step during which the run has lasted so long; None: no.
        started: when the run began, of `time.monotonic`, which no change of the clock moves.
    """

    def __init__(self, *, interval: int | None, duration_minutes: float | None, started: float) -> None:
        self.interval, self.duration_minutes, self.started = interval, duration_minutes, started
        self.stop_file: Path | None = None
        self.asked = 0
        self._interrupted: float | None = None
        self._box = torch.zeros(1, dtype=torch.int32)
        self._group: dist.ProcessGroup | None = None
        self._work: dist.Work | None = None
        for number in HELD_BACK:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)

    def watch_interrupts(self) -> None:
        signal.signal(signal.SIGINT, self._on_signal)

    def stand_down(self) -> None:
        """There is nothing to save: signals end the process, as they do without this."""
        for number in HELD_BACK:
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, signal.SIG_DFL)
        if self.asked:
            raise KeyboardInterrupt

    def watch(self, stop_file: Path | None, group: dist.ProcessGroup, *, is_restart: bool = False) -> None:
        """Look for the stop file from now on; one that is there already was for an earlier start, and is removed.

        Args:
            stop_file: None on ranks that need not look.
            group: over all ranks, for host memory, used by nothing else.
            is_restart: torchrun has started this job's ranks anew: the file is for this job.

        Raises:
            OSError: it is there and cannot be removed, as a folder.
        """
        self.stop_file, self._group = stop_file, group
        if stop_file is not None and not is_restart:
            stop_file.unlink(missing_ok=True)

    def start_agreeing(self) -> None:
        """Begin to exchange what was asked; training goes on meanwhile. Collective."""
        self._box[0] = self._asked_here()
        assert self._group is not None
        if self._group.size() > 1:
            self._work = dist.all_reduce(self._box, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def agreed(self, done: int) -> str:
        """Why all ranks stop after step `done`; empty where they go on. Collective, after `start_agreeing`."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        reason = REASONS[int(self._box[0])]
        if not reason and self.interval and done % self.interval == 0:
            return REASONS[1]
        return reason

    def _asked_here(self) -> int:
        late = self.duration_minutes is not None and time.monotonic() - self.started >= 60 * self.duration_minutes
        asked = [self.asked, REASONS.index("--exit-duration-in-mins") if late else 0]
        with suppress(OSError):  # a file system that does not answer asks for nothing
            if self.stop_file is not None and self.stop_file.exists():
                asked.append(REASONS.index("the stop file"))
        return max(asked)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is not None and now - self._interrupted > AGAIN_SECONDS:
                raise KeyboardInterrupt
            self._interrupted = now if self._interrupted is None else self._interrupted
        self.asked = max(self.asked, REASONS.index(_OF_SIGNAL[signal.Signals(number)]))


def outlive_a_broadcast(worker: int) -> None:
    """Of a data worker, from its start: a SIGTERM or Ctrl-C that is sent to all processes of the job must not break off the step that
    the ranks want to finish. After a SIGTERM it lives for 25 s more, less than what torchrun leaves its ranks.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.setitimer(signal.ITIMER_REAL, 25.0))
