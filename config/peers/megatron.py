"""Arguments of Megatron-LM in a list, a shell script, or YAML with MODEL_ARGS. Nothing of a script is executed."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

from config.peers.columns import Values
from utils.errors import UserError
from utils.files import read_text
from utils.logger import one_line
from utils.plain_yaml import read_mapping

MAX_CHARACTERS = 2**20
_QUOTED, _LITERAL, _BREAK = "\ue000", "\ue001", "\ue002"  # `$` in double quotes, `$` as text, end of a word
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_VARIABLE = re.compile(rf"([${_QUOTED}])(?:\{{(\w+)(\[[@*]\]|:?-([^}}]*))?\}}|(\w+))")
_ENDS = re.compile(r"[();<>|&]+|.*\.py|.*\$[@*].*|if|then|else|elif|fi|for|do|done|while|echo|export|set|cd|mkdir|exit")
# What a shell reads before words: continued lines, escapes, comments, quotes.
_PIECE = re.compile(r"""\\\r?\n|\\.|(?<![^\s();<>|&])\#[^\n]*|'[^']*'|"(?:\\.|[^"\\])*\"""", re.DOTALL)


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
    lexer = shlex.shlex(_PIECE.sub(_mark, text), posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        words = list(lexer)
        return [part for word in words for part in _split_quoted(word)]
    except ValueError as error:
        raise UserError(f"{where}: not words of a shell ({one_line(error)})") from error


def _mark(piece: re.Match) -> str:
    """The piece with its quotes; `$` becomes a mark that outlives them."""
    found = re.sub(r"\\\r?\n", "", piece[0])
    if found.startswith('"'):
        return found.replace(r"\$", _LITERAL).replace("$", _QUOTED)
    return "" if found.startswith("#") else found.replace("$", _LITERAL)


def _shown(word: str) -> str:
    return word.replace(_QUOTED, "$").replace(_LITERAL, "$")


def _split_quoted(word: str) -> list[str]:
    if not re.search(r"\s", word):
        return [word]
    unquoted = word.replace(_QUOTED, "$")  # a script uses such a variable without quotes
    assigned = _ASSIGNMENT.fullmatch(unquoted)
    if assigned and "--" in assigned[3]:
        return [f"{assigned[1]}=", *shlex.split(assigned[3], comments=True), ";"]
    return shlex.split(unquoted) if word.lstrip().startswith("--") else [word]


def _collect(tokens: list[str]) -> tuple[Values, list[str]]:
    variables: dict[str, str] = {}
    values: Values = {}
    notes: list[str] = []
    earlier: Values = {}  # the first words of flags that are given again
    name: str | None = None
    array: str | None = None
    loose = {match[1] for token in tokens if (match := re.fullmatch(r"\$\{(\w+)\[[@*]\]\}", token))}
    for before, token in pairwise(["", *tokens]):
        words = _expand(token, variables)
        if array in loose:
            words = " ".join(words).split()  # `${ARRAY[@]}` without quotes
        assigned = _ASSIGNMENT.fullmatch(token)
        if assigned and not token.startswith("-"):
            old = variables.get(assigned[1], "") if assigned[2] else ""
            variables[assigned[1]], name = old + " ".join(_expand(assigned[3], variables)), None
        elif re.match(r"--[A-Za-z]", token):
            word, has_value, value = token.partition("=")
            name = _name(word)
            _put(values, name, _expand(value, variables) if has_value else [], earlier)
        elif not words or _ENDS.fullmatch(_shown(token)):
            opens = _ASSIGNMENT.fullmatch(before) if token.startswith("(") else None
            array = opens[1] if opens else None if token.startswith(")") else array
            name = None
        elif name is not None:
            values[name] = [*values[name], *words]
        elif array is not None:
            variables[array] = _BREAK.join([*filter(None, [variables[array]]), *words])
    for name, found in list(values.items()):
        found = [_shown(word) for word in found]
        if earlier.get(name, found) != found:
            first, last = " ".join(map(_shown, earlier[name])) or "no value", " ".join(found) or "no value"
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


def _expand(word: str, variables: dict[str, str]) -> list[str]:
    """The words that a shell makes of one: only what an unquoted variable stands for is split; unknown ones stay."""

    def value(match: re.Match) -> str:
        mark, name, braces, default, plain = match.groups()
        found = variables.get(name or plain, default)
        if found is None:
            return "" if braces else match[0]  # an array that the script does not set
        return re.sub(r"\s+", _BREAK, found) if mark == "$" else found

    made = _VARIABLE.sub(value, word)
    return [part for part in made.split(_BREAK) if part] or ([""] if "$" not in word else [])
