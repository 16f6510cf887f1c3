"""Standard input, output and error, as they may be: closed, full, a pipe nobody reads, or without most letters.

What a command tells while it works must not end it. Its result is told, or why it cannot be.
"""

import contextlib
import io
import os
import shutil
import sys
from typing import Any, TextIO

FALLBACK_COLUMNS = 100  # of what is no terminal


def prepare_streams() -> None:
    """Have all three streams there, and lose no result because a terminal lacks a letter."""
    for number in range(3):  # else the next file that is opened would take the place, and what is printed
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - it lives as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")


def say(text: str, stream: TextIO, end: str = "\n") -> None:
    """Write what would be good to know; where that is impossible, do without."""
    try:
        print(text, end=end, file=stream, flush=True)
    except (OSError, ValueError):  # ValueError: it was closed
        silence(stream)


def write_result(text: str, end: str = "\n") -> str | None:
    """Write to standard output; why that is impossible, unless it is because its reader has left."""
    try:
        print(text, end=end, file=sys.stdout, flush=True)  # noqa: T201 - the result
    except BrokenPipeError:
        silence(sys.stdout)
    except OSError as error:
        silence(sys.stdout)
        return error.strerror or str(error)
    return None


def silence(stream: Any) -> None:
    """Have a stream that failed take anything from now on, what it has buffered too."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # one that is no file
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def is_terminal(stream: TextIO) -> bool:
    """Whether a line can be written over: not in a pipe, and not in a terminal that knows no commands."""
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


def columns(stream: TextIO | None = None) -> int | None:
    """How many letters a line has: as COLUMNS says, or the terminal; None where there is no limit."""
    is_limited = os.environ.get("COLUMNS", "").isdigit() or (stream or sys.stdout).isatty()
    width = shutil.get_terminal_size((FALLBACK_COLUMNS, 24)).columns
    return max(20, width) if is_limited else None
