"""Write down the losses and gradient norms of three layouts, which tests/distributed/test_train.py compares with.

    python -m tests.golden

Only where numbers were meant to move: say in the commit why they did.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.launch import ROOT, SMALL, train, write_corpus

RUNS = {
    "cp 4": (4, "--cp-size 4 --cp-comm-type p2p"),
    "tp 2 x cp 2": (4, "--tp-size 2 --cp-size 2 --cp-comm-type p2p"),
    "pp 2 x tp 2 x cp 2": (8, "--pp-size 2 --tp-size 2 --cp-size 2 --cp-comm-type p2p"),
}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = [
            *SMALL,
            "--device",
            "cpu",
            "--data-path",
            str(write_corpus(folder)),
            "--data-cache-path",
            str(folder / "cache"),
        ]
        runs = {}
        for number, (layout, (ranks, flags)) in enumerate(RUNS.items()):
            records = train(ranks, folder / str(number), *base, "--dtype", "fp64", *flags.split())
            runs[layout] = [[r["loss"], r["grad_norm"]] for r in records]
    note = "fp64, [loss, gradient norm] of ten steps; made by python -m tests.golden"
    (ROOT / "tests" / "assets" / "golden_losses.json").write_text(
        json.dumps({"note": note, "runs": runs}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
