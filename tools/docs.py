"""Write the tables that come from the code into docs/: `python tools/docs.py [--check]`. With `--presets` write the
figures of the plans that comments of configs/*.yaml state, which takes minutes.

Flags come from config/schema.py, attention backends from cp/support.py, counts of kernels and bytes, predictions and
their errors from kernel_counts.py, prediction_matrix.py and calibration.py of benchmarks, figures of thousands of ranks
from benchmarks/results/scale_cpu.json, the parts of a log line from metrics/log.py.
Each table stands between two marker comments.
With `--check` nothing is written; exit code 1: something is out of date.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.calibration import cases_table, summary_table
from benchmarks.kernel_counts import counts_table
from benchmarks.prediction_matrix import matrix_tables
from benchmarks.scale_parts.table import scale_table
from config.schema import RunConfig, fields_of_flags, option
from cp.support import markdown_table
from metrics.log import legend_table
from planner.estimate import GIB, Plan, resolve_without_devices
from tools.plan import plan_run
from utils.errors import run_tool

ROOT = Path(__file__).resolve().parent.parent
STATED = re.compile(r"(tools/plan\.py --world-size (\d+) --gpu-memory (\d+)): ([\d.]+) GiB a rank, ([\d.]+) s a step")
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


def plan_preset(preset: Path, world: int) -> tuple[Plan, float]:
    """The plan of a preset on nodes of 8 GPUs, each sample one document, and the estimated seconds of a step."""
    config = resolve_without_devices(["--config", str(preset)], world, 8)
    return plan_run(config, config.data.tokenizer_vocab_size, None, 8)


def state_plan(preset: Path) -> str:
    """The preset's text with today's figures; as it is where it states none."""

    def state(found: re.Match[str]) -> str:
        plan, seconds = plan_preset(preset, int(found[2]))
        return f"{found[1]}: {plan.memory.peak / GIB:.1f} GiB a rank, {seconds:.2f} s a step"

    return STATED.sub(state, preset.read_text())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something is out of date")
    parser.add_argument("--presets", action="store_true", help="the plans that configs/*.yaml state, not docs/")
    own = parser.parse_args(argv)
    if own.presets:
        new = {preset: state_plan(preset) for preset in sorted((ROOT / "configs").glob("*.yaml"))}
    else:
        new = {}
        for file, name, table in TABLES:
            path = ROOT / file
            begin, end = f"<!-- {name}: made by tools/docs.py -->", f"<!-- end of {name} -->"
            head, rest = new.get(path, path.read_text()).split(begin)
            new[path] = f"{head}{begin}\n{table()}\n{end}{rest.split(end)[1]}"
    stale = [path for path, text in new.items() if text != path.read_text()]
    if stale:
        print("out of date:" if own.check else "wrote", *(path.relative_to(ROOT) for path in stale))
    if not own.check:
        for path in stale:
            path.write_text(new[path])
    return int(own.check and bool(stale))


if __name__ == "__main__":
    sys.exit(run_tool(main))
