import json

import pytest

from thimble.data.records import read_dataset
from thimble.errors import DataError

ROWS = [{"prompt": f"say {number} ü", "completion": str(number)} for number in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
COMMA_LINES = ",\n".join(map(json.dumps, ROWS))


def read(folder, content, name):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_dataset(folder / name)


def pairs(records):
    return [{"prompt": record.prompt, "completion": record.completion} for record in records]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES.encode("utf-8-sig")),
        ("a.jsonl", LINES.encode("utf-16")),
        ("a.jsonl", LINES.encode("utf-16-be")),
        ("a.jsonl", LINES.encode("utf-16-le")),
        ("a.jsonl", LINES.replace("\n", "\r")),
        ("a.ndjson", LINES),
        ("a.jsonlines", LINES),
        ("a", LINES),
        ("a", json.dumps(ROWS)),
        ("a.json", LINES),
        ("a.jsonl", "\n".join(json.dumps(row, indent=2) for row in ROWS)),
        ("a.jsonl", json.dumps(ROWS, indent=2)),
        ("a.jsonl", json.dumps(ROWS)),
        ("a.jsonl", f"[{COMMA_LINES}]"),
        ("a.jsonl", f"[\n{COMMA_LINES}\n]\n"),
        ("a.json", "\n".join(json.dumps(row, indent=2) for row in ROWS)),
        ("a.json", COMMA_LINES),
        ("a.json", json.dumps(ROWS[:1], indent=1) + json.dumps(ROWS[1:])),
        ("a.json", json.dumps(ROWS).encode("utf-16")),
        ("a.json", json.dumps({"version": "1", "data": ROWS})),
        ("a.json", json.dumps({"train": ROWS})),
        (
            "a.json",
            json.dumps(
                {
                    "features": [{"name": "prompt"}],
                    "rows": [{"row_idx": number, "row": row, "truncated_cells": []} for number, row in enumerate(ROWS)],
                }
            ),
        ),
        ("a.json", json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]})),
        ("a.json", json.dumps({str(number): row for number, row in enumerate(ROWS)})),
        ("a.json", json.dumps({key: {str(n): row[key] for n, row in enumerate(ROWS)} for key in ROWS[0]})),
        (
            "a.json",
            json.dumps({"columns": list(ROWS[0]), "index": [0, 1, 2], "data": [list(row.values()) for row in ROWS]}),
        ),
    ],
)
def test_json_is_read_however_a_program_lays_it_out(tmp_path, name, content):
    assert pairs(read(tmp_path, content, name).train) == ROWS


def test_an_object_of_rows_by_their_names_is_a_table_and_one_of_a_few_parts_is_a_row(tmp_path):
    rows = {f"q{number}": {"prompt": "a", "completion": "b", **({"x": 1} if number else {})} for number in range(10)}
    assert len(read(tmp_path, json.dumps(rows), "a.json").train) == 10
    parts = {"input": {"text": "a", "lang": "en"}, "output": {"text": "b", "lang": "de"}}
    with pytest.raises(DataError, match="input is an object with text, lang"):
        read(tmp_path, json.dumps(parts), "a.json")


def test_that_objects_take_several_lines_is_told(tmp_path):
    data = read(tmp_path, "\n".join(json.dumps(row, indent=2) for row in ROWS), "a.jsonl")
    assert data.notes == ("a.jsonl does not hold one object a line: it is read as a whole",)


def test_an_object_of_splits_holds_them_all(tmp_path):
    splits = {"train": ROWS, "test": ROWS[:1], "validation": ROWS[:2]}
    for name, folder in (("all.json", tmp_path), ("all.json.gz", tmp_path)):
        data = read(folder, json.dumps(splits), name)
        assert (pairs(data.train), pairs(data.test), pairs(data.valid)) == tuple(splits.values())
    (tmp_path / "all.json.gz").unlink()
    assert pairs(read_dataset(tmp_path).test) == ROWS[:1]


def test_an_object_with_messages_and_tools_is_a_row_and_no_table(tmp_path):
    ask, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    data = read(tmp_path, json.dumps({"messages": [ask, answer], "tools": [tool]}), "a.json")
    assert len(data.train) == 1
    assert data.train[0].tools == (tool,)


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


@pytest.mark.parametrize("key", ["conversation", "dialogue", "turns", "chat", "contents"])
def test_one_conversation_in_a_file_of_its_own_is_a_row_whatever_its_column_is_called(tmp_path, key):
    data = read(tmp_path, json.dumps({"id": 7, key: CHAT}, indent=1), "a.json")
    assert [record.messages for record in data.train] == [tuple(CHAT)]


@pytest.mark.parametrize("content", [f"{json.dumps(CHAT)}\n" * 2, json.dumps([CHAT, CHAT])])
def test_a_list_of_messages_in_a_line_is_a_conversation(tmp_path, content):
    data = read(tmp_path, content, "a.jsonl")
    assert [record.messages for record in data.train] == [tuple(CHAT)] * 2


def test_rows_in_a_line_that_have_a_column_role_are_rows(tmp_path):
    rows = [{"role": "nurse", **row} for row in ROWS]
    assert pairs(read(tmp_path, json.dumps(rows), "a.jsonl").train) == ROWS


def test_nan_stands_for_an_empty_cell_and_is_nothing_else(tmp_path):
    row = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": float("nan")}]
    }
    content = LINES * 5 + json.dumps({**ROWS[0], "note": float("nan")}) + "\n" + json.dumps(row) + "\n"
    data = read(tmp_path, content, "a.jsonl")
    assert len(data.train) == 16
    assert data.notes == ()
    assert data.skipped.told() == [
        "a.jsonl line 17 holds NaN or Infinity inside a value, which is no JSON: write null."
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.json",
            f"[{COMMA_LINES},\n]",
            "a.json line 4 is not valid JSON: Expecting value at column 1 (take away the c",
        ),
        (
            "a.jsonl",
            "{'prompt': 'a'}\n",
            "a.jsonl line 1 is not valid JSON: Expecting property name enclosed in double",
        ),
        (
            "a.jsonl",
            "{'prompt': 'a'}\n",
            "(JSON has double quotes; this looks like Python, to be written with json.dum",
        ),
        (
            "a.json",
            json.dumps({"train": ROWS, "other": ROWS}),
            "a.json is an object with the arrays train, other: expec",
        ),
        ("a.json", json.dumps({"train": ROWS, "other": ROWS}), "jq -c '.train[]' a.json > train.jsonl"),
        ("a.json", json.dumps(ROWS) + "\nxyz", "a.json line 2 is not valid JSON"),
        ("a.jsonl", '{\n"prompt": "a",\n"completion" "b"}\n', "a.jsonl line 3 is not valid JSON"),
        ("a.jsonl", LINES.encode("cp1252"), "a.jsonl line 1 is not UTF-8: byte 0xfc at column 19. Save the file again"),
        ("a.json", json.dumps(ROWS, ensure_ascii=False).encode("cp1252"), "a.json line 1 is not UTF-8: byte 0xfc"),
    ],
)
def test_json_that_cannot_be_read_is_told_with_what_to_mend(tmp_path, name, content, message):
    with pytest.raises(DataError) as caught:
        read(tmp_path, content, name)
    assert message in caught.value.problems[0]


def test_a_null_that_the_user_wrote_into_arguments_stays(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"left": None, "right": 1}}}
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    message = read(tmp_path, json.dumps(row), "a.jsonl").train[0].messages[1]
    assert message["tool_calls"][0]["function"]["arguments"] == {"left": None, "right": 1}


@pytest.mark.parametrize("content", ['{"completion": "x", "completion": "y"}\n', '[{"a": {"b": 1, "b": 2}}]'])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_key_that_stands_twice_is_named(suffix, content, tmp_path):
    (tmp_path / f"x.{suffix}").write_text(content)
    with pytest.raises(DataError, match="stands twice in one object: leave one of them out"):
        read_dataset(tmp_path / f"x.{suffix}")


@pytest.mark.parametrize("names", [5, [["a"]], ["a"]])
def test_what_only_looks_like_a_table_of_pandas_is_refused(tmp_path, names):
    with pytest.raises(DataError):
        read(tmp_path, json.dumps({"columns": names, "index": [0], "data": [1]}), "a.json")


def test_a_command_for_an_array_of_any_name_can_be_typed(tmp_path):
    with pytest.raises(DataError) as caught:
        read(tmp_path, json.dumps({"it's one/two": ROWS, "other": ROWS}), "my rows.json")
    assert caught.value.problems[0].endswith(
        """jq -c '.["it'"'"'s one/two"][]' 'my rows.json' > 'it'"'"'s one-two.jsonl'"""
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_files_with_byte_order_marks_may_be_put_one_behind_the_other(tmp_path, name):
    content = "".join(f"\ufeff{line}" for line in LINES.splitlines(keepends=True))
    assert pairs(read(tmp_path, content, name).train) == ROWS
