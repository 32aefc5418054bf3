"""launch/kubernetes.yaml against the published schema of JobSet; launch/kubernetes.sh with a torchrun that is played.

tests/assets/jobset_schema.json is an excerpt of JobSet's CRD: types, choices, required and known names of the objects
that the file touches, of the commit that it names. No cluster and no API server saw the file.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from config.cli import parse_arguments

ROOT = Path(__file__).resolve().parent.parent.parent
TYPES = {"string": str, "integer": int, "boolean": bool, "object": dict, "array": list}


def faults(value: Any, schema: dict[str, Any], where: str = "") -> list[str]:
    """Names that the schema does not know, missing names, wrong types and choices."""
    if schema.get("x-kubernetes-int-or-string"):
        return [] if type(value) in (int, str) else [f"{where}: {value!r}"]
    if "type" in schema and type(value) is not TYPES[schema["type"]]:
        return [f"{where}: {value!r} is no {schema['type']}"]
    found = [f"{where}: {value!r}"] if "enum" in schema and value not in schema["enum"] else []
    if isinstance(value, dict):
        known = schema.get("properties", {})
        found += [f"{where}: no {name}" for name in schema.get("required", []) if name not in value]
        for name, part in value.items():
            if name in known or "additionalProperties" in schema:
                found += faults(part, known.get(name, schema.get("additionalProperties")), f"{where}.{name}")
            elif "properties" in schema:
                found.append(f"{where}: unknown {name}")
    if isinstance(value, list):
        for part in value:
            found += faults(part, schema.get("items", {}), f"{where}[]")
    return found


@pytest.fixture
def job_set() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "launch" / "kubernetes.yaml").read_text())


SCHEMA = json.loads((ROOT / "tests" / "assets" / "jobset_schema.json").read_text())["schema"]


def test_the_file_is_as_the_schema_wants(job_set: dict[str, Any]) -> None:
    job_set.pop("metadata")  # of every object, not of this schema
    assert faults(job_set, SCHEMA) == []


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        ((), "spce", {}),
        (("failurePolicy",), "maxRestarts", "100"),
        (("failurePolicy", "rules", 0), "action", "FailJob"),
        (("replicatedJobs", 0, "template", "spec"), "completionmode", "Indexed"),
        (("replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rules", 0), "action", None),
        (("replicatedJobs", 0, "template", "spec", "template", "spec"), "gracePeriodSeconds", 600),
    ],
)
def test_the_check_sees_a_fault(path: tuple, name: str, value: Any, job_set: dict[str, Any]) -> None:
    place = copy.deepcopy(job_set["spec"])
    changed = place
    for part in path:
        place = place[part]
    place[name] = value
    assert len(faults(changed, SCHEMA["properties"]["spec"])) == 1


def test_what_belongs_together_agrees(job_set: dict[str, Any]) -> None:
    job = job_set["spec"]["replicatedJobs"][0]
    spec, pod = job["template"]["spec"], job["template"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    nnodes, head, ranks, *flags = container["args"]
    assert int(nnodes) == spec["parallelism"] == spec["completions"]
    assert int(ranks) == container["resources"]["limits"]["nvidia.com/gpu"]
    name = job_set["metadata"]["name"]
    assert head.split(":")[0] == f"{name}-{job['name']}-0-0.{name}"
    assert int(container["env"][0]["value"]) < pod["terminationGracePeriodSeconds"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert any(flag.startswith("--run-dir=/shared/") for flag in flags)
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]


# Fields of a task and of its resources that docs.skypilot.co/en/latest/reference/yaml-spec.html documents.
SKYPILOT = {
    "name",
    "workdir",
    "num_nodes",
    "resources",
    "envs",
    "secrets",
    "file_mounts",
    "volumes",
    "setup",
    "run",
    "config",
}
RESOURCES = {
    "infra",
    "accelerators",
    "cpus",
    "memory",
    "instance_type",
    "use_spot",
    "disk_size",
    "image_id",
    "job_recovery",
}
RECOVERY = {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"}


def test_a_job_of_skypilot_starts_the_same_script_on_each_node(tmp_path: Path) -> None:
    task = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())
    resources = task["resources"]
    assert task.keys() <= SKYPILOT and resources.keys() <= RESOURCES and resources["job_recovery"].keys() <= RECOVERY
    (shared,) = task["volumes"]
    (tmp_path / "pentagrid" / "launch").mkdir(parents=True)
    script = tmp_path / "pentagrid" / "launch" / "kubernetes.sh"
    script.write_text('#!/bin/bash\necho "$JOB_COMPLETION_INDEX" "$@"\n')
    script.chmod(0o755)
    nodes = dict(SKYPILOT_NODE_RANK="1", SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2", SKYPILOT_NUM_NODES="2")
    run = task["run"].replace(f"cd {shared}", f"cd {tmp_path}")
    environment = os.environ | nodes | task["envs"] | {"SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    said = subprocess.run(["bash", "-c", run], env=environment, capture_output=True, text=True, check=True).stdout
    assert said.startswith("1 2 10.0.0.1:29400 8 --")
    flags = said.split()[4:]
    config = parse_arguments([flag.replace("=configs", f"={ROOT}/configs") for flag in flags])
    assert config.checkpoint.run_dir.startswith(f"{shared}/") and config.data.data_path == [f"{shared}/corpora/mine"]


@pytest.fixture
def play(tmp_path: Path) -> Path:
    """A folder that looks like the repository, whose multi_node.sh is played."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / "launch" / "kubernetes.sh", tmp_path / "launch")
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    return tmp_path


def start(
    play: Path, status: dict[str, Any] | None, *, end: str = "exit 0", index: str = "0", restart: int = 0
) -> subprocess.Popen:
    script = '#!/bin/bash\necho "$@" > args\n'
    if status is not None:
        script += f"echo '{json.dumps(status)}' > run/status.json\n"
    (play / "launch" / "multi_node.sh").write_text(script + end + "\n")
    (play / "launch" / "multi_node.sh").chmod(0o755)
    (play / "run").mkdir(exist_ok=True)
    environment = os.environ | {"JOB_COMPLETION_INDEX": index, "PENTAGRID_BIN": str(play / "bin")}
    environment["JOBSET_RESTART_ATTEMPT"] = str(restart)
    command = ["bash", str(play / "launch" / "kubernetes.sh"), "2", "head:29400", "8", "--lr=0.1", "--run-dir", "run"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(
    ("status", "end", "code"),
    [
        ({"status": "done", "attempt": "b"}, "exit 0", 0),
        ({"status": "requeue", "attempt": "b", "reason": "the stop file"}, "exit 0", 1),
        ({"status": "failed", "attempt": "b", "lost": True}, "exit 1", 1),
        ({"status": "running", "attempt": "b"}, "exit 137", 1),
        ({"status": "failed", "attempt": "b", "lost": False}, "exit 1", 2),
        ({"status": "requeue", "attempt": "a"}, "exit 1", 2),
        (None, "exit 2", 2),
        (None, "exit 143", 1),
        (None, "exit 0", 0),  # --eval-only
    ],
)
def test_exit_codes_follow_the_status(status: dict | None, end: str, code: int, play: Path) -> None:
    (play / "run").mkdir()
    (play / "run" / "status.json").write_text('{"status": "requeue", "attempt": "a"}')
    job = start(play, status, end=end, index="1")
    out, _ = job.communicate(timeout=30)
    assert job.returncode == code, out
    assert (play / "args").read_text() == "1 2 head:29400 8 --lr=0.1 --run-dir run --resume\n"


def test_a_pod_lost_while_the_ranks_start_again_ends_no_run(play: Path) -> None:
    for trained_before in (False, True):
        job = start(play, None, end="exit 1", restart=1)
        job.communicate(timeout=30)
        assert job.returncode == (1 if trained_before else 2)
        (play / "run" / "status.json").write_text('{"status": "requeue", "attempt": "a"}')


def test_sigterm_reaches_the_run_which_saves(play: Path) -> None:
    (play / "saved").write_text('{"status": "requeue", "attempt": "b"}')
    end = "trap 'cp saved run/status.json; exit 143' TERM\ntouch started\nwhile true; do sleep 0.1; done"
    job = start(play, None, end=end)
    while not (play / "started").exists():
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=30)
    assert job.returncode == 1 and "requeue" in out, out
