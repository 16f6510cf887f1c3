"""Kinds of files: which are read, by suffix and by first bytes, and what to do about those that are not."""

from pathlib import Path

KINDS = {
    ".jsonl": ".jsonl", ".ndjson": ".jsonl", ".jsonlines": ".jsonl", ".json": ".json", ".csv": ".csv", ".tsv": ".csv",
    ".parquet": ".parquet", ".arrow": ".arrow", ".feather": ".arrow", ".ipc": ".arrow", ".txt": ".txt", ".md": ".txt",
}  # fmt: skip
TABLES = (".jsonl", ".json", ".parquet", ".arrow", ".csv")  # which is taken first if the same rows lie there in several
BINARY = (".parquet", ".arrow")
TEXT = ".txt"
SAVED = "saved"  # state.json of a folder of Arrow files with a list of the rows to take
# Kinds that are known by their first bytes, for messages.
CONTENTS = {".parquet": "Parquet", ".arrow": "Arrow", ".jsonl": "JSON, an object a line,", ".json": "a JSON array"}
PACKINGS = (".gz", ".zst", ".bz2", ".xz", ".lz4")
EXPECTED = ".jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt or .md"

_SPREADSHEET = "a spreadsheet: save it as CSV (UTF-8) there, and name that file"
_DOCUMENT = "a document: save its text as .txt or .md, and name that file"
_ARCHIVE = "an archive: unpack it first, and name the folder"
_UNFINISHED = "an unfinished download: fetch it again"
_PICKLE = "a pickle, which can run programs when it is read and never is: save its rows as .jsonl"
_DATABASE = "a database: write its rows out as .csv or .jsonl"
_OTHER = "no table: write its rows as .jsonl, one JSON object a line"
_REFUSED = {
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".xlsb", ".ods", ".numbers", ".gsheet"), _SPREADSHEET),
    **dict.fromkeys((".docx", ".doc", ".odt", ".rtf", ".pdf", ".epub", ".pages", ".html", ".htm"), _DOCUMENT),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".whl"), _ARCHIVE),
    **dict.fromkeys((".incomplete", ".part", ".partial", ".crdownload", ".download"), _UNFINISHED),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".joblib"), _PICKLE),
    **dict.fromkeys((".db", ".sqlite", ".sqlite3", ".duckdb"), _DATABASE),
    **dict.fromkeys((".yaml", ".yml", ".xml", ".toml", ".ini", ".npy", ".npz", ".tfrecord"), _OTHER),
}
_FIRST_BYTES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull` in its folder"),
    (b"PK\x03\x04", "a ZIP archive or an Excel file: unpack it, or save the spreadsheet as CSV (UTF-8)"),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word file: save it as CSV (UTF-8), or as text"),
    (b"%PDF", "a PDF: save its text as .txt, and name that file"),
    (b"7z\xbc\xaf\x27\x1c", _ARCHIVE),
    (b"Rar!", _ARCHIVE),
    (b"SQLite format 3", _DATABASE),
    (b"\x80\x04\x95", _PICKLE),
    (b"\x80\x05\x95", _PICKLE),
)
_PAGES = (b"<!doctype html", b"<html")
_TAR = slice(257, 262)


def kind_of(path: Path) -> str | None:
    """How a file is read, by the suffix before that of its packing; None if it cannot be."""
    return KINDS.get(Path(unpacked_name(path)).suffix.lower())


def plain_name(path: Path) -> str:
    """The name of a file without the suffixes that say how to read it."""
    name = unpacked_name(path)
    return name[: -len(Path(name).suffix)] if kind_of(path) else name


def refusal(path: Path) -> str:
    """Why a file of another kind is not read, and what to do."""
    expected = f"expected {EXPECTED} (each may be packed, such as .jsonl.gz)"
    told = f" It is {what}." if (what := refused_kind(path)) else ""
    return f"{path} is not a kind of file Thimble reads: {expected}.{told}"


def refused_kind(path: Path) -> str:
    """What a file that is not read is, by its suffix, with what to do; nothing if that is not known."""
    return _REFUSED.get(Path(unpacked_name(path)).suffix.lower(), "")


def other_kind(head: bytes) -> str:
    """What a file is, by its first bytes, if it is none of the kinds that are read, with what to do; else nothing."""
    if head[_TAR] == b"ustar":
        return _ARCHIVE
    if head.lstrip()[:15].lower().startswith(_PAGES):
        return "a web page, perhaps one that asks to sign in: fetch the file itself"
    return next((what for begin, what in _FIRST_BYTES if head.startswith(begin)), "")


def kind_by_content(head: bytes) -> str | None:
    """How to read a file whose name does not say it; None if its first bytes do not either."""
    if head.startswith(b"PAR1"):
        return ".parquet"
    if head.startswith((b"ARROW1", b"FEA1", b"\xff\xff\xff\xff")):  # the last begins a stream
        return ".arrow"
    begin = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return {b"{": ".jsonl", b"[": ".json"}.get(begin[:1])


def unpacked_name(path: Path) -> str:
    """The name of a file without the suffix of its packing."""
    return path.name[: -len(path.suffix)] if path.suffix.lower() in PACKINGS else path.name
