"""What a run of thousands of ranks costs beside its arithmetic, before and after a change, on this machine.

Simulated: threads as ranks against a real store, process groups without a network, sparse files. With --json, the file
keeps the rows of parts that do not run. `python tools/docs.py` writes them to docs/scale.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import benchmark_parser, describe_machine
from benchmarks.scale_parts import checkpoints, control, corpora, restart
from benchmarks.scale_parts.table import Row, format_rows, read_parts, rows_as_json

# Each module has PARTS: functions that return rows, by the name of the part.
MODULES = [
    control,
    checkpoints,
    corpora,
    restart,
]
PARTS: dict[str, Callable[[], list[Row]]] = {name: part for m in MODULES for name, part in m.PARTS.items()}


def main() -> None:
    args = benchmark_parser(__doc__, parts=PARTS).parse_args()
    for name in args.only:
        rows = PARTS[name]()
        print(f"## {name}\n\n{format_rows(rows)}\n", flush=True)
        if args.json is not None:
            command = {"command": f"python benchmarks/scale.py --only {name}"}
            parts = read_parts(args.json) | {name: describe_machine() | command | {"rows": rows_as_json(rows)}}
            ordered = {part: parts[part] for part in PARTS if part in parts}
            args.json.write_text(json.dumps({"parts": ordered}, indent=1) + "\n")


if __name__ == "__main__":
    main()
