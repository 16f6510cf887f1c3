"""Answers to many prompts, and the file they go to.

While prompts are answered, each answer is a line of FILE.partial, in the order they end; FILE.run.json says what they
are made with. With the last one FILE is written in one piece, in the order of the prompts, and FILE.partial goes. So a
process may die at any moment: what was answered is there, and nothing is half there.
"""

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from thimble.data.prompts import Prompt
from thimble.errors import ConfigError
from thimble.files.atomic import sync, write_atomic

KINDS = (".jsonl", ".csv")
IDS = ("id", "custom_id")  # columns that name a row


@dataclass(frozen=True)
class Answer:
    """A row with what a model wrote, or why it wrote nothing."""

    row: int  # counted from 1
    source: str  # "tickets.csv line 12"
    text: str | None  # the answer; None if the row cannot be answered
    finish_reason: str  # `stop`; `length` if max_new_tokens or the context ended it; `error` if there is no answer
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reference: str | None = None  # the answer that the row has
    error: str = ""  # why there is no answer
    left_out: int = 0  # oldest messages of a conversation that the model did not see: the context is too small

    def described(self, prompt: Prompt) -> dict[str, Any]:
        """A line of the file: what names the row, what is asked, its own answer, what was written, other columns."""
        names = {name: prompt.columns[name] for name in IDS if name in prompt.columns}
        others = {name: value for name, value in prompt.unread.items() if name not in IDS}
        return {
            "row": self.row, "source": self.source, **names, **prompt.asked,
            **({} if self.reference is None else {"reference": self.reference}), **self.written(),
            **({"left_out_messages": self.left_out} if self.left_out else {}),
            **({"error": self.error} if self.error else {}), **({"columns": others} if others else {}),
        }  # fmt: skip

    def written(self) -> dict[str, Any]:
        """What a model did, by the names of the OpenAI API."""
        return {
            "answer": self.text, "finish_reason": self.finish_reason, "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
        }  # fmt: skip


def unanswered(prompt: Prompt, problem: str) -> Answer:
    """What stands in the place of an answer that there cannot be."""
    return Answer(prompt.row, prompt.source, None, "error", reference=prompt.reference, error=problem)


class AnswerFile:
    """The file that answers go to.

    Args:
        path: As the user named it.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.partial, self.record = (self.path.with_name(self.path.name + end) for end in (".partial", ".run.json"))
        self._stream: IO[bytes] | None = None
        self._places: dict[int, int] = {}  # where the line of each answered row begins

    def check(self, data: str, resume: bool, overwrite: bool) -> None:
        """Refuse a name that is no file for answers, or one that is taken; a ConfigError says what to type instead."""
        path = self.path
        if path.suffix.lower() not in KINDS:
            raise ConfigError(f"--out {path}: expected a name that ends with {' or '.join(KINDS)}")
        if path.is_dir():
            raise ConfigError(f"--out {path} is a folder: name a file in it, such as {path / 'answers.jsonl'}")
        if path.exists() and Path(data).exists() and path.samefile(data):
            raise ConfigError(f"--out {path} is the file of the prompts: name another one for the answers")
        if resume or overwrite:
            return
        if self.partial.exists():
            raise ConfigError(
                f"--out {path} is not finished, an interrupted run left {self.partial.name}: add --resume to go on "
                "with it, or --overwrite to begin again"
            )
        if path.exists():
            raise ConfigError(f"--out {path} exists: name another file, or add --overwrite to replace it")

    def resumable(self) -> dict[str, str] | None:
        """What the answers there are made with; None if there are none, a ConfigError if that is not known."""
        try:
            settings = json.loads(self.record.read_text(encoding="utf-8"))["made_with"]
            return {str(name): str(value) for name, value in settings.items()}
        except FileNotFoundError:
            if not self.partial.exists() and not self.path.exists():
                return None
            reason = "is missing"
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
            reason = "cannot be read"
        raise ConfigError(
            f"--resume: {self.record} says what the answers are made with, and {reason}: put it back, or add "
            "--overwrite instead to begin again"
        )

    @property
    def is_finished(self) -> bool:
        """Whether all answers are in their place."""
        return self.path.exists() and not self.partial.exists()

    def begin(self, settings: Mapping[str, str]) -> None:
        """Begin anew, without what was there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open().truncate(0)
        write_atomic(self.record, [json.dumps({"made_with": settings}, indent=2).encode()])

    def go_on(self) -> set[int]:
        """Take up the answers that are there; gives the rows that have one. A line that was cut off is removed."""
        stream, end = self._open(), 0
        stream.seek(0)
        for line in stream:
            row = _row_of(line)
            if row is None:
                break
            self._places.setdefault(row, end)
            end += len(line)
        stream.truncate(end)
        return set(self._places)

    def _open(self) -> IO[bytes]:
        self._stream = self.partial.open("a+b")
        with contextlib.suppress(ImportError, OSError):  # systems and file systems without such locks are trusted
            import fcntl

            try:
                fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"--out {self.path}: another process is writing it; wait for it, or end it") from None
        return self._stream

    def _opened(self) -> IO[bytes]:
        if self._stream is None:
            raise ValueError(f"{self.path} is not open: call begin or go_on first")
        return self._stream

    def add(self, line: Mapping[str, Any]) -> None:
        """Keep an answer; when this returns, the end of the process does not lose it."""
        stream = self._opened()
        begin = stream.seek(0, os.SEEK_END)
        stream.write(json.dumps(line, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n")
        stream.flush()
        self._places[line["row"]] = begin

    def finish(self, prompts: Iterable[Prompt], delimiter: str = ",") -> None:
        """Write the file, now that every prompt has its line, and remove what it was made from.

        A table has `delimiter` between its cells.
        """
        lines = ((prompt, self.line(prompt.row)) for prompt in prompts)
        parts = _csv(lines, delimiter) if self.path.suffix.lower() == ".csv" else (line for _, line in lines)
        write_atomic(self.path, parts)
        self.partial.unlink()
        sync(self.path.parent)
        self.close()

    def line(self, row: int) -> bytes:
        """The line of a row."""
        stream = self._opened()
        stream.seek(self._places[row])
        return stream.readline()

    def close(self) -> None:
        """Leave the file as it is; a power cut does not take what is in it."""
        if self._stream is not None:
            with contextlib.suppress(OSError, ValueError):
                os.fsync(self._stream.fileno())
            self._stream.close()


def _row_of(line: bytes) -> int | None:
    """The row that a whole line belongs to."""
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        return int(json.loads(line)["row"]) if line.endswith(b"\n") else None
    return None


def _csv(lines: Iterable[tuple[Prompt, bytes]], delimiter: str) -> Iterator[bytes]:
    """A table of the columns that the prompts have, in their order, and of the answers behind them."""
    kept = list(lines)  # a spreadsheet fits into memory
    columns = _columns(prompt for prompt, _ in kept)
    own = ["answer", "finish_reason", "prompt_tokens", "completion_tokens"]
    own += ["error"] * any(json.loads(line).get("error") for _, line in kept)
    header = [*columns, *(f"model_{name}" if name in columns else name for name in own)]
    yield "\ufeff".encode()  # without it spreadsheets take UTF-8 for something else
    yield _csv_line(header, delimiter)
    for prompt, line in kept:
        written = json.loads(line)
        cells = [prompt.columns.get(name) for name in columns] + [written.get(name) for name in own]
        yield _csv_line([_cell(value) for value in cells], delimiter)


def _columns(prompts: Iterable[Prompt]) -> list[str]:
    """All columns; one that the first rows lack stands behind the one it follows."""
    columns: list[str] = []
    for prompt in prompts:
        place = 0
        for name in prompt.columns:
            if name not in columns:
                columns.insert(place, name)
            place = columns.index(name) + 1
    return columns


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)


def _csv_line(cells: Iterable[str], delimiter: str) -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerow(cells)
    return text.getvalue().encode("utf-8", "backslashreplace")


def differing(recorded: Mapping[str, str], settings: Mapping[str, str]) -> list[str]:
    """What answers were made with and what is asked for now, where that is not the same."""
    return [
        f"{name} was {recorded[name]}, is now {value}" if name in recorded else f"{name} was not recorded"
        for name, value in settings.items()
        if recorded.get(name) != value
    ]
