"""Python's garbage collections at steps that all ranks share: when one rank collects, the others wait for it."""

from __future__ import annotations

import gc


def freeze_imports() -> None:
    """Call when the imports are done; no collection visits what they made. Turns the collector on."""
    gc.freeze()
    gc.enable()


class ScheduledCollector:
    """Collects what was made since the first step, after each multiple of `interval` steps; 0: when Python chooses.

    What exists after the first step (modules, the model, compiled code) is frozen: no collection visits it again.
    """

    def __init__(self, interval: int) -> None:
        self.interval, self.is_frozen = interval, False

    def after(self, done: int) -> None:
        """Call after each step, with the number of finished steps."""
        if not self.interval or (self.is_frozen and done % self.interval):
            return
        gc.collect()
        if not self.is_frozen:
            gc.disable()
            gc.freeze()
            self.is_frozen = True

    def stop(self) -> None:
        """Give the schedule back to Python."""
        if self.is_frozen:
            gc.unfreeze()
            gc.enable()
            self.is_frozen = False
