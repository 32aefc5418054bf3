"""Phases and who is slow in them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from metrics.timers import PHASES, Timers, describe_phases


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


CPU = torch.device("cpu")


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_level_measures_its_phases_only(group, level: int) -> None:
    timers = Timers(level, CPU)
    for phase in PHASES:
        with timers(phase):
            time.sleep(0.002)
    found = timers.read(group)
    assert set(found) == {phase for phase, needs in PHASES.items() if needs <= level}
    assert all(0.002 <= least == most < 0.5 and rank == 0 for least, most, rank in found.values())
    assert timers.read(group) == {}  # read once


def test_what_was_measured_elsewhere_is_added(group) -> None:
    timers = Timers(1, CPU)
    timers.add("cp wait", 1.5)
    timers.add("cp wait", 0.5)
    assert timers.read(group) == {"cp wait": (2.0, 2.0, 0)}


def test_a_phase_that_fails_is_left(group) -> None:
    timers = Timers(1, CPU)
    with pytest.raises(ValueError, match="inside"), timers("data"):
        raise ValueError("inside")


def test_describe_phases() -> None:
    line = describe_phases({"data": (0.1, 0.2, 3), "optimizer": (0.40, 0.41, 1)}, num_steps=10)
    assert line == "ms a step, min..max over ranks: data 10.0..20.0 (slowest: rank 3) | optimizer 40.0..41.0"


def test_the_slowest_is_who_works_most_and_waits_least(monkeypatch: pytest.MonkeyPatch) -> None:
    timers = Timers(1, torch.device("cpu"))
    timers.add("data", 1.0)
    timers.add("cp wait", 0.25)
    other = torch.zeros(len(timers.seconds), dtype=torch.float64)
    other[list(timers.seconds).index("data")], other[list(timers.seconds).index("cp wait")] = 0.5, 3.0
    monkeypatch.setattr("metrics.timers.dist.all_reduce", lambda everyone, group: everyone[0].copy_(other))
    found = timers.read(SimpleNamespace(size=lambda: 2, rank=lambda: 1))  # type: ignore[arg-type]
    assert found == {"data": (0.5, 1.0, 1), "cp wait": (0.25, 3.0, 1)}
