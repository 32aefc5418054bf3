"""How a run ends: status.json, one line, and the first cause before what followed of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from data.loader import DataError
from runtime import status as status_module
from runtime.nonfinite import NonFiniteError
from runtime.status import RunStatus, StatusFile, find_lost_hosts, is_peer_failure
from utils.errors import CollectiveError, UserError
from utils.logger import guard_output, log


def status_in(folder: Path, rank: int = 1, attempt: str = "a") -> RunStatus:
    made = RunStatus(rank=rank, local_rank=rank)
    made.file, made.step = StatusFile(folder / "status.json", attempt=attempt, rank=rank), 12
    return made


def told(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def test_a_status_is_whole_or_the_one_before(tmp_path: Path) -> None:
    status = StatusFile(tmp_path / "status.json", attempt="a", rank=0)
    assert status.read() == {} and status.failure() is None
    status.write("requeue", step=7, reason="SIGTERM")
    assert (
        status.read().items()
        >= {"status": "requeue", "step": 7, "reason": "SIGTERM", "rank": 0, "attempt": "a"}.items()
    )
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (DataError("corpus.bin: token 70000"), 1, "train.py: rank 1: corpus.bin: token 70000"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_of_this_rank_is_one_line(tmp_path: Path, capsys, error: BaseException, code: int, words: str) -> None:
    with pytest.raises(SystemExit) as ended, status_in(tmp_path, rank=1 if code == 1 else 0):
        raise error
    assert ended.value.code == code
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert told(tmp_path)["status"] == "failed" and told(tmp_path)["step"] == 12


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that a rank waited: no test does. torchrun ends a rank that waits for the one that prints."""
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if seconds == status_module.SHARED_ERROR_SECONDS:
            raise SystemExit(143)

    monkeypatch.setattr(status_module.time, "sleep", sleep)
    return waited


def test_what_all_ranks_know_is_said_once(tmp_path: Path, capsys) -> None:
    for rank in (0, 1):
        with pytest.raises(SystemExit), status_in(tmp_path, rank=rank):
            raise NonFiniteError(3, float("nan"), 1.0)
    assert capsys.readouterr().err == "train.py: step 3: loss nan, gradient norm 1.0\n"


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), status_in(tmp_path):
        _ = 1 / 0
    assert told(tmp_path)["reason"] == "ZeroDivisionError: division by zero"


def test_a_refusal_says_why(tmp_path: Path, capsys, waits: list[float]) -> None:
    """torchrun ends all ranks with the first one: rank 1 waits for the rank that prints."""
    for rank in (0, 1):
        with pytest.raises(SystemExit) as ended, status_in(tmp_path, rank=rank):
            raise UserError("--lr is wrong")
        assert ended.value.code == (143 if rank else 2)
    assert told(tmp_path)["reason"] == "--lr is wrong" and capsys.readouterr().err == "train.py: --lr is wrong\n"
    assert waits == [20.0]


def test_a_rank_that_alone_refuses_says_why_after_a_wait(tmp_path: Path, capsys, monkeypatch) -> None:
    """No other rank ended the wait: the error was this rank's own."""
    monkeypatch.setattr(status_module.time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit) as ended, status_in(tmp_path, rank=1):
        raise UserError("the cache is another user's")
    assert ended.value.code == 2 and told(tmp_path)["rank"] == 1
    assert capsys.readouterr().err == "train.py: rank 1: the cache is another user's\n"


def test_an_io_error_is_one_line_and_a_collective_one_is_printed_once(tmp_path: Path, capsys) -> None:
    for rank in (0, 1):
        with pytest.raises(SystemExit) as ended, status_in(tmp_path, rank=rank, attempt=f"a{rank}"):
            raise CollectiveError("cannot write: No space left on device")
        assert ended.value.code == (143 if rank else 1)
    assert capsys.readouterr().err == "train.py: cannot write: No space left on device\n"
    with pytest.raises(SystemExit), status_in(tmp_path, rank=1, attempt="b"):
        raise OSError(28, "No space left on device", "metrics.jsonl")
    assert capsys.readouterr().err == "train.py: rank 1: [Errno 28] No space left on device: 'metrics.jsonl'\n"


def test_an_end_without_an_error_writes_nothing(tmp_path: Path) -> None:
    with status_in(tmp_path):
        pass
    assert not (tmp_path / "status.json").exists()


def test_the_first_cause_stays(tmp_path: Path, capsys, monkeypatch) -> None:
    """Rank 1 fails; rank 0 only loses it."""
    codes: list[int] = []
    monkeypatch.setattr(status_module.os, "_exit", codes.append)
    with pytest.raises(SystemExit), status_in(tmp_path, rank=1):
        raise DataError("no such token")
    with pytest.raises(RuntimeError, match="gloo"), status_in(tmp_path, rank=0):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    assert codes == [1] and told(tmp_path)["reason"] == "no such token"
    assert "stopped, because rank 1 on" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="gloo"), status_in(tmp_path, rank=0, attempt="the next one"):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    assert told(tmp_path)["reason"].startswith(
        "lost another rank"
    )  # the failure of an attempt before is not this one's


@pytest.mark.parametrize("ended", ["done", "requeue"])
def test_who_dies_after_the_end_does_not_undo_it(tmp_path: Path, ended: str) -> None:
    status_in(tmp_path).file.write(ended, step=20, reason="")  # type: ignore[union-attr]
    with pytest.raises(ZeroDivisionError), status_in(tmp_path):
        _ = 1 / 0
    assert told(tmp_path)["status"] == ended
    with pytest.raises(ZeroDivisionError), status_in(tmp_path, attempt="the next one"):
        _ = 1 / 0
    assert told(tmp_path)["status"] == "failed" and told(tmp_path)["lost"] is False


class Gone:
    """stderr and stdout whose other end went with torchrun."""

    def write(self, text: str = "") -> int:
        raise BrokenPipeError(32, "Broken pipe")

    flush = isatty = write  # type: ignore[assignment]


@pytest.mark.parametrize("status", ['{"status": 1}', "[]", "half of", ""])
def test_a_rank_that_is_stuck_ends_though_nobody_listens(tmp_path: Path, monkeypatch, status: str) -> None:
    codes: list[int] = []
    monkeypatch.setattr(status_module.os, "_exit", codes.append)
    (tmp_path / "status.json").write_text(status)
    monkeypatch.setattr(status_module.sys, "stderr", Gone())
    monkeypatch.setattr(status_module.sys, "stdout", Gone())
    status_in(tmp_path).on_hang("torchrun, process 7, is gone")
    assert (
        codes == [1] and told(tmp_path)["reason"] == "torchrun, process 7, is gone" and told(tmp_path)["lost"] is True
    )


def test_a_rank_that_is_stuck_ends_whatever_else_fails(tmp_path: Path, monkeypatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(status_module.os, "_exit", codes.append)
    made = status_in(tmp_path)
    monkeypatch.setattr(made, "_write_failure", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.on_hang("no progress")
    assert codes == [1]


def test_only_lost_peers_are_lost_peers() -> None:
    for words in (
        "[gloo/transport/tcp/pair.cc:534] Connection reset by peer [10.0.0.1]:1",
        "[gloo/transport/tcp/pair.cc:547] Read error: Connection timed out",
        "[gloo/transport/tcp/unbound_buffer.cc:81] Application timeout caused pair closure",
        "No route to host",
        "NCCL error in: x.cpp:1, remote process exited or there was a network error, NCCL version 2.29",
    ):
        assert is_peer_failure(RuntimeError(words)), words
    assert not is_peer_failure(RuntimeError("shape mismatch")) and not is_peer_failure(OSError("Broken pipe"))
    assert not is_peer_failure(
        RuntimeError("NCCL error in: x.cpp:1, unhandled cuda error (run with NCCL_DEBUG=INFO for details)")
    )


def test_a_full_disk_does_not_hide_the_error(tmp_path: Path, capsys) -> None:
    place = tmp_path / "file"
    place.touch()
    made = status_in(place)
    with pytest.raises(SystemExit), made:
        raise DataError("first")
    assert "first" in capsys.readouterr().err and os.path.isfile(place)


def test_a_run_outlives_the_reader_of_its_log(monkeypatch) -> None:
    read, write = os.pipe()
    out = os.fdopen(write, "w")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", sys.stderr)  # `guard_output` replaces both
    guard_output(ends=False)
    os.close(read)
    for _ in range(3):
        log("a line")
    assert os.readlink(f"/proc/self/fd/{out.fileno()}") == os.devnull
    out.close()


@pytest.mark.parametrize(
    ("reason", "hosts"),
    [
        (
            "no progress for 1 minutes; lost rank 3 on b.x (at step 4, in read, a.py:3), rank 9 on a (at step 4, in x)"
            ", rank 11 on a (at step 4, in x) and 3 more: dead, stopped or cut off (rank 5 on c (lost))",
            ["a", "b.x"],
        ),
        ("no progress for 1 minutes; waits for rank 1 on a (data, step 3, in read, a.py:3)", []),
        ("lost the store of the run, on the first node (no answer for 20 s: down or cut off)", []),
        ("lost another rank, which died or was cut off (rank 1 on a (x): dead, stopped or cut off)", []),
        ("lost rank 3: dead, stopped or cut off", []),
    ],
)
def test_only_the_hosts_of_lost_ranks_are_blamed(tmp_path: Path, reason: str, hosts: list[str]) -> None:
    assert find_lost_hosts(reason) == hosts
    StatusFile(tmp_path / "status.json", attempt="a", rank=0).write("failed", step=1, reason=reason, lost=True)
    assert told(tmp_path)["lost_hosts"] == hosts
    StatusFile(tmp_path / "status.json", attempt="a", rank=0).write("failed", step=1, reason=reason)
    assert told(tmp_path)["lost_hosts"] == []
