"""One HTML file for one run or several: summary, curves, configuration. Several runs are overlaid, each in one colour.

    python tools/report.py RUN [RUN ...] [--out FILE]

RUN is a run directory: metrics.jsonl and, where train.py wrote them, config.json and status.json. The file embeds
plotly.js (5 MiB) and needs no network. Its default path is report.html in the first run directory.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.io import to_html
from plotly.subplots import make_subplots

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.errors import OneLineParser, UserError, run_tool
from utils.files import open_regular, parse_json, replace_synced
from utils.logger import one_line
from utils.names import distinct_suffixes

MAX_POINTS = 1500  # of a curve; a longer one is drawn as means over a pale band of extremes
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#c2659a", "#b97f00", "#56b4e9", "#444444")  # further runs: again, dashed
COLUMNS, ROW_HEIGHT, ROW_GAP = 3, 240, 90  # of the grid of charts; heights in pixels

STYLE = """
body { margin: 20px auto; padding: 0 16px; max-width: 1480px; font: 15px sans-serif; overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100% }
th, td { padding: 5px 12px; text-align: left; border-bottom: 1px solid #ddd; min-width: 90px }
.wide { overflow-x: auto }
#charts { min-width: 1000px }
"""


@dataclass(frozen=True)
class Measure:
    """A chart of the series `key`: values times `factor`, in `unit`. Values of the series `dots` become points."""

    key: str
    title: str
    unit: str = ""
    factor: float = 1.0
    dots: str | None = None


MEASURES = (
    Measure("loss", "Loss", "nats; points: validation", dots="validation_loss"),
    Measure("bits_per_byte", "Bits a byte", "of held-out text"),
    Measure("grad_norm", "Gradient norm", "before clipping"),
    Measure("lr", "Learning rate"),
    Measure("skipped_steps", "Skipped steps", "so far"),
    Measure("tokens_per_s", "Throughput", "tok/s of all ranks, without padding"),
    Measure("tflops_per_rank", "TFLOP/s", "a rank"),
    Measure("mfu", "MFU", "% of the device's peak", 100),
    Measure("step_time_s", "Step time", "s"),
    Measure("data_share", "Data", "% of the time rank 0 waits for batches", 100),
    Measure("cp_wait_share", "CP wait", "% of the time rank 0 waits for cp ranks", 100),
    Measure("max_memory_bytes", "Memory", "GiB of rank 0, largest so far", 2**-30),
    Measure("packing_efficiency", "Packing", "% of rows that is text", 100),
    Measure("cp_balance", "CP balance", "busiest cp rank / mean"),
    Measure("work_balance", "Work balance", "busiest rank / mean"),
)


@dataclass
class Run:
    """Contents of a run directory.

    Attributes:
        config, status: text of each value in config.json and status.json by name; empty where `notes` says why.
        series: name -> step -> value. Names are the fields of a step's record, `validation_loss`, `bits_per_byte`, and
            with a slash perplexities and timers, which are titles of charts too.
        changes: step -> what changed without a new start.
    """

    name: str
    config: dict[str, str] = field(default_factory=dict)
    status: dict[str, str] = field(default_factory=dict)
    series: dict[str, dict[int, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    changes: dict[int, str] = field(default_factory=dict)

    def points(self, key: str | None) -> np.ndarray:
        """[n, 2] steps and values; none where the run has no such series."""
        found = self.series.get(key or "", {})
        points = np.array([list(found), list(found.values())], dtype=np.float64).T
        return points[points[:, 0].argsort()]

    def finite(self, key: str) -> list[float]:
        """Values in order of steps, without NaN and infinities."""
        return [value for value in self.points(key)[:, 1].tolist() if math.isfinite(value)]


def read_file(path: Path) -> str:
    """Text of a regular file.

    Raises:
        UserError: missing, no regular file, or a symbolic link, which may lead out of the run directory.
    """
    try:
        with open_regular(path) as file:
            return file.read().decode("utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def read_settings(path: Path, notes: list[str]) -> dict[str, str]:
    """Name -> text of each value in a JSON object, first the flags, with their dashes; empty where `notes` says why."""
    try:
        found = dict(parse_json(read_file(path)))
        flags = dict(found.pop("flags", {}))
        settings = {f"--{name.replace('_', '-')}": value for name, value in flags.items()} | found
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
    except (ValueError, TypeError) as error:
        notes.append(f"{path.name} is left out: {one_line(error)}")
        return {}


def read_values(record: dict[str, Any]) -> dict[str, float]:
    """What a record of metrics.jsonl adds to the series of its run."""
    values: dict[str, Any] = {}
    if "validation_loss" in record:
        values |= {name: record.get(name) for name in ("validation_loss", "bits_per_byte")}
        for source, metadata in dict(record.get("validation", {})).items():
            if metadata["loss"] is None:  # no token of the source had a label
                continue
            loss = float(metadata["loss"])
            values[f"perplexity/{source}"] = math.exp(loss) if loss < 700 else loss * math.inf  # NaN stays NaN
    elif "timers" in record:
        for phase, (_, slowest, _) in dict(record["timers"]).items():
            milliseconds = 1000 * float(slowest) / record.get("timed_steps", 1)
            values[f"timer/{phase}, ms per step of the slowest rank"] = milliseconds
    elif "loss" in record:
        values = record
    return {key: float(value) for key, value in values.items() if type(value) in (int, float)}


def read_run(folder: Path, name: str) -> Run:
    """Read a run directory. Lines that hold no record are left out and noted.

    Raises:
        UserError: no metrics.jsonl, or neither a step nor a validation in it.
    """
    run, broken = Run(name), []
    run.config = read_settings(folder / "config.json", run.notes)
    run.status = read_settings(folder / "status.json", run.notes)
    for line_number, line in enumerate(read_file(folder / "metrics.jsonl").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
            step, values = record["step"], read_values(record)
            if not isinstance(step, int) or abs(step) >= 2**53:  # float64 holds every smaller integer
                raise ValueError("no step")
        except (ValueError, KeyError, TypeError, ArithmeticError):
            broken.append(line_number)
            continue
        if isinstance(record.get("changed"), str):
            run.changes[step] = record["changed"]
        for key, value in values.items():
            run.series.setdefault(key, {})[step] = value
    if not {"loss", "validation_loss"} & set(run.series):
        raise UserError(f"{folder / 'metrics.jsonl'}: no record of a step yet")
    if broken:
        run.notes.append(f"metrics.jsonl: {len(broken)} unreadable lines left out, the first are {broken[:5]}")
    return run


def downsample(points: np.ndarray, limit: int = MAX_POINTS) -> np.ndarray:
    """About `limit` of [n, 2] points: both ends, each bucket's minimum, maximum and one NaN."""
    if len(points) <= limit:
        return points
    kept = [0, len(points) - 1]
    for bucket in np.array_split(np.arange(len(points)), limit // 3):
        order = bucket[np.argsort(points[bucket, 1])]  # NaN last
        kept += [order[0], order[np.isfinite(points[bucket, 1]).sum() - 1], order[-1]]
    return points[np.unique(kept)]


def average(points: np.ndarray, count: int = MAX_POINTS // 3) -> np.ndarray:
    """Means of `count` buckets of [n, 2] points, each over its finite values; NaN where a bucket has none."""
    means = np.full((count, 2), np.nan)
    for mean, bucket in zip(means, np.array_split(points, count), strict=True):
        is_finite = np.isfinite(bucket[:, 1])
        mean[:] = bucket[is_finite].mean(axis=0) if is_finite.any() else (bucket[0, 0], np.nan)
    return means


def make_traces(measure: Measure, run: Run, index: int) -> list[go.Scatter]:
    """Curve and points of one run in one chart. plotly leaves a gap at NaN and infinities."""
    traces = []
    colour, dash = COLOURS[index % len(COLOURS)], "solid" if index < len(COLOURS) else "dash"
    whole, dots = run.points(measure.key), downsample(run.points(measure.dots))
    is_long = len(whole) > MAX_POINTS
    curves = [(downsample(whole), "", 0.3), (average(whole), "", 1.0)] if is_long else [(whole, "", 1.0)]
    for points, suffix, opacity in (*curves, (dots, ", validation", 1.0)):
        if len(points):
            trace = go.Scatter(
                x=points[:, 0].tolist(),
                y=[float(f"{value:.6g}") for value in points[:, 1] * measure.factor],  # rounding noise is no curve
                mode="markers" if suffix else "lines" if len(points) > 30 else "lines+markers",
                line={"color": colour, "dash": dash, "width": 1.5},
                marker_color=colour,
                opacity=opacity,
                hoverinfo="skip" if opacity < 1 else None,
                name=as_text(run.name) + suffix,
                legendgroup=str(index),
                showlegend=measure is MEASURES[0] and opacity == 1,
            )
            traces.append(trace)
    return traces


def needs_log_axis(values: Sequence[float]) -> bool:
    """Whether the largest of finite values would flatten the rest, as a first step that compiles does."""
    return bool(values) and min(values) > 0 and max(values) / 10 > median(values)


def draw_charts(runs: list[Run]) -> go.Figure:
    """All charts in one grid under one legend, which shows and hides runs."""
    keys = sorted({key for run in runs for key in run.series if "/" in key})
    charts = []
    for measure in (*MEASURES, *(Measure(key, key) for key in keys)):
        if traces := [trace for i, run in enumerate(runs) for trace in make_traces(measure, run, i)]:
            charts.append((measure, traces))
    rows = math.ceil(len(charts) / COLUMNS)
    height = rows * (ROW_HEIGHT + ROW_GAP)
    figure = make_subplots(
        rows,
        COLUMNS,
        specs=[[{} if row * COLUMNS + col < len(charts) else None for col in range(COLUMNS)] for row in range(rows)],
        subplot_titles=[f"<b>{as_text(m.title)}</b> <span style='color:#59636e'>{m.unit}</span>" for m, _ in charts],
        vertical_spacing=ROW_GAP / height,
        horizontal_spacing=0.05,
    )
    for position, (_, traces) in enumerate(charts):
        row, col = position // COLUMNS + 1, position % COLUMNS + 1
        traces.sort(key=lambda trace: trace.opacity)  # no run's band hides another run's curve
        figure.add_traces(traces, rows=row, cols=col)
        values = [y for trace in traces for y in trace.y if math.isfinite(y)]
        figure.update_yaxes(tickformat="~s" if max(values, default=0) >= 10_000 else "~g", row=row, col=col)  # 2.3M
        if needs_log_axis(values):  # D2: labels at 1, 2 and 5 of a decade
            figure.update_yaxes(type="log", dtick="D2" if max(values) < 1000 * min(values) else None, row=row, col=col)
    for number, run in enumerate(runs):
        for step in sorted({step for step, _ in list_changes(run)}):
            colour = COLOURS[number % len(COLOURS)]
            figure.add_vline(step, row="all", col="all", line={"dash": "dot", "color": colour, "width": 1})
    last = max((trace.x[-1] for _, traces in charts for trace in traces), default=0)
    # Zooms all charts together. Of few steps plotly would label fractions.
    figure.update_xaxes(title_text="step", matches="x", dtick=1 if last < 10 else None)
    figure.update_layout(
        template="plotly_white",
        height=height + 60,
        margin={"l": 50, "r": 20, "t": 90, "b": 50},
        legend={"orientation": "h", "y": 1 + 40 / height, "yanchor": "bottom"},
        hovermode="x unified",
    )
    return figure


def describe_layouts(run: Run) -> str:
    """Layouts of the run's starts in their order, each with its first step; sizes of 1 are left out."""
    layouts: dict[str, int] = {}
    for start in json.loads(run.config["starts"]):
        sizes = (f"{axis} {size}" for axis, size in start["layout"].items() if size != 1)
        layouts.setdefault(" x ".join(sizes) or "one rank", start["step"])
    return "; ".join(f"{layout} from step {step}" if step else layout for layout, step in layouts.items())


def list_changes(run: Run) -> list[tuple[int, str]]:
    """(step, what changed) of each start that changed flags or sources, none where config.json is corrupted, and of
    each phase of --data-path.
    """
    phases = list(run.changes.items())
    try:
        starts = [(start["step"], start.get("changed", [])) for start in json.loads(run.config["starts"])]
        return sorted([(int(step), str(line)) for step, lines in starts for line in lines] + phases)
    except (AttributeError, LookupError, TypeError, ValueError):
        return phases


# Flags that say which text the validation loss is of.
TEXT_FLAGS = ("--data-path", "--valid-data-path", "--data-split", "--json-key")


def compare_texts(runs: Sequence[Run]) -> list[str]:
    """A note where the losses of the runs are not of one text."""
    configs = [run.config for run in runs if run.config]
    differing = [flag for flag in TEXT_FLAGS if len({config.get(flag) for config in configs}) > 1]
    return [f"losses and bits a byte are of different text: {', '.join(differing)} differ"] if differing else []


# Title; value of a run, none where it cannot be read; format. The first step warms up.
SUMMARY: tuple[tuple[str, Callable[[Run], Any], str], ...] = (
    ("Status", lambda run: ": ".join(filter(None, (run.status["status"], run.status.get("reason")))), "{}"),
    ("Steps", lambda run: max({**run.series.get("loss", {}), **run.series.get("validation_loss", {})}), "{:,}"),
    ("Steps wanted", lambda run: int(run.config["--train-iters"]), "{:,}"),
    ("Layout", describe_layouts, "{}"),
    ("Changed", lambda run: "; ".join(f"from step {step}: {line}" for step, line in list_changes(run)) or "–", "{}"),
    ("Final training loss", lambda run: run.points("loss")[-1, 1], "{:.5f}"),
    ("Final training loss, mean of 20 steps", lambda run: fmean(run.finite("loss")[-20:]), "{:.5f}"),
    ("Best validation loss", lambda run: min(run.finite("validation_loss")), "{:.5f}"),
    ("Best bits a byte of held-out text", lambda run: min(run.finite("bits_per_byte")), "{:.4f}"),
    ("Tokens", lambda run: sum(run.series["tokens"].values()), "{:,.0f}"),
    ("Tokens/s, median", lambda run: median(run.finite("tokens_per_s")[1:]), "{:,.0f}"),
    ("TFLOP/s per rank, median", lambda run: median(run.finite("tflops_per_rank")[1:]), "{:,.4g}"),
    ("MFU, median", lambda run: median(run.finite("mfu")[1:]), "{:.1%}"),
    ("Peak memory, GiB", lambda run: max(run.series["max_memory_bytes"].values()) / 2**30, "{:,.2f}"),
    ("Time in steps, hours", lambda run: sum(run.series["step_time_s"].values()) / 3600, "{:,.3f}"),
    ("Skipped steps", lambda run: max(run.series["skipped_steps"].values()), "{:,.0f}"),
    ("Losses, not finite", lambda run: len(run.points("loss")) - len(run.finite("loss")), "{:,}"),
    ("Gradient norms, not finite", lambda run: len(run.points("grad_norm")) - len(run.finite("grad_norm")), "{:,}"),
)


def as_text(text: str) -> str:
    """`text` for HTML, and for plotly's labels, which hold tags and entities too."""
    return escape(text.encode("utf-8", "backslashreplace").decode(), quote=False)


def table_row(title: str, cells: Sequence[str]) -> str:
    return f"<tr><th>{as_text(title)}</th>{''.join(f'<td>{as_text(cell)}</td>' for cell in cells)}</tr>\n"


def summary_cell(run: Run, value_of: Callable[[Run], Any], form: str) -> str:
    try:
        return form.format(value_of(run))
    except (ValueError, LookupError, ArithmeticError, TypeError, AttributeError):
        return "–"


def configuration_rows(configs: Sequence[dict[str, str]], *, differing: bool) -> str:
    """Rows of the settings that differ between runs, or of the settings that are equal in all known configurations."""
    known = [config for config in configs if config]
    return "".join(
        table_row(name, [config.get(name, "–") for config in configs])
        for name in dict.fromkeys(name for config in known for name in config)
        if (len({config.get(name) for config in known}) > 1) == differing
    )


def build_report(runs: list[Run], *, now: str) -> str:
    """The whole HTML file. Every text of a run is escaped: in HTML by `as_text`, in scripts by plotly."""
    charts = to_html(draw_charts(runs), config={"displaylogo": False}, full_html=False, div_id="charts")
    names = ", ".join(as_text(run.name) for run in runs)
    heads = "".join(f"<th>{as_text(run.name)}</th>" for run in runs)
    noted = [*compare_texts(runs), *(f"{run.name}: {note}" for run in runs for note in run.notes)]
    notes = "<br>".join(map(as_text, noted))
    rows = "".join(table_row(title, [summary_cell(run, value, form) for run in runs]) for title, value, form in SUMMARY)
    configs = [run.config for run in runs]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Pentagrid: {names}</title><style>{STYLE}</style></head>
<body><h1>Pentagrid: {names}</h1><p>{now}. A killed run keeps the status "running".</p>
<div class="wide"><table><tr><th></th>{heads}</tr>{rows}</table></div><p>{notes}</p>
<h2>Curves</h2><p>Click a run in the legend to hide it, drag to zoom, double-click to zoom out. A dotted line: from here
other flags or data. More than {MAX_POINTS:,} steps: means over several steps, in a pale band of all values.</p>
<div class="wide">{charts}</div>
<h2>Configuration</h2><div class="wide"><table>
<tr><th>Differs between runs</th>{heads}</tr>{configuration_rows(configs, differing=True)}
<tr><th>Equal in all</th>{heads}</tr>{configuration_rows(configs, differing=False)}</table></div></body></html>
"""


def main(argv: list[str]) -> int:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run directory; several are overlaid")
    parser.add_argument("--out", type=Path, help="HTML file to write; default: report.html in the first run directory")
    args = parser.parse_args(argv)
    out = args.out or args.runs[0] / "report.html"
    folders = [os.path.realpath(folder) for folder in args.runs]
    if len(set(folders)) < len(folders):
        raise UserError(f"{max(folders, key=folders.count)}: given twice")
    runs = [read_run(folder, name) for folder, name in zip(args.runs, distinct_suffixes(folders), strict=True)]
    try:
        replace_synced(out, build_report(runs, now=time.strftime("%Y-%m-%d %H:%M %Z")))  # a link at `out` is replaced
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    print(f"wrote {out}: runs {len(runs)}, size {out.stat().st_size / 2**20:.1f} MiB", *notes, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
