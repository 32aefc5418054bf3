"""What a process prints: the run's own log, and what keeps stdout and stderr safe for a terminal."""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

from utils.names import redact

# All but line ends and tabs: a terminal obeys them (colours, titles, the clipboard). Also what reverses the order of
# letters on a line.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
LONGEST = 1500  # characters of an error's line: a file may hold a value of any length
PROGRESS_BAR = re.compile(r"\r(?:\x1b\[K)?")  # how a bar's text begins


def escape(text: str) -> str:
    """The text with escapes for what a terminal would obey, and without credentials."""
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], redact(text))


class SafeOutput(io.TextIOWrapper):
    """A stream over another one's buffer.

    Control characters, and characters that the encoding lacks, become escapes; credentials in URLs become `***`. Once
    the reader has gone, output is discarded.

    Args:
        code: exit code of the process once the reader has gone; None: the process goes on, whatever the error.

    Raises:
        SystemExit: the reader has gone, or another error, and there is a `code`.
    """

    def __init__(self, stream: TextIO, code: int | None) -> None:
        options = {"line_buffering": stream.line_buffering, "write_through": True}
        super().__init__(stream.buffer, stream.encoding, "backslashreplace", **options)  # type: ignore[arg-type]
        self.code, self.replaced = code, stream  # kept: it closes the buffer when nothing refers to it

    def write(self, text: str) -> int:
        bar = PROGRESS_BAR.match(text)
        begin = bar[0] if bar else ""
        shown = begin + escape(text[len(begin) :])
        with suppress(ValueError):  # closed at exit
            try:
                super().write(shown)
            except OSError as error:
                self._discard(error)
        return len(text)

    def flush(self) -> None:
        with suppress(ValueError):
            try:
                super().flush()
            except OSError as error:
                self._discard(error)

    def close(self) -> None:
        """Flush. The buffer is the other stream's."""
        self.flush()

    def _discard(self, error: OSError) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())  # also for what is buffered: Python flushes the stream once more at exit
        os.close(null)
        if self.code is not None:
            raise SystemExit(self.code if isinstance(error, BrokenPipeError) else f"output: {error.strerror}")


def guard_output(*, ends: bool) -> None:
    """Make stdout and stderr `SafeOutput`, once a process.

    Args:
        ends: whether the process ends, with 141 as by SIGPIPE, when the reader of stdout goes away (`| head`).
    """
    if not isinstance(sys.stdout, SafeOutput):
        null = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")  # where a stream is closed (`>&-`), it is None
        out, error = sys.stdout or null, sys.stderr or null
        out.flush()
        sys.stdout, sys.stderr = SafeOutput(out, 141 if ends else None), SafeOutput(error, None)


class _Handler(logging.StreamHandler):
    """Writes to sys.stdout or sys.stderr as they are now. Output that cannot be written is discarded."""

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
        if not isinstance(sys.exc_info()[1], (OSError, ValueError)):  # ValueError: the stream is closed
            super().handleError(record)


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


def join_parts(parts: Sequence[str], separator: str, *, indent: int) -> str:
    """The joined parts; on a terminal a full line goes on below, indented, with the next part."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    lines = [parts[0]]
    for part in parts[1:]:
        longer = f"{lines[-1]}{separator}{part}"
        lines[-1:] = [longer] if len(longer) <= width else [lines[-1], " " * indent + part]
    return "\n".join(lines)


def one_line(error: BaseException) -> str:
    """An error's message in one line, safe for a terminal, at most `LONGEST` characters; its type where it has none."""
    text = escape(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
