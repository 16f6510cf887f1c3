"""Values of options: how they are checked, read from text, YAML or Python, and written as they are typed."""

import contextlib
import difflib
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from thimble.core.method import MOST_SCALE, parse_init
from thimble.errors import as_word

AUTO = "auto"
MOST_CORES = 1024  # of a machine
MOST_SEED = 2**63 - 1
NO_AUTO_INIT = (
    "Thimble does not choose an init, because the share of the gradient that an init captures does not foretell which "
    "one trains better (measured in benchmarks/initialisation.md); leave it out for --init kaiming, or see what each "
    "init captures with: thimble inspect --data DATA"
)

# Where the path stands in a value that names one; a base may be a function in a file of the user's own.
BASE_PATH = r"(?s)(.+\.py(?=:\w+$)|.+?)(?:(?<=\.py):\w+)?"
WHOLE_PATH, INIT_PATH, METRIC_PATH = r"(?s)(.+)", r"(?s)adapter:(.+)", r"(?s)(.+\.py):[^:]*"
_FOR_SHELLS = re.compile(r"""[\s"'$`\\()<>|&;#!]""")  # what a shell would take for something else

Check = Callable[[Any], str | None]  # what is wrong with a value, such as "expected at least 1", or None


def at_least(low: float) -> Check:
    """Make a check for numbers from `low` upwards."""
    return lambda value: None if value >= low else f"expected at least {low:g}"


def seed(value: int) -> str | None:
    """Check a seed: what draws from it keeps it in 64 bits, with a sign."""
    return "expected at least 0" if value < 0 else f"expected at most {MOST_SEED}" if value > MOST_SEED else None


def above(low: float) -> Check:
    """Make a check for finite numbers greater than `low`."""
    return lambda value: None if math.isfinite(value) and value > low else f"expected a finite number above {low:g}"


def fraction(value: float) -> str | None:
    """Check a part of something that leaves a rest: from 0 up to, not including, 1."""
    return None if 0 <= value < 1 else "expected a fraction from 0 up to, but not including, 1"


def share(value: float) -> str | None:
    """Check a part of something that may be all of it, but not nothing."""
    return None if 0 < value <= 1 else "expected a share above 0 and up to 1"


def alpha(value: float) -> str | None:
    """Check the numerator of a scale; readers of adapters refuse one that is larger."""
    return None if 0 < value <= MOST_SCALE else f"expected a number above 0, at most {MOST_SCALE:g}"


def init(value: str) -> str | None:
    """Check the name of an init."""
    if value == AUTO:
        return NO_AUTO_INIT
    try:
        parse_init(value)
    except ValueError as error:
        return str(error)
    return None


def pattern(value: Sequence[str]) -> str | None:
    """Check pairs of a target and a number, such as `q_proj=8`."""
    for pair in value:
        target, _, number = pair.rpartition("=")
        if not target or not re.fullmatch(r"\d+(\.\d+)?(e[+-]?\d+)?", number) or not 0 < float(number) <= MOST_SCALE:
            return f"expected pairs such as q_proj=8,down_proj=32, with numbers above 0, at most {MOST_SCALE:g}"
    return None


def rank_pattern(value: Sequence[str]) -> str | None:
    """Check pairs of a target and a rank."""
    wrong = pattern(value)
    if wrong is None and any(number % 1 for number in read_pattern(value).values()):
        return "expected whole numbers as ranks"
    return wrong


def machine(value: Sequence[str]) -> str | None:
    """Check what is known of a machine, such as `cores=4` and `memory=8GB`."""
    try:
        read_machine(value)
    except ValueError as error:
        return str(error)
    return None


def read_machine(pairs: Sequence[str]) -> tuple[int | None, int | None]:
    """The cores and the bytes of memory of a machine, None for what is not said; else a ValueError.

    >>> read_machine(("cores=4", "memory=8GB")), read_machine(("memory=500 MB",))
    ((4, 8000000000), (None, 500000000))
    """
    found: dict[str, int] = {}
    for pair in pairs:
        name, _, text = (part.strip() for part in pair.partition("="))
        if name not in ("cores", "memory") or name in found:
            raise ValueError("expected cores, memory or both, each once, as in cores=4,memory=8GB")
        if name == "cores" and not (text.isdecimal() and 1 <= int(text) <= MOST_CORES):
            raise ValueError(f"cores={text}: expected a whole number from 1 to {MOST_CORES}")
        found[name] = int(text) if name == "cores" else parse_size(text)
    return found.get("cores"), found.get("memory")


def one_of(choices: Sequence[str], value: object) -> str:
    """What is wrong with a value that is none of the choices, with the nearest one."""
    near = difflib.get_close_matches(str(value), choices, n=1)
    return f"expected one of {', '.join(choices)}" + (f"; did you mean {near[0]}?" if near else "")


def some_of(choices: Sequence[str]) -> Check:
    """Make a check for several values, each one of the choices."""

    def check(values: Sequence[str]) -> str | None:
        wrong = [value for value in values if value not in choices]
        return one_of(choices, wrong[0]) if wrong else None

    return check


def read_pattern(pairs: Sequence[str]) -> dict[str, float]:
    """Read pairs that `pattern` accepts: target to number, in the order given.

    >>> read_pattern(("q_proj=8", "mlp=32"))
    {'q_proj': 8.0, 'mlp': 32.0}
    """
    return {target: float(number) for target, _, number in (pair.rpartition("=") for pair in pairs)}


def template(value: str) -> str | None:
    """Check a template of prompts."""
    try:
        has_columns = any(name for _, name in read_template(value))
    except ValueError as error:
        return str(error)
    return None if has_columns or not value else "expected at least one column in braces, such as {question}"


def read_template(text: str) -> list[tuple[str, str]]:
    r"""Read a template: pairs of literal text and the name of the column behind it, which is empty at the end.

    Columns stand in braces, under any name without braces; `{{` and `}}` are braces of the text, `\n` is a line break,
    `\t` a tab and two backslashes are one. Raises a ValueError for a brace without its partner.

    >>> read_template("About {the subject}: {{{body}}}")
    [('About ', 'the subject'), (': {', 'body'), ('}', '')]
    """
    pieces, before, edge = [], "", 0
    for match in re.finditer(r"\{\{|\}\}|\\[nt\\]|\{([^{}]*)\}|[{}]", text):
        before, edge, name = before + text[edge : match.start()], match.end(), match[1]
        if name:
            pieces.append((before, name))
            before = ""
        elif match[0] in _WRITTEN:
            before += _WRITTEN[match[0]]
        else:
            what = "names no column" if name == "" else "has no partner"
            raise ValueError(
                f"{match[0]} at character {match.start() + 1} {what}; write {{{{ and }}}} for braces of the text"
            )
    return [*pieces, (before + text[edge:], "")]


_WRITTEN = {"{{": "{", "}}": "}", r"\n": "\n", r"\t": "\t", r"\\": "\\"}  # in a template, and what it means


def parse_size(value: object) -> int:
    """Read bytes: a number, or text such as `4GB` or `1.5 GiB` (1 GB = 1e9, 1 GiB = 2^30 bytes); else a ValueError.

    >>> parse_size("4GB"), parse_size("1.5 MiB")
    (4000000000, 1572864)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgt]?)(i?)b?\s*", str(value), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise ValueError("expected a size such as 4GB or 500MB")
    power = " kmgt".index(match[2].lower() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def parse_bool(value: object) -> bool:
    """Read true or false as YAML and people write them; raises a ValueError for anything else."""
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if str(value).lower() not in words:
        raise ValueError("expected true or false")
    return words[str(value).lower()]


def parse_number(kind: type, value: Any) -> int | float:
    """Read an int or a float; YAML reads 1e-5 as text, so the type of the option decides. Raises a ValueError."""
    with contextlib.suppress(ValueError, TypeError):  # a TypeError: YAML reads 2026-11-30 as a date
        if not isinstance(value, bool | dict | list):
            number = float(value)
            if kind is float or number.is_integer():
                return number if kind is float else int(number)
    raise ValueError("expected a whole number" if kind is int else "expected a number")


def parse(kind: Any, value: Any) -> Any:
    """Read text, or what YAML or Python gave, as int, float, bool, str or a tuple of str or float; a ValueError says
    what was expected. A tuple is read from a list or a set, from text with commas, or from a mapping of targets to
    numbers.
    """
    if kind is bool:
        return parse_bool(value)
    if kind in (int, float):
        return parse_number(kind, value)
    if typing.get_origin(kind) is tuple:
        if isinstance(value, Mapping):
            value = [f"{name}={number}" for name, number in value.items()]
        value = sorted(map(str, value)) if isinstance(value, set | frozenset) else value  # as PEFT's target_modules
        parts = value if isinstance(value, list | tuple) else str(value).split(",")
        texts = tuple(str(part).strip() for part in parts if str(part).strip())
        return tuple(parse_number(float, text) for text in texts) if typing.get_args(kind)[0] is float else texts
    if isinstance(value, dict | list | bool):
        raise ValueError("expected text")
    return str(value)


def flag(name: str) -> str:
    """An option as it is typed: `--learning-rate` for `learning_rate`."""
    return "--" + name.replace("_", "-")


def as_typed(value: object) -> str:
    """Write a value as it is typed on a command line; None is what is chosen for the user, `auto`.

    >>> as_typed(("q_proj", "v_proj")), as_typed(True), as_typed(None), as_typed("")
    ('q_proj,v_proj', 'true', 'auto', "''")
    """
    if value is None:
        return AUTO
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return as_word(text) if not text or _FOR_SHELLS.search(text) else text
