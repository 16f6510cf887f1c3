"""Filters and tests a chat template may use: those of Jinja that templates need, each of which pays before it works.

What is missing here writes for web pages, draws lots or reads like an attribute past the rules; no template misses it.
"""

import functools
import json
import pprint
import textwrap
from collections.abc import Callable
from typing import Any

from thimble.data.sandbox.bounded import (
    MARKUP,
    add,
    call_method,
    check_number,
    compare,
    comparison,
    concat,
    key,
    modulo,
    pieces,
    sliced,
)
from thimble.data.sandbox.budget import (
    UNIT_BYTES,
    Counted,
    RunawayTemplateError,
    current,
    join,
    listed,
    measure,
    produce,
    text,
    units_of,
    weigh,
)

Filter = Callable[..., Any]

INNER = "="  # begins the names of filters that the compiler calls for us, which no template can write
MAX_ATTRIBUTE = 1000  # characters of a.b.c
MAX_WRAPPED = 20_000  # characters of a text whose lines are broken
MAX_INDENT = 32  # characters between two values of JSON
MAX_PLACES = 100  # of a rounded number

_FROM_TEXT = {
    "capitalize": 12,
    "escape": 4 * MARKUP,
    "lower": 12,
    "safe": 4,
    "title": 100,
    "upper": 12,
    "wordcount": 64,
}
_LAZY = ("map", "reject", "rejectattr", "select", "selectattr")
_SORTED = ("groupby", "max", "min", "sort")
_AS_THEY_ARE = ("abs", "default", "first", "items", "last", "length")
_ALSO = {"count": "length", "d": "default", "e": "escape"}


@functools.cache
def all_filters() -> dict[str, Filter]:
    """Filters by name, those for the compiler included."""
    from jinja2 import pass_environment
    from jinja2.filters import FILTERS

    ours: dict[str, Filter] = {
        "batch": _batch, "center": _center, "dictsort": _dictsort, "float": _float, "format": _format,
        "indent": _indent, "int": _int, "list": listed, "pprint": _pprint, "replace": _replace,
        "reverse": _reverse, "round": _round, "slice": _slice, "string": text, "tojson": _tojson,
        "trim": _trim, "wordwrap": _wordwrap,
    }  # fmt: skip
    takers = {"join": _join, "sum": _sum, "truncate": _truncate, "unique": _unique}
    ours |= {name: pass_environment(filter_) for name, filter_ in takers.items()}
    inner = {"add": add, "compare": compare, "concat": concat, "count": Counted, "key": key, "list": listed}
    inner |= {"slice": sliced, "spend": _spend}
    made = {name: FILTERS[name] for name in _AS_THEY_ARE} | ours
    made |= {name: _from_text(FILTERS[name], factor) for name, factor in _FROM_TEXT.items()}
    made |= {name: _lazy(FILTERS[name]) for name in _LAZY}
    made |= {name: _sorted(FILTERS[name]) for name in _SORTED}
    made |= {other: made[name] for other, name in _ALSO.items()}
    return made | {INNER + name: filter_ for name, filter_ in inner.items()}


@functools.cache
def all_tests() -> dict[str, Filter]:
    """Tests by name: Jinja's, those that compute or compare by our operators."""
    from jinja2.tests import TESTS

    made = dict(TESTS)
    names = {"eq": "== eq equalto", "ne": "!= ne", "gt": "> gt greaterthan", "gteq": ">= ge", "lt": "< lt lessthan"}
    names |= {"lteq": "<= le", "in": "in"}
    made |= {name: comparison(operator) for operator, known in names.items() for name in known.split()}
    made["odd"] = lambda value: modulo(value, 2) == 1
    made["even"] = lambda value: modulo(value, 2) == 0
    made["divisibleby"] = lambda value, number: modulo(value, number) == 0
    made["lower"] = lambda value: text(value).islower()
    made["upper"] = lambda value: text(value).isupper()
    return made


def _spend(units: int) -> None:
    current().spend(units)


# --- made of Jinja's


def _from_text(plain: Filter, factor: int) -> Filter:
    """A filter that makes of a text one at most `factor` bytes a letter."""

    def bounded(value: Any) -> Any:
        written = text(value)
        return produce(factor * len(written) + UNIT_BYTES * units_of(written), plain, written)

    return bounded


def _lazy(plain: Filter) -> Filter:
    """A filter that looks at item after item as it is asked for them."""
    from jinja2 import pass_context

    @pass_context
    def bounded(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        _check_attribute(kwargs.get("attribute"), *args[:1])
        return plain(context, Counted(value), *args, **kwargs)

    return bounded


def _sorted(plain: Filter) -> Filter:
    """A filter that compares items with each other."""
    from jinja2 import pass_environment

    @pass_environment
    def bounded(environment: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        _check_attribute(*args, *kwargs.values())
        items = listed(value)
        _pay_for_sorting(items)
        return plain(environment, items, *args, **kwargs)

    return bounded


def _pay_for_sorting(items: Any) -> None:
    current().spend(weigh(items) * len(items).bit_length())


def _check_attribute(*given: Any) -> None:
    for name in given:
        if isinstance(name, str) and len(name) > MAX_ATTRIBUTE:
            raise RunawayTemplateError(f"it names an attribute of more than {MAX_ATTRIBUTE:,} characters")


# --- lists


def _batch(value: Any, linecount: int, fill_with: Any = None) -> Any:
    from jinja2.filters import do_batch

    current().spend(max(0, linecount) // 4 if fill_with is not None else 0)
    return do_batch(Counted(value), linecount, fill_with)


def _slice(value: Any, slices: int, fill_with: Any = None) -> Any:
    from jinja2.filters import sync_do_slice

    return sync_do_slice(listed(value), slices, fill_with)


def _reverse(value: Any) -> Any:
    if isinstance(value, str):
        return sliced(value)[::-1]
    try:
        return reversed(value)
    except TypeError:
        return listed(value)[::-1]


def _unique(environment: Any, value: Any, case_sensitive: bool = False, attribute: Any = None) -> Any:
    from jinja2.filters import sync_do_unique

    _check_attribute(attribute)
    return sync_do_unique(environment, map(key, Counted(value)), case_sensitive, attribute)


def _dictsort(value: Any, *args: Any, **kwargs: Any) -> Any:
    from jinja2.filters import do_dictsort

    if isinstance(value, dict):
        _pay_for_sorting(value)
    return do_dictsort(value, *args, **kwargs)


def _sum(environment: Any, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    if isinstance(start, str):
        raise TypeError("sum cannot add texts; join can")
    return functools.reduce(add, _attributes(environment, Counted(value), attribute), start)


def _join(environment: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
    parts = [str(text(item)) for item in _attributes(environment, listed(value), attribute)]
    return join(parts, str(text(d)))


def _attributes(environment: Any, items: Any, attribute: Any) -> Any:
    from jinja2.filters import make_attrgetter

    _check_attribute(attribute)
    return items if attribute is None else map(make_attrgetter(environment, attribute), items)


# --- texts


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    limit = -1 if count is None else count
    return call_method(str(text(value)).replace, (str(text(old)), str(text(new)), limit), {})


def _trim(value: Any, chars: str | None = None) -> str:
    return call_method(text(value).strip, () if chars is None else (chars,), {})


def _center(value: Any, width: int = 80) -> str:
    return call_method(text(value).center, (width,), {})


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise TypeError("format takes values by their place or by their name, not both")
    return modulo(text(value), kwargs or args)


def _indent(value: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    from jinja2.filters import do_indent

    written = text(value)
    step = len(width) if isinstance(width, str) else max(0, width)
    current().spend(units_of(written))
    lines = 1 + pieces(written, "splitlines")
    room = 4 * (len(written) + lines * step) + 3 * UNIT_BYTES * lines
    return produce(room, do_indent, written, width, first, blank)


def _truncate(
    environment: Any, value: Any, length: int = 255, killwords: bool = False, *more: Any, **named: Any
) -> str:
    from jinja2.filters import do_truncate

    weight = weigh([value, more, named])
    return produce(UNIT_BYTES * 4 * weight, do_truncate, environment, value, length, killwords, *more, **named)


def _wordwrap(
    value: Any,
    width: int = 79,
    break_long_words: bool = True,
    wrapstring: str | None = None,
    break_on_hyphens: bool = True,
) -> str:
    lines = text(value).splitlines() if len(text(value)) <= MAX_WRAPPED else None
    if lines is None:
        raise RunawayTemplateError(f"it breaks the lines of a text of more than {MAX_WRAPPED:,} characters")
    current().spend(8 * len(value))
    wrap = functools.partial(textwrap.wrap, width=width, expand_tabs=False, replace_whitespace=False)
    wrapped = (wrap(line, break_long_words=break_long_words, break_on_hyphens=break_on_hyphens) for line in lines)
    between = "\n" if wrapstring is None else wrapstring
    return join([join(pieces, between) for pieces in wrapped], between)


def _pprint(value: Any) -> str:
    weight, depth = measure(value)
    current().spend(4 * weight * depth)  # each level writes all below it, to see whether it fits in a line
    return produce(10 * UNIT_BYTES * weight, pprint.pformat, value)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own tojson escapes <, > and & for web pages, which models have never seen.
    for given in (indent, *(separators or ())):
        if isinstance(given, str) and len(given) > MAX_INDENT or isinstance(given, int) and given > MAX_INDENT:
            raise RunawayTemplateError(f"it writes JSON with more than {MAX_INDENT} characters between two values")
    weight, depth = measure(value)
    # A letter is written as up to six; a step may begin a line of its own.
    room = weight * (12 * UNIT_BYTES + (0 if indent is None else 4 * MAX_INDENT * depth))
    write = functools.partial(json.dumps, ensure_ascii=ensure_ascii, indent=indent, separators=separators)
    return produce(room, functools.partial(write, sort_keys=sort_keys), value)


# --- numbers


def _int(value: Any, default: int = 0, base: int = 10) -> int:
    from jinja2.filters import do_int

    weigh(value)
    return check_number(do_int(value, default, base))


def _float(value: Any, default: float = 0.0) -> float:
    from jinja2.filters import do_float

    weigh(value)
    return do_float(value, default)


def _round(value: Any, precision: int = 0, method: Any = "common") -> Any:
    from jinja2.filters import do_round

    if not isinstance(value, int | float):
        raise TypeError(f"round takes a number, not {type(value).__name__}")
    if abs(precision) > MAX_PLACES:
        raise RunawayTemplateError(f"it rounds to more than {MAX_PLACES} places")
    return do_round(value, precision, method)
