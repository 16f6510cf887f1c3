import bz2
import gzip
import io
import json
import lzma
import sys

import pytest

from thimble.data.records import read_dataset
from thimble.errors import DataError, MissingPackageError

LINES = "".join(json.dumps({"prompt": f"say {number}", "completion": "x"}) + "\n" for number in range(500)).encode()
TABLE = b"prompt;completion\n" + b"say;x\n" * 500


def pack(content, suffix):
    if suffix in (".gz", ".bz2", ".xz"):
        return {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix](content)
    pyarrow = pytest.importorskip("pyarrow")
    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, {".zst": "zstd", ".lz4": "lz4"}[suffix]) as stream:
        stream.write(content)
    return packed.getvalue().to_pybytes()


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst", ".lz4"])
def test_a_packed_file_is_read_whatever_its_name_says(tmp_path, suffix):
    for name, content in (("a.jsonl", LINES), ("a.csv", TABLE), ("a.parquet", _parquet())):
        for named in (f"{name}{suffix}", name):
            (tmp_path / named).write_bytes(pack(content, suffix))
            data = read_dataset(tmp_path / named)
            assert (len(data.train), data.name) == (500, "a")
    (tmp_path / "plain.jsonl.gz").write_bytes(LINES)
    assert len(read_dataset(tmp_path / "plain.jsonl.gz").train) == 500
    (tmp_path / f"rows{suffix}").write_bytes(pack(LINES, suffix))
    assert len(read_dataset(tmp_path / f"rows{suffix}").train) == 500


def _parquet():
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"prompt": ["say"] * 500, "completion": ["x"] * 500}), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("suffix", "kind"), [(".gz", "gzip"), (".bz2", "bzip2"), (".xz", "xz"), (".zst", "Zstandard"), (".lz4", "LZ4")]
)
def test_a_packed_file_that_was_cut_off_is_refused(tmp_path, suffix, kind):
    content = pack(LINES * 20, suffix)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(DataError, match=rf"cannot be unpacked: .* Expected a whole {kind} file; fetch it again"):
        read_dataset(tmp_path / f"a.jsonl{suffix}")


def test_zstandard_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(pack(LINES, ".zst"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackageError, match=r"packed with Zstandard.*pip install -e .*\[parquet\]"):
        read_dataset(tmp_path / "a.jsonl.zst")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            b"PK\x03\x04...",
            "a.csv is a ZIP archive or an Excel file: unpack it, or save the spreadsheet as CSV",
        ),
        ("a.csv", b"\xd0\xcf\x11\xe0...", "a.csv is an old Excel or Word file"),
        ("a.csv", b"<!DOCTYPE html><html>", "a.csv is a web page, perhaps one that asks to sign in"),
        ("a.txt", b"%PDF-1.7", "a.txt is a PDF: save its text as .txt"),
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\n",
            "a.jsonl is a Git LFS pointer, not the file itself",
        ),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "a.parquet is a Git LFS pointer"),
        ("a.arrow", b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull` in its folder"),
        (
            "a.jsonl.gz",
            gzip.compress(b"\0" * 257 + b"ustar" + b"\0" * 500, mtime=0),
            "a.jsonl.gz is an archive: unpack it first",
        ),
    ],
)
def test_what_a_file_really_is_decides(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_dataset(tmp_path / name)
    assert message in caught.value.problems[0]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("a.xlsx", "a spreadsheet: save it as CSV (UTF-8) there"),
        ("a.ods", "a spreadsheet"),
        ("a.numbers", "a spreadsh"),
        ("a.docx", "a document: save its text as .txt"),
        ("a.pdf", "a document"),
        ("a.zip", "an archive: unpack it first"),
        ("a.tar.gz", "an archive"),
        ("a.jsonl.incomplete", "an unfinished download"),
        ("a.pkl", "a pickle, which can run"),
        ("a.sqlite", "a database"),
        ("a.yaml", "no table: write its rows as .jsonl"),
    ],
)
def test_kinds_that_are_not_read_are_refused_with_what_to_do(tmp_path, name, advice):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError) as caught:
        read_dataset(tmp_path / name)
    assert f"{name} is not a kind of file Thimble reads: expected .jsonl" in caught.value.problems[0]
    assert f"It is {advice}" in caught.value.problems[0]
