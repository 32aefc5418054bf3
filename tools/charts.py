"""Line charts as inline SVG, and the points behind them as JSON for the page's crosshair. Pure: numbers in, text out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

Point = tuple[float, float]  # x, y; a y that is not finite is drawn as a mark and breaks the line

COLOURS = 7  # that tools/report.html defines; further runs take them again, dashed
MOST_POINTS = 1500
LEFT, RIGHT, TOP = 58, 16, 14  # around the frame, in units of the view box
EARLY = 10  # a smooth curve's average is over a fifth of the points so far at most
FEW_POINTS = 30  # a line of so few shows each
FAR_OUT = 3.0  # a chart that may be capped is, where its largest value is so many times its 98th percentile
FAR_APART = 10.0  # a chart that may be logarithmic is, where its largest value is so many times its median


@dataclass(frozen=True)
class Curve:
    """What one run has in a chart.

    Attributes:
        run: its number, which is its colour.
        kind: `raw`, pale where a smooth one lies over it; `line`; `smooth`; `dots`.
    """

    run: int
    kind: str
    points: list[Point]


@dataclass(frozen=True)
class Chart:
    """Curves over one x axis.

    Attributes:
        unit: of y, told beside the title.
        x_name: `step` or `tokens seen`.
        from_zero: the y axis starts there.
        may_cap: far outliers (a first step that compiles) leave the frame and are marked at its edge.
        may_log: the y axis is logarithmic where the values lie far apart.
        size: width and height of the view box.
    """

    title: str
    unit: str
    x_name: str
    curves: list[Curve]
    from_zero: bool = False
    may_cap: bool = False
    may_log: bool = False
    size: tuple[int, int] = (440, 250)


def downsample(points: Sequence[Point], limit: int = MOST_POINTS) -> list[Point]:
    """At most about `limit` points: of each bucket the least, the largest and the first that is not finite; both ends stay."""
    if len(points) <= limit:
        return list(points)
    per_bucket = 2 if all(math.isfinite(y) for _, y in points) else 3
    buckets = max(1, limit // per_bucket)
    kept = {0, len(points) - 1}
    for bucket in range(buckets):
        indices = range(len(points) * bucket // buckets, len(points) * (bucket + 1) // buckets)
        finite = [i for i in indices if math.isfinite(points[i][1])]
        if finite:
            kept |= {min(finite, key=lambda i: points[i][1]), max(finite, key=lambda i: points[i][1])}
        kept |= set([i for i in indices if not math.isfinite(points[i][1])][:1])
    return [points[i] for i in sorted(kept)]


def smooth(points: Sequence[Point], span: float) -> list[Point]:
    """Exponential moving average over about `span` points, over fewer at the start; what is not finite stays as it is."""
    average, count, smoothed = 0.0, 0, []
    for x, y in points:
        if math.isfinite(y):
            count += 1
            average += max(2 / (span + 1), min(1.0, EARLY / count)) * (
                y - average
            )  # a loss falls fast at first: a long average would lag
            y = average
        smoothed.append((x, y))
    return smoothed


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) within the limits."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within the limits; also twice and five times those where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        found = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(found) >= 3:
            break
    return found[:: 1 + len(found) // 8]


def tick_label(value: float, step: float) -> str:
    """`value` as short as ticks that are `step` apart allow: 1,500; 20k; 1.5M; 2.5e-4."""
    if value == 0:
        return "0"
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.10g}{suffix}"
    if step < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    digits += round(step * 10**digits, 6) % 1 > 0  # 0.25 apart
    return f"{value:,.{digits}f}"


def y_limits(chart: Chart, values: list[float]) -> tuple[float, float, bool]:
    """Lowest and highest y of the frame, and whether it is logarithmic, for its finite `values`, sorted."""
    low, high = values[0], values[-1]
    if chart.may_log and high > FAR_APART * max(values[len(values) // 2], 0.0):
        return next(y for y in values if y > 0) / 1.2, high * 1.2, True  # zeros lie below the frame
    usual = values[int(0.98 * (len(values) - 1))]
    if chart.may_cap and 0 < FAR_OUT * usual < high:
        high = 1.25 * usual
    if chart.from_zero:
        low = min(low, 0.0)
    flat = high - low <= 1e-9 * abs(high)  # but for rounding
    room = (abs(high) * 0.05 or 1.0) if flat else (high - low) * 0.06
    return low if chart.from_zero and low == 0 else low - room, high + room, False


def render(chart: Chart, number: int) -> tuple[str, dict[str, Any]]:
    """The chart as a `<figure>`, and what the crosshair needs to know of it.

    Args:
        number: of the chart in the page.

    Returns:
        The text, and {"x": limits, "y": limits, "log", "frame": [left, top, width, height], "name": of x, "curves"}.
    """
    width, height = chart.size
    frame_width, frame_height = (
        width - LEFT - RIGHT,
        height - TOP - (42 if width < 500 else 52),
    )  # a phone's letters are larger there
    everything = [point for curve in chart.curves for point in curve.points]
    xs = [x for x, _ in everything]
    x_low, x_high = (min(xs), max(xs)) if min(xs) < max(xs) else (min(xs) - 1, max(xs) + 1)
    x_low = 0.0 if 0 < x_low < x_high / 8 else x_low
    y_low, y_high, is_log = y_limits(chart, sorted(y for _, y in everything if math.isfinite(y)) or [0.0, 1.0])
    scale = math.log if is_log else float

    def at_x(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * frame_width

    def at_y(y: float) -> float:
        y = scale(max(y, y_low / 10)) if is_log else y
        share = (y - scale(y_low)) / (scale(y_high) - scale(y_low))
        return TOP + (1 - min(max(share, -5.0), 5.0)) * frame_height

    parts = []
    y_ticks = log_ticks(y_low, y_high) if is_log else ticks(y_low, y_high, 7)
    x_ticks = [x for x in ticks(x_low, x_high, 6) if x_high - x_low > 6 or x == int(x)]
    for value in y_ticks:
        label = tick_label(value, value if is_log else y_ticks[1] - y_ticks[0] if len(y_ticks) > 1 else abs(value))
        parts.append(f'<path class="grid" d="M{LEFT} {at_y(value):.1f}h{frame_width}"/>')
        parts.append(f'<text class="y" x="{LEFT - 7}" y="{at_y(value):.1f}" dy=".35em">{label}</text>')
    for value in x_ticks:
        label = tick_label(value, x_ticks[1] - x_ticks[0] if len(x_ticks) > 1 else 1.0)
        parts.append(f'<path class="tick" d="M{at_x(value):.1f} {TOP + frame_height}v4"/>')
        parts.append(f'<text class="x" x="{at_x(value):.1f}" y="{TOP + frame_height + 6}" dy="1em">{label}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP + frame_height}h{frame_width}"/>')
    parts.append(
        f'<clipPath id="frame{number}"><rect x="{LEFT}" y="{TOP - 2}" width="{frame_width + 4}" height="{frame_height + 4}"/></clipPath>'
    )
    for curve in sorted(chart.curves, key=lambda curve: ("raw", "line", "smooth", "dots").index(curve.kind)):
        colours = f"r{curve.run} c{curve.run % COLOURS}{' again' if curve.run >= COLOURS else ''}"
        drawn = [(at_x(x), at_y(y)) for x, y in curve.points if math.isfinite(y)]
        if curve.kind == "dots" or (curve.kind == "line" and len(drawn) <= FEW_POINTS):
            parts += [
                f'<circle class="dot {colours}" cx="{x:.1f}" cy="{y:.1f}" r="3.6" clip-path="url(#frame{number})"/>'
                for x, y in drawn
            ]
        if curve.kind != "dots":
            d = _path([(at_x(x), at_y(y) if math.isfinite(y) else math.nan) for x, y in curve.points])
            dense = " dense" if curve.kind == "raw" and len(drawn) > width else ""
            parts.append(f'<path class="{curve.kind}{dense} {colours}" clip-path="url(#frame{number})" d="{d}"/>')
        if curve.kind == "smooth":
            continue
        for x, y in curve.points:
            if not math.isfinite(y):
                at = f"{at_x(x):.1f} {TOP + 6}"
                parts.append(
                    f'<path class="mark {colours}" d="M{at}m-4 -4l8 8m-8 0l8 -8"><title>{chart.x_name} {x:,.0f}: {y}</title></path>'
                )
            elif y > y_high:
                at = f"{at_x(x):.1f} {TOP - 3}"
                parts.append(
                    f'<path class="beyond {colours}" d="M{at}m-5 9l5 -9l5 9z"><title>{chart.x_name} {x:,.0f}: {y:.6g}</title></path>'
                )
    parts.append(f'<text class="name" x="{LEFT + frame_width / 2}" y="{height - 4}">{escape(chart.x_name)}</text>')
    parts.append(f'<g class="cross"><path class="hair" d="M0 {TOP}v{frame_height}"/></g>')
    unit = escape(", ".join(filter(None, (chart.unit, "logarithmic" if is_log else ""))))
    text = (
        f'<figure data-chart="{number}"><figcaption>{escape(chart.title)} <small>{unit}</small></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(chart.title)}">{"".join(parts)}</svg>'
        '<div class="tip" hidden></div></figure>'
    )
    facts = {
        "x": [x_low, x_high],
        "y": [y_low, y_high],
        "log": is_log,
        "frame": [LEFT, TOP, frame_width, frame_height],
        "width": width,
        "name": chart.x_name,
        "curves": [
            {"run": c.run, "kind": c.kind, "x": [x for x, _ in c.points], "y": [_short(y) for _, y in c.points]}
            for c in chart.curves
        ],
    }
    return text, facts


def _path(points: list[Point]) -> str:
    """Lines between neighbours; a point without any is a dot."""
    commands: list[str] = []
    for (x, y), (_, next_y) in pairwise([*points, (math.nan, math.nan)]):
        if math.isfinite(y):
            starts = not commands or commands[-1] == "gap"
            commands.append(
                f"{'M' if starts else 'L'}{x:.1f} {y:.1f}" + ("h0" if starts and not math.isfinite(next_y) else "")
            )
        else:
            commands.append("gap")
    return "".join(command for command in commands if command != "gap")


def _short(y: float) -> float | str:
    return float(f"{y:.6g}") if math.isfinite(y) else str(y)
