"""The size and shape of the code: functions a person reads in one go, one program, typed configuration."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = ("tests", ".venv")
CODE = sorted(p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] not in TESTS)
MAX_FUNCTION, MAX_MAIN = 80, 120
MAX_LINES, MAX_CORE_LINES = 28_400, 7_030  # the aim is 13,000 in all
CORE = ("train.py", "parallel", "cp", "model", "training")


def functions(source: str) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))


def long_functions(source: str, limit: int) -> list[str]:
    """Functions longer than the limit, in lines from `def` to the end."""
    found = ((f.name, (f.end_lineno or 0) - f.lineno + 1) for f in functions(source))
    return [f"{name}: {lines} lines" for name, lines in found if lines > limit]


def namespace_parameters(source: str) -> list[str]:
    """Functions with a parameter `args`, or one annotated as a namespace; `*args` is none."""
    found = []
    for function in functions(source):
        parameters = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
        for parameter in parameters:
            annotation = ast.unparse(parameter.annotation) if parameter.annotation else ""
            if parameter.arg == "args" or "Namespace" in annotation:
                found.append(f"{function.name}({parameter.arg})")
    return found


def imports_train(source: str) -> bool:
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return "train" in names


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_short_and_take_typed_configuration(path: Path) -> None:
    source, name = path.read_text(), path.relative_to(ROOT).as_posix()
    assert long_functions(source, MAX_MAIN if name == "train.py" else MAX_FUNCTION) == []
    assert not imports_train(source)
    if not name.startswith("config/"):
        assert namespace_parameters(source) == []


def test_only_main_may_be_longer_in_train() -> None:
    assert [f for f in long_functions((ROOT / "train.py").read_text(), MAX_FUNCTION) if not f.startswith("main")] == []


def test_the_checks_see_what_they_look_for() -> None:
    assert long_functions("def f():\n" + "    x = 1\n" * 80, 80) == ["f: 81 lines"]
    assert namespace_parameters("def f(args): ...\ndef g(x: argparse.Namespace): ...\ndef h(*args): ...") == [
        "f(args)",
        "g(x)",
    ]
    assert imports_train("import train") and imports_train("from train import main")
    assert not imports_train("import training.step")


def test_benchmarks_do_not_import_tests() -> None:
    assert [p.name for p in (ROOT / "benchmarks").glob("*.py") if "from tests" in p.read_text()] == []


def count_lines(*folders: str) -> int:
    paths = [p for p in CODE if p.relative_to(ROOT).parts[0] in folders]
    return sum(len(p.read_text().splitlines()) for p in paths)


def test_the_code_stays_small() -> None:
    """What a person must read to know all of it; benchmarks are left out."""
    rooms = {p.relative_to(ROOT).parts[0] for p in CODE} - {"benchmarks"}
    assert count_lines(*CORE) <= MAX_CORE_LINES
    assert count_lines(*rooms) <= MAX_LINES
