"""From one row, in any of the forms in wide use, to a checked record, and what of the row was not used.

Knows neither files nor models. What is wrong is raised as `DataError`, all of a row at once, without the place: the
caller puts the file and line in front. The forms stand in `row_forms`, messages in `row_messages`, names in `columns`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from thimble.data.columns import Fields, Left, NamedCheck, NamedColumns
from thimble.data.row_forms import FORMS, OPTIONAL, recognise
from thimble.data.row_messages import are_messages, read_tools
from thimble.data.row_values import describe
from thimble.errors import DataError, Problems


@dataclass(frozen=True)
class Record:
    """One example: a conversation or a text."""

    messages: tuple[dict[str, Any], ...] | None = None  # OpenAI form; the arguments of calls are objects
    text: str | None = None  # plain text, instead of messages
    tools: tuple[dict[str, Any], ...] | None = None  # OpenAI tool definitions
    source: str = ""  # "train.jsonl line 12"
    prompt: str | None = None  # prompt and completion as given: a base without chat template joins them
    completion: str | None = None


R = TypeVar("R")


class Parsed(NamedTuple, Generic[R]):
    """A record with what the row told about itself."""

    record: R
    form: str  # "Alpaca"
    left: Left  # columns and keys that were not read


class RowReader:
    """Reads rows one by one, by the columns that the user named or else by those that are known."""

    def __init__(self, named: NamedColumns | None = None) -> None:
        self._named = named or NamedColumns()
        self._check = NamedCheck(self._named)

    def parse(self, row: Any, source: str) -> Parsed[Record]:
        """Recognise the form of a row and check it; a DataError says everything that is wrong with it."""
        row = {"messages": row} if are_messages(row) else row
        if not isinstance(row, Mapping):
            raise DataError(f"the row is {describe(row)}: expected an object in one of the forms {'; '.join(FORMS)}")
        fields, left, problems = Fields(row), Left(), Problems()
        self._check.see(fields)
        form, read = recognise(fields, self._named, left)
        parts = problems.attempt(read) or {}
        tools = problems.attempt(_tools, fields, parts, left) if "text" not in parts else None
        if problems.found:
            raise DataError(*problems.found)
        if tools:
            form, parts = f"{form} with tools", {"messages": parts["messages"], "tools": tools}
        elif any(message.get("tool_calls") for message in parts.get("messages") or ()):
            form = f"{form} with tools"
        fields.pass_over(OPTIONAL)
        fields.leave(left, {(turn["content"] or "").strip() for turn in parts.get("messages") or ()} - {""})
        return Parsed(Record(source=source, **parts), form, left)

    def check(self) -> None:
        """Raise a DataError if a column that the user named is in none of the rows read so far."""
        self._check.check()


def _tools(fields: Fields, parts: Mapping[str, Any], left: Left) -> tuple[dict[str, Any], ...]:
    """The definitions of tools of a row: of a column, or of a system message."""
    found = [turn.pop("tools") for turn in parts.get("messages") or () if "tools" in turn]
    found += [tools] if (tools := read_tools(fields, left)) else []
    if any(tools != found[0] for tools in found):
        raise DataError("tools are defined differently in two places of the row: leave one of them out")
    return found[0] if found else ()


def parse_row(row: Any, source: str) -> Parsed[Record]:
    """Recognise the form of a row by its columns and check it; a DataError says everything that is wrong with it."""
    return RowReader().parse(row, source)


def said(counts: Mapping[str, int]) -> str:
    """Say in which form the rows are, by how many there are of each, with counts if they are mixed."""
    if len(counts) < 2:
        return next(iter(counts), "")
    return ", ".join(f"{form} ({count:,})" for form, count in sorted(counts.items(), key=lambda item: -item[1]))
