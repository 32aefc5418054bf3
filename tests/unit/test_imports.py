"""Imports run down the floors only: parallel < cp < model, data < training < train.py, tools, benchmarks."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
# What each room may import besides itself.
GROUND = {"utils"}
MAY_IMPORT: dict[str, set[str]] = {
    "utils": set(),
    "parallel": GROUND,
    "cp": GROUND | {"parallel"},
    "model": GROUND | {"parallel", "cp"},
    "data": GROUND | {"cp"},
}
MAY_IMPORT["config"] = MAY_IMPORT["model"] | MAY_IMPORT["data"] | {"model", "data"}
for upper in ("training", "checkpoint", "metrics", "runtime", "planner"):
    MAY_IMPORT[upper] = MAY_IMPORT["config"] | {"config", "training", "checkpoint", "metrics", "runtime", "planner"}
ROOMS = {*MAY_IMPORT, "train", "tools", "benchmarks", "tests"}
NARROWER = {
    "data": {
        "cp.packed_seq",
        "cp.layout",
        "cp.placement",
        "utils.errors",
        "utils.files",
        "utils.names",
        "utils.plain_yaml",
    },
    "cp": {"parallel.collectives", "parallel.keyed_random", "utils.errors", "parallel.fusion"},
}


def imported(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module or "")
    return names


def violations(room: str, source: str) -> list[str]:
    bad = []
    for name in imported(source):
        target = name.split(".")[0]
        if target not in ROOMS or target == room:
            continue
        if target not in MAY_IMPORT[room] or (room in NARROWER and name not in NARROWER[room]):
            bad.append(name)
    return bad


@pytest.mark.parametrize(
    "path",
    sorted(p for room in MAY_IMPORT for p in (ROOT / room).glob("**/*.py")),
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_no_arrow_runs_up(path: Path) -> None:
    assert violations(path.relative_to(ROOT).parts[0], path.read_text()) == []


def test_the_check_sees_a_violation() -> None:
    assert violations("cp", "from model.gpt import GPT") == ["model.gpt"]
    assert violations("data", "import cp.attention") == ["cp.attention"]
    assert violations("cp", "from parallel.grid import Grid") == ["parallel.grid"]
    assert violations("model", "from cp.attention import Attention\nimport torch") == []


@pytest.mark.parametrize("module", ["cp.support", "config.validate", "config.cli", "model.config"])
def test_flags_are_checked_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_environment_is_read_in_one_place() -> None:
    readers = [
        p.relative_to(ROOT)
        for room in MAY_IMPORT
        for p in (ROOT / room).glob("**/*.py")
        if "os.environ" in p.read_text() or "getenv" in p.read_text()
    ]
    assert readers == [Path("runtime/distributed.py")]
