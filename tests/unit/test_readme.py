"""README and presets name what is there: every flag, both commands, files that exist, legal presets."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from config.cli import build_parser, parse_arguments
from config.validate import resolve
from data.prepare import build_parser as prepare_parser
from tools import docs

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text()


def known_flags() -> set[str]:
    """Without the `--no-` that every switch has."""
    return {
        action.option_strings[-1] if action.nargs != 0 else action.option_strings[0]
        for action in build_parser()._actions
    } - {"-h"}


# Of other commands, which have flags of their own.
COMMANDS = r"benchmarks/\w+\.py[^`]*|(tools/plan\.py|tools/generate\.py|sbatch --)[^`\n]*"


def test_every_flag_is_in_its_table_and_every_flag_of_the_readme_exists() -> None:
    # torchrun's, pip's, argparse's, placeholders
    others = {"--max-restarts", "--nproc-per-node", "--index-url", "--help", "--flag", "--no-flag", "--output"}
    in_table = set(re.findall(r"^\| `(--[a-z0-9-]+)", (ROOT / "docs" / "flags.md").read_text(), re.MULTILINE))
    assert in_table == known_flags() - {"--config"}
    in_readme = set(re.findall(r"--[a-z][a-z0-9-]+", re.sub(COMMANDS, "", README)))
    of_prepare = {action.option_strings[0] for action in prepare_parser()._actions}
    assert in_readme - known_flags() - of_prepare - others == set()


@pytest.mark.parametrize("target", ["train", "test"])
def test_make_targets_run_what_the_readme_says(target: str) -> None:
    said = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wanted = {"train": "torchrun --nproc-per-node 4 train.py --cp-size 4", "test": "python -m pytest"}
    assert wanted[target] in said and f"make {target} " in README


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ROOMS = (
    "benchmarks", "checkpoint", "config", "configs", "cp", "data", "docs", "launch", "metrics", "model", "parallel",
    "planner", "runtime", "tests", "tools", "training", "utils",
)  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    for name in re.findall(rf"(?<![\w./-])((?:{'|'.join(ROOMS)})/[\w./*-]*[\w*])", page.read_text()):
        assert any(ROOT.glob(name)), name


def anchors(page: Path) -> set[str]:
    """Of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" not in link:
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")} - {"README.md"}
    assert {name for name in pages if f"({name})" not in index} == set()


@pytest.mark.parametrize(
    "script", sorted([*ROOT.glob("tools/*.py"), *ROOT.glob("benchmarks/*.py")]), ids=lambda p: p.name
)
def test_scripts_find_the_root_before_they_import_from_it(script: Path) -> None:
    """`python tools/plan.py` begins with tools/ on the path, not with the root."""
    if "__main__" not in script.read_text():
        return
    for statement in ast.parse(script.read_text()).body:
        if "sys.path.insert" in ast.unparse(statement):
            return
        modules = [statement.module] if isinstance(statement, ast.ImportFrom) else []
        modules += [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else []
        assert not {str(module).split(".")[0] for module in modules} & set(ROOMS), ast.unparse(statement)


@pytest.mark.parametrize("preset", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_presets_are_legal(preset: Path) -> None:
    config = parse_arguments(["--config", str(preset)])
    stated = re.search(r"--world-size (\d+)", preset.read_text())
    ranks = int(stated[1]) if stated else 8 if config.training.dtype == "bf16" else 1  # for GPUs, or for a laptop
    resolve(
        config, world_size=ranks, local_world_size=min(ranks, 8), cuda_devices=lambda: min(ranks, 8) if ranks > 1 else 0
    )


def test_tables_are_those_of_the_code() -> None:
    """`python tools/docs.py` writes them."""
    assert docs.main(["--check"]) == 0
