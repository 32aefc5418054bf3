"""Write the tables that come from the code into README.md and docs/: `python tools/docs.py [--check]`.

Flags come from the parser, the backends from cp/support.py. Each table stands between two marker comments. With
`--check` nothing is written and the exit code says whether anything would change.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config.arguments import build_parser

from cp.support import markdown_table

ROOT = Path(__file__).resolve().parent.parent


def flags_table() -> str:
    """A table for each group of flags."""
    lines: list[str] = []
    for group in build_parser()._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if not actions:
            continue
        title = "presets" if group.title == "options" else str(group.title).split(":")[0]
        lines += [f"**{title}**", "", "| flag | default | what it is |", "|---|---|---|"]
        for action in actions:
            default = "" if action.default is None else "off" if action.default is False else str(action.default)
            choices = " " + "\\|".join(map(str, action.choices)) if action.choices else ""
            lines.append(
                f"| `{action.option_strings[0]}{choices}` | {default} | {(action.help or '').replace('|', chr(92) + '|')} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


TABLES = {"README.md": ("flags", flags_table), "docs/context_parallel.md": ("backends", markdown_table)}


def with_table(text: str, name: str, table: str) -> str:
    """`text` with what stands between the markers of `name` replaced."""
    begin, end = f"<!-- {name}: made by tools/docs.py -->", f"<!-- end of {name} -->"
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n{table}\n{end}{tail}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    check = parser.parse_args().check
    stale = []
    for file, (name, table) in TABLES.items():
        path = ROOT / file
        text = path.read_text()
        new = with_table(text, name, table())
        if new != text:
            stale.append(file)
            if not check:
                path.write_text(new)
    if stale:
        print(("out of date: " if check else "wrote ") + ", ".join(stale))
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
