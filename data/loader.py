"""The loader of a rank's microbatches, and the errors that its worker processes raise."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from data.batch import EMPTY, Batch, BatchPlan
from data.dataset import SampleDataset

SHARED_MEMORY = Path("/dev/shm")  # through which workers send batches


class MicrobatchDataset(Dataset):
    """Batches by (step, microbatch). Samples from number `limit` on are empty."""

    def __init__(self, dataset: SampleDataset, plan: BatchPlan, limit: int | None = None) -> None:
        self.dataset, self.plan, self.limit = dataset, plan, limit
        self._assigned: tuple[int, list[list[int]]] = (-1, [])

    def __getitem__(self, at: tuple[int, int]) -> Batch:
        step, microbatch = at
        if self._assigned[0] != step:
            first, count = self.plan.batches.first_sample(step), self.plan.batches.size(step)
            squares = np.zeros(self.plan.num_places(step))
            if self.plan.balance_work:
                squares[:count] = self.dataset.squared_lengths(first, count)
            work = self.dataset.seq_length + self.plan.attention_cost * squares
            self._assigned = (step, self.plan.assign_samples(step, work))
        reads_tokens = self.plan.reads_tokens or step < self.plan.hash_before_step
        samples = [
            self.dataset.empty_sample()
            if n == EMPTY or (self.limit is not None and n >= self.limit)
            else self.dataset.sample(n, reads_tokens=reads_tokens)
            for n in self._assigned[1][microbatch]
        ]
        return self.plan.build_batch(samples, step=step)


class _StepSampler(Sampler):
    def __init__(self, steps: Sequence[int], plan: BatchPlan) -> None:
        self.steps, self.plan = steps, plan

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in self.steps:
            for microbatch in range(self.plan.num_microbatches(step)):
                yield step, microbatch

    def __len__(self) -> int:
        return sum(map(self.plan.num_microbatches, self.steps))


def build_loader(
    dataset: SampleDataset,
    plan: BatchPlan,
    *,
    steps: Sequence[int],
    num_workers: int,
    pin_memory: bool,
    limit: int | None = None,
    worker_init: Callable[[int], None] | None = None,
) -> DataLoader:
    """A loader of the microbatches of some steps, in order.

    Args:
        steps: numbers from 0.
        num_workers: processes that build batches ahead; 0: built in this process. The batches are the same.
        limit: samples from this number on are empty; None: no limit.
        worker_init: called first in each worker, with its number.
    """
    return DataLoader(
        MicrobatchDataset(dataset, plan, limit),
        batch_size=None,
        sampler=_StepSampler(steps, plan),
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=worker_init,
    )


class DataError(Exception):
    """Reading data failed during a run: a corrupted corpus, or a lost data worker."""


@contextmanager
def translate_worker_death() -> Iterator[None]:
    """Wraps a whole run: PyTorch's SIGCHLD handler reports a dead data worker wherever the rank executes.

    Raises:
        DataError: a data worker died, in one line.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise _worker_death(str(error).splitlines()[0]) from error


def _worker_death(reason: str) -> DataError:
    memory = "memory"
    if SHARED_MEMORY.is_dir():
        size = shutil.disk_usage(SHARED_MEMORY).total
        memory += f", or of {SHARED_MEMORY}, which holds {size / 2**20:,.1f} MiB (docker run --shm-size)"
    return DataError(f"a data worker died ({reason}); out of {memory}? --num-workers 0 reads in the rank itself")


def read_batches(loader: DataLoader) -> Generator[Batch, None, None]:
    """The loader's batches; closing the generator ends the workers.

    Raises:
        DataError: a worker refused the data, or died while it sent a batch, in one line.
    """
    try:
        yield from loader
    except ValueError as error:  # a worker's traceback stands before the message
        message = str(error).strip().splitlines()[-1]
        raise DataError(message.removeprefix("utils.errors.UserError: ").removeprefix("ValueError: ")) from error
    except (EOFError, ConnectionError) as error:  # before SIGCHLD's handler runs, the worker's pipe ends
        raise _worker_death(type(error).__name__) from error
