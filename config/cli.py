"""The command line and YAML presets, made from `config/schema.py`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

from config.schema import Flag, RunConfig, TrainingConfig, fields_of_flags, option
from utils.errors import OneLineParser, UserError
from utils.plain_yaml import read_mapping

# Model and training that learn the standard library in minutes on two CPU cores.
DEMO_PRESET = Path(__file__).resolve().parents[1] / "configs" / "standard_library.yaml"

EXAMPLES = {
    "parallel": "torchrun --nproc-per-node 8 train.py --cp-size 4 --dp-shard-size 2",
    "model": "train.py --num-layers 12 --hidden-size 768 --num-attention-heads 12 --qk-norm",
    "data": "train.py --data-path 0.7 corpora/web 0.3 corpora/code --seq-length 8192",
    "training": "train.py --config configs/llama3_1b.yaml --train-iters 12000 --lr 3e-4",
    "checkpoint": "train.py --run-dir runs/one --resume --save-interval 500 --keep-checkpoints 3",
    "logging": "train.py --log-interval 50 --timing-log-level 1",
}


def build_parser() -> OneLineParser:
    """All flags of train.py, in the groups of `RunConfig`."""
    parser = OneLineParser(
        prog="train.py",
        usage="launch/local.sh RANKS [--config FILE.yaml] [FLAG ...]",
        description="Pretrain a GPT on packed documents. Each group of flags begins with an example.",
        epilog="docs/flags.md has the same, and which values a resumed run may change.",
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="flags from a YAML file (keys are the flags without leading dashes), or several, of which the last wins; "
        "the command line wins over files; default: configs/standard_library.yaml without --data-path",
    )
    defaults, groups, hints = RunConfig(), {}, {}
    for group in dataclasses.fields(RunConfig):
        kind = type(getattr(defaults, group.name))
        groups[group.name] = parser.add_argument_group(kind.__doc__, f"  {EXAMPLES[group.name]}")
        hints[group.name] = typing.get_type_hints(kind)
    for group_name, name, flag in fields_of_flags():
        default = getattr(getattr(defaults, group_name), name)
        groups[group_name].add_argument(option(name), **_argparse_options(hints[group_name][name], default, flag))
    return parser


def _argparse_options(hint: Any, default: Any, flag: Flag) -> dict[str, Any]:
    """Keyword arguments of `add_argument` for a field of this type."""
    text = flag.describe_default(default)
    known = f" (default: {text})" if text and "default: " not in flag.help else ""
    options: dict[str, Any] = {"help": flag.help + known, "default": default}
    if isinstance(hint, types.UnionType):  # X | None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if hint is bool:
        return options | {"action": argparse.BooleanOptionalAction}  # --no-flag overrules a preset
    options |= {"metavar": flag.metavar, "choices": flag.choices or None}
    if flag.parse:
        return options | {"default": flag.text(default) if default else None}
    if typing.get_origin(hint) is list:
        return options | {"nargs": "+", "type": typing.get_args(hint)[0]}
    return options | {"type": hint}


def _read_preset(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """The file's keys as command-line flags: argparse checks their types and choices."""
    where = f"--config {path}"
    return _as_flags(where, read_mapping(Path(path), where, "flags to values"), parser)


def _as_flags(where: str, values: Mapping[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    """The keys of a file as words of a command line."""
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    flags: list[str] = []
    seen: dict[str, str] = {}
    for key, value in values.items():
        action = actions.get(key.replace("-", "_"))
        if action is None:
            raise UserError(f"{where}: unknown key {short_repr(key)}{_did_you_mean(key, actions)}")
        if action.dest in seen:
            raise UserError(f"{where}: {key} and {seen[action.dest]} are the same flag")
        seen[action.dest] = key
        flags += _as_words(f"{where}: {key}", action, value)
    return flags


def _as_words(where: str, action: argparse.Action, value: Any) -> list[str]:
    """One key of a file as words of a command line."""
    flag = action.option_strings[0]
    if action.nargs == 0:
        if value not in ("true", "false"):
            raise UserError(f"{where} must be true or false, not {short_repr(value)}")
        return [flag if value == "true" else action.option_strings[1]]
    if action.nargs == "+" and isinstance(value, list) and value and all(isinstance(w, str) and w for w in value):
        stray = next((word for word in value if word.startswith("-")), None)
        if stray is not None:  # argparse would read the word as another flag
            raise UserError(f"{where} must be values, not the flag {short_repr(stray)}")
        return [flag, *value]
    if not isinstance(value, str) or not value or value in ("null", "~"):
        raise UserError(f"{where} must be one value, not {short_repr(value)}")
    return [f"{flag}={value}"]


def _as_text(value: Any) -> Any:
    """A value of JSON as YAML has it: words, or a list of words."""
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, (int, float)) else value


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    from config.aliases import find_counterpart  # read for a refusal only

    found = find_counterpart(word)
    if found is not None:
        return f", a name of {found[0]}; Pentagrid has {found[1]}"
    names = [name.lstrip("-").replace("-", "_") for name in known]
    close = difflib.get_close_matches(word.lstrip("-").replace("-", "_"), names, n=1)
    return f"; did you mean {option(close[0])}?" if close else ""


def add_demo_preset(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags of train.py with `DEMO_PRESET` where no flag names data or --config, and a note on that.

    Raises:
        UserError: as `parse_arguments`.
    """
    config = parse_arguments(argv)
    if config.data.data_path or config.data.valid_data_path or any(word.split("=")[0] == "--config" for word in argv):
        return list(argv), []
    steps = ["--train-iters", str(TrainingConfig.train_iters)]  # --train-tokens would contradict the preset's
    own = [] if config.training.train_tokens is None else steps
    return ["--config", str(DEMO_PRESET), *own, *argv], [f"--config configs/{DEMO_PRESET.name}"]


def parse_run(argv: Sequence[str]) -> tuple[RunConfig, list[str]]:
    """The flags of train.py, and a note on defaults, as `add_demo_preset` gives them."""
    words, notes = add_demo_preset(argv)
    return parse_arguments(words), notes


def parse_arguments(
    argv: Sequence[str], defaults: Mapping[str, Any] | None = None, *, source: str = "defaults"
) -> RunConfig:
    """The flags of a run: those of YAML presets, overruled by the command line. `resolve` comes next.

    Args:
        defaults: replace the flags' own, by field name, as `RunConfig.flags` returns them of another run.
        source: file of the defaults, for errors.

    Raises:
        UserError: one line for an unknown flag or key, a wrong type or choice.
    """
    parser, given = build_parser(), defaults or {}
    preset_parser = OneLineParser(add_help=False)
    preset_parser.add_argument("--config", action="append", default=[])
    flags = _as_flags(
        source, {name: _as_text(value) for name, value in given.items() if value not in (None, "")}, parser
    )
    for preset in preset_parser.parse_known_args(argv)[0].config:
        flags += _read_preset(preset, parser)
    parser.refuse_repeated_lists(argv)
    found, unknown = parser.parse_known_args([*flags, *argv])
    if unknown:
        guess = _did_you_mean(unknown[0].split("=")[0], parser._option_string_actions)
        raise UserError(f"unknown flag {unknown[0]}{guess}")
    config = RunConfig()
    for group, name, flag in fields_of_flags():
        value = getattr(found, name)
        if flag.parse:
            if value is None:
                continue  # the field's default
            value = flag.parse(value)
        setattr(getattr(config, group), name, value)
    return config
