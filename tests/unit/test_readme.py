"""README and presets name what is there: every flag, both commands, files that exist, legal presets."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from config.cli import build_parser, parse_arguments
from config.validate import resolve
from data.prepare import build_parser as prepare_parser

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
    others = {"--max-restarts", "--nproc-per-node", "--index-url", "--help", "--flag", "--no-flag"}
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


def test_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"`((?:configs|launch|benchmarks|docs|tools|cp|tests)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("preset", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_presets_are_legal(preset: Path) -> None:
    config = parse_arguments(["--config", str(preset)])
    ranks = 8 if config.training.dtype == "bf16" else 1  # for a GPU node, or for a laptop
    resolve(config, world_size=ranks, local_world_size=ranks, cuda_devices=lambda: ranks if ranks > 1 else 0)


def test_tables_are_those_of_the_code() -> None:
    """`python tools/docs.py` writes them."""
    assert subprocess.run([sys.executable, "tools/docs.py", "--check"], cwd=ROOT, check=False).returncode == 0
