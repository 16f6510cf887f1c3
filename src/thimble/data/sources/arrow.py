"""Rows of Parquet and Arrow files, as if they had been written as JSON.

In such a table every struct of a column has the fields of all others, and null stands where one was not given: fields
that are null are left out. Features that datasets notes beside the types are honoured.
"""

import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from thimble.data.sources.arrow_values import Convert, converter
from thimble.data.sources.json_rows import CONVERSATIONS
from thimble.data.sources.kinds import SAVED
from thimble.data.sources.packed import head_of, unpacked
from thimble.data.sources.raw import RawRow, Source, Told, check_columns
from thimble.data.sources.saved import indices_of, read_json
from thimble.errors import DataError, MissingPackageError, install_line, listing

ROWS_AT_A_TIME = 1000
MEDIA_AT_A_TIME = 50  # rows that may hold pictures or clips, which take much more memory
_MEDIA = {"Image", "Audio", "Video", "Pdf", "Nifti"}  # features that are no text
_FORMATS = {".parquet": "a Parquet file", ".arrow": "an Arrow file", SAVED: "an Arrow folder"}


def read_arrow(source: Source, told: Told, has_media: bool = False) -> Iterator[RawRow]:
    """The rows of a Parquet file, of an Arrow or Feather file, or of those that a state.json lists.

    Pictures, clips and the like are passed over and told, unless the caller says that it `has_media` to read.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackageError(
            f"{source.name} is {_FORMATS[source.kind]}: reading it needs pyarrow. Install it with: "
            f"{install_line('parquet')}"
        ) from error
    number = itertools.count(1)
    try:
        for batch in _saved_batches(source) if source.kind == SAVED else _batches(source):
            size = MEDIA_AT_A_TIME if has_media else max(1, batch.num_rows)
            for part in (batch.slice(begin, size) for begin in range(0, batch.num_rows, size)):
                for row in _rows(part, source, told, has_media):
                    empty = tuple(name for name in part.schema.names if name not in row)
                    yield RawRow(row, f"{source.name} row {next(number)}", empty=empty)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        kind = "Parquet" if source.kind == ".parquet" else "Arrow"
        reason = str(error) or "it asks for more memory than there is"
        raise DataError(f"{source.name} is not a whole {kind} file: {reason.rstrip('.')}. {_way(source)}") from error


def _way(source: Source) -> str:
    """What to do about a file that cannot be read."""
    begin = b"" if source.kind == SAVED else head_of(source.path, source.name)
    if begin and b"\0" not in begin and not begin.startswith(b"PAR1"):
        return "It begins with text: call it what it is, as with the suffix .csv, .jsonl or .txt."
    return "Fetch it again."


def _batches(source: Source) -> Iterator[Any]:
    with unpacked(source.path, source.name) as file:
        if not file.seekable():  # these formats are read from their end
            with tempfile.TemporaryFile() as copy:
                shutil.copyfileobj(file, copy)
                copy.seek(0)
                yield from _file_batches(copy, source.kind)
            return
        yield from _file_batches(file, source.kind)


def _file_batches(file: IO[bytes], kind: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    if kind == ".parquet":
        yield from pyarrow.parquet.ParquetFile(file).iter_batches(ROWS_AT_A_TIME)
        return
    head = file.read(6)
    file.seek(0)
    if head.startswith(b"FEA1"):
        import pyarrow.feather

        batches = pyarrow.feather.read_table(cast(Any, file)).to_batches()
    elif head == b"ARROW1":
        reader = pyarrow.ipc.open_file(file)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        batches = pyarrow.ipc.open_stream(file)
    for batch in batches:
        batch.validate(full=True)  # pyarrow would follow offsets to anywhere, to count its bytes too
        _check_size(batch)
        yield from (batch.slice(begin, ROWS_AT_A_TIME) for begin in range(0, batch.num_rows, ROWS_AT_A_TIME))


def _check_size(batch: Any) -> None:
    """Refuse a batch of more rows than its bytes can hold: a column of nulls takes none, however long it is."""
    if batch.num_rows > ROWS_AT_A_TIME + 8 * batch.nbytes:  # a row of the smallest column takes a bit
        raise OverflowError(f"it has {batch.num_rows:,} rows in {batch.nbytes:,} bytes")


def _saved_batches(source: Source) -> Iterator[Any]:
    """What an old `save_to_disk` left: parts of Arrow files, and the numbers of the rows to take of them."""
    import pyarrow

    folder, state = source.path.parent, read_json(source.path)
    table = pyarrow.concat_tables([_mapped(folder, file) for file in state["_data_files"]])
    if not indices_of(state):
        yield from table.to_batches(ROWS_AT_A_TIME)
    for file in indices_of(state):
        numbers = _mapped(folder, file)
        for chosen in numbers.column(0).chunks if numbers.num_columns else ():
            for begin in range(0, len(chosen), ROWS_AT_A_TIME):
                yield from table.take(chosen.slice(begin, ROWS_AT_A_TIME)).to_batches()


def _mapped(folder: Path, file: Mapping[str, Any]) -> Any:
    import pyarrow

    path = folder / Path(file["filename"]).name
    table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
    table.validate(full=True)
    _check_size(table)
    return table.slice(file.get("skip") or 0, file.get("take"))


def _rows(batch: Any, source: Source, told: Told, has_media: bool) -> Iterator[dict[str, Any]]:
    """The rows of a batch, each with the columns that have a value."""
    batch.validate(full=True)  # pyarrow would follow offsets to anywhere
    check_columns(batch.schema.names, source.name)
    features = _features(batch.schema, source.path)
    media = [name for name in batch.schema.names if _type_of(features.get(name)) in _MEDIA and not has_media]
    if media:
        told.warn(f"{source.name}: not read, since only text can be learned: {listing(_with_types(media, features))}")
    columns = []
    for field, column in zip(batch.schema, batch.columns, strict=True):
        if field.name in media:
            continue
        names = _class_names(features.get(field.name))
        if names:
            told.note(f"{source.name}: the numbers of {field.name} are read as their names, {listing(names)}")
        is_old = field.name in CONVERSATIONS or _is_old_sequence(features.get(field.name))
        convert = _named(names) if names else converter(field.type, is_old)
        columns.append((field.name, convert, column.to_pylist()))
    for number in range(batch.num_rows):
        row = {name: values[number] for name, _, values in columns}
        yield {
            name: value
            for name, convert, _ in columns
            if row[name] is not None and (value := convert(row[name]) if convert else row[name]) is not None
        }


def _features(schema: Any, path: Path) -> dict[str, Any]:
    """What datasets notes of the columns: in the file, else in dataset_info.json beside it."""
    try:
        noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = noted.get("info", {}).get("features") if isinstance(noted, dict) else None
        if features is None and (path.parent / "dataset_info.json").is_file():
            features = read_json(path.parent / "dataset_info.json").get("features")
    except (ValueError, AttributeError, RecursionError, DataError):  # a note, and no more
        return {}
    return features if isinstance(features, dict) else {}


def _type_of(feature: Any) -> str:
    return str(feature.get("_type", "")) if isinstance(feature, dict) else ""


def _with_types(names: list[str], features: dict[str, Any]) -> list[str]:
    return [f"{name} ({features[name]['_type']})" for name in names]


def _class_names(feature: Any) -> list[str]:
    names = feature.get("names") if _type_of(feature) == "ClassLabel" else None
    return [str(name) for name in names] if isinstance(names, list) else []


def _named(names: list[str]) -> Convert:
    return lambda value: names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def _is_old_sequence(feature: Any) -> bool:
    """Whether a list of objects is stored as an object of lists, as datasets did for a Sequence of named features."""
    inner = feature.get("feature") if _type_of(feature) == "Sequence" else None
    return isinstance(inner, dict) and not isinstance(inner.get("_type"), str)
