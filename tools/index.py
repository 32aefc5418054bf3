"""Build what a run looks up in its data cache: tokens of text, facts and splits of corpora, indices of epochs.

    python tools/index.py --world-size N [--epochs N] FLAGS of train.py

Needs no GPU and no ranks: one machine that can write --data-cache-path. A run with these flags then starts at once.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config.cli import add_demo_preset
from metrics.banner import describe_sequences, list_sources
from planner.estimate import resolve_without_devices
from training.build import build_data
from utils.errors import OneLineParser, UserError, run_tool
from utils.logger import log


def main(argv: list[str]) -> int:
    parser = OneLineParser(description=__doc__, epilog="All flags of train.py too.")
    parser.add_argument("--world-size", type=int, required=True, help="ranks of the run")
    parser.add_argument("--node-size", type=int, help="ranks of a node; default: 8, or all if fewer")
    parser.add_argument("--epochs", type=int, default=1, help="epochs of the training documents; default: 1")
    own, words = parser.parse_known_args(argv)
    if own.epochs < 1:
        raise UserError(f"--epochs {own.epochs}: must be at least 1")
    start = time.monotonic()
    words, _ = add_demo_preset(words)
    config = resolve_without_devices(words, own.world_size, own.node_size or min(8, own.world_size))
    data = build_data(config)
    for source in list_sources(data.train):
        for number in range(own.epochs):
            source.epoch(number)
    for line in describe_sequences(data.train):
        log(line)
    log(f"{config.data.data_cache_path}: ready for {own.epochs} epochs, in {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
