"""How a run ends: `status.json` for scripts, one line on stderr for people, and the exit code."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import re
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from data.loader import DataError
from runtime.watchdog import LostStore, Watchdog
from utils.errors import CollectiveError, UserError
from utils.files import parse_json, read_text, replace_synced
from utils.logger import log_error, one_line
from utils.names import redact

# Messages of gloo and NCCL if the rank at the other end is gone. Other errors, also of NCCL, are this rank's own.
PEER_FAILURES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Connection timed out",
    "No route to host",
    "Network is unreachable",
    "Broken pipe",
    "Timed out waiting",
    "timeout caused pair closure",
    "ncclRemoteError",
    "remote process exited",
)

LOST_RANKS = re.compile(r"lost (rank [0-9]+ on .*): dead, stopped or cut off")  # in a reason of runtime/watchdog.py
INTERRUPTED = 130  # exit code of Ctrl-C
SHARED_ERROR_SECONDS = 20.0  # for local rank 0 to come to an error that all ranks have


def find_lost_hosts(reason: str) -> list[str]:
    """The hosts of the ranks that a reason calls lost; a rank that hangs or waits is not lost."""
    lost = LOST_RANKS.search(reason)
    return sorted(set(re.findall(r"rank [0-9]+ on (\S+) \(", lost[1]))) if lost else []


@dataclass
class StatusFile:
    """`<run-dir>/status.json`: {"status", "step", "reason", "time", "rank", "host", "attempt", "lost", "lost_hosts"}.

    status: `running`; `done`, all steps are trained; `requeue`, stopped on request, to be resumed; `failed`. A status
    `running` without a process means that the run was killed. lost: the run failed only because a rank died or hung, so
    that another start may succeed; lost_hosts: of the ranks that died, where they are known.

    Attributes:
        attempt: shared by all ranks of one start, and by no other start.
    """

    path: Path
    attempt: str
    rank: int

    def write(self, status: str, *, step: int, reason: str = "", lost: bool = False) -> None:
        """Replace the whole file."""
        record = {
            "status": status,
            "step": step,
            "reason": reason,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "rank": self.rank,
            "host": platform.node(),
            "attempt": self.attempt,
            "lost": lost,
            "lost_hosts": find_lost_hosts(reason) if lost else [],
        }
        replace_synced(self.path, redact(json.dumps(record, indent=1)) + "\n")

    def read(self) -> dict[str, Any]:
        """The record; empty without a readable file of ours."""
        try:
            record = parse_json(read_text(self.path))
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) and {"rank", "host", "reason"} <= record.keys() else {}

    def is_ended(self) -> bool:
        """Whether this attempt's end is written: later failures are consequences and must not replace it."""
        record = self.read()
        return record.get("attempt") == self.attempt and record.get("status") in ("failed", "done", "requeue")

    def failure(self) -> dict[str, Any] | None:
        """The record of the first rank of this attempt that failed, if one did."""
        record = self.read()
        return record if record.get("status") == "failed" and record.get("attempt") == self.attempt else None


def is_peer_failure(error: BaseException) -> bool:
    """Whether this rank failed only because another rank is gone."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in PEER_FAILURES)


def kill_data_workers() -> None:
    """Data workers survive the SIGTERM with which Python would end them at exit."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises for killed workers
    for worker in multiprocessing.active_children():
        worker.kill()


def _exit_now() -> None:
    """End the process although threads still wait for a dead rank."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(1)


class RunStatus:
    """Around a whole run: an error becomes one line on stderr, "failed" in status.json and the exit code.

    | error | printed by | exit code |
    |---|---|---|
    | UserError | local rank 0 | 2 |
    | FloatingPointError, CollectiveError: the same on every rank | local rank 0 | 1 |
    | DataError, OSError | the rank that has it | 1 |
    | a lost rank | every rank, naming the first cause | 1 |
    | any other | the rank that has it, with its traceback | 1 |

    Attributes:
        file, watchdog, lock: set when the run has them; `lock` is the right to write checkpoints.
        step: the last step whose gradients are complete.
    """

    def __init__(self, *, rank: int = 0, local_rank: int = 0) -> None:
        self.rank, self.local_rank = rank, local_rank
        self.file: StatusFile | None = None
        self.watchdog: Watchdog | None = None
        self.lock: object = None
        self.step = 0

    def __enter__(self) -> RunStatus:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            if self.watchdog is not None:
                self.watchdog.stop()
            return
        kill_data_workers()
        if self.watchdog is not None:
            self.watchdog.end()
        if isinstance(error, SystemExit):
            return
        if isinstance(error, UserError):
            self._exit(one_line(error), 2, is_shared=True)
        if isinstance(error, KeyboardInterrupt):
            self._exit("interrupted", INTERRUPTED, is_shared=True)
        if isinstance(error, (FloatingPointError, CollectiveError)):
            self._exit(one_line(error), 1, is_shared=True)
        if isinstance(error, (DataError, OSError)):
            self._exit(one_line(error), 1, is_shared=False)
        if is_peer_failure(error):
            self._exit_after_peer_failure(error)
        text = f"{type(error).__name__}: {one_line(error)}"
        self._write_failure(text)  # Python prints the traceback
        self._announce_at_exit(text)

    def on_hang(self, reason: str) -> None:
        """End this process from the watchdog's thread, wherever the main thread is."""
        try:
            log_error(reason, rank=self.rank)
            self._write_failure(reason, lost=True)
            if self.watchdog is not None:
                self.watchdog.announce(self._failure(reason))
        finally:
            _exit_now()

    def _exit(self, text: str, code: int, *, is_shared: bool) -> None:
        """Args: is_shared: every rank has the same error; one rank of a node prints it."""
        self._write_failure(text)
        if is_shared and self.local_rank and code != INTERRUPTED:
            # torchrun ends all ranks when the first one exits: local rank 0 must be first, for it prints the line.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(SHARED_ERROR_SECONDS)
            is_shared = False  # else this process would have been ended
        if not is_shared or self.local_rank == 0:
            log_error(text, rank=None if is_shared else self.rank)
        if not is_shared:
            self._announce_at_exit(text)
        raise SystemExit(code) from None

    def _failure(self, reason: str) -> str:
        return f"rank {self.rank} on {platform.node()} failed: {reason}"

    def _announce_at_exit(self, reason: str) -> None:
        if self.watchdog is not None:
            self.watchdog.announce_at_exit(self._failure(reason))

    def _exit_after_peer_failure(self, error: BaseException) -> None:
        try:
            time.sleep(1.0)  # a rank that failed by itself writes its reason first
            written = self.file.failure() if self.file is not None else None
            if written:
                failure = f"rank {written['rank']} on {written['host']} failed: {written['reason']}"
                log_error(f"stopped, because {failure}", rank=self.rank)
            else:
                text = self._explain_loss(one_line(error)[:200])
                failure = self._failure(text)
                log_error(text, rank=self.rank)
                self._write_failure(text, lost=True)
            if self.watchdog is not None:
                self.watchdog.announce(failure)
        finally:
            _exit_now()

    def _explain_loss(self, error: str) -> str:
        """Who is lost. Args: error: what a collective raised."""
        unknown, watchdog = "lost another rank, which died or was cut off", self.watchdog
        if watchdog is None:
            return f"{unknown} ({error})"
        try:
            return watchdog.find_cause(lambda: f"{watchdog.find_lost_ranks() or unknown} ({error})")
        except LostStore as lost:
            return f"{lost} ({error})"

    def _write_failure(self, reason: str, *, lost: bool = False) -> None:
        if self.file is None or self.file.is_ended():
            return
        with suppress(OSError):  # the disk may be what failed; the line is printed
            self.file.write("failed", step=self.step, reason=reason, lost=lost)
