"""Break runs in every way we know, and see that nothing is lost: `make test-faults`.

    python -m tests.faults.campaign [--only WORD] [--seed N] [--json FILE]

Each case disturbs a run of two ranks. Either the run, or the same command given again, ends with the losses and
gradient norms of the undisturbed run of the same layout, bit for bit; or the error must name the cause, and then the
same command without the fault ends so. After each: every checkpoint that was announced is whole, unless the case
damaged it, and no process of the run is left. A line a case.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.launch import ROOT, environment, read_metrics, write_corpus
from tools.checkpoint import main as checkpoint_tool

STEPS = 40
PATIENCE = 120.0  # seconds for anything that must happen
FLAGS = shlex.split(f"""
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --seq-length 256 --global-batch-size 4
    --train-iters {STEPS} --lr-warmup-iters 2 --lr 0.01 --tokenizer-type byte --document-alignment 8 --log-interval 1
    --eval-interval 20 --eval-iters 2 --save-interval 5 --sample-tokens 0 --tensorboard-dir none
    --make-vocab-size-divisible-by 16
    --device cpu --resume
""")
LAYOUTS = {
    "cp 2": ["--cp-size", "2"],
    "dp_shard 2": [],
    "dp_replicate 2": ["--dp-replicate-size", "2"],
    "tp 2": ["--tp-size", "2"],
    "pp 2": ["--pp-size", "2"],
}
FAIL_FAST = ["--distributed-timeout-minutes", "0.15"]


class Faulty(AssertionError):
    """What a case found wrong."""


def check(condition: object, words: str) -> None:
    if not condition:
        raise Faulty(words)


class Run:
    """One `torchrun`, whose output is read as it comes."""

    def __init__(self, flags: list[str], *, faults: list[str] | None = None, restarts: int = 0) -> None:
        self.mark = f"{os.getpid()}-{random.getrandbits(48):x}"
        script = ["tests/faults/injected.py", *faults, "--"] if faults else ["train.py"]
        torchrun = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "--max-restarts",
            str(restarts),
        ]
        self.process = subprocess.Popen(
            [sys.executable, *torchrun, *script, *flags],
            cwd=ROOT,
            env=environment() | {"FAULTS_RUN": self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_for(self, what: Callable[[], object], words: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not what():
            check(time.monotonic() < deadline, f"waited in vain for {words}")
            check(self.process.poll() is None, f"ended while waiting for {words}:\n{self.output[-3000:]}")
            time.sleep(0.01)

    def wait_for_line(self, pattern: str) -> None:
        self.wait_for(lambda: re.search(pattern, self.output), pattern)

    def wait_for_step(self, step: int) -> None:
        self.wait_for_line(rf"step +{step}/{STEPS} ")

    def all_pids(self) -> list[int]:
        """Every process of the run, wherever it hangs in the tree."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal() and int(folder.name) != os.getpid():
                try:
                    alive = (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
                    marked = f"FAULTS_RUN={self.mark}".encode() in (folder / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if alive and marked:
                    found.append(int(folder.name))
        return found

    def rank_pid(self, rank: int) -> int:
        """Torchrun's own child: data workers have the same environment."""
        for pid in self.all_pids():
            try:
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if parent == self.process.pid and f"RANK={rank}".encode() in words:
                return pid
        raise Faulty(f"no process of rank {rank}")

    def signal_rank(self, rank: int, number: int) -> None:
        os.kill(self.rank_pid(rank), number)

    def end(self) -> int:
        """Its exit code, when none of its processes is left."""
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise Faulty(f"did not end:\n{self.output[-3000:]}") from None
        deadline = time.monotonic() + 20
        while self.all_pids():
            check(time.monotonic() < deadline, f"processes left: {self.all_pids()}")
            time.sleep(0.1)
        self.reader.join(10)
        return code

    def kill(self) -> None:
        for pid in self.all_pids():
            os.kill(pid, signal.SIGCONT)
            os.kill(pid, signal.SIGKILL)


@dataclass
class Bench:
    """What a case works with.

    Attributes:
        folder: its own.
        flags: of its run, the run directory included.
        undisturbed: (loss, gradient norm) by step, and validation losses.
    """

    folder: Path
    flags: list[str]
    undisturbed: dict
    random: random.Random
    data: Path
    runs: list[Run] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def saved(self) -> list[Path]:
        return sorted(p for p in (self.run_dir / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", p.name))

    def start(self, *more: str, faults: list[str] | None = None, restarts: int = 0) -> Run:
        flags = list(self.flags)
        if "--data-path" in more:
            del flags[(at := flags.index("--data-path")) : at + 2]
        run = Run([*flags, *more], faults=faults, restarts=restarts)
        self.runs.append(run)
        return run

    def status(self) -> dict:
        return json.loads((self.run_dir / "status.json").read_text())

    def expect_status(self, status: str, words: str = "") -> None:
        told = self.status()
        check(
            told["status"] == status and words in told["reason"], f"status.json says {told}, wanted {status} {words!r}"
        )

    def failed(self, run: Run, *words: str) -> None:
        """It ended with an error that says each of the words."""
        code = run.end()
        check(code != 0, f"exit code 0:\n{run.output[-2000:]}")
        said = [line for line in run.lines if line.startswith("train.py:")] or [run.output[-3000:]]
        for word in words:
            check(any(word in line for line in said), f"nothing says {word!r}:\n{''.join(said)}")

    def finish(self, *more: str) -> Run:
        """The same command again goes to the end."""
        run = self.start(*more)
        check(run.end() == 0, f"the same command failed:\n{run.output[-3000:]}")
        return run

    def expect_the_same(self) -> None:
        self.expect_status("done")
        got = numbers_of(self.run_dir)
        check(got == self.undisturbed, f"not the undisturbed run's numbers: {differing(got, self.undisturbed)}")

    def check_saved(self, damaged: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        """What was announced is there and whole, unless the case did something to it."""
        announced = {m for run in self.runs for m in re.findall(r"saved \S*(step_\d+)", run.output)}
        for name in sorted(announced - damaged):
            place = self.run_dir / "checkpoints" / name
            check(place.is_dir(), f"{name} was announced and is gone")
            with redirect_stdout(io.StringIO()):
                check(checkpoint_tool(["verify", str(place)]) == 0, f"{name} is not whole")


def numbers_of(run_dir: Path) -> dict:
    records = read_metrics(run_dir / "metrics.jsonl")
    steps = {r["step"]: (r["loss"], r["grad_norm"]) for r in records if "loss" in r}
    return {"steps": steps, "validation": {r["step"]: r["validation_loss"] for r in records if "validation_loss" in r}}


def differing(got: dict, wanted: dict) -> str:
    for kind in ("steps", "validation"):
        for step in sorted(set(got[kind]) | set(wanted[kind])):
            if got[kind].get(step) != wanted[kind].get(step):
                return f"{kind} {step}: {got[kind].get(step)}, undisturbed {wanted[kind].get(step)}"
    return "nothing"


# ---------------------------------------------------------------------------------------------------
# Cases: (name, layout, what is done). Each ends with the undisturbed run's numbers.

Case = tuple[str, str, Callable[[Bench], None]]
CASES: list[Case] = []


def case(name: str, layout: str = "cp 2") -> Callable[[Callable[[Bench], None]], Callable[[Bench], None]]:
    def add(work: Callable[[Bench], None]) -> Callable[[Bench], None]:
        CASES.append((name, layout, work))
        return work

    return add


def _killed_rank(bench: Bench) -> None:
    """torchrun itself starts the ranks anew."""
    run = bench.start(restarts=3)
    run.wait_for_step(1)
    time.sleep(bench.random.uniform(0.0, 3.0))
    rank = bench.random.randrange(2)
    run.signal_rank(rank, signal.SIGKILL)
    check(run.end() == 0, f"did not come back:\n{run.output[-3000:]}")


for _layout in LAYOUTS:
    CASES.append(("kill -9 of a random rank at a random moment, --max-restarts", _layout, _killed_rank))


@case("kill -9 of both ranks, twice")
def _(bench: Bench) -> None:
    run = bench.start(restarts=3)
    for step in (8, 22):
        run.wait_for_step(step)
        first = run.rank_pid(0)
        run.signal_rank(1, signal.SIGKILL)
        os.kill(first, signal.SIGKILL)
        time.sleep(0.2)
    check(run.end() == 0, f"did not come back:\n{run.output[-3000:]}")


def _killed_in_save(bench: Bench) -> None:
    more = ["--async-save"] if bench.random.random() < 0.5 else []
    run = bench.start(*more, faults=["slow-save:0.3"])
    run.wait_for(lambda: list((bench.run_dir / "checkpoints").glob(".step_*10.part")), "a save")
    time.sleep(bench.random.uniform(0.0, 0.5))
    for rank in (0, 1):
        run.signal_rank(rank, signal.SIGKILL)
    check(run.end() != 0, "exit code 0")
    bench.finish(*more)


for _layout in ("dp_shard 2", "cp 2", "pp 2"):
    CASES.append(("kill -9 of both ranks during a save", _layout, _killed_in_save))


def _local_copies(bench: Bench) -> list[str]:
    return ["--save-interval", "1000", "--local-save-interval", "4", "--local-save-dir", str(bench.folder / "local")]


def _expect_local_start(bench: Bench, run: Run, *words: str) -> None:
    check(run.end() == 0, f"did not come back:\n{run.output[-3000:]}")
    start = re.search(rf"start +step (16|20), from {bench.folder}/local/", run.output)
    check(start, f"not resumed from a copy:\n{run.output[-3000:]}")
    for word in words:
        check(word in run.output, f"nothing says {word!r}:\n{run.output[-3000:]}")
    check(not list((bench.folder / "local").rglob("rank_*")), "the copies of the run that ended were not removed")


def _restored_locally(bench: Bench) -> None:
    """A rank is lost: all ranks start again, in the same torchrun, from the copies on their node."""
    run = bench.start(*_local_copies(bench), restarts=1)
    run.wait_for_step(18)
    run.signal_rank(1, signal.SIGKILL)
    _expect_local_start(bench, run)


for _layout in ("dp_shard 2", "dp_replicate 2", "pp 2"):
    CASES.append(("kill -9 of a rank between checkpoints: node-local copies", _layout, _restored_locally))


@case("a node is gone with its copies: those on the next node", "dp_shard 2")
def _(bench: Bench) -> None:
    more = [*_local_copies(bench), "--async-save"]
    run = bench.start(*more, faults=["nodes"])
    run.wait_for_step(18)
    for rank in (0, 1):
        run.signal_rank(rank, signal.SIGKILL)
    check(run.end() != 0, "exit code 0")
    shutil.rmtree(bench.folder / "local" / "node_1")
    _expect_local_start(bench, bench.start(*more, faults=["nodes"]), "rank 1: copy from rank 0's node")


@case("all nodes are gone with their copies: the checkpoint", "tp 2")
def _(bench: Bench) -> None:
    more = [*_local_copies(bench), "--save-interval", "10"]
    run = bench.start(*more)
    run.wait_for_step(18)
    for rank in (0, 1):
        run.signal_rank(rank, signal.SIGKILL)
    check(run.end() != 0, "exit code 0")
    shutil.rmtree(bench.folder / "local")
    check(re.search(r"start +step 10, from", bench.finish(*more).output), "not resumed from the checkpoint")


@case("kill -9 of torchrun: its ranks end themselves")
def _(bench: Bench) -> None:
    run = bench.start("--distributed-timeout-minutes", "0.5")
    run.wait_for_step(6)
    run.process.kill()
    run.end()
    bench.finish()


def _terminated(bench: Bench, run: Run, reason: str = "SIGTERM") -> None:
    run.process.send_signal(signal.SIGTERM)
    run.end()
    bench.expect_status("requeue", reason)
    bench.finish()


@case("SIGTERM during a save", "tp 2")
def _(bench: Bench) -> None:
    run = bench.start(faults=["slow-save:0.5"])
    run.wait_for(lambda: list((bench.run_dir / "checkpoints").glob(".step_*.part")), "a save")
    _terminated(bench, run)


@case("SIGTERM during a background save", "cp 2")
def _(bench: Bench) -> None:
    run = bench.start("--async-save", faults=["slow-save:0.5"])
    run.wait_for(lambda: list((bench.run_dir / "checkpoints").glob(".step_*.part")), "a save")
    _terminated(bench, run)


@case("SIGTERM during a validation", "dp_shard 2")
def _(bench: Bench) -> None:
    run = bench.start(faults=["slow-eval:0.5"])
    run.wait_for_line("validation begins")
    _terminated(bench, run)


@case("SIGTERM during warm-up", "pp 2")
def _(bench: Bench) -> None:
    run = bench.start()
    run.wait_for_step(1)
    _terminated(bench, run)


@case("SIGTERM before the first step")
def _(bench: Bench) -> None:
    run = bench.start()
    run.wait_for_line("metrics  ")
    _terminated(bench, run)


@case("SIGTERM to every process of the job, data workers too", "dp_shard 2")
def _(bench: Bench) -> None:
    run = bench.start("--num-workers", "1")
    run.wait_for_step(7)
    for pid in run.all_pids():
        os.kill(pid, signal.SIGTERM)
    run.end()
    bench.expect_status("requeue", "SIGTERM")
    bench.finish()


@case("Ctrl-C: SIGINT to every process of the terminal")
def _(bench: Bench) -> None:
    run = bench.start("--num-workers", "1")
    run.wait_for_step(9)
    os.killpg(run.process.pid, signal.SIGINT)
    run.end()
    bench.expect_status("requeue", "Ctrl-C")
    bench.finish()


@case("SIGUSR1 to one rank", "dp_replicate 2")
def _(bench: Bench) -> None:
    run = bench.start()
    run.wait_for_step(11)
    run.signal_rank(1, signal.SIGUSR1)
    check(run.end() == 0, "a requeue must exit 0")
    bench.expect_status("requeue", "SIGUSR1")
    bench.finish()


@case("the stop file", "pp 2")
def _(bench: Bench) -> None:
    run = bench.start()
    run.wait_for_step(13)
    (bench.run_dir / "stop").touch()
    check(run.end() == 0, "a requeue must exit 0")
    bench.expect_status("requeue", "the stop file")
    bench.finish()


@case("--exit-interval, again and again", "tp 2")
def _(bench: Bench) -> None:
    for _ in range(2):
        check(bench.start("--exit-interval", "16").end() == 0, "a requeue must exit 0")
        bench.expect_status("requeue", "--exit-interval")
    bench.finish("--exit-interval", "16")


@case("--exit-duration-in-mins")
def _(bench: Bench) -> None:
    check(bench.start("--exit-duration-in-mins", "0.001").end() == 0, "a requeue must exit 0")
    bench.expect_status("requeue", "--exit-duration-in-mins")
    bench.finish()


@contextmanager
def small_disk(place: Path, size: str):
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def _full_disk(bench: Bench, more: list[str]) -> None:
    with small_disk(bench.run_dir / "checkpoints", "1200k"):
        bench.failed(bench.start(*more), "No space left on device", "checkpoints")
        bench.expect_status("failed", "No space left on device")
        check(bench.saved, "nothing was saved before the disk was full")
        bench.check_saved()
        subprocess.run(["mount", "-o", "remount,size=64m", str(bench.run_dir / "checkpoints")], check=True)
        bench.finish(*more)
        bench.check_saved()
        shutil.copytree(bench.run_dir / "checkpoints", bench.folder / "kept")
    shutil.rmtree(bench.run_dir / "checkpoints")
    (bench.folder / "kept").rename(bench.run_dir / "checkpoints")


@case("the disk is full during a save", "dp_shard 2")
def _(bench: Bench) -> None:
    _full_disk(bench, [])


@case("the disk is full during a background save")
def _(bench: Bench) -> None:
    _full_disk(bench, ["--async-save"])


@case("the disk becomes read-only", "cp 2")
def _(bench: Bench) -> None:
    with small_disk(bench.run_dir / "checkpoints", "64m"):
        run = bench.start()
        run.wait_for_line("saved .*step_0000005")
        subprocess.run(["mount", "-o", "remount,ro", str(bench.run_dir / "checkpoints")], check=True)
        bench.failed(run, "Read-only file system", "checkpoints")
        subprocess.run(["mount", "-o", "remount,rw", str(bench.run_dir / "checkpoints")], check=True)
        bench.finish()
        bench.check_saved()
        shutil.copytree(bench.run_dir / "checkpoints", bench.folder / "kept")
    shutil.rmtree(bench.run_dir / "checkpoints")
    (bench.folder / "kept").rename(bench.run_dir / "checkpoints")


@case("a directory that cannot be written")
def _(bench: Bench) -> None:
    bench.folder.joinpath("file").touch()
    bench.failed(bench.start("--save", str(bench.folder / "file" / "checkpoints")), "--save", "is not a folder")
    bench.finish()


def _stopped_at_15(bench: Bench) -> Path:
    bench.start("--exit-interval", "15").end()
    newest = bench.saved[-1]
    check(newest.name == "step_0000015", f"newest is {newest.name}")
    return newest


def _flip(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


def _damaged(bench: Bench, file: str, words: str) -> None:
    newest = _stopped_at_15(bench)
    path = next(iter(sorted(newest.glob(file))))
    _flip(path, bench.random.uniform(0.2, 0.8))
    bench.failed(bench.start(), words)
    check(newest.is_dir(), "the damaged checkpoint was touched")
    bench.finish("--load-fallback")


@case("a flipped byte in a checkpoint's tensors")
def _(bench: Bench) -> None:
    _damaged(bench, "*.distcp", ".distcp")


@case("a flipped byte in a checkpoint's index", "dp_shard 2")
def _(bench: Bench) -> None:
    _damaged(bench, ".metadata", ".metadata")


@case("a flipped byte in a checkpoint's checksums", "tp 2")
def _(bench: Bench) -> None:
    _damaged(bench, "checksums.json", "step_0000015")


@case("a shard of a checkpoint is missing", "pp 2")
def _(bench: Bench) -> None:
    newest = _stopped_at_15(bench)
    gone = sorted(newest.glob("*.distcp"))[-1]
    gone.unlink()
    bench.failed(bench.start(), gone.name)
    bench.finish("--load-fallback")


def _corpus(bench: Bench) -> tuple[list[str], Path]:
    """Flags that read a prepared corpus of the case's own, which must give the undisturbed run; its .bin."""
    prefix = bench.folder / "corpus"
    for path in bench.data.parent.glob("prepared*"):
        shutil.copy(path, bench.folder / path.name.replace("prepared", "corpus"))
    return ["--data-path", str(prefix)], Path(f"{prefix}.bin")


@case("a flipped byte in the data: a token outside the vocabulary")
def _(bench: Bench) -> None:
    more, path = _corpus(bench)
    good = path.read_bytes()
    tokens = np.frombuffer(good, np.uint16).copy()
    tokens[1::2] ^= 1 << 12
    path.write_bytes(tokens.tobytes())
    bench.failed(bench.start(*more), "corpus.bin: token")
    path.write_bytes(good)
    bench.finish(*more)


@case("a flipped byte in the data: another token of the vocabulary", "dp_shard 2")
def _(bench: Bench) -> None:
    more, path = _corpus(bench)
    good = path.read_bytes()
    _flip(path, bench.random.uniform(0.1, 0.9) // 2 * 2)
    bench.failed(bench.start(*more, "--check-data"), "corpus.bin", "checksum")
    path.write_bytes(good)
    bench.finish(*more, "--check-data")


@case("a data file cut short")
def _(bench: Bench) -> None:
    more, path = _corpus(bench)
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    bench.failed(bench.start(*more), "corpus")
    path.write_bytes(good)
    bench.finish(*more)


@case("a data worker is killed")
def _(bench: Bench) -> None:
    run = bench.start("--num-workers", "1")
    run.wait_for_step(6)
    ranks = {run.rank_pid(0), run.rank_pid(1), run.process.pid}
    os.kill(next(pid for pid in run.all_pids() if pid not in ranks), signal.SIGKILL)
    bench.failed(run, "a data worker died")
    bench.finish()


def _nan(bench: Bench, layout_rank: int) -> None:
    bench.failed(
        bench.start(faults=[f"nan:12:{layout_rank}"]), "step 12", f"gradients not finite on rank {layout_rank}"
    )
    bench.expect_status("failed", "step 12")
    check(max(numbers_of(bench.run_dir)["steps"]) == 11, "the steps before were not written")
    check((bench.run_dir / "nonfinite" / "step_0000012.json").exists(), "the step's record was not kept")
    bench.finish()


@case("NaN in a gradient", "dp_shard 2")
def _(bench: Bench) -> None:
    _nan(bench, 1)


@case("NaN in a gradient", "dp_replicate 2")
def _(bench: Bench) -> None:
    bench.failed(bench.start(faults=["nan:12:0"]), "step 12", "gradients not finite on rank 0")
    bench.finish()


@case("NaN in a gradient, --on-nonfinite skip", "tp 2")
def _(bench: Bench) -> None:
    """The step is passed over; the same run again from a checkpoint before it, without the fault, is the undisturbed
    one.
    """
    run = bench.start(
        "--on-nonfinite", "skip", "--train-iters", "19", "--lr-decay-iters", str(STEPS), faults=["nan:17:1"]
    )
    check(run.end() == 0 and "step 17: skipped" in run.output, f"not skipped:\n{run.output[-2000:]}")
    skipped = [r["skipped_steps"] for r in read_metrics(bench.run_dir / "metrics.jsonl") if "skipped_steps" in r]
    check(skipped == [0] * 16 + [1] * 3, f"skipped_steps {skipped}")
    shutil.rmtree(bench.run_dir / "checkpoints" / "step_0000019")
    for run in bench.runs:
        run.lines = [line for line in run.lines if "step_0000019" not in line]
    bench.finish()


@case("a flipped bit in one replica, --check-weights-interval", "dp_replicate 2")
def _(bench: Bench) -> None:
    run = bench.start("--check-weights-interval", "1", faults=["flip:12:1:2"])
    code = run.end()
    check(
        code != 0 and re.search(r"weights or moments of \S+ differ along dp_replicate: ranks \[1\]", run.output),
        run.output[-2000:],
    )
    bench.expect_status("failed", "differ along dp_replicate")
    bench.finish("--check-weights-interval", "1")


@case("a flipped bit in one tp rank's norm, --check-weights-interval", "tp 2")
def _(bench: Bench) -> None:
    run = bench.start("--check-weights-interval", "1", faults=["flip:12:0:1"])
    code = run.end()
    check(code != 0 and re.search(r"layer_norm_weight differ along tp: ranks \[\d\]", run.output), run.output[-2000:])
    bench.finish("--check-weights-interval", "1")


@case("a slow rank")
def _(bench: Bench) -> None:
    run = bench.start("--timing-log-level", "1", faults=["slow:1:0.05"])
    check(run.end() == 0, run.output[-2000:])


@case("a rank stopped for three seconds", "dp_shard 2")
def _(bench: Bench) -> None:
    run = bench.start()
    run.wait_for_step(5)
    pid = run.rank_pid(1)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(3)
    os.kill(pid, signal.SIGCONT)
    check(run.end() == 0, run.output[-2000:])


@case("a rank stopped for good", "dp_shard 2")
def _(bench: Bench) -> None:
    run = bench.start(*FAIL_FAST)
    run.wait_for_step(6)
    pid = run.rank_pid(1)
    os.kill(pid, signal.SIGSTOP)
    run.wait_for_line("train.py: rank 0: no progress")
    os.kill(pid, signal.SIGKILL)  # torchrun would, after 30 s
    bench.failed(
        run, "no progress for 0.15 minutes (--distributed-timeout-minutes)", f"lost rank 1 on {platform.node()}"
    )
    bench.expect_status("failed", "lost rank 1")
    bench.finish()


@case("a rank that hangs in its data", "pp 2")
def _(bench: Bench) -> None:
    run = bench.start(*FAIL_FAST, faults=["hang:9:1"])
    bench.failed(run, "no progress for 0.15 minutes", "step 8", "injected.py")
    bench.finish()


@case("the clock jumps by a day, to and fro")
def _(bench: Bench) -> None:
    run = bench.start("--exit-duration-in-mins", "60", faults=["clock:86400"])
    check(run.end() == 0, run.output[-2000:])


@case("the clock jumps and the run goes on", "dp_shard 2")
def _(bench: Bench) -> None:
    bench.start("--exit-interval", "18", faults=["clock:31536000"]).end()
    bench.expect_status("requeue", "--exit-interval")
    bench.finish()


# ---------------------------------------------------------------------------------------------------


def prepare_data(folder: Path) -> Path:
    """A JSONL corpus and the same prepared as `prepared.*`."""
    corpus = write_corpus(folder)
    command = [
        sys.executable,
        "-m",
        "data.prepare",
        "--input",
        str(corpus),
        "--output-prefix",
        str(folder / "prepared"),
    ]
    command += ["--tokenizer-type", "byte", "--append-eod"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    check(done.returncode == 0, done.stderr)
    return corpus


def run_case(folder: Path, one: Case, undisturbed: dict, data: Path, flags: list[str], seed: str) -> tuple[str, float]:
    """("", seconds), or what was wrong."""
    folder.mkdir()
    bench = Bench(folder, [*flags, "--run-dir", str(folder / "run")], undisturbed, random.Random(seed), data)
    start = time.monotonic()
    wrong = ""
    try:
        one[2](bench)
        bench.expect_the_same()
        damaged = (
            {"step_0000015"}
            if any(word in one[0] for word in ("flipped byte in a checkpoint", "a shard of"))
            else set()
        )
        bench.check_saved(damaged)
    except Faulty as error:
        wrong = str(error)
    except (OSError, ValueError, KeyError, subprocess.SubprocessError):
        wrong = traceback.format_exc()
    finally:
        for run in bench.runs:
            run.kill()
    return wrong, time.monotonic() - start


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name or layout holds this word")
    parser.add_argument("--seed", default="0", help="of the random ranks and moments")
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="no case is begun after so long; those left out count as failed"
    )
    parser.add_argument("--json", type=Path, help="results, one object a case")
    flags = parser.parse_args(argv)
    cases = [one for one in CASES if flags.only in f"{one[0]} | {one[1]}"]
    began = time.monotonic()
    results = []
    with tempfile.TemporaryDirectory(prefix="faults_") as place:
        root = Path(place)
        data = prepare_data(root)
        common = [*FLAGS, "--data-path", str(data), "--data-cache-path", str(root / "cache")]
        undisturbed = {}
        for layout in dict.fromkeys(one[1] for one in cases):
            run = Run([*common, *LAYOUTS[layout], "--run-dir", str(root / layout.replace(" ", "_"))])
            check(run.end() == 0, run.output)
            undisturbed[layout] = numbers_of(root / layout.replace(" ", "_"))
            check(
                sorted(undisturbed[layout]["steps"]) == list(range(1, STEPS + 1)),
                "the undisturbed run has not all steps",
            )
        print(f"{'':<4} {'case':<70} {'layout':<15} {'seconds':>8}")
        for number, one in enumerate(cases, 1):
            wrong, seconds = "not begun: the time was up (--minutes)", 0.0
            if time.monotonic() - began < 60 * flags.minutes:
                layout = one[1]
                wrong, seconds = run_case(
                    root / str(number),
                    one,
                    undisturbed[layout],
                    data,
                    [*common, *LAYOUTS[layout]],
                    f"{flags.seed} {number}",
                )
            results.append(
                {"case": one[0], "layout": one[1], "seconds": round(seconds, 1), "passed": not wrong, "wrong": wrong}
            )
            print(f"{'FAIL' if wrong else 'ok':<4} {one[0]:<70} {one[1]:<15} {seconds:>8.1f}", flush=True)
            if wrong:
                print("     " + wrong.replace("\n", "\n     "), flush=True)
    failed = sum(not r["passed"] for r in results)
    print(f"{len(results) - failed} passed, {failed} failed")
    if flags.json:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()
        seconds = time.monotonic() - began
        flags.json.write_text(
            json.dumps({"commit": commit, "seed": flags.seed, "seconds": round(seconds), "cases": results}, indent=1)
            + "\n"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
