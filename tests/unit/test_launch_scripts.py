"""What launch/ decides, with a SLURM that is played: the real one is in tests/slurm, two hosts in tests/netns."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from launch import torchrun as launcher

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch")])

SCONTROL = """#!/bin/sh
case "$1 $2 $3" in
"show hostnames node["*) seq -f node%g 0 "${PLAY_LAST_NODE:-9999}" ;;
"show hostnames "*) echo "$3" | tr , '\\n' ;;
"show job"*) echo "JobId=$4 ReqNodeList=${PLAY_REQUIRED:-(null)} ExcNodeList=${PLAY_EXCLUDED:-(null)} Features=" ;;
requeue*) echo "$2" >> "$PLAY/requeued"; exit "${PLAY_REQUEUE_CODE:-0}" ;;
update*) echo "$2 $3" >> "$PLAY/updated"; exit "${PLAY_UPDATE_CODE:-0}" ;;
esac
"""
SINFO = """#!/bin/sh
seq -f node%g 0 "${PLAY_LAST_UP:-9}"
"""

# Takes the place of torchrun and the ranks: what it was called with, then the outcome that the test wants.
SRUN = """#!/bin/bash
printf '%s\\n' "$@" > "$PLAY/srun_args"
echo "$3" >> "$PLAY/nodelists"
while [ $# -gt 0 ]; do [ "$1" = --run-dir ] && run_dir=$2; shift; done
say() {
    printf '{"status": "%s", "step": %s, "reason": "%s", "attempt": "%s", "lost": %s, "lost_hosts": [%s]}\\n' \\
        "$1" "$2" "$3" "$4" "${5:-false}" "${6:-}" > "$run_dir/status.json"
}
rm -f "$run_dir/stop"
touch "$PLAY/started"
. "$PLAY/outcome"
"""

WAIT_FOR_STOP = (
    'for i in {1..100}; do [ -e "$run_dir/stop" ] && break; sleep 0.1; done\n[ -e "$run_dir/stop" ] || exit 9\n'
)


@pytest.fixture
def play(tmp_path: Path) -> Path:
    """A folder that looks like the repository, with srun and scontrol that are played."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "multi_node.sh", tmp_path / "launch")
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sinfo", SINFO), ("torchrun", "#!/bin/sh\n")):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    return tmp_path


def submit(play: Path, outcome: str, *flags: str, **variables: str) -> subprocess.Popen[str]:
    (play / "outcome").write_text(outcome)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PENTAGRID_"))}
    slurm = dict(
        SLURM_SUBMIT_DIR=str(play),
        SLURM_JOB_ID="70012",
        SLURM_JOB_NAME="pg",
        SLURM_NNODES="2",
        SLURM_JOB_NODELIST="node[0-1]",
        SLURM_JOB_PARTITION="main",
    )
    mine = dict(
        PATH=f"{play / 'bin'}:{clean['PATH']}", PLAY=str(play), PENTAGRID_BIN=str(play / "bin"), PENTAGRID_RANKS="4"
    )
    command = ["bash", str(ROOT / "launch" / "slurm.sbatch"), *flags]
    environment = clean | slurm | mine | variables
    environment = {k: v for k, v in environment.items() if v}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(job: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = job.communicate(timeout=30)
    return job.returncode, out


def run(play: Path, outcome: str, *flags: str, **variables: str) -> tuple[int, str]:
    return finish(submit(play, outcome, *flags, **variables))


def requeued(play: Path) -> list[str]:
    return (play / "requeued").read_text().split() if (play / "requeued").exists() else []


def srun_args(play: Path) -> list[str]:
    return (play / "srun_args").read_text().splitlines()


def once_started(play: Path, job: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    while not (play / "started").exists():
        assert job.poll() is None, finish(job)
        time.sleep(0.05)
    job.send_signal(number)
    return finish(job)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    shellcheck = shutil.which("shellcheck")
    command = [shellcheck, "-x", str(script)] if shellcheck else ["bash", "-n", str(script)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_done_is_success_whatever_torchrun_exits_with(play: Path) -> None:
    code, out = run(play, "say done 10 '' a; exit 1", "--run-dir", "r")
    assert (code, requeued(play)) == (0, []) and "done at step 10" in out


def test_the_call_of_torchrun(play: Path) -> None:
    code, out = run(play, "say done 10 '' a", "--lr", "0.1", SLURM_CPUS_ON_NODE="16")
    assert code == 0, out
    args = srun_args(play)
    assert "--export=ALL" in args
    assert args[args.index("--cpus-per-task") + 1] == "16" and args[args.index("--nodes") + 1] == "2"
    assert args[args.index("node") + 1 :] == [
        "2",
        "node0:20012",
        "4",
        "--lr",
        "0.1",
        "--run-dir",
        "runs/pg-70012",
        "--resume",
    ]
    assert (play / "runs" / "pg-70012").is_dir()


def test_usr1_stops_the_run_and_queues_the_job_again(play: Path) -> None:
    code, out = once_started(
        play, submit(play, WAIT_FOR_STOP + "say requeue 4 'the stop file' a", "--run-dir", "r"), signal.SIGUSR1
    )
    assert (code, requeued(play)) == (0, ["70012"]), out
    assert "saved step 4 (the stop file); queued again" in out
    assert not (play / "r" / "stop").exists()


def test_a_stop_file_that_is_taken_for_an_old_one_comes_again(play: Path) -> None:
    outcome = WAIT_FOR_STOP + 'rm "$run_dir/stop"\n' + WAIT_FOR_STOP + "say requeue 1 'the stop file' a"
    code, out = once_started(play, submit(play, outcome, "--run-dir", "r"), signal.SIGUSR1)
    assert (code, requeued(play)) == (0, ["70012"]), out


def test_usr1_just_before_the_end_is_not_in_the_way(play: Path) -> None:
    code, out = once_started(play, submit(play, WAIT_FOR_STOP + "say done 10 '' a", "--run-dir", "r"), signal.SIGUSR1)
    assert (code, requeued(play)) == (0, []), out


def test_fruitless_starts_in_a_row_have_a_limit(play: Path) -> None:
    """Also those whose end SLURM did not wait for."""
    limit = {"PENTAGRID_MAX_RESTARTS": "2"}
    for number, attempt in enumerate("ab"):
        code, out = run(
            play, f"say running 1 '' {attempt}; exit 9", "--run-dir", "r", SLURM_RESTART_COUNT=str(number), **limit
        )
        assert (code, len(requeued(play))) == (0, number + 1), out
    code, out = run(play, "say running 1 '' c; exit 9", "--run-dir", "r", SLURM_RESTART_COUNT="2", **limit)
    assert code == 1 and len(requeued(play)) == 2, out
    assert "3 starts in a row without a new checkpoint, PENTAGRID_MAX_RESTARTS is 2; sbatch with --run-dir r" in out
    for number, attempt in enumerate("defg"):  # progress: without a limit
        newer = CONFIGURED + f'mkdir -p "$run_dir/checkpoints/step_000000{number}"\n'
        end = f"say running 1 '' {attempt}; exit 9"
        assert run(play, newer + end, "--run-dir", "r", SLURM_RESTART_COUNT="3", **limit)[0] == 0, number
    assert run(play, "say running 1 '' h; exit 9", "--run-dir", "r", SLURM_RESTART_COUNT="7", **limit)[0] == 0
    code, out = run(play, "say running 1 '' i; exit 9", "--run-dir", "r", **limit)  # a new job counts anew
    assert (code, (play / "r" / ".last_start").read_text()) == (0, "0 step_0000003\n"), out


def test_what_nothing_asked_to_stop_is_not_queued_again(play: Path) -> None:
    """A run that was resumed beyond its --train-iters would end at once, again and again."""
    code, out = run(play, "say requeue 10 '' a", "--run-dir", "r")
    assert (code, requeued(play)) == (
        1,
        [],
    ) and "ended at step 10, and status.json does not say why; not queued again" in out


def test_a_scontrol_that_refuses_is_told(play: Path) -> None:
    code, out = run(play, "say requeue 4 'the stop file' a", "--run-dir", "r", PLAY_REQUEUE_CODE="1")
    assert code == 1 and "SLURM did not queue the job again" in out


def test_failed_gives_its_reason(play: Path) -> None:
    code, out = run(play, "say failed 7 'loss nan, sorry' a; exit 1", "--run-dir", "r")
    assert (code, requeued(play)) == (1, []) and "failed at step 7: loss nan, sorry" in out


CONFIGURED = 'echo "{\\"flags\\": {\\"save\\": null}}" > "$run_dir/config.json"\n'
SAVED = CONFIGURED + 'mkdir -p "$run_dir/checkpoints/step_0000005"\n'


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("say running 5 '' a; exit 137", "killed after step 5 or later (exit code 137"),
        ("say failed 7 'lost rank 1' a true; exit 1", "failed at step 7: lost rank 1"),
    ],
)
def test_killed_or_lost_is_queued_again_while_it_gets_on(play: Path, end: str, words: str) -> None:
    code, out = run(play, SAVED + end, "--run-dir", "r")
    assert (code, requeued(play)) == (0, ["70012"]) and words in out and "; queued again" in out
    code, out = run(
        play,
        SAVED + 'mkdir -p "$run_dir/checkpoints/step_0000009.damaged"\n' + end.replace(" a", " b"),
        "--run-dir",
        "r",
        PENTAGRID_MAX_RESTARTS="0",
    )
    assert (code, requeued(play)) == (1, ["70012"]) and words in out and "1 starts in a row without" in out


LOST = "say failed 7 'lost rank 1' {attempt} true '{hosts}'; exit 1\n"


@pytest.mark.parametrize(
    ("hosts", "variables", "updated", "words"),
    [
        ('"node1.cluster"', {}, "node1", "excluded nodes: node1"),
        ('"node1"', {"PLAY_EXCLUDED": "node7"}, "node7,node1", "excluded nodes: node7,node1"),
        ('"node1"', {"PLAY_EXCLUDED": "node2", "PLAY_LAST_UP": "2"}, "node1", "excluded nodes: node1"),
        ('"node1"', {"PLAY_LAST_UP": "1"}, "", "not excluded: node1; too few other nodes are up"),
        ('"node1"', {"PLAY_REQUIRED": "node[0-1]"}, "", "not excluded: node1"),
        ('"node1"', {"PLAY_UPDATE_CODE": "1"}, "node1", "not excluded: node1"),
        ('"node0", "node1"', {}, "", "queued again"),
        ('"elsewhere"', {}, "", "queued again"),
        ("", {}, "", "queued again"),
    ],
)
def test_the_node_of_a_lost_rank_is_excluded(
    play: Path, hosts: str, variables: dict[str, str], updated: str, words: str
) -> None:
    outcome = LOST.format(attempt="a", hosts=hosts)
    code, out = run(play, outcome, "--run-dir", "r", PLAY_LAST_NODE="1", **variables)
    assert (code, requeued(play)) == (0, ["70012"]) and words in out, out
    found = (play / "updated").read_text() if (play / "updated").exists() else ""
    assert found == (f"JobId=70012 ExcNodeList={updated}\n" if updated else "")


def test_a_spare_node_takes_the_place_of_the_lost_one(play: Path) -> None:
    three = {"SLURM_NNODES": "3", "PLAY_LAST_NODE": "2", "PENTAGRID_SPARE_NODES": "1"}
    outcome = f"""if [ ! -e "$PLAY/once" ]; then touch "$PLAY/once"
        {LOST.format(attempt="a", hosts='"node0"')}
    fi
    say done 10 '' b"""
    code, out = run(play, outcome, "--run-dir", "r", **three)
    assert (code, requeued(play)) == (0, []) and "starts again without node0" in out, out
    assert (play / "nodelists").read_text().split() == ["node0,node1", "node1,node2"]
    assert "node1:20013" in srun_args(play) and srun_args(play)[srun_args(play).index("--nodes") + 1] == "2"
    (play / "once").unlink()
    second = outcome.replace("say done 10 '' b", LOST.format(attempt="b", hosts='"node1"'))
    code, out = run(play, second, "--run-dir", "r", **three)
    assert (code, requeued(play)) == (0, ["70012"]) and "excluded nodes: node0,node1" in out, out
    (play / "once").unlink()
    stopped = outcome.replace("say done 10 '' b", "say requeue 9 'the stop file' c")
    code, out = run(play, stopped, "--run-dir", "r", **three)
    assert (code, requeued(play)) == (0, ["70012"] * 2) and "saved step 9 (the stop file); queued again" in out, out


@pytest.mark.parametrize("end", ["say running 5 '' a; exit 137", "say failed 7 'lost rank 1' a true; exit 1"])
def test_killed_or_lost_after_a_term_is_not_queued_again(play: Path, end: str) -> None:
    code, out = once_started(play, submit(play, "sleep 1\n" + SAVED + end, "--run-dir", "r"), signal.SIGTERM)
    assert (code, requeued(play)) == (1, []), out


def test_the_newest_checkpoint_is_looked_for_where_the_run_saves(play: Path) -> None:
    elsewhere = 'echo "{\\"flags\\": {\\"save\\": \\"s\\"}}" > "$run_dir/config.json"\nmkdir -p s/step_0000005\n'
    code, out = run(play, elsewhere + "say running 5 '' a; exit 137", "--run-dir", "r", "--save", "s")
    assert (code, requeued(play)) == (0, ["70012"]), out


def test_the_newest_checkpoint_is_that_of_most_steps(play: Path) -> None:
    before = CONFIGURED + 'mkdir -p "$run_dir/checkpoints/step_9999999"\n'
    assert run(play, before + "say running 9999999 '' a; exit 137", "--run-dir", "r")[0] == 0
    later = before + 'mkdir "$run_dir/checkpoints/step_10000000"\n'
    code, out = run(play, later + "say running 10000000 '' b; exit 137", "--run-dir", "r")
    assert (code, requeued(play)) == (0, ["70012", "70012"]), out


def test_a_checkpoint_does_not_make_a_failure_worth_repeating(play: Path) -> None:
    code, out = run(play, SAVED + "say failed 7 'loss nan' a; exit 1", "--run-dir", "r")
    assert (code, requeued(play)) == (1, []) and "failed at step 7: loss nan" in out


def test_killed_before_its_first_checkpoint_is_queued_again(play: Path) -> None:
    code, out = run(play, "say running 5 '' a; exit 137", "--run-dir", "r")
    assert (code, requeued(play)) == (0, ["70012"]) and "killed after step 5 or later (exit code 137" in out


ARRAY = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "7"}


@pytest.mark.parametrize(
    ("preset", "flags", "variables", "words"),
    [
        ("run_dir: x\n", (), {}, "run_dir in p.yaml: this script must know it, so give --run-dir on the command line"),
        ("lr: 1\n'run-dir' : x\n", (), {}, "run_dir in p.yaml"),
        ("run_dir: x\n", ("--run-dir", "r"), {}, None),
        ("# run_dir: x\nsave: x\n", (), {}, None),
        ("save: x\n", (), ARRAY, "save in p.yaml would be one for all seeds of the array"),
        ("metrics_file: x\n", (), ARRAY, "metrics_file in p.yaml would be"),
        ("tensorboard_dir: x\n", (), ARRAY, "tensorboard_dir in p.yaml would be"),
        ("tensorboard_dir: x\nseed: 7\n", ("--tensorboard-dir", "none"), ARRAY, None),
    ],
)
def test_places_in_a_preset(
    play: Path, preset: str, flags: tuple[str, ...], variables: dict[str, str], words: str | None
) -> None:
    (play / "p.yaml").write_text(preset)
    code, out = run(play, "say done 10 '' a", "--config", "p.yaml", *flags, **variables)
    assert (code == 0) if words is None else (code == 2 and words in out), out
    assert (play / "srun_args").exists() == (words is None)


def test_an_earlier_starts_status_counts_for_nothing(play: Path) -> None:
    assert run(play, "say requeue 4 'the stop file' a", "--run-dir", "r")[0] == 0
    code, out = run(play, "exit 2", "--run-dir", "r")
    assert (code, requeued(play)) == (2, ["70012"]) and "ended before it began to train (exit code 2)" in out


def test_a_restart_that_does_not_come_to_train_is_queued_again(play: Path) -> None:
    """A node may be lost while the ranks start; the flags were those of a start that trained."""
    code, out = run(play, "exit 1", "--run-dir", "r", SLURM_RESTART_COUNT="1")
    assert (code, requeued(play)) == (1, []) and "it says why above" in out, out  # no start has trained
    assert run(play, "say running 1 '' a; exit 9", "--run-dir", "r")[0] == 0
    (play / "requeued").unlink()
    code, out = run(play, "exit 1", "--run-dir", "r", SLURM_RESTART_COUNT="1", PENTAGRID_MAX_RESTARTS="2")
    assert (code, requeued(play)) == (0, ["70012"]), out
    assert "ended before it began to train (exit code 1); queued again" in out
    code, out = run(play, "exit 1", "--run-dir", "r", SLURM_RESTART_COUNT="2", PENTAGRID_MAX_RESTARTS="2")
    assert (code, requeued(play)) == (1, ["70012"]) and "3 starts in a row without a new checkpoint" in out, out


def test_what_trains_nothing_may_succeed(play: Path) -> None:
    assert run(play, "exit 0", "--run-dir", "r", "--eval-only")[0] == 0


def test_term_leaves_the_queue_to_slurm(play: Path) -> None:
    outcome = "sleep 1; say requeue 4 SIGTERM a; exit 1"
    code, out = once_started(play, submit(play, outcome, "--run-dir", "r"), signal.SIGTERM)
    assert (code, requeued(play)) == (143, []) and "saved step 4 on SIGTERM" in out


@pytest.mark.parametrize(
    ("flags", "folder"),
    [((), "runs/pg-70000/seed-3"), (("--run-dir", "r"), "r/seed-3"), (("--run-dir=x", "--run-dir=r"), "r/seed-3")],
)
def test_an_arrays_tasks_are_seeds(play: Path, flags: tuple[str, ...], folder: str) -> None:
    code, out = run(play, "say done 10 '' a", *flags, SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_JOB_ID="70000")
    assert code == 0, out
    assert srun_args(play)[-5:] == ["--seed", "3", "--run-dir", folder, "--resume"] and (play / folder).is_dir()


@pytest.mark.parametrize(
    ("flags", "variables", "words"),
    [
        (
            (),
            {"PENTAGRID_RANKS": ""},
            "was given no GPUs: sbatch --gpus-per-node N, or for ranks on CPUs PENTAGRID_RANKS=N",
        ),
        ((), {"PENTAGRID_BIN": "/nowhere"}, "no /nowhere/torchrun on "),
        ((), {"SLURM_SUBMIT_DIR": "/"}, "/ is not the repository's root: submit from there"),
        (("--seed", "1"), {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "7"}, "--seed: the tasks of an array"),
        ((), {"PENTAGRID_RANKS": "08"}, "PENTAGRID_RANKS=N"),
        ((), {"PENTAGRID_MAX_RESTARTS": "often"}, "PENTAGRID_MAX_RESTARTS is often, not a number"),
        ((), {"PENTAGRID_MAX_RESTARTS": "08"}, "PENTAGRID_MAX_RESTARTS is 08, not a number"),
        ((), {"PENTAGRID_SPARE_NODES": "2"}, "PENTAGRID_SPARE_NODES is 2, but the job has 2 nodes"),
        ((), {"PENTAGRID_PORT": "x"}, "PENTAGRID_PORT is x, not a number above 0"),
        (("--save=x",), {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "7"}, "--save would be one for all seeds"),
    ],
)
def test_what_is_refused(play: Path, flags: tuple[str, ...], variables: dict[str, str], words: str) -> None:
    code, out = run(play, "say done 10 '' a", *flags, **variables)
    assert code == 2 and words in out
    assert not (play / "srun_args").exists()


def test_gpus_are_the_ranks(play: Path) -> None:
    assert run(play, "say done 10 '' a", PENTAGRID_RANKS="", SLURM_GPUS_ON_NODE="8")[0] == 0
    assert srun_args(play)[srun_args(play).index("node") + 3] == "8"


def start(script: str, play: Path, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    program = "torchrun" if script == "multi_node.sh" else "python"
    (play / "bin" / program).unlink()
    (play / "bin" / program).write_text('#!/bin/sh\necho "$PWD: $*"; env\n')
    (play / "bin" / program).chmod(0o755)
    environment = (
        {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        | {"PENTAGRID_BIN": str(play / "bin")}
        | variables
    )
    command = ["bash", str(ROOT / "launch" / script), *args]
    return subprocess.run(command, cwd=play, env=environment, capture_output=True, text=True, timeout=30, check=False)


def test_multi_node_calls_torchrun(play: Path) -> None:
    result = start(
        "multi_node.sh",
        play,
        "1",
        "2",
        "head.example:29400",
        "1000",
        "--lr",
        "0 1",
        PENTAGRID_INTERFACE="lo",
        PENTAGRID_LOG_DIR="/l",
    )
    first, *environment = result.stdout.splitlines()
    assert first == (
        f"{ROOT}: --nnodes 2 --node-rank 1 --nproc-per-node 1000 --rdzv-backend static --master-addr head.example "
        "--master-port 29400 "
        "--log-dir /l/node1 --redirects 3 --tee 3 --local-ranks-filter 0 train.py --lr 0 1"
    )
    assert {"GLOO_SOCKET_IFNAME=lo", "NCCL_SOCKET_IFNAME==lo", "OMP_NUM_THREADS=1"} <= set(environment)


def test_local_calls_torchrun(play: Path) -> None:
    result = start("local.sh", play, "2", "--cp-size", "2", OMP_NUM_THREADS="3")
    static = r"--rdzv-backend static --master-addr 127\.0\.0\.1"
    start_of_line = f"{ROOT}: -m launch\\.torchrun --nnodes 1 --node-rank 0 --nproc-per-node 2 --max-restarts"
    first, *environment = result.stdout.splitlines()
    assert re.fullmatch(f"{start_of_line} 0 {static} train.py --cp-size 2", first), first
    assert {"OMP_NUM_THREADS=3", "GLOO_SOCKET_IFNAME=lo"} <= set(environment)
    again = start("local.sh", play, "2", "--resume", PENTAGRID_TORCHRUN_RESTARTS="3", PENTAGRID_INTERFACE="eth7")
    first, *environment = again.stdout.splitlines()
    assert re.fullmatch(f"{start_of_line} 3 {static} train.py --resume", first), first
    assert "GLOO_SOCKET_IFNAME=eth7" in environment
    for text in ("often", "08"):
        wrong = start("local.sh", play, "2", PENTAGRID_TORCHRUN_RESTARTS=text)
        assert wrong.returncode == 2 and f"PENTAGRID_TORCHRUN_RESTARTS is {text}, not a number" in wrong.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("0", "2"), "2 arguments"),
        (("2", "2", "h:1", "1"), "NODE_RANK is 2, but with NNODES 2 the last one is 1"),
        (("0", "2", "h", "1"), "h is not HEAD:PORT"),
        (("0", "2", "h:1", "--lr"), "--lr is not a number"),
        (("0", "2", "h:1", "0"), "RANKS is 0"),
        (("0", "2", "h:1", "08"), "08 is not a number, or begins with 0"),
        (("0", "2", "h:1", "010"), "010 is not a number, or begins with 0"),
        (("0", "08", "h:1", "1"), "08 is not a number, or begins with 0"),
        (("01", "2", "h:1", "1"), "01 is not a number, or begins with 0"),
        (("0", "2", "h:01", "1"), "h:01 is not HEAD:PORT"),
    ],
)
def test_multi_node_refuses(play: Path, args: tuple[str, ...], words: str) -> None:
    result = start("multi_node.sh", play, *args)
    assert (
        result.returncode == 2 and words in result.stderr and "usage: launch/multi_node.sh NODE_RANK" in result.stderr
    )


def test_an_interface_that_is_not_there_is_named(play: Path) -> None:
    result = start("multi_node.sh", play, "0", "1", "h:1", "1", PENTAGRID_INTERFACE="nosuch0")
    assert result.returncode == 2 and "PENTAGRID_INTERFACE is nosuch0, but this node has" in result.stderr


def test_slurms_script_outside_slurm_names_sbatch(play: Path) -> None:
    code, out = run(play, "", "--run-dir", "r", SLURM_JOB_ID="")
    assert code == 2 and "sbatch [sbatch flags] launch/slurm.sbatch" in out


def test_a_misspelt_flag_is_answered_before_pytorch_is_imported() -> None:
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "launch.torchrun",
        "--nproc-per-node",
        "2",
        "train.py",
        "--lrr",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2 and result.stderr.endswith("train.py: unknown flag --lrr; did you mean --lr?\n")
    assert not re.search(r"\| +torch$", result.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    ("ends", "code", "line"),
    [
        (None, 0, ""),
        (2, 2, ""),
        (-9, 137, "torchrun: rank 1, process 77: SIGKILL\n"),
        (signal.SIGTERM, 143, ""),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_torchrun_ends_as_the_run_does(ends: object, code: int, line: str, monkeypatch, capsys) -> None:
    """`ends`: exit code of the first rank that failed, or what stops torchrun."""

    def played(argv: list[str]) -> None:
        assert argv[0] == "--master-port" and argv[2:] == ["--nproc-per-node", "2", "other.py"]
        if isinstance(ends, signal.Signals):
            raise SignalException("stopped", ends)
        if isinstance(ends, KeyboardInterrupt):
            raise ends
        if isinstance(ends, int):
            raise ChildFailedError("other.py", {1: ProcessFailure(1, 77, ends, "none")})

    monkeypatch.setattr("torch.distributed.run.main", played)
    monkeypatch.setattr(launcher.logging, "disable", lambda level: None)
    assert launcher.main(["--nproc-per-node", "2", "other.py"]) == code
    assert capsys.readouterr().err == line
