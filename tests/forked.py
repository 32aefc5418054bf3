"""Ranks forked from a server that has imported PyTorch and this suite once.

A fresh interpreter needs about three seconds of CPU for its imports; the tests start hundreds of ranks. Tests of the
launcher, of signals and of exit codes under torchrun start real interpreters (tests/launch.py, run_torchrun).
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = [
    "torch.distributed.pipelining",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
    "checkpoint.resume",
    "metrics.reports",
    "planner.estimate",
    "runtime.status",
    "training.evaluate",
    "training.sample",
    "tests.forked",
]


@cache
def context() -> Any:
    """The multiprocessing context of the server; the first process that it starts starts the server."""
    os.environ["OMP_NUM_THREADS"] = "1"  # forking is safe only while PyTorch has no threads
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    return server


def _run(script: str, flags: list[str], environment: dict[str, str], outputs: tuple[str, str]) -> None:
    """In the forked process: what `python script flags` does, with stdout and stderr appended to two files."""
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        setattr(sys, name, os.fdopen(descriptor, "w", buffering=1 if name == "stderr" else -1, encoding="utf-8"))
    sys.argv = [script, *flags]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets, with its store at `port` of this host."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    texts = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return {name: str(number) for name, number in numbers.items()} | texts


def run_script(
    script: str, *flags: str, environment: dict[str, str], ranks: int = 0, timeout: float = 240.0
) -> subprocess.CompletedProcess[str]:
    """`python script flags` from the root of the repository, or as many ranks of it as torchrun would start.

    As under torchrun, the other ranks are ended once one fails, and the exit code is then 1.

    Raises:
        subprocess.TimeoutExpired: ranks still ran after `timeout` seconds; they are killed.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if ranks else None
    with tempfile.TemporaryDirectory() as folder:
        outputs = (os.path.join(folder, "stdout"), os.path.join(folder, "stderr"))
        for path in outputs:
            Path(path).touch()
        started = []
        for rank in range(max(1, ranks)):
            own = rank_environment(rank, ranks, store.port) if store else {}
            process = context().Process(target=_run, args=(script, list(flags), environment | own, outputs))
            process.start()
            started.append(process)
        is_in_time = _wait_for_end(started, timeout)
        stdout, stderr = (Path(path).read_text("utf-8", errors="replace") for path in outputs)
    if not is_in_time:
        raise subprocess.TimeoutExpired([script, *flags], timeout, stdout, stderr)
    codes = [process.exitcode for process in started]
    return subprocess.CompletedProcess([script, *flags], int(any(codes)) if ranks else codes[0], stdout, stderr)


def _wait_for_end(started: list[Any], timeout: float) -> bool:
    """Wait for all; end the others once one fails. Whether they ended in time."""
    deadline = time.monotonic() + timeout
    is_in_time, is_terminated = True, False
    while alive := [process for process in started if process.is_alive()]:
        wait([process.sentinel for process in alive], timeout=max(0.0, deadline - time.monotonic()))
        if not is_terminated and any(process.exitcode for process in started):
            is_terminated = True
            deadline = min(deadline, time.monotonic() + 30)
            for process in alive:
                process.terminate()
        elif time.monotonic() >= deadline:
            is_in_time = is_terminated
            for process in alive:
                process.kill()
    return is_in_time
