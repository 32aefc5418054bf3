"""The model of step times against every measurement here and published figures: fit on one half, errors on both.

    python benchmarks/calibration.py [--fit]

Prints every figure, its prediction by the constants in the code, and the error; with --fit first the constants that a
least-squares fit of relative errors finds on the fit half. Constants stand in cp/cost.py (DEVICES) and
planner/step_time.py (SPEEDS). Published figures: benchmarks/published/figures.json; measured ones: benchmarks/results.

The split is a rule on numbers, fixed before any fit: rows of odd number are fitted, rows of even number are held out.
The cells of attention alone are a chessboard, so that each mechanism and each size has cells in both halves.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.cp_attention import draw_lengths
from cp.cost import BACKWARD, DEVICES, Device, Situation, estimate_cost, length_quantiles
from cp.support import AttentionChoice
from model.config import GPTConfig, padded_vocab_size
from planner.step_time import SPEEDS, Job, Speeds, build_machines, estimate_step
from training.flops import training_flops

RESULTS = Path(__file__).parent / "results"
PUBLISHED = Path(__file__).parent / "published" / "figures.json"
CORES = 2  # of the machine that measured benchmarks/results
VOCAB_MULTIPLE = 128
GOAL = 0.15  # of an error
ITERATIONS, DAMPING, STEP = 40, 1e-3, 1e-4  # of the fit; steps are relative


@dataclass(frozen=True)
class Constants:
    """Attributes: devices: of attention, by kind. speeds: of training, by kind."""

    devices: Mapping[str, Device]
    speeds: Mapping[str, Speeds]


@dataclass(frozen=True)
class Case:
    """A figure.

    Attributes:
        section: of `FITTED`.
        measured: seconds; None: not predicted, for the reason in `note`.
    """

    section: str
    number: int
    what: str
    is_fit: bool
    measured: float | None = None
    predict: Callable[[Constants], float] | None = None
    note: str = ""

    def error(self, constants: Constants) -> float | None:
        """Predicted over measured seconds, minus 1."""
        return None if self.predict is None else self.predict(constants) / self.measured - 1  # type: ignore[operator]


# Section -> kind of device, where its constants stand, and each with the value that a data sheet or a count suggests.
# Fitted in this order.
FITTED: dict[str, tuple[str, str, dict[str, float]]] = {
    "attention on GPUs": (
        "cuda",
        "devices",
        dict(flops=6.3e14, tile=128, merge=75, exchange=3e11, network=4e10, collective=1e11),
    ),
    "training on GPUs": (
        "cuda",
        "speeds",
        dict(bf16=0.7, fp8=0.6, flash2=0.55, sdpa=0.4, element=200, tp=0.5),
    ),
    "attention on CPUs": ("cpu", "devices", dict(flops=6e10, ring=1.5e9)),
    "training on CPUs": ("cpu", "speeds", dict(fp32=0.6, element=200, threads=1.8)),
}
PRIOR_SPREAD, ERROR_SPREAD = math.log(2), 0.1  # of a constant about its suggested value, of a figure about the model
IN_CODE = Constants(DEVICES, SPEEDS)


# ---------------------------------------------------------------------------------------------------
# Cases


@cache
def published() -> dict[str, Any]:
    return json.loads(PUBLISHED.read_text())


def _choice(name: str, cp_size: int, *, a2a_size: int = 1, layout: str = "zigzag") -> AttentionChoice:
    """Args: name: backend and method."""
    backend, method = name.split()
    return AttentionChoice(
        backend=backend, method=method, qkv_format="thd", layout=layout, cp_size=cp_size, a2a_size=a2a_size
    )


def gpu_attention_cases() -> Iterator[Case]:
    """A chart's bar is a cell; seconds of a forward and a backward pass of a layer come from its two TFLOP/s."""
    nearest = {  # of our methods; the groups of USP's exchange lie within a node
        "ring p2p": lambda n: _choice("native p2p", n),
        "all-gather": lambda n: _choice("te all_gather", n),
        "Ulysses": lambda n: _choice("native a2a", n, a2a_size=n),
        "USP": lambda n: _choice("native a2a+p2p", n, a2a_size=4 if n == 8 else 8),
        "Megatron hybrid CP": lambda n: _choice("native p2p", n, layout="hybrid"),
        "Magi native": lambda n: _choice("native all_gather", n, layout="hybrid"),
    }
    tokens, heads, groups, width = 8192, 64, 8, 128
    for index, cell in enumerate(published()["attention"]["cells"]):
        gpus, row = cell["gpus"], cell["gpus"] * tokens
        lengths = length_quantiles(None, row // 4) if cell["documents"] else (float(row),)
        shape = dict(device="cuda", row_length=row, lengths=lengths, heads=heads, groups=groups, head_dim=width, item=2)
        flops = 4 * heads * width * tokens * statistics.fmean(lengths) / 2
        seconds = flops / 1e12 * (1 / cell["forward"] + BACKWARD / cell["backward"])
        what = f"{cell['mechanism']}, {gpus} GPUs, {'packed' if cell['documents'] else 'one document'}"
        choice, situation = nearest[cell["mechanism"]](gpus), Situation(**shape)
        predict = _predict_attention(situation, choice)
        yield Case("attention on GPUs", index + 1, what, (index // 4 + index % 4) % 2 == 0, seconds, predict)


def _predict_attention(
    situation: Situation, choice: AttentionChoice, *, imbalance: float = 1.0, ranks_a_core: float = 1.0
) -> Callable[[Constants], float]:
    """Ranks that share cores slow each other; work of a rank that waits is done meanwhile."""

    def predict(constants: Constants) -> float:
        device = constants.devices[situation.device]
        cost = estimate_cost(situation, choice, device, imbalance=max(imbalance, ranks_a_core))
        return cost.kernels + (cost.passes + cost.transfers) * ranks_a_core

    return predict


def gpu_training_cases() -> Iterator[Case]:
    for row in published()["training"]:
        number, is_fit = row["row"], row["row"] % 2 == 1
        if "excluded" in row:
            yield Case("training on GPUs", number, row["source"], is_fit, note=row["excluded"])
            continue
        shape, seq_length, is_packed = published()["models"][row["model"]], row["seq_length"], row.get("documents")
        architecture = _architecture(**shape)
        job = Job(
            architecture=architecture,
            seq_length=seq_length,
            lengths=length_quantiles(None, seq_length) if is_packed else (float(seq_length),),
            dp=row["gpus"] // (row["tp"] * row["pp"] * row["cp"]),
            choice=_choice(row["method"], row["cp"]),
            **{
                name: row[name]
                for name in ("dtype", "microbatches", "tp", "pp", "virtual_stages", "recompute", "reshard", "kernel")
            },
        )
        axes = " ".join(f"{axis}{row[axis]}" for axis in ("tp", "pp", "cp") if row[axis] > 1)
        length = f"{seq_length // 1024}K"
        what = f"{row['gpus']} {row['machine']}, {row['model']} {row['dtype'].upper()} {length} {axes}".strip()
        yield Case(
            "training on GPUs",
            number,
            what,
            is_fit,
            _published_seconds(row, job),
            partial(_seconds, job, row["machine"]),
            row.get("assumed", ""),
        )


def _published_seconds(row: Mapping[str, Any], job: Job) -> float:
    """Of a step. Figures of the full square count twice the FLOPs of causal attention."""
    if row["unit"] == "seconds a step":
        return float(row["figure"])
    tokens_a_second = row["figure"]
    if row["unit"] == "TFLOP/s, square":
        square = training_flops(job.architecture, tokens=1, squared_lengths=2 * job.seq_length)
        tokens_a_second = row["figure"] * 1e12 / square
    return job.tokens / job.ranks / tokens_a_second


def _seconds(job: Job, machine: str, constants: Constants) -> float:
    return estimate_step(job, build_machines(constants.devices, constants.speeds)[machine]).total


def _architecture(vocab_size: int, **shape: Any) -> GPTConfig:
    return GPTConfig(vocab_size=vocab_size, padded_vocab_size=padded_vocab_size(vocab_size, VOCAB_MULTIPLE), **shape)


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def cpu_attention_cases() -> Iterator[Case]:
    found: dict[str, tuple[float | None, Callable[[Constants], float] | None, str]] = {}
    shape: dict[str, Any] = dict(device="cpu", heads=4, groups=2, head_dim=64)
    for row in _read("cp_attention_cpu_fp32.json")["1"]:
        choice, seq_length = AttentionChoice(**row["choice"]), row["seq_length"]
        lengths = draw_lengths(seq_length) if choice.qkv_format == "thd" else (seq_length,)
        quantiles = length_quantiles(np.array(lengths), seq_length)
        situation = Situation(row_length=seq_length, lengths=quantiles, item=4, **shape)
        alone = replace(choice, backend="native", method="p2p", layout="zigzag", cp_size=1, a2a_size=1)
        found[f"one rank, {choice.qkv_format} {seq_length}"] = (
            row["one_rank_s"][1],
            _predict_attention(situation, alone),
            "",
        )
        what = (
            f"{choice.backend} {choice.method} {choice.layout}, cp {choice.cp_size}, {choice.qkv_format} {seq_length}"
        )
        if row["reference_kernels"]:
            found[what] = (None, None, "over a slower kernel, that of the reference")
            continue
        ranks = dict(imbalance=row["balance"], ranks_a_core=max(1.0, choice.cp_size / CORES))
        found[what] = (row["forward_backward_s"], _predict_attention(situation, choice, **ranks), "")
    for row in _read("cp_attention_vs_ring_8192.json")["2"]:
        if row["what"] == "forward+backward":
            situation, cp_size = Situation(row_length=8192, lengths=(8192.0,), item=2, **shape), row["cp_size"]
            predict = _predict_attention(situation, _choice("native p2p", cp_size), ranks_a_core=cp_size / CORES)
            for name in ("native", "ring_flash"):
                found[f"{name} zigzag, cp {cp_size}, bf16 8192"] = (row[f"{name}_s"], predict, "")
    for index, (what, (measured, prediction, note)) in enumerate(found.items()):
        yield Case("attention on CPUs", index + 1, what, index % 2 == 0, measured, prediction, note)


def cpu_training_cases() -> Iterator[Case]:
    """Steps of our programs: train_step.py in three runs, model_parallel.py, pad_rows.py."""
    found: list[tuple[str, float, Job]] = []
    base: dict[str, Any] = dict(dtype="fp32", dp=1)
    shape = dict(hidden_size=256, ffn_hidden_size=688)
    wide = _architecture(
        num_layers=4, num_attention_heads=8, num_query_groups=4, kv_channels=32, vocab_size=32000, **shape
    )
    plain = dict(num_layers=6, num_attention_heads=4, num_query_groups=2, kv_channels=64, **shape)
    alone, pair = _choice("native p2p", 1), _choice("native p2p", 2)
    for run in (1, 2, 3):
        result = _read(f"train_step_cpu_{run}.json")
        step = Job(
            architecture=wide, seq_length=1024, lengths=(1024.0,), choice=alone, microbatches=2, threads=2, **base
        )
        first, second = (figure["seconds"] for figure in result["figures"][:2])
        times = {"one process": first["ours"], "one process again": second["one process"], "cp 2": second["cp 2"]}
        for name, rounds in times.items():
            job = replace(step, choice=pair, threads=1) if name == "cp 2" else step
            found.append((f"train_step run {run}, {name}", statistics.median(rounds) / result["steps per round"], job))
    step = Job(
        architecture=_architecture(vocab_size=4096, **plain),
        seq_length=1024,
        lengths=(1024.0,),
        choice=alone,
        microbatches=8,
        **base,
    )
    layouts = {
        "one process of 2 threads": replace(step, threads=2),
        "tp 2": replace(step, tp=2),
        "pp 2, 1f1b": replace(step, pp=2),
        "pp 2, gpipe": replace(step, pp=2),
        "pp 2, interleaved": replace(step, pp=2, virtual_stages=2),
        "cp 2": replace(step, choice=pair),
    }
    for figure in _read("model_parallel_cpu.json")["figures"]:
        if figure["what"] in layouts:  # zero_bubble is no schedule of the suite any more
            seconds = statistics.median(figure["seconds"])
            found.append((f"model_parallel, {figure['what']}", seconds, layouts[figure["what"]]))
    corpora = {"standard library": (4096, 2048.0), "documents of 0.7 of a row": (257, 0.7 * 2048)}
    for corpus, (vocab_size, length) in corpora.items():
        result = _read("pad_rows_cpu.json")[corpus]
        for rows, speeds in result["tokens_per_s"].items():
            tokens = 2048 if rows == "full" else round(2048 * result["filled"])
            job = replace(
                step, architecture=_architecture(vocab_size=vocab_size, **plain), lengths=(length,), choice=pair
            )
            job = replace(job, seq_length=tokens, microbatches=2)
            seconds = 2 * 2048 * result["filled"] / statistics.median(speeds)
            found.append((f"pad_rows {rows}, {corpus}", seconds, job))
    for index, (what, seconds, job) in enumerate(found):
        yield Case("training on CPUs", index + 1, what, index % 2 == 0, seconds, partial(_seconds, job, "cpu"))


@cache
def all_cases() -> tuple[Case, ...]:
    return (*gpu_attention_cases(), *gpu_training_cases(), *cpu_attention_cases(), *cpu_training_cases())


def predicted(section: str, *, is_fit: bool) -> list[Case]:
    """The cases of a section and half that have a prediction."""
    return [c for c in all_cases() if c.section == section and c.is_fit == is_fit and c.predict is not None]


# ---------------------------------------------------------------------------------------------------
# Fit


def with_values(constants: Constants, section: str, values: Sequence[float]) -> Constants:
    """The constants with a section's fitted ones replaced."""
    kind, place, names = FITTED[section]
    table = getattr(constants, place)
    changed = replace(table[kind], **dict(zip(names, map(float, values), strict=True)))
    return replace(constants, **{place: {**table, kind: changed}})


def values_of(constants: Constants, section: str) -> list[float]:
    kind, place, names = FITTED[section]
    return [getattr(getattr(constants, place)[kind], name) for name in names]


def fit(section: str, constants: Constants, cases: Sequence[Case]) -> Constants:
    """Least squares of the logarithms of predicted / measured over these cases (Levenberg, Marquardt).

    A constant that the cases leave open stays at its suggested value.
    """
    suggested = np.log(list(FITTED[section][2].values()))

    def residuals(logs: np.ndarray) -> np.ndarray:
        trial = with_values(constants, section, np.exp(logs).tolist())
        errors = [math.log(1 + case.error(trial)) for case in cases]  # type: ignore[operator]
        return np.append(np.array(errors) / ERROR_SPREAD, (logs - suggested) / PRIOR_SPREAD)

    logs, damping = suggested, DAMPING
    now = residuals(logs)
    for _ in range(ITERATIONS):
        slopes = np.stack([(residuals(logs + STEP * row) - now) / STEP for row in np.eye(len(logs))], 1)
        normal = slopes.T @ slopes
        step = np.linalg.solve(normal + damping * np.eye(len(logs)), -slopes.T @ now)
        there = residuals(logs + step)
        if there @ there < now @ now:
            logs, now, damping = logs + step, there, damping / 3
        else:
            damping *= 4
    return with_values(constants, section, np.exp(logs).tolist())


def fit_all(start: Constants = IN_CODE) -> Constants:
    """Every section's constants, each fitted on its fit half with those before it."""
    for section in FITTED:
        start = fit(section, start, predicted(section, is_fit=True))
    return start


# ---------------------------------------------------------------------------------------------------
# Print


def summary(section: str, constants: Constants = IN_CODE) -> dict[str, tuple[int, int, float, float]]:
    """Half -> number of cases, of those within `GOAL`, median and worst of the errors' sizes."""
    found = {}
    for name, is_fit in (("fit", True), ("held out", False)):
        errors = [abs(case.error(constants)) for case in predicted(section, is_fit=is_fit)]  # type: ignore[arg-type]
        found[name] = (len(errors), sum(e <= GOAL for e in errors), statistics.median(errors), max(errors))
    return found


def summary_table() -> str:
    lines = [
        f"| figures | constants | fit: within {GOAL:.0%} | median | worst "
        f"| held out: within {GOAL:.0%} | median | worst |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for section, (_, _, names) in FITTED.items():
        halves = summary(section)
        cells = " | ".join(f"{near} of {n} | {median:.1%} | {worst:.1%}" for n, near, median, worst in halves.values())
        lines.append(f"| {section} | {len(names)} | {cells} |")
    return "\n".join(lines)


def format_seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def cases_table() -> str:
    """Every figure, by section."""
    blocks = []
    for section in FITTED:
        lines = [f"### {section[0].upper()}{section[1:]}", "", "| # | figure | half | measured | predicted | error |"]
        lines.append("|---|---|---|---|---|---|")
        for case in (c for c in all_cases() if c.section == section):
            what = case.what + (f" ({case.note})" if case.note else "")
            if case.predict is None or case.measured is None:
                lines.append(f"| {case.number} | {what} | - | - | - | not predicted |")
                continue
            seconds, error = case.predict(IN_CODE), case.error(IN_CODE)
            times = f"{format_seconds(case.measured)} | {format_seconds(seconds)} | {error:+.1%}"
            lines.append(f"| {case.number} | {what} | {'fit' if case.is_fit else 'held out'} | {times} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit the constants, and print them beside those in the code")
    if parser.parse_args(argv).fit:
        found = fit_all()
        for section, (kind, place, names) in FITTED.items():
            for name, new, old in zip(names, values_of(found, section), values_of(IN_CODE, section), strict=True):
                print(f"{section:20} {place}[{kind!r}].{name:11} fitted {new:10.4g}   in the code {old:10.4g}")
        for section in FITTED:
            halves = summary(section, found).items()
            print(section, {half: f"{near} of {n}, {m:.1%}, {w:.1%}" for half, (n, near, m, w) in halves})
    print(summary_table(), cases_table(), sep="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
