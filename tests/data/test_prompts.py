"""Rows that wait for an answer: every form of the examples, with an answer, an empty one or none."""

import gzip
import json
import re

import pytest

from thimble.data.given_rows import raw_rows
from thimble.data.prompts import keep_prompts, parse_prompt, read_prompts
from thimble.data.records import Skipped
from thimble.data.rows import parse_row
from thimble.errors import DataError

USER, SYSTEM = {"role": "user", "content": "Why?"}, {"role": "system", "content": "Be kind."}
REPLY = {"role": "assistant", "content": "So."}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]}
RESULT = {"role": "tool", "content": "seen"}


@pytest.mark.parametrize("answer", [None, "", "So."], ids=["none", "empty", "given"])
@pytest.mark.parametrize(
    ("row", "column", "messages"),
    [
        ({"prompt": "Why?"}, "completion", [USER]),
        ({"prompt": "Why?"}, "response", [USER]),
        ({"question": "Why?"}, "answer", [USER]),
        ({"instruction": "Why?"}, "output", [USER]),
        ({"instruction": "Why?", "input": "Here."}, "output", [{**USER, "content": "Why?\n\nHere."}]),
        ({"instruction": "Why?"}, "response", [USER]),
        ({"prompt": "Why?", "system": "Be kind."}, "completion", [SYSTEM, USER]),
        ({"prompt": [SYSTEM, USER]}, "completion", [SYSTEM, USER]),
        ({"prompt": json.dumps([SYSTEM, USER])}, "completion", [SYSTEM, USER]),
    ],
    ids=str,
)
def test_a_prompt_needs_no_answer_and_one_that_is_there_is_the_reference(row, column, messages, answer):
    record, reference = parse_prompt(row if answer is None else {**row, column: answer}, "here")
    assert (list(record.messages), reference) == (messages, answer or None)


@pytest.mark.parametrize(
    ("turns", "asked", "reference"),
    [
        ([USER], [USER], None),
        ([USER, REPLY], [USER], "So."),
        ([USER, {**REPLY, "content": ""}], [USER], None),
        ([USER, {**REPLY, "content": None}], [USER], None),
        ([SYSTEM, USER, REPLY, USER], [SYSTEM, USER, REPLY, USER], None),
        ([USER, REPLY, REPLY], [USER], "So."),
    ],
    ids=str,
)
def test_a_conversation_is_asked_up_to_its_last_answer(turns, asked, reference):
    for value in (turns, json.dumps(turns)):
        record, found = parse_prompt({"messages": value}, "here")
        assert (list(record.messages), found) == (asked, reference)
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    shared = [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]
    record, found = parse_prompt({"conversations": shared}, "here")
    assert (list(record.messages), found) == (asked, reference)


def test_a_list_of_messages_is_asked_up_to_its_last_answer():
    record, found = parse_prompt([SYSTEM, USER, REPLY], "here")
    assert (list(record.messages), found) == ([SYSTEM, USER], "So.")


def test_a_prompt_in_place_of_a_file_is_answered_with_how_to_ask_it():
    for text in ("Why is the sky blue?", "Say it. Now"):
        with pytest.raises(
            DataError, match=f"if it is a prompt, ask it with: thimble chat --prompt '{re.escape(text)}'"
        ):
            read_prompts(text, Skipped())
    with pytest.raises(DataError, match="my file.jsonl does not exist"):
        read_prompts("my file.jsonl", Skipped())


def test_texts_in_turn_are_asked_up_to_their_last_answer():
    texts = ["Why?", "So.", "Why?"]
    for count, asked, reference in ((2, [USER], "So."), (3, [USER, REPLY, USER], None)):
        record, found = parse_prompt({"conversations": texts[:count]}, "here")
        assert (list(record.messages), found) == (asked, reference)


def test_a_tool_result_can_be_what_is_answered():
    record, reference = parse_prompt({"messages": [USER, CALL, RESULT, REPLY]}, "here")
    assert ([turn["role"] for turn in record.messages], reference) == (["user", "assistant", "tool"], "So.")
    record, reference = parse_prompt({"messages": [USER, CALL]}, "here")
    assert [turn["role"] for turn in record.messages] == ["user"]
    assert json.loads(reference)[0]["function"]["name"] == "look"


@pytest.mark.parametrize("text", ["Why?", "pending", "[1, 2] sorted?", "[1, 2]"])
def test_a_bare_text_is_a_prompt(text):
    record, reference = parse_prompt(text, "here")
    assert (record.messages, record.prompt, reference) == (({"role": "user", "content": text},), text, None)


def test_the_prompt_of_a_training_row_is_what_was_trained_on():
    row = {"prompt": "Why?", "completion": "So.", "system": "Be kind."}
    record, reference = parse_prompt(row, "here")
    trained = parse_row(row, "here").record
    assert (*record.messages, {"role": "assistant", "content": reference}) == trained.messages


def test_plain_text_is_to_be_continued():
    record, reference = parse_prompt({"text": "Once upon"}, "here")
    assert (record.text, record.messages, reference) == ("Once upon", None, None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"ticket": "Help"}, "the columns are ticket: expected messages, prompt, question"),
        ({"completion": "So."}, "the columns are completion: expected"),
        ({}, "the columns are none"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": 5}, "prompt is 5: expected text"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "stone", "content": "x"}]}, 'role is "stone"'),
        ({"messages": [SYSTEM]}, "nothing to answer: expected a message of the role user"),
        ({"messages": [REPLY]}, "nothing to answer"),
        (7, "the row is 7: expected a text"),
    ],
    ids=str,
)
def test_what_is_no_prompt_is_refused_with_what_is_expected(row, message):
    with pytest.raises(DataError, match=message):
        parse_prompt(row, "here")


def test_rows_keep_their_number_their_place_and_their_columns(tmp_path):
    path = tmp_path / "tickets.csv"
    path.write_text("id,prompt,answer,queue\n7,Why?,So.,north\n8,,,\n9,How?,,south\n")
    skipped = Skipped()
    prompts, _ = read_prompts(path, skipped)
    assert [prompt.row for prompt in prompts] == [1, 2, 3]
    assert [prompt.source for prompt in prompts] == [f"tickets.csv line {n}" for n in (2, 3, 4)]
    assert [prompt.reference for prompt in prompts] == ["So.", None, None]
    assert prompts[0].columns == {"id": "7", "prompt": "Why?", "answer": "So.", "queue": "north"}
    assert prompts[0].unread == {"id": "7", "queue": "north"}
    assert (prompts[1].record, "the columns are id" in prompts[1].problem) == (None, True)
    assert (skipped.rows, skipped.count) == (3, 1)


def test_a_text_file_holds_a_prompt_on_each_line_and_other_kinds_are_read_as_for_training(tmp_path):
    (tmp_path / "some.txt.gz").write_bytes(gzip.compress("\ufeffWhy?\r\n\n  How? \n".encode()))
    lines = list(read_prompts(tmp_path / "some.txt.gz", Skipped())[0])
    assert [prompt.asked for prompt in lines] == [{"prompt": "Why?"}, {"prompt": "  How? "}]
    assert [prompt.source for prompt in lines] == ["some.txt.gz line 1", "some.txt.gz line 3"]
    (tmp_path / "one.md").write_text("# Why?\n\nTell me.")
    assert [prompt.asked for prompt in read_prompts(tmp_path / "one.md", Skipped())[0]] == [
        {"prompt": "# Why?\n\nTell me."}
    ]
    (tmp_path / "rows.json").write_text('["Why?", {"question": "How?"}]')
    assert len(read_prompts(tmp_path / "rows.json", Skipped())[0]) == 2


def test_of_a_folder_the_test_file_is_answered(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name}) + "\n")
    assert [prompt.asked for prompt in read_prompts(tmp_path, Skipped())[0]] == [{"prompt": "test"}]


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_prompts_is_refused(tmp_path, content):
    (tmp_path / "none.txt").write_text(content)
    with pytest.raises(DataError, match=r"none.txt holds no prompts"):
        read_prompts(tmp_path / "none.txt", Skipped())


def test_a_prompt_shows_what_is_asked_under_the_name_of_its_form():
    rows = ["Why?", {"messages": [SYSTEM, USER, REPLY]}, {"text": "Once"}, {"instruction": "Why?", "input": "Here."}, 5]
    asked = [prompt.asked for prompt in keep_prompts(raw_rows(rows), Skipped(), "rows")]
    assert asked == [
        {"prompt": "Why?"}, {"messages": [SYSTEM, USER]}, {"text": "Once"}, {"prompt": "Why?\n\nHere."},
        {"prompt": None},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        {"dialog": [USER, REPLY]}, {"conversation": [USER, REPLY]}, {"Turns": json.dumps([USER, REPLY])},
        {"user": "Why?", "assistant": "So."}, {"human": "Why?", "gpt": "So."}, {"question": "Why?", "answers": ["So."]},
        {"question": "Why?", "answers": {"text": ["So.", "So."], "answer_start": [1, 2]}},
        {"prompt": "Why?", "completion": [USER, REPLY]},
    ],
    ids=str,
)  # fmt: skip
def test_every_row_that_trains_can_be_asked_and_its_reference_is_what_was_learned(row):
    learned = parse_row(row, "here").record.messages
    record, reference = parse_prompt(row, "here")
    assert (*record.messages, {"role": "assistant", "content": reference}) == learned


def test_who_wrote_a_text_is_not_what_is_asked():
    row = {"text": "Once upon", "user": "bob"}
    assert parse_prompt(row, "here")[0].text == "Once upon"
    prompt = next(iter(keep_prompts(raw_rows([{"prompt": "Why?", "user": "bob"}]), Skipped(), "rows")))
    assert (prompt.asked, prompt.unread) == ({"prompt": "Why?"}, {"user": "bob"})


class NAType:
    """As that of pandas: nothing can be said of it, not even whether it is something else."""

    __hash__ = None

    def __eq__(self, other):
        return self

    def __bool__(self):
        raise TypeError("boolean value of NA is ambiguous")


def test_a_cell_in_which_a_table_has_nothing_is_no_answer():
    for missing in (NAType(), float("nan"), None):
        record, reference = parse_prompt({"prompt": "Why?", "answer": missing}, "here")
        assert (list(record.messages), reference) == ([USER], None)


class Frame:
    """As those of polars: what is iterated over are columns."""

    columns = ("prompt",)

    def to_dicts(self):
        return [{"prompt": "Why?"}]

    def __iter__(self):
        return iter([["Why?"]])


def test_prompts_may_be_any_table_that_training_takes():
    assert [row.value for row in raw_rows(Frame())] == [{"prompt": "Why?"}]
    with pytest.raises(DataError, match="of type int"):
        raw_rows(7)


def test_an_answer_that_is_a_number_is_a_reference_too():
    assert [parse_prompt({"prompt": "2 - 2?", "answer": answer}, "here")[1] for answer in (0, 1.5)] == ["0", "1.5"]


@pytest.mark.parametrize(
    "turns",
    [[{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Hi"}], [{"from": "Oslo", "to": "Rome"}]],
)
def test_json_in_a_prompt_is_asked_as_it_is_learned(turns):
    row = {"prompt": json.dumps(turns), "completion": "b"}
    record, reference = parse_prompt(row, "")
    assert record.messages == parse_row(row, "").record.messages[:-1]
    assert reference == "b"
