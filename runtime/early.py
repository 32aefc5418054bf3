"""What train.py does before it imports torch, which takes seconds."""

from __future__ import annotations

import signal

HELD_BACK = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def hold_back() -> None:
    """Signals that ask to stop wait until `StopRequests` takes them: in these seconds they would end the process without a word."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
