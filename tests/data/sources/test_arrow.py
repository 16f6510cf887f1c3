"""What Arrow and Parquet files hold is read as if it stood in JSON: the same rows are the same tokens."""

import csv
import datetime
import decimal
import json
import sys

import pytest

from stress import TINY
from stress.data import TEMPLATE
from thimble.data.encode import Encoder
from thimble.data.model import open_model
from thimble.data.records import read_dataset
from thimble.data.sources.arrow import read_arrow
from thimble.data.sources.raw import Source, Told
from thimble.data.template import ChatTemplate
from thimble.errors import DataError, MissingPackageError

pyarrow = pytest.importorskip("pyarrow")
feather = pytest.importorskip("pyarrow.feather")
parquet = pytest.importorskip("pyarrow.parquet")


def tool(name, **properties):
    fields = {key: {"type": kind} for key, kind in properties.items()}
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": fields}}}


def conversation(number):
    if number % 3 == 0:  # the keys of a call differ from row to row, and some calls have none
        name, arguments, tools = "weather", {"city": f"Town {number}", "days": [1, 2]}, [tool("weather", city="string")]
    elif number % 3 == 1:
        name, arguments, tools = "add", {"left": number, "nested": {"right": 2}}, [tool("add", left="integer")]
    else:
        name, arguments, tools = "now", {}, [tool("now")]
    call = {"type": "function", "id": f"call{number:05d}", "function": {"name": name, "arguments": arguments}}
    messages = [
        {"role": "user", "content": f"please call {name} {number}"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "done", "tool_call_id": call["id"], "name": name},
        {"role": "assistant", "content": "It is done."},
    ]
    return {"messages": messages, "tools": tools, "system": "Be brief." if number % 2 else None}


ROWS = [conversation(number) for number in range(12)]


def write_stream(path, table, batch_rows=5):
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table, batch_rows)


def write_file(path, table):
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as out:
        out.write_table(table, 5)


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            cells = {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
            writer.writerow({key: cell for key, cell in cells.items() if cell != "null"})


@pytest.fixture(scope="module")
def tokens():
    encoder = Encoder(open_model(str(TINY)).tokenizer, ChatTemplate(TEMPLATE + "{{ tools | tojson }}"), 512)
    return lambda path: [encoder.encode(record)[0].ids.tolist() for record in read_dataset(path).train]


def test_the_same_rows_are_the_same_tokens_in_every_format(tmp_path, tokens):
    table = pyarrow.Table.from_pylist(ROWS)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    write_csv(tmp_path / "a.csv", ROWS)
    parquet.write_table(table, tmp_path / "a.parquet")
    feather.write_feather(table, tmp_path / "a.feather")
    feather.write_feather(table, tmp_path / "packed.feather", compression="zstd")
    write_stream(tmp_path / "a.arrow", table)
    write_file(tmp_path / "b.arrow", table)
    right = tokens(tmp_path / "a.jsonl")
    names = ["a.json", "a.csv", "a.parquet", "a.feather", "packed.feather", "a.arrow", "b.arrow"]
    assert [name for name in names if tokens(tmp_path / name) != right] == []


def one_row(folder, array, **more):
    """What a column of the arguments of a call, of a given Arrow type, is read as."""
    table = pyarrow.table({"value": array})
    arguments = pyarrow.StructArray.from_arrays([table["value"].combine_chunks()], ["value"])
    function = pyarrow.StructArray.from_arrays([pyarrow.array(["f"] * len(array)), arguments], ["name", "arguments"])
    path = folder / "a.arrow"
    write_stream(path, pyarrow.table({"prompt": ["x"] * len(array), "call": function}))
    rows = list(read_arrow(Source(path, "a.arrow", ".arrow"), Told()))
    return [row.value["call"]["arguments"] for row in rows]


VALUES = [
    (pyarrow.array([1, None]), [{"value": 1}, {}]),
    (pyarrow.array([[1, None], None]), [{"value": [1, None]}, {}]),
    (pyarrow.array([{"a": {"b": None, "c": 1}}, {"a": None}]), [{"value": {"a": {"c": 1}}}, {"value": {}}]),
    (pyarrow.array([[{"a": 1, "b": None}]]), [{"value": [{"a": 1}]}]),
    (
        pyarrow.array([[("k", 1), ("n", None)]], pyarrow.map_(pyarrow.string(), pyarrow.int32())),
        [{"value": {"k": 1, "n": None}}],
    ),
    (pyarrow.array(["a", "b", "a"]).dictionary_encode(), [{"value": "a"}, {"value": "b"}, {"value": "a"}]),
    (pyarrow.array(["a", None], pyarrow.large_string()), [{"value": "a"}, {}]),
    (pyarrow.array(["ä"], pyarrow.string_view()), [{"value": "ä"}]),
    (pyarrow.array([b"\xc3\xa4"], pyarrow.binary()), [{"value": "ä"}]),
    (pyarrow.array([b"\xc3\xa4"], pyarrow.large_binary()), [{"value": "ä"}]),
    (pyarrow.array([[1, 2]], pyarrow.large_list(pyarrow.int8())), [{"value": [1, 2]}]),
    (pyarrow.array([[1, 2]], pyarrow.list_(pyarrow.int8(), 2)), [{"value": [1, 2]}]),
    (
        pyarrow.array(
            [[{"a": None, "b": 2}]], pyarrow.list_view(pyarrow.struct({"a": pyarrow.int8(), "b": pyarrow.int8()}))
        ),
        [{"value": [{"b": 2}]}],
    ),
    (pyarrow.array([datetime.datetime(2024, 5, 6, 7, 8, 9)]), [{"value": "2024-05-06T07:08:09"}]),
    (pyarrow.array([datetime.date(2024, 5, 6)]), [{"value": "2024-05-06"}]),
    (pyarrow.array([decimal.Decimal("1.50"), decimal.Decimal("2.00")]), [{"value": 1.5}, {"value": 2}]),
    (pyarrow.array([1.5, float("nan")]), [{"value": 1.5}, {}]),
    (pyarrow.array([True, None]), [{"value": True}, {}]),
]


@pytest.mark.parametrize(("array", "expected"), VALUES, ids=[str(array.type)[:40] for array, _ in VALUES])
def test_a_value_is_what_json_would_hold(tmp_path, array, expected):
    assert one_row(tmp_path, array) == expected


def test_an_empty_object_stays_one_and_a_null_is_absent(tmp_path):
    call = pyarrow.array([{"name": "f", "arguments": {"a": None}}, {"name": "g", "arguments": None}])
    write_stream(tmp_path / "a.arrow", pyarrow.table({"prompt": ["x", "y"], "completion": ["z", "z"], "call": call}))
    assert len(read_dataset(tmp_path / "a.arrow").train) == 2


# --- what datasets notes beside the types


def with_features(table, **features):
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def test_numbers_of_classes_are_read_as_their_names(tmp_path):
    table = pyarrow.table({"prompt": ["good", "bad", "?"] * 8, "completion": [1, 0, 1] * 8})
    features = {
        "prompt": {"dtype": "string", "_type": "Value"},
        "completion": {"names": ["no", "yes"], "_type": "ClassLabel"},
    }
    parquet.write_table(with_features(table, **features), tmp_path / "a.parquet")
    data = read_dataset(tmp_path / "a.parquet")
    assert [record.completion for record in data.train][:3] == ["yes", "no", "yes"]
    assert data.notes == ("a.parquet: the numbers of completion are read as their names, no, yes",)


def test_pictures_are_told_and_not_read(tmp_path):
    table = pyarrow.table({"prompt": ["x"], "completion": ["y"], "image": [{"bytes": b"\x89PNG", "path": "x.png"}]})
    write_stream(tmp_path / "a.arrow", with_features(table, image={"_type": "Image"}))
    data = read_dataset(tmp_path / "a.arrow")
    assert data.warnings == ("a.arrow: not read, since only text can be learned: image (Image)",)


@pytest.mark.parametrize("has_features", [True, False])
def test_conversations_that_are_stored_as_an_object_of_lists_are_read(tmp_path, has_features):
    table = pyarrow.table({"conversations": [{"from": ["human", "gpt"], "value": ["hi", "ho"]}] * 3})
    feature = {"feature": {"from": {"dtype": "string", "_type": "Value"}}, "_type": "Sequence"}
    table = with_features(table, conversations=feature) if has_features else table
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read_dataset(tmp_path / "a.parquet").format == "ShareGPT"


@pytest.mark.parametrize("metadata", [b"", b"{", b"[]", b'{"info": 3}', b'{"info": {"features": [1]}}'])
def test_a_damaged_note_is_no_reason_to_refuse_a_table(tmp_path, metadata):
    table = pyarrow.table({"prompt": ["x"], "completion": ["y"]}).replace_schema_metadata({"huggingface": metadata})
    write_stream(tmp_path / "a.arrow", table)
    assert len(read_dataset(tmp_path / "a.arrow").train) == 1


# --- what is wrong


def test_columns_of_one_name_are_refused(tmp_path):
    """As a join leaves them; of two columns in one place the first would be lost without a word."""
    table = pyarrow.Table.from_arrays([pyarrow.array([text]) for text in "abc"], ["prompt", "completion", "prompt"])
    write_stream(tmp_path / "a.arrow", table)
    parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("a.arrow", "a.parquet"):
        with pytest.raises(DataError, match=f"{name} names prompt more than once: expected columns with different"):
            read_dataset(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"xxxxx", b"ARROW1\0\0", b"FEA1", b"\xff\xff\xff\xff"])
def test_a_damaged_arrow_file_is_refused(tmp_path, content):
    (tmp_path / "a.arrow").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.arrow is not a whole Arrow file: "):
        read_dataset(tmp_path / "a.arrow")


def test_an_arrow_file_that_was_cut_off_is_refused(tmp_path):
    write_stream(tmp_path / "a.arrow", pyarrow.Table.from_pylist(ROWS))
    content = (tmp_path / "a.arrow").read_bytes()
    for length in range(0, len(content) - 8, 97):
        (tmp_path / "a.arrow").write_bytes(content[:length])
        with pytest.raises(DataError):
            read_dataset(tmp_path / "a.arrow")


def test_arrow_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.arrow").write_bytes(b"ARROW1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackageError, match=r"a\.arrow is an Arrow file.*pip install -e .*\[parquet\]"):
        read_dataset(tmp_path / "a.arrow")


@pytest.mark.parametrize("is_stream", [True, False])
def test_rows_that_take_no_bytes_are_refused(tmp_path, is_stream):
    empty = pyarrow.nulls(100_000)
    runs = pyarrow.RunEndEncodedArray.from_arrays(pyarrow.array([100_000], pyarrow.int32()), pyarrow.array(["x"]))
    for array in (empty, runs):
        table = pyarrow.table({"prompt": array})
        new = pyarrow.ipc.new_stream if is_stream else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, new(sink, table.schema) as out:
            out.write_table(table)
        with pytest.raises(DataError, match=r"100,000 rows in \d+ bytes"):
            read_dataset(tmp_path / "a.arrow")


def test_an_empty_cell_is_told_as_one_and_not_as_a_table_of_other_columns(tmp_path):
    write_file(tmp_path / "x.arrow", pyarrow.table({"prompt": ["a", "b"], "completion": [None, "c"]}))
    with pytest.raises(DataError, match="x.arrow row 1: completion is missing: expected text"):
        read_dataset(tmp_path / "x.arrow")
