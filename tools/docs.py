"""Write the tables that come from the code into docs/: `python tools/docs.py [--check]`.

Flags come from config/schema.py, attention backends from cp/support.py, counts of kernels and bytes from
planner/counts.py, predictions from planner/matrix.py and their errors from benchmarks/calibration.py, figures of
thousands of ranks from benchmarks/results/scale_cpu.json, the parts of a log line from metrics/log.py.
Each table stands between two marker comments.
With `--check` nothing is written; exit code 1: a table is out of date.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.calibration import cases_table, summary_table
from benchmarks.scale_parts.table import scale_table
from config.schema import RunConfig, fields_of_flags, option
from cp.support import markdown_table
from metrics.log import legend_table
from planner.counts import counts_table
from planner.matrix import matrix_tables
from utils.errors import run_tool

ROOT = Path(__file__).resolve().parent.parent
ON_RESUME = {"model": "no", "fixed": "no", "printed": "yes, printed", "free": "yes"}


def flags_table() -> str:
    """A table for each group of flags."""
    defaults = RunConfig()
    lines: list[str] = []
    last_group = ""
    for group, name, flag in fields_of_flags():
        if group != last_group:
            title = str(type(getattr(defaults, group)).__doc__)
            lines += ["", f"## {title}", "", "| flag | default | sets | may change on resume |", "|---|---|---|---|"]
            last_group = group
        default = getattr(getattr(defaults, group), name)
        text = flag.describe_default(default)
        choices = " " + "\\|".join(flag.choices) if flag.choices else ""
        sets = flag.help.replace("|", "\\|")
        lines.append(f"| `{option(name)}{choices}` | {text} | {sets} | {ON_RESUME[flag.on_resume]} |")
    return "\n".join(lines).strip()


PREDICTIONS = "docs/comparison/prediction_matrix.md"
TABLES = (
    ("docs/flags.md", "flags", flags_table),
    ("docs/context_parallel.md", "backends", markdown_table),
    ("docs/gpu.md", "counts", counts_table),
    ("docs/operate.md", "log line", legend_table),
    ("docs/scale.md", "scale", scale_table),
    (PREDICTIONS, "errors", summary_table),
    (PREDICTIONS, "matrix", matrix_tables),
    (PREDICTIONS, "figures", cases_table),
)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    is_check = parser.parse_args(argv).check
    stale = []
    for file, name, table in TABLES:
        path = ROOT / file
        text = path.read_text()
        begin, end = f"<!-- {name}: made by tools/docs.py -->", f"<!-- end of {name} -->"
        head, rest = text.split(begin)
        new = f"{head}{begin}\n{table()}\n{end}{rest.split(end)[1]}"
        if new != text:
            stale.append(f"{file} ({name})")
            if not is_check:
                path.write_text(new)
    if stale:
        print(("out of date: " if is_check else "wrote ") + ", ".join(stale))
    return int(is_check and bool(stale))


if __name__ == "__main__":
    sys.exit(run_tool(main))
