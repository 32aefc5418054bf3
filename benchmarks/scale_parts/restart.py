"""What a lost rank costs a run of weeks, a model with its constants below; what Python's garbage collector costs.

Failures come at random, at a rate in proportion to the ranks. A start restores the newest state that all ranks can
reach, so a failure loses half of the interval between two such states on average.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable

import training.build  # noqa: F401 - the objects of a run
from benchmarks.scale_parts.table import Row

RANK_DAYS = (
    16384 * 54 / 419
)  # of one failure; Llama 3: 419 interruptions in 54 days of 16384 GPUs (Grattafiori et al. 2024)
START_MINUTES = 10.0  # from a failure to the first step
QUEUE_MINUTES = 2.0  # from a requeue to the next start: SLURM's cred_expire
STEP_SECONDS = 10.0
CHECKPOINT_STEPS, COPY_STEPS = 200, 10  # --save-interval, --local-save-interval
FIRST_CHECKPOINT_MINUTES = START_MINUTES + CHECKPOINT_STEPS * STEP_SECONDS / 60
MAX_RESTARTS = 100  # of a job, before
MAX_FRUITLESS = 10  # in a row, after
RUN_DAYS = 54


def restarts() -> list[Row]:
    rows = []
    for ranks in (512, 4096, 16384):
        between = RANK_DAYS / ranks  # days from one failure to the next
        lost = [steps * STEP_SECONDS / 60 / 2 for steps in (CHECKPOINT_STEPS, COPY_STEPS)]
        stops = [QUEUE_MINUTES + START_MINUTES + lost[0], START_MINUTES + lost[1]]  # with a spare node: no requeue
        shares = [stop / 1440 / between for stop in stops]
        fruitless = 1 - math.exp(-FIRST_CHECKPOINT_MINUTES / 1440 / between)
        starts = RUN_DAYS / between
        ends = [1 - math.exp(-starts * fruitless), 1 - math.exp(-starts * fruitless ** (MAX_FRUITLESS + 1))]
        figures: list[tuple[str, float, float | str, str]] = [
            ("steps' time lost a failure", lost[0], lost[1], "minutes"),
            ("share of the run lost to failures", 100 * shares[0], 100 * shares[1], "%"),
            ("failures before a first checkpoint end the job, in 54 days", 100 * ends[0], 100 * ends[1], "%"),
            ("days until restarts are used up", MAX_RESTARTS * between, "never, while checkpoints are made", ""),
        ]
        rows += [Row(what, ranks, before, after, unit, HOW) for what, before, after, unit in figures]
    return rows


def collections() -> list[Row]:
    """One collection of everything, which a rank runs at a moment of its own, or of what was made after the start."""
    gc.collect()
    start = time.perf_counter()
    gc.collect()
    whole = time.perf_counter() - start
    gc.freeze()
    knots: list[list] = [[] for _ in range(10_000)]
    for knot in knots:
        knot.append(knot)
    del knots, knot
    start = time.perf_counter()
    gc.collect()
    frozen = time.perf_counter() - start
    gc.unfreeze()
    return [
        Row("a collection of garbage: of all objects, of those after the start", 1, 1e3 * whole, 1e3 * frozen, "ms")
    ]


HOW = "model, constants in benchmarks/scale_parts/restart.py"
PARTS: dict[str, Callable[[], list[Row]]] = {"restarts": restarts, "garbage": collections}
