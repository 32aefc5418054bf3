"""torchrun whose end is that of the run: `python -m launch.torchrun --nproc-per-node 4 train.py --cp-size 4`.

It takes torchrun's flags. Differences: a flag that train.py refuses is answered before PyTorch is imported; without
--master-port the store has a free port; the run's own line is the last one, without torchrun's traceback; the exit
code is that of the rank that failed first, or 128 and the number of the signal.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys

from config.cli import parse_arguments
from utils.errors import run_tool

SCRIPT = "train.py"


def main(argv: list[str]) -> int:
    if SCRIPT in argv:
        sys.argv[0] = SCRIPT  # named in front of a refusal
        parse_arguments(argv[argv.index(SCRIPT) + 1 :])
    if not any(word.startswith("--master-port") for word in argv):
        with socket.socket() as probe:
            probe.bind(("", 0))
            argv = ["--master-port", str(probe.getsockname()[1]), *argv]

    try:
        return start(argv)
    except KeyboardInterrupt:  # before torchrun handles signals
        return 128 + signal.SIGINT


def start(argv: list[str]) -> int:
    """torchrun in this process. Returns the exit code."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # the ranks say what happens
    try:
        run.main(argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        print(f"torchrun: rank {rank}, process {failure.pid}: {failure.signal_name()}", file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
