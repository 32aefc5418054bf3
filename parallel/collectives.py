"""Communication primitives; each takes its group."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# PyTorch 2.13 renamed both and deprecates the old names; 2.11 has only the old names.
all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class WaitClock:
    """Seconds that computation waited for transfers, summed until read.

    On CUDA a wait blocks the stream, not the host, so CUDA events around the wait are read later.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def wait(self, works: Sequence[dist.Work], *, cuda: bool) -> None:
        """Wait for all of `works`, and add the time."""
        if cuda:
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            for work in works:
                work.wait()
            after.record()
            self._events.append((before, after))
            return
        start = time.perf_counter()
        for work in works:
            work.wait()
        self._seconds += time.perf_counter() - start

    def read(self) -> float:
        """Seconds since the last call. On CUDA, call this after a synchronisation."""
        seconds = self._seconds + sum(before.elapsed_time(after) for before, after in self._events) / 1000
        self._seconds = 0.0
        self._events.clear()
        return seconds


def _wait(works: Sequence[dist.Work], clock: WaitClock | None, *, cuda: bool) -> None:
    if clock is not None:
        clock.wait(works, cuda=cuda)
        return
    for work in works:
        work.wait()


@dataclass
class RingShift:
    """A transfer in flight: `sent` goes to the next rank of the ring, `received` comes from the previous rank."""

    sent: Tensor
    received: Tensor
    works: list[dist.Work]

    def wait(self, clock: WaitClock | None = None) -> Tensor:
        """Wait for the received tensor (on CUDA, the current stream waits)."""
        _wait(self.works, clock, cuda=self.received.is_cuda)
        return self.received


def start_ring_shift(x: Tensor, group: dist.ProcessGroup, *, tag: int = 0) -> RingShift:
    """Send contiguous `x` to the next rank of `group`, and receive the same shape from the previous rank.

    Returns at once. Transfers in flight together need different tags.
    """
    size, rank = group.size(), group.rank()
    following = dist.get_global_rank(group, (rank + 1) % size)
    previous = dist.get_global_rank(group, (rank - 1) % size)
    received = torch.empty_like(x)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, x, following, group, tag),
            dist.P2POp(dist.irecv, received, previous, group, tag),
        ]
    )
    return RingShift(sent=x, received=received, works=works)


def sum_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`x` summed over the group, in place; returned. No gradient."""
    if group.size() > 1:
        dist.all_reduce(x, group=group)
    return x


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return _all_to_all(grad, ctx.group), None


def _all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous(), group=group)
    return out


def all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x [size, ...]: slice i goes to rank i, the result's slice i comes from rank i. Self-inverse, with gradients."""
    return _AllToAll.apply(x, group) if group.size() > 1 else x


@dataclass
class Gather:
    """An all-gather in flight. `gathered` [size * n, ...] holds every rank's [n, ...], rank by rank."""

    sent: Tensor
    gathered: Tensor
    work: dist.Work | None

    def wait(self, clock: WaitClock | None = None) -> Tensor:
        """Wait for the gathered tensor."""
        if self.work is not None:
            _wait([self.work], clock, cuda=self.gathered.is_cuda)
        return self.gathered


def start_all_gather(x: Tensor, group: dist.ProcessGroup) -> Gather:
    """Gather contiguous `x` [n, ...] from every rank of the group. Returns at once. No gradient."""
    if group.size() == 1:
        return Gather(x, x, None)
    gathered = x.new_empty((group.size() * len(x), *x.shape[1:]))
    work = all_gather_into(gathered, x, group=group, async_op=True)
    return Gather(x, gathered, work)


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x [size * n, ...] contiguous -> [n, ...]: rank i gets slice i, summed over the ranks. No gradient."""
    if group.size() == 1:
        return x
    out = x.new_empty((len(x) // group.size(), *x.shape[1:]))
    reduce_scatter_into(out, x, group=group)
    return out
