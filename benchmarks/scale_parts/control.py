"""Start and watching: what each rank asks of the store that all ranks share."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from benchmarks.harness import ROOT, build_config
from benchmarks.scale_parts.store import CountingStore, connect, microseconds_of, run_ranks, serve
from benchmarks.scale_parts.table import Row
from runtime import distributed, signals
from runtime.status import RunStatus
from runtime.watchdog import Watchdog

SIZES = (512, 4096, 16384)
ASKERS, LOST = 64, 1234


def measure_group(ranks: int, *, is_lazy: bool) -> dict[str, Any]:
    """Store calls and open files a rank of one gloo group and one all-reduce."""
    command = [sys.executable, "-m", "benchmarks.scale_parts.gloo_mesh", str(ranks)]
    environment = os.environ | {"TORCH_GLOO_LAZY_INIT": str(int(is_lazy))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def gloo_groups() -> list[Row]:
    """One group over the world, connected to all ranks at once, or to a rank when it is first sent something."""
    rows = []
    for ranks in (32, 96):
        before, after = (measure_group(ranks, is_lazy=is_lazy) for is_lazy in (False, True))
        for key, what in (("calls", "store calls"), ("descriptors", "open files")):
            rows.append(Row(f"{what} a rank and gloo group", ranks, before[key], after[key]))
    return rows


def requests_of_start(rank: int, size: int, store: dist.Store) -> int:
    """Requests of one rank to the store, from the first process group to the data; NCCL's groups are left out."""
    counting = CountingStore(store)
    distributed.dist.rendezvous = lambda *_, **__: iter([(counting, rank, size)])  # type: ignore[assignment]
    distributed.build_run_grid = lambda *_: None  # type: ignore[assignment]
    config = build_config(f"--dp-shard-size {size}", world_size=size)
    launch = distributed.Launch(rank, rank, size, size, under_torchrun=True)
    ranks = distributed.start_ranks(config.parallel, launch, config.flags(), RunStatus(rank=rank))
    distributed.run_on_rank_zero_first(lambda: rank)
    distributed.check_ranks_agree({"data": 1}, "data")
    ranks.watchdog.stop()
    return counting.calls.total()


def start() -> list[Row]:
    """The store's requests and its CPU time from the start of all ranks to their data."""
    small, large = (max(run_ranks(size, requests_of_start)) for size in (4, 8))
    short = microseconds_of(lambda store, n: store.get(str(n % 256)), "x" * 200)
    rows = []
    for ranks in SIZES:
        before, after = 4 * (2 * ranks + 1), large + (large - small) * math.log2(ranks / 8)
        how = f"extrapolated from 4 and 8 ranks ({small} and {large} requests); before: four full meshes"
        rows.append(Row("requests to the store until the data, a rank", ranks, before, after, how=how))
        cost = f"those requests at {short:.0f} us, measured with 64 connections"
        second = 1e-6 * short * ranks
        rows.append(Row("the store's time for all ranks", ranks, second * before, second * after, "s", cost))
    return rows


def watch() -> list[Row]:
    """One of 4096 ranks is silent, and 64 ranks ask for the cause at once."""
    ranks, store, ended = 4096, serve(), threading.Event()
    heartbeat = {"step": 5, "activity": "training", "place": "x, parallel/collectives.py:40", "waits": True}
    keys = [str(rank) for rank in range(ASKERS, ranks) if rank != LOST]
    store.set(str(LOST), json.dumps(heartbeat | {"count": 0, "host": "the lost host"}))

    def tell() -> None:
        count, own = 0, connect(store.port)
        while not ended.wait(1.0):
            count += 1
            beats = [json.dumps(heartbeat | {"count": count, "host": "another"})] * len(keys)
            own.multi_set(keys, beats)  # type: ignore[attr-defined]

    threading.Thread(target=tell, daemon=True).start()
    time.sleep(3.0)
    limits: dict[str, Any] = dict(startup_minutes=30, minutes=30, on_hang=print)
    dogs = [Watchdog(connect(store.port), rank=rank, world_size=ranks, **limits) for rank in range(ASKERS)]
    answers: list[str] = []

    def ask(dog: Watchdog) -> None:
        dog.end()
        found = dog.find_cause(dog.find_lost_ranks)
        dog.announce(found)
        answers.append(found)

    begin = time.monotonic()
    asking = [threading.Thread(target=ask, args=(dog,)) for dog in dogs]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    seconds = time.monotonic() - begin
    ended.set()
    wrong = [answer for answer in answers if f"lost rank {LOST} on the lost host" not in answer or "store" in answer]
    assert not wrong and len(answers) == ASKERS, wrong
    interval, how = dogs[0].interval, "measured; before: at commit cf95e0c"
    spread = "extrapolated: before from a hop of 1.15 s, in both directions; after from the watchdog's interval"
    return [
        Row("64 ranks ask for a silent rank", ranks, "all: lost the store", "all name its host", how=how),
        Row("until the last of them knows", ranks, None, seconds, "s"),
        Row("from a rank's death to the end of all ranks", ranks, 1.15 * ranks / 2, 1 + 3.5 * interval, "s", spread),
        *(agreements(ranks, seconds) for seconds in (0.3, 5.0)),
    ]


def agreements(ranks: int, step_seconds: float) -> Row:
    """All-reduces over the world for requests to stop; before, two a step."""
    steps = max(1, min(ranks // signals.RANKS_PER_STEP, int(signals.AGREEMENT_SECONDS / step_seconds)))
    what = f"all-reduces over the world in 100 steps of {step_seconds:g} s, --on-nonfinite skip"
    return Row(what, ranks, 200.0, 100 / steps, how="counted")


PARTS: dict[str, Callable[[], list[Row]]] = {"groups": gloo_groups, "start": start, "watch": watch}
