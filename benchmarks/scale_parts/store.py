"""What the store that all ranks share answers in a second, and what ranks ask of it."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

TIMEOUT = timedelta(minutes=5)
PROCESSES, CONNECTIONS = 2, 32
FORK = multiprocessing.get_context("fork")


def serve() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=TIMEOUT, wait_for_workers=False)


def connect(port: int) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=TIMEOUT, wait_for_workers=False)


class CountingStore(dist.Store):
    """A store that counts requests to another one."""

    def __init__(self, store: dist.Store, calls: Counter[str] | None = None) -> None:
        super().__init__()
        self.store, self.calls = store, Counter[str]() if calls is None else calls
        self.clones: list[CountingStore] = []  # C++ alone would not keep their Python methods

    def _ask(self, name: str, *args: Any) -> Any:
        self.calls[name] += 1
        return getattr(self.store, name)(*args)

    def clone(self) -> CountingStore:
        self.clones.append(CountingStore(self.store.clone(), self.calls))  # type: ignore[attr-defined]
        return self.clones[-1]

    def set(self, key: str, value: Any) -> None:
        self._ask("set", key, value)

    def get(self, key: str) -> bytes:
        return self._ask("get", key)

    def wait(self, keys: list[str], timeout: timedelta = TIMEOUT) -> None:  # type: ignore[override]
        self._ask("wait", keys, timeout)

    def check(self, keys: list[str]) -> bool:
        return self._ask("check", keys)

    def add(self, key: str, amount: int) -> int:
        return self._ask("add", key, amount)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        return self._ask("compare_set", key, expected, desired)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return self._ask("multi_get", keys)

    def multi_set(self, keys: list[str], values: Sequence[Any]) -> None:
        self._ask("multi_set", keys, values)

    def has_extended_api(self) -> bool:
        return True


def _ask_for(seconds: float, port: int, request: Callable[[dist.Store, int], object], counts: Any) -> None:
    counted = [0] * CONNECTIONS

    def ask(thread: int) -> None:
        store, end = connect(port), time.monotonic() + seconds
        while time.monotonic() < end:
            request(store, counted[thread])
            counted[thread] += 1

    threads = [threading.Thread(target=ask, args=(thread,)) for thread in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts.put(sum(counted))


def microseconds_of(request: Callable[[dist.Store, int], object], value: str, *, seconds: float = 3.0) -> float:
    """CPU time of the store's server for one request of 64 connections at once. Keys "0" to "255" hold `value`."""
    store, counts = serve(), FORK.Queue()
    for key in range(256):
        store.set(str(key), value)
    start = time.process_time()
    asking = [FORK.Process(target=_ask_for, args=(seconds, store.port, request, counts)) for _ in range(PROCESSES)]
    for process in asking:
        process.start()
    requests = sum(counts.get() for _ in asking)
    for process in asking:
        process.join()
    return 1e6 * (time.process_time() - start) / requests


def run_ranks(size: int, rank: Callable[[int, int, dist.Store], Any]) -> list[Any]:
    """rank(rank, size, store) in a process for each rank, each with a connection to one store; what they return."""
    store, answers = serve(), FORK.Queue()

    def run(number: int) -> None:
        answers.put(rank(number, size, connect(store.port)))
        answers.close()
        answers.join_thread()
        os._exit(0)

    processes = [FORK.Process(target=run, args=(number,)) for number in range(size)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    return found
