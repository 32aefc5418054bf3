"""The error of a refusal: what a user asked for cannot be done."""

from __future__ import annotations


class UserError(ValueError):
    """A flag, a file or a checkpoint that cannot be used as asked.

    The message is one line: the flag or file, the numbers that clash, what to do. `train.py` and the tools print it without a
    traceback and exit with code 2. Errors of our own code are never of this type.
    """
