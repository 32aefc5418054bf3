"""What a refusal of sizes advises: other values, each tried with every check of sizes. No torch import.

On resume the checkpoint fixes most flags, so advice is found by trial instead of by arithmetic at the refusal.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from config.schema import RunConfig, option
from utils.errors import SizeError, UserError

Change = Mapping[str, Any]  # new values by field name; NPROC: ranks of a node

NPROC = "nproc_per_node"
GRID = ("tp_size", "cp_size", "pp_size")
# Takes documents of any alignment at every --cp-size.
CONTIGUOUS: Change = {"cp_backend": "native", "cp_comm_type": "all_gather", "cp_layout": "contiguous"}
SHOWN = 3  # values of a flag, and flags
MAX_REPAIRS = 4  # flags of one repair
MAX_SECONDS = 2.0  # of a search, which every rank makes


def nearest(values: Iterable[int], to: int) -> list[int]:
    """The values above 0, nearest first; of two as near, the larger one first."""
    return sorted({v for v in values if v > 0}, key=lambda v: (abs(v - to), -v))


def multiples(value: int, unit: int) -> list[int]:
    """The positive multiples of `unit` on both sides of `value`, nearest first."""
    return nearest((value // unit * unit, (value // unit + 1) * unit), value)


def divisors(value: int) -> list[int]:
    """Largest first."""
    return [d for d in range(value, 0, -1) if value % d == 0]


def flags_of(change: Change) -> str:
    """`{"tp_size": 2, "qk_norm": False}` -> `--tp-size 2 --no-qk-norm`."""
    words = []
    for name, value in change.items():
        if isinstance(value, bool):
            words.append(option(name if value else f"no_{name}"))
        else:
            words.append(f"no {option(name)}" if value is None else f"{option(name)} {value}")
    return " ".join(words)


def find_advice(
    error: SizeError,
    attempt: Callable[[Change], UserError | None],
    *,
    config: RunConfig,
    ranks: int,
    nodes: int,
    is_resumed: bool,
) -> str:
    """The end of a refusal: flags with which the run starts.

    Args:
        attempt: the refusal of the given flags with a change; None: every check of sizes passes.
        config: the flags as given.
        ranks: of a node.
    """
    deadline, together = time.monotonic() + MAX_SECONDS, error.together

    def is_accepted(change: Change) -> bool:
        return time.monotonic() < deadline and attempt(change) is None

    searches: list[list[list[Change]]] = [[[{}]] if together else [], _changes_of_one(error.options)]
    if is_resumed:
        searches.append([*_changes_of_one(_layout_options(config, ranks, nodes)), [CONTIGUOUS]])
        searches.append([_other_layouts(config, ranks, nodes)])
    for search in searches:
        tried: Iterator[Iterator[Change]] = (({**together, **change} for change in changes) for changes in search)
        accepted = ((change for change in changes if is_accepted(change)) for changes in tried)
        found = [kept for changes in accepted if (kept := list(itertools.islice(changes, SHOWN)))]
        if found:
            return _advise(found, nodes)
    repairs = (_repair(error, {}, attempt, depth) for depth in range(2, MAX_REPAIRS + 1) if time.monotonic() < deadline)
    repair = next(filter(None, repairs), {})
    return _advise([[repair]], nodes) if repair else "no near value mends this"


def _repair(error: SizeError, change: Change, attempt: Callable[[Change], UserError | None], depth: int) -> Change:
    """A change of up to `depth` flags: each flag mends the refusal that the one before leads to. Empty: none found."""
    for name, values in error.options.items():
        for value in values[:SHOWN] if name not in change else []:
            changed = {**change, name: value}
            refusal = attempt(changed)
            if refusal is None:
                return changed
            if depth > 1 and isinstance(refusal, SizeError):
                repaired = _repair(refusal, changed, attempt, depth - 1)
                if repaired:
                    return repaired
    return {}


def _advise(found: list[list[Change]], nodes: int) -> str:
    words = ", or ".join(_either(changes) for changes in found[:SHOWN])
    words = words.replace(option(NPROC), f"torchrun {option(NPROC)}")  # the flag of another command than train.py's
    return f"use {words}" + (f" on each of the {nodes} nodes" if nodes > 1 and option(NPROC) in words else "")


def _either(changes: list[Change]) -> str:
    """`--tp-size 4, 2 or 1`, for values of one flag."""
    texts = [flags_of(change) for change in changes]
    if len(changes[0]) == 1:
        texts[1:] = [text.partition(" ")[2] for text in texts[1:]]
    return " or ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))


def _changes_of_one(options: Mapping[str, Iterable[Any]]) -> list[list[Change]]:
    return [[{name: value} for value in values] for name, values in options.items()]


def _layout_options(config: RunConfig, ranks: int, nodes: int) -> dict[str, list[int]]:
    """Other values of the flags that say how ranks share the work."""
    parallel, micro = config.parallel, config.training.micro_batch_size
    options = {name: nearest(divisors(ranks * nodes), getattr(parallel, name)) for name in GRID}
    return options | {
        NPROC: nearest(range(1, 2 * ranks + 1), ranks),
        "dp_shard_size": [-1],
        "micro_batch_size": divisors(micro),
    }


def _other_layouts(config: RunConfig, ranks: int, nodes: int) -> list[Change]:
    """Changes of several layout flags, those of the fewest flags first, then those of the most ranks."""
    current = {name: getattr(config.parallel, name) for name in (*GRID, "dp_replicate_size", "dp_shard_size")}
    current |= {"micro_batch_size": config.training.micro_batch_size, NPROC: ranks}
    changes: list[Change] = []
    for count in range(ranks, 0, -1):
        sizes = divisors(count * nodes)
        for grid in itertools.product(sizes, repeat=len(GRID)):
            if count * nodes % math.prod(grid) == 0:
                wanted = {NPROC: count, **dict(zip(GRID, grid, strict=True)), "dp_replicate_size": 1}
                wanted |= {"dp_shard_size": -1, "micro_batch_size": 1}
                changes.append({name: value for name, value in wanted.items() if value != current[name]})
    return sorted(changes, key=len)
