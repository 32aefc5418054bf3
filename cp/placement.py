"""`--cp-layout hybrid`: which ranks of the cp group hold each document of a row.

A document of degree d lies on d neighbouring ranks, [k * d, (k + 1) * d), which share the document in zigzag order; the
other ranks never see it. Every rank holds the same number of tokens; filler takes the rest. No torch import.

The group is split from the whole to single ranks. A block of ranks deals its documents to its parts, so that the parts'
work is even and their tokens fit. Where no dealing does that, the longest documents stay on the whole block, which they
load evenly: as few as possible, because a lower degree means less traffic and longer kernels. All arithmetic is on
integers, so that all ranks find the same placement.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np

EVEN = 1.02  # work of the busiest rank over the mean that a placement keeps below, where tokens allow
WORK_UNITS = 64  # of a token's projections and MLP
LIGHT = 256  # documents of a part of a rank's work below 1 / LIGHT fill the parts by tokens, not by work
TOO_MANY = 1 << 24  # work units that one token too many counts as
MAX_EXCHANGES, MAX_PARTNERS = 32, 64  # of one dealing; documents of each part that an exchange is tried with


@cache
def degree_chain(cp_size: int) -> tuple[int, ...]:
    """Degrees that divide each other, from 1 to cp_size; small factors come first: 1, 2, 4, 12 for 12."""
    chain, factor = [1], 2
    while chain[-1] < cp_size:
        if cp_size // chain[-1] % factor:
            factor += 1
        else:
            chain.append(chain[-1] * factor)
    return tuple(chain)


def degree_unit(degrees: Any) -> Any:
    """The number of tokens that divides a document's padded length; 1 for degree 1, which cuts nothing."""
    return np.where(np.asarray(degrees) > 1, 2 * np.asarray(degrees), 1)


def sample_degree(cp_size: int, num_samples: int) -> int:
    """The lowest degree at which each sample of a row gets ranks of its own, alone or with other whole samples."""
    return next(degree for degree in degree_chain(cp_size) if num_samples % (cp_size // degree) == 0)


def pad_to(lengths: np.ndarray, unit: Any) -> np.ndarray:
    return -(-lengths // unit) * unit


@dataclass(frozen=True, eq=False, kw_only=True)
class Placement:
    """The ranks of each document of a row.

    Attributes:
        degrees: [documents] int64 numbers of ranks, of `degree_chain`.
        first_ranks: [documents] int64 multiples of the degree.
        is_fallback: samples have ranks of their own, because no even placement was found.
    """

    degrees: np.ndarray
    first_ranks: np.ndarray
    is_fallback: bool = False

    @classmethod
    def on_all_ranks(cls, documents: int, cp_size: int) -> Placement:
        """Every document on all ranks, as in the layout zigzag."""
        return cls(degrees=np.full(documents, cp_size), first_ranks=np.zeros(documents, np.int64))


class PlacedRow(NamedTuple):
    """The documents of a row, then its fillers (degree 1, one on each rank with room): [documents] int64 lengths.

    Padded lengths are multiples of `degree_unit`; their sum is T.
    """

    lengths: np.ndarray
    padded_lengths: np.ndarray
    placement: Placement


def place(
    lengths: np.ndarray,
    *,
    row_length: int,
    cp_size: int,
    attention_cost: float,
    sample_numbers: np.ndarray,
    num_samples: int,
) -> PlacedRow | None:
    """Place a row's documents and fillers: a function of the arguments, alike on every rank.

    Args:
        lengths: [documents] real lengths, above 0.
        row_length: T, a multiple of cp_size.
        attention_cost: work of attention to one squared length, in works of a token's projections and MLP.
        sample_numbers: [documents] the sample of each document, from 0. Where no even placement fits, samples get ranks
            of their own at `sample_degree`.

    Returns:
        None: the row is too short.
    """
    placer = _Placer(np.asarray(lengths, np.int64), row_length // cp_size, cp_size, attention_cost)
    order = np.argsort(-placer.lengths, kind="stable")
    if placer.split(len(placer.chain) - 1, 0, order, room=placer.capacity, load=0):
        return placer.result()
    if placer.place_samples(sample_numbers, num_samples):
        return placer.result(is_fallback=True)
    return None


class _Placer:
    """The documents of a row, and where each one lies so far.

    Attributes:
        capacity: tokens of a rank.
        padded, works: [degrees, documents] padded length at a degree, and work on each of the document's ranks.
        lowest: [documents] index of the lowest degree that can take the document.
        levels: [documents] index of the chosen degree.
    """

    def __init__(self, lengths: np.ndarray, capacity: int, cp_size: int, attention_cost: float) -> None:
        self.lengths, self.capacity, self.cp_size = lengths, capacity, cp_size
        self.chain = degree_chain(cp_size)
        degrees = np.array(self.chain)[:, None]
        work = np.rint(WORK_UNITS * attention_cost * lengths.astype(np.float64) ** 2).astype(np.int64)
        self.padded, self.works = pad_to(lengths, degree_unit(degrees)), work // degrees
        self.mean = int(work.sum()) // cp_size
        excess = int((EVEN - 1) * (WORK_UNITS * capacity + self.mean))  # of a rank's work over the mean
        self.step = excess // max(1, len(self.chain) - 1)  # what each split may add
        fits = (self.works <= self.mean + excess) & (self.padded // degrees <= capacity)
        self.lowest = np.where(fits.any(0), fits.argmax(0), len(self.chain) - 1)
        self.levels, self.first_ranks = np.zeros_like(lengths), np.zeros_like(lengths)

    def result(self, *, is_fallback: bool = False) -> PlacedRow:
        degrees, padded = np.array(self.chain)[self.levels], self.padded[self.levels, np.arange(len(self.lengths))]
        # Each document's share is added at its first rank, and taken off behind its last one.
        changes = np.zeros(self.cp_size + 1, np.int64)
        np.add.at(changes, self.first_ranks, padded // degrees)
        np.subtract.at(changes, self.first_ranks + degrees, padded // degrees)
        room = self.capacity - np.cumsum(changes)[:-1]
        assert (room >= 0).all()
        filled = np.flatnonzero(room)
        placement = Placement(
            degrees=np.concatenate((degrees, np.ones_like(filled))),
            first_ranks=np.concatenate((self.first_ranks, filled)),
            is_fallback=is_fallback,
        )
        lengths = np.concatenate((self.lengths, np.zeros_like(filled)))
        return PlacedRow(lengths, np.concatenate((padded, room[filled])), placement)

    def place_samples(self, sample_numbers: np.ndarray, num_samples: int) -> bool:
        """Place each sample on ranks of its own. False: the documents do not fit."""
        degree = sample_degree(self.cp_size, num_samples)
        self.levels[:] = level = self.chain.index(degree)
        self.first_ranks[:] = sample_numbers // (num_samples * degree // self.cp_size) * degree
        used = np.bincount(self.first_ranks, self.padded[level], minlength=1)
        return bool((used <= self.capacity * degree).all())

    def split(self, level: int, first_rank: int, documents: np.ndarray, *, room: int, load: int) -> bool:
        """Place documents on the ranks of a block. False: no placement was found.

        Args:
            level: index of the block's degree.
            documents: [n] longest first.
            room, load: tokens that each rank of the block can take, and work that each has.
        """
        self.levels[documents], self.first_ranks[documents] = level, first_rank
        if level == 0:
            return int(self.lengths[documents].sum()) <= room
        block_mean = load + int(self.works[level, documents].sum())
        allowed = max(block_mean, self.mean + (len(self.chain) - 1 - level) * self.step) + self.step
        part_degree = self.chain[level - 1]
        is_kept = self.padded[level - 1, documents] > room * part_degree
        is_kept |= load + self.works[level - 1, documents] > allowed
        documents = np.concatenate((documents[is_kept], documents[~is_kept]))
        kept, best = int(is_kept.sum()), None
        while True:
            dealing = _Dealing(self, level, documents, kept, room=room, load=load, allowed=allowed)
            if dealing.room < 0:
                break
            dealing.run()
            if dealing.fits and (best is None or dealing.busiest < best.busiest):
                best = dealing
            if kept == len(documents) or (best is not None and best.busiest <= allowed):
                break
            kept = min(kept + 1 + kept // 4, len(documents))
        return best is not None and all(
            self.split(level - 1, rank, self._longest_first(part), room=best.room, load=best.load)
            for rank, part in zip(itertools.count(first_rank, part_degree), best.parts, strict=False)
        )

    def _longest_first(self, part: _Part) -> np.ndarray:
        documents = np.array(sorted(part.documents), np.int64)
        return documents[np.argsort(-self.lengths[documents], kind="stable")]


@dataclass
class _Part:
    """Documents of a part of a block, with all their tokens and their work on each rank."""

    documents: list[int] = field(default_factory=list)
    tokens: int = 0
    work: int = 0


class _Dealing:
    """The documents of a block dealt to its parts, but for the first `kept`, which stay on the whole block.

    Documents count with their padding at the parts' degree where all fit so, because the parts then have a placement;
    else with their padding at their lowest degree.

    Attributes:
        room, load: tokens that each rank can take, and work that each has.
        part_room: tokens that a part can take.
        fair: tokens of a part that leave it half of the mean free tokens.
    """

    def __init__(
        self, placer: _Placer, level: int, documents: np.ndarray, kept: int, *, room: int, load: int, allowed: int
    ) -> None:
        degree, part_degree = placer.chain[level], placer.chain[level - 1]
        stay, self.dealt = documents[:kept], documents[kept:]
        self.room = room - int(placer.padded[level, stay].sum()) // degree
        self.load, self.allowed = load + int(placer.works[level, stay].sum()), allowed
        self.part_room, self.works = self.room * part_degree, placer.works[level - 1]
        self.tokens = placer.padded[level - 1]
        self.parts = [_Part() for _ in range(degree // part_degree)]
        total = int(self.tokens[self.dealt].sum())
        if total > self.room * degree:
            lowest = np.minimum(placer.lowest, level - 1)
            self.tokens = placer.padded[lowest, np.arange(len(lowest))]
            total = int(self.tokens[self.dealt].sum())
        self.fair = (self.part_room + total // len(self.parts)) // 2

    @property
    def fits(self) -> bool:
        return all(part.tokens <= self.part_room for part in self.parts)

    @property
    def busiest(self) -> int:
        """Work of a rank of the part with the most."""
        return self.load + max(part.work for part in self.parts)

    def run(self) -> None:
        """Deal the heavy documents to the part with the least work that has room, the light ones to the part with the
        fewest tokens. Then exchange documents while that helps.
        """
        light = (WORK_UNITS * self.room + self.load) // LIGHT
        tokens, works = self.tokens[self.dealt].tolist(), self.works[self.dealt].tolist()
        for document, count, work in zip(self.dealt.tolist(), tokens, works, strict=True):
            fitting = [p for p in self.parts if p.tokens + count <= self.part_room] if work > light else []
            part = min(fitting, key=lambda p: p.work) if fitting else min(self.parts, key=lambda p: p.tokens)
            part.documents.append(document)
            part.tokens += count
            part.work += work
        for _ in range(MAX_EXCHANGES):
            worst = max(self.parts, key=lambda p: int(self._cost(p.tokens, p.work)))
            if not any(self._exchange(worst, other) for other in self.parts if other is not worst):
                return

    def _cost(self, tokens: Any, work: Any) -> Any:
        """Work units that a part costs: for tokens that do not fit, for work above the allowed, for too little room."""
        too_busy = np.maximum(self.load + work - self.allowed, 0)
        return TOO_MANY * np.maximum(tokens - self.part_room, 0) + too_busy + np.maximum(tokens - self.fair, 0)

    def _exchange(self, worst: _Part, other: _Part) -> bool:
        """Exchange a document, or none, for another, or none, where that costs least. False: nothing costs less."""
        before = self._cost(worst.tokens, worst.work)
        if before == 0:
            return False
        own, theirs = (
            np.array([*part.documents[:: 1 + len(part.documents) // MAX_PARTNERS], -1]) for part in (worst, other)
        )
        tokens, works = (np.append(x, 0) for x in (self.tokens, self.works))  # -1: no document
        tokens_moved, work_moved = (x[own][:, None] - x[theirs] for x in (tokens, works))
        after = np.maximum(
            self._cost(worst.tokens - tokens_moved, worst.work - work_moved),
            self._cost(other.tokens + tokens_moved, other.work + work_moved),
        )
        best = np.unravel_index(int(after.argmin()), after.shape)
        if after[best] >= before:
            return False
        for document, source, target in ((int(own[best[0]]), worst, other), (int(theirs[best[1]]), other, worst)):
            if document >= 0:
                source.documents.remove(document)
                target.documents.append(document)
        for part, sign in ((worst, -1), (other, 1)):
            part.tokens += sign * int(tokens_moved[best])
            part.work += sign * int(work_moved[best])
        return True
