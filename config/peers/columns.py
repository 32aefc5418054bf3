"""What a row of the table of correspondences is made of: concepts, their keys in each suite, and converters.

`config/correspondences.py` holds the table; `tools/migrate.py` walks it, and `config/aliases.py` makes hints from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from utils.errors import UserError

SUITES = {
    "pentagrid": "Pentagrid",
    "nemo": "NeMo AutoModel",
    "axolotl": "Axolotl",
    "megatron": "Megatron-LM",
    "hf": "Hugging Face's config.json",
}
ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "ABSENT", "__bool__": lambda self: False})()
NULLS = ("", "null", "Null", "NULL", "~")
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")

Values = dict[str, Any]  # a suite's keys, sections joined by dots, and their values: words, or lists of them
Known = Mapping[str, Any]  # concepts that were read before; "keys": those of the source


class NoCounterpart(Exception):
    """A value that the other suite cannot have; the text says why and what to do."""


class Changed(NamedTuple):
    """A converted value that means something else than before. Attributes: value, note with the numbers."""

    value: Any
    note: str


class From(NamedTuple):
    """A default that is not the suite's own. Attributes: value, origin, for the comment."""

    value: Any
    origin: str


@dataclass(frozen=True)
class Column:
    """One concept in one suite.

    Attributes:
        keys: read by `read`, the first is the concept's usual name.
        read: (values of the keys that are given, concepts read before) -> the concept's value, or `Changed`; `ABSENT`:
            nothing to carry over.
        write: (the concept's value, all concepts) -> values by key, or `Changed`.
        default: the suite's own value without any key, or a function of the concepts read before, which may return
            `From` or `Changed`.
    """

    keys: tuple[str, ...]
    read: Callable[[Values, Known], Any] | None = None
    write: Callable[[Any, Known], Any] | None = None
    default: Any = ABSENT


@dataclass(frozen=True)
class Concept:
    """A row of the table. Attributes: off, a value that asks for nothing, so that a suite without the key has it."""

    name: str
    columns: Mapping[str, Column]
    off: Any = ABSENT


# ---------------------------------------------------------------------------------------------------
# Values


def is_null(value: Any) -> bool:
    return value is None or value in NULLS or value == [] or value == {}


def whole(value: Any) -> int:
    """`4`, `"4"`, `"500_000"`, `"4.0"` -> int."""
    number = float(str(value).replace("_", ""))
    if isinstance(value, bool) or not number.is_integer():
        raise ValueError("must be a whole number")
    return int(number)


def number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return float(str(value).replace("_", ""))


def rounded(value: float) -> float:
    """The number without the noise of a product: 3e-05, not 2.9999999999999997e-05."""
    return float(f"{value:.12g}")


def switch(value: Any) -> bool:
    word = str(value).lower()
    if word not in (*TRUE, *FALSE):
        raise ValueError("must be true or false")
    return word in TRUE


def text(value: Any) -> str:
    if isinstance(value, (list, dict)):
        raise ValueError("must be one word")
    return str(value)


def words(value: Any) -> list[str]:
    """A word or a list of words."""
    items = value if isinstance(value, list) else [value]
    return [text(item) for item in items]


# ---------------------------------------------------------------------------------------------------
# Columns


def key(
    name: str,
    *older: str,
    parse: Callable[[Any], Any] = text,
    choices: Mapping[str, Any] | None = None,
    scale: float = 1,
    default: Any = ABSENT,
) -> Column:
    """A key with one value.

    Args:
        older: other spellings, which are read but not written.
        choices: the suite's word for each value of the concept; for two words of one value the first is written.
        scale: the key's number is the concept's times this one.
    """
    names = (name, *older)
    back = {value: word for word, value in reversed(list((choices or {}).items()))}

    def read(values: Values, known: Known) -> Any:
        given = next(values[one] for one in names if one in values)
        if choices is None:
            return parse(given) if scale == 1 else parse(given) / scale
        word = text(given)
        if word not in choices:
            raise NoCounterpart(f"{word} is none of {', '.join(choices)}")
        return choices[word]

    def write(value: Any, known: Known) -> Values:
        if choices is None:
            return {name: value if scale == 1 else parse(value * scale)}
        if value not in back:
            raise NoCounterpart(f"{value} is none of {', '.join(map(str, back))}")
        return {name: {"true": True, "false": False}.get(back[value], back[value])}

    return Column(names, read, write, default)


def as_given(name: str, write: Any, default: Any = ABSENT) -> Column:
    """A key whose value is the concept's, and which `write` makes from it."""
    return Column((name,), lambda values, known: values[name], write, default)


def only(value: Any, note: str, *, softly: bool = False, reads: bool = True) -> Column:
    """A suite without a key, where the concept always has one value.

    Args:
        note: what another value means; `{}` is that value.
        softly: another value changes the meaning; else it has no counterpart.
        reads: the value is the suite's own, for other suites that have the key.
    """

    def write(other: Any, known: Known) -> Any:
        if other == value:
            return {}
        if softly:
            return Changed({}, note.format(other))
        raise NoCounterpart(note.format(other))

    return Column((), None, write, value if reads else ABSENT)


def must_be(name: str, value: Any, note: str, *, parse: Callable[[Any], Any] = text, default: Any = ABSENT) -> Column:
    """A key of the source whose value must be the one that Pentagrid always has."""

    def read(values: Values, known: Known) -> Any:
        found = parse(next(iter(values.values())))
        if found != value:
            raise NoCounterpart(note.format(found))
        return found

    return Column((name,), read, lambda _value, _known: {name: value}, default)


def prefixed(column: Column, *prefixes: str) -> Column:
    """The column with its keys under a section; the first prefix is written."""

    def strip(values: Values) -> Values:
        return {
            name.removeprefix(prefix): value
            for name, value in values.items()
            for prefix in prefixes
            if name.startswith(prefix)
        }

    def read(values: Values, known: Known) -> Any:
        assert column.read is not None
        return column.read(strip(values), known)

    def write(value: Any, known: Known) -> Any:
        assert column.write is not None
        found = column.write(value, known)
        if isinstance(found, Changed):
            return Changed({prefixes[0] + name: each for name, each in found.value.items()}, found.note)
        return {prefixes[0] + name: each for name, each in found.items()}

    return Column(
        tuple(prefix + name for name in column.keys for prefix in prefixes),
        read if column.read else None,
        write if column.write else None,
    )


def row(
    name: str,
    parse: Callable[[Any], Any] = text,
    *,
    default: Any = ABSENT,
    off: Any = ABSENT,
    hf: str | Column | None = None,
    **columns: str | Column,
) -> Concept:
    """A concept; a column that is only a word is a key with one value, parsed by `parse`.

    Args:
        default: of every suite whose column is only a word.
        hf: key of config.json, which stands in other suites' own section too.
    """
    made = {
        suite: key(each, parse=parse, default=default) if isinstance(each, str) else each
        for suite, each in columns.items()
    }
    if hf is not None:
        shape = key(hf, parse=parse) if isinstance(hf, str) else hf
        made["hf"] = shape
        made.setdefault("nemo", prefixed(shape, "model.config."))
        made.setdefault("axolotl", prefixed(shape, "model_config.", "overrides_of_model_config."))
    return Concept(name, made, off)


def data_parallel_size(known: Known) -> int | None:
    """Ranks with distinct data; None where neither the sizes nor --world-size say how many."""
    if known.get("dp_shard_size", -1) != -1:
        return known.get("dp_replicate_size", 1) * known["dp_shard_size"]
    if "world_size" not in known:
        return None
    world, others = known["world_size"], known.get("pp_size", 1) * known.get("cp_size", 1) * known.get("tp_size", 1)
    if world % others:
        raise UserError(f"{world} ranks are not a multiple of pp * cp * tp = {others}: give another --world-size")
    return world // others


def has_section(known: Known, section: str) -> bool:
    """Whether the source has keys in this section."""
    return any(name.startswith(f"{section}.") for name in known["keys"])


def first_given(values: Values, names: Sequence[str]) -> Any:
    return next((values[name] for name in names if name in values), ABSENT)
