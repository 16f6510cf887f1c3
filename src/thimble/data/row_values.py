"""Values in rows: what they are called in messages, when they count as empty, and how they become text."""

import datetime
import decimal
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from thimble.errors import DataError, listing

SHOWN = 40  # characters of a value or of a name
_WRITTEN_LIST = re.compile(r"(?s)\[\s*(['\"].*['\"]|\d+\s*,.*)\s*\]")


def describe(value: Any) -> str:
    """Say what kind of thing a value is, with its beginning."""
    if value is None:
        return "missing"
    if isinstance(value, str):
        return f'"{value[:SHOWN]}{"..." if len(value) > SHOWN else ""}"' if value else "empty"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, Mapping):
        return f"an object with {listing(map(shown, value)) or 'nothing in it'}"
    return f"{value!r}"[:SHOWN]


def is_written_list(value: Any) -> bool:
    """Whether a text is a list as tables of text hold it, which is no single label; a tag such as [PER] is one."""
    return isinstance(value, str) and bool(_WRITTEN_LIST.fullmatch(value.strip()))


def shown(name: Any) -> str:
    """A name of a column as messages show it: in one line and not without end."""
    name = str(name)
    name = name if name.isprintable() else repr(name)[1:-1]
    return (f"{name[:SHOWN]}..." if len(name) > SHOWN else name) or "''"


def is_missing(value: Any) -> bool:
    """Whether a table has nothing in a cell: null, NaN, or what pandas has for them."""
    return value is None or _is_nan(value) or type(value).__name__ in ("NAType", "NaTType")


def is_filled(value: Any) -> bool:
    """Whether a value says anything: no null, NaN or white space, and no list or object that holds nothing else."""
    if isinstance(value, str):
        return not value.isspace() if value else False
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, str):
            if value.strip():
                return True
        elif value is not None and not _is_nan(value):
            return True
    return False


def text_of(value: Any, where: str) -> str:
    """A value that must be text already."""
    if not isinstance(value, str):
        raise DataError(f"{where} is {describe(value)}: expected text")
    refuse_halves(value, where)
    return value


def refuse_halves(value: Any, where: str) -> None:
    """Refuse half of a character, which nothing can write, in a text or anywhere in another value."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} has half of a character at position {error.start} (a lone surrogate): expected whole characters"
        ) from error


def sole(value: Any) -> Any:
    """The only item of a list, as programs for labelling write a label where there may be several; else the value."""
    is_one = isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], str | int | float)
    return value[0] if is_one else value


def cell_text(value: Any, where: str) -> str:
    """A cell of a column that the user named, as text: numbers as JSON writes them, nothing where it is empty."""
    if value is None or _is_nan(value):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return json.dumps(value)
    if isinstance(value, decimal.Decimal | datetime.date | datetime.time):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{where} is {describe(value)}: expected text, a number, or true or false")
    return text_of(value, where)


def printed(value: Any) -> str:
    """What to add to the refusal of a text that is a list as Python prints it; nothing for any other."""
    is_printed = isinstance(value, str) and value.lstrip()[:3] in ("[{'", "['{")
    return " (a list as Python prints it, which is no JSON: write the column with json.dumps)" if is_printed else ""


def loaded(value: Any) -> Any:
    """Read JSON that was stored as text, as CSV files and some data sets do; other text stays as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def yes_or_no(value: Any) -> bool | None:
    """Read a switch: true or false, 1 or 0, or these as text; None for anything else."""
    if isinstance(value, str):
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(
            value.lower().strip()
        )
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def _is_nan(value: Any) -> bool:
    return isinstance(value, float | decimal.Decimal) and math.isnan(value)
