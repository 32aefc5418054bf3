"""Short names for paths."""

from __future__ import annotations

from collections.abc import Sequence


def distinct_suffixes(paths: Sequence[str]) -> list[str]:
    """The last parts of each path: the smallest number of parts that tells all paths apart.

    Equal paths keep all their parts.
    """
    parts = [path.split("/") for path in paths]
    for count in range(1, max(map(len, parts), default=1)):
        suffixes = ["/".join(each[-count:]) for each in parts]
        if len(set(suffixes)) == len(suffixes):
            return suffixes
    return list(paths)
