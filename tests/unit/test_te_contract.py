"""Every name and keyword of Transformer Engine that our code uses exists in the sources of the pinned release.

The sources are the wheel's own Python files, which `make setup` unpacks beside the environment (nothing of it is
imported: that takes CUDA's libraries). What our code uses is read off our code, so a new use is checked without being
listed here.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
OURS = [ROOT / "model" / "te_layers.py", ROOT / "cp" / "te_attention.py"]
PINNED = re.search(r"==([\d.]+)", (ROOT / "requirements-gpu.txt").read_text().split("transformer-engine")[1])


def sources() -> Path:
    """The folder into which `make setup` unpacked the wheel."""
    found = [p for p in (ROOT / ".venv" / "te_sources", Path(sys.prefix) / "te_sources") if p.is_dir()]
    if not found:
        pytest.fail("the sources of Transformer Engine are not there: make setup unpacks them into .venv/te_sources")
    return found[0]


@dataclass(frozen=True)
class Use:
    """One of our calls: callee in Transformer Engine, method, number of positional arguments, keywords, location."""

    name: str
    method: str
    plain: int
    keywords: tuple[str, ...]
    where: str


def dict_keys(tree: ast.AST) -> dict[str, tuple[str, ...]]:
    """Functions of ours that return keywords: {name: keys of every dict they return}."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            keys = [
                k.value
                for d in ast.walk(node)
                if isinstance(d, ast.Dict)
                for k in d.keys
                if isinstance(k, ast.Constant)
            ]
            found[node.name] = tuple(dict.fromkeys(keys))
    return found


def keywords_of(call: ast.Call, returning: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    names = [k.arg for k in call.keywords if k.arg]
    for k in call.keywords:
        if k.arg is None:  # **function(...)
            assert isinstance(k.value, ast.Call) and isinstance(k.value.func, ast.Name), ast.dump(k.value)
            names += returning[k.value.func.id]
    return tuple(names)


def uses_in(path: Path) -> list[Use]:
    tree = ast.parse(path.read_text())
    returning, found = dict_keys(tree), []
    variables = {}  # name -> class of what it holds
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and is_te(node.value.func):
            variables |= {t.id: node.value.func.attr for t in node.targets if isinstance(t, ast.Name)}  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            bases = [base.attr for base in node.bases if is_te(base)]  # type: ignore[attr-defined]
            for call in (c for c in ast.walk(node) if bases and isinstance(c, ast.Call)):
                if isinstance(call.func, ast.Attribute) and isinstance(
                    call.func.value, ast.Call
                ):  # super().__init__(...)
                    found.append(
                        Use(
                            bases[0],
                            call.func.attr,
                            len(call.args),
                            keywords_of(call, returning),
                            f"{path.name}:{call.lineno}",
                        )
                    )
        if not isinstance(node, ast.Call):
            continue
        where = f"{path.name}:{node.lineno}"
        if is_te(node.func):
            found.append(Use(node.func.attr, "__init__", len(node.args), keywords_of(node, returning), where))  # type: ignore[attr-defined]
        elif isinstance(node.func, ast.Name) and node.func.id == "dpa":
            found.append(Use("DotProductAttention", "forward", len(node.args), keywords_of(node, returning), where))
        elif (
            isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id in variables
        ):
            found.append(
                Use(variables[node.func.value.id], node.func.attr, len(node.args), keywords_of(node, returning), where)
            )
    return found


def is_te(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ALIASES


# What our code calls the package's modules -> their files; the first exports what others define.
ALIASES = {
    "te": "pytorch/__init__.py",
    "te_recipe": "common/recipe/__init__.py",
    "te_rope": "pytorch/attention/rope.py",
}


def names_in(path: Path) -> set[tuple[str, str]]:
    """(alias, name) of each of the package's names that one of our files uses."""
    tree = ast.parse(path.read_text())
    return {(node.value.id, node.attr) for node in ast.walk(tree) if is_te(node)}  # type: ignore[attr-defined]


def classes() -> dict[str, tuple[ast.ClassDef, Path]]:
    """Every class and function of the package; the exported one wins over others of the same name."""
    found: dict[str, tuple[ast.ClassDef, Path]] = {}
    root = sources() / "transformer_engine"
    for path in sorted([*(root / "pytorch").glob("**/*.py"), root / "common" / "recipe" / "__init__.py"]):
        for node in ast.parse(path.read_text()).body:
            if isinstance(
                node, ast.FunctionDef
            ):  # as a class of which only the call matters, its first argument a `self` that is not there
                node = ast.ClassDef(node.name, [], [], [_as_method(node)], [])
            # RMSNorm and its like exist as an operation and, with the old arguments, as a module: the module is
            # exported.
            if isinstance(node, ast.ClassDef) and (node.name not in found or path.parent.name == "module"):
                found[node.name] = (node, path)
    return found


def _as_method(function: ast.FunctionDef) -> ast.FunctionDef:
    given = function.args
    arguments = ast.arguments(
        posonlyargs=given.posonlyargs,
        args=[ast.arg("self"), *given.args],
        vararg=given.vararg,
        kwonlyargs=given.kwonlyargs,
        kw_defaults=given.kw_defaults,
        kwarg=given.kwarg,
        defaults=given.defaults,
    )
    return ast.FunctionDef("__init__", arguments, function.body, [], None)


def signature(name: str, method: str, known: dict[str, tuple[ast.ClassDef, Path]]) -> ast.arguments:
    node, path = known[name]
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == method:
            return item.args
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in known:
            return signature(base.id, method, known)
    pytest.fail(f"{name} has no method {method} in {path}")


USES = [use for path in OURS for use in uses_in(path)]


def test_the_release_is_the_pinned_one() -> None:
    assert PINNED is not None
    assert [p.name for p in sources().glob("transformer_engine-*.dist-info")] == [
        f"transformer_engine-{PINNED[1]}.dist-info"
    ]


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_every_name_is_there(path: Path) -> None:
    known = classes()
    for alias, name in names_in(path):
        text = (sources() / "transformer_engine" / ALIASES[alias]).read_text()
        assert re.search(rf"\b{name}\b", text), f"{name} is not in {ALIASES[alias]}"
        assert name in known, f"{name} is no class or function of the package"


@pytest.mark.parametrize("name", ["is_fp8_available", "is_fp8_block_scaling_available"])
def test_what_is_called_through_a_table(name: str) -> None:
    assert "return_reason" in [a.arg for a in signature(name, "__init__", classes()).args]


@pytest.mark.parametrize("name", ["scaling_fwd", "scaling_bwd", "num_gemms", "amax_history"])
def test_the_state_of_scaling_has_the_names_that_we_read(name: str) -> None:
    """A release that renames these attributes would break checkpoints of --fp8 delayed."""
    base = (sources() / "transformer_engine" / "pytorch" / "module" / "base.py").read_text()
    assert re.search(rf"\b{name}\b", base)


@pytest.mark.parametrize("use", USES, ids=lambda use: f"{use.name}.{use.method} at {use.where}")
def test_what_we_call_exists_with_its_keywords(use: Use) -> None:
    known = classes()
    arguments = signature(use.name, use.method, known)
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)][1:]
    assert use.plain <= len(names), f"{use.where}: {use.plain} plain arguments, it takes {len(names)}"
    allowed = {*names, *(a.arg for a in arguments.kwonlyargs)}
    missing = [k for k in use.keywords if k not in allowed]
    if arguments.kwarg is not None and missing:
        # Passed on to the class it is made from.
        node, _ = known[use.name]
        base = next(b for b in node.bases if isinstance(b, (ast.Name, ast.Attribute)))
        base_name = base.id if isinstance(base, ast.Name) else base.attr
        path = next((sources() / "transformer_engine" / "pytorch" / "ops").glob("**/rmsnorm.py"))
        inner = next(n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == "RMSNorm")
        assert "RMSNorm" in base_name
        initialiser = next(i for i in inner.body if isinstance(i, ast.FunctionDef) and i.name == use.method)
        allowed |= {a.arg for a in (*initialiser.args.args, *initialiser.args.kwonlyargs)}
        missing = [k for k in use.keywords if k not in allowed]
    assert not missing, f"{use.where}: {use.name}.{use.method} takes no {missing}"


def test_the_uses_were_found() -> None:
    """A reader that finds no use would pass every test."""
    seen = {(use.name, use.method) for use in USES}
    assert seen == {
        ("RMSNorm", "__init__"),
        ("Linear", "__init__"),
        ("LayerNormLinear", "__init__"),
        ("LayerNormMLP", "__init__"),
        ("DotProductAttention", "__init__"),
        ("DotProductAttention", "forward"),
        ("DotProductAttention", "set_context_parallel_group"),
        ("LayerNormMLP", "init_fp8_meta_tensors"),
        ("autocast", "__init__"),
        ("apply_rotary_pos_emb", "__init__"),
    }
    mlp = next(use for use in USES if use.name == "LayerNormMLP")
    assert {"activation", "normalization", "set_parallel_mode", "tp_group", "sequence_parallel", "device"} <= set(
        mlp.keywords
    )
    thd = [use for use in USES if use.method == "forward"]
    assert any("pad_between_seqs" in use.keywords and "cu_seqlens_q_padded" in use.keywords for use in thd)


def test_a_wrong_keyword_would_be_seen() -> None:
    wrong = Use("LayerNormLinear", "__init__", 2, ("epsilon",), "here")
    with pytest.raises(AssertionError, match="epsilon"):
        test_what_we_call_exists_with_its_keywords(wrong)
