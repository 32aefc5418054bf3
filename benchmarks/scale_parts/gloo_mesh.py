"""N gloo ranks as threads over one counting store; prints what a group costs a rank, as JSON.

`python -m benchmarks.scale_parts.gloo_mesh N`, in a process of its own: gloo reads TORCH_GLOO_LAZY_INIT once.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.scale_parts.store import TIMEOUT, CountingStore


def count_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def main(ranks: int) -> None:
    store = CountingStore(dist.HashStore())
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
