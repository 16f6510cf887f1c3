"""Tables that name pictures or clips: metadata.csv beside the files, or a CSV, JSON or Parquet file of paths."""

import os
import unicodedata
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from thimble.data.columns import MOST_NAMES, Fields, Left, NamedCheck, NamedColumns
from thimble.data.media.folders import walk
from thimble.data.media.inside import Inside, MediaFile, content_inside
from thimble.data.media.items import Item
from thimble.data.media.kinds import AUDIO, IMAGE, NOUNS, is_media
from thimble.data.records import Skipped
from thimble.data.row_values import cell_text, describe, is_filled, is_written_list
from thimble.data.sources.raw import RawRow, Source, Told
from thimble.data.sources.read import read_rows
from thimble.data.sources.splits import SPLITS
from thimble.data.spool import Spool
from thimble.errors import DataError, escaped, listing, plural

# How columns are called, folded (see `columns.folded`): as datasets, Common Voice, NeMo and Kaggle have them.
_PATHS = "filename filepath path file".split()
PATHS = {
    IMAGE: [*_PATHS, *"image imagepath imagefile imagefilename imagefilepath img imgpath picture imageid".split()],
    AUDIO: [*_PATHS, *"audio audiopath audiofile audiofilename audiofilepath wav wavfilename wavpath clip".split()],
}
LABELS = "labelname labeltext label labels classname class category target".split()
TEXTS = "transcription transcript text sentence normalizedtext utterance".split()
SPLIT_COLUMNS = ["split", "subset", "partition"]
ANSWERS = {"label": LABELS, "text": TEXTS}


def has_paths(row: RawRow, kind: str, prompt_column: str) -> bool:
    """Whether a row of a table names a file."""
    if not isinstance(row.value, Mapping):
        return False
    fields = Fields(row.value)
    return fields.has(prompt_column) if prompt_column else bool(fields.among(PATHS[kind]))


def names_media(row: RawRow, kind: str) -> bool:
    """Whether a column of a row names a file that is a picture, or a clip, by its suffix, or holds one."""
    if not isinstance(row.value, Mapping):
        return False
    fields = Fields(row.value)
    cells = {name: fields.peek(name) for name in fields.among(PATHS[kind])}
    if any(content_inside(cell) for name, cell in cells.items() if name not in _PATHS):
        return True
    texts = (cell.get("path") if isinstance(cell, Mapping) else cell for cell in cells.values())
    return any(isinstance(text, str) and is_media(text, kind) for text in texts)


class ManifestReader:
    """Reads items from the rows of tables; knows what is worth telling of them."""

    def __init__(self, kind: str, columns: tuple[str, str], needed: str, told: Told, skipped: Skipped) -> None:
        """Read rows of `kind`; `columns` are those of paths and answers that the user named, or empty; `needed` is
        what each row has to have, "label", "text" or nothing.
        """
        self._kind, self._needed, self._told, self._skipped = kind, needed, told, skipped
        self._path_column, self._answer_column = columns
        self._named = NamedCheck(NamedColumns(prompt=columns[0], completion=columns[1]))
        self._places: dict[Path, Place] = {}
        self._outside: list[str] = []  # sources of rows that name files elsewhere
        self._contents: Spool[bytes] = Spool(bytes, bytes)  # of files that lie in rows
        self._unused: dict[str, None] = {}  # names of columns
        self._column = ""  # of paths, as the last row that has it calls it

    def read(self, source: Source) -> list[tuple[str, Item]]:
        """The items of one table, each with what the row says of its split; rows that cannot be used are noted."""
        items = []
        for row in read_rows(source, self._told, has_media=True):
            self._skipped.rows += 1
            try:
                if row.problem:
                    raise DataError(row.problem)
                fields = self._fields(row)
                items.append((_split_of(fields), self._item(fields, row.source, source)))
                self._see_unused(fields)
            except DataError as error:
                self._skipped.add(row.source, *error.problems)
        return items

    def _see_unused(self, fields: Fields) -> None:
        fields.leave(left := Left())
        if len(self._unused) < MOST_NAMES:
            self._unused |= dict.fromkeys(name for name in left.filled if name.strip())

    def end(self) -> None:
        """Say what was noticed; a DataError if a column that the user named is nowhere."""
        if self._outside:
            self._told.note(
                f"{plural(len(self._outside), 'row names', 'rows name')} a file outside of the folder of the table "
                f"(such as {self._outside[0]}): read from there"
            )
        for place in self._places.values():
            place.tell(self._told)
        if self._unused:
            self._told.note(f"columns not used: {listing(sorted(self._unused))}")
        self._named.check()

    def _fields(self, row: RawRow) -> Fields:
        if not isinstance(row.value, Mapping):
            raise DataError(f"the row is {describe(row.value)}: expected an object with a path")
        fields = Fields(row.value)
        self._named.see(fields)
        return fields

    def _item(self, fields: Fields, row: str, source: Source) -> Item:
        column = self._path_column or fields.first(PATHS[self._kind])
        if column is None:
            raise DataError(self._no_column(fields))
        self._column = column
        _check_whole(fields, self._kind)
        path = self._file(fields.cell(column) if self._path_column else fields.take(column), column, row, source)
        answers = {name: self._answer(fields, name) for name in ANSWERS}
        if self._needed and not answers[self._needed]:
            raise DataError(f"has no {self._needed}{self._expected(fields)}")
        where = f"{row} ({escaped(path.name)})" if path.name else row
        return Item(path, where, answers["label"], answers["text"])

    def _no_column(self, fields: Fields) -> str:
        if self._column:  # in a row before: tables leave out what is null
            return f"has no {self._column}: expected a {NOUNS[self._kind][0]} in each row"
        return (
            f"has no column of paths: expected file_name or path, or name it with --prompt-column; the columns are "
            f"{listing(fields)}. If that is a first row and no names, put a line of names above it"
        )

    def _expected(self, fields: Fields) -> str:
        """What a row without an answer lacks: a value, or a column."""
        if self._answer_column or fields.among(ANSWERS[self._needed]):
            return ": expected one in each row"
        said = fields.among(TEXTS) if self._kind == AUDIO and self._needed == "label" else []
        written = f"; what stands in {fields.shown(said[0])} is learned with --task transcribe" if said else ""
        return (
            f": expected a column called {self._needed}, or name it with --completion-column; the columns are "
            f"{listing(fields)}{written}"
        )

    def _answer(self, fields: Fields, name: str) -> str | None:
        if self._answer_column and name == (self._needed or "label"):
            value, column = fields.cell(self._answer_column), self._answer_column
        else:
            key = fields.first_filled(ANSWERS[name])
            value, column = (fields.take(key), fields.shown(key)) if key else (None, "")
        if not is_filled(value):
            return None
        if isinstance(value, list | Mapping):
            raise DataError(f"{column} is {describe(value)}: expected one {name}")
        if name == "label" and is_written_list(value):
            raise DataError(f"{column} is {value[:60]}, a list: expected one {name}")
        return unicodedata.normalize("NFC", cell_text(value, column)).strip() or None

    def _file(self, value: Any, column: str, row: str, source: Source) -> MediaFile:
        """The file that a cell holds, or names."""
        if (content := content_inside(value)) is None:
            return self._path(value, column, source)
        name = value.get("path") if isinstance(value, Mapping) else None
        return Inside(self._contents, content, Path(name).name if isinstance(name, str) else "", row)

    def _path(self, value: Any, column: str, source: Source) -> Path:
        if isinstance(value, Mapping):  # as datasets has it
            value = value.get("path")
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{column} is {describe(value)}: expected the path of a {NOUNS[self._kind][0]}")
        if value.startswith("file://"):
            value = unquote(urlsplit(value).path)
        if "://" in value:
            raise DataError(f"{column} is {value[:60]!r}: expected a file on this machine, since nothing is fetched")
        folder = source.path.parent
        place = self._places.setdefault(folder, Place(folder, self._kind))
        path = place.find(value.strip())
        if path is None:
            raise DataError(
                f"names {value[:200]}, which is not there: expected a file in {escaped(str(folder))}, the folder of "
                "the table, where its paths begin; move the table, or write the paths from there"
            )
        if not path.is_file():
            raise DataError(f"names {value[:200]}, which is no file")
        if place.is_outside(path):
            self._outside.append(value[:100])
        return path


def _check_whole(fields: Fields, kind: str) -> None:
    """Raise a DataError if a row means a piece of a longer clip, as manifests of NeMo may."""
    try:
        offset = float(fields.peek("offset") or 0) if kind == AUDIO else 0.0
    except (TypeError, ValueError):
        return
    if offset > 0:
        raise DataError(
            f"has the offset {offset:g}, so it is a piece of a longer clip, and clips are heard from their beginning: "
            "cut the pieces out first, as with: ffmpeg -ss OFFSET -t DURATION -i LONG.wav PIECE.wav"
        )


def _split_of(fields: Fields) -> str:
    """What a row says of its split; a column of that name that says something else is none."""
    name = fields.first(SPLIT_COLUMNS) or ""
    said = str(fields.peek(name) or "")
    return str(fields.take(name)) if said.lower() in SPLITS else said


class Place:
    """The folder of a table, in which its paths are looked up."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder, self._kind = folder, kind
        self._found_in: Counter[str] = Counter()  # folders below, that paths leave out

    @cached_property
    def _below(self) -> dict[str, list[Path]]:
        """Files below the folder by their names, with suffix and without."""
        found: dict[str, list[Path]] = {}
        for path in walk(self._folder):
            if is_media(path.name, self._kind):
                for name in {path.name, path.stem}:
                    found.setdefault(name, []).append(path)
        return found

    def find(self, text: str) -> Path | None:
        """The file that a path means: from the folder of the table, else the only one of its name below it."""
        if "\0" in text:
            return None
        ways = [text] if os.sep == "\\" or "\\" not in text else [text, text.replace("\\", "/")]
        for way in ways:
            path = self._folder / os.path.expanduser(way)
            if _exists(path):
                return path
        path = Path(ways[-1])
        if path.is_absolute() or path.parent != Path() or path.name in ("", ".", ".."):
            return None
        found = self._below.get(path.name, [])
        if len(found) > 1:
            raise DataError(f"names {text[:200]}, which may be {listing((self._shown(one) for one in found), 3)}")
        if found:
            self._found_in[self._shown(found[0].parent)] += 1
        return found[0] if found else None

    def is_outside(self, path: Path) -> bool:
        """Whether a file lies elsewhere, by its name and not by where links lead."""
        return not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(self._folder))

    def tell(self, told: Told) -> None:
        """Say where files were found that the table does not say."""
        for name, count in self._found_in.items():
            told.note(f"{plural(count, 'file')} named without a folder or suffix, found in {name}")

    def _shown(self, path: Path) -> str:
        return escaped(path.relative_to(self._folder).as_posix())


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False
