"""How a run ends: `status.json` for whoever started it, and one line for whoever reads the log."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TextIO

from data.loader import DataError
from runtime.watchdog import Watchdog
from utils.files import replace_synced

# What gloo and NCCL say when the rank at the other end is gone. Other errors, also NCCL's, are the rank's own.
LOST_PEER = (
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


@dataclass
class StatusFile:
    """`<run-dir>/status.json`: {"status", "step", "reason", "time", "rank", "host", "attempt", "lost"}; replaced as a whole.

    status: `running`; `done`, all steps are trained; `requeue`, stopped on request, the same command with --resume goes on;
    `failed`. What is still `running` when no process is left was killed. lost: it failed only because a rank died or hung, so that
    another start may do better.

    Attributes:
        attempt: the same for all ranks of one start, and for no other start.
    """

    path: Path
    attempt: str
    rank: int

    def write(self, status: str, *, step: int, reason: str = "", lost: bool = False) -> None:
        facts = {
            "status": status,
            "step": step,
            "reason": reason,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "rank": self.rank,
            "host": platform.node(),
            "attempt": self.attempt,
            "lost": lost,
        }
        replace_synced(self.path, json.dumps(facts, indent=1) + "\n")

    def read(self) -> dict[str, Any]:
        """Nothing where there is none."""
        try:
            facts = json.loads(self.path.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}

    def is_ended(self) -> bool:
        """Whether this attempt's end is told already: what follows of it must not replace it."""
        facts = self.read()
        return facts.get("attempt") == self.attempt and facts.get("status") in ("failed", "done", "requeue")

    def failure(self) -> dict[str, Any] | None:
        """What a rank of this attempt failed of, if one did."""
        facts = self.read()
        return facts if facts.get("status") == "failed" and facts.get("attempt") == self.attempt else None


def lost_a_peer(error: BaseException) -> bool:
    """Whether this rank failed only because another one is gone."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_PEER)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def tell(text: str, *, rank: int | None = None) -> None:
    """Nothing where no one is left to read it: a pipe may end before the run does."""
    who = "" if rank is None else f" rank {rank}:"
    with suppress(OSError, ValueError):
        print(f"train.py:{who} {text}", file=sys.stderr, flush=True)


def _end_now() -> None:
    """Threads that wait for a dead rank would keep the process."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(1)


def end_data_workers() -> None:
    """At once: they outlive the SIGTERM with which Python would end them before it waits for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises for workers that are killed
    for worker in multiprocessing.active_children():
        worker.kill()


class OutlivesItsReader:
    """stdout for a run whose log may be piped into something that ends before it: then nothing more is told, and training goes on."""

    def __init__(self, out: TextIO) -> None:
        self.out = out

    def write(self, text: str) -> int:
        try:
            return self.out.write(text)
        except OSError:
            return self._alone(text)

    def flush(self) -> None:
        try:
            self.out.flush()
        except OSError:
            self._alone("")

    def _alone(self, text: str) -> int:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.out.fileno())
        os.close(nowhere)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.out, name)


class Outcome:
    """Around a whole run: an error becomes one line, and "failed" in status.json, with the first cause rather than what followed of it.

    `status`, `watchdog` and `lock`, the right to save, are set when the run has them; `step` is the last one that is done.
    """

    def __init__(self, *, rank: int = 0, local_rank: int = 0) -> None:
        self.rank, self.local_rank = rank, local_rank
        self.status: StatusFile | None = None
        self.watchdog: Watchdog | None = None
        self.lock: IO[str] | None = None
        self.step = 0

    def __enter__(self) -> Outcome:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.watchdog is not None and error is None:
            self.watchdog.stop()
        if error is None:
            return
        end_data_workers()
        if isinstance(error, SystemExit):
            if error.code and error.__cause__ is not None:
                self._fail(one_line(error.__cause__))
            return
        if isinstance(error, KeyboardInterrupt):
            self._end("interrupted", 130, everyone=False)
        if isinstance(error, FloatingPointError):
            self._end(one_line(error), 1, everyone=False)
        if isinstance(error, DataError):
            self._end(one_line(error), 1)
        if lost_a_peer(error):
            self._lost(error)
        self._fail(f"{type(error).__name__}: {one_line(error)}")  # its traceback is printed as always

    def stuck(self, text: str) -> None:
        """Ends this process from the watchdog's thread, wherever the main thread is."""
        try:
            tell(text, rank=self.rank)
            self._fail(text, lost=True)
        finally:
            _end_now()

    def _end(self, text: str, code: int, *, everyone: bool = True) -> None:
        """Every rank has the same to say, unless the error is of one rank alone."""
        if everyone or self.local_rank == 0:
            tell(text, rank=self.rank if everyone else None)
        self._fail(text)
        raise SystemExit(code) from None

    def _lost(self, error: BaseException) -> None:
        try:
            time.sleep(1.0)  # a rank that failed by itself writes why before it goes
            found = ""
            if not (self.status is not None and self.status.failure()) and self.watchdog is not None:
                found = self.watchdog.find_lost()
            failure = self.status.failure() if self.status is not None else None
            if failure:
                tell(
                    f"stopped, because rank {failure['rank']} on {failure['host']} failed: {failure['reason']}",
                    rank=self.rank,
                )
            else:
                text = f"{found or 'lost another rank, which died or was cut off'} ({one_line(error)[:200]})"
                tell(text, rank=self.rank)
                self._fail(text, lost=True)
        finally:
            _end_now()

    def _fail(self, reason: str, *, lost: bool = False) -> None:
        if self.status is None or self.status.is_ended():
            return
        with suppress(OSError):  # the disk may be what failed; the line is told
            self.status.write("failed", step=self.step, reason=reason, lost=lost)
