"""Communication primitives; each takes its group."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# PyTorch 2.13 renamed both and deprecates the old names; 2.11 has only the old names.
all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class WaitClock:
    """Seconds that computation waited for transfers, summed until read.

    On CUDA a wait blocks the stream, not the host, so CUDA events around the wait are read later, and used again.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # recorded, oldest first
        self._free: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, *, cuda: bool) -> Iterator[None]:
        """Add the time of the waits in this context."""
        if cuda:
            while self._events and self._events[0][1].query():  # the GPU is past it
                self._take_oldest()
            pair = self._free.pop() if self._free else _timing_events()
            pair[0].record()
            yield
            pair[1].record()
            self._events.append(pair)
        else:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start

    def read(self) -> float:
        """Seconds since the last call. On CUDA, call this after a synchronisation."""
        while self._events:
            self._take_oldest()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _take_oldest(self) -> None:
        before, after = pair = self._events.popleft()
        self._seconds += before.elapsed_time(after) / 1000
        self._free.append(pair)


def _timing_events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


@dataclass
class Transfer:
    """A transfer in flight; holds `sent` until it ends."""

    sent: Tensor
    received: Tensor
    works: list[dist.Work]

    def wait(self, clock: WaitClock | None = None) -> Tensor:
        """Wait for the received tensor (on CUDA, the current stream waits)."""
        with nullcontext() if clock is None else clock.measure(cuda=self.received.is_cuda):
            for work in self.works:
                work.wait()
        return self.received


def start_ring_shift(x: Tensor, group: dist.ProcessGroup, *, tag: int = 0) -> Transfer:
    """Start to send contiguous `x` to the next rank of `group`, and to receive the same shape from the previous rank.

    Transfers in flight together need different tags.
    """
    size, rank = group.size(), group.rank()
    following = dist.get_global_rank(group, (rank + 1) % size)
    previous = dist.get_global_rank(group, (rank - 1) % size)
    received = torch.empty_like(x)
    send, receive = (
        dist.P2POp(dist.isend, x, following, group, tag),
        dist.P2POp(dist.irecv, received, previous, group, tag),
    )
    return Transfer(x, received, dist.batch_isend_irecv([send, receive]))


def sum_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`x` summed over the group, in place; returned. No gradient."""
    if group.size() > 1:
        dist.all_reduce(x, group=group)
    return x


Collective = Callable[[Tensor, dist.ProcessGroup], Tensor]


class _Communicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup, forward: Collective, backward: Collective) -> Tensor:  # type: ignore[override]
        ctx.group, ctx.adjoint = group, backward
        return forward(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return ctx.adjoint(grad, ctx.group), None, None, None


def communicate(x: Tensor, group: dist.ProcessGroup, forward: Collective, backward: Collective) -> Tensor:
    """forward(x, group), whose gradient is backward(gradient, group)."""
    return _Communicate.apply(x, group, forward, backward)


def _all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous(), group=group)
    return out


def all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x [size, ...]: slice i goes to rank i, the result's slice i comes from rank i. Self-inverse, with gradients."""
    return communicate(x, group, _all_to_all, _all_to_all) if group.size() > 1 else x


def start_all_to_all(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Transfer:
    """Start to send the first sent[0] rows of contiguous `x` to rank 0 of the group, the next sent[1] to rank 1, ...

    Args:
        received: rows from each rank, in whose order they arrive. No gradient.
    """
    if group.size() == 1:
        return Transfer(x, x, [])
    out = x.new_empty((sum(received), *x.shape[1:]))
    return Transfer(x, out, [dist.all_to_all_single(out, x, received, sent, group=group, async_op=True)])


def start_all_gather(x: Tensor, group: dist.ProcessGroup) -> Transfer:
    """Start to gather contiguous `x` [n, ...] of every rank to [size * n, ...], rank by rank. No gradient."""
    if group.size() == 1:
        return Transfer(x, x, [])
    gathered = x.new_empty((group.size() * len(x), *x.shape[1:]))
    work = all_gather_into(gathered, x, group=group, async_op=True)
    return Transfer(x, gathered, [work])


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x [size * n, ...] -> [n, ...]: rank i gets slice i, summed over the ranks. No gradient."""
    if group.size() == 1:
        return x
    out = x.new_empty((len(x) // group.size(), *x.shape[1:]))
    reduce_scatter_into(out, x.contiguous(), group=group)
    return out
