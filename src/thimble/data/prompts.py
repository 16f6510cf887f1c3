"""The user's prompts: rows that wait for an answer, in the forms of the examples; one that they have is the reference.

A row is read as thimble.data.rows reads an example, with `PENDING_TEXT` where its answer would stand, so that prompts
are written exactly as training rows begin.
"""

import contextlib
import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from thimble.config.groups import ColumnOptions
from thimble.data.columns import Fields, NamedColumns, folded
from thimble.data.records import Skipped
from thimble.data.row_forms import ALSO_CHATS, CHATS, COMPLETIONS, HISTORIES, PROMPTS, SYSTEMS
from thimble.data.row_messages import are_messages, asked_messages, in_turn
from thimble.data.row_values import is_filled, is_missing
from thimble.data.rows import Record, RowReader, parse_row
from thimble.data.sources.find import find_files
from thimble.data.sources.kinds import TEXT, kind_of, refused_kind
from thimble.data.sources.raw import RawRow, Source, Told
from thimble.data.sources.read import read_rows
from thimble.data.spool import Spool
from thimble.errors import DataError, listing

PENDING_TEXT = "pending"  # stands for the answer while a row is read
PENDING_COLUMN = "the answer that is still to be written"
PENDING = {"role": "assistant", "content": PENDING_TEXT}
PLACES = ("output", "completion", "response", "answer")  # one of them makes an example of a row without an answer
WRITERS = {"user", "human"}  # beside a text, and beside what is asked, rather who wrote it
READ = {*CHATS, *COMPLETIONS, *PROMPTS, *SYSTEMS, *HISTORIES, "text", "tools", "functions"} - WRITERS
EXPECTED = "messages, prompt, question, instruction (and input), or text"


@dataclass(frozen=True)
class Prompt:
    """A row that waits for an answer."""

    row: int  # counted from 1 over all rows, those that cannot be answered too
    source: str  # "tickets.csv line 12"
    record: Record | None = None  # its messages end before the answer; None if the row cannot be answered
    reference: str | None = None  # the answer that the row has
    columns: dict[str, Any] = field(default_factory=dict)  # the row as it was given
    problem: str = ""  # why it cannot be answered

    @property
    def unread(self) -> dict[str, Any]:
        """The columns that have nothing to do with asking and answering."""
        return {name: value for name, value in self.columns.items() if folded(name) not in READ}

    @property
    def asked(self) -> dict[str, Any]:
        """What is asked, under the name of its form: `prompt` and `text` are texts, `messages` is a list."""
        if self.record is None:
            return {"prompt": None}
        if self.record.text is not None:
            return {"text": self.record.text}
        messages = self.record.messages or ()
        is_bare = len(messages) == 1 and messages[0]["role"] == "user" and not self.record.tools
        return {"prompt": messages[0]["content"]} if is_bare else {"messages": list(messages)}


class PromptReader:
    """Reads rows one by one, by the columns that the user named or else by those that are known."""

    def __init__(self, named: NamedColumns | None = None, of_run: NamedColumns | None = None) -> None:
        """Read by `named`; without it, rows that have the columns `of_run` by those, as the adapter was trained."""
        self._named = NamedColumns() if named is None else named  # without an answer they count as none
        self._of_run = PromptReader(of_run) if of_run else None
        self.as_in_run = self.otherwise = 0  # rows that have the columns of the run, and rows that do not
        asked = replace(self._named, completion=PENDING_COLUMN) if self._named.prompt or self._named.template else None
        self._is_named = bool(asked or self._named.text)
        self._reader = RowReader(asked or self._named)

    @classmethod
    def of(cls, config: ColumnOptions, run: ColumnOptions | None = None) -> Self:
        """A reader of the columns that the options name, or else those of the run that trained the adapter."""
        return cls(_columns_of(config), _columns_of(run) if run else None)

    def parse(self, row: Any, source: str) -> tuple[Record, str | None]:
        """A row as a record that ends before its answer, and the answer it has; a DataError says what is wrong."""
        if not self._is_named and self._of_run and isinstance(row, Mapping):
            if self._of_run.fits(row):
                self.as_in_run += 1
                return self._of_run.parse(row, source)
            self.otherwise += 1
        if not self._is_named or not isinstance(row, Mapping):
            return parse_prompt(row, source)
        if self._named.text:
            return self._reader.parse(row, source).record, None
        record = self._reader.parse({**row, PENDING_COLUMN: PENDING_TEXT}, source).record
        if not _is_asked(record):
            raise DataError("the prompt is empty: expected what is asked")
        answer = Fields(row).cell(self._named.completion) if self._named.completion else None
        reference = None if is_missing(answer) or answer == "" else _reference(answer)
        return replace(record, messages=(record.messages or ())[:-1], completion=None), reference

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has all columns that make the prompt."""
        fields = Fields(row)
        return all(fields.has(name) for name in replace(self._named, completion="").used())

    def check(self) -> None:
        """Raise a DataError if a column that the user named is in none of the rows read so far."""
        self._reader.check()


def _columns_of(config: ColumnOptions) -> NamedColumns:
    return NamedColumns(config.prompt_column, config.completion_column, config.prompt_template, config.text_column)


def read_prompts(path: str | Path, skipped: Skipped, reader: PromptReader | None = None) -> tuple[Spool[Prompt], Told]:
    """Read all rows of a file, or of a folder its test file, else its valid file, else all there is.

    A row of a .txt file is a line, of an .md file the whole. What cannot be read is kept with its problem and noted in
    `skipped`; a DataError if a file cannot be read at all, or there is nothing in it. Returned with what is worth
    telling about the files.
    """
    _refuse_prompt(str(path))
    splits, told = find_files(Path(path))
    files = splits.get("test") or splits.get("valid") or splits["train"]
    return keep_prompts(_raw_rows(files, told), skipped, listing(file.name for file in files), reader), told


def _refuse_prompt(text: str) -> None:
    """Refuse what is no name of a file but rather a prompt itself."""
    is_named = kind_of(Path(text)) or refused_kind(Path(text)) or len(text.split()) < 2
    if not is_named and not os.path.lexists(text):
        raise DataError(
            f"{text} is no file; if it is a prompt, ask it with: thimble chat --prompt {shlex.quote(text)}; in Python "
            "prompts are given in a list"
        )


def keep_prompts(
    rows: Iterable[RawRow], skipped: Skipped, name: str, reader: PromptReader | None = None
) -> Spool[Prompt]:
    """Check rows and keep them in a temporary file; a DataError if there is none."""
    prompts: Spool[Prompt] = Spool(_packed, _unpacked)
    reader = reader or PromptReader()
    for number, raw in enumerate(rows, start=1):
        prompts.append(_prompt(raw, number, skipped, reader))
    reader.check()
    if not len(prompts):
        raise DataError(f"{name} holds no prompts: expected at least one.")
    return prompts


def _is_asked(record: Record) -> bool:
    turns = (turn for turn in (record.messages or ())[:-1] if turn["role"] != "system")
    return any(str(turn.get("content") or "").strip() for turn in turns)


def parse_prompt(row: Any, source: str) -> tuple[Record, str | None]:
    """The same by known columns: a record that ends before its answer, and the answer; a DataError if it is neither."""
    row = {"prompt": row} if isinstance(row, str) else {"messages": row} if are_messages(row) else row
    if not isinstance(row, Mapping):
        raise DataError(f"the row is {str(row)[:40]}: expected a text, or an object with {EXPECTED}")
    row = {str(name): value for name, value in row.items() if not is_missing(value)}
    if key := next((name for name in row if folded(name) in CHATS or _is_other_chat(name, row[name])), None):
        return _chat(row, key, source)
    if "text" in row and not any(folded(name) in PROMPTS and folded(name) not in WRITERS for name in row):
        return parse_row(row, source).record, None
    found = [name for name in row if folded(name) in COMPLETIONS]
    record = _asked(row, [*found, *PLACES], source)
    if record is None:
        raise DataError(
            f"the columns are {listing(row) or 'none'}: expected {EXPECTED}, or the column "
            "that holds the prompt, named with --prompt-column"
        )
    return record, _learned(row, source) or next(
        (_reference(row[name]) for name in found if is_filled(row[name])), None
    )


def _is_other_chat(name: str, value: Any) -> bool:
    return folded(name) in ALSO_CHATS and _are_turns(_loaded(value))


def _learned(row: Mapping[str, Any], source: str) -> str | None:
    """What training would learn from a row that has its answer; None if it has none."""
    try:
        turns = parse_row(row, source).record.messages or ()
    except DataError:
        return None
    return _said(turns[-1]) if turns and turns[-1]["role"] == "assistant" else None


def _said(turn: Mapping[str, Any]) -> str:
    return str(turn.get("content") or json.dumps(turn.get("tool_calls"), ensure_ascii=False))


def _asked(row: Mapping[str, Any], answers: Iterable[str], source: str) -> Record | None:
    """The prompt of a row, if it becomes an example by an answer in one of these columns."""
    faults = []
    asked = {name: asked_messages(value) for name, value in row.items() if folded(name) in PROMPTS}
    turns = {name: value for name, value in asked.items() if _are_turns(value)}
    for name in answers:
        try:
            record = parse_row({**row, **turns, name: [PENDING] if turns else PENDING_TEXT}, source).record
        except DataError as error:
            faults.append(error)
            continue
        messages = record.messages or ()
        if not messages or messages[-1].get("content") != PENDING_TEXT:
            continue
        if not _is_asked(record):
            raise DataError("the prompt is empty: expected what is asked")
        return replace(record, messages=messages[:-1], completion=None)
    for error in faults:
        if not error.problems[0].startswith("the columns are"):
            raise error
    return None


def _chat(row: Mapping[str, Any], key: str, source: str) -> tuple[Record, str | None]:
    turns = in_turn(_loaded(row[key]))
    if not _are_turns(turns):
        return parse_row({**row, key: turns}, source).record, None  # which says what is wrong
    turns, is_sharegpt = list(turns), "from" in turns[0]
    while turns and _is_blank(turns[-1]):
        turns.pop()
    pending = {"from": "gpt", "value": PENDING_TEXT} if is_sharegpt else PENDING
    record = parse_row({**row, key: [*turns, pending]}, source).record
    messages = list(record.messages or ())[:-1]
    reference = None
    while messages and messages[-1]["role"] == "assistant":
        last = messages.pop()
        reference = reference or _said(last)
    if not any(message["role"] in ("user", "tool") for message in messages):
        raise DataError(f"{key} has nothing to answer: expected a message of the role user")
    return replace(record, messages=tuple(messages)), reference


def _are_turns(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def _is_blank(turn: Mapping[str, Any]) -> bool:
    """Whether a turn is an answer that is still to be written, as an empty one in the data."""
    is_answer = turn.get("role", turn.get("from")) in ("assistant", "gpt")
    return is_answer and not (turn.get("content") or turn.get("value") or turn.get("tool_calls"))


def _reference(answer: Any) -> str:
    """An answer as text; of a list of messages the last one."""
    if _are_turns(turns := _loaded(answer)) and turns[-1].get("content"):
        answer = turns[-1]["content"]
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, default=str)


def _loaded(value: Any) -> Any:
    """A list that was stored as JSON text, as in CSV files; other text stays as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _raw_rows(files: Iterable[Source], told: Told) -> Iterator[RawRow]:
    for file in files:
        for raw in read_rows(file, told):
            if file.kind != TEXT:
                yield raw
            elif ".md" in Path(file.name.lower()).suffixes:
                yield RawRow(raw.value["text"], raw.source)
            else:
                lines = enumerate(raw.value["text"].split("\n"), start=1)
                yield from (RawRow(line, f"{file.name} line {number}") for number, line in lines if line.strip())


def _prompt(raw: RawRow, number: int, skipped: Skipped, reader: PromptReader) -> Prompt:
    skipped.rows += 1
    columns = dict(raw.value) if isinstance(raw.value, Mapping) else {"prompt": raw.value}
    problems = (raw.problem,) if raw.problem else ()
    try:
        if not problems:
            record, reference = reader.parse(raw.value, raw.source)
            return Prompt(number, raw.source, record, reference, columns)
    except DataError as error:
        problems = error.problems
    skipped.add(raw.source, *problems)
    return Prompt(number, raw.source, columns=columns, problem="; ".join(problems))


def _packed(prompt: Prompt) -> bytes:
    record = prompt.record and {name: value for name, value in vars(prompt.record).items() if value is not None}
    return json.dumps({**vars(prompt), "record": record}, default=str).encode()


def _unpacked(packed: bytes) -> Prompt:
    fields = json.loads(packed)
    if record := fields["record"]:
        lists = {name: tuple(record[name]) for name in ("messages", "tools") if name in record}
        fields["record"] = Record(**{**record, **lists})
    return Prompt(**fields)
