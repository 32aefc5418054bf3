"""Python's garbage collector on a schedule (--gc-interval)."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest

from runtime.garbage import ScheduledCollector, freeze_imports
from tests.forked import ROOT


class Knot:
    """An object that only a collection frees."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def test_garbage_goes_at_multiples_of_the_interval() -> None:
    collector = ScheduledCollector(10)
    collector.after(33)  # the first step of a resumed run
    assert not gc.isenabled() and gc.get_freeze_count() > 1000
    knot = weakref.ref(Knot())
    for done in range(34, 40):
        collector.after(done)
        assert knot() is not None, done
    collector.after(40)
    assert knot() is None
    collector.stop()
    assert gc.isenabled() and gc.get_freeze_count() < 1000


def test_a_schedule_of_zero_changes_nothing() -> None:
    frozen = gc.get_freeze_count()
    collector = ScheduledCollector(0)
    collector.after(1)
    assert gc.isenabled() and gc.get_freeze_count() == frozen
    collector.stop()


def test_stopping_before_the_first_step_keeps_what_others_froze() -> None:
    gc.freeze()
    ScheduledCollector(10).stop()
    assert gc.get_freeze_count()


def test_imports_are_frozen_without_a_collection() -> None:
    gc.disable()
    knot = weakref.ref(Knot())
    freeze_imports()
    assert gc.isenabled() and gc.get_freeze_count() > 1000
    gc.collect()
    assert knot() is not None


def test_imports_of_a_run_are_not_interrupted_by_collections() -> None:
    """A tenth of a start: collections while train.py imports visit objects that all stay."""
    started = "import gc, runpy; gc.callbacks.append(lambda phase, info: print(phase)); "
    command = "import sys; sys.argv = ['train.py', '--no-such-flag']; runpy.run_path('train.py', run_name='__main__')"
    output = subprocess.run([sys.executable, "-c", started + command], cwd=ROOT, capture_output=True, text=True)
    assert "--no-such-flag" in output.stderr
    assert output.stdout.count("start") < 100  # torch asks for a few itself; on their own they were 735
