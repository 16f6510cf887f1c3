"""From what the user names to pictures or clips that can be decoded: folders of classes, metadata files, manifests."""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from thimble.data.columns import Fields, Left, NamedColumns
from thimble.data.media.checks import check_items
from thimble.data.media.corpora import Corpus
from thimble.data.media.folders import items_by_folder, unpacked_folder, walk
from thimble.data.media.items import Item, MediaData, oddities
from thimble.data.media.kinds import AUDIO, IMAGE, NOUNS, is_media
from thimble.data.media.manifests import ManifestReader, has_paths, names_media
from thimble.data.records import Skipped
from thimble.data.row_forms import recognise
from thimble.data.sources.find import find_files
from thimble.data.sources.kinds import TEXT, kind_of
from thimble.data.sources.raw import RawRow, Source, Told
from thimble.data.sources.read import read_rows
from thimble.data.sources.splits import SPLITS
from thimble.errors import DataError, InputError, Problems, escaped, listing, plural

MANY_LABELS = 10  # that stand once each, and so are rather names or measures than classes
LOOKED_AT = 100  # rows of a table, in which a file is named: the first may lack it
GUESSED_FILES = 10_000  # by whose names the kind is guessed
MOST_SECONDS = 30.0  # of a clip that are decoded to see that it can be, unless the caller says otherwise
PASSED_OVER = "not used, since"  # of a table beside folders of classes
T = TypeVar("T")
Splits = Mapping[str, list[Source]]


def find_media(
    path: Path,
    kind: str,
    prompt_column: str = "",
    completion_column: str = "",
    needed: str = "label",
    is_strict: bool = False,
    most_seconds: float = MOST_SECONDS,
    is_learned: bool = True,
) -> MediaData:
    """Pictures or clips of a folder or table, each decoded once to see that it can be.

    Args:
        path: A folder with a folder for each class, the same in folders called train, valid and test, a folder with
            metadata.csv, .jsonl or .parquet as datasets has it, a table of paths, from its own place, or a corpus of
            speech (see `corpora`).
        kind: "image" or "audio".
        prompt_column: The column of paths; one of usual names if empty.
        completion_column: The column of what is needed; one of usual names if empty.
        needed: What each has to have: "label", "text" or "" for nothing, as for files whose labels are to be found.
        is_strict: Whether a single one that cannot be used is too many, else up to a tenth of them is left out.
        most_seconds: How much of a clip is decoded.
        is_learned: Whether labels are to be told apart by what is learned, so that two are the least.

    Returns:
        What can be used, by split, in the order of its names or rows, and what is worth telling.

    Raises:
        DataError: Every problem with the data, the first 20 of rows.
    """
    path, told, skipped, problems = Path(path), Told(), Skipped(is_strict), Problems()
    columns = (prompt_column, completion_column)
    found, files = _found(path, kind, columns, needed, skipped, told, problems)
    checked = check_items(found, kind, most_seconds, skipped, told)
    _check(path, kind, needed if is_learned else "", checked, skipped, problems, told)
    odd = oddities(checked["train"], checked.get("valid", ())) if needed else []
    return MediaData(
        checked["train"], checked.get("valid"), skipped, tuple(told.notes), (*told.warnings, *odd),
        checked.get("test"), files,
    )  # fmt: skip


def _found(
    path: Path, kind: str, columns: tuple[str, str], needed: str, skipped: Skipped, told: Told, problems: Problems
) -> tuple[dict[str, list[Item]], tuple[Path, ...]]:
    """All that is there by split, not decoded yet, and the files that name it."""
    corpus = _reading(path, Corpus, path, skipped, told)
    is_corpus = needed == "text" and not any(columns)
    if is_corpus and (found := _reading(path, corpus.listed)):
        return found, tuple(corpus.files)
    tables = _reading(path, _tables, path, kind, columns[0], needed, told)
    if tables or any(columns):
        reader = ManifestReader(kind, columns, needed, told, skipped)
        files = tuple(source.path for sources in tables.values() for source in sources)
        return _from_tables(path, tables, reader, skipped, told, problems), files
    if is_corpus:
        return problems.attempt(_reading, path, _with_texts, path, corpus) or {}, ()
    found = problems.attempt(_reading, path, _from_folder, path, kind, needed, told) or {}
    skipped.rows += sum(map(len, found.values()))
    return found, ()


def guess_kind(path: Path) -> str:
    """What a file or folder holds by its first files and rows: "image", "audio", or "" for anything else.

    What may be text to learn from is text: rows of a known form, and folders with a text for every twenty pictures.
    """
    names = [path.name] if path.is_file() else [file.name for file in itertools.islice(walk(path), GUESSED_FILES)]
    counts = {kind: sum(is_media(name, kind) for name in names) for kind in (IMAGE, AUDIO)}
    best = max(counts, key=lambda kind: counts[kind])
    texts = sum(kind_of(Path(name)) == TEXT for name in names)
    is_media_folder = 2 * counts[best] > len(names) and 20 * texts <= counts[best]
    row = _first_row(path)
    if row and _is_text(row):
        return ""
    named = next((kind for kind in (IMAGE, AUDIO) if row and names_media(row, kind)), "")
    return named or (best if is_media_folder else "")


def _first_row(path: Path) -> RawRow | None:
    """The first row of the tables that a path leads to; None if there are none."""
    try:
        sources = [source for sources in find_files(path).splits.values() for source in sources if source.kind != TEXT]
        return next(read_rows(sources[0], Told(), has_media=True)) if sources else None
    except InputError:
        return None


def _is_text(row: RawRow) -> bool:
    """Whether a row is of a form that texts are learned from; one with nothing but a text may be a transcript."""
    if not isinstance(row.value, Mapping):
        return True  # messages without a name, or what is refused as text
    try:
        return recognise(Fields(row.value), NamedColumns(), Left())[0] != "plain text"
    except InputError:
        return False


def _reading(path: Path, work: Callable[..., T], *args: Any) -> T:
    """Do something with a folder; one that the system does not open is a DataError."""
    try:
        return work(*args)
    except OSError as error:
        where = escaped(str(error.filename or path))
        raise DataError(f"{where[:200]} cannot be read: {error.strerror or error}.") from error


def _tables(path: Path, kind: str, prompt_column: str, needed: str, told: Told) -> Splits:
    """Tables that name files: what the user named, or those of a folder; none if its folders are the classes."""
    if path.is_file() and is_media(path.name, kind):
        return {}
    places = (
        [path, *(inner for inner in path.iterdir() if inner.is_dir() and inner.name.lower() in (*SPLITS, "data"))]
        if path.is_dir()
        else []
    )
    if path.is_dir() and not any(kind_of(file) not in (None, TEXT) for place in places for file in place.iterdir()):
        return {}
    try:
        splits, noted = find_files(path)
        splits = {split: [one for one in sources if one.kind != TEXT] for split, sources in splits.items()}
        are_named = all(_names_files(sources[0], kind, prompt_column) for sources in splits.values())
    except (InputError, IndexError) as error:
        if path.is_dir() and needed != "text" and (not needed or _has_media(path, kind)):
            reasons = [reason.rstrip(".") for reason in getattr(error, "problems", ())[:1]]
            told.notes += [f"{reason.split(' ')[0]}: {PASSED_OVER} {reason}" for reason in reasons]
            return {}
        raise
    if path.is_dir() and needed != "text" and not are_named and _has_media(path, kind):  # a folder of classes
        names = listing(source.name for sources in splits.values() for source in sources)
        told.note(f"{names}: {PASSED_OVER} no column names {NOUNS[kind][1]}")
        return {}
    for text in noted.notes:
        told.note(text)
    for text in noted.warnings:
        told.warn(text)
    return splits


def _names_files(source: Source, kind: str, prompt_column: str) -> bool:
    rows = itertools.islice(read_rows(source, Told(), has_media=True), LOOKED_AT)
    return any(has_paths(row, kind, prompt_column) for row in rows)


def _from_tables(
    path: Path, tables: Splits, reader: ManifestReader, skipped: Skipped, told: Told, problems: Problems
) -> dict[str, list[Item]]:
    if not tables:
        problems.add(f"{path} holds no table, of which --prompt-column or --completion-column could name a column.")
    found = {}
    for split, sources in tables.items():
        begin = skipped.rows, skipped.count
        found[split] = [row for source in sources for row in problems.attempt(reader.read, source) or ()]
        if split == "test" and len(tables) > 1:
            skipped.pass_over(*begin, told)
    problems.attempt(reader.end)
    said = {value.lower() for value, _ in found.get("train", ())}
    if set(found) != {"train"} or not said <= set(SPLITS) or "train" not in {SPLITS[value] for value in said}:
        return {split: [item for _, item in rows] for split, rows in found.items()}
    by_column: dict[str, list[Item]] = {}  # one table, of which a column says the splits
    for value, item in found["train"]:
        by_column.setdefault(SPLITS[value.lower()], []).append(item)
    return by_column


def _has_media(path: Path, kind: str) -> bool:
    return any(is_media(file.name, kind) for file in walk(path))


def _with_texts(path: Path, corpus: Corpus) -> dict[str, list[Item]]:
    if found := corpus.beside():
        return found
    raise DataError(
        f"{path} has no transcripts: expected a table such as metadata.csv, with the columns file_name and "
        "transcription, in the folder of the clips or named itself; a .txt of the same name beside each clip; or the "
        "files of LibriSpeech (*.trans.txt), Kaldi (wav.scp and text) or LJ Speech (ID|text)."
    )


def _from_folder(path: Path, kind: str, needed: str, told: Told) -> dict[str, list[Item]]:
    if path.is_file():
        if needed:
            raise DataError(
                f"{path} is one {NOUNS[kind][0]}: expected a folder with a folder for each class, or a table."
            )
        return {"train": [Item(path, path.name)]}
    return items_by_folder(unpacked_folder(path, told), kind, told, with_labels=bool(needed))


def _check(
    path: Path,
    kind: str,
    needed: str,
    checked: dict[str, list[Item]],
    skipped: Skipped,
    problems: Problems,
    told: Told,
) -> None:
    """Raise a DataError with everything that is wrong so far, or with what is missing from items that are right."""
    if needed == "label":
        _leave_unknown(checked, skipped)
    problems.attempt(skipped.check)
    if not problems.found:
        problems.attempt(_check_enough, path, kind, needed, checked, skipped)
    if problems.found:  # a table that was passed over may be what was meant
        raise DataError(*dict.fromkeys(problems.found), *(f"{note}." for note in told.notes if PASSED_OVER in note))


def _leave_unknown(found: dict[str, list[Item]], skipped: Skipped) -> None:
    """Leave out items to measure on whose label no training row has: no head could name it."""
    known = {item.label for item in found.get("train", ())}
    for split in found.keys() - {"train"}:
        for item in found[split]:
            if item.label not in known:
                skipped.add(item.source, f'has the label "{item.label}", which no training row has')
        found[split] = [item for item in found[split] if item.label in known]


def _check_enough(path: Path, kind: str, needed: str, found: Mapping[str, Sequence[Item]], skipped: Skipped) -> None:
    items = found.get("train", ())
    many = NOUNS[kind][1]
    if not items:
        raise DataError(f"{path} holds no {many} that can be used: expected at least one.", *skipped.told())
    labels = Counter(item.label for item in items)
    if needed == "label" and len(labels) == len(items) >= MANY_LABELS:
        raise DataError(
            f"{path}: each of {plural(len(items), *NOUNS[kind])} has a label of its own "
            f"({listing(map(repr, labels), 3)}): expected several of each; the labels are in another column, perhaps"
        )
    if needed == "label" and len(labels) == 1:
        raise DataError(
            f"{path}: all {plural(len(items), NOUNS[kind][0])} have one label, {listing(map(repr, labels))}: expected "
            "two or more, since there is nothing to tell apart."
        )
