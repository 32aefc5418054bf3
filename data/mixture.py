"""The samples of a resumed run: each source goes on where it stood, also where the mixture of sources has changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.dataset import BlendedDataset, Mixture, PackedDataset, Past, SampleDataset
from utils.errors import UserError


def match_sources(saved: Sequence[Sequence[Any]], wanted: Sequence[Sequence[Any]]) -> list[int | None]:
    """For each wanted source the number of the saved one with the same documents; None: a new source.

    Args:
        saved, wanted: (name, fingerprint, share) of each source. A source may have moved; of equal ones, names decide.
    """
    rows = [tuple(row[:2]) for row in saved]
    free = set(range(len(rows)))
    places: list[int | None] = [None] * len(wanted)
    for is_equal in (lambda a, b: a == b, lambda a, b: a[1] == b[1]):  # same name and documents; same documents
        for number, row in enumerate(wanted):
            found = next((place for place in sorted(free) if is_equal(rows[place], tuple(row[:2]))), None)
            if places[number] is None and found is not None:
                places[number] = found
                free.remove(found)
    return places


def add_rows(state: dict[str, Any], rows: Sequence[Sequence[Any]] | None) -> dict[str, Any]:
    """The state of a checkpoint from before states held fingerprints, with those of the checkpoint's sources."""
    if not state or "mixtures" in state or rows is None or len(rows) != len(state.get("sources", ())):
        return state
    sources = [place | {"fingerprint": row[1]} for place, row in zip(state["sources"], rows, strict=True)]
    return state | {"sources": sources, "mixtures": [[state.get("mixture", {"sequences": 0})["sequences"], rows]]}


def resume_samples(samples: SampleDataset, state: Mapping[str, Any]) -> SampleDataset:
    """The samples from a checkpoint on. A mixture other than the checkpoint's begins with the next sample.

    Args:
        samples: of the run's flags.
        state: the checkpoint's, from `state_dict`; empty: of an old checkpoint, whose samples are counted from 0.

    Raises:
        UserError: the state is corrupted, or other mixtures are given for samples that are read.
    """
    if not state:
        return samples
    whole = samples if isinstance(samples, BlendedDataset) else BlendedDataset([samples], [Mixture(0, [1], [0])])
    sources, mixtures = whole.sources, whole.mixtures
    rows = [whole.list_rows(number) for number in range(len(mixtures))]
    try:
        n, saved = state["sequences"], state["sources"]
        reached = [(place["epoch"], place["position"]) for place in saved]
        since = state.get("mixture", {"sequences": 0, "counts": [0] * len(saved)})
        since_first, begun = since["sequences"], since["counts"]
        history = state.get("mixtures") or [[since_first, rows[0]]]
        prints = [(place["name"], place.get("fingerprint")) for place in saved]
        numbers = [n, since_first, *begun, *(number for pair in reached for number in pair)]
        numbers += [first for first, _ in history]
        if not all(type(number) is int and number >= 0 for number in numbers) or len(begun) != len(saved):
            raise TypeError("a count is no number")
        described = [(first, _facts(row)) for first, row in history]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint's position in the data is corrupted ({error})") from error
    if "mixtures" in state:
        places = match_sources(prints, [(s.name, s.fingerprint()) for s in sources])
    elif len(saved) == len(sources):
        places = list(range(len(sources)))
    else:
        raise UserError(f"--data-path: {len(sources)} sources, but the checkpoint's data came from {len(saved)}")
    pairs = list(zip(sources, places, strict=True))
    counts = [0 if k is None else s.samples_per_epoch * reached[k][0] + reached[k][1] for s, k in pairs]
    before = [0 if k is None else begun[k] for k in places]
    left = [place for number, place in enumerate(saved) if number not in places]
    if len(mixtures) == 1:
        current, first = 0, since_first if described[-1][1] == _facts(rows[0]) else n
        if isinstance(samples, PackedDataset) and not (left or first):
            return samples
        mixtures = [mixtures[0]._replace(first=first)]
    else:
        current, first = _check_phases(mixtures, rows, described, n, since_first)
    past = [one for one in history if one[0] < first]
    # What the mixture does not name has read nothing since it began, also a source that a later phase brings back.
    reads = mixtures[current].members if first < n else ()
    begun_counts = [before[m] if m in reads else count for m, count in enumerate(counts)]
    return BlendedDataset(sources, mixtures, Past(current, begun_counts, counts, n, past, left))


def _facts(rows: Sequence[Sequence[Any]]) -> list[tuple]:
    """What decides a mixture: documents and share of each source, in order."""
    return [(documents, share) for _, documents, share in rows]


def _check_phases(
    mixtures: Sequence[Mixture],
    rows: Sequence[Sequence[Any]],
    history: Sequence[tuple[int, list[tuple]]],
    n: int,
    last: int,
) -> tuple[int, int]:
    """Number and first sample of the phase that sample n is of; `last` is the first sample of the phase before n.

    Raises:
        UserError: a phase before sample n was another.
    """
    wanted = [(m.first, _facts(row)) for m, row in zip(mixtures, rows, strict=True) if history[0][0] <= m.first < n]
    if wanted != [one for one in history if one[0] < n] or history[-1][0] != last:
        raise UserError(
            f"--data-path: its phases before sample {n} are not those that the checkpoint's {n} samples were read by, "
            f"which begin with samples {', '.join(str(first) for first, _ in history)}: only a phase that begins with "
            f"sample {n} or later may change"
        )
    return max((number, m.first) for number, m in enumerate(mixtures) if m.first <= n)
