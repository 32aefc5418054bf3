"""N gloo ranks as threads over one counting store; prints what a group costs a rank, as JSON.

`python -m benchmarks.scale_parts.gloo_mesh N`, in a process of its own: gloo reads TORCH_GLOO_LAZY_INIT once.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=5)


class CountingStore(dist.Store):
    """A store in memory that counts calls; `multi_get` is one call, as it is one request of a TCPStore."""

    def __init__(self) -> None:
        super().__init__()
        self.store, self.lock = dist.HashStore(), threading.Lock()
        self.calls: Counter[str] = Counter()

    def _count(self, name: str) -> None:
        with self.lock:
            self.calls[name] += 1

    def set(self, key: str, value: Any) -> None:
        self._count("set")
        self.store.set(key, value)

    def get(self, key: str) -> bytes:
        self._count("get")
        return self.store.get(key)

    def wait(self, keys: list[str], timeout: timedelta = TIMEOUT) -> None:  # type: ignore[override]
        self._count("wait")
        self.store.wait(keys, TIMEOUT)

    def check(self, keys: list[str]) -> bool:
        self._count("check")
        return self.store.check(keys)

    def add(self, key: str, amount: int) -> int:
        self._count("add")
        return self.store.add(key, amount)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self._count("multi_get")
        return [self.store.get(key) for key in keys]

    def multi_set(self, keys: list[str], values: Sequence[Any]) -> None:
        self._count("multi_set")
        for key, value in zip(keys, values, strict=True):
            self.store.set(key, value)

    def has_extended_api(self) -> bool:
        return True


def count_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def main(ranks: int) -> None:
    store = CountingStore()
    groups: list[Any] = [None] * ranks
    before, start = count_descriptors(), time.perf_counter()

    def work(rank: int) -> None:
        groups[rank] = dist.ProcessGroupGloo(store, rank, ranks, TIMEOUT)
        groups[rank].allreduce([torch.ones(1)], dist.AllreduceOptions()).wait()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    figures = {
        "calls": store.calls.total() / ranks,
        "descriptors": (count_descriptors() - before) / ranks,
        "seconds": time.perf_counter() - start,
    }
    print(json.dumps(figures | store.calls))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
