"""One HTML file for one run or several: summary, curves, configuration. Several runs are overlaid, each in one colour.

    python tools/report.py RUN [RUN ...] [--out FILE]

RUN is a run directory: metrics.jsonl and, where train.py wrote them, config.json and status.json. The file embeds
plotly.js (5 MiB) and needs no network. Its default path is report.html in the first run directory.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import os
import re
import shlex
import stat
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.io import to_html
from plotly.subplots import make_subplots

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.errors import UserError
from utils.files import replace_synced
from utils.names import distinct_suffixes

MAX_NUMBER = 1e300  # in a record: sums and scaled values stay finite
MAX_COUNT = 2**53  # steps, and tokens in all: float64 holds every smaller integer
MAX_POINTS = 1500  # of a curve
SMOOTHED_SHARE = 1 / 40  # window of the moving average, as a share of the longest run's steps
WARMUP_SHARE = 1 / 10  # largest window, as a share of the steps so far: the loss falls fast at first
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#c2659a", "#b97f00", "#56b4e9", "#444444")  # further runs: again, dashed
COLUMNS, ROW_HEIGHT, ROW_GAP = 3, 240, 90  # of the grid of charts; heights in pixels

STYLE = """
body { margin: 0 auto; padding: 20px; max-width: 1480px; background: #f4f5f7; color: #1b1f24; font: 15px sans-serif }
.quiet, tbody th { color: #59636e; font-weight: normal }
.card { overflow-x: auto; padding: 6px; background: #fff; border: 1px solid #d5dae0; border-radius: 8px }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: 5px 12px; text-align: left; vertical-align: top; overflow-wrap: anywhere }
tr > * { border-bottom: 1px solid #e9ecef }
.swatch { display: inline-block; width: 22px; margin-right: 7px; border-top: 4px solid; vertical-align: middle }
"""


@dataclass(frozen=True)
class Measure:
    """A chart of the series `key`: values times `factor`, in `unit`. Values of the series `dots` become points."""

    key: str
    title: str
    unit: str = ""
    factor: float = 1.0
    dots: str | None = None
    from_zero: bool = True
    is_smoothed: bool = True
    may_log: bool = False
    by_tokens: bool = False


LOSS = Measure("loss", "Loss by step", "points: validation", dots="validation_loss", from_zero=False, may_log=True)
MEASURES = (
    Measure("grad_norm", "Gradient norm", may_log=True),
    Measure("lr", "Learning rate", is_smoothed=False),
    Measure("skipped_steps", "Skipped steps", "so far", is_smoothed=False),
    Measure("tokens_per_s", "Throughput", "tokens/s"),
    Measure("tflops_per_rank", "TFLOP/s", "per rank"),
    Measure("mfu", "MFU", "% of peak", 100),
    Measure("step_time_s", "Step time", "s"),
    Measure("data_share", "Data wait", "% of step time", 100),
    Measure("cp_wait_share", "CP wait", "% of step time", 100),
    Measure("max_memory_bytes", "Peak memory", "GiB", 2**-30, is_smoothed=False),
    Measure("packing_efficiency", "Packing efficiency", "% of row", 100, from_zero=False),
    Measure("cp_balance", "CP balance", "attention work, max / mean of cp ranks", from_zero=False),
)


@dataclass
class Run:
    """Contents of a run directory.

    Attributes:
        config, status: text of each value in config.json and status.json by name; empty where `notes` says why.
        series: name -> step -> value. Names are the fields of a step's record, `validation_loss`, `perplexity/SOURCE`
            and `timer/PHASE` (ms per step of the slowest rank).
        broken_lines: numbers of the lines of metrics.jsonl that hold no record.
    """

    name: str
    config: dict[str, str] = field(default_factory=dict)
    status: dict[str, str] = field(default_factory=dict)
    series: dict[str, dict[int, float]] = field(default_factory=dict)
    broken_lines: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def points(self, key: str | None, *, by_tokens: bool = False) -> np.ndarray:
        """[n, 2] steps, or tokens seen, and values; none where the run has no such series."""
        pairs = sorted(self.series[key].items()) if key in self.series else []
        points = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        if by_tokens:
            tokens = self.points("tokens")
            points = points[np.isin(points[:, 0], tokens[:, 0])]
            points[:, 0] = tokens[:, 1].cumsum()[np.searchsorted(tokens[:, 0], points[:, 0])]
        return points

    def finite(self, key: str) -> list[float]:
        """Values in order of steps, without NaN and infinities."""
        return [value for value in self.points(key)[:, 1].tolist() if math.isfinite(value)]


def read_file(path: Path) -> str:
    """Text of a regular file.

    Raises:
        UserError: missing, no regular file, or a symbolic link, which may lead out of the run directory.
    """
    flags = os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO must not block
    try:
        with open(
            path, encoding="utf-8", errors="replace", opener=lambda name, mode: os.open(name, mode | flags)
        ) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{path.name} is no regular file")
            return file.read()
    except OSError as error:
        reason = "symbolic links are not followed" if os.path.islink(path) else error.strerror
        raise UserError(f"{path.name} cannot be read: {reason}") from error


def read_settings(path: Path) -> dict[str, str]:
    """Name -> text of each value in a JSON object; first the flags, with their dashes.

    Raises:
        UserError: the file cannot be read, or is no JSON object.
    """
    try:
        found = json.loads(read_file(path))
        if not isinstance(found, dict):
            raise UserError(f"{path.name} is no JSON object")
        flags = found.pop("flags") if isinstance(found.get("flags"), dict) else {}
        settings = {f"--{name.replace('_', '-')}": value for name, value in flags.items()} | found
        return {name: setting_text(value) for name, value in settings.items()}
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path.name} is not JSON, or nested too deeply") from error


def setting_text(value: object) -> str:
    """Strings as they are, lists of strings as a shell takes them, other values as JSON."""
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return shlex.join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def as_number(value: object) -> float | None:
    """`value` as a float, None where the value is no number.

    Raises:
        ValueError: finite and above MAX_NUMBER.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    if MAX_NUMBER < abs(value) < math.inf:
        raise ValueError(f"a number above {MAX_NUMBER}")
    return float(value)


def read_values(record: dict[str, Any]) -> dict[str, float]:
    """What a record of metrics.jsonl adds to the series of its run.

    Raises:
        ValueError: a finite number above MAX_NUMBER.
    """
    values: dict[str, object] = {}
    if "validation_loss" in record:
        values["validation_loss"] = record["validation_loss"]
        for source, metadata in dict(record.get("validation", {})).items():
            loss = float(metadata["loss"])
            values[f"perplexity/{source}"] = math.exp(loss) if loss < 700 else loss * math.inf  # NaN stays NaN
    elif "timers" in record:
        for phase, (_, slowest, _) in dict(record["timers"]).items():
            values[f"timer/{phase}"] = 1000 * float(slowest) / record.get("timed_steps", 1)
    elif "loss" in record:
        values = record
    numbers = {key: as_number(value) for key, value in values.items()}
    return {key: number for key, number in numbers.items() if number is not None}


def read_run(folder: Path, name: str) -> Run:
    """Read a run directory; lines that hold no record are left out and listed.

    Raises:
        UserError: no metrics.jsonl, or neither a step nor a validation in it.
    """
    run = Run(name)
    for settings, file_name in ((run.config, "config.json"), (run.status, "status.json")):
        try:
            settings |= read_settings(folder / file_name)
        except UserError as error:
            run.notes.append(str(error))
    try:
        lines = read_file(folder / "metrics.jsonl").split("\n")
    except UserError as error:
        raise UserError(f"{folder}: {error}; name a directory that train.py had as --run-dir") from error
    total = 0.0
    for line_number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step, values = record["step"], read_values(record)
            tokens = values.get("tokens", 0.0)
            if not isinstance(step, int) or abs(step) >= MAX_COUNT or not 0 <= tokens < MAX_COUNT - total:
                raise ValueError("no step, or no number of tokens")
        except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
            run.broken_lines.append(line_number)
            continue
        total += tokens
        for key, value in values.items():
            run.series.setdefault(key, {})[step] = value
    if not {"loss", "validation_loss"} & set(run.series):
        raise UserError(f"{folder / 'metrics.jsonl'}: no record of a step yet")
    return run


def downsample(points: np.ndarray, limit: int = MAX_POINTS) -> np.ndarray:
    """About `limit` of [n, 2] points: both ends, each bucket's minimum, maximum and first value that is not finite."""
    if len(points) <= limit:
        return points
    kept = [0, len(points) - 1]
    for bucket in np.array_split(np.arange(len(points)), limit // 3):
        is_finite = np.isfinite(points[bucket, 1])
        finite = bucket[is_finite]
        if len(finite):
            kept += [finite[points[finite, 1].argmin()], finite[points[finite, 1].argmax()]]
        kept += bucket[~is_finite][:1].tolist()
    return points[np.unique(kept)]


def smooth(points: np.ndarray, window: float) -> np.ndarray:
    """Exponential moving average over about `window` points, fewer at the start; values that are not finite stay."""
    smoothed = points.copy()
    average, count = 0.0, 0
    for i, y in enumerate(points[:, 1].tolist()):
        if math.isfinite(y):
            count += 1
            average += max(2 / (window + 1), min(1.0, 1 / (count * WARMUP_SHARE))) * (y - average)
            smoothed[i, 1] = average
    return smoothed


def list_measures(runs: list[Run]) -> list[Measure]:
    """Loss, perplexity of each validation source, MEASURES, timers."""
    keys = sorted({key for run in runs for key in run.series})
    sources = [key for key in keys if key.startswith("perplexity/")]
    perplexity = Measure("", "", "validation", from_zero=False, is_smoothed=False, may_log=True)
    return [
        LOSS,
        replace(LOSS, title="Loss by tokens", by_tokens=True),
        *(
            replace(perplexity, key=key, title=f"Perplexity on {name.removeprefix('perplexity/')}")
            for key, name in zip(sources, distinct_suffixes(sources), strict=True)
        ),
        *MEASURES,
        *(
            Measure(key, key, "ms per step, slowest rank", is_smoothed=False)
            for key in keys
            if key.startswith("timer/")
        ),
    ]


def y_axis(measure: Measure, values: list[float]) -> dict[str, Any]:
    """Axis for finite `values`: logarithmic where they lie far apart, cut where an outlier would flatten the rest."""
    middle, usual, largest = np.quantile(values or [0.0], [0.5, 0.98, 1.0], method="lower")
    if measure.may_log and largest > 10 * max(middle, 0.0):
        return {"type": "log", "tickformat": "~g"}
    if measure.is_smoothed and not measure.may_log and 0 < 3 * usual < largest:  # a first step that compiles
        return {"range": [min(0.0, *values), 1.25 * usual]}
    exponent = "power" if largest < 0.01 else "B"  # 3×10^-4, but 20k
    return {"rangemode": "tozero" if measure.from_zero else "normal", "exponentformat": exponent}


def line_style(index: int, width: float) -> dict[str, Any]:
    """Line of the run `index`."""
    dash = "solid" if index < len(COLOURS) else "dash"
    return {"color": COLOURS[index % len(COLOURS)], "dash": dash, "width": width}


def make_traces(measure: Measure, run: Run, index: int, *, window: float) -> list[go.Scatter]:
    """Curves of one run in one chart, downsampled: pale below their moving average where the points are many."""
    points = run.points(measure.key, by_tokens=measure.by_tokens) * [1.0, measure.factor]
    is_smoothed = measure.is_smoothed and 3 <= window <= len(points) / 3
    raw, dots = downsample(points), downsample(run.points(measure.dots, by_tokens=measure.by_tokens))
    mode = "lines" if len(points) > 30 else "lines+markers"
    marker = {"color": COLOURS[index % len(COLOURS)], "size": 8 if len(dots) <= 30 else 4}
    curves: list[tuple[str, np.ndarray, dict[str, Any]]] = [
        ("", raw, {"mode": mode, "line": line_style(index, 1.5), "opacity": 0.3 if is_smoothed else 1}),
        (", validation", dots, {"mode": "markers", "marker": marker}),
    ]
    if is_smoothed:
        average = downsample(smooth(points, window), MAX_POINTS // 3)
        curves.append((", smoothed", average, {"mode": "lines", "line": line_style(index, 2.2)}))
    crosses, texts, level = [], [], 1.0
    for x, y in np.concatenate([raw, dots]).tolist():
        if math.isfinite(y):
            level = y
        else:
            crosses.append((x, level))
            texts.append(str(y))
    style = {"mode": "markers", "marker": marker | {"symbol": "x"}, "text": texts, "hovertemplate": "%{text}"}
    curves.append((", not finite", np.array(crosses).reshape(-1, 2), style))
    return [
        go.Scatter(
            x=shown[:, 0].tolist(),
            y=[float(f"{y:.6g}") if math.isfinite(y) else None for y in shown[:, 1].tolist()],
            name=as_text(run.name) + suffix,
            legendgroup=str(index),
            showlegend=False,
            **style,
        )
        for suffix, shown, style in curves
        if len(shown)
    ]


def draw_charts(runs: list[Run]) -> tuple[go.Figure, list[str]]:
    """All charts in one grid under one legend, which shows and hides runs; titles of the measures that no run has."""
    window = max(len(run.series.get("loss", {})) for run in runs) * SMOOTHED_SHARE
    charts, missing = [], []
    for measure in list_measures(runs):
        traces = [trace for i, run in enumerate(runs) for trace in make_traces(measure, run, i, window=window)]
        if traces:
            charts.append((measure, traces))
        else:
            missing.append(measure.title)
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
    for i, run in enumerate(runs):  # a line without points is the run's entry in the legend
        figure.add_scatter(
            x=[None], y=[None], mode="lines", line=line_style(i, 2.2), name=as_text(run.name), legendgroup=str(i)
        )
    for position, (measure, traces) in enumerate(charts):
        cell = {"row": position // COLUMNS + 1, "col": position % COLUMNS + 1}
        for trace in traces:
            figure.add_trace(trace, **cell)
        figure.update_yaxes(y_axis(measure, [y for trace in traces for y in trace.y if y is not None]), **cell)
        figure.update_xaxes(
            title_text="tokens seen" if measure.by_tokens else "step",
            matches="x" if position and not measure.by_tokens else None,  # zoom all charts by step together
            **cell,
        )
    figure.update_xaxes(title_standoff=4, hoverformat=",d")
    figure.update_yaxes(hoverformat=".5g")
    figure.update_annotations(font_size=13)  # the titles
    figure.update_layout(
        template="plotly_white",
        height=height + 60,
        margin={"l": 50, "r": 20, "t": 90, "b": 50},
        legend={"orientation": "h", "y": 1 + 40 / height, "yanchor": "bottom"},
        hovermode="x unified",
    )
    return figure, missing


def steady_median(key: str) -> Callable[[Run], float]:
    """Median of all recorded steps but the first, which warms up."""
    return lambda run: median(run.finite(key)[1:] or run.finite(key))


# Title; value of a run, where ValueError, KeyError or IndexError means none; format.
SUMMARY: tuple[tuple[str, Callable[[Run], Any], str], ...] = (
    ("Status", lambda run: "; ".join(f"{key}: {value}" for key, value in run.status.items() if value) or "–", "{}"),
    ("Parameters", lambda run: run.config["parameters"], "{}"),
    ("Ranks", lambda run: run.config["world_size"], "{}"),
    ("Steps", lambda run: max({**run.series.get("loss", {}), **run.series.get("validation_loss", {})}), "{:,}"),
    ("Steps wanted", lambda run: run.config["--train-iters"], "{}"),
    ("Final training loss", lambda run: run.points("loss")[-1, 1], "{:.5f}"),
    ("Final training loss, mean of 20 steps", lambda run: fmean(run.finite("loss")[-20:]), "{:.5f}"),
    ("Best validation loss", lambda run: min(run.finite("validation_loss")), "{:.5f}"),
    ("Tokens", lambda run: sum(run.series["tokens"].values()), "{:,.0f}"),
    ("Tokens/s, median", steady_median("tokens_per_s"), "{:,.0f}"),
    ("TFLOP/s per rank, median", steady_median("tflops_per_rank"), "{:,.4g}"),
    ("MFU, median", steady_median("mfu"), "{:.1%}"),
    ("Peak memory, GiB", lambda run: max(run.series["max_memory_bytes"].values()) / 2**30, "{:,.2f}"),
    ("Time in steps, hours", lambda run: sum(run.series["step_time_s"].values()) / 3600, "{:,.3f}"),
    ("Skipped steps", lambda run: max(run.series["skipped_steps"].values()), "{:,.0f}"),
    ("Losses, not finite", lambda run: len(run.points("loss")) - len(run.finite("loss")), "{:,}"),
    ("Gradient norms, not finite", lambda run: len(run.points("grad_norm")) - len(run.finite("grad_norm")), "{:,}"),
    ("Unreadable lines of metrics.jsonl", lambda run: len(run.broken_lines), "{:,}"),
    ("Unreadable lines, first five", lambda run: run.broken_lines[:5] or "–", "{}"),
)


def as_text(text: str) -> str:
    """`text` for HTML, and for plotly's labels, which hold tags and entities too."""
    return escape(text.encode("utf-8", "backslashreplace").decode(), quote=False)


def table_row(title: str, cells: Sequence[str]) -> str:
    return f"<tr><th>{as_text(title)}</th>{''.join(f'<td>{as_text(cell)}</td>' for cell in cells)}</tr>\n"


def summary_cell(run: Run, value_of: Callable[[Run], Any], form: str) -> str:
    try:
        return form.format(value_of(run))
    except (ValueError, KeyError, IndexError):
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
    """The whole HTML file. Its policy allows only the scripts made here, whatever the texts of a run hold."""
    figure, missing = draw_charts(runs)
    charts = to_html(figure, config={"displaylogo": False}, include_plotlyjs=True, full_html=False, div_id="charts")
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", charts, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(runs))]
    names = [as_text(run.name) for run in runs]
    heads = "".join(
        f'<th><span class="swatch" style="border-color: {colour}"></span>{name}</th>'
        for colour, name in zip(colours, names, strict=True)
    )
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    notes += [f"Not measured: {', '.join(missing)}"] if missing else []
    rows = "".join(table_row(title, [summary_cell(run, value, form) for run in runs]) for title, value, form in SUMMARY)
    configs = [run.config for run in runs]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data: blob:; style-src 'unsafe-inline';
 script-src {" ".join(f"'sha256-{digest}'" for digest in hashes)}">
<title>Pentagrid: {", ".join(names)}</title><style>{STYLE}</style></head>
<body><h1>Pentagrid: {", ".join(names)}</h1><p class="quiet">{now}. A killed run keeps the status "running".</p>
<div class="card"><table><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>
<p class="quiet">{"<br>".join(map(as_text, notes))}</p>
<h2>Curves</h2><p class="quiet">Click a run in the legend to hide it, drag to zoom, double-click to zoom out.
Pale: raw values; crosses: not finite.</p><div class="card">{charts}</div>
<h2>Configuration</h2><div class="card"><table><thead><tr><th>Differs between runs</th>{heads}</tr></thead>
<tbody>{configuration_rows(configs, differing=True)}</tbody><thead><tr><th>Equal in all</th>{heads}</tr></thead>
<tbody>{configuration_rows(configs, differing=False)}</tbody></table></div></body></html>
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tools/report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run directory; several are overlaid")
    parser.add_argument("--out", type=Path, help="HTML file to write; default: report.html in the first run directory")
    args = parser.parse_args(argv)
    out = args.out or args.runs[0] / "report.html"
    try:
        folders = [os.path.realpath(folder) for folder in args.runs]
        if len(set(folders)) < len(folders):
            raise UserError(f"{max(folders, key=folders.count)}: given twice")
        runs = [read_run(folder, name) for folder, name in zip(args.runs, distinct_suffixes(folders), strict=True)]
        replace_synced(out, build_report(runs, now=time.strftime("%Y-%m-%d %H:%M %Z")))  # a link at `out` is replaced
    except (UserError, OSError) as error:
        print(f"tools/report.py: {error}", file=sys.stderr)
        return 2
    left_out, size = sum(len(run.broken_lines) for run in runs), out.stat().st_size / 2**20
    print(f"wrote {out}: runs {len(runs)}, size {size:.1f} MiB, unreadable lines left out {left_out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
