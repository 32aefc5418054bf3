"""Ends a run in which nothing moves, and says which rank it waits for.

Every rank tells the run's store every few seconds that it lives, at which step it is and what it is doing. A thread of each
rank sees when its own main thread has not moved for too long, and then looks up who has gone silent or is somewhere else. It
waits for the store itself only for a while: one at the other end of a cut cable neither answers nor fails.
No rank's clock is compared with another's.
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

import torch.distributed as dist

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTED = str(Path(dist.__file__).parent)
COLLECTIVES = ROOT / "parallel" / "collectives.py"
ANSWER_SECONDS = 20.0  # that the store may take; where a cable is cut, TCP itself notices after a quarter of an hour


def place_of(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread is, in words, and whether it waits for other ranks there.

    Returns:
        Like ("all_reduce, called in sum_over, parallel/collectives.py:101", True).
    """
    call, place, communicates = "", "", False
    while frame is not None:
        code = frame.f_code
        path = Path(code.co_filename)
        if code.co_filename.startswith(DISTRIBUTED):
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
            communicates = communicates or path == COLLECTIVES
        frame = frame.f_back
    return (f"{call}, called in {place}" if call and place else call or place or "Python's start"), communicates


class Watchdog:
    """One a rank.

    Args:
        store: of the run, for these keys alone; used by the thread, so a connection of its own.
        startup_minutes: longest time without movement until `settled`; `minutes`: after it.
        on_stuck: called from the thread with the reason; must end the process.
        parent: process that started this one and without which it must not go on, torchrun's agent; None: it may.
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
        on_stuck: Callable[[str], None],
        parent: int | None = None,
        flags: tuple[str, str] = ("--distributed-startup-timeout-minutes", "--distributed-timeout-minutes"),
    ) -> None:
        self.store, self.rank, self.world_size, self.on_stuck, self.flags = store, rank, world_size, on_stuck, flags
        self.parent = parent
        self.startup_minutes, self.minutes, self.is_settled = startup_minutes, minutes, False
        self.is_patient = False
        self.interval = min(2.0, 60 * min(startup_minutes, minutes) / 6)
        self.main = threading.get_ident()
        self.step, self.doing, self.told = 0, "start-up", 0
        self._moved = time.monotonic()
        self._first: tuple[int | None, float] = None, self._moved  # what rank 0 told last, and when that was new
        self._is_ending = False
        self._ended = threading.Event()
        self._publish()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._voice = threading.Thread(target=self._tell, name="watchdog's voice", daemon=True)
        self._voice.start()
        self._thread.start()

    def moved(self, doing: str, step: int | None = None) -> None:
        """The main thread goes on to something else."""
        self.doing, self.step = doing, self.step if step is None else step
        self._moved = time.monotonic()

    def each(self, items: Iterable[T], doing: str) -> Iterator[T]:
        """`items`, each of which counts as movement."""
        for item in items:
            self.moved(doing)
            yield item

    @contextmanager
    def patient(self, doing: str) -> Iterator[None]:
        """Something that may take as long as it takes on rank 0, which is still to be heard of."""
        self.moved(doing)
        self._first = None, time.monotonic()
        self.is_patient = True
        yield
        self.is_patient = False
        self.moved(doing)

    def settled(self) -> None:
        """The first step is done: what is slow only once (compilation, connections, caches) is over."""
        self.is_settled = True

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()
        self._voice.join(ANSWER_SECONDS)

    @property
    def limit(self) -> float:
        """Minutes."""
        return self.minutes if self.is_settled else self.startup_minutes

    def find_lost(self) -> str:
        """Which ranks have gone silent, in words; takes a few intervals. Empty where all are heard of."""
        self._is_ending = True
        first = self._everyone()
        if isinstance(first, str):
            return first
        time.sleep(2.5 * self.interval)
        second = self._everyone()
        if isinstance(second, str):
            return second
        silent = [r for r in range(self.world_size) if r != self.rank and first[r].get("told") == second[r].get("told")]
        if not silent:
            return ""
        return f"lost {self._name(silent, second, 'at step {step}, in {place}')}: dead, stopped or cut off"

    def _why_stuck(self) -> str:
        place, waits = place_of(sys._current_frames().get(self.main))
        flag = self.flags[self.is_settled]
        text = f"nothing moved for {self.limit:g} minutes ({flag}): {self.doing}, step {self.step}, in {place}"
        if not waits:
            return f"{text}; this rank is not waiting for another"
        lost = self.find_lost()
        if lost:
            return f"{text}; {lost}"
        everyone = self._everyone()
        if isinstance(everyone, str):  # the store went with a rank that was faster
            return f"{text}; {everyone}"
        elsewhere = [r for r in range(self.world_size) if everyone[r] and not everyone[r]["waits"]]
        behind = [
            r
            for r in range(self.world_size)
            if everyone[r] and everyone[r]["step"] < max(e.get("step", 0) for e in everyone)
        ]
        if elsewhere or behind:
            return (
                f"{text}; it waits for {self._name(elsewhere or behind, everyone, '{doing}, step {step}, in {place}')}"
            )
        others = [r for r in range(self.world_size) if r != self.rank]
        return f"{text}; all ranks wait: {self._name(others, everyone, 'in {place}')}"

    def _name(self, ranks: list[int], records: list[dict[str, Any]], words: str, limit: int = 8) -> str:
        named = [
            f"rank {r} on {records[r]['host']} ({words.format(**records[r])})" if records[r] else f"rank {r}"
            for r in ranks[:limit]
        ]
        return ", ".join(named) + (f" and {len(ranks) - limit} more" if len(ranks) > limit else "")

    def _quiet_first_rank(self) -> str:
        """While others wait as long as rank 0 takes to prepare data: why there is nothing more to wait for, if so."""
        now = time.monotonic()
        answer = self._everyone(range(1))
        if not isinstance(answer, str) and answer[0].get("told") != self._first[0]:
            self._first = answer[0].get("told"), now
        if now - self._first[1] <= 60 * self.limit:
            return ""
        what = (
            answer
            if isinstance(answer, str)
            else f"lost {self._name([0], answer, 'in {place}')}: dead, stopped or cut off"
        )
        return (
            f"nothing heard of rank 0 for {self.limit:g} minutes ({self.flags[self.is_settled]}): {self.doing}; {what}"
        )

    def _everyone(self, ranks: range | None = None) -> list[dict[str, Any]] | str:
        """What each rank (of `ranks`) last told; {} of one that never did. Or what is wrong with the store."""
        ranks = range(self.world_size) if ranks is None else ranks
        answers: list[list[dict[str, Any]] | str] = []

        def ask() -> None:
            try:
                answers.append(
                    [json.loads(self.store.get(str(r))) if self.store.check([str(r)]) else {} for r in ranks]
                )
            except RuntimeError as error:
                answers.append(f"lost the store of the run, on the first node ({' '.join(str(error).split())[:120]})")

        asking = threading.Thread(target=ask, name="watchdog's question", daemon=True)
        asking.start()
        asking.join(ANSWER_SECONDS)
        return (
            answers[0]
            if answers
            else f"lost the store of the run, on the first node (no answer for {ANSWER_SECONDS:g} s: down or cut off)"
        )

    def _publish(self) -> None:
        place, waits = place_of(sys._current_frames().get(self.main))
        self.told += 1
        facts = {
            "told": self.told,
            "step": self.step,
            "doing": self.doing,
            "place": place,
            "waits": waits,
            "host": platform.node(),
        }
        self.store.set(str(self.rank), json.dumps(facts))

    def _tell(self) -> None:
        while not self._ended.wait(self.interval):
            try:
                self._publish()
            except RuntimeError:  # the first node is gone; the collectives will say so
                return

    def _watch(self) -> None:
        while not self._ended.wait(self.interval):
            if self.parent is not None and os.getppid() != self.parent:
                self.on_stuck(f"torchrun, process {self.parent}, is gone: it could no longer end this rank")
                return
            if self._is_ending:
                continue
            try:
                if self.is_patient:
                    reason = self._quiet_first_rank() if self.rank else ""
                else:
                    reason = self._why_stuck() if time.monotonic() - self._moved > 60 * self.limit else ""
            except Exception as error:  # a run that hangs must end even if it cannot be told why
                reason = f"nothing moved for {self.limit:g} minutes: {self.doing}, step {self.step}; no more is known ({error!r})"
            if reason:
                self.on_stuck(reason)
                return
