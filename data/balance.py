"""Which data rank and microbatch computes each sample of a step: samples are dealt by their estimated work.

Loss and gradients are sums over a step's samples, so the choice changes the time of a step, not its result.
"""

from __future__ import annotations

import heapq

import numpy as np

MAX_SWAPS = 64  # per call of `deal`
PARTNERS = 16  # lists with the least work that a swap is tried with
MIN_GAIN = 1e-3  # of the largest sum; smaller gains end the swaps
MAX_PAIRS = 1 << 17  # pairs of items that are compared for one swap
EVEN = 1.005  # largest sum over the mean below which nothing is swapped


def deal(work: np.ndarray, bins: int) -> list[list[int]]:
    """Items in `bins` lists of equal counts, with the largest sum of work as small as simple means make it.

    The largest item goes first to the list with the least work that has room (LPT; Graham, Bounds on Multiprocessing
    Timing Anomalies, 1969). Then items of the busiest list are swapped against smaller ones while its sum falls. Ties
    go by number: the result is a function of `work` alone.

    Args:
        work: [n] float64, n a multiple of `bins`.

    Returns:
        [bins][n / bins] item numbers, in ascending order.
    """
    assert len(work) % bins == 0
    room = len(work) // bins
    lists: list[list[int]] = [[] for _ in range(bins)]
    loads = [(0.0, number) for number in range(bins)]
    costs = work.tolist()
    for item in np.argsort(-work, kind="stable").tolist():
        load, number = heapq.heappop(loads)
        lists[number].append(item)
        if len(lists[number]) < room:
            heapq.heappush(loads, (load + costs[item], number))
    dealt = np.array(lists, np.int64).reshape(bins, room)
    if bins > 1:
        _swap(dealt, work)
    dealt.sort(axis=1)
    return dealt.tolist()


def _swap(dealt: np.ndarray, work: np.ndarray) -> None:
    """Swaps items of the busiest list in place while the larger sum of the two lists falls."""
    loads = work[dealt].sum(1)
    mean = loads.mean()
    for _ in range(MAX_SWAPS):
        busiest = int(loads.argmax())
        if loads[busiest] <= EVEN * mean:
            return
        idle = np.argpartition(loads, min(PARTNERS, len(loads)) - 1)[:PARTNERS]
        if not any(_swap_once(dealt, work, loads, busiest, others) for others in (idle, np.arange(len(loads)))):
            return


def _swap_once(dealt: np.ndarray, work: np.ndarray, loads: np.ndarray, busiest: int, others: np.ndarray) -> bool:
    """The swap with one of the other lists that leaves the smallest larger sum. False: none is better than before."""
    if len(others) * dealt.shape[1] ** 2 > MAX_PAIRS:
        return False
    # [item of the busiest list, other list, its item]: work that leaves the busiest list.
    moved = work[dealt[busiest]][:, None, None] - work[dealt[others]][None]
    larger = np.maximum(loads[busiest] - moved, loads[others][None, :, None] + moved)
    mine, at, theirs = np.unravel_index(int(larger.argmin()), larger.shape)
    other, change = int(others[at]), moved[mine, at, theirs]
    if other == busiest or larger[mine, at, theirs] >= (1 - MIN_GAIN) * loads[busiest]:
        return False
    dealt[busiest, mine], dealt[other, theirs] = dealt[other, theirs], dealt[busiest, mine]
    loads[busiest] -= change
    loads[other] += change
    return True


def deal_step(work: np.ndarray, *, data_rank: int, data_ranks: int, num_microbatches: int) -> list[list[int]]:
    """The samples of a data rank's microbatches. Ranks are even first, then the microbatches of each rank.

    A rank's microbatches come in descending order of their work: microbatches of the same number then take about the
    same time on all ranks, which matters where weights are gathered for each microbatch.

    Args:
        work: [samples of the step] float64.

    Returns:
        [num_microbatches][micro_batch_size] samples, numbered within the step.
    """
    own = np.array(deal(work, data_ranks)[data_rank])
    rows = [own[row] for row in deal(work[own], num_microbatches)]
    rows.sort(key=lambda row: (-work[row].sum(), row[0]))
    return [row.tolist() for row in rows]
