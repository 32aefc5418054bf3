"""Kill ranks that save checkpoints without pause, at random moments, and load what they left.

    python -m tests.killed_writers FOLDER TRIALS

Each trial forks two gloo ranks that train and save step after step, waits a random time after a save has begun, kills
one or both with SIGKILL, and forks a reader that loads the newest checkpoint. Every second trial saves in the
background. A line a trial.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoint.files import list_checkpoints, read_run_metadata
from checkpoint.saver import Saver, load_checkpoint
from parallel.grid import GridSizes, build_grid
from tests.distributed.test_model_parity import built, config_of, rows_of, steps_of
from tests.distributed.test_reshard import optimizer_of

KEEP = 3


def run_in_child(work: Callable[[], None]) -> int:
    """Its pid. The child leaves with 0 where `work` returned."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException as error:
        print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def write(rank: int, folder: Path, store: Path, asynchronous: bool) -> None:
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    grid = build_grid(GridSizes(dp_shard=2))
    model = built(grid, config_of(hidden_size=96, ffn_hidden_size=256), "fp32")
    optimizer = optimizer_of(model)
    saver = Saver(
        folder, model, optimizer, grid, group=dist.new_group(backend="gloo"), keep=KEEP, asynchronous=asynchronous
    )
    found = list_checkpoints(folder)
    first = load_checkpoint(found[-1], model, optimizer, grid) if found else 0
    for step in range(first + 1, 10**6):
        steps_of(model, optimizer, grid, rows_of("thd"), 1)
        saver.save(step, {})


def read(folder: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    grid = build_grid(GridSizes())
    model = built(grid, config_of(hidden_size=96, ffn_hidden_size=256), "fp32")
    optimizer = optimizer_of(model)
    newest = list_checkpoints(folder)[-1]
    step = load_checkpoint(newest, model, optimizer, grid)
    counted = {int(state["step"]) for state in optimizer.state.values()}
    assert counted == {step} == {read_run_metadata(newest)["step"]}, (counted, step)
    latest = folder / (folder / "latest").read_text().strip()
    assert latest.is_dir(), f"latest names {latest.name}, which is not there"
    load_checkpoint(latest, model, optimizer, grid)


def wait_for_save(folder: Path, previous: int) -> None:
    """Until a save after checkpoint number `previous` has begun."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        names = [p.name for p in folder.iterdir()]
        if any(int(n.split("_")[1].split(".")[0]) > previous for n in names if "step_" in n):
            return
        time.sleep(0.002)
    raise SystemExit("no save began within a minute")


def main(folder: Path, trials: int) -> None:
    torch.set_num_threads(1)
    draw = random.Random(20)
    for trial in range(trials):
        store = folder / f".store_{trial}"
        found = list_checkpoints(folder)
        previous = (
            int(found[-1].name.split("_")[1]) + 1 if found else 1
        )  # the first one whole, then in the middle of another
        writers = [run_in_child(partial(write, rank, folder, store, trial % 2 == 1)) for rank in range(2)]
        wait_for_save(folder, previous)
        time.sleep(draw.random() * 0.12)
        victims = draw.choice([writers, writers[:1], writers[1:]])
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        names = sorted(p.name for p in folder.iterdir() if "step_" in p.name)
        time.sleep(0.05 * draw.random())  # the other rank goes on for a moment, as it would
        for pid in writers:
            if pid not in victims:
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        store.unlink(missing_ok=True)
        reader = run_in_child(partial(read, folder))
        if os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1]):
            raise SystemExit(f"trial {trial}: {names} does not load")
        print(f"killed {len(victims)} of 2 with {names} there: loads", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
