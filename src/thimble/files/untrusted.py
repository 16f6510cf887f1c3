"""Files from untrusted sources: opened only if they are plain files, and JSON taken only if it can be read in one way.

Nothing is made of a file before its kind and its size are known. A pipe would block, a device might act, and of two
equal keys each reader would keep another one.
"""

import json
import math
import os
import re
import reprlib
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from thimble.errors import InputError, escaped, plural

MOST_VALUES = 500_000  # in one JSON file: a few tens of megabytes once it is read
LFS_POINTER = b"version https://git-lfs"  # how a file begins that stands for another one in a repository
MOST_DEPTH, MOST_DIGITS = 64, 100
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_KINDS = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
          (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))  # fmt: skip

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def shown(value: Any) -> str:
    """A value as it may stand in a message: its repr, short however large the value is."""
    text = _SHORT.repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def printable(text: str, most: int = 300) -> str:
    """A text as it may stand in a message: nothing that a terminal would act on, and not without end."""
    return escaped("".join("?" if unicodedata.category(char) == "Cc" else char for char in text[:most]))


def names_in(folder: Path) -> list[str]:
    """What a folder holds, for messages."""
    return sorted(printable(path.name, 80) for path in folder.iterdir())


def some(problems: Iterable[str], most: int = 20) -> list[str]:
    """The first problems of what may be very many, and how many more there are."""
    problems = list(problems)
    more = len(problems) - most
    return problems[:most] + ([f"and {plural(more, 'problem')} more of this kind"] if more > 0 else [])


def open_plain(path: Path, error: type[InputError]) -> BinaryIO:
    """Open a file for reading if it is a plain one, or a link to one, else raise `error`; never blocks.

    What is asked is the open handle, so that nothing can take the place of the file in between.
    """
    try:
        _refuse_kind(path, os.stat(path).st_mode, error)  # asked first too: to open a device can make it act
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
        handle = os.open(path, flags)
    except (OSError, ValueError) as reason:  # ValueError: a NUL in the name
        what = getattr(reason, "strerror", None) or reason
        raise error(f"{printable(str(path))} cannot be opened ({what}): expected a file that can be read") from None
    try:
        _refuse_kind(path, os.fstat(handle).st_mode, error)
    except BaseException:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


def _refuse_kind(path: Path, mode: int, error: type[InputError]) -> None:
    if stat.S_ISREG(mode):
        return
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
    raise error(f"{printable(str(path))} is {kind}: expected a file; put the file itself in its place")


def read_bytes(path: Path, most_bytes: int, error: type[InputError]) -> bytes:
    """Read a whole file that must not be larger than `most_bytes`; else raise `error`."""
    with open_plain(path, error) as file:
        try:
            is_large = os.fstat(file.fileno()).st_size > most_bytes
            content = b"" if is_large else file.read(most_bytes + 1)  # some files do not know their size
        except OSError as reason:
            raise error(f"{printable(str(path))} cannot be read ({reason.strerror}): copy it again") from None
    if is_large or len(content) > most_bytes:
        raise error(
            f"{printable(str(path))} is larger than {most_bytes:,} bytes, which no honest file of its kind is: "
            "copy it again from where it came from"
        )
    if content.startswith(LFS_POINTER):
        raise error(f"{printable(str(path))} is a Git LFS pointer, not the file itself: run `git lfs pull`")
    return content


def read_json_object(path: Path, most_bytes: int, error: type[InputError]) -> dict[str, Any]:
    """Read a JSON file of one object; `error` if it is no plain file, too large, or not strict JSON in UTF-8."""
    content = read_bytes(path, most_bytes, error)
    try:
        return parse_json_object(content)
    except ValueError as reason:
        why = printable(str(reason))
        raise error(f"{printable(str(path))} is damaged: {why}. Expected JSON; copy the file again.") from None


def parse_json_object(content: bytes) -> dict[str, Any]:
    """Parse one JSON object: UTF-8, no key twice, no NaN, no endless number, no half character; else a ValueError."""
    if content.count(b",") + content.count(b"[") + content.count(b"{") > MOST_VALUES:
        raise ValueError(f"it holds more than {MOST_VALUES:,} values")
    try:
        hooks = {"parse_constant": _refuse, "parse_float": _finite, "parse_int": _whole}
        value = json.loads(content.decode(), object_pairs_hook=_unique_pairs, **hooks)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {content[error.start]:#04x} at {error.start:,} is not UTF-8") from None
    except json.JSONDecodeError as error:
        is_page = content.lstrip().startswith(b"<")
        raise ValueError("it is a web page, not the file itself" if is_page else f"it is not JSON ({error})") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    _check_depth(value)
    if _SURROGATE.search(content):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half of a character (a lone surrogate), which is no text") from None
    return value


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON pairs; `json` would silently keep the last of two equal keys."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"a key occurs twice, {shown(twice)}")
    return result


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:  # their squares are what it takes to read them
        raise ValueError(f"a number has {len(text):,} digits")
    return int(text)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MOST_DEPTH):
        inner = [item for item in level if isinstance(item, dict | list)]
        if not inner:
            return
        level = [child for item in inner for child in (item.values() if isinstance(item, dict) else item)]
    raise ValueError(f"it is nested more than {MOST_DEPTH} deep")


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a file, followed through links, lies in a folder, or where the hub's client keeps the files of one."""
    home, place = folder.resolve(), path.resolve()
    models = [parent for parent in home.parents if parent.name.startswith("models--")]  # models--owner--name/snapshots
    return any(place.is_relative_to(room) for room in (home, *((model / "blobs").resolve() for model in models)))
