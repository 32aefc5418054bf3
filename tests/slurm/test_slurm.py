"""launch/slurm.sbatch under a real SLURM, on gloo: `make test-slurm`.

munged, slurmctld and slurmd run as this user out of a temporary folder, on ports of their own, and are ended by their
process ids.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch import ROOT, SMALL, environment, read_metrics, train, write_corpus

pytestmark = pytest.mark.machine

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "srun")
RANKS = 2
STEPS = 1500  # more than the shortest time limit that SLURM knows lets through, on a fast machine too

CONFIG = """
ClusterName=pentagrid
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=20
MailProg=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
NodeName=pg1 NodeAddr=127.0.0.1 Port={ports[2]} State=UNKNOWN
NodeName=pg2 NodeAddr=127.0.0.1 Port={ports[3]} State=UNKNOWN
NodeName=pg3 NodeAddr=127.0.0.1 Port={ports[4]} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
PartitionName=several Nodes=pg[1-3] MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def eventually(what: Callable[[], bool], *, seconds: float, told: Callable[[], str]) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, told()
        time.sleep(0.5)


@dataclass
class Slurm:
    """A cluster of this machine alone."""

    folder: Path
    environment: dict[str, str]

    def call(self, *command: str) -> str:
        result = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 0, f"{' '.join(command)}: {result.stdout}{result.stderr}"
        return result.stdout

    def submit(self, *command: str) -> str:
        """The number of the job."""
        output = f"--output={self.folder}/%x-%j.out"
        return self.call("sbatch", "--parsable", output, *command).strip()

    def job(self, number: str) -> dict[str, str]:
        shown = self.call("scontrol", "show", "job", "--oneliner", number)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def output(self, number: str, name: str = "pentagrid") -> str:
        path = self.folder / f"{name}-{number}.out"
        return path.read_text() if path.exists() else "no output yet"

    def told(self, number: str) -> Callable[[], str]:
        return lambda: (
            f"{self.job(number)}\n{self.output(number)}\n{(self.folder / 'slurmctld.log').read_text()[-3000:]}"
        )

    def wait_for(self, number: str, state: str, *, seconds: float) -> dict[str, str]:
        eventually(lambda: self.job(number)["JobState"] == state, seconds=seconds, told=self.told(number))
        return self.job(number)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    missing = [name for name in NEEDED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    folder.chmod(0o711)  # munged wants its socket reachable, and nobody else to be able to write beside it
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    ports = free_ports(5)
    host = socket.gethostname().split(".")[0]
    text = CONFIG.format(host=host, user=getpass.getuser(), ports=ports, folder=folder, cpus=os.cpu_count())
    (folder / "slurm.conf").write_text(text)
    clean = {k: v for k, v in environment().items() if not k.startswith(("SLURM_", "SBATCH_", "PENTAGRID_"))}
    clean |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{clean['PATH']}:/usr/sbin"}
    clean |= {"PENTAGRID_BIN": str(Path(sys.executable).parent), "PENTAGRID_RANKS": str(RANKS)}
    slurm = Slurm(folder, clean)
    commands = {
        "munged": [
            "munged",
            "--foreground",
            "--force",
            *(f"--{what}-file={folder}/munge.{what}" for what in ("key", "log", "pid", "seed")),
        ],
        "slurmctld": ["slurmctld", "-D", "-c", "-f", f"{folder}/slurm.conf"],
        "slurmd": ["slurmd", "-D", "-N", host, "-f", f"{folder}/slurm.conf"],
    }
    commands["munged"].append(f"--socket={folder}/munge.socket")
    daemons: list[subprocess.Popen] = []

    def logs() -> str:
        return "\n".join(f"--- {name}\n{(folder / f'{name}.log').read_text()[-2000:]}" for name in commands)

    def answers(*command: str, words: str = "") -> bool:
        result = subprocess.run(command, env=clean, capture_output=True, text=True, check=False, timeout=60)
        return result.returncode == 0 and words in result.stdout

    try:
        for name, command in commands.items():
            with (folder / f"{name}.log").open("w") as log:
                daemons.append(subprocess.Popen(command, env=clean, stdout=log, stderr=subprocess.STDOUT))
            if name == "munged":
                eventually(lambda: (folder / "munge.socket").exists(), seconds=20, told=logs)
        eventually(lambda: answers("sinfo", "--noheader", "--format=%T", words="idle"), seconds=60, told=logs)
        yield slurm
        left = [pid for pid in processes_under(folder) if pid not in {daemon.pid for daemon in daemons}]
        assert not left, [(pid, command_of(pid)) for pid in left]
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def processes_under(folder: Path) -> list[int]:
    """Processes whose command line names something in the folder."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if str(folder) in command_of(pid)]


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]


def steps_of(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def flags(slurm: Slurm, *, steps: int) -> list[str]:
    corpus = write_corpus(slurm.folder)
    cache = ["--data-cache-path", str(slurm.folder / "cache")]
    return [
        *SMALL,
        "--cp-size",
        str(RANKS),
        "--data-path",
        str(corpus),
        *cache,
        "--train-iters",
        str(steps),
        "--log-interval",
        "1",
    ]


def test_a_job_outlives_its_time_limit(slurm: Slurm) -> None:
    """The limit's signal, then one by hand: queued again each time, in the end the losses of a run that nobody
    disturbed.
    """
    run_dir = slurm.folder / "disturbed"
    given = flags(slurm, steps=STEPS)
    job = slurm.submit("--time=1", "--signal=B:USR1@20", "launch/slurm.sbatch", *given, "--run-dir", str(run_dir))
    eventually(lambda: slurm.job(job)["Restarts"] == "1", seconds=150, told=slurm.told(job))
    first = slurm.output(job)
    saved = re.search(r"saved step (\d+) \(the stop file\); queued again", first)
    assert saved and 0 < int(saved[1]) < STEPS, first
    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=30")

    slurm.wait_for(job, "RUNNING", seconds=240)
    eventually(lambda: steps_of(run_dir) >= int(saved[1]) + 3, seconds=120, told=slurm.told(job))
    slurm.call("scancel", "--signal=USR1", "--batch", job)
    eventually(lambda: slurm.job(job)["Restarts"] == "2", seconds=60, told=slurm.told(job))

    ended = slurm.wait_for(job, "COMPLETED", seconds=600)
    out = slurm.output(job)
    assert ended["ExitCode"] == "0:0" and f"slurm.sbatch: done at step {STEPS}" in out, out
    saves = [int(step) for step in re.findall(r"saved step (\d+) \(the stop file\); queued again", out)]
    assert len(saves) == 2 and saves[0] < saves[1] < STEPS
    assert [f"restart {n}," in out for n in range(4)] == [True, True, True, False]
    for save in saves:
        assert f"step_{save:07d}" in out.partition(f"saved step {save}")[2], (
            "the next start does not name the checkpoint"
        )
    assert len(list((run_dir / "logs").glob(f"{job}.*/node0/*/attempt_0/*/stdout.log"))) == 3 * RANKS
    undisturbed = slurm.submit("launch/slurm.sbatch", *given, "--run-dir", str(slurm.folder / "undisturbed"))
    assert slurm.wait_for(undisturbed, "COMPLETED", seconds=900)["Restarts"] == "0"
    assert losses(run_dir) == losses(slurm.folder / "undisturbed") and len(losses(run_dir)) == STEPS
    print(out)


@pytest.fixture(scope="module")
def nodes(slurm: Slurm) -> Iterator[Slurm]:
    """Three nodes on this machine, each with a host name of its own."""
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("needs root and unshare")
    names = ("pg1", "pg2", "pg3")
    hosts = slurm.folder / "hosts"
    hosts.write_text("".join(f"127.0.0.1 {name}\n" for name in ("localhost", socket.gethostname(), *names)))
    daemons = []
    try:
        for name in names:
            daemon = f"exec slurmd -D -N {name} -f {slurm.folder}/slurm.conf"
            own = f"hostname {name}; mount --bind {hosts} /etc/hosts; {daemon}"
            with (slurm.folder / f"{name}.log").open("w") as log:
                command = ["unshare", "--uts", "--mount", "sh", "-c", own]
                daemons.append(subprocess.Popen(command, env=slurm.environment, stdout=log, stderr=subprocess.STDOUT))
        states = ["sinfo", "--noheader", "--Node", "--partition=several", "--format=%T"]
        eventually(
            lambda: slurm.call(*states).split() == ["idle"] * 3, seconds=60, told=lambda: slurm.call("sinfo", "-R")
        )
        yield slurm
    finally:
        for daemon in daemons:
            daemon.terminate()
            daemon.wait(timeout=30)


def environment_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    except OSError:
        return []


def kill_a_rank(run_dir: Path, node: str = "") -> None:
    """Args: node: one on this node; empty: any."""
    ranks = [pid for pid in processes_under(run_dir) if " -u train.py " in command_of(pid)]
    os.kill([pid for pid in ranks if not node or f"SLURMD_NODENAME={node}" in environment_of(pid)][-1], signal.SIGKILL)


def last_step(run_dir: Path) -> int:
    return max((step for step, _ in losses(run_dir)), default=0) if (run_dir / "metrics.jsonl").exists() else 0


def is_running(run_dir: Path) -> bool:
    """Whether this start has begun to train: what the last one left says that it failed."""
    file = run_dir / "status.json"
    return file.exists() and json.loads(file.read_text())["status"] == "running"


def test_a_job_that_loses_a_rank_starts_again_while_it_gets_on(slurm: Slurm) -> None:
    """Killed after a checkpoint: queued again, and the losses of a run that nobody disturbed. Killed before one, and
    then while the ranks start: the job ends.
    """
    run_dir = slurm.folder / "killed"
    given = flags(slurm, steps=300)
    job = slurm.submit("--time=10", "launch/slurm.sbatch", *given, "--run-dir", str(run_dir), "--save-interval", "20")
    eventually(lambda: steps_of(run_dir) >= 30, seconds=120, told=slurm.told(job))
    kill_a_rank(run_dir)
    ended = slurm.wait_for(job, "COMPLETED", seconds=400)
    out = slurm.output(job)
    assert ended["Restarts"] == "1" and re.search(r"slurm\.sbatch: (failed at|killed after) .*; queued again", out), out
    alone = train(RANKS, slurm.folder / "undisturbed 300", *given)
    assert losses(run_dir) == [(line["step"], line["loss"]) for line in alone if "loss" in line]

    early = slurm.folder / "killed early"
    never = flags(slurm, steps=100_000)
    limit = "--export=ALL,PENTAGRID_MAX_RESTARTS=1"
    job = slurm.submit("--time=10", limit, "launch/slurm.sbatch", *never, "--run-dir", str(early))
    for restart in ("0", "1"):
        eventually(lambda r=restart: slurm.job(job)["Restarts"] == r, seconds=120, told=slurm.told(job))
        slurm.wait_for(job, "RUNNING", seconds=240)
        if restart == "0":
            eventually(lambda: is_running(early) and last_step(early) >= 3, seconds=120, told=slurm.told(job))
        eventually(
            lambda: [p for p in processes_under(early) if " -u train.py " in command_of(p)], seconds=60, told=str
        )
        kill_a_rank(early)
    ended = slurm.wait_for(job, "FAILED", seconds=120)
    out = slurm.output(job)
    assert ended["Restarts"] == "1" and "2 starts in a row without a new checkpoint" in out, out
    print(out)


def on_several(slurm: Slurm, count: int, name: str, *variables: str) -> tuple[str, Path]:
    """A job of one rank a node, two of which train."""
    run_dir = slurm.folder / name
    options = ["--partition=several", f"--nodes={count}", "--exclusive", "--time=20"]
    options.append("--export=" + ",".join(["ALL", "PENTAGRID_RANKS=1", *variables]))
    given = [*flags(slurm, steps=160), "--save-interval", "10", "--run-dir", str(run_dir)]
    return slurm.submit(*options, "launch/slurm.sbatch", *given), run_dir


def test_the_node_of_a_lost_rank_is_excluded_and_progress_has_no_limit(nodes: Slurm) -> None:
    """Two losses with checkpoints between them, though PENTAGRID_MAX_RESTARTS is 0."""
    job, run_dir = on_several(nodes, 2, "excluded", "PENTAGRID_MAX_RESTARTS=0")
    for number, (node, excluded) in enumerate([("pg2", "pg2"), ("pg3", "pg3")]):
        step = last_step(run_dir)
        eventually(lambda s=step: last_step(run_dir) >= s + 25, seconds=240, told=nodes.told(job))
        kill_a_rank(run_dir, node)
        eventually(lambda n=number: nodes.job(job)["Restarts"] == str(n + 1), seconds=120, told=nodes.told(job))
        # Without pg2 and pg3 one node would be left: the node of the latest loss is excluded alone.
        eventually(lambda e=excluded: nodes.job(job)["ExcNodeList"] == e, seconds=30, told=nodes.told(job))
        nodes.wait_for(job, "RUNNING", seconds=240)
    ended = nodes.wait_for(job, "COMPLETED", seconds=400)
    out = nodes.output(job)
    assert ended["Restarts"] == "2" and ended["NodeList"] == "pg[1-2]", ended
    assert "lost rank 1 on pg2" in out and "slurm.sbatch: excluded nodes: pg3" in out, out
    alone = train(2, nodes.folder / "undisturbed 160", *flags(nodes, steps=160))
    assert losses(run_dir) == [(line["step"], line["loss"]) for line in alone if "loss" in line]
    print(out)


def test_a_spare_node_takes_over_within_the_job(nodes: Slurm) -> None:
    job, run_dir = on_several(nodes, 3, "spare", "PENTAGRID_SPARE_NODES=1")
    eventually(lambda: last_step(run_dir) >= 25, seconds=240, told=nodes.told(job))
    kill_a_rank(run_dir, "pg2")  # not the first node: the store, which tells who is lost, would end with it
    ended = nodes.wait_for(job, "COMPLETED", seconds=400)
    out = nodes.output(job)
    assert ended["Restarts"] == "0" and "starts again without pg2" in out, out
    assert "on pg1 pg3, 1 ranks a node, rendezvous at pg1:" in out
    print(out)


def test_a_wrong_flag_fails_the_job_once(slurm: Slurm) -> None:
    run_dir = slurm.folder / "wrong"
    job = slurm.submit(
        "--time=5", "launch/slurm.sbatch", *flags(slurm, steps=10), "--run-dir", str(run_dir), "--hidden-size", "30"
    )
    ended = slurm.wait_for(job, "FAILED", seconds=90)
    out = slurm.output(job)
    assert ended["Restarts"] == "0" and re.search(r"train\.py: --hidden-size 30", out), out
    assert "slurm.sbatch: train.py ended before it began to train" in out
    print(out)


def test_a_failure_while_training_gives_its_reason(slurm: Slurm) -> None:
    run_dir = slurm.folder / "diverged"
    job = slurm.submit(
        "--time=5", "launch/slurm.sbatch", *flags(slurm, steps=50), "--run-dir", str(run_dir), "--lr", "1e30"
    )
    ended = slurm.wait_for(job, "FAILED", seconds=90)
    out = slurm.output(job)
    assert ended["Restarts"] == "0" and re.search(r"slurm\.sbatch: failed at step \d+: .*(nan|inf)", out), out
    print(out)


def test_an_array_is_a_run_a_seed(slurm: Slurm) -> None:
    run_dir = slurm.folder / "seeds"
    given = flags(slurm, steps=10)
    job = slurm.submit("--time=5", "--array=1-2", "launch/slurm.sbatch", *given, "--run-dir", str(run_dir))
    for task in (1, 2):
        slurm.wait_for(f"{job}_{task}", "COMPLETED", seconds=180)
    one, two = losses(run_dir / "seed-1"), losses(run_dir / "seed-2")
    assert len(one) == len(two) == 10 and one != two
    alone = train(RANKS, slurm.folder / "alone", *given, "--seed", "2")
    assert two == [(line["step"], line["loss"]) for line in alone if "loss" in line]


def test_a_cancelled_job_saves_and_stays_away(slurm: Slurm) -> None:
    run_dir = slurm.folder / "cancelled"
    job = slurm.submit("--time=5", "launch/slurm.sbatch", *flags(slurm, steps=100_000), "--run-dir", str(run_dir))
    eventually(lambda: steps_of(run_dir) >= 3, seconds=90, told=slurm.told(job))
    slurm.call("scancel", job)
    ended = slurm.wait_for(job, "CANCELLED", seconds=60)
    eventually(
        lambda: not [pid for pid in processes_under(run_dir) if pid != os.getpid()], seconds=60, told=slurm.told(job)
    )
    out = slurm.output(job)
    assert ended["Restarts"] == "0" and list((run_dir / "checkpoints").glob("step_*")), out
    print(out)
