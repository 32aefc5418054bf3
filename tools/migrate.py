"""Convert a configuration between Pentagrid, NeMo AutoModel, Axolotl and Megatron-LM.

    python tools/migrate.py --from axolotl --to pentagrid run.yaml --world-size 8 --output preset.yaml

The YAML has a comment at each line that says where the value comes from. The report has three lists: carried over,
changed in meaning, without counterpart. docs/migrate.md goes through each suite step by step.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from config.cli import parse_arguments
from config.peers.columns import ABSENT, SUITES, Changed, Column, From, NoCounterpart, Values, is_null, number
from config.peers.megatron import read_megatron
from config.peers.model import MODEL
from config.peers.table import TABLE, find_reason, known_keys
from config.schema import ModelConfig, TrainingConfig, fields_of_flags
from config.validate import check_sizes, resolve_model
from tools.hf.config import list_ends, model_flags, read_config
from tools.hf.tokenizer import TOKENIZER_FILES, find_end_token
from utils.errors import OneLineParser, UserError, run_tool
from utils.files import parse_json, read_text, write_synced
from utils.logger import escape, one_line
from utils.plain_yaml import read_mapping

SOURCES, TARGETS = ("nemo", "axolotl", "megatron", "pentagrid"), ("nemo", "axolotl", "pentagrid")
MODEL_KEYS = {
    "nemo": ("model.pretrained_model_name_or_path", "model.config.pretrained_model_name_or_path"),
    "axolotl": ("base_model",),
}
UNCHANGED = "nothing to set there"
COUNT_STEPS = "steps = epochs * samples of an epoch / global batch; the banner of a short run shows the samples"
OFF = ("false", "no", "off", "none", "0", "0.0")
CAUSAL_RECIPES = ("TrainFinetuneRecipeForNextTokenPrediction", "BenchmarkingRecipeForNextTokenPrediction")


def as_line(value: object) -> str:
    """The value's text in one line, safe for a terminal."""
    return escape(" ".join(str(value).split()))


@dataclass
class Report:
    """What became of each key.

    Attributes:
        carried, changed, lost: a line of text each.
        folded: what is carried over without a change -> the settings, printed in one line.
    """

    carried: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    folded: dict[str, list[str]] = field(default_factory=dict)

    def fold(self, what: str, setting: str) -> None:
        self.folded.setdefault(what, []).append(setting)

    def __str__(self) -> str:
        others = (*self.carried, *self.changed, *self.lost)
        told = {
            what: [one for one in settings if what != UNCHANGED or not any(line.startswith(one) for line in others)]
            for what, settings in self.folded.items()
        }
        folded = [f"{what}: {', '.join(settings)}" for what, settings in told.items() if settings]
        number = len(self.carried) + sum(map(len, told.values()))
        lists = (
            (f"carried over: {number}", [*self.carried, *folded]),
            (f"changed in meaning: {len(self.changed)}", self.changed),
            (f"without counterpart: {len(self.lost)}", self.lost),
        )
        return "\n".join(line for title, lines in lists for line in (title, *(f"  {as_line(each)}" for each in lines)))


@dataclass
class Source:
    """Keys of a configuration. Attributes: model, of a preset: with train.py's defaults."""

    suite: str
    values: Values
    model: ModelConfig | None = None


# ---------------------------------------------------------------------------------------------------
# Reading


def flatten(section: Mapping[str, Any], prefix: str = "") -> Values:
    """`{a: {b: 1}}` -> `{"a.b": 1}`; lists stay values."""
    found: Values = {}
    for name, value in section.items():
        if isinstance(value, Mapping) and value:
            found |= flatten(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def read_source(suite: str, file: str, report: Report) -> Source:
    """The keys of a file that are given.

    Raises:
        UserError: no configuration of that suite, or one that trains no causal language model of text.
    """
    model = None
    if suite == "megatron":
        values, notes = read_megatron(Path(file))
        report.lost += notes
    elif suite == "pentagrid":
        given = {name.replace("-", "_") for name in read_mapping(Path(file), f"--config {file}")}
        config = parse_arguments(["--config", file])
        model = config.model
        resolve_model(model, config.parallel.tp_size, None)
        values = {name: getattr(getattr(config, group), name) for group, name, _ in fields_of_flags() if name in given}
    else:
        values = flatten(read_mapping(Path(file), file))
    empty = sorted(name for name, value in values.items() if is_null(value))
    for name in empty:
        report.fold("empty, as if left out", name)
    values = {name: value for name, value in values.items() if name not in empty}
    refuse_other_trainings(suite, file, values)
    return Source(suite, values, model)


def refuse_other_trainings(suite: str, file: str, values: Values) -> None:
    """Raises UserError: vision, audio, diffusion, distillation, retrieval, preferences or rewards."""
    if suite == "nemo":
        model = str(values.get("model._target_", "none"))
        usual = CAUSAL_RECIPES[0] if "CausalLM" in model else f"without a name, of a model {model}"
        recipe = str(values.get("recipe", values.get("recipe._target_", usual))).rsplit(".", 1)[-1]
        if recipe not in CAUSAL_RECIPES:
            raise UserError(f"{file}: recipe {recipe}; only {CAUSAL_RECIPES[0]} has a counterpart")
    if suite == "axolotl":
        if "base_model" not in values:
            raise UserError(f"{file}: no configuration of Axolotl (no base_model)")
        kind = next((name for name in ("rl", "reward_model", "process_reward_model") if name in values), None)
        if kind is not None and str(values[kind]).lower() not in ("false", "no"):
            raise UserError(f"{file}: {kind} {values[kind]}: Pentagrid and NeMo's recipe train on the next token only")
    if suite == "megatron" and "num_layers" not in values:
        raise UserError(f"{file}: no arguments of Megatron-LM's pretrain_gpt.py (no --num-layers)")


@dataclass
class ModelFolder:
    """What a Hugging Face folder says. Attributes: shape, tokenizer: concepts or flags and their values."""

    file: Path
    shape: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, str] = field(default_factory=dict)


def read_model_folder(source: Source, folder: str | None, report: Report) -> ModelFolder | None:
    """The model's config.json and tokenizer, as tools/convert_hf.py import reads them; None: no folder here."""
    if source.suite not in MODEL_KEYS:
        if folder is not None:
            raise UserError(f"--model {folder}: {SUITES[source.suite]}'s flags have the model's shape")
        return None
    named = next((str(source.values[name]) for name in MODEL_KEYS[source.suite] if name in source.values), None)
    where = folder or named
    if where is None or not (folder or os.path.isdir(where)):
        return None
    found = ModelFolder(Path(where, "config.json"))
    try:
        said = parse_json(read_text(found.file.resolve()))
    except OSError as error:
        raise UserError(f"--model {where}: {found.file}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{found.file}: not JSON ({one_line(error)})") from error
    try:
        found.shape = model_flags(read_config(said, str(found.file)))
        if dropout := said.get("attention_dropout"):
            found.shape["attention_dropout"] = number(dropout)
    except (UserError, ValueError) as error:
        report.lost.append(f"model's shape: {one_line(error)}")
    file = next((path for name in TOKENIZER_FILES if (path := Path(where, name)).is_file()), None)
    if file is not None:
        found.tokenizer = {"tokenizer_model": str(file)}
        if file.suffix == ".json" and isinstance(said, dict) and (ends := list_ends(said)):
            with suppress(UserError):  # train.py then looks for a usual name, and refuses without one
                found.tokenizer["tokenizer_eod"] = find_end_token(file, ends[0])
    return found


# ---------------------------------------------------------------------------------------------------
# Converting


@dataclass
class Concepts:
    """Values of concepts and where they come from."""

    known: dict[str, Any]
    origin: dict[str, str] = field(default_factory=dict)
    by_default: set[str] = field(default_factory=set)
    from_folder: set[str] = field(default_factory=set)


def read_concepts(source: Source, given: Mapping[str, Any], folder: ModelFolder | None, report: Report) -> Concepts:
    """The source's keys as concepts; keys without a row are listed."""
    config_class = str(source.values.get("model.config._target_", ""))
    concepts = Concepts({"keys": frozenset(source.values), "config_class": config_class, **given})
    if source.model is not None and "hf_model" not in given:  # other suites' defaults are another model
        shape = {concept.name: getattr(source.model, concept.name, None) for concept in MODEL}
        shape = {name: value for name, value in shape.items() if value is not None and name not in source.values}
        concepts.known |= shape
        concepts.origin |= dict.fromkeys(shape, f"{SUITES[source.suite]}'s default")
        concepts.by_default |= shape.keys()
    if folder is not None:
        concepts.known |= {**folder.shape, "folder": str(folder.file.parent), "folder_tokenizer": folder.tokenizer}
        concepts.from_folder |= folder.shape.keys()
        concepts.origin |= dict.fromkeys(folder.shape, str(folder.file))
    consumed: set[str] = set()
    for concept in TABLE:
        column = concept.columns.get(source.suite)
        if column is None:
            continue
        names = [name for name in column.keys if name in source.values]
        consumed |= set(names)
        if names:
            read_one(concept.name, column, names, source, concepts, report)
        elif concept.name not in concepts.known:
            take_default(concept.name, column, source.suite, concepts, report)
    for name in source.values:
        if name not in consumed:
            list_unknown(source, name, report)
    return concepts


def take_default(concept: str, column: Column, suite: str, concepts: Concepts, report: Report) -> None:
    said = f"{SUITES[suite]}'s default"
    try:
        default = column.default(concepts.known) if callable(column.default) else column.default
    except NoCounterpart as reason:
        report.lost.append(f"{concept}, {said}: {reason}")
        return
    if isinstance(default, From):
        default, said = default
    if isinstance(default, Changed):
        report.changed.append(f"{concept}, {said}: {default.note}")
        default = default.value
    if default is not ABSENT:
        concepts.known[concept] = default
        concepts.origin[concept] = said
        concepts.by_default.add(concept)


def read_one(
    concept: str, column: Column, names: list[str], source: Source, concepts: Concepts, report: Report
) -> None:
    values = {name: source.values[name] for name in names}
    said = ", ".join(f"{name} {show(value)}" for name, value in values.items())
    assert column.read is not None, concept
    try:
        value = column.read(values, concepts.known)
    except NoCounterpart as reason:
        report.lost.append(f"{said}: {reason}")
        return
    except UserError:
        raise
    except (ValueError, TypeError, IndexError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"{said}: {one_line(error)}") from error
    if isinstance(value, Changed):
        report.changed.append(f"{said}: {value.note}")
        value = value.value
    if value is ABSENT:
        return
    concepts.known[concept] = value
    concepts.origin[concept] = said
    concepts.from_folder.discard(concept)


def list_unknown(source: Source, name: str, report: Report) -> None:
    """A key without a row: without effect on the mathematics, off, without counterpart, or unknown."""
    value = source.values[name]
    reason, is_needed = find_reason(source.suite, name)
    said = f"{name} {show(value)}"
    if reason is not None and not is_needed:
        report.fold(f"needs no counterpart ({reason})", said)
    elif reason is not None and str(value).lower() in OFF:
        report.fold("off in both", said)
    else:
        near = difflib.get_close_matches(name, sorted(known_keys(source.suite)), n=1, cutoff=0.9 if reason else 0.6)
        guess = f"; did you mean {near[0]}?" if near and source.suite != "pentagrid" else ""
        report.lost.append(f"{said}: {reason or 'unknown key'}{guess}")


def write_keys(target: str, concepts: Concepts, report: Report) -> tuple[Values, dict[str, str]]:
    """The target's keys and values, and the comment of each."""
    found: Values = {}
    comments: dict[str, str] = {}
    for concept in TABLE:
        name = concept.name
        if name not in concepts.origin or (name in concepts.from_folder and target != "pentagrid"):
            continue  # the folder goes along
        value, said, column = concepts.known[name], concepts.origin[name], concept.columns.get(target)
        is_default = name in concepts.by_default
        full = f"{name} {show(value)}, {said}" if is_default else said
        if value == concept.off or (column is not None and column.write is None):
            if name in concepts.from_folder:
                report.fold(f"shape of {said}", f"{name} {show(value)}")
            elif not is_default:
                report.fold(UNCHANGED, said)
            continue
        if is_default and column is None:
            report.fold(f"{said}, without a setting there", f"{name} {show(value)}")
            continue
        try:
            if column is None or column.write is None:
                raise NoCounterpart("no such setting there")
            written = column.write(value, concepts.known)
        except NoCounterpart as reason:
            report.lost.append(f"{full}: {reason}")
            continue
        note = ""
        if isinstance(written, Changed):
            written, note = written
        words = ", ".join(f"{key} {show(each)}" for key, each in written.items())
        if note:
            report.changed.append(f"{full}{f' -> {words}' if words else ''}: {note}")
        elif name in concepts.from_folder:
            report.fold(f"shape of {said}", words)
        elif not is_default and words:
            report.carried.append(f"{said} -> {words}")
        elif not is_default:
            report.fold(UNCHANGED, said)
        found |= written
        comments |= dict.fromkeys(written, said)
    return found, comments


def show(value: Any) -> str:
    text = " ".join(map(show, value)) if isinstance(value, (list, tuple)) else as_line(value)
    return text if len(text) < 120 else f"{text[:117]}..."


# ---------------------------------------------------------------------------------------------------
# Writing


def as_yaml(value: Any) -> str:
    """A value on one line, quoted where needed."""
    dumped = yaml.safe_dump([value], default_flow_style=True, width=float("inf"), allow_unicode=True)
    return dumped.strip()[1:-1]


def render(values: Values, comments: Mapping[str, str]) -> str:
    """Nested YAML of dotted keys, a comment at each line."""
    tree: dict[str, Any] = {}
    for name in values:
        branch = tree
        *sections, last = name.split(".")
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[last] = name
    lines: list[str] = []

    def walk(branch: Mapping[str, Any], depth: int) -> None:
        for key, below in branch.items():
            if isinstance(below, dict):
                lines.append(f"{'  ' * depth}{key}:")
                walk(below, depth + 1)
            else:
                lines.append(f"{'  ' * depth}{key}: {as_yaml(values[below])}  # {as_line(comments[below])}")

    walk(tree, 0)
    return "\n".join(lines) + "\n"


def preset_text(values: Values) -> Values:
    """Pentagrid's values as a preset has them."""
    parsers = {name: flag for _, name, flag in fields_of_flags()}
    return {
        name.replace("_", "-"): parsers[name].text(value) if parsers[name].parse else value
        for name, value in values.items()
    }


def check_preset(values: Values, world_size: int | None) -> str | None:
    """What train.py says to the preset; None: nothing, or the number of ranks is open.

    Raises:
        UserError: the parser refuses the preset.
    """
    flags = {name.replace("-", "_"): value for name, value in values.items()}
    config = parse_arguments([], flags, source="the converted preset")
    if world_size is None:
        return None
    try:
        check_sizes(config, world_size=world_size, local_world_size=min(8, world_size))
    except UserError as error:
        return one_line(error)
    return None


def finish(target: str, source: Source, concepts: Concepts, report: Report) -> tuple[Values, dict[str, str]]:
    values, comments = write_keys(target, concepts, report)
    if target == "nemo":
        values = {"recipe": CAUSAL_RECIPES[0], **values}
        comments["recipe"] = "the program that reads the recipe"
    if target == "pentagrid":
        comments = {name.replace("_", "-"): said for name, said in comments.items()}
        values = preset_text(values)
        problem = check_preset(values, concepts.known.get("world_size"))
        if problem is not None:
            report.lost.append(f"train.py refuses the preset: {problem}")
    return values, comments


def convert(
    source: str, target: str, file: str, *, world_size: int | None = None, model: str | None = None
) -> tuple[str, Report]:
    """The text of the other suite's YAML, and the report.

    Raises:
        UserError: the file is no configuration of the source, or a value cannot be read.
    """
    report = Report()
    found = read_source(source, file, report)
    given: dict[str, Any] = {} if world_size is None else {"world_size": world_size}
    folder = None
    if source == "pentagrid" and model is not None:
        given["hf_model"] = model
    else:
        folder = read_model_folder(found, model, report)
    concepts = read_concepts(found, given, folder, report)
    concepts.origin |= {"hf_model": "--model"} if "hf_model" in given else {}
    values, comments = finish(target, found, concepts, report)
    said = (
        f"{SUITES[target]}, from {SUITES[source]}'s {as_line(Path(file).name)} by tools/migrate.py; read the report too"
    )
    if target == "pentagrid" and "train_iters" not in concepts.known:
        given_as = concepts.origin.get("epochs", "no number of steps")
        holds = f"train-iters is not set, so train.py takes {TrainingConfig.train_iters}"
        report.changed.append(f"{given_as}: {holds}; {COUNT_STEPS}")
        said += f"\n# train-iters:  # not set: {COUNT_STEPS}"
    if target == "pentagrid" and "num_layers" not in concepts.known:
        said += (
            "\n# num-layers, hidden-size, ...:  # not set: convert again with --model DIR, the folder with config.json"
        )
    return f"# {said}\n{render(values, comments)}", report


def build_parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add(
        "file", metavar="FILE", help="YAML; of Megatron-LM a shell script, a list of arguments, or YAML with MODEL_ARGS"
    )
    add("--from", dest="source", required=True, choices=SOURCES, help="suite of FILE")
    add("--to", dest="target", required=True, choices=TARGETS, help="suite of the result")
    add("--world-size", type=int, help="ranks of the run, where batch sizes depend on them")
    add("--model", metavar="DIR", help="folder with the model's config.json; default: the one that FILE names")
    add("--output", metavar="FILE", help="new file of the YAML; default: standard output")
    add("--report", metavar="FILE", help="new file of the report; default: standard error")
    add("--strict", action="store_true", help="write nothing and exit with 2 if a setting has no counterpart")
    return parser


def main(argv: list[str]) -> int:
    own = build_parser().parse_args(argv)
    if own.source == own.target:
        raise UserError(f"--from {own.source} --to {own.target}: nothing to convert")
    if own.world_size is not None and own.world_size < 1:
        raise UserError(f"--world-size {own.world_size}: must be at least 1")
    for flag, path in (("--output", own.output), ("--report", own.report)):
        if path is not None and os.path.lexists(path):
            raise UserError(f"{flag} {path}: is there already; remove it or give another name")
    text, report = convert(own.source, own.target, own.file, world_size=own.world_size, model=own.model)
    if own.report:
        write_synced(Path(own.report), f"{report}\n")
    else:
        print(report, file=sys.stderr)
    if own.strict and report.lost:
        raise UserError(
            f"--strict: {len(report.lost)} settings of {own.file} have no counterpart; the report lists them"
        )
    if own.output:
        write_synced(Path(own.output), text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
