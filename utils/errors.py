"""Errors for the user, and how a command line ends with one."""

from __future__ import annotations

import argparse
import atexit
import importlib.util
import os
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from utils.logger import guard_output, one_line


class UserError(ValueError):
    """A flag, a file or a checkpoint that cannot be used as asked.

    The message is one line: the flag or file, the numbers that clash, what to do. `train.py` and the tools print it
    without a traceback and exit with code 2. Errors of our own code are never of this type.
    """


class SizeError(UserError):
    """A size, or a choice, that does not fit the others.

    Args:
        what: the flag and the numbers that clash.
        options: values that may mend this, by field name, best first. `config.validate.resolve` advises those that
            every other check accepts.

    Attributes:
        together: values by field name, all of which are needed.
    """

    def __init__(self, what: str, **options: Iterable[int | float | str]) -> None:
        self.what, self.options = what, {name: list(values) for name, values in options.items()}
        self.together: dict[str, Any] = {}
        legal = "".join(f"; choose from {', '.join(map(str, values))}" for values in self.options.values())
        super().__init__(what + legal)


class MissingPackageError(UserError):
    """An optional package that a flag needs is not installed here."""


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent
        return False


class CollectiveError(OSError):
    """An I/O error that a collective operation raises on every rank, with the same message: printed once a node."""


class HelpFormatter(argparse.HelpFormatter):
    """Fits paragraphs into the terminal, keeps paragraphs with indented lines, breaks no flag at its hyphens.

    A number without a metavar is N or X.
    """

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", float: "X"}.get(action.type) or super()._get_default_metavar_for_optional(action)  # type: ignore

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip("\n").split("\n\n")
        return "\n\n".join(p if "\n " in f"\n{p}" else "\n".join(self._split_lines(p, width)) for p in paragraphs)


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line, without the page of usage; flags must be written out.

    Raises:
        UserError: instead of exiting.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": HelpFormatter, "allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def refuse_repeated_lists(self, words: Sequence[str]) -> None:
        """Refuse a flag that takes several values and is given twice: argparse would keep the last values only.

        Raises:
            UserError: names the flag.
        """
        for flag, action in self._option_string_actions.items():
            count = sum(word == flag or word.startswith(f"{flag}=") for word in words)
            if action.nargs in ("+", "*") and count > 1:
                raise UserError(f"{flag} is given {count} times; give it once, with all its values")


def run_tool(main: Callable[[list[str]], int], *, prints: bool = True) -> int:
    """`main(sys.argv[1:])`; a UserError becomes one line on stderr and exit code 2, an OSError a line and 1.

    Args:
        prints: False on all ranks of a node but one, which raise the same UserError.
    """
    guard_output(ends=True)
    try:
        return main(sys.argv[1:])
    except (UserError, OSError) as error:
        is_shared = isinstance(error, (UserError, CollectiveError))
        if prints or not is_shared:
            print(f"{Path(sys.argv[0]).name}: {one_line(error)}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UserError) else 1
    finally:
        sys.stdout.flush()  # now: at exit a reader that has gone would be a traceback


def run_and_exit(main: Callable[[list[str]], object]) -> NoReturn:
    """`main(sys.argv[1:])`, then the end of the process as Python makes it, but without C++'s teardown.

    There gloo's threads abort now and then, and exit code 0 or 2 becomes 134.
    """
    code: object = 0
    try:
        main(sys.argv[1:])
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # ends pools (torch.compile has one), then joins threads
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # the reader is gone
                stream.flush()
    finally:
        os._exit(code if isinstance(code, int) else 1)
