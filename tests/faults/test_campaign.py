"""The fault campaign's cases as tests: some at every push, all with `make test-full` (`make test-faults` prints the
table).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.campaign import CASES, FLAGS, LAYOUTS, Case, Run, numbers_of, prepare_data, run_case

PUSH = {
    ("kill -9 of a random rank at a random moment, --max-restarts", "dp_shard 2"),
    ("a rank stopped for good", "dp_shard 2"),
}


class Undisturbed:
    """Numbers of the run of each layout that nothing disturbs, made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.found = folder, {}  # type: ignore[var-annotated]
        self.data = prepare_data(folder)
        self.flags = [*FLAGS, "--data-path", str(self.data), "--data-cache-path", str(folder / "cache")]

    def numbers(self, layout: str) -> dict:
        if layout not in self.found:
            place = self.folder / layout.replace(" ", "_")
            run = Run([*self.flags, *LAYOUTS[layout], "--run-dir", str(place)])
            assert run.end() == 0, run.output
            self.found[layout] = numbers_of(place)
        return self.found[layout]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    yield Undisturbed(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(
    "one",
    [
        # A case that comes several times is broken at other moments: the first of them on every push.
        pytest.param(
            c,
            marks=[] if c[:2] in PUSH and c[:2] not in [d[:2] for d in CASES[: n - 1]] else [pytest.mark.full],
            id=f"{n} {c[0]}, {c[1]}",
        )
        for n, c in enumerate(CASES, 1)
    ],
)
def test_nothing_is_lost(undisturbed: Undisturbed, tmp_path: Path, one: Case, request: pytest.FixtureRequest) -> None:
    numbers = undisturbed.numbers(one[1])
    wrong, _ = run_case(
        tmp_path / "case",
        one,
        numbers,
        undisturbed.data,
        [*undisturbed.flags, *LAYOUTS[one[1]]],
        f"pytest {request.node.name}",
    )
    assert not wrong, wrong


def test_every_chosen_case_is_there() -> None:
    assert {c[:2] for c in CASES} >= PUSH and len(CASES) >= 30
