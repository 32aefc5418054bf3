"""Communication primitives that take their group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class RingShift:
    """A transfer under way: `sent` goes to the next rank of the ring, `received` comes from the previous."""

    sent: Tensor
    received: Tensor
    works: list[dist.Work]

    def wait(self) -> Tensor:
        """The received tensor, once it is there (on CUDA: once the current stream may read it)."""
        for work in self.works:
            work.wait()
        return self.received


def start_ring_shift(x: Tensor, group: dist.ProcessGroup, *, tag: int = 0) -> RingShift:
    """Send contiguous `x` to the next rank of `group` and receive the same shape from the previous one.

    Returns at once. Transfers that may be under way together take different tags.
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
