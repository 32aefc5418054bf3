"""Ranks that a thread stands in for: who is silent, who is elsewhere, who is behind; and places in words."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial

import pytest
import torch.distributed as dist

from runtime import distributed, watchdog
from runtime.status import find_lost_hosts
from runtime.watchdog import LostStore, Watchdog, describe_frame


class Peer:
    """Another rank's heartbeat in the store, renewed until the rank is silent."""

    def __init__(self, store: dist.Store, rank: int, **changes) -> None:
        self.store, self.rank, self.ended = store, rank, threading.Event()
        self.heartbeat = (
            dict(count=0, step=5, activity="training", place="all_reduce, x.py:1", waits=True, host="node7") | changes
        )
        self.thread = threading.Thread(target=self.run)
        self.tell()
        self.thread.start()

    def tell(self) -> None:
        self.heartbeat["count"] += 1
        self.store.set(str(self.rank), json.dumps(self.heartbeat))

    def run(self) -> None:
        while not self.ended.wait(0.01):
            self.tell()

    def silence(self) -> None:
        self.ended.set()
        self.thread.join()


@pytest.fixture()
def peers() -> Iterator[list[Peer]]:
    made: list[Peer] = []
    yield made
    for peer in made:
        peer.silence()


def watch(store: dist.Store, world_size: int, minutes: float = 0.003) -> tuple[Watchdog, list[str]]:
    said: list[str] = []
    dog = Watchdog(store, rank=0, world_size=world_size, startup_minutes=minutes, minutes=minutes, on_hang=said.append)
    dog.heartbeat("training", 5)
    return dog, said


def wait_for(said: list[str]) -> str:
    deadline = time.monotonic() + 20
    while not said:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return said[0]


class Collective:
    """The main thread as if in a collective: code whose file is torch.distributed's."""

    def __enter__(self) -> None:
        self.go = threading.Event()
        space: dict = {}
        exec(compile("def all_reduce(go):\n    go.wait()\n", dist.__file__.replace("__init__", "c10d"), "exec"), space)
        self.thread = threading.Thread(target=lambda: space["all_reduce"](self.go))
        self.thread.start()

    def __exit__(self, *error) -> None:
        self.go.set()
        self.thread.join()


def in_a_collective(dog: Watchdog, call: Collective) -> None:
    assert call.thread.ident is not None
    dog.main = call.thread.ident


def test_a_silent_rank_is_named(peers: list[Peer]) -> None:
    store = dist.HashStore()
    peers += [Peer(store, 1), Peer(store, 2, host="node9", place="read, data/loader.py:3")]
    peers[1].silence()
    call = Collective()
    with call:
        dog, said = watch(store, 3)
        in_a_collective(dog, call)
        text = wait_for(said)
    assert (
        "no progress for 0.003 minutes (--distributed-startup-timeout-minutes): training, step 5, in all_reduce" in text
    )
    assert "lost rank 2 on node9 (at step 5, in read, data/loader.py:3)" in text and "rank 1" not in text
    assert find_lost_hosts(text) == ["node9"]


def test_a_rank_that_is_elsewhere_is_named(peers: list[Peer]) -> None:
    store = dist.HashStore()
    peers += [
        Peer(store, 1, waits=False, activity="validation", place="place, data/indexed_dataset.py:9"),
        Peer(store, 2),
    ]
    call = Collective()
    with call:
        dog, said = watch(store, 3)
        dog.end_startup()
        in_a_collective(dog, call)
        text = wait_for(said)
    assert "(--distributed-timeout-minutes)" in text
    assert (
        "waits for rank 1 on node7 (validation, step 5, in place, data/indexed_dataset.py:9)" in text
        and "rank 2" not in text
    )


def test_a_rank_that_is_behind_is_named(peers: list[Peer]) -> None:
    store = dist.HashStore()
    peers += [Peer(store, 1), Peer(store, 2, step=4)]
    call = Collective()
    with call:
        dog, said = watch(store, 3)
        in_a_collective(dog, call)
        assert "waits for rank 2 on node7" in wait_for(said)


def test_a_rank_that_hangs_by_itself_says_so(peers: list[Peer]) -> None:
    store = dist.HashStore()
    peers.append(Peer(store, 1))
    _, said = watch(store, 2)
    assert "this rank does not wait for another" in wait_for(said)


class Dumb:
    """A store at the other end of a cut cable, from `cut` on: no answer, and no error."""

    def __init__(self) -> None:
        self.store, self.is_cut, self.end = dist.HashStore(), False, threading.Event()

    def __getattr__(self, name: str):
        def call(*args):
            if self.is_cut:
                self.end.wait()
            return getattr(self.store, name)(*args)

        return call


def test_a_store_that_does_not_answer_is_told(monkeypatch) -> None:
    monkeypatch.setattr(watchdog, "ANSWER_SECONDS", 0.1)
    store = Dumb()
    dog, said = watch(store, 2)  # type: ignore[arg-type]
    try:
        call = Collective()
        with call:
            in_a_collective(dog, call)
            store.is_cut = True
            text = wait_for(said)
    finally:
        store.end.set()
        dog.stop()
    assert (
        "no progress for 0.003 minutes" in text
        and "lost the store of the run, on the first node (no answer for 0.1 s" in text
    )


def test_a_store_that_goes_during_the_diagnosis_is_told(peers: list[Peer], monkeypatch) -> None:
    store = dist.HashStore()
    peers.append(Peer(store, 1))
    call, answers = Collective(), []
    real = Watchdog._read_heartbeats

    def everyone(self, ranks=None):
        if len(answers) == 2:
            raise LostStore("lost the store of the run, on the first node (gone)")
        answers.append(real(self, ranks))
        return answers[-1]

    monkeypatch.setattr(Watchdog, "_read_heartbeats", everyone)
    with call:
        dog, said = watch(store, 2)
        in_a_collective(dog, call)
        text = wait_for(said)
    assert text.startswith("no progress for 0.003 minutes") and text.endswith(
        "lost the store of the run, on the first node (gone)"
    )


class Counting:
    """A store that counts requests."""

    def __init__(self) -> None:
        self.store, self.calls = dist.HashStore(), Counter[str]()

    def __getattr__(self, name: str):
        def call(*args):
            self.calls[name] += 1
            return getattr(self.store, name)(*args)

        return call


def test_one_rank_explains_and_all_end_with_its_reason(peers: list[Peer]) -> None:
    """Rank 2 is silent; ranks 0 and 1 wait for it, rank 3 does not and is ended too."""
    store = Counting()
    peers.append(Peer(store, 2, host="node9"))  # type: ignore[arg-type]
    peers[0].silence()
    call, said = Collective(), {rank: [] for rank in (0, 1, 3)}  # type: dict[int, list[str]]
    dogs = []

    def on_hang(rank: int, reason: str) -> None:
        said[rank].append(reason)
        dogs[rank].announce(f"rank {rank} failed: {reason}")

    with call:
        for rank in (0, 1):
            limit = dict(startup_minutes=0.003, minutes=0.003)
            dogs.append(Watchdog(store, rank=rank, world_size=4, on_hang=partial(on_hang, rank), **limit))  # type: ignore[arg-type]
            in_a_collective(dogs[-1], call)
        busy = Watchdog(store, rank=3, world_size=4, startup_minutes=0.05, minutes=0.05, on_hang=said[3].append)  # type: ignore[arg-type]
        for rank in said:
            wait_for(said[rank])
    busy.stop()
    first, second = sorted((said[0][0], said[1][0]), key=len)
    assert first.startswith("no progress for 0.003 minutes") and "lost rank 2 on node9" in first
    assert second == said[3][0] and second.startswith("stopped, because rank") and second.endswith(first)
    assert store.calls["multi_get"] == 2  # heartbeats of all ranks are read twice, by one rank


def test_a_rank_that_dies_while_it_explains_is_replaced(peers: list[Peer], monkeypatch) -> None:
    monkeypatch.setattr(watchdog, "ANSWER_SECONDS", 0.2)
    store = dist.HashStore()
    store.add("explained 0", 1)
    peers.append(Peer(store, 1))
    dog, _ = watch(store, 2, minutes=0.01)
    assert dog.find_cause(lambda: "found") == "found"
    dog.stop()


def test_a_failure_is_announced_after_the_save_in_the_background(monkeypatch) -> None:
    """Python waits for that thread before it calls what `atexit` has. The first failure stays."""
    at_exit: list = []
    monkeypatch.setattr(watchdog.atexit, "register", lambda call, *args: at_exit.append(partial(call, *args)))
    store = dist.HashStore()
    dog, said = watch(store, 1, minutes=9)
    dog.announce_at_exit("rank 0 on node1 failed: no space left")
    time.sleep(0.1)
    assert not store.check([watchdog.FAILURE])
    for call in reversed(at_exit):
        call()
    dog.announce("rank 7 on node2 failed: lost another rank")
    assert store.get(watchdog.FAILURE) == b"rank 0 on node1 failed: no space left"
    dog.interval = 0.01
    dog.stop()
    assert said == []


def test_an_interval_grows_with_the_world() -> None:
    def interval(world_size: int, minutes: float = 10) -> float:
        dog = Watchdog(
            dist.HashStore(), rank=0, world_size=world_size, startup_minutes=30, minutes=minutes, on_hang=print
        )
        dog.stop()
        return dog.interval

    assert [interval(n) for n in (1, 512, 4096, 16384)] == [2, 2, 5.12, 10] and interval(4096, 0.1) == 1


def test_a_diagnosis_that_fails_ends_the_run_all_the_same(monkeypatch) -> None:
    monkeypatch.setattr(Watchdog, "_explain_hang", lambda self: 1 / 0)
    _, said = watch(dist.HashStore(), 1)
    assert "no progress for 0.003 minutes: training, step 5 (ZeroDivisionError" in wait_for(said)


def test_a_suspended_timeout_ends_when_rank_0_is_gone(peers: list[Peer]) -> None:
    """Others wait for it as long as it prepares data, and is heard of."""
    store = dist.HashStore()
    peers.append(Peer(store, 0, activity="data preparation", place="encode, data/tokenizer.py:7"))
    said: list[str] = []
    dog = Watchdog(store, rank=1, world_size=2, startup_minutes=0.003, minutes=0.003, on_hang=said.append)
    with dog.suspend_timeout("data preparation"):
        time.sleep(0.6)
        assert said == []
        peers[0].silence()
        text = wait_for(said)
    assert (
        "nothing heard of rank 0 for 0.003 minutes (--distributed-startup-timeout-minutes): "
        "data preparation; lost rank 0 on node7" in text
    )


def test_a_rank_that_hangs_behind_rank_0s_preparation_names_itself(peers: list[Peer], monkeypatch) -> None:
    """Rank 0 waits for it, so it must not count as one that waits for rank 0."""
    store = dist.HashStore()
    peers.append(Peer(store, 0, activity="data preparation", place="all_gather_object", waits=True))
    said: list[str] = []
    dog = Watchdog(store, rank=1, world_size=2, startup_minutes=0.003, minutes=0.003, on_hang=said.append)
    monkeypatch.setattr(distributed, "broadcast_object", lambda value: value)

    def wait_for_rank_zero(build, has_time_limit) -> None:
        assert not has_time_limit
        time.sleep(0.6)  # longer than the limit
        assert said == []

    monkeypatch.setattr(distributed, "run_on_rank_zero", wait_for_rank_zero)
    text = distributed.run_on_rank_zero_first(lambda: wait_for(said), waiting=dog.suspend_timeout("data preparation"))
    assert "no progress for 0.003 minutes (--distributed-startup-timeout-minutes): data preparation, step 0" in text
    assert text.endswith("this rank does not wait for another")


def test_heartbeats_and_a_suspended_timeout_keep_it_quiet() -> None:
    dog, said = watch(dist.HashStore(), 1)
    for _ in dog.with_heartbeats(range(40), "validation"):
        time.sleep(0.01)
    with dog.suspend_timeout("data preparation"):
        time.sleep(0.4)
    dog.stop()
    assert said == [] and dog.activity == "data preparation"


def test_no_loss_where_all_are_heard_of(peers: list[Peer]) -> None:
    store = dist.HashStore()
    peers.append(Peer(store, 1))
    dog, _ = watch(store, 2, minutes=0.01)
    assert dog.find_lost_ranks() == ""
    peers[0].silence()
    assert "lost rank 1 on node7" in dog.find_lost_ranks()
    dog.stop()


def test_every_lost_node_is_named_where_many_ranks_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve ranks of one node, then one of another: both nodes are blamed."""
    dog, _ = watch(dist.HashStore(), 20)
    heartbeat = {"count": 1, "step": 3, "place": "a place"}
    hosts = ["node1"] + 12 * ["node2"] + ["node3"] + 6 * ["node1"]
    first = [heartbeat | {"host": host} for host in hosts]
    second = [beat | {"count": 1 + (beat["host"] == "node1")} for beat in first]
    answers = iter([first, second])
    monkeypatch.setattr(dog, "_read_heartbeats", lambda: next(answers))
    assert find_lost_hosts(dog.find_lost_ranks()) == ["node2", "node3"]
    dog.stop()


def test_places_in_words() -> None:
    place, waits = describe_frame(sys._getframe())
    assert place.startswith("test_places_in_words, tests/unit/test_watchdog.py:") and not waits
    assert describe_frame(None) == ("Python's start", False)
