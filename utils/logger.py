"""The run's own log: lines on stdout, errors on stderr. A reader that goes away does not end the run."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from typing import TextIO


class _Handler(logging.StreamHandler):
    """Writes to sys.stdout or sys.stderr as they are now. After an I/O error (a closed pipe) output is discarded."""

    def __init__(self, stream_name: str, format: str) -> None:
        self.stream_name = stream_name
        super().__init__()
        self.setFormatter(logging.Formatter(format))

    @property
    def stream(self) -> TextIO:
        return getattr(sys, self.stream_name)

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """`StreamHandler.__init__` sets its stream; this handler looks it up."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            with suppress(OSError, ValueError, AttributeError):  # a stream without a descriptor
                _redirect_to_null(self.stream.fileno())
        elif not isinstance(error, ValueError):  # ValueError: the stream is closed
            super().handleError(record)


def _redirect_to_null(descriptor: int) -> None:
    """Send buffered and later output to /dev/null: Python flushes the stream once more at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _make_logger(name: str, handler: logging.Handler) -> logging.Logger:
    logger = logging.getLogger(f"pentagrid.{name}")
    logger.propagate = False
    logger.setLevel(logging.INFO)
    logger.handlers = [handler]
    return logger


_out = _make_logger("out", _Handler("stdout", "%(message)s"))
_error = _make_logger("error", _Handler("stderr", "train.py:%(message)s"))


def log(text: str) -> None:
    """Print to stdout and flush."""
    _out.info("%s", text)


def log_error(text: str, *, rank: int | None = None) -> None:
    """Print `train.py: text`, or `train.py: rank R: text`, to stderr."""
    _error.error("%s %s", "" if rank is None else f" rank {rank}:", text)


def one_line(error: BaseException) -> str:
    """An error's message in one line; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
