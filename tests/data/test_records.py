import csv
import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pytest

from thimble.data.records import Record, beginning_records, general_records, read_dataset, split_rows
from thimble.data.sources import json_rows, text
from thimble.errors import DataError, MissingPackageError

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {"type": "object"}}}


def write_lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def read(tmp_path):
    """Read rows as if they stood in a file."""
    return lambda *rows: read_dataset(write_lines(tmp_path / "train.jsonl", *rows))


@pytest.fixture
def problems(read):
    """The problems of rows."""

    def of(*rows):
        with pytest.raises(DataError) as caught:
            read(*rows)
        return caught.value.problems

    return of


def turns(record):
    return [(message["role"], message["content"]) for message in record.messages]


# --- forms of rows


def test_messages_are_taken_as_they_are(read):
    data = read(CHAT)
    assert data.format == "messages"
    assert tuple(data.train) == (Record(messages=tuple(CHAT["messages"]), source="train.jsonl line 1"),)
    assert not data.is_text


def test_messages_may_hold_calls_and_results(read):
    calls = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "rain", "tool_call_id": "c1"},
        {"role": "assistant", "content": "It rains."},
    ]
    data = read({"messages": calls, "tools": [TOOL]})
    call = data.train[0].messages[1]
    assert data.format == "messages with tools"
    assert call["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Oslo"}}
    assert call["content"] is None
    assert data.train[0].messages[2]["tool_call_id"] == "c1"
    assert data.train[0].tools == (TOOL,)


def test_arguments_may_be_an_object_and_calls_may_be_flat(read):
    flat = {"name": "weather", "arguments": {"city": "Oslo"}}
    data = read({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [flat]}]})
    assert data.train[0].messages[1]["tool_calls"][0]["function"] == flat
    assert data.format == "messages with tools"


def test_legacy_functions_become_tools(read):
    called = {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": ""}}
    result = {"role": "function", "name": "weather", "content": "rain"}
    ask = {"role": "user", "content": "?"}
    data = read({"messages": [ask, called, result], "functions": [TOOL["function"]]})
    assert data.train[0].tools == (TOOL,)
    assert data.train[0].messages[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {}}
    assert data.train[0].messages[2] == {"role": "tool", "name": "weather", "content": "rain"}


def test_tools_may_be_stored_as_json_text(read):
    assert read({**CHAT, "tools": json.dumps([TOOL])}).train[0].tools == (TOOL,)


def test_text_parts_are_joined(read):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    ask = {"role": "user", "content": "Hi"}
    assert turns(read({"messages": [ask, {"role": "assistant", "content": parts}]}).train[0])[1] == (
        "assistant",
        "Hello",
    )


def test_developer_messages_are_system_messages(read):
    data = read({"messages": [{"role": "developer", "content": "Be kind."}, *CHAT["messages"]]})
    assert turns(data.train[0])[0] == ("system", "Be kind.")


def test_turns_of_weight_zero_are_marked(read):
    silent = {"role": "assistant", "content": "Hm", "weight": 0}
    data = read({"messages": [{"role": "user", "content": "Hi"}, silent, *CHAT["messages"]]})
    assert data.train[0].messages[1]["weight"] == 0


def test_sharegpt_names_are_translated(read):
    call = {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'}
    names = [("system", "s"), ("human", "q"), ("gpt", "a"), ("user", "q2"), ("assistant", "a2"), ("human", "q3")]
    said = [{"from": name, "value": value} for name, value in names]
    data = read({"conversations": [*said, call, {"from": "observation", "value": "rain"}]})
    assert data.format == "ShareGPT with tools"
    record = data.train[0]
    roles = ["system", "user", "assistant", "user", "assistant", "user", "assistant", "tool"]
    assert [role for role, _ in turns(record)] == roles
    assert record.messages[6]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Oslo"}}


def test_conversations_may_use_the_names_of_openai(read):
    data = read({"conversations": CHAT["messages"], "system": "Be kind."})
    assert data.format == "messages"
    assert turns(data.train[0]) == [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("instruction", "response")],
)
def test_pairs_are_kept_apart_and_become_two_turns(read, prompt, completion):
    data = read({prompt: "2+2=", completion: "4"})
    assert data.format == f"{prompt} and {completion}"
    assert (data.train[0].prompt, data.train[0].completion) == ("2+2=", "4")
    assert turns(data.train[0]) == [("user", "2+2="), ("assistant", "4")]


def test_a_completion_that_looks_like_json_is_text(read):
    assert read({"prompt": "List", "completion": '[{"a": 1}]'}).train[0].completion == '[{"a": 1}]'


def test_pairs_of_messages_learn_only_the_completion(read):
    before = [*CHAT["messages"], {"role": "user", "content": "And?"}]
    data = read({"prompt": before, "completion": [{"role": "assistant", "content": "So."}]})
    messages = data.train[0].messages
    assert [message.get("weight", 1) for message in messages] == [1, 0, 1, 1]
    assert data.train[0].completion is None


def test_alpaca_puts_the_input_below_the_instruction(read):
    row = {"instruction": "Add.", "input": "1, 2", "output": "3", "system": "Count.", "history": [["Q", "A"]]}
    data = read(row, {"instruction": "Say hi.", "input": "", "output": "Hi."})
    assert data.format == "Alpaca"
    history = [("system", "Count."), ("user", "Q"), ("assistant", "A")]
    assert turns(data.train[0]) == [*history, ("user", "Add.\n\n1, 2"), ("assistant", "3")]
    assert turns(data.train[1]) == [("user", "Say hi."), ("assistant", "Hi.")]


def test_rows_may_differ_in_form_and_the_mix_is_said(read):
    data = read(CHAT, CHAT, {"prompt": "a", "completion": "b"})
    assert data.format == "messages (2), prompt and completion (1)"


def test_columns_that_are_not_used_are_noted_once(read):
    data = read({**CHAT, "id": 1, "topic": "x"}, {**CHAT, "id": 2})
    assert data.notes == ("not used, as it is about the rows and not of them: id (2 rows)",)
    (warning,) = data.warnings
    assert warning.startswith("filled but not used: topic (1 row); to use a column, name it with --prompt-column")


def test_what_is_not_used_is_told_by_what_it_may_mean(read):
    rows = [{**CHAT, "prompt": "Hi", "url": "x", "score": 0.5, "note": None, "rejected": "b"}] * 3
    data = read(*rows, {**CHAT, "prompt_id": 7, "odd": [], "topic": "x"})
    assert data.notes == (
        "not used, as it is about the rows and not of them: prompt_id (1 row), url (3 rows)",
        "not used, as the messages say the same: prompt",
        "not used, as it is empty: note, odd",
    )
    assert data.warnings[0].startswith(
        "filled but not used: rejected (3 rows), score (3 rows), topic (1 row); Thimble learns from answers, "
    )


def test_names_without_end_are_counted_together(read):
    (warning,) = read(*[{**CHAT, f"n{number}": "x"} for number in range(1200)]).warnings
    assert warning.startswith("filled but not used: columns of other names (200 rows), n0 (1 row), n1 (1 row)")


# --- what is wrong with rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (7, "the row is 7: expected an object in one of the forms messages; conversations; prompt and completion"),
        ({}, "the columns are none: expected one of the forms messages"),
        ({"titel": "a", "body": "b"}, "the columns are titel, body: expected one of the forms messages"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "Thimble learns from answers, not from preferences"),
        ({"messages": "hello"}, 'messages is "hello": expected a list of messages'),
        ({"messages": []}, "messages is empty: expected messages"),
        ({"messages": "[{'role': 'user', 'content': 'a'}]"}, "a list as Python prints it, which is no JSON: write the"),
        ({"messages": None}, "messages is missing: expected a list of messages"),
        ({"messages": ["hi"]}, 'messages 1 is "hi": expected an object with role and content'),
        (
            {"messages": [{"role": "alien", "content": "x"}]},
            'messages 1 role is "alien": expected system, user, assistant',
        ),
        ({"messages": [{"content": "x"}]}, "messages 1 role is missing: expected system, user, assistant or tool"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages 1 content is 5: expected text"),
        ({"messages": [{"role": "user"}]}, "messages 1 content is missing: expected text"),
        (
            {"messages": [{"role": "user", "content": {"a": 1}}]},
            "messages 1 content is an object with a: expected text",
        ),
        ({"messages": [CHAT["messages"][0]]}, "expected a message of the role assistant, found user"),
        (
            {"messages": [{"role": "assistant", "content": " "}]},
            "messages 1 content is empty: expected what the assist",
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages 1 content is missing: expected text"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, 'conversations 1 from is "alien": expected system, hum'),
        ({"conversations": [{"from": "gpt", "value": ""}]}, "conversations 1 value is empty"),
        ({"prompt": "a", "completion": ""}, "completion is empty: expected the text to learn"),
        ({"prompt": "a", "completion": None}, "completion is missing: expected text"),
        ({"prompt": "a", "completion": "  "}, "completion is empty: expected the text to learn"),
        ({"prompt": "a", "completion": 3}, "completion is 3: expected text"),
        ({"prompt": ["x"], "completion": [CHAT["messages"][1]]}, 'prompt 1 is "x": expected an object with role'),
        ({"instruction": "a", "output": ""}, "output is empty: expected the text to learn"),
        ({"instruction": "a", "output": "b", "history": 3}, "history is 3: expected a list of pairs"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, 'history 1 is "x": expected a pair of texts'),
        ({"text": 4}, "text is 4: expected text"),
        ({"text": " "}, "text is empty: expected the text to learn"),
        ({"text": None}, "text is missing: expected text"),
        ({**CHAT, "tools": {"a": 1}}, "tools is an object with a: expected a list of tool definitions"),
        ({**CHAT, "tools": [{"type": "function"}]}, "tools 1 is an object with type: expected a tool definition"),
        ({**CHAT, "system": 3}, "system is 3: expected text"),
        ({"text": "\ud800"}, "text has half of a character at position 0"),
    ],
)
def test_a_bad_row_says_what_was_found_and_expected(tmp_path, row, message):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(CHAT) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError) as caught:
        read_dataset(path, is_strict=True)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith("train.jsonl line 2: ")
    assert message in caught.value.problems[0]


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ("weather", 'messages 2 tool_calls is "weather": expected a list of calls'),
        ([3], "messages 2 tool_calls 1 is 3: expected an object with name and arguments"),
        ([{"function": {"arguments": {}}}], "tool_calls 1 is an object with function: expected an object with name"),
        ([{"name": "f", "arguments": "{bad"}], 'tool_calls 1 (f) has as arguments "{bad": expected a JSON object'),
        ([{"name": "f", "arguments": "[1]"}], "tool_calls 1 (f) has as arguments a list: expected a JSON object"),
    ],
)
def test_a_malformed_call_is_shown(problems, calls, message):
    (problem,) = problems({"messages": [CHAT["messages"][0], {"role": "assistant", "tool_calls": calls}]})
    assert message in problem


def test_parts_that_are_not_text_are_refused(problems):
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    (problem,) = problems({"messages": [{"role": "user", "content": picture}, CHAT["messages"][1]]})
    assert "messages 1 content part 1 is of type image_url: expected parts of type text" in problem


def test_all_problems_of_a_row_and_of_all_rows_are_told_at_once(problems):
    found = problems({"messages": [{"role": "alien", "content": "x"}, {"role": "user", "content": 5}]}, {"a": 1})
    assert [problem.partition(": ")[0] for problem in found] == ["train.jsonl line 1"] * 2 + ["train.jsonl line 2"]


def test_rows_with_the_same_problem_are_told_once(problems):
    found = problems(*[{"a": 1}] * 1025)
    assert len(found) == 1
    assert found[0].startswith("train.jsonl line 1: the columns are a: expected")
    assert found[0].endswith(" (likewise 1,024 more rows, up to train.jsonl line 1025)")


def test_after_twenty_problems_the_others_are_counted(problems):
    found = problems(*[{f"a{n}": 1} for n in range(1025)])
    assert len(found) == 21
    assert found[19].startswith("train.jsonl line 20: ")
    assert found[20] == "and 1,005 more problems of other kinds."


# --- files


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_data(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(CHAT).encode() + b"\r\n\r\n" + json.dumps(CHAT).encode() + b"\r\n")
    assert [record.source for record in read_dataset(path).train] == ["train.jsonl line 1", "train.jsonl line 3"]


def test_line_separators_inside_json_text_do_not_end_a_line(tmp_path):
    assert read_dataset(write_lines(tmp_path / "a.jsonl", {"text": "a\u2028b\x85c"})).train[0].text == "a\u2028b\x85c"


@pytest.mark.parametrize("content", [[CHAT, CHAT], {"data": [CHAT, CHAT]}, {"version": 1, "rows": [CHAT, CHAT]}])
def test_json_may_be_an_array_or_hold_one(tmp_path, content):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    assert [record.source for record in read_dataset(path).train] == ["train.json row 1", "train.json row 2"]


def test_json_may_be_a_single_row(tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(CHAT))
    assert len(read_dataset(path).train) == 1


def test_json_with_one_object_a_line_is_read_as_lines(tmp_path):
    path = write_lines(tmp_path / "train.json", CHAT, CHAT)
    assert read_dataset(path).train[1].source == "train.json line 2"


def test_csv_cells_may_hold_line_breaks_and_commas(tmp_path):
    path = tmp_path / "train.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["question", "answer", "id"], ["a,b", "c\nd", "1"], ["e", "f", ""]])
    data = read_dataset(path)
    assert [(record.prompt, record.completion) for record in data.train] == [("a,b", "c\nd"), ("e", "f")]
    assert [record.source for record in data.train] == ["train.csv line 2", "train.csv line 4"]


@pytest.mark.parametrize("mark", [";", "\t"])
def test_csv_may_use_the_separators_of_spreadsheets(tmp_path, mark):
    path = tmp_path / "train.csv"
    path.write_text(f"prompt{mark}completion\na, b{mark}c\n")
    assert read_dataset(path).train[0].prompt == "a, b"


def test_csv_may_hold_messages_as_json_and_long_cells(tmp_path):
    path = tmp_path / "train.csv"
    long = {"messages": [{"role": "user", "content": "x" * 200_000}, CHAT["messages"][1]]}
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps(long["messages"])]])
    assert len(read_dataset(path).train[0].messages[0]["content"]) == 200_000
    assert csv.field_size_limit() == 131072


def test_parquet_rows_are_read_without_their_empty_fields(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    rows = [
        {**CHAT, "id": 1},
        {"messages": [*CHAT["messages"], {"role": "user", "content": "x", "name": "Ann"}], "id": 2},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    data = read_dataset(tmp_path / "train.parquet")
    assert data.train[0].messages == tuple(CHAT["messages"])
    assert data.train[1].source == "train.parquet row 2"


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(MissingPackageError, match=r"pip install -e .*\[parquet\]"):
        read_dataset(tmp_path / "train.parquet")


def test_any_file_may_be_gzipped(tmp_path):
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(CHAT).encode()))
    data = read_dataset(path)
    assert (data.name, data.train[0].source) == ("train", "train.jsonl.gz line 1")


def test_a_text_file_is_one_record(tmp_path):
    path = tmp_path / "my.book.txt"
    path.write_bytes(b"Once upon\r\na time.")
    data = read_dataset(str(path))
    assert tuple(data.train) == (Record(text="Once upon\na time.", source="my.book.txt"),)
    assert (data.name, data.format, data.is_text, data.files) == ("my.book", "plain text", True, (path,))


# --- what is wrong with files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl is empty: expected rows."),
        ("a.jsonl", b" \n\n", "a.jsonl is empty: expected rows."),
        ("a.json", b"[]", "a.json is empty: expected rows."),
        ("a.txt", b"", "a.txt has no text: expected at least one example."),
        ("a.csv", b"prompt,completion\n", "a.csv has a header and no rows: expected at least one row below prompt"),
        ("a.csv", b"prompt,completion\n1,2\n1,2,3\n", "a.csv line 3 has 3 cells: expected 2, as in the header"),
        (
            "a.csv",
            b'prompt,completion\n"1,2\n',
            "a.csv line 2 is not valid CSV: unexpected end of data (line 2). Expected cells",
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl line 2 is not valid JSON: Expecting value at column 10"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl line 1 is not valid JSON: nested too deeply"),
        ("a.json", b'[{"text": "a"},\n{"text" 1}]', "a.json line 2 is not valid JSON: Expecting ':' delimiter at col"),
        ("a.json", b"3", "a.json is a number: expected an array of objects, or an object with one such array inside."),
        (
            "a.json",
            b'{"a": [{"x": 1}], "b": [{"x": 1}]}',
            "a.json is an object with the arrays a, b: expected an array",
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}', "a.jsonl line 2 is not UTF-8: byte 0xe9 at column 14."),
        ("a.txt", "text".encode("utf-16")[:-1], "a.txt is damaged UTF-16:"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz cannot be unpacked: Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}', mtime=0)[:-9],
            "a.jsonl.gz cannot be unpacked: Compressed file ended",
        ),
        ("a.parquet", b"PAR1 and no more", "a.parquet is not a whole Parquet file:"),
    ],
)
def test_a_bad_file_is_told_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_dataset(tmp_path / name, is_strict=True)
    assert caught.value.problems[0].startswith(message)
    assert len(caught.value.problems) == 1


def test_a_missing_file_is_told_with_near_names(tmp_path):
    write_lines(tmp_path / "training.jsonl", CHAT)
    with pytest.raises(
        DataError, match=r"train\.jsonl does not exist \(near it: training\.jsonl\): expected a \.jsonl"
    ):
        read_dataset(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"does not exist \(there is no folder .*nowhere either\)"):
        read_dataset(tmp_path / "nowhere" / "train.jsonl")


def test_a_path_that_cannot_be_opened_is_told_with_the_reason(tmp_path):
    with pytest.raises(DataError, match="cannot be opened: File name too long"):
        read_dataset(tmp_path / ("x" * 300))


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "train.xlsx").write_bytes(b"")
    with pytest.raises(DataError, match=r"train\.xlsx is not a kind of file Thimble reads: expected \.jsonl, \.json"):
        read_dataset(tmp_path / "train.xlsx")


# --- folders


def test_a_folder_may_hold_train_valid_and_test_files(tmp_path):
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl.gz"):
        write_lines(tmp_path / name.removesuffix(".gz"), {"text": name})
    packed = gzip.compress((tmp_path / "test.jsonl").read_bytes())
    (tmp_path / "test.jsonl").unlink()
    (tmp_path / "test.jsonl.gz").write_bytes(packed)
    (tmp_path / "README.md").write_text("About")
    data = read_dataset(tmp_path)
    assert [records[0].text for records in (data.train, data.valid, data.test)] == [
        "train.jsonl", "validation.jsonl", "test.jsonl.gz",
    ]  # fmt: skip
    assert data.notes == ("files not used: README.md",)
    assert data.name == tmp_path.name


@pytest.mark.parametrize("name", ["valid", "val", "dev", "validation", "VAL"])
def test_the_held_out_file_may_have_other_names(tmp_path, name):
    write_lines(tmp_path / "train.jsonl", {"text": "a"})
    write_lines(tmp_path / f"{name}.jsonl", {"text": "b"})
    data = read_dataset(tmp_path)
    assert (len(data.valid), data.test) == (1, None)


def test_a_split_may_come_in_numbered_parts(tmp_path):
    for part in range(2):
        write_lines(tmp_path / f"train-0000{part}-of-00002.jsonl", {"text": str(part)})
    assert [record.text for record in read_dataset(tmp_path).train] == ["0", "1"]


def test_a_folder_with_a_test_file_alone_is_refused(tmp_path):
    write_lines(tmp_path / "test.jsonl", CHAT)
    with pytest.raises(DataError, match=r"has test\.jsonl but no train file.*name the file instead of the folder"):
        read_dataset(tmp_path)


def test_all_data_files_of_a_folder_are_read(tmp_path):
    write_lines(tmp_path / "b.jsonl", {"text": "b"})
    write_lines(tmp_path / "a.jsonl", {"text": "a"})
    (tmp_path / "notes.md").write_text("x")
    data = read_dataset(tmp_path)
    assert [record.source for record in data.train] == ["a.jsonl line 1", "b.jsonl line 1"]
    assert data.notes == ("files not used: notes.md",)


def test_a_folder_of_texts_is_read_with_its_subfolders(tmp_path):
    (tmp_path / "deep" / ".hidden").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("A")
    (tmp_path / "deep" / "b.md").write_text("B")
    (tmp_path / "deep" / "empty.md").write_text("")
    (tmp_path / "deep" / ".hidden" / "c.md").write_text("C")
    data = read_dataset(tmp_path)
    assert [(record.text, record.source) for record in data.train] == [("A", "a.txt"), ("B", "deep/b.md")]
    assert data.notes == ("deep/empty.md is empty",)


@pytest.mark.parametrize("name", ["~$rows.jsonl", "~nobody/rows.jsonl", "~/rows.jsonl"])
def test_a_name_that_begins_with_a_tilde_is_a_name(name, tmp_path, monkeypatch):
    """Options have been filled in before, and a file of this very name goes before a home folder."""
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    write_lines(Path(name), {"text": "a"})
    assert len(read_dataset(name).train) == 1


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.txt", "valid.txt", "test.txt"], (["train.txt"], ["valid.txt"], ["test.txt"])),
        (["train/a.txt", "train/b.md", "dev/a.txt"], (["train/a.txt", "train/b.md"], ["dev/a.txt"], [])),
        (["ptb.train.txt", "ptb.valid.txt", "README.md"], (["ptb.train.txt"], ["ptb.valid.txt"], [])),
        (["train.md", "predict.md", "val.md"], (["predict.md", "train.md", "val.md"], [], [])),  # pages about commands
        (["test.txt", "valid.txt"], (["test.txt", "valid.txt"], [], [])),
    ],
)
def test_texts_have_splits_if_the_name_of_each_says_one(tmp_path, names, expected):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    data = read_dataset(tmp_path)
    assert tuple([record.source for record in split or ()] for split in (data.train, data.valid, data.test)) == expected


def test_a_folder_without_data_says_what_it_holds(tmp_path):
    with pytest.raises(DataError, match="holds no data: expected .* found nothing"):
        read_dataset(tmp_path)
    (tmp_path / "photo.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"found photo\.png"):
        read_dataset(tmp_path)


def test_problems_of_several_files_are_told_together(tmp_path):
    write_lines(tmp_path / "train.jsonl", {"a": 1})
    (tmp_path / "valid.jsonl").write_text("{")
    with pytest.raises(DataError) as caught:
        read_dataset(tmp_path)
    assert [problem.split()[0] for problem in caught.value.problems] == ["train.jsonl", "valid.jsonl"]


# --- split


def texts(count):
    return [Record(text=f"text {number}", source=f"line {number}") for number in range(count)]


def test_the_share_held_out_is_exact_and_the_order_is_kept():
    train, valid = split_rows(texts(100), 0.1, seed=0)
    assert (len(train), len(valid)) == (90, 10)
    assert sorted([*train, *valid], key=lambda record: int(record.text[5:])) == texts(100)
    assert list(train) == sorted(train, key=lambda record: int(record.text[5:]))


def test_a_side_depends_on_content_and_seed_but_not_on_the_order():
    _, valid = split_rows(texts(50), 0.2, seed=1)
    _, again = split_rows(texts(50)[::-1], 0.2, seed=1)
    _, other = split_rows(texts(50), 0.2, seed=2)
    assert set(valid) == set(again)
    assert set(valid) != set(other)


def test_equal_contents_land_on_one_side():
    rows = [Record(text=f"text {number % 20}", source=f"line {number}") for number in range(100)]
    train, valid = split_rows(rows, 0.3, seed=0)
    assert not {record.text for record in train} & {record.text for record in valid}
    assert len(valid) == 30


@pytest.mark.parametrize(
    ("count", "fraction", "held"), [(2, 0.01, 1), (2, 0.99, 1), (1, 0.5, 0), (9, 0.0, 0), (0, 0.5, 0)]
)
def test_at_least_one_row_is_held_out_and_one_is_left(count, fraction, held):
    train, valid = split_rows(texts(count), fraction, seed=0)
    assert (len(valid), len(train)) == (held, count - held)


def test_rows_that_are_all_the_same_cannot_be_split():
    train, valid = split_rows([Record(text="same", source=str(i)) for i in range(5)], 0.5, seed=0)
    assert (len(train), len(valid)) == (5, 0)


def test_a_content_that_fills_half_the_data_is_not_torn_apart():
    rows = [Record(text="same")] * 5 + [Record(text="a"), Record(text="b")]
    _, valid = split_rows(rows, 0.1, seed=0)
    assert [record.text for record in valid] in (["a"], ["b"])


def test_the_general_records_are_half_text_half_chat():
    records = general_records()
    assert len(records) == 30
    assert sum(record.text is not None for record in records) == 15
    assert all(len(record.messages) == 2 for record in records if record.messages)
    assert len({record.text or record.messages[0]["content"] for record in records}) == 30


def test_the_beginnings_that_the_base_goes_on_from_are_others_than_what_is_measured():
    records = beginning_records()
    assert len(records) == len({record.text or record.messages[0]["content"] for record in records}) == 64
    assert sum(record.text is not None for record in records) == 24
    measured = {record.text or record.messages[0]["content"] for record in general_records()}
    for record in records:
        begins = record.text or record.messages[0]["content"]
        assert not any(text.startswith(begins) for text in measured), begins


# --- rows that cannot be used


def test_one_row_in_ten_may_be_left_out_and_is_told(read):
    data = read(*[CHAT] * 9, {"messages": "none"})
    assert len(data.train) == 9
    (row,) = data.skipped.found
    assert (data.skipped.count, data.skipped.rows, row.source) == (1, 10, "train.jsonl line 10")
    assert row.problems[0].startswith('train.jsonl line 10: messages is "none"')


def test_more_than_one_row_in_ten_is_a_wrong_form(problems):
    found = problems(*[CHAT] * 8, {"messages": "none"})
    assert found[0].startswith("train.jsonl line 9: ")
    assert found[1].startswith("1 of 9 rows cannot be used: one in ten may be left out")


def test_strict_refuses_data_for_a_single_row(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", *[CHAT] * 99, {"messages": "none"})
    assert len(read_dataset(path).train) == 99
    with pytest.raises(DataError, match="line 100: messages is"):
        read_dataset(path, is_strict=True)


@pytest.mark.parametrize("bad", [b'{"text": ', b'{"text": "caf\xe9"}', b"\x00\x01", b"[" * 100_000])
def test_a_line_that_cannot_be_read_is_left_out_like_any_other_row(tmp_path, bad):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 20 + bad + b'\n{"text": "last"}\n')
    data = read_dataset(path)
    assert [record.text for record in data.train][-1] == "last"
    assert [row.source for row in data.skipped.found] == ["train.jsonl line 21"]


def test_a_csv_row_with_too_many_cells_is_left_out(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("prompt,completion\n" + "a,b\n" * 10 + "a,b,c\n" + "c,d\n")
    data = read_dataset(path)
    assert (len(data.train), data.skipped.found[0].source) == (11, "train.csv line 12")


# --- large and odd files


def test_a_line_of_a_hundred_megabytes_is_read(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "' + b"a" * 100_000_000 + b'"}\n')
    assert len(read_dataset(path).train[0].text) == 100_000_000


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MOST_LINE_BYTES", 1000)
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "b"}\n' + b" " * 10_000_000))
    with pytest.raises(DataError, match="line 2 is longer than 1,000 bytes"):
        read_dataset(path)


def test_a_kind_that_is_read_whole_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MOST_WHOLE_BYTES", 1000)
    path = tmp_path / "train.json"
    path.write_text("[\n" + '{"text": "a"},\n' * 100 + '{"text": "a"}]')
    with pytest.raises(DataError, match="larger than 1,000 bytes.*as .jsonl"):
        read_dataset(path)


def test_many_rows_take_little_memory(tmp_path):
    path = tmp_path / "train.jsonl.gz"
    row = json.dumps({"prompt": "x" * 2000, "completion": "y" * 2000}).encode() + b"\n"
    path.write_bytes(gzip.compress(row * 20_000, 1))
    tracemalloc.start()
    data = read_dataset(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data.train) == 20_000
    assert peak < 8_000_000  # of 80 MB of text


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match="is no regular file"):
        read_dataset(tmp_path / "train.jsonl")


def test_a_large_data_set_holds_out_no_more_than_can_be_measured():
    rows = [Record(text=f"row {number}") for number in range(30_000)]
    train, held = split_rows(rows, 0.1, 0)
    assert (len(train), len(held)) == (28_000, 2000)


def test_a_line_with_more_values_than_memory_has_room_for_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "MOST_VALUES", 1000)
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a, b"}\n' * 20 + '{"text": [' + "[]," * 2000 + "[]]}\n")
    data = read_dataset(path)
    assert len(data.train) == 20
    assert data.skipped.found[0].problems == (
        "train.jsonl line 21 holds more than 1,000 values: expected one example a line.",
    )


def test_a_quote_that_does_not_fit_is_told_with_its_line(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text('prompt,completion\n"a\nb",c\n"d"e,f\n')
    with pytest.raises(DataError, match=r"train\.csv line 4 is not valid CSV: .* \(line 4\)"):
        read_dataset(path)


def test_a_problem_that_differs_in_the_value_alone_is_told_once(tmp_path):
    lines = [json.dumps({"prompt": "p", "completion": number}) for number in range(30)]
    lines += [json.dumps({"prompt": [word], "completion": "c"}) for word in ("one", "two")]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        read_dataset(tmp_path / "mine.jsonl")
    first, second = caught.value.problems
    assert first.startswith("mine.jsonl line 1: completion is 0: ")
    assert "29 more rows" in first
    assert second.startswith('mine.jsonl line 31: prompt 1 is "one"')
    assert "1 more row," in second
