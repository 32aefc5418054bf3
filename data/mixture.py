"""The samples of a resumed run: each source goes on where it stood, also where the mixture of sources has changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.dataset import BlendedDataset, Mixture, PackedDataset, SampleDataset
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


def resume_samples(
    samples: SampleDataset, state: Mapping[str, Any], places: Sequence[int | None] | None = None
) -> SampleDataset:
    """The samples from a checkpoint on.

    Args:
        samples: of the run's flags.
        state: the checkpoint's, from `state_dict`; empty: of an old checkpoint, whose samples are counted from 0.
        places: of `match_sources`, where the mixture changes here: it begins with the next sample; None: no change.

    Raises:
        UserError: the state is corrupted, or has another number of sources.
    """
    if not state:
        return samples
    if isinstance(samples, BlendedDataset):
        sources, weights = samples.sources, samples.blend.weights
    else:
        sources, weights = [samples], [1]
    try:
        n, positions = state["sequences"], [(p["epoch"], p["position"]) for p in state["sources"]]
        began = state.get("mixture")
        mixture = Mixture(0, [0] * len(positions)) if began is None else Mixture(began["sequences"], began["counts"])
        numbers = [n, mixture.sequences, *mixture.counts, *(number for pair in positions for number in pair)]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise TypeError("a count is no number")
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"the checkpoint's position in the data is corrupted ({error})") from error
    if places is None and not len(positions) == len(mixture.counts) == len(sources):
        raise UserError(f"--data-path: {len(sources)} sources, but the checkpoint's data came from {len(positions)}")
    if places is None and began is None and isinstance(samples, PackedDataset):
        return samples
    kept = range(len(sources)) if places is None else places
    pairs = zip(sources, kept, strict=True)
    counts = [0 if k is None else s.samples_per_epoch * positions[k][0] + positions[k][1] for s, k in pairs]
    if places is not None:
        mixture = Mixture(n, counts)
    return BlendedDataset(sources, weights, mixture=mixture, reached=(n, counts))
