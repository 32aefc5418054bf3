"""A world of ranks that is spawned once and runs many cases.

    with World(4) as world:
        results = world.run(case, 1, 2)      # case(rank, 1, 2) on every rank; a list of what they returned

`case` is a module-level function: it is sent by name. A rank's exception is raised here with the rank's
traceback; a rank that dies or hangs fails the case instead of the whole suite. Ranks that did not all answer are
out of step, so such a world is ended and the next case gets a new one.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from tests import forked


class RankError(AssertionError):
    """A rank of the world failed."""


def _worker(rank: int, world_size: int, store_path: str, pipe: Connection, backend: str, device: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if backend == "staged":
        from tests.gpu.staged import register

        register()
    if device == "cuda":
        torch.cuda.set_device(0)
    store = dist.FileStore(store_path, world_size)
    # A rank whose peers are gone gives up by itself, also when nobody is left to end it.
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=5))
    pipe.send(("ready", None))
    while True:
        message = pipe.recv()
        if message is None:
            break
        function, args, kwargs = message
        try:
            pipe.send(("ok", function(rank, *args, **kwargs)))
        except BaseException:  # reported to the test, which raises it
            pipe.send(("error", traceback.format_exc()))
    # Results are out. gloo's threads abort at teardown now and then, so leave without tearing down.
    pipe.close()
    os._exit(0)


class World:
    """`size` ranks of one thread each.

    Args:
        backend: gloo, or staged (tests/gpu/staged.py).
        device: cpu, or cuda: all ranks on the one card.
    """

    def __init__(self, size: int, *, backend: str = "gloo", device: str = "cpu") -> None:
        self.size, self.backend, self.device = size, backend, device
        self._start()

    def _start(self) -> None:
        size = self.size
        self.directory = tempfile.TemporaryDirectory()
        self.in_step = True
        context = multiprocessing.get_context("spawn") if self.device == "cuda" else forked.context()
        os.environ["OMP_NUM_THREADS"] = "1"
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        store = os.path.join(self.directory.name, "store")
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_worker, args=(rank, size, store, theirs, self.backend, self.device), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self._collect(timeout=240.0)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 180.0, **kwargs: Any) -> list[Any]:
        """function(rank, *args, **kwargs) on every rank; what each returned, by rank."""
        if not self.in_step:
            self.close(patience=0.0)
            self._start()
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        return self._collect(timeout)

    def _collect(self, timeout: float) -> list[Any]:
        results: list[Any] = [None] * self.size
        failures = []
        deadline = time.monotonic() + timeout
        for rank, pipe in enumerate(self.pipes):
            # Once a rank has failed, its peers may wait for it for ever: give them a moment, not the whole time.
            left = 5.0 if failures else max(0.0, deadline - time.monotonic())
            try:
                if not pipe.poll(left):
                    self.in_step = False  # its answer may still come, and would be taken for the next case's
                    failures.append(f"rank {rank} did not answer")
                    continue
                status, value = pipe.recv()
            except EOFError:
                self.in_step = False
                failures.append(f"rank {rank} died with exit code {self.processes[rank].exitcode}")
                continue
            if status == "error":
                failures.append(f"rank {rank}:\n{value}")
            results[rank] = value
        if failures:
            raise RankError("\n".join(failures))
        return results

    def close(self, *, patience: float = 5.0) -> None:
        """End the ranks; those that do not go within `patience` seconds are killed."""
        for pipe in self.pipes:
            try:
                pipe.send(None)
            except OSError:
                continue  # that rank is dead already, and said so in a case
        for process in self.processes:
            process.join(timeout=patience)
            if process.is_alive():
                process.kill()
                process.join()
        self.directory.cleanup()

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
