"""Faults that were reported elsewhere and found here, as commands a user types: `make test-reported`.

    python -m tests.faults.reported [--only WORD]

Each case runs commands on one or two CPU ranks and compares exit codes and outputs. Prints a line a case; exit code 1
if a case fails. The letters are those of the reports.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from tests.launch import ROOT, SMALL, environment, read_metrics, write_corpus
from utils.errors import UserError

BIN = str(Path(sys.executable).parent)
CASES: list[tuple[str, str, Callable[[Bench], None]]] = []


class Bench:
    """The folder of one case, and its commands."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder = folder
        self.flags = [*SMALL, "--data-cache-path", str(data.parent / "cache"), "--lr-warmup-iters", "0"]
        self.data = ["--data-path", str(data)]

    def call(
        self, *words: str | Path, code: int | None = 0, says: str = "", changed: dict[str, str] | None = None
    ) -> str:
        """Run a command in the repository's root. Returns its output; None: any exit code but 0."""
        done = subprocess.run(
            [str(word) for word in words],
            cwd=ROOT,
            env=environment() | {"PENTAGRID_BIN": BIN} | (changed or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=300,
            check=False,
        )
        is_expected = done.returncode != 0 if code is None else done.returncode == code
        assert is_expected and says in done.stdout, f"exit code {done.returncode}, {says!r}:\n{done.stdout[-2500:]}"
        return done.stdout

    def train(self, ranks: int, *flags: str | Path, **expected: object) -> str:
        """train.py on one rank without torchrun, or on several through launch/local.sh."""
        start = [sys.executable, "train.py"] if ranks == 1 else ["launch/local.sh", str(ranks)]
        data = [] if "--data-path" in flags else self.data
        return self.call(*start, *self.flags, *data, *flags, **expected)  # type: ignore[arg-type]


def case(letter: str, name: str) -> Callable[[Callable[[Bench], None]], Callable[[Bench], None]]:
    def add(work: Callable[[Bench], None]) -> Callable[[Bench], None]:
        CASES.append((letter, name, work))
        return work

    return add


# ---------------------------------------------------------------------------------------------------
# Schedules, data folders, output


@case("B", "wsd with an overlapping warm-up has no jump")
def _(bench: Bench) -> None:
    schedule = "--lr-decay-style wsd --lr-warmup-iters 6 --lr-wsd-decay-iters 9 --lr 1 --min-lr 0 --clip-grad 0.001"
    bench.train(1, "--run-dir", bench.folder, *schedule.split())
    rates = [record["lr"] for record in read_metrics(bench.folder / "metrics.jsonl") if "lr" in record]
    steps = [abs(b - a) for a, b in itertools.pairwise(rates)]
    assert max(steps) < 0.35 and max(rates) <= 1 and rates[-1] > 0, rates


@case("F1", "a folder's broken link is refused, its other files are listed")
def _(bench: Bench) -> None:
    texts = bench.folder / "texts"
    (texts / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("a.jsonl", ".ipynb_checkpoints/a.jsonl", "notes.png"):
        shutil.copy(bench.data[1], texts / name)
    told = bench.train(1, "--data-path", texts, "--train-iters", "1", "--run-dir", bench.folder / "run")
    assert "hidden" in told and "notes.png" in told, told
    (texts / "b.jsonl").symlink_to("nowhere")
    bench.train(1, "--data-path", texts, "--run-dir", bench.folder / "no", code=2, says="b.jsonl: a link that leads")


@case("F2", "a folder named by a number is no weight")
def _(bench: Bench) -> None:
    for year in ("2023", "2024"):
        (bench.folder / year).mkdir()
        shutil.copy(bench.data[1], bench.folder / year)
    train = [sys.executable, str(ROOT / "train.py"), *bench.flags, "--data-path", "2023", "2024"]
    command = f"cd {shlex.quote(str(bench.folder))} && {shlex.join(train)}"
    bench.call("bash", "-c", command, code=2, says="2023 is a number and a file or folder; write ./2023")


@case("F11", "an ASCII stdout ends no run and no tool")
def _(bench: Bench) -> None:
    for encoding in ("ascii", "latin-1"):
        run = bench.folder / encoding
        sample = ["--sample-tokens", "2", "--sample-prompt", "日本 →", "--train-iters", "2"]
        plain = {"PYTHONIOENCODING": encoding, "LC_ALL": "C"}
        bench.train(1, *sample, "--run-dir", run, "--save-interval", "2", changed=plain, says="done in")
        generate = ["tools/generate.py", "--load", run, "--prompt", "日本 →", "--tokens", "2"]
        bench.call(sys.executable, *generate, changed=plain)


# ---------------------------------------------------------------------------------------------------
# Resume


@case("D", "every advice to a resumed run starts")
def _(bench: Bench) -> None:
    layouts = (
        ("dp 3, global batch 4", 3, ""),
        ("cp 3", 3, "--cp-size 3"),
        ("tp 3", 3, "--tp-size 3"),
        ("pp 3, two layers", 3, "--pp-size 3"),
    )
    run = bench.folder / "run"
    bench.train(1, "--run-dir", run, "--train-iters", "1", "--save-interval", "1")
    for name, ranks, flags in layouts:
        words = [*flags.split(), "--run-dir", run, "--resume", "--train-iters", "2", "--save-interval", "0"]
        told = bench.train(ranks, *words, code=None, says=": use ")
        advised = shlex.split(
            re.split(r", (?:or )?| or ", told.rpartition(": use ")[2].splitlines()[0])[0].replace("torchrun ", "")
        )
        if "--nproc-per-node" in advised:
            at = advised.index("--nproc-per-node")
            ranks = int(advised[at + 1])
            del advised[at : at + 2]
        assert "step 1, from" in bench.train(ranks, *words, *advised), name


@case("D", "alignment 1, cp 1 -> 2")
def _(bench: Bench) -> None:
    run = bench.folder / "run"
    words = ["--document-alignment", "1", "--run-dir", run, "--save-interval", "1", "--train-iters"]
    bench.train(1, *words, "1")
    told = bench.train(2, *words, "2", "--resume", "--cp-size", "2", code=None, says="--cp-layout contiguous")
    contiguous = re.search(r"--cp-backend native --cp-comm-type all_gather --cp-layout contiguous", told)
    assert contiguous is not None
    bench.train(2, *words, "2", "--resume", "--cp-size", "2", *contiguous[0].split(), says="step 1, from")


@case("D", "changed data are named by source")
def _(bench: Bench) -> None:
    second = bench.folder / "second.jsonl"
    shutil.copy(bench.data[1], second)
    words = ["--run-dir", bench.folder / "run", "--save-interval", "1", "--train-iters"]
    bench.train(1, "--data-path", "1", bench.data[1], "1", second, *words, "1")
    told = bench.train(1, "--data-path", "1", bench.data[1], "3", second, *words, "2", "--resume", code=2)
    assert "75.0000% of samples from" in told and "second.jsonl" in told, told
    second.write_text(json.dumps({"text": "other words " * 200}) + "\n")
    told = bench.train(1, "--data-path", "1", bench.data[1], "1", second, *words, "2", "--resume", code=2)
    assert re.search(r"--data-path: the documents of \S*second.jsonl are others", told), told


@case("E", "--load into a new run can be requeued")
def _(bench: Bench) -> None:
    bench.train(1, "--run-dir", bench.folder / "old", "--train-iters", "4", "--save-interval", "4")
    given = bench.folder / "old" / "checkpoints" / "step_0000004"
    words = ["--load", given, "--run-dir", bench.folder / "new", "--save-interval", "2", "--train-iters", "9"]
    first = bench.train(1, *words, "--exit-interval", "6", says="step 4, from")
    assert "stopped after step 6" in first, first
    again = bench.train(1, *words, "--resume", says="step 6, from")
    assert "step_0000009" in again, again
    steps = [record["step"] for record in read_metrics(bench.folder / "new" / "metrics.jsonl")]
    assert steps == [5, 6, 7, 8, 9], steps


@case("E", "the same with --resume from the first start on, killed before a checkpoint")
def _(bench: Bench) -> None:
    bench.train(1, "--run-dir", bench.folder / "old", "--train-iters", "4", "--save-interval", "4")
    given = bench.folder / "old" / "checkpoints"
    words = ["--load", given, "--run-dir", bench.folder / "new", "--resume", "--log-interval", "1"]
    words = [str(w) for w in [*words, "--save-interval", "100", "--train-iters", "3000"]]
    command = [sys.executable, "train.py", *bench.flags, *bench.data, *words]
    run = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert any("step    7/" in line for line in run.stdout)
    run.kill()
    run.wait()
    bench.train(1, *words[:-1], "9", says="step 4, from")


@case("F", "--eval-only --valid-data-path compares no training data")
def _(bench: Bench) -> None:
    run = bench.folder / "run"
    bench.train(1, "--run-dir", run, "--train-iters", "2", "--save-interval", "2")
    text = bench.folder / "valid.jsonl"
    text.write_text(json.dumps({"text": "words that were never seen " * 40}) + "\n")
    flags = [
        *bench.flags,
        "--eval-interval",
        "1",
        "--eval-only",
        "--valid-data-path",
        text,
        "--load",
        run / "checkpoints",
    ]
    told = bench.call(sys.executable, "train.py", *flags, "--run-dir", bench.folder / "eval")
    assert "validation after step 2: loss" in told and "data read" not in told, told
    bench.train(1, *flags[len(bench.flags) :], "--data-path", text, "--run-dir", bench.folder / "other")


# ---------------------------------------------------------------------------------------------------
# Launch, neighbours


@case("F10", "sbatch --export=LIST: srun passes on what the script sets")
def _(bench: Bench) -> None:
    """A played srun that limits the environment as SLURM's does."""
    played = bench.folder / "bin"
    played.mkdir()
    (bench.folder / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "multi_node.sh", bench.folder / "launch")
    scripts = {
        "srun": '#!/bin/bash\nfor word in "$@"; do [ "$word" = --export=ALL ] && exec env > "$OUT"; done\n'
        'exec env -i > "$OUT"\n',
        "scontrol": "#!/bin/sh\necho node0\n",
        "torchrun": "#!/bin/sh\n",
    }
    for name, text in scripts.items():
        (played / name).write_text(text)
        (played / name).chmod(0o755)
    (played / "python").symlink_to(sys.executable)
    job = dict(SLURM_SUBMIT_DIR=str(bench.folder), SLURM_JOB_ID="7", SLURM_JOB_NAME="p", SLURM_NNODES="1")
    job |= dict(SLURM_JOB_NODELIST="node0", SLURM_EXPORT_ENV="PENTAGRID_RANKS", PENTAGRID_RANKS="1")
    job |= dict(PATH=f"{played}:{os.environ['PATH']}", PENTAGRID_BIN=str(played), OUT=str(bench.folder / "env"))
    bench.call("bash", ROOT / "launch" / "slurm.sbatch", changed=job)
    passed = (bench.folder / "env").read_text()
    assert "PENTAGRID_BIN=" in passed and "PENTAGRID_LOG_DIR=" in passed, passed


@case("S1", "the report writes through no link and reads none")
def _(bench: Bench) -> None:
    run = bench.folder / "run"
    bench.train(1, "--run-dir", run, "--train-iters", "2")
    keys, secrets = bench.folder / "authorized_keys", bench.folder / "secrets.json"
    keys.write_text("mine\n")
    (run / "report.html").symlink_to(keys)
    bench.call(sys.executable, "tools/report.py", run)
    assert keys.read_text() == "mine\n" and not (run / "report.html").is_symlink()
    secrets.write_text(json.dumps({"flags": {"lr": "a-secret-word"}}))
    (run / "config.json").unlink()
    (run / "config.json").symlink_to(secrets)
    bench.call(sys.executable, "tools/report.py", run, code=None if False else 0)
    assert "a-secret-word" not in (run / "report.html").read_text()


class _Planted:
    """Unpickling makes the file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


@case("S2", "what a local user writes into launch/local.sh's store is not unpickled by torchrun")
def _(bench: Bench) -> None:
    made = bench.folder / "made"
    command = ["launch/local.sh", "2", *bench.flags, *bench.data, "--run-dir", str(bench.folder / "run")]
    run = subprocess.Popen(
        [*command, "--train-iters", "100000"],
        cwd=ROOT,
        env=environment() | {"PENTAGRID_BIN": BIN},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert run.stdout is not None and any(line.startswith("step") for line in run.stdout)
        ports = _listening_ports(run.pid)
        assert ports, "torchrun listens on no port"
        for port in ports:
            store = dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=5), wait_for_workers=False)
            for key in store.list_keys():
                assert "torch.rendezvous" not in key, f"port {port} holds the state of a c10d rendezvous"
                if "torchelastic" in key:
                    store.set(key, base64.b64encode(pickle.dumps(_Planted(made))))
        time.sleep(8)  # torchrun reads its state every five seconds
        assert not made.exists(), "torchrun ran the code"
    finally:
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=120)


def _listening_ports(pid: int) -> set[int]:
    """TCP ports on which a process listens."""
    inodes = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in inodes:
                found.add(int(local.rpartition(":")[2], 16))
    return found


@case("S2b", "--compile loads no code from a folder with a known name")
def _(bench: Bench) -> None:
    shared = bench.folder / "tmp"
    shared.mkdir()
    flags = ["--compile", "--train-iters", "1", "--run-dir", bench.folder / "run"]
    told = bench.train(1, *flags, changed={"TMPDIR": str(shared)}, says="done in")
    own = shared / f"pentagrid-{os.getuid()}"
    assert list(own.rglob("*.so")), told
    assert not [p for p in shared.rglob("*") if p.is_file() and own not in p.parents], list(shared.rglob("*"))


@case("-", "--dry-run ends at SIGTERM")
def _(bench: Bench) -> None:
    command = [sys.executable, "train.py", "--dry-run", "--num-layers", "96", "--tokenizer-type", "byte", *bench.data]
    run = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(8)
    run.terminate()
    began = time.monotonic()
    run.communicate(timeout=60)
    assert time.monotonic() - began < 5


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose letter or name holds this word; default: all")
    only = parser.parse_args(argv).only
    folder, failed = Path(tempfile.mkdtemp(prefix="reported-")), 0
    data = write_corpus(folder)
    for number, (letter, name, work) in enumerate(CASES, 1):
        if only not in (letter, "") and only not in name:
            continue
        place = folder / str(number)
        place.mkdir()
        start, wrong = time.monotonic(), ""
        try:
            work(Bench(place, data))
        except (AssertionError, UserError, OSError, subprocess.SubprocessError):
            wrong, failed = traceback.format_exc(limit=-2), failed + 1
        print(f"{'FAILED' if wrong else 'ok':<7}{letter:<4}{name:<80}{time.monotonic() - start:7.1f} s", flush=True)
        if wrong:
            print(wrong, flush=True)
    shutil.rmtree(folder)
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
