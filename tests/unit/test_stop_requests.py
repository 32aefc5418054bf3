"""Requests to stop: what counts, what comes first, and the file that outlives a start."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from metrics.log import HeldOut
from runtime import signals
from runtime.signals import StopRequested, StopRequests
from training import evaluate as validation


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(minutes=1))
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    kept = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
    }
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell script's background
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def asked(stops: StopRequests, done: int = 7) -> str:
    stops.start_sync()
    return stops.stop_reason(done)


def requests(group: dist.ProcessGroup, stop_file: Path | None = None, **changes) -> StopRequests:
    stops = StopRequests(**(dict(interval=None, duration_minutes=None, started=time.monotonic()) | changes))
    stops.watch_file(stop_file, group)
    return stops


def test_nothing_asked_goes_on(group) -> None:
    assert asked(requests(group)) == ""


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1"), (signal.SIGHUP, "SIGHUP")]
)
def test_signals(group, number: signal.Signals, name: str) -> None:
    stops = requests(group)
    os.kill(os.getpid(), number)
    assert asked(stops) == name and asked(stops) == name


def test_ctrl_c_asks_only_once_training_has_begun(group) -> None:
    stops = requests(group)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    stops.watch_interrupts()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # torchrun's, at once
    assert asked(stops) == "Ctrl-C"


def test_a_second_ctrl_c_ends_at_once(group, monkeypatch) -> None:
    monkeypatch.setattr(signals, "REPEAT_SECONDS", 0.01)
    stops = requests(group)
    stops.watch_interrupts()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_stop_file(group, tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    stops = requests(group, tmp_path / "stop")
    assert not (tmp_path / "stop").exists() and asked(stops) == ""  # it was for an earlier start
    (tmp_path / "stop").touch()
    assert asked(stops) == "the stop file"


def test_the_stop_file_outlives_a_restart_by_torchrun(group, tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    stops = StopRequests(interval=None, duration_minutes=None, started=time.monotonic())
    stops.watch_file(tmp_path / "stop", group, is_restart=True)
    assert asked(stops) == "the stop file"


def test_a_stop_file_that_cannot_be_looked_at_asks_for_nothing(group, tmp_path: Path, monkeypatch) -> None:
    stops = requests(group, tmp_path / "stop")

    def stale(self: Path) -> bool:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Path, "exists", stale)
    assert asked(stops) == ""


def test_under_nohup_a_hangup_is_nothing(group) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stops = requests(group)
    os.kill(os.getpid(), signal.SIGHUP)
    assert asked(stops) == ""


def test_the_time_and_the_step(group) -> None:
    assert asked(requests(group, duration_minutes=1.0)) == ""
    assert asked(requests(group, duration_minutes=1.0, started=time.monotonic() - 61)) == "--exit-duration-in-mins"
    stops = requests(group, interval=4)
    assert [asked(stops, done) for done in (3, 4, 5, 8)] == ["", "--exit-interval", "", "--exit-interval"]


def test_a_signal_comes_before_the_rest(group, tmp_path: Path) -> None:
    stops = requests(group, tmp_path / "stop", interval=1, duration_minutes=0.001, started=time.monotonic() - 61)
    (tmp_path / "stop").touch()
    assert asked(stops) == "the stop file"
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked(stops) == "SIGTERM"


class Ranks:
    """A group of so many ranks. The slowest of them agrees to another exchange after `slowest` steps."""

    def __init__(self, size: int, monkeypatch, slowest: int = 99) -> None:
        self.size, self.seconds, self.agreed = lambda: size, 0.0, 0
        monkeypatch.setattr(signals.time, "monotonic", lambda: self.seconds)
        monkeypatch.setattr(dist, "all_reduce", self.all_reduce)
        self.slowest = slowest

    def all_reduce(self, buffer: torch.Tensor, **options) -> SimpleNamespace:
        assert options["op"] == dist.ReduceOp.MAX and options["group"] is self
        self.agreed += 1
        buffer[1] = max(int(buffer[1]), -self.slowest)
        return SimpleNamespace(wait=lambda: None)

    def steps(self, stops: StopRequests, seconds: float, most: int = 400) -> int:
        """Steps of so many seconds until the ranks stop."""
        for done in range(1, most):
            self.seconds += seconds
            if asked(stops, done):
                return done
        return most


@pytest.mark.parametrize(
    ("size", "flag", "step_seconds", "agreements"),
    [(8, None, 0.1, 400), (4096, None, 0.1, 25), (4096, 40, 0.1, 10), (16384, None, 0.5, 40), (64, 100, 90.0, 400)],
)
def test_ranks_agree_every_few_steps_and_within_five_seconds(
    monkeypatch, size: int, flag: int | None, step_seconds: float, agreements: int
) -> None:
    ranks = Ranks(size, monkeypatch)
    stops = requests(ranks, check_interval=flag, started=0.0)  # type: ignore[arg-type]
    assert ranks.steps(stops, step_seconds, most=401) == 401 and ranks.agreed == agreements
    stops.requested = signals.REASONS.index("SIGTERM")
    assert ranks.steps(stops, step_seconds) * step_seconds <= max(5, step_seconds)


def test_the_slowest_rank_says_when_all_agree_again(monkeypatch) -> None:
    ranks = Ranks(4096, monkeypatch, slowest=4)
    stops = requests(ranks, started=0.0)  # type: ignore[arg-type]
    assert ranks.steps(stops, 0.1, most=41) == 41 and ranks.agreed == 10


def test_where_there_is_nothing_to_save_signals_end_the_process(group) -> None:
    stops = requests(group)
    stops.restore_handlers()
    assert {signal.getsignal(number) for number in signals.STOP_SIGNALS} == {signal.SIG_DFL}
    stops.requested = 1  # before
    with pytest.raises(KeyboardInterrupt):
        stops.restore_handlers()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_ends_a_validation_between_two_batches(group, monkeypatch, number: signal.Signals) -> None:
    stops, seen = requests(group, interval=1), []  # --exit-interval does not
    row = SimpleNamespace(labels=torch.tensor([2, 0, -100]))

    def batches(stop_at: int) -> Iterator[SimpleNamespace]:
        for at in range(10):
            if at == stop_at:
                os.kill(os.getpid(), number)
            seen.append(at)
            yield SimpleNamespace(to=lambda device: row)

    monkeypatch.setattr(validation, "forward_only", lambda model, rows, grid: [(None, torch.tensor(1.5))] * len(rows))
    monkeypatch.setattr(validation, "finish_forward", lambda model: seen.append("finished"))
    grid = SimpleNamespace(group=lambda axis: group, size=lambda axis: 1)
    model, cpu = SimpleNamespace(eval=lambda: None), torch.device("cpu")
    options: dict[str, Any] = dict(token_bytes=torch.tensor([1, 2, 4]), stops=stops)
    whole = validation.evaluate(model, batches(99), grid, cpu, **options)  # type: ignore[arg-type]
    assert whole == HeldOut(loss=0.75, tokens=20, text_bytes=50)
    assert whole.bits_per_byte == pytest.approx(15 / 50 / math.log(2))
    seen.clear()
    with pytest.raises(StopRequested, match=number.name):
        validation.evaluate(model, batches(3), grid, cpu, **options)  # type: ignore[arg-type]
    assert seen[-1] == "finished" and seen[-2] in (3, 4), seen


def test_eval_only_has_no_duration(group) -> None:
    stops = requests(group, duration_minutes=1.0, started=time.monotonic() - 100)
    assert asked(stops) == "--exit-duration-in-mins"
    stops.restore_handlers()
    assert asked(stops) == ""
