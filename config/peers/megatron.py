"""Arguments of Megatron-LM in a list, a shell script, or YAML with MODEL_ARGS. Nothing of a script is executed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from config.peers.columns import Values
from utils.errors import UserError
from utils.files import read_text
from utils.logger import one_line
from utils.plain_yaml import read_mapping

MAX_CHARACTERS = 2**20
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)\+?=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^}]*))?\}|(\w+))")
_ENDS = re.compile(
    r"[();<>|&]+|.*\.py|\$\{?\w+\[[@*]\]\}?|.*\$[@*].*|if|then|else|elif|fi|for|do|done|while|echo|export|set|cd|mkdir|exit"
)


def read_megatron(file: Path) -> tuple[Values, list[str]]:
    """Values by flag, without dashes and with underscores: True, a word, or a list of words.

    Returns:
        The values, and what could not be read, one text each.

    Raises:
        UserError: not readable, or no shell words.
    """
    if file.suffix in (".yaml", ".yml"):
        return _read_yaml(file), []
    try:
        text = read_text(file.resolve())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file}: not UTF-8 text") from error
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{file}: {len(text)} characters, more than {MAX_CHARACTERS}: no script")
    return _collect(_split(str(file), text))


def _read_yaml(file: Path) -> Values:
    found = read_mapping(file, str(file))
    args = found.get("MODEL_ARGS", found)
    if not isinstance(args, dict):
        raise UserError(f"{file}: MODEL_ARGS must be a mapping")
    values: Values = {}
    for name, value in args.items():
        if value == "true":
            values[_name(name)] = True
        elif value != "false":
            values[_name(name)] = value.split() if isinstance(value, str) and " " in value else value
    return values


def _name(word: str) -> str:
    return word.lstrip("-").replace("-", "_")


def _split(where: str, text: str) -> list[str]:
    """Shell words; quoted words that hold flags are split too."""
    text = re.sub(r"\\\r?\n", " ", text)
    lexer = shlex.shlex(text, posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split = True
    try:
        words = list(lexer)
        return [part for word in words for part in _split_quoted(word)]
    except ValueError as error:
        raise UserError(f"{where}: not words of a shell ({one_line(error)})") from error


def _split_quoted(word: str) -> list[str]:
    if not re.search(r"\s", word):
        return [word]
    assigned = _ASSIGNMENT.fullmatch(word)
    if assigned and "--" in assigned[2]:
        return [f"{assigned[1]}=", *shlex.split(assigned[2], comments=True)]
    return shlex.split(word) if word.lstrip().startswith("--") else [word]


def _collect(tokens: list[str]) -> tuple[Values, list[str]]:
    variables: dict[str, str] = {}
    values: Values = {}
    notes: list[str] = []
    earlier: Values = {}  # the first words of flags that are given again
    name: str | None = None
    for token in tokens:
        assigned = _ASSIGNMENT.fullmatch(token)
        if assigned and not token.startswith("-"):
            variables[assigned[1]], name = _expand(assigned[2], variables), None
        elif re.match(r"--[A-Za-z]", token):
            word, has_value, value = token.partition("=")
            name = _name(word)
            _put(values, name, [_expand(value, variables)] if has_value else [], earlier)
        elif _ENDS.fullmatch(token):
            name = None
        elif name is not None:
            values[name] = [*values[name], _expand(token, variables)]
    for name, found in list(values.items()):
        if earlier.get(name, found) != found:
            first, last = " ".join(earlier[name]) or "no value", " ".join(found) or "no value"
            notes.append(
                f"--{name.replace('_', '-')} is given as {first} and {last}: the last is taken, as argparse does"
            )
        unset = [word for word in found if "$" in word or "`" in word]
        if unset:
            notes.append(f"--{name.replace('_', '-')} {' '.join(found)}: the script does not say what it stands for")
            del values[name]
        else:
            values[name] = _plain(found)
    return values, notes


def _plain(found: list[str]) -> Any:
    if not found:
        return True
    return found[0] if len(found) == 1 else found


def _put(values: Values, name: str, found: list[str], earlier: Values) -> None:
    if name in values:
        earlier.setdefault(name, values[name])
    values[name] = found


def _expand(word: str, variables: dict[str, str]) -> str:
    """The word with the script's own variables; others stay."""

    def value(match: re.Match) -> str:
        name, default, plain = match.groups()
        known = variables.get(name or plain)
        return known if known is not None else match[0] if default is None else default

    return _VARIABLE.sub(value, word)
