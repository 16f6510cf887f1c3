"""Files of text: which encoding they have, and their lines one after the other.

UTF-8 with or without a byte order mark, UTF-16 likewise, UTF-32 with one. What is none of these may be Windows-1252, as
spreadsheets save it: `thimble.data.sources.codepages` judges that.
"""

import codecs
import io
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import PurePath
from typing import IO

from thimble.data.sources.codepages import is_mixed, is_western, readings, words
from thimble.data.sources.kinds import PACKINGS
from thimble.data.sources.packed import HEAD_BYTES
from thimble.data.sources.raw import Told
from thimble.errors import DataError, as_word, listing

Open = Callable[[], AbstractContextManager[IO[bytes]]]

MOST_LINE_BYTES = 1 << 28  # a file without line ends is no file of rows
MOST_WHOLE_BYTES = 1 << 29  # of a kind that is not read line by line
MOST_EVIDENCE_BYTES = 1 << 20  # of lines by which an encoding is judged
CHUNK_BYTES = 1 << 20
UTF8, WINDOWS = "utf-8-sig", "cp1252"
_MARKS = (  # the longer first: UTF-32 begins as UTF-16 does
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_PLAIN = re.compile(r"[\t\n\r -~]")
_ESCAPED = re.compile("[\udc80-\udcff]")  # a byte that is not UTF-8, as `surrogateescape` leaves it


def strict_lines(open_file: Open, name: str, told: Told) -> Iterator[tuple[int, str]]:
    """Numbered lines, of a file that must be text in one encoding; one that is not Unicode is judged as a whole."""
    with open_file() as file:
        encoding = unicode_of(file)
    if encoding == UTF8 and (fault := _first_fault(open_file)):
        encoding = _guessed(open_file, name, fault, told)
    elif encoding != UTF8:
        told.note(f"{name} is read as {encoding.upper()}")
    with open_file() as file:
        yield from numbered_lines(file, encoding, name)


def unicode_of(file: IO[bytes]) -> str:
    """The encoding of a file that is Unicode, by its first bytes; they are not consumed."""
    head = file.peek(HEAD_BYTES)[:HEAD_BYTES]  # type: ignore[attr-defined]
    marked = next((encoding for mark, encoding in _MARKS if head.startswith(mark)), None)
    return marked or (_utf16_without_mark(head) if b"\0" in head else None) or UTF8


def _utf16_without_mark(head: bytes) -> str | None:
    """UTF-16 has zeros beside all of ASCII, and its line ends take two bytes; a stray zero in other text does not."""
    head = head[: len(head) // 2 * 2]
    for encoding in ("utf-16-le", "utf-16-be"):
        text = head.decode(encoding, "replace")
        plain, ends = len(_PLAIN.findall(text)), text.count("\n") + text.count("\r")
        bytes_of_ends = head.count(b"\n") + head.count(b"\r")
        if plain >= len(text) / 2 or (ends and 2 * ends >= bytes_of_ends):
            return encoding
    return None


def numbered_lines(file: IO[bytes], encoding: str, name: str) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends, which are those of Unix, Windows or old Macs.

    Files put one behind the other have a byte order mark in front of lines further down too; it is no part of them.
    Not `splitlines()`: text may hold U+2028, which that takes for the end of a line. Bytes that are not UTF-8 come as
    lone surrogates; see `checked`.
    """
    errors = "surrogateescape" if encoding == UTF8 else "strict"
    lines = io.TextIOWrapper(file, encoding, errors)
    most = MOST_LINE_BYTES
    try:
        for number, line in enumerate(iter(lambda: lines.readline(most + 1), ""), start=1):
            if len(line) > most:
                raise DataError(f"{name} line {number} is longer than {most:,} bytes: expected one example a line.")
            yield number, line.removesuffix("\n").lstrip("\ufeff")
    except UnicodeError as error:
        raise DataError(f"{name} is damaged {encoding.upper()}: {error}. Copy or save the file again.") from None
    finally:
        lines.detach()


def checked(line: str, source: str) -> str:
    """A line that is UTF-8, or a DataError that names the first byte that is not."""
    if line.isascii() or not (found := _ESCAPED.search(line)):
        return line
    raise DataError(
        f"{source} is not UTF-8: byte 0x{ord(found[0]) - 0xDC00:02x} at column {found.start() + 1:,}. "
        "Save the file again with UTF-8 encoding, or convert it from the one it has with iconv."
    )


def whole_text(lines: Iterator[tuple[int, str]], name: str) -> str:
    """The text of a file, its line ends as on Unix."""
    parts, size = [], 0
    for number, line in lines:
        parts.append(checked(line, f"{name} line {number}"))
        size += len(line) + 1
        if size > MOST_WHOLE_BYTES:
            raise DataError(
                f"{name} is larger than {MOST_WHOLE_BYTES:,} bytes, and its kind is read as a whole: write it as "
                ".jsonl, which is read line by line."
            )
    return "\n".join(parts)


def _first_fault(open_file: Open) -> int:
    """The number of the first line that is not UTF-8, counted from 1; 0 if all are."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with open_file() as file:
        while chunk := file.read(CHUNK_BYTES):
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                return line + error.object[: error.start].count(b"\n")
            line += chunk.count(b"\n")
    return 0


def _guessed(open_file: Open, name: str, fault: int, told: Told) -> str:
    """Windows-1252 if the text reads as a Western language in it, with a warning; else a DataError."""
    evidence, size = [], 0
    with open_file() as file:
        for line in iter(lambda: file.readline(CHUNK_BYTES), b""):
            if not line.isascii() and size < MOST_EVIDENCE_BYTES:
                evidence.append(line)
                size += len(line)
    lines = b"".join(evidence)
    if is_western(lines):
        told.warn(
            f"{name} is not UTF-8 and is read as Windows-1252, where it holds {listing(words(lines))}; if that looks "
            f"wrong, convert it from the encoding it has: {_command('ENCODING', name)}"
        )
        return WINDOWS
    if is_mixed(lines):
        raise DataError(
            f"{name} line {fault} is not UTF-8, and other lines are: it is damaged there, or put together from files "
            f"of several encodings. Mend the line, or convert those files first: {_command('ENCODING', name)}"
        )
    found = readings(lines)
    choices = "; ".join(f"as {encoding} it holds {text}" for encoding, text in found)
    raise DataError(
        f"{name} line {fault} is neither UTF-8 nor Windows-1252{': ' if choices else ''}{choices}. Save the file with "
        "UTF-8 encoding, or convert it from the one that reads right: "
        + _command(found[0][0] if found else "ENCODING", name)
    )


def _command(encoding: str, name: str) -> str:
    path = PurePath(name)
    path = path.with_suffix("") if path.suffix.lower() in PACKINGS else path
    converted = path.with_name(f"{path.stem}-utf8{path.suffix}")
    return f"iconv -f {encoding} -t UTF-8 {as_word(str(path))} > {as_word(str(converted))}"
