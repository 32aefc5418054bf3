"""flash-attn's functions take what ring-flash-attn passes them, and so do our functions on the CPU.

flash-attn's sources are those of the pinned release, which `make setup` unpacks beside the environment; it is not
imported.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from pathlib import Path

import pytest
import torch

from cp import flash_attn_cpu

ROOT = Path(__file__).resolve().parent.parent.parent
FUNCTIONS = ("_flash_attn_forward", "_flash_attn_backward", "_flash_attn_varlen_forward", "_flash_attn_varlen_backward")


def arguments_of(name: str) -> list[str]:
    """The release's parameters, in order."""
    places = [Path(base) / "flash_attn_sources" / "flash_attn_interface.py" for base in (ROOT / ".venv", sys.prefix)]
    found = next((p for p in places if p.is_file()), None)
    if found is None:
        pytest.fail("the sources of flash-attn are not there: make setup unpacks them into .venv/flash_attn_sources")
    functions = {node.name: node for node in ast.parse(found.read_text()).body if isinstance(node, ast.FunctionDef)}
    return [a.arg for a in functions[name].args.args]


def passed_by_the_library() -> dict[str, set[str]]:
    """Names of the arguments that ring-flash-attn sets, by function, read from its sources."""
    spec = importlib.util.find_spec("ring_flash_attn")
    assert spec is not None and spec.submodule_search_locations
    found: dict[str, set[str]] = {}
    for path in Path(spec.submodule_search_locations[0]).glob("*.py"):
        for function in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)):
            current = None
            for node in (n for s in function.body for n in ast.walk(s)):
                if not isinstance(node, ast.Call):
                    continue
                if (
                    isinstance(node.func, ast.Name)
                    and node.func.id == "get_default_args"
                    and isinstance(node.args[0], ast.Name)
                ):
                    current = node.args[0].id
                elif (
                    isinstance(node.func, ast.Attribute)
                    and node.func.attr == "update"
                    and current
                    and isinstance(node.args[0], ast.Dict)
                ):
                    keys = {key.value for key in node.args[0].keys if isinstance(key, ast.Constant)}
                    found.setdefault(current, set()).update(str(key) for key in keys)
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_our_functions_take_what_the_library_passes(name: str) -> None:
    """By name, each under flash-attn's name; other options are refused unless they are known to change nothing."""
    function = getattr(flash_attn_cpu, name)
    named = {n for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    known = {*flash_attn_cpu.NEUTRAL, *flash_attn_cpu.IGNORED}
    passed = passed_by_the_library()[name] - {"window_size"}
    assert named <= passed <= named | known
    assert named <= set(arguments_of(name)) and not named & known
    inspect.signature(function).bind(**dict.fromkeys(passed))


def test_an_option_that_changes_the_result_is_refused() -> None:
    x = torch.zeros(1, 4, 2, 8)
    for option in ({"softcap": 1.0}, {"window_size_left": 4}, {"dropout_p": 0.1}, {"alibi_slopes": x}, {"sink": None}):
        with pytest.raises(NotImplementedError, match=next(iter(option))):
            flash_attn_cpu._flash_attn_forward(q=x, k=x, v=x, softmax_scale=1.0, causal=True, **option)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_flash_attn_takes_what_the_library_passes(name: str) -> None:
    passed = passed_by_the_library()[name]
    assert {"q", "k", "v", "causal", "softmax_scale"} <= passed
    # The library first checks which of the two window parameters exists.
    assert passed - {"window_size"} <= set(arguments_of(name))
