"""What each room takes from outside the repository: the library a room needs is on its list, any other is a mistake."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
UPPER = ("checkpoint", "metrics", "planner", "runtime", "training")
ROOMS = {"utils", "parallel", "cp", "model", "data", "config", *UPPER, "tools", "benchmarks", "tests"}
# DESIGN.md's table, plus what its text says: numpy for pure arithmetic, libraries in one file each.
OUTSIDE: dict[str, set[str]] = {
    "utils": {"filelock", "numpy", "xxhash"},
    "parallel": {"torch"},
    "cp": {"torch", "numpy"},
    "model": {"torch"},
    "data": {"torch", "numpy", "sentencepiece"},
    "config": set(),
    **{room: {"torch", "numpy"} for room in UPPER},
}
# Read without torch, so that a refusal comes at once and argparse, docs and tests can read them.
TORCH_FREE = [
    "cp/cost.py",
    "cp/layout.py",
    "cp/needed_keys.py",
    "cp/support.py",
    "data/packing.py",
    "data/files.py",
    "data/encode.py",
    "data/corpus_writer.py",
    "data/tokenizer.py",
    "utils/files.py",
    "data/indexed_dataset.py",
    "data/readers.py",
    "data/sources.py",
    "data/blend.py",
    "data/prepare.py",
    "data/statistics.py",
    "model/config.py",
    "model/names.py",
    "config/schema.py",
    "config/cli.py",
    "config/validate.py",
    "config/attention.py",
    "config/outputs.py",
    "config/progress.py",
    "utils/logger.py",
    "training/flops.py",
    "training/lr_schedule.py",
]


def packages(source: str) -> set[str]:
    """Top-level packages that a file imports, also inside functions and behind importlib."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "import_module",
            "__import__",
        ):
            names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        found |= {name.split(".")[0] for name in names}
    return found


def strangers(room: str, source: str) -> set[str]:
    return packages(source) - set(sys.stdlib_module_names) - ROOMS - OUTSIDE[room]


# These libraries are imported in these files and nowhere else.
OPTIONAL = {
    "utils/plain_yaml.py": {"yaml"},
    "cp/ring_flash.py": {"ring_flash_attn"},
    "cp/te_attention.py": {"transformer_engine"},
    "model/te_layers.py": {"transformer_engine"},
    "data/files.py": {"fsspec", "backports"},
    "data/readers.py": {"pyarrow"},
    "data/tokenizer.py": {"tokenizers"},
    "data/prepare.py": {"tqdm"},
    "data/statistics.py": {"matplotlib"},
    "metrics/tensorboard.py": {"matplotlib", "wandb"},
}


@pytest.mark.parametrize(
    "path", sorted(p for room in OUTSIDE for p in (ROOT / room).glob("**/*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_a_room_takes_what_is_on_its_list(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    assert strangers(name.split("/")[0], path.read_text()) <= OPTIONAL.get(name, set())


def test_the_check_sees_a_stranger() -> None:
    assert strangers("parallel", "import numpy as np") == {"numpy"}
    assert strangers("model", "def f():\n    from transformers.x import y") == {"transformers"}
    assert strangers("cp", "importlib.import_module('ring_flash_attn')") == {"ring_flash_attn"}
    assert strangers("data", "import json\nimport numpy.random\nfrom cp.layout import ranges") == set()


def test_torch_is_not_loaded_before_flags_are_read() -> None:
    """All at once: one interpreter, every module, no torch and nothing as slow."""
    modules = [name.removesuffix(".py").replace("/", ".") for name in TORCH_FREE]
    slow = {"torch", "transformers", "tensorboard"}
    code = f"import sys, {', '.join(modules)}; print(sorted({slow} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout == "[]\n", result.stdout + result.stderr


def test_one_wrong_import_would_be_seen() -> None:
    code = "import sys, cp.packed_seq; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 1


def test_the_root_hides_no_module() -> None:
    """`logging.py` or `types.py` beside train.py would be imported instead of Python's."""
    here = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert here.isdisjoint(sys.stdlib_module_names)
    assert here.isdisjoint({"torch", "numpy", "yaml", "sentencepiece", "pytest", "hypothesis", "tensorboard", "common"})
