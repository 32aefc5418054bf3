"""Ends a run that hangs, and names the rank that it waits for.

Every rank writes a heartbeat to the run's store every few seconds: a count, its step, its activity, its place in the
code. A thread of each rank sees when its own main thread makes no progress for too long. The first rank that does so
reads who is silent or elsewhere; its answer goes to the store, and ends all ranks. A rank waits for the store only for
a while: a store behind a cut cable neither answers nor fails. Clocks of different ranks are never compared.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
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
HEARTBEATS_PER_SECOND = 800  # of all ranks, each with a look for a failure
FAILURE = "failure"  # key of the first failure that a rank announced


class LostStore(RuntimeError):
    """The store does not answer."""


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
        self.interval = min(max(2.0, world_size / HEARTBEATS_PER_SECOND), 10.0, 60 * min(startup_minutes, minutes) / 6)
        self.main = threading.get_ident()
        self.step, self.activity, self.count = 0, "start-up", 0
        self._last_progress = time.monotonic()
        self._rank_zero: tuple[int | None, float] = None, self._last_progress  # its last count, and when that was new
        self._is_ending = False
        self._announced = ""  # the failure that ends all ranks
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

    def end(self) -> None:
        """The main thread ends this process, for a reason of its own."""
        self._is_ending = True

    def announce(self, failure: str) -> None:
        """End all ranks with this failure, unless another one was announced before."""
        with suppress(LostStore):
            self._ask(lambda: self.store.compare_set(FAILURE, "", failure))

    def announce_at_exit(self, failure: str) -> None:
        """Announce the failure once the save in the background, for which Python's exit waits, is complete."""
        ready = threading.Event()

        def announce() -> None:
            ready.wait()
            self.announce(failure)

        thread = threading.Thread(target=announce, daemon=True)  # Python 3.12 starts no thread during its exit
        thread.start()
        atexit.register(thread.join, ANSWER_SECONDS)
        atexit.register(ready.set)

    def find_cause(self, explain: Callable[[], str]) -> str:
        """Why the run ends. The first rank that asks calls `explain`, and must announce the answer; others wait for it.

        Raises:
            LostStore: this rank cannot ask.
        """
        for number in itertools.count():  # the rank that explains may be lost too
            self._announced = self._ask(self._read_failure)
            if self._announced:
                break
            if self._ask(partial(self.store.add, f"explained {number}", 1)) == 1:
                return explain()
            deadline = time.monotonic() + 2.5 * self.interval + ANSWER_SECONDS
            while time.monotonic() < deadline and not self._announced:
                time.sleep(self.interval / 10)
        return f"stopped, because {self._announced}"

    def find_lost_ranks(self) -> str:
        """The silent ranks, for a message; empty if every rank is heard. Takes a few intervals.

        Raises:
            LostStore: nothing is known of any rank.
        """
        first = self._read_heartbeats()
        time.sleep(2.5 * self.interval)
        second = self._read_heartbeats()
        silent = [
            r for r in range(self.world_size) if r != self.rank and first[r].get("count") == second[r].get("count")
        ]
        if not silent:
            return ""
        first_of = {second[r].get("host"): r for r in reversed(silent)}  # of each node one is named before any second
        silent = sorted(silent, key=lambda r: first_of[second[r].get("host")] != r)
        return f"lost {self._name_ranks(silent, second, 'at step {step}, in {place}')}: dead, stopped or cut off"

    def _explain_hang(self) -> str:
        place, waits = describe_frame(sys._current_frames().get(self.main))
        flag = self.flags[self.is_started]
        text = f"no progress for {self.limit:g} minutes ({flag}): {self.activity}, step {self.step}, in {place}"
        if not waits:
            return f"{text}; this rank does not wait for another"
        try:
            return self.find_cause(lambda: f"{text}; {self._explain_wait()}")
        except LostStore as error:  # or the store ended with a faster rank
            return f"{text}; {error}"

    def _explain_wait(self) -> str:
        lost = self.find_lost_ranks()
        if lost:
            return lost
        everyone = self._read_heartbeats()
        last_step = max(one.get("step", 0) for one in everyone)
        elsewhere = [r for r in range(self.world_size) if everyone[r] and not everyone[r]["waits"]]
        behind = [r for r in range(self.world_size) if everyone[r] and everyone[r]["step"] < last_step]
        if elsewhere or behind:
            return f"waits for {self._name_ranks(elsewhere or behind, everyone, '{activity}, step {step}, in {place}')}"
        others = [r for r in range(self.world_size) if r != self.rank]
        return f"all ranks wait: {self._name_ranks(others, everyone, 'in {place}')}"

    def _name_ranks(self, ranks: list[int], heartbeats: list[dict[str, Any]], details: str, limit: int = 8) -> str:
        named = [
            f"rank {r} on {heartbeats[r]['host']} ({details.format(**heartbeats[r])})" if heartbeats[r] else f"rank {r}"
            for r in ranks[:limit]
        ]
        return ", ".join(named) + (f" and {len(ranks) - limit} more" if len(ranks) > limit else "")

    def _explain_silent_rank_zero(self) -> str:
        """Why the wait for rank 0's work is over; empty while rank 0 is heard."""
        now, what = time.monotonic(), ""
        try:
            answer = self._read_heartbeats(range(1))
            if answer[0].get("count") != self._rank_zero[0]:
                self._rank_zero = answer[0].get("count"), now
            what = f"lost {self._name_ranks([0], answer, 'in {place}')}: dead, stopped or cut off"
        except LostStore as error:
            what = str(error)
        if now - self._rank_zero[1] <= 60 * self.limit:
            return ""
        flag = self.flags[self.is_started]
        return f"nothing heard of rank 0 for {self.limit:g} minutes ({flag}): {self.activity}; {what}"

    def _read_heartbeats(self, ranks: range | None = None) -> list[dict[str, Any]]:
        """The last heartbeat of each rank (of `ranks`), {} for a rank without one.

        Raises:
            LostStore: no answer.
        """
        keys = [str(r) for r in (range(self.world_size) if ranks is None else ranks)]

        def read() -> list[bytes]:
            if self.store.check(keys):
                return self.store.multi_get(keys)
            return [self.store.get(key) if self.store.check([key]) else b"{}" for key in keys]

        return [json.loads(one) for one in self._ask(read)]

    def _ask(self, question: Callable[[], T]) -> T:
        """The store's answer.

        Raises:
            LostStore: an error, or none in time.
        """
        answers: list[T] = []
        why = f"no answer for {ANSWER_SECONDS:g} s: down or cut off"

        def ask() -> None:
            nonlocal why
            try:
                answers.append(question())
            except RuntimeError as error:
                why = " ".join(str(error).split())[:120]

        asking = threading.Thread(target=ask, name="watchdog's question", daemon=True)
        asking.start()
        asking.join(ANSWER_SECONDS)
        if not answers:
            raise LostStore(f"lost the store of the run, on the first node ({why})")
        return answers[0]

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

    def _read_failure(self) -> str:
        """What a rank announced; empty: nothing."""
        return self.store.get(FAILURE).decode() if self.store.check([FAILURE]) else ""

    def _publish_until_end(self) -> None:
        while not self._ended.wait(self.interval):
            try:
                self._publish()
                self._announced = self._read_failure()
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
                if self._announced:
                    reason = f"stopped, because {self._announced}"
                elif self.is_suspended:
                    reason = self._explain_silent_rank_zero() if self.rank else ""
                else:
                    hangs = time.monotonic() - self._last_progress > 60 * self.limit
                    reason = self._explain_hang() if hangs else ""
            except Exception as error:  # a run that hangs must end, also without an explanation
                reason = f"no progress for {self.limit:g} minutes: {self.activity}, step {self.step} ({error!r})"
            if reason:
                self.on_hang(reason)
                return
