"""launch/multi_node.sh on two "hosts", network namespaces joined by a cable that can be cut: `make test-netns`, as
root.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch import ROOT, SMALL, environment, read_metrics, train, write_corpus

pytestmark = pytest.mark.machine

ADDRESSES = ("10.231.7.1", "10.231.7.2")
PORT = 29417
TIMEOUT_MINUTES = 0.25


def ip(*args: str) -> None:
    result = subprocess.run(["ip", *args], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"ip {' '.join(args)}: {result.stderr}"


@dataclass
class Hosts:
    """Two namespaces; interface `cable` in each."""

    names: tuple[str, str]

    def start(self, node: int, log: Path, *flags: str) -> subprocess.Popen[bytes]:
        head = f"{ADDRESSES[0]}:{PORT}"
        command = ["ip", "netns", "exec", self.names[node], "launch/multi_node.sh", str(node), "2", head, "1", *flags]
        mine = {"PENTAGRID_BIN": str(Path(sys.executable).parent), "PENTAGRID_INTERFACE": "cable"}
        with log.open("ab") as out:
            return subprocess.Popen(command, cwd=ROOT, env=environment() | mine, stdout=out, stderr=subprocess.STDOUT)

    def cut(self) -> None:
        ip("-n", self.names[1], "link", "set", "cable", "down")

    def join(self) -> None:
        ip("-n", self.names[1], "link", "set", "cable", "up")

    def listening(self, node: int) -> str:
        command = ["ip", "netns", "exec", self.names[node], "ss", "-tlnpH"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def processes(self, node: int) -> list[int]:
        command = ["ip", "netns", "pids", self.names[node]]
        return [int(pid) for pid in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None:
        pytest.skip("no ip: apt-get install iproute2")
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    names = (f"pg{os.getpid()}a", f"pg{os.getpid()}b")
    made: list[str] = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
        yield Hosts(names)
    finally:
        for name in made:
            ip("netns", "delete", name)


def flags(folder: Path, steps: int) -> list[str]:
    corpus = write_corpus(folder)
    cache = ["--data-cache-path", str(folder / "cache")]
    limits = ["--distributed-timeout-minutes", str(TIMEOUT_MINUTES), "--distributed-startup-timeout-minutes", "2"]
    given = [
        "--cp-size",
        "2",
        "--data-path",
        str(corpus),
        "--train-iters",
        str(steps),
        "--save-interval",
        "20",
        "--log-interval",
        "1",
    ]
    return [*SMALL, *cache, *limits, *given, "--resume"]


def finish(started: list[subprocess.Popen[bytes]], logs: list[Path], *, seconds: float) -> list[int]:
    """Exit codes; processes that are still there then are ended, and the test fails."""
    end = time.monotonic() + seconds
    late = []
    for node, process in enumerate(started):
        try:
            process.wait(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            late.append(node)
            process.terminate()
            process.wait(timeout=60)
    assert not late, f"nodes {late} were still there after {seconds} s\n" + told(logs)
    return [process.returncode for process in started]


def told(logs: list[Path]) -> str:
    return "\n".join(f"--- {log.name}\n{log.read_text()[-6000:]}" for log in logs)


def eventually(what: Callable[[], bool], *, seconds: float, logs: list[Path]) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, told(logs)
        time.sleep(0.2)


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]


def steps_of(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_two_hosts_compute_what_one_does(hosts: Hosts, tmp_path: Path) -> None:
    given, logs = flags(tmp_path, 10), [tmp_path / "node0.log", tmp_path / "node1.log"]
    started = [hosts.start(node, logs[node], *given, "--run-dir", str(tmp_path / "two")) for node in (1, 0)][::-1]
    assert finish(started, logs, seconds=180) == [0, 0], told(logs)
    train(2, tmp_path / "one", *given)
    assert losses(tmp_path / "two") == losses(tmp_path / "one") and len(losses(tmp_path / "two")) == 10


def test_a_cut_cable_ends_both_and_the_same_command_goes_on(hosts: Hosts, tmp_path: Path) -> None:
    steps = 200
    given, logs = flags(tmp_path, steps), [tmp_path / "node0.log", tmp_path / "node1.log"]
    run_dir = tmp_path / "cut"
    started = [hosts.start(node, logs[node], *given, "--run-dir", str(run_dir)) for node in (0, 1)]
    eventually(lambda: steps_of(run_dir) >= 30, seconds=180, logs=logs)
    for node in (0, 1):
        print(f"node {node} listens on\n{hosts.listening(node)}")
    hosts.cut()
    cut_at = time.monotonic()
    codes = finish(started, logs, seconds=60 * TIMEOUT_MINUTES + 60)
    took = time.monotonic() - cut_at
    print(f"both ended {took:.0f} s after the cut, --distributed-timeout-minutes is {TIMEOUT_MINUTES}")
    assert all(codes), told(logs)
    assert [hosts.processes(node) for node in (0, 1)] == [[], []]
    first, second = (re.findall(r"train\.py: .*", log.read_text()) for log in logs)
    print("\n".join(["node 0:", *first, "node 1:", *second]))
    assert any(
        re.search(r"no progress for 0\.25 minutes .*lost rank 1 on .*: dead, stopped or cut off", line)
        for line in first
    ), told(logs)
    assert any(
        re.search(r"no progress for 0\.25 minutes .*lost the store of the run, on the first node", line)
        for line in second
    ), told(logs)
    assert '"status": "failed"' in (run_dir / "status.json").read_text()
    done = steps_of(run_dir)
    assert done < steps

    hosts.join()
    again = [tmp_path / "node0_again.log", tmp_path / "node1_again.log"]
    started = [hosts.start(node, again[node], *given, "--run-dir", str(run_dir)) for node in (0, 1)]
    assert finish(started, again, seconds=300) == [0, 0], told(again)
    assert re.search(rf"step_{20 * (done // 20):07d}|step_{20 * (done // 20 - 1):07d}", again[0].read_text()), told(
        again
    )
    train(2, tmp_path / "one", *given)
    assert losses(run_dir) == losses(tmp_path / "one") and len(losses(run_dir)) == steps
