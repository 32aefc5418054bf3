"""One HTML file that tells how runs went: curves, a summary, the configuration; several runs are overlaid.

    python tools/report.py RUN [RUN ...] [--out FILE]

RUN is a run's folder, with metrics.jsonl and, where train.py wrote them, config.json and status.json. The file holds all it needs,
opens from disk in any browser, and is written to the first run's report.html unless `--out` says otherwise. Needs Python only, no packages.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.charts import COLOURS, MOST_POINTS, Chart, Curve, Point, downsample, render, smooth
from utils.errors import UserError

TEMPLATE = Path(__file__).with_suffix(".html")
SMOOTHED_SHARE = 1 / 40  # of the steps of the longest run is what a smooth curve averages over
MOST = 1e300  # of a record's finite numbers: what is made of many, sums and scaled values, stays a float
MOST_COUNTED = 2**53  # steps, tokens in all: the whole numbers that a float tells apart
LARGE = (640, 300)  # view box of the charts of the loss


@dataclass(frozen=True)
class Measure:
    """A field of a step's record and how it is drawn: times `factor`, in `unit`."""

    field: str
    title: str
    unit: str = ""
    factor: float = 1.0
    from_zero: bool = True
    may_log: bool = False


SECTIONS = {
    "Optimisation": [
        Measure("grad_norm", "Gradient norm", may_log=True),
        Measure("lr", "Learning rate"),
        Measure("skipped_steps", "Steps skipped so far"),
    ],
    "Speed": [
        Measure("tokens_per_s", "Throughput", "tokens/s"),
        Measure("tflops_per_rank", "Arithmetic", "TFLOP/s a rank"),
        Measure("mfu", "MFU", "% of the peak", 100),
        Measure("step_time_s", "Step time", "s"),
        Measure("data_share", "Waiting for data", "% of the step", 100),
        Measure("cp_wait_share", "Attention waiting for other cp ranks", "% of the step", 100),
    ],
    "Memory and packing": [
        Measure("max_memory_bytes", "Peak memory", "GiB", 2**-30),
        Measure("packing_efficiency", "Packing efficiency", "% of the row are tokens", 100, from_zero=False),
        Measure("cp_balance", "CP balance", "busiest cp rank's attention work / mean", from_zero=False),
    ],
}
UNSMOOTHED = {"lr", "max_memory_bytes", "skipped_steps"}
OFTEN_ZERO = {"skipped_steps"}  # worth a chart only where it is not


@dataclass
class Run:
    """What a run's folder tells.

    Attributes:
        steps, validations, timers: records by step, in order.
        broken_lines: numbers of the lines of metrics.jsonl that are no record.
        config, status: the files' contents, or why there are none.
    """

    folder: Path
    name: str
    steps: dict[int, dict[str, Any]]
    validations: dict[int, dict[str, Any]]
    timers: dict[int, dict[str, Any]]
    broken_lines: list[int]
    config: dict[str, Any] | str
    status: dict[str, Any] | str

    def values(self, field: str) -> list[tuple[int, float]]:
        """(step, value) wherever the field holds a number."""
        found = ((step, number(record.get(field))) for step, record in self.steps.items())
        return [(step, value) for step, value in found if value is not None]

    def tokens_seen(self) -> dict[int, float]:
        """Step -> tokens up to and with it."""
        seen, total = {}, 0.0
        for step, tokens in self.values("tokens"):
            total += tokens
            seen[step] = total
        return seen

    def validation_losses(self) -> list[tuple[int, float]]:
        found = ((step, number(record["validation_loss"])) for step, record in self.validations.items())
        return [(step, value) for step, value in found if value is not None]


def number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    except OverflowError:
        return None


def read_record(line: str) -> dict[str, Any]:
    """A line of metrics.jsonl.

    Raises:
        ValueError: no record of a step, or one with a number that nothing can be made of.
    """

    def bounded(kind: type[int] | type[float]) -> Callable[[str], Any]:
        def read(text: str) -> Any:
            value = kind(text)
            if MOST < abs(value) < math.inf:
                raise UserError("a number beyond what is drawn")
            return value

        return read

    try:
        record = json.loads(line, parse_int=bounded(int), parse_float=bounded(float))
    except RecursionError as error:
        raise UserError("nested too deeply") from error
    if not isinstance(record, dict) or not isinstance(record.get("step"), int) or abs(record["step"]) >= MOST_COUNTED:
        raise UserError("no step")
    return record


def read_run(folder: Path, name: str) -> Run:
    """Read a run's folder; lines that are no record are counted, not fatal.

    Raises:
        ValueError: no metrics.jsonl, or no record in it.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder}: no metrics.jsonl there; name the folder that train.py had as --run-dir")
    run = Run(folder, name, {}, {}, {}, [], read_facts(folder / "config.json"), read_facts(folder / "status.json"))
    tokens = 0.0
    for line_number, line in enumerate(path.read_text("utf-8", errors="replace").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = read_record(line)
        except ValueError:
            run.broken_lines.append(line_number)
            continue
        if "validation_loss" in record:
            run.validations[record["step"]] = record
        elif isinstance(record.get("timers"), dict):
            run.timers[record["step"]] = record
        elif "loss" in record:
            own = number(record.get("tokens")) or 0.0
            if 0 <= own < MOST_COUNTED - tokens:
                tokens += own
                run.steps[record["step"]] = record
            else:
                run.broken_lines.append(line_number)
    for records in (run.steps, run.validations, run.timers):
        ordered = sorted(records.items())
        records.clear()
        records.update(ordered)
    if not run.steps and not run.validations:
        raise UserError(f"{path}: holds no record of a step yet")
    return run


def read_facts(path: Path) -> dict[str, Any] | str:
    """A JSON object's contents, or one phrase that says why there are none."""
    if not path.is_file():
        return f"no {path.name}"
    try:
        facts = json.loads(path.read_text("utf-8"))
    except ValueError:
        return f"{path.name} is not JSON"
    except RecursionError:
        return f"{path.name} is nested too deeply"
    return facts if isinstance(facts, dict) else f"{path.name} is not an object"


def short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of each path, as many as tell them all apart."""
    parts = [path.split("/") for path in paths]
    for count in range(1, max(map(len, parts), default=1)):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


# ------------------------------------------------------------------------------------------------
# Charts


def curves_of(series: list[tuple[int, list[Point]]], *, span: float) -> list[Curve]:
    """Each run's points, pale below their moving average over `span` points where there are enough to average."""
    curves = []
    for run, points in series:
        if span < 3 or len(points) < 3 * span:
            curves.append(Curve(run, "line", downsample(points)))
        else:
            curves.append(Curve(run, "raw", downsample(points)))
            curves.append(Curve(run, "smooth", downsample(smooth(points, span), MOST_POINTS // 3)))
    return curves


def loss_charts(runs: list[Run], *, span: float) -> list[Chart]:
    """Training and validation loss by step, by tokens, and in the second half of the steps; perplexity of each validation source."""
    by_step, by_tokens, dots_by_step, dots_by_tokens = [], [], [], []
    for index, run in enumerate(runs):
        seen = run.tokens_seen()
        losses, validations = run.values("loss"), run.validation_losses()
        by_step.append((index, list[Point](losses)))
        by_tokens.append((index, [(seen[step], loss) for step, loss in losses if step in seen]))
        dots_by_step.append(Curve(index, "dots", list[Point](validations)))
        dots_by_tokens.append(Curve(index, "dots", [(seen[step], loss) for step, loss in validations if step in seen]))
    unit = "line: training, dots: validation"
    step_curves, token_curves = (
        [*curves_of(by_step, span=span), *dots_by_step],
        [*curves_of(by_tokens, span=span), *dots_by_tokens],
    )
    charts = [
        Chart("Loss by step", unit, "step", step_curves, may_log=True, size=LARGE),
        Chart("Loss by tokens", unit, "tokens seen", token_curves, may_log=True, size=LARGE),
    ]
    last = max((step for run in runs for step in run.steps), default=0)
    if last >= 40:
        curves = [Curve(c.run, c.kind, [(x, y) for x, y in c.points if x > last / 2]) for c in step_curves]
        charts.append(Chart("Loss by step, second half", unit, "step", curves, may_log=True, size=LARGE))
    return charts + perplexity_charts(runs)


def perplexity_charts(runs: list[Run]) -> list[Chart]:
    found: dict[str, dict[int, list[Point]]] = {}
    for index, run in enumerate(runs):
        for step, record in run.validations.items():
            sources = record.get("validation")
            for source, facts in sources.items() if isinstance(sources, dict) else ():
                loss = number(facts.get("loss")) if isinstance(facts, dict) else None
                if loss is not None:
                    perplexity = math.exp(loss) if loss < 700 else loss * math.inf  # a nan stays one
                    found.setdefault(source, {}).setdefault(index, []).append((step, perplexity))
    return [
        Chart(
            f"Perplexity on {name}",
            "validation",
            "step",
            [Curve(i, "line", p) for i, p in of.items()],
            may_log=True,
            size=LARGE,
        )
        for name, of in zip(short_names(list(found)), found.values(), strict=True)
    ]


def measure_charts(runs: list[Run], measures: list[Measure], *, span: float) -> tuple[list[Chart], list[str]]:
    """A chart for each measure that some run has, and the titles of the others."""
    charts, missing = [], []
    for measure in measures:
        series: list[tuple[int, list[Point]]] = [
            (i, [(step, value * measure.factor) for step, value in run.values(measure.field)])
            for i, run in enumerate(runs)
        ]
        if measure.field in OFTEN_ZERO and not any(y for _, points in series for _, y in points):
            continue
        if not any(points for _, points in series):
            missing.append(measure.title)
            continue
        curves = curves_of(series, span=0 if measure.field in UNSMOOTHED else span)
        charts.append(
            Chart(
                measure.title,
                measure.unit,
                "step",
                curves,
                from_zero=measure.from_zero and not measure.may_log,
                may_cap=not measure.may_log and measure.field not in UNSMOOTHED,
                may_log=measure.may_log,
            )
        )
    return charts, missing


def timer_charts(runs: list[Run]) -> list[Chart]:
    """Milliseconds a step of the rank that took longest, a chart for each phase."""
    found: dict[str, dict[int, list[Point]]] = {}
    for index, run in enumerate(runs):
        for step, record in run.timers.items():
            steps = number(record.get("timed_steps")) or 1.0
            for phase, facts in record["timers"].items():
                most = number(facts[1]) if isinstance(facts, list) and len(facts) == 3 else None
                if most is not None:
                    found.setdefault(phase, {}).setdefault(index, []).append((step, 1000 * most / steps))
    return [
        Chart(
            phase,
            "ms a step",
            "step",
            [Curve(i, "line", downsample(points)) for i, points in of.items()],
            from_zero=True,
            may_cap=True,
        )
        for phase, of in found.items()
    ]


# ------------------------------------------------------------------------------------------------
# Tables


@dataclass(frozen=True)
class Cell:
    """A value of the summary.

    Attributes:
        html: already escaped.
        value: what runs are compared by; None where they aren't.
    """

    html: str
    value: float | None = None


NOTHING = Cell("&ndash;")


def status_cell(run: Run) -> Cell:
    if isinstance(run.status, str):
        return Cell(f'<span class="quiet">not known: {escape(run.status)}</span>')
    facts = {key: escape(str(value)) for key, value in run.status.items() if value not in (None, "")}
    word = facts.get("status", "not told")
    kind = word if word in ("done", "failed", "requeue", "running") else "other"
    where = (
        f" on rank {facts['rank']} ({facts.get('host', 'host not told')})"
        if word == "failed" and "rank" in facts
        else ""
    )
    text = f'<span class="status {kind}">{word}</span> at step {facts.get("step", "?")}{where}'
    text += f": {facts['reason']}" if "reason" in facts else ""
    text += '<br><small>a run that was killed stays "running"</small>' if word == "running" else ""
    return Cell(text + (f"<br><small>{facts['time'].replace('T', ' ', 1)}</small>" if "time" in facts else ""))


def size_cell(run: Run) -> Cell:
    if isinstance(run.config, str):
        return Cell(f'<span class="quiet">not known: {escape(run.config)}</span>')
    parameters, ranks, layout = (
        number(run.config.get("parameters")),
        run.config.get("world_size"),
        run.config.get("layout"),
    )
    split = [f"{axis} {size}" for axis, size in layout.items() if size != 1] if isinstance(layout, dict) else []
    told = [f"{parameters:,.0f} parameters"] if parameters is not None else []
    told += (
        [f"{ranks} rank{'' if ranks == 1 else 's'}" + (f" ({', '.join(split)})" if split else "")]
        if ranks is not None
        else []
    )
    return Cell(escape("; ".join(told))) if told else NOTHING


def steps_cell(run: Run) -> Cell:
    last = max([*run.steps, *run.validations])
    flags = run.config.get("flags") if isinstance(run.config, dict) else None
    wanted = number(flags.get("train_iters")) if isinstance(flags, dict) else None
    return Cell(f"{last:,}" + (f" of {wanted:,.0f}" if wanted is not None else ""))


def final_loss_cell(run: Run) -> Cell:
    losses = run.values("loss")
    if not losses:
        return NOTHING
    last = [loss for _, loss in losses[-20:]]
    finite = [loss for loss in last if math.isfinite(loss)]
    which = f"the last {len(last)}" if len(finite) == len(last) else f"the {len(finite)} finite of the last {len(last)}"
    mean = f" <small>mean of {which}: {sum(finite) / len(finite):.5f}</small>" if len(finite) > 1 else ""
    return Cell(f"{losses[-1][1]:.5f}{mean}", losses[-1][1])


def best_validation_cell(run: Run) -> Cell:
    found = [(loss, step) for step, loss in run.validation_losses() if math.isfinite(loss)]
    return Cell(f"{min(found)[0]:.5f} <small>after step {min(found)[1]:,}</small>", min(found)[0]) if found else NOTHING


def median_cell(field: str, text: Callable[[float], str]) -> Callable[[Run], Cell]:
    """Of the steps after the first in the file, which warms up; of that one where it is alone."""

    def cell(run: Run) -> Cell:
        values = [value for _, value in run.values(field)]
        finite = [value for value in values[1:] or values if math.isfinite(value)]
        return Cell(text(median(finite)), median(finite)) if finite else NOTHING

    return cell


def memory_cell(run: Run) -> Cell:
    peak = max((value for _, value in run.values("max_memory_bytes")), default=None)
    return NOTHING if peak is None else Cell(f"{peak / 2**30:,.2f} GiB", peak)


def hours_cell(run: Run) -> Cell:
    seconds = sum(value for _, value in run.values("step_time_s"))
    return Cell(
        f"{seconds / 3600:,.2f} h" if seconds >= 3600 else f"{seconds / 3600:.3f} h <small>{seconds:,.0f} s</small>"
    )


def remarks_cell(run: Run) -> Cell:
    bad = sum(
        not all(math.isfinite(number(record.get(k)) or 0.0) for k in ("loss", "grad_norm"))
        for record in run.steps.values()
    )
    skipped = max((value for _, value in run.values("skipped_steps")), default=0)
    told = [f"{skipped:,.0f} steps skipped"] if skipped else []
    told += [f"{bad:,} steps with a loss or gradient norm that is not finite"] if bad else []
    if run.broken_lines:
        shown = ", ".join(f"{line:,}" for line in run.broken_lines[:5]) + (", ..." if len(run.broken_lines) > 5 else "")
        told.append(
            f"{len(run.broken_lines):,} unreadable line{'s' * (len(run.broken_lines) > 1)} of metrics.jsonl left out: {shown}"
        )
    return Cell("; ".join(told)) if told else NOTHING


# Title, the cell of a run, and what is best where runs are compared.
SUMMARY: list[tuple[str, Callable[[Run], Cell], Callable[[list[float]], float] | None]] = [
    ("Status", status_cell, None),
    ("Steps", steps_cell, None),
    ("Final training loss", final_loss_cell, min),
    ("Best validation loss", best_validation_cell, min),
    ("Tokens", lambda run: Cell(f"{sum(value for _, value in run.values('tokens')):,.0f}"), None),
    ("Tokens/s, median", median_cell("tokens_per_s", lambda v: f"{v:,.0f}"), max),
    ("TFLOP/s a rank, median", median_cell("tflops_per_rank", lambda v: f"{v:,.4g}"), max),
    ("MFU, median", median_cell("mfu", lambda v: f"{v:.1%}"), max),
    ("Peak memory", memory_cell, min),
    ("Time in steps", hours_cell, None),
    ("Size", size_cell, None),
    ("Remarks", remarks_cell, None),
]


def table(head: Sequence[str], rows: list[tuple[str, list[tuple[str, str]], str]]) -> str:
    """Escaped texts. A row: its name, (class, text) of each cell, its class."""
    columns = "".join(f"<th scope=col>{name}</th>" for name in head)
    lines = [
        f'<tr class="{kind}"><th scope=row>{name}</th>'
        + "".join(f'<td class="{c}">{text}</td>' for c, text in cells)
        + "</tr>"
        for name, cells, kind in rows
    ]
    width = f"min-width: {110 + 110 * len(head)}px"
    top = f'<div class="scroll"><table style="{width}"><thead><tr><th></th>{columns}</tr></thead>'
    return f"{top}<tbody>{''.join(lines)}</tbody></table></div>"


def summary_table(runs: list[Run], heads: list[str]) -> str:
    rows = []
    for title, cell_of, best_of in SUMMARY:
        cells = [cell_of(run) for run in runs]
        values = [cell.value for cell in cells if cell.value is not None and math.isfinite(cell.value)]
        best = best_of(values) if best_of and len({cell.html for cell in cells if cell.value in values}) > 1 else None
        rows.append(
            (title, [("best" if best is not None and cell.value == best else "", cell.html) for cell in cells], "")
        )
    return table(heads, rows)


def setting_text(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return shlex.join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def settings(config: dict[str, Any]) -> dict[str, str]:
    """Name -> text of everything in config.json: the flags first, the rest under its place."""
    found: dict[str, str] = {}
    flags = config.get("flags")
    places = {"": flags} if isinstance(flags, dict) else {}
    places |= {
        f"{key}: ": value if isinstance(value, dict) else {"": value}
        for key, value in config.items()
        if key != "flags" or not places
    }
    for place, values in places.items():
        for key, value in values.items():
            found[f"{place}{key}".removesuffix(": ")] = setting_text(value)
    return found


def configuration(runs: list[Run], heads: list[str]) -> str:
    """What differs between the runs, in a table, then what is the same in all that have a config.json."""
    known = [settings(run.config) if isinstance(run.config, dict) else None for run in runs]
    text = "".join(
        f'<p class="quiet">{escape(run.name)}: {escape(run.config)}, so its flags are not known.</p>'
        for run in runs
        if isinstance(run.config, str)
    )
    told = [each for each in known if each is not None]
    names = list(dict.fromkeys(name for each in told for name in each))
    differs = [name for name in names if len({each.get(name) for each in told}) > 1]
    if differs:
        rows = []
        for name in differs:
            cells = [
                ("", "&ndash;" if each is None or name not in each else f"<code>{escape(each[name])}</code>")
                for each in known
            ]
            rows.append((f"<code>{escape(name)}</code>", cells, "differs"))
        text += f"<p>What differs between the runs ({len(differs)}):</p>" + table(heads, rows)
    same = [name for name in names if name not in differs]
    if same:
        lines = [f"<div><span>{escape(name)}</span><code>{escape(told[0][name])}</code></div>" for name in same]
        title = f"The same in all of them ({len(same)})" if len(told) > 1 else f"All of it ({len(same)})"
        text += f'<details open><summary>{title}</summary><div class="settings">{"".join(lines)}</div></details>'
    return text


# ------------------------------------------------------------------------------------------------
# The page


def build_report(runs: list[Run], *, now: str) -> str:
    """The whole HTML file."""
    span = max((len(run.steps) for run in runs), default=0) * SMOOTHED_SHARE
    sections, missing = [("Loss", "charts large", loss_charts(runs, span=span))], []
    for title, measures in SECTIONS.items():
        charts, absent = measure_charts(runs, measures, span=span)
        sections.append((title, "charts", charts))
        missing += absent
    sections.append(("Phases of a step, the rank that took longest", "charts", timer_charts(runs)))
    drawn: list[dict[str, Any]] = []
    text = ""
    for title, kind, charts in sections:
        figures = []
        for chart in charts:
            if any(curve.points for curve in chart.curves):
                figure, facts = render(chart, len(drawn))
                figures.append(figure)
                drawn.append(facts)
        if figures:
            text += f'<h2>{title}</h2><div class="{kind}">{"".join(figures)}</div>'
    names = [escape(run.name) for run in runs]
    swatches = [
        f'<span class="swatch c{i % COLOURS}{" again" if i >= COLOURS else ""}"></span>' for i in range(len(runs))
    ]
    heads = [f"{swatch}{name}" for swatch, name in zip(swatches, names, strict=True)]
    smoothed = f" Pale: each step; strong: moving average over about {span:.0f} steps." if span >= 3 else ""
    labels = [
        f'<label title="{escape(str(run.folder))}"><input type="checkbox" checked data-run="{i}">{swatch}{name}</label>'
        for i, (run, swatch, name) in enumerate(zip(runs, swatches, names, strict=True))
    ]
    body = (
        f'<h1>{"Run" if len(runs) == 1 else "Runs"}: {", ".join(names)}</h1><p class="quiet">Pentagrid, {escape(now)}.{smoothed} '
        "Triangles at a frame's edge: values beyond it; crosses: not finite.</p>"
        f'<div class="legend">{"".join(labels)}</div><h2>Summary</h2>{summary_table(runs, heads)}{text}'
        + (
            f'<p class="quiet">Not measured in {"this run" if len(runs) == 1 else "these runs"}: {", ".join(missing)}.</p>'
            if missing
            else ""
        )
        + f"<h2>Configuration</h2>{configuration(runs, heads)}"
    )
    template = TEMPLATE.read_text("utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    data = json.dumps({"runs": [run.name for run in runs], "charts": drawn}, separators=(",", ":"))
    values = {
        # Only this script runs, whatever a run's texts hold.
        "{script_hash}": "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "{title}": f"Pentagrid: {', '.join(names)}",
        "{body}": body,
        "{data}": data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"),
    }
    parts = [template]
    for mark, value in values.items():
        before, after = parts.pop().split(mark)
        parts += [before, value, after]
    return "".join(parts)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tools/report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder; several are overlaid")
    parser.add_argument("--out", type=Path, help="the file to write; default: report.html in the first run's folder")
    args = parser.parse_args(argv)
    out = args.out or args.runs[0] / "report.html"
    try:
        folders = [str(folder.resolve()) for folder in args.runs]
        if len(set(folders)) < len(folders):
            raise UserError(f"{max(folders, key=folders.count)}: given twice")
        runs = [read_run(folder, name) for folder, name in zip(args.runs, short_names(folders), strict=True)]
        text = build_report(runs, now=time.strftime("%Y-%m-%d %H:%M %Z"))
        out.write_text(text, "utf-8", errors="xmlcharrefreplace")  # half a surrogate pair, in a flag
    except (ValueError, OSError, RecursionError) as error:  # what is read only just may be too deep to write
        print(f"tools/report.py: {error}", file=sys.stderr)
        return 2
    left_out = sum(len(run.broken_lines) for run in runs)
    print(
        f"wrote {out}: {len(runs)} run{'s' * (len(runs) > 1)}, {out.stat().st_size / 2**20:.1f} MiB"
        + f", {left_out} unreadable lines left out" * (left_out > 0)
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
