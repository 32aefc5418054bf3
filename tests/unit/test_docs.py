"""The commands of README and docs: shell syntax, flags that exist, marks of what cannot run on a laptop; real runs.

A block of commands that needs more than a laptop stands below a line `<!-- needs: slurm -->`.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from config.cli import build_parser, parse_arguments
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS = ("slurm", "kubernetes", "cluster", "GPU", "root", "clones", "refusal")  # refusal: the page shows one
PROGRAMS = r"\.venv/bin/\S+|python3?(?! -c)|torchrun|make|launch/\S+|sbatch|srun|kubectl|nft|unshare|mkdir|cp"
COMMAND = re.compile(rf"    (?:\$ |node\d\$ )?((?:[A-Z_]+=\S+ )*(?:{PROGRAMS})\s.*)")
# What a laptop without GPUs, a scheduler and other suites' code cannot run.
ELSEWHERE = re.compile(
    r"sbatch|srun|kubectl|\bnft\b|unshare|multi_node|local\.sh ([5-9]|\d\d)|nproc-per-node ([5-9]|\d\d)"
    r"|requirements-gpu|test-(gpu|te-import|peers|migrate|slurm|netns|megatron)|check-comparison|benchmarks/(gpu|peers)\.py|nemo_automodel"
)


@dataclass(frozen=True)
class Command:
    """A command of a page; `needs` is the mark of its block."""

    page: Path
    line: int
    text: str
    needs: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {self.text}"


def read_commands(page: Path) -> Iterator[Command]:
    """Commands of indented blocks, continued lines joined, output left out."""
    needs, lines = "", page.read_text().splitlines()
    number = 0
    while number < len(lines):
        line, first = lines[number], number + 1
        number += 1
        if line.startswith("<!-- needs: "):
            needs = line.removeprefix("<!-- needs: ").removesuffix(" -->")
        elif line and not line.startswith("    "):
            needs = ""  # a mark reaches to the next text
        elif found := COMMAND.match(line):
            text = found[1]
            while text.endswith("\\"):
                text = text[:-1] + lines[number].strip()
                number += 1
            yield Command(page, first, re.sub(r"<[^<>|]+>", "X", text), needs)


COMMANDS = [command for page in PAGES for command in read_commands(page)]


def train_flags(words: list[str]) -> list[str] | None:
    """The flags of train.py in a command; None: another program."""
    for script, skipped in (
        ("train.py", 0),
        ("launch/local.sh", 1),
        ("launch/multi_node.sh", 4),
        ("launch/slurm.sbatch", 0),
    ):
        if script in words:
            return words[words.index(script) + 1 + skipped :]
    return None


def flag_faults(text: str) -> list[str]:
    """Flags of a command that its program does not have, and values that it refuses."""
    words = [word for word in shlex.split(text, comments=True) if word not in ("...", "flags...")]
    words = words[: next((i for i, word in enumerate(words) if word in ("&&", ";", "|")), len(words))]
    if (flags := train_flags(words)) is not None:
        for i in [i for i, word in enumerate(flags) if word == "--config" and not (ROOT / flags[i + 1]).exists()]:
            flags[i : i + 2] = ["--config", "configs/tiny.yaml"]  # a file that earlier commands write
        try:
            parse_arguments(flags)
        except UserError as error:
            return [str(error)]
        return []
    scripts = [word for word in words if re.fullmatch(r"(tools|benchmarks)/\w+\.py", word)]
    scripts += ["data/prepare.py"] if "data.prepare" in words else []
    if not scripts:
        return []
    source = (ROOT / scripts[0]).read_text()
    source += (ROOT / "data" / "statistics.py").read_text() if "stats" in words else ""
    known = set(re.findall(r'"(--[a-z][a-z0-9-]*)"', source))
    known |= {f"--{name.replace('_', '-')}" for name in re.findall(r"^    (\w+): .* = option\(", source, re.MULTILINE)}
    if "harness" in source:
        known |= set(re.findall(r'"(--[a-z][a-z0-9-]*)"', (ROOT / "benchmarks" / "harness.py").read_text()))
    if "parse_arguments" in source or "parse_run" in source or "all flags of train.py" in source:
        known |= set(build_parser()._option_string_actions)
    after = words[words.index("data.prepare" if "data.prepare" in words else scripts[0]) + 1 :]
    given = {word.split("=")[0] for word in after if word.startswith("--")}
    return [f"{scripts[0]} has no {flag}" for flag in sorted(given - known)]


def test_the_pages_have_commands() -> None:
    assert len(COMMANDS) > 80 and {command.page for command in COMMANDS} >= {PAGES[0], ROOT / "docs" / "recipes.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_bash_with_flags_that_exist(page: Path) -> None:
    commands = [command for command in COMMANDS if command.page == page]
    script = "\n".join(command.text for command in commands)
    result = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    faults = {command: flag_faults(command.text) for command in commands}
    assert [f"{c}: {found}" for c, found in faults.items() if bool(found) != (c.needs == "refusal")] == []


def test_what_cannot_run_on_a_laptop_is_marked() -> None:
    unmarked = [str(command) for command in COMMANDS if ELSEWHERE.search(command.text) and not command.needs]
    assert unmarked == []
    assert {command.needs for command in COMMANDS} <= {"", *NEEDS}


def test_make_knows_its_targets() -> None:
    for command in COMMANDS:
        if command.text.startswith("make "):
            target = shlex.split(command.text, comments=True)[1]
            subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("launch/local.sh 2 --cp-sizes 2", "unknown flag --cp-sizes"),
        (".venv/bin/torchrun --nproc-per-node 2 train.py --dtype int8", "--dtype"),
        (".venv/bin/python tools/plan.py --world-sizes 8", "has no --world-sizes"),
        (".venv/bin/python -m data.prepare --inputs x", "has no --inputs"),
    ],
)
def test_the_check_sees_a_wrong_flag(text: str, fault: str) -> None:
    assert fault in flag_faults(text)[0]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The repository by links, with a folder of text: what commands write stays here."""
    for path in ROOT.iterdir():
        if path.name not in ("runs", "text", "corpora", "hf", ".cache", ".git"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "text").mkdir()
    for page in (ROOT / "docs").glob("*.md"):
        (tmp_path / "text" / page.name).write_text(page.read_text())
    return tmp_path


def run(tree: Path, text: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PENTAGRID_", "SLURM_"))}
    result = subprocess.run(
        ["bash", "-c", text], cwd=tree, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, f"{text}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def commands_of(page: str, heading: str) -> list[str]:
    """Of one section."""
    lines = (ROOT / page).read_text().splitlines()
    first = lines.index(heading) + 1
    last = next((n for n, line in enumerate(lines[first:], first + 1) if line.startswith("## ")), len(lines) + 1)
    return [command.text for command in COMMANDS if command.page == ROOT / page and first < command.line < last]


def test_the_corpus_of_the_ten_minutes(tree: Path) -> None:
    for text in commands_of("README.md", "## Your own text in ten minutes")[:2]:
        run(tree, text)
    assert (tree / "corpora" / "mine.bin").stat().st_size > 10_000


@pytest.mark.full
def test_the_ten_minutes(tree: Path) -> None:
    commands = commands_of("README.md", "## Your own text in ten minutes")
    said = [run(tree, text) for text in commands]
    assert len(commands) == 7 and "stopped after step 20" in said[2] and "done in" in said[3]
    assert (tree / "hf" / "mine" / "config.json").exists() and (tree / "runs" / "mine" / "report.html").exists()


@pytest.mark.full
@pytest.mark.parametrize("text", [c.text for c in COMMANDS if "tools/plan.py" in c.text and "--rank" not in c.text])
def test_the_plans(text: str, tree: Path) -> None:
    assert run(tree, text)
