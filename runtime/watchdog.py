"""Ends a run that hangs, and names the rank that it waits for.

Every rank writes a heartbeat to the run's store every few seconds: a count, its step, its activity, its place in the
code. A thread of each rank sees when its own main thread makes no progress for too long, and then reads who is silent
or elsewhere. The thread waits for the store only for a while: a store behind a cut cable neither answers nor fails.
Clocks of different ranks are never compared.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTED = str(Path(dist.__file__).parent)
# The host waits for the GPU, which waits in a collective, or for a step that other ranks did not finish.
CUDA = str(Path(torch.cuda.__file__).parent)
WAITS = {
    (ROOT / "runtime" / "signals.py", "request"),
    (ROOT / "runtime" / "distributed.py", "_wait_for_rank_zero"),
    (ROOT / "metrics" / "log.py", "_record"),
}
COLLECTIVES = ROOT / "parallel" / "collectives.py"
ANSWER_SECONDS = 20.0  # for the store; TCP notices a cut cable after a quarter of an hour


def describe_frame(frame: FrameType | None) -> tuple[str, bool]:
    """Place of a thread in the code, and whether the thread waits for other ranks there.

    Returns:
        Such as ("all_reduce, called in sum_over, parallel/collectives.py:101", True).
    """
    call, place, communicates = "", "", False
    while frame is not None:
        code = frame.f_code
        path = Path(code.co_filename)
        if code.co_filename.startswith((DISTRIBUTED, CUDA)):
            communicates = True
            if not place and not code.co_name.startswith("_") and code.co_name not in ("wrapper", "decorate_context"):
                call = code.co_name
        elif (
            not place
            and path.is_relative_to(ROOT)
            and "site-packages" not in path.parts
            and "threading" not in path.name
        ):
            place = f"{code.co_name}, {path.relative_to(ROOT)}:{frame.f_lineno}"
            communicates = communicates or path == COLLECTIVES or (path, code.co_name) in WAITS
        frame = frame.f_back
    return (f"{call}, called in {place}" if call and place else call or place or "Python's start"), communicates


class Watchdog:
    """Watches the main thread of this rank, from a thread of its own.

    Args:
        store: of the run, for the watchdog's keys only; a connection of its own, because the thread uses it.
        startup_minutes: longest time without a heartbeat of the main thread until `end_startup`; `minutes`: after it.
        on_hang: called from the thread with the reason; must end the process.
        parent: process without which this one must not run on: torchrun's agent. None: none.
        flags: names of the two limits, for the reason.
    """

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        world_size: int,
        startup_minutes: float,
        minutes: float,
        on_hang: Callable[[str], None],
        parent: int | None = None,
        flags: tuple[str, str] = ("--distributed-startup-timeout-minutes", "--distributed-timeout-minutes"),
    ) -> None:
        self.store, self.rank, self.world_size, self.on_hang, self.flags = store, rank, world_size, on_hang, flags
        self.parent = parent
        self.startup_minutes, self.minutes, self.is_started = startup_minutes, minutes, False
        self.is_suspended = False
        self.interval = min(2.0, 60 * min(startup_minutes, minutes) / 6)
        self.main = threading.get_ident()
        self.step, self.activity, self.count = 0, "start-up", 0
        self._last_progress = time.monotonic()
        self._rank_zero: tuple[int | None, float] = None, self._last_progress  # its last count, and when that was new
        self._is_ending = False
        self._ended = threading.Event()
        self._publish()
        self._watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._publisher = threading.Thread(target=self._publish_until_end, name="watchdog's heartbeat", daemon=True)
        self._publisher.start()
        self._watcher.start()

    def heartbeat(self, activity: str, step: int | None = None) -> None:
        """The main thread makes progress: it begins this activity."""
        self.activity, self.step = activity, self.step if step is None else step
        self._last_progress = time.monotonic()

    def with_heartbeats(self, items: Iterable[T], activity: str) -> Iterator[T]:
        """`items`, with a heartbeat before each."""
        for item in items:
            self.heartbeat(activity)
            yield item

    @contextmanager
    def suspend_timeout(self, activity: str) -> Iterator[None]:
        """Around work that rank 0 may do for any time while others wait; rank 0's process must stay alive."""
        self.heartbeat(activity)
        self._rank_zero = None, time.monotonic()
        self.is_suspended = True
        yield
        self.is_suspended = False
        self.heartbeat(activity)

    def end_startup(self) -> None:
        """The first step is done: compilation, connections and caches, slow once, are over."""
        self.is_started = True

    def stop(self) -> None:
        self._ended.set()
        self._watcher.join()
        self._publisher.join(ANSWER_SECONDS)

    @property
    def limit(self) -> float:
        """Minutes without progress that are allowed now."""
        return self.minutes if self.is_started else self.startup_minutes

    def find_lost_ranks(self) -> str:
        """The silent ranks, for a message; empty if every rank is heard. Takes a few intervals."""
        self._is_ending = True
        first = self._read_heartbeats()
        if isinstance(first, str):
            return first
        time.sleep(2.5 * self.interval)
        second = self._read_heartbeats()
        if isinstance(second, str):
            return second
        silent = [
            r for r in range(self.world_size) if r != self.rank and first[r].get("count") == second[r].get("count")
        ]
        if not silent:
            return ""
        return f"lost {self._name_ranks(silent, second, 'at step {step}, in {place}')}: dead, stopped or cut off"

    def _explain_hang(self) -> str:
        place, waits = describe_frame(sys._current_frames().get(self.main))
        flag = self.flags[self.is_started]
        text = f"no progress for {self.limit:g} minutes ({flag}): {self.activity}, step {self.step}, in {place}"
        if not waits:
            return f"{text}; this rank does not wait for another"
        lost = self.find_lost_ranks()
        if lost:
            return f"{text}; {lost}"
        everyone = self._read_heartbeats()
        if isinstance(everyone, str):  # the store ended with a faster rank
            return f"{text}; {everyone}"
        last_step = max(one.get("step", 0) for one in everyone)
        elsewhere = [r for r in range(self.world_size) if everyone[r] and not everyone[r]["waits"]]
        behind = [r for r in range(self.world_size) if everyone[r] and everyone[r]["step"] < last_step]
        if elsewhere or behind:
            named = self._name_ranks(elsewhere or behind, everyone, "{activity}, step {step}, in {place}")
            return f"{text}; waits for {named}"
        others = [r for r in range(self.world_size) if r != self.rank]
        return f"{text}; all ranks wait: {self._name_ranks(others, everyone, 'in {place}')}"

    def _name_ranks(self, ranks: list[int], heartbeats: list[dict[str, Any]], details: str, limit: int = 8) -> str:
        named = [
            f"rank {r} on {heartbeats[r]['host']} ({details.format(**heartbeats[r])})" if heartbeats[r] else f"rank {r}"
            for r in ranks[:limit]
        ]
        return ", ".join(named) + (f" and {len(ranks) - limit} more" if len(ranks) > limit else "")

    def _explain_silent_rank_zero(self) -> str:
        """Why the wait for rank 0's work is over; empty while rank 0 is heard."""
        now = time.monotonic()
        answer = self._read_heartbeats(range(1))
        if not isinstance(answer, str) and answer[0].get("count") != self._rank_zero[0]:
            self._rank_zero = answer[0].get("count"), now
        if now - self._rank_zero[1] <= 60 * self.limit:
            return ""
        what = (
            answer
            if isinstance(answer, str)
            else f"lost {self._name_ranks([0], answer, 'in {place}')}: dead, stopped or cut off"
        )
        flag = self.flags[self.is_started]
        return f"nothing heard of rank 0 for {self.limit:g} minutes ({flag}): {self.activity}; {what}"

    def _read_heartbeats(self, ranks: range | None = None) -> list[dict[str, Any]] | str:
        """The last heartbeat of each rank (of `ranks`), {} for a rank without one; or what is wrong with the store."""
        ranks = range(self.world_size) if ranks is None else ranks
        answers: list[list[dict[str, Any]] | str] = []
        lost = "lost the store of the run, on the first node"

        def ask() -> None:
            try:
                answers.append(
                    [json.loads(self.store.get(str(r))) if self.store.check([str(r)]) else {} for r in ranks]
                )
            except RuntimeError as error:
                answers.append(f"{lost} ({' '.join(str(error).split())[:120]})")

        asking = threading.Thread(target=ask, name="watchdog's question", daemon=True)
        asking.start()
        asking.join(ANSWER_SECONDS)
        return answers[0] if answers else f"{lost} (no answer for {ANSWER_SECONDS:g} s: down or cut off)"

    def _publish(self) -> None:
        place, waits = describe_frame(sys._current_frames().get(self.main))
        self.count += 1
        heartbeat = {
            "count": self.count,
            "step": self.step,
            "activity": self.activity,
            "place": place,
            "waits": waits,
            "host": platform.node(),
        }
        self.store.set(str(self.rank), json.dumps(heartbeat))

    def _publish_until_end(self) -> None:
        while not self._ended.wait(self.interval):
            try:
                self._publish()
            except RuntimeError:  # the first node is gone; collectives fail by themselves
                return

    def _watch(self) -> None:
        while not self._ended.wait(self.interval):
            if self.parent is not None and os.getppid() != self.parent:
                self.on_hang(f"torchrun, process {self.parent}, is gone: it could no longer end this rank")
                return
            if self._is_ending:
                continue
            try:
                if self.is_suspended:
                    reason = self._explain_silent_rank_zero() if self.rank else ""
                else:
                    hangs = time.monotonic() - self._last_progress > 60 * self.limit
                    reason = self._explain_hang() if hangs else ""
            except Exception as error:  # a run that hangs must end, also without an explanation
                reason = f"no progress for {self.limit:g} minutes: {self.activity}, step {self.step} ({error!r})"
            if reason:
                self.on_hang(reason)
                return
