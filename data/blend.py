"""Blends: which of several sources gives sample n, so that every prefix of the run has the shares of the weights.

Sources take turns by Tijdeman's algorithm (The chairman assignment problem, Discrete Mathematics 32, 1980): after any n
samples, each of k sources has given its share to within 1 - 1/(2k - 2) of a sample. All arithmetic is in integers.
"""

from __future__ import annotations

import math
import os
import re
import reprlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heappop, heappush
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.files import is_remote
from data.indexed_dataset import index_file
from utils.errors import UserError
from utils.plain_yaml import read_yaml

MAX_DIGITS = 100  # of a weight; Python refuses to convert thousands
BLOCK = 4096  # samples whose sources are computed at a time
BLOCKS_KEPT = 16
PHASE_STARTS = ("from-step", "from-tokens", "from-samples")


@dataclass(frozen=True)
class BlendPart:
    """One source of a blend. Attributes: weight, None: by the size of the source."""

    path: str
    weight: Fraction | None = None


class MixturePhase(NamedTuple):
    """A mixture from a place of the run on. Attributes: unit and number of this place; sources of the mixture."""

    unit: str
    start: int
    parts: list[BlendPart]


def parse_phases(words: Sequence[str], flag: str = "--data-path") -> list[MixturePhase]:
    """`P`, `0.7 P1 0.3 P2`, `P1 P2` (weights by size), or one YAML file that lists sources, or phases of sources.

    Raises:
        UserError: a weight is no positive number, both forms are mixed, a source is named twice, or the YAML is
            corrupted.
    """
    if len(words) == 1 and words[0].endswith((".yaml", ".yml")):
        phases = _read_yaml(Path(words[0]), flag)
    else:
        phases = [MixturePhase("samples", 0, _parse_words(words, flag))]
    for phase in phases:
        names = [str(Path(part.path).resolve()) for part in phase.parts]
        for number, part in enumerate(phase.parts):
            if names[number] in names[:number]:
                raise UserError(f"{flag}: {part.path} is named twice; give it once, with the sum of its weights")
    return phases


def parse_blend(words: Sequence[str], flag: str = "--data-path") -> list[BlendPart]:
    """The sources of all phases, as `parse_phases`."""
    return [part for phase in parse_phases(words, flag) for part in phase.parts]


def _parse_words(words: Sequence[str], flag: str) -> list[BlendPart]:
    if len(words) > 1 and len(words) % 2 == 0 and all(_is_number(word) for word in words[::2]):
        both = next((word for word in words[::2] if _is_source(word)), None)
        if both is not None:
            raise UserError(
                f"{flag} {' '.join(words)}: {both} is a number and a file or folder; write ./{both} for the path, "
                f"+{both} for the weight"
            )
        pairs = zip(words[::2], words[1::2], strict=True)
        return [BlendPart(path, _parse_weight(number, path, flag)) for number, path in pairs]
    stray = next((word for word in words if _is_number(word) and not _is_source(word)), None)
    if stray is not None:
        raise UserError(
            f"{flag} {' '.join(words)}: {stray} stands where a path should; write WEIGHT PATH WEIGHT PATH ... or "
            "paths only"
        )
    return [BlendPart(word) for word in words]


def _read_yaml(file: Path, flag: str) -> list[MixturePhase]:
    loaded = read_yaml(file, f"{flag} {file}")
    key = next(iter(loaded)) if isinstance(loaded, dict) and len(loaded) == 1 else None
    if key not in ("sources", "phases") or not isinstance(loaded[key], list) or not loaded[key]:
        raise UserError(
            f"{flag} {file}: must hold one key, sources, with a list of entries of path and weight; or phases, with a "
            "list of sources, each but the first with from-step, from-tokens or from-samples"
        )
    if key == "sources":
        return [MixturePhase("samples", 0, _read_sources(loaded[key], file, flag))]
    phases = []
    for number, entry in enumerate(loaded[key], 1):
        starts = [name for name in PHASE_STARTS if name in entry] if isinstance(entry, dict) else []
        sources = entry.get("sources") if isinstance(entry, dict) and set(entry) == {"sources", *starts} else None
        is_number = all(re.fullmatch("[0-9]{1,18}", str(entry[name])) for name in starts)
        if not isinstance(sources, list) or not sources or not is_number or len(starts) != (number > 1):
            raise UserError(
                f"{flag} {file}: entry {number} of phases must hold a list of sources"
                + (f" and one number, {', '.join(PHASE_STARTS)}" if number > 1 else ", and begins the run")
            )
        unit, start = (starts[0], int(entry[starts[0]])) if starts else ("samples", 0)
        phases.append(MixturePhase(unit.removeprefix("from-"), start, _read_sources(sources, file, flag)))
    return phases


def _read_sources(entries: list, file: Path, flag: str) -> list[BlendPart]:
    parts = []
    for number, entry in enumerate(entries, 1):
        is_entry = isinstance(entry, dict) and set(entry) <= {"path", "weight"} and isinstance(entry.get("path"), str)
        is_entry = is_entry and isinstance(entry.get("weight", ""), str)
        if not is_entry:
            raise UserError(
                f"{flag} {file}: entry {number} of sources must hold path and weight, not {reprlib.repr(entry)}"
            )
        path = entry["path"] if is_remote(entry["path"]) else str(file.parent / entry["path"])
        weight = _parse_weight(entry["weight"], path, f"{flag} {file}") if "weight" in entry else None
        parts.append(BlendPart(path, weight))
    if len({part.weight is None for part in parts}) > 1:
        raise UserError(f"{flag} {file}: give every source a weight, or none")
    return parts


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _is_source(word: str) -> bool:
    return os.path.lexists(word) or index_file(Path(word)).exists()


def _parse_weight(text: str, path: str, flag: str) -> Fraction:
    if not (len(text) <= MAX_DIGITS and _is_number(text) and 0 < float(text) < math.inf):
        raise UserError(f"{flag}: the weight {text[:MAX_DIGITS]} of {path} must be a number above 0")
    return Fraction(text)


def whole_weights(weights: Sequence[Fraction | int]) -> list[int]:
    """The smallest integers in the same proportions."""
    scale = math.lcm(*(Fraction(w).denominator for w in weights))
    scaled = [int(w * scale) for w in weights]
    return [w // math.gcd(*scaled) for w in scaled]


class _Block(NamedTuple):
    """`BLOCK` samples. Attributes: the first; [sources] samples of each before and after; each one's `Blend.at`."""

    first: int
    counts: list[int]
    sources: np.ndarray
    positions: np.ndarray
    after: list[int]


class Blend:
    """Which source gives sample n of a run, and the number of that sample in its source.

    Reading forwards costs a few steps a sample. A far sample is reached from `start`, or by arithmetic where the
    weights repeat soon.

    Args:
        weights: [sources] positive integers.
        start: (n, [sources] samples of each source before n), from an earlier `counts(n)`.
    """

    def __init__(self, weights: Sequence[int], start: tuple[int, Sequence[int]] | None = None) -> None:
        assert all(w > 0 for w in weights)
        self.weights, self.total = list(weights), sum(weights)
        if start is not None and (len(start[1]) != len(weights) or sum(start[1]) != start[0]):
            raise UserError(
                f"a blend of {len(weights)} sources cannot resume from {list(start[1])} sequences, {start[0]} in all"
            )
        self.start = None if start is None else (start[0], list(start[1]))
        # The latest blocks: a step's samples may lie in two of them, and are read in any order.
        self._blocks: deque[_Block] = deque(maxlen=BLOCKS_KEPT)

    def at(self, n: int) -> tuple[int, int]:
        """(source, number of the sample in that source) of sample n."""
        block = self._find(n)
        return int(block.sources[n - block.first]), int(block.positions[n - block.first])

    def counts(self, n: int) -> list[int]:
        """[sources] samples of each before sample n; each differs from its share by less than one."""
        if n == 0:
            return [0] * len(self.weights)
        block = self._find(n - 1)
        before = np.bincount(block.sources[: n - block.first], minlength=len(self.weights))
        return [int(count + more) for count, more in zip(block.counts, before, strict=True)]

    def _find(self, n: int) -> _Block:
        """The block that holds n, computed from the latest position before n whose counts are known."""
        found = next((block for block in self._blocks if block.first <= n < block.first + BLOCK), None)
        if found is not None:
            return found
        turns = n // self.total  # after a whole turn, every source has exactly its share
        known = [(turns * self.total, [w * turns for w in self.weights])]
        known += [] if self.start is None else [self.start]
        known += [(block.first + BLOCK, block.after) for block in self._blocks]
        first, counts = max((position for position in known if position[0] <= n), key=lambda position: position[0])
        while first <= n:
            self._blocks.append(self._compute_block(first, counts))
            first, counts = first + BLOCK, self._blocks[-1].after
        return self._blocks[-1]

    def _compute_block(self, first: int, counts: Sequence[int]) -> _Block:
        """Earliest deadline first. Source i's sample j is eligible from r = ceil(goal / step) on, where goal = total +
        unit * total * j and step = unit * w; its deadline is (goal + unit * total - 2 * total) / step.
        """
        k, given = len(self.weights), list(counts)
        sources, positions = np.zeros(BLOCK, np.int32), np.arange(first, first + BLOCK)
        if k == 1:
            given = [first + BLOCK]
        else:
            unit = 2 * k - 2  # everything below is multiplied by unit * total
            steps = [unit * w for w in self.weights]
            per_turn = unit * self.total
            goals = [self.total + per_turn * g for g in given]
            bits = 2 * max(steps).bit_length()  # different deadlines differ by at least 1 / (step * other step)
            eligible: list[int] = []  # a heap of deadline * 2^bits, rounded down, and source, in one integer
            waiting: dict[int, list[int]] = {}  # sources by the turn from which their next sample is eligible

            def await_turn(source: int, turn: int) -> None:
                waiting.setdefault(max(turn, -(-goals[source] // steps[source])), []).append(source)

            for source in range(k):
                await_turn(source, first + 1)
            for at in range(BLOCK):
                for source in waiting.pop(first + at + 1, ()):
                    deadline = (goals[source] + per_turn - 2 * self.total << bits) // steps[source]
                    heappush(eligible, deadline * k + source)
                best = heappop(eligible) % k
                sources[at], positions[at] = best, given[best]
                given[best] += 1
                goals[best] += per_turn
                await_turn(best, first + at + 2)
        return _Block(first, list(counts), sources, positions, given)

    def __getstate__(self) -> dict:
        return {"weights": self.weights, "start": self.start}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["weights"], state["start"])  # type: ignore[misc]
