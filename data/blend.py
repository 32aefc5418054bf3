"""Several sources in one run: which of them gives sequence n, so that every prefix of the run has the weights' shares.

Sources take turns by Tijdeman's algorithm (The chairman assignment problem, Discrete Mathematics 32, 1980): after any n
sequences, each source has given its share of them to within 1 - 1/(2k - 2) of a sequence, k sources. All in whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import yaml

from utils.errors import UserError

BLOCK = 4096  # sequences whose sources are worked out at a time


@dataclass(frozen=True)
class BlendPart:
    """One source of a blend. Attributes: path; weight, None where none was given: by its size."""

    path: str
    weight: Fraction | None = None


def parse_blend(words: Sequence[str], flag: str = "--data-path") -> list[BlendPart]:
    """`P`, `0.7 P1 0.3 P2`, `P1 P2` (each as often as it is long) or one YAML file that lists them.

    Raises:
        UserError: a weight that is no positive number, a mixture of both forms, a source named twice, a broken YAML.
    """
    if len(words) == 1 and words[0].endswith((".yaml", ".yml")):
        return _from_yaml(Path(words[0]), flag)
    if len(words) > 1 and len(words) % 2 == 0 and all(_is_number(word) for word in words[::2]):
        parts = [
            BlendPart(path, _weight(number, path, flag)) for number, path in zip(words[::2], words[1::2], strict=True)
        ]
    else:
        stray = next((word for word in words if _is_number(word) and not Path(word).exists()), None)
        if stray is not None:
            raise UserError(
                f"{flag} {' '.join(words)}: {stray} stands where a path should; write WEIGHT PATH WEIGHT PATH ... or paths only"
            )
        parts = [BlendPart(word) for word in words]
    return _checked(parts, flag)


def _checked(parts: list[BlendPart], flag: str) -> list[BlendPart]:
    seen: set[str] = set()
    for part in parts:
        name = str(Path(part.path).resolve())
        if name in seen:
            raise UserError(f"{flag}: {part.path} is named twice; give it once, with the sum of its weights")
        seen.add(name)
    return parts


def _from_yaml(file: Path, flag: str) -> list[BlendPart]:
    try:
        loaded = yaml.safe_load(file.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{flag} {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {file}: not YAML ({' '.join(str(error).split())})") from error
    listed = loaded.get("sources") if isinstance(loaded, dict) and set(loaded) == {"sources"} else None
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{flag} {file}: must hold one key, sources, with a list of entries of path and weight")
    parts = []
    for number, entry in enumerate(listed, 1):
        if (
            not isinstance(entry, dict)
            or not set(entry) <= {"path", "weight"}
            or not isinstance(entry.get("path"), str)
        ):
            raise UserError(f"{flag} {file}: entry {number} of sources must hold path and weight, not {entry!r}")
        path = str(file.parent / entry["path"])
        parts.append(BlendPart(path, _weight(str(entry["weight"]), path, flag) if "weight" in entry else None))
    if len({part.weight is None for part in parts}) > 1:
        raise UserError(f"{flag} {file}: give every source a weight, or none")
    return _checked(parts, flag)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _weight(text: str, path: str, flag: str) -> Fraction:
    if not (_is_number(text) and 0 < float(text) < float("inf")):
        raise UserError(f"{flag}: the weight {text} of {path} must be a number above 0")
    return Fraction(text)


def whole_weights(weights: Sequence[Fraction | int]) -> list[int]:
    """The smallest whole numbers in the same proportions."""
    scale = math.lcm(*(Fraction(w).denominator for w in weights))
    scaled = [int(w * scale) for w in weights]
    divisor = math.gcd(*scaled)
    return [w // divisor for w in scaled]


class Blend:
    """Which source gives sequence n of a run, and which of its sequences that is.

    Reading forwards costs a few steps a sequence; the place of a far one is found from `start` or, for blends whose weights
    repeat soon, by arithmetic.

    Args:
        weights: [sources] whole numbers above 0.
        start: (n, [sources] sequences that each source gave before n), a `counts` of before; saves working them out again.
    """

    def __init__(self, weights: Sequence[int], start: tuple[int, Sequence[int]] | None = None) -> None:
        assert all(w > 0 for w in weights)
        self.weights, self.total = list(weights), sum(weights)
        if start is not None and (len(start[1]) != len(weights) or sum(start[1]) != start[0]):
            raise UserError(
                f"a blend of {len(weights)} sources cannot go on from {list(start[1])} sequences, {start[0]} in all"
            )
        self.start = None if start is None else (start[0], list(start[1]))
        self._first, self._counts = 0, [0] * len(weights)  # before the block at hand
        self._sources = np.empty(0, np.int32)
        self._positions = np.empty(0, np.int64)
        self._after = (0, self._counts)  # behind it

    def at(self, n: int) -> tuple[int, int]:
        """(source, number of the sequence among that source's) of sequence n."""
        if not self._first <= n < self._first + len(self._sources):
            self._go_to(n)
        return int(self._sources[n - self._first]), int(self._positions[n - self._first])

    def counts(self, n: int) -> list[int]:
        """[sources] sequences that each gave before sequence n; they differ from their shares by less than one."""
        if n == 0:
            return [0] * len(self.weights)
        self.at(n - 1)  # makes its block the one at hand
        before = np.bincount(self._sources[: n - self._first], minlength=len(self.weights))
        return [int(count + more) for count, more in zip(self._counts, before, strict=True)]

    def _go_to(self, n: int) -> None:
        """Work out blocks until one holds n, from the latest place before it whose counts are known."""
        turns = n // self.total  # after a whole turn every source has exactly its share
        known = [
            (turns * self.total, [w * turns for w in self.weights]),
            self._after,
            *([self.start] if self.start else []),
        ]
        first, counts = max((place for place in known if place[0] <= n), key=lambda place: place[0])
        while True:
            self._work_out(first, counts)
            first, counts = self._after
            if n < first:
                return

    def _work_out(self, first: int, counts: Sequence[int]) -> None:
        k = len(self.weights)
        sources = np.zeros(BLOCK, np.int32)
        positions = np.arange(first, first + BLOCK)
        given = list(counts)
        if k > 1:
            positions = np.empty(BLOCK, np.int64)
            unit = 2 * k - 2  # everything below times unit * total
            step = [unit * w for w in self.weights]
            per_turn = unit * self.total
            due = [s * first - per_turn * g for s, g in zip(step, given, strict=True)]
            for place in range(BLOCK):
                best, best_late = -1, 0
                for source in range(k):
                    due[source] += step[source]
                    # In arrears by at least 1 / unit of a sequence; of those, whose arrears reach 1 - 1 / unit first.
                    if due[source] >= self.total:
                        late = per_turn - self.total - due[source]
                        if best < 0 or late * step[best] < best_late * step[source]:
                            best, best_late = source, late
                sources[place], positions[place] = best, given[best]
                given[best] += 1
                due[best] -= per_turn
        else:
            given = [first + BLOCK]
        self._first, self._counts = first, list(counts)
        self._sources, self._positions = sources, positions
        self._after = (first + BLOCK, given)

    def __getstate__(self) -> dict:
        return {"weights": self.weights, "start": self.start}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["weights"], state["start"])  # type: ignore[misc]
