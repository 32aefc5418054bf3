"""The rows of benchmarks/scale.py: their form, the file that keeps them, the table of docs/scale.md."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[1] / "results" / "scale_cpu.json"
MEASURED = "measured"


@dataclass(frozen=True)
class Row:
    """A figure before and after a change.

    Attributes:
        ranks: of the run that is simulated.
        before, after: in `unit`, or words; None: not measured.
        how: `MEASURED`, or "extrapolated from N ranks: ...".
    """

    concern: str
    ranks: int
    before: float | str | None
    after: float | str | None
    unit: str = ""
    how: str = MEASURED


def read_parts(path: Path = FILE) -> dict[str, dict[str, Any]]:
    """What the file keeps of each part: command, commit, machine, rows. Empty without a file."""
    return json.loads(path.read_text())["parts"] if path.exists() else {}


def _cell(value: float | str | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.3g}"


def format_rows(rows: Iterable[Row]) -> str:
    """A table in Markdown."""
    lines = ["| what | ranks | before | after | unit | how |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = (row.concern, str(row.ranks), _cell(row.before), _cell(row.after), row.unit, row.how)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def scale_table() -> str:
    """The table of docs/scale.md, from the file."""
    parts = read_parts()
    blocks = [f"`{part['command']}`\n\n{format_rows(Row(**row) for row in part['rows'])}" for part in parts.values()]
    return "\n\n".join(blocks)


def rows_as_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]
