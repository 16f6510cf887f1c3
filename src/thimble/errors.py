"""Every error Thimble raises on purpose.

    ThimbleError                    exit code 1 (a fault of ours, if raised bare)
    ├── InputError                  exit code 2: refused before any work was done
    │   ├── ConfigError             an option has a bad name or value
    │   ├── DataError               the user's examples cannot be used
    │   ├── BaseModelError          the base model is missing, damaged or not supported
    │   ├── AdapterError            an adapter is damaged or does not belong to this base
    │   ├── MissingPackageError     an optional package is needed; says what to install
    │   └── DoesNotFitError         the work does not fit this machine or the memory budget
    └── RunError                    exit code 3: the work began and failed honestly

A message says what failed, the value, what was expected, where, and what to do next. One error can carry
several problems, so a user mends everything in one go.
"""

import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class ThimbleError(Exception):
    """Base of all errors Thimble raises on purpose; holds one or more problems, one sentence each."""

    exit_code = 1

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class InputError(ThimbleError):
    """Refused before any work was done."""

    exit_code = 2


class ConfigError(InputError, ValueError):
    """An option has a bad name or value."""


class DataError(InputError, ValueError):
    """The user's examples cannot be used."""


class BaseModelError(InputError):
    """The base model is missing, damaged or not supported."""


class AdapterError(InputError):
    """An adapter is damaged or does not belong to this base."""


class MissingPackageError(InputError, ImportError):
    """An optional package is needed."""


class DoesNotFitError(InputError, MemoryError):
    """The work does not fit this machine or the memory budget."""


class RunError(ThimbleError):
    """The work began and failed honestly; what was learned until then is kept."""

    exit_code = 3


class Problems:
    """Collects the problems of several independent checks, so that they are all told at once.

    >>> problems = Problems(["--rank 0: expected at least 1"])
    >>> base = problems.attempt(open, "/no/such/file") if False else None
    >>> problems.found
    ['--rank 0: expected at least 1']
    """

    def __init__(self, found: Iterable[str] = ()) -> None:
        self.found = list(found)

    def attempt(self, check: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Call `check`; keep the problems of an InputError and return None instead of raising it."""
        try:
            return check(*args, **kwargs)
        except InputError as error:
            self.found.extend(error.problems)
            return None

    def add(self, *problems: str) -> None:
        """Note further problems."""
        self.found.extend(problems)

    def required(self, *parts: Any) -> tuple[Any, ...]:
        """Return what the checks gave, or raise one InputError that holds every problem noted so far."""
        if self.found:
            raise InputError(*dict.fromkeys(self.found))
        return parts


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """Say a count in words: `1 row`, `3 rows`."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def listing(items: Iterable[Any], most: int = 8) -> str:
    """Join the first `most` items with commas and say how many were left out."""
    items = [escaped(str(item)) for item in items]
    shown = ", ".join(items[:most])
    return shown + (f" and {len(items) - most} more" if len(items) > most else "")


# The packages that each extra of ours brings.
EXTRAS = {
    "hub": "huggingface_hub",
    "parquet": "pyarrow",
    "llamacpp": "xllamacpp",
    "models": "transformers safetensors pillow soundfile soxr jiwer",
    "serve": "starlette uvicorn pydantic prometheus-client llguidance",
}


def install_line(extra: str) -> str:
    """What to type to install an extra: from the checkout that this program runs from, else the package by its name."""
    checkout = Path(__file__).parents[2]
    if not (checkout / "pyproject.toml").is_file():
        return f"pip install {EXTRAS[extra]}"
    return (
        f'pip install -e ".[{extra}]"'
        if checkout == Path.cwd()
        else f"pip install -e {shlex.quote(f'{checkout}[{extra}]')}"
    )


# What steers a terminal or turns the order of letters, and the bytes of a name that is not UTF-8 (lone surrogates).
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def escaped(text: str, kept: str = "") -> str:
    r"""A text with nothing that a terminal would act on: control characters but for those to be kept, marks of
    direction, and bytes that are no UTF-8, are written out.

    >>> print(escaped("a\x1b[2J\u202eb"))
    a\x1b[2J\u202eb
    """
    return _UNSEEN.sub(lambda match: match[0] if match[0] in kept else _written_out(match[0]), text)


def _written_out(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00  # a byte of a name
    names = {9: "t", 10: "n", 13: "r"}
    return "\\" + (names.get(code) or (f"x{code:02x}" if code < 0x100 else f"u{code:04x}"))


def as_word(path: str) -> str:
    r"""A path as one word of a command line, whatever it holds.

    >>> print(as_word("runs/a-1"), as_word("my data"), as_word("-x"), as_word("it's\n"))
    runs/a-1 'my data' ./-x $'it\'s\n'
    """
    path = f"./{path}" if path.startswith("-") else path
    if re.fullmatch(r"[\w@%+=:,./-]+", path):
        return path
    if not _UNSEEN.search(path):
        return shlex.quote(path)
    parts = re.split(f"({_UNSEEN.pattern})", path)
    plain = (part.replace("\\", "\\\\").replace("'", "\\'") for part in parts[::2])
    odd = [*map(_written_out, parts[1::2]), ""]
    return "$'" + "".join(text + char for text, char in zip(plain, odd, strict=True)) + "'"
