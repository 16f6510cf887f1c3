"""Values of Arrow as JSON would hold them: structs without what is null, maps as objects, dates and decimals as text
and numbers.
"""

import datetime
import decimal
from collections.abc import Callable
from typing import Any

Convert = Callable[[Any], Any]


def converter(kind: Any, is_old_sequence: bool = False) -> Convert | None:
    """What turns values of an Arrow type, as pyarrow gives them, into values of JSON; None if they are already.

    Args:
        kind: The type.
        is_old_sequence: Whether a struct of lists stands for a list of structs, as datasets once stored it.

    Returns:
        A function of one value that is not null, or None.
    """
    import pyarrow

    types = pyarrow.types
    if hasattr(kind, "storage_type"):
        return converter(kind.storage_type)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return converter(kind.value_type)
    if types.is_struct(kind):
        convert = _struct({field.name: converter(field.type) for field in kind})
        return (lambda value: _transposed(convert(value))) if is_old_sequence else convert
    if types.is_map(kind):
        return _map(converter(kind.item_type))
    if isinstance(kind, _list_types()):
        return _list(converter(kind.value_type))
    if types.is_floating(kind):
        return lambda value: value if value == value else None  # NaN is how tables write an empty cell
    return _by_python if _needs_text(kind) else None


def _list_types() -> Any:
    import pyarrow

    names = ("ListType", "LargeListType", "FixedSizeListType", "ListViewType", "LargeListViewType")
    return tuple(getattr(pyarrow, name) for name in names if hasattr(pyarrow, name))


def _needs_text(kind: Any) -> bool:
    from pyarrow import types

    checks = (types.is_temporal, types.is_decimal, types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    more = [getattr(types, name) for name in ("is_binary_view", "is_union") if hasattr(types, name)]
    return any(check(kind) for check in (*checks, *more))


def _struct(fields: dict[str, Convert | None]) -> Convert:
    def convert(value: Any) -> Any:
        if value is None:
            return None
        kept = {name: _apply(fields[name], inner) for name, inner in value.items() if inner is not None}
        return {name: inner for name, inner in kept.items() if inner is not None}

    return convert


def _list(inner: Convert | None) -> Convert | None:
    return (lambda value: [_apply(inner, item) for item in value]) if inner else None


def _map(inner: Convert | None) -> Convert:
    return lambda value: {str(key): _apply(inner, item) for key, item in value}


def _apply(convert: Convert | None, value: Any) -> Any:
    return value if convert is None or value is None else convert(value)


def _transposed(value: Any) -> Any:
    """A list of objects, of an object of lists."""
    lists = list(value.values())
    if not lists or not all(isinstance(items, list) for items in lists) or len(set(map(len, lists))) != 1:
        return value
    rows = (dict(zip(value, items, strict=True)) for items in zip(*lists, strict=True))
    return [{name: inner for name, inner in row.items() if inner is not None} for row in rows]


def _by_python(value: Any) -> Any:
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return str(value) if isinstance(value, datetime.timedelta) else value
