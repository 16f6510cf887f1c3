"""The forms of rows: what stands in the prompt, what is learned, and that nothing of a row is lost without a word."""

import itertools
import json
import math

import pytest

from thimble.data.columns import NamedColumns
from thimble.data.row_messages import CALL, CONTENTS, MARKS, MEDIA, PARTIAL_MARKS, ROLES, THOUGHTS
from thimble.data.rows import RowReader, parse_row
from thimble.errors import DataError

ASK, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALLED = {"name": "f", "arguments": {"a": 1}}


def said(row, **named):
    """Roles and texts of a row, one pair a message."""
    record = RowReader(NamedColumns(**named)).parse(row, "").record
    return [(message["role"], message["content"]) for message in record.messages]


def problem(row, **named):
    with pytest.raises(DataError) as caught:
        RowReader(NamedColumns(**named)).parse(row, "")
    return "\n".join(caught.value.problems)


# --- columns beside prompt and completion


@pytest.mark.parametrize("context", ["context", "input", "document", "passage", "Context ", "CONTEXTS"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("instruction", "response"), ("question", "answer"), ("prompt", "completion"), ("instruction", "output"),
     ("query", "response"), ("question", "answers")],
)  # fmt: skip
def test_what_a_question_is_about_stands_below_it(prompt, completion, context):
    parsed = parse_row({prompt: "When?", context: "In 1850 they built it.", completion: "1850", "id": 3}, "")
    assert [message["content"] for message in parsed.record.messages] == ["When?\n\nIn 1850 they built it.", "1850"]
    assert parsed.left.filled == ["id"]
    if completion != "output":
        assert (parsed.record.prompt, parsed.record.completion) == ("When?\n\nIn 1850 they built it.", "1850")


@pytest.mark.parametrize("empty", ["", " ", None, [], math.nan])
def test_an_empty_column_changes_nothing(empty):
    parsed = parse_row({"instruction": "When?", "context": empty, "response": "1850", "system": empty}, "")
    assert [message["content"] for message in parsed.record.messages] == ["When?", "1850"]
    assert parsed.form == "instruction and response"
    assert (parsed.left.filled, parsed.left.empty) == ([], [])


FORMS = {
    "several contexts": ({"question": "q", "documents": ["d1", "d2"], "answer": "a"}, [("user", "q\n\nd1\n\nd2")]),
    "answers of SQuAD": (
        {"context": "c", "question": "q", "answers": {"text": ["a", "a"], "answer_start": [3, 4]}},
        [("user", "q\n\nc")],
    ),
    "answers as a list": ({"question": "q", "answers": ["a", "b"]}, [("user", "q")]),
    "answers as JSON in a cell": ({"question": "q", "answers": '{"text": ["a"]}'}, [("user", "q")]),
    "one answer as a list": ({"question": "q", "answer": ["a"]}, [("user", "q")]),
    "the answer of TriviaQA": ({"question": "q", "answer": {"value": "a", "aliases": ["A"]}}, [("user", "q")]),
    "a system column": ({"system_prompt": "s", "question": "q", "response": "a"}, [("system", "s"), ("user", "q")]),
    "a system column that the messages repeat": (
        {"system": "s", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
         {"role": "assistant", "content": "a"}]}, [("system", "s"), ("user", "q")],
    ),
    "history of pairs": (
        {"query": "q", "response": "a", "history": [["u", "v"]]}, [("user", "u"), ("assistant", "v"), ("user", "q")],
    ),
    "history of messages": (
        {"question": "q", "answer": "a", "history": [{"role": "user", "content": "u"}, {"from": "gpt", "value": "v"}]},
        [("user", "u"), ("assistant", "v"), ("user", "q")],
    ),
    "history as JSON in a cell": (
        {"prompt": "q", "completion": "a", "history": '[["u", "v"]]'},
        [("user", "u"), ("assistant", "v"), ("user", "q")],
    ),
    "history of objects with roles": (
        {"input": "q", "output": "a", "history": [{"human": "u", "assistant": "v"}]},
        [("user", "u"), ("assistant", "v"), ("user", "q")],
    ),
    "turns of objects with roles": ({"conversation": [{"human": "q", "assistant": "a"}]}, [("user", "q")]),
    "other names of the column": ({"dialogue": [ASK | {"content": "q"}, ANSWER | {"content": "a"}]}, [("user", "q")]),
    "names in other spellings": ({"PROMPT ": "q", "Completion": "a"}, [("user", "q")]),
    "messages in other spellings": ({"Messages": [{"Role": "User", "Content": "q"}, {"Role": "AI", "Content": "a"}]},
                                    [("user", "q")]),
    "input and output": ({"input": "q", "output": "a"}, [("user", "q")]),
    "messages and a text": ({"prompt": [ASK | {"content": "q"}], "completion": "a"}, [("user", "q")]),
    "a text and messages": ({"prompt": "q", "completion": [ANSWER | {"content": "a"}]}, [("user", "q")]),
    "a form of which others are empty": ({"messages": None, "text": "", "input": "q", "output": "a"}, [("user", "q")]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_read(name):
    row, prompt = FORMS[name]
    assert said(row) == [*prompt, ("assistant", "a")]


def test_several_answers_are_told_if_they_differ():
    assert parse_row({"question": "q", "answers": ["a", "a"]}, "").left.filled == []
    assert parse_row({"question": "q", "answers": ["a", "b"]}, "").left.filled == ["answers behind the first"]
    assert parse_row({"question": "q", "answer": {"value": "a", "aliases": ["A"]}}, "").left.filled == [
        "answer.aliases"
    ]


@pytest.mark.parametrize("extra", [{"system": "s"}, {"history": [["a", "b"]]}, {"tools": [{"name": "f"}]}], ids=str)
def test_what_a_base_without_template_cannot_be_told_is_not_dropped(extra):
    record = parse_row({"prompt": "q", "completion": "a", **extra}, "").record
    assert (record.prompt, record.completion) == (None, None)


# --- rows that are made for something else


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "add --prompt-column prompt --completion-column chosen"),
        ({"chosen": [ASK, ANSWER], "rejected": [ASK, ANSWER]}, "from preferences: keep the chosen one"),
        ({"prompt": "a", "completion": "b", "label": True}, "label is True beside an answer: Thimble learns"),
        ({"question": "a", "answer": "b", "Label": "0"}, "Label is '0' beside an answer"),
        ({"messages": [ASK, ANSWER], "label": False}, "label is False beside an answer"),
        ({"query": "a", "answers": '[{"name": "f", "arguments": {}}]'}, "stands from columns that are named: add"),
        ({"messages": [ASK, ANSWER], "kto_tag": False}, "kto_tag is False beside an answer"),
        ({"text": "a", "label": 1}, "add --prompt-column text --completion-column label; to learn the text alone, add "
         "--text-column text"),
        ({"Text": "a", "label": 1, "label text": "good"}, "--prompt-column Text --completion-column 'label text'"),
        ({"input_ids": [1], "labels": [1]}, "the row is tokens already (input_ids)"),
        ({"messages": [ASK, ANSWER], "images": ["a.png"]}, "the row has images: images, sound and files"),
        ({"question": "a", "answer": "b", "Audio": {"path": "a.wav"}}, "the row has Audio: images, sound"),
        ({"trajectory": [ASK, ANSWER]}, "trajectory holds messages; call that column messages"),
        ({"turns": ["a", "b"]}, "turns is a list: expected messages in it, each with role and content"),
        ({"question": "q", "answers": {"text": [], "answer_start": []}}, "answers is empty: expected a text"),
        ({"question": "q", "context": {"title": ["t"]}, "answer": "a"}, "context is an object with title: expected"),
        ({"prompt": "a", "completion": 3}, "add --prompt-column prompt --completion-column completion"),
        ({"Prompt": "a", "prompt": "b", "completion": "c"}, "Prompt, prompt are one name in two spellings: leave one"),
        ({"messages": [{"role": "system", "content": "x"}, ASK, ANSWER], "system": "y"}, "are two system texts"),
        ({"messages": [ANSWER, ASK]}, "the assistant opens the conversation, and nobody asks for what it says"),
        ({"messages": [ANSWER]}, "the assistant opens the conversation, and nobody asks for what it says"),
        ({"messages": [ASK, ANSWER | {"weight": 0}]}, "every answer is marked as not learned"),
    ],
    ids=str,
)  # fmt: skip
def test_a_row_for_something_else_is_refused_by_name(row, message):
    assert message in problem(row)


# --- nothing is lost

CELLS = {"messages": [ASK, ANSWER], "conversations": [ASK, ANSWER | {"content": "Ho"}], "history": [["a", "b"]],
         "tools": [CALLED], "functions": [CALLED | {"name": "g"}], "answers": ["one", "two"], "images": ["a.png"],
         "input_ids": [1, 2]}  # fmt: skip
FORMING = "messages conversations prompt completion question answer answers instruction input output text".split()
BESIDE = "context system system_prompt history tools functions label chosen rejected weight topic images Prompt".split()


def lost(row, read):
    """Fields of a row that are not told, and without which the same is read; none if the row is refused."""
    try:
        parsed = read(row)
    except DataError:
        return []
    return [name for name in row if name not in parsed.left.filled and is_same(row, name, read, parsed.record)]


def is_same(row, name, read, record):
    try:
        return read({key: value for key, value in row.items() if key != name}).record == record
    except DataError:
        return False


def test_every_filled_column_is_used_or_told_or_the_row_is_refused():
    sets = [names for count in (1, 2, 3) for names in itertools.combinations(FORMING, count)]
    sets += [(*names, other) for names in itertools.combinations(FORMING, 2) for other in (*BESIDE, "input_ids")]
    sets += [(*names, *others) for names in (FORMING[:1], FORMING[2:4]) for others in itertools.combinations(BESIDE, 2)]
    rows = [{name: CELLS.get(name, f"the {name}") for name in names} for names in sets]
    found = {str(row): lost(row, lambda columns: parse_row(columns, "")) for row in rows}
    assert {row: names for row, names in found.items() if names} == {}
    assert sum(is_read(row) for row in rows) > 300  # rows that are all refused would prove nothing


def is_read(row):
    try:
        return bool(parse_row(row, ""))
    except DataError:
        return False


VALUES = ("word", 1, True, [{"type": "text", "text": "part"}], [CALLED], {"name": "g", "arguments": "{}"})
KEYS = {
    **dict.fromkeys(CONTENTS[1:], "other"), **dict.fromkeys(MARKS, 0), **dict.fromkeys(PARTIAL_MARKS, [{"train": 1}]),
    **dict.fromkeys(THOUGHTS, "hm"), **dict.fromkeys(MEDIA[::2], "a.png"), "name": "Ann", "tool_call_id": "c1",
    "tool_calls": [CALLED], "function_call": VALUES[-1], "refusal": "no", "emoji": "x", "from": "gpt", "prefix": True,
}  # fmt: skip


@pytest.mark.parametrize("role", sorted(set(ROLES.values()) - {CALL}))
def test_every_filled_key_of_a_message_is_used_or_told_or_the_row_is_refused(role):
    def read(message):
        return parse_row({"messages": [ASK, ANSWER, ASK, message, ASK, ANSWER]}, "")

    more = [{key: value} for key in KEYS for value in VALUES]
    more += [{one: KEYS[one], two: KEYS[two]} for one, two in itertools.combinations(KEYS, 2)]
    found = {}
    for extra in more:
        names = lost({"role": role, "content": "text", **extra}, lambda message: _with_keys(read(message)))
        allowed = {"role"} if "from" in extra else set()  # said twice
        found |= {str(extra): names} if set(names) - set(MARKS) - allowed else {}
    assert found == {}


def _with_keys(parsed):
    """What is left of the messages, by the names of their keys alone."""
    parsed.left.filled[:] = [name.removeprefix("messages.") for name in parsed.left.filled]
    return parsed


@pytest.mark.parametrize(
    ("message", "left"),
    [
        ({"emoji": "x"}, ["messages.emoji"]),
        ({"content": [{"type": "text", "text": "a", "cache_control": 1}]}, ["messages.content.cache_control"]),
        ({"tool_calls": [{"function": CALLED, "index": 0, "state": "x"}]}, ["tool_calls.index", "tool_calls.state"]),
        ({"tool_calls": [{"function": CALLED | {"strict": True}}]}, ["tool_calls.function.strict"]),
        ({"emoji": None, "audio": None, "tool_calls": None, "function_call": {"name": None, "arguments": None}}, []),
    ],
    ids=str,
)  # fmt: skip
def test_what_stands_deeper_is_told_too(message, left):
    row = {"messages": [ASK, ANSWER | message], "tools": [{"function": CALLED, "type": "function"}]}
    assert parse_row(row, "").left.filled == left


@pytest.mark.parametrize("column", ["conversations", "messages"])
def test_texts_in_turn_are_a_conversation_that_the_user_begins(column):
    """As in LIMA."""
    row = {column: ["Hi", "Hello", "Who?"], "source": "x"}
    assert said(row) == [("user", "Hi"), ("assistant", "Hello"), ("user", "Who?")]
    assert parse_row(row, "").form == "texts in turn, the user's first"
    assert said({column: json.dumps(["Hi", "Hello"])}) == [("user", "Hi"), ("assistant", "Hello")]


def test_one_message_is_an_answer():
    for row in (
        {"input": [ASK], "output": ANSWER},
        {"input": "Hi", "output": {"from": "gpt", "value": "Hello"}},
        {"prompt": ASK, "completion": "Hello"},
    ):
        assert said(row) == [("user", "Hi"), ("assistant", "Hello")]
    named = said({"prompt": "Hi", "chosen": ANSWER}, prompt="prompt", completion="chosen")
    assert named == [("user", "Hi"), ("assistant", "Hello")]


def test_the_first_of_several_targets_is_learned():
    parsed = parse_row({"inputs": "q", "targets": ["a", "b"]}, "")
    assert parsed.record.completion == "a"
    assert parsed.left.filled == ["targets behind the first"]


@pytest.mark.parametrize("column", ["output", "response", "completion"])
def test_several_texts_as_an_answer_are_no_conversation(column):
    parsed = parse_row({"instruction": "q", column: ["a", "b"]}, "")
    assert [(turn["role"], turn["content"]) for turn in parsed.record.messages] == [("user", "q"), ("assistant", "a")]
    assert parsed.left.filled == [f"{column} behind the first"]
    assert said({"instruction": "q", column: ["a"]}) == [("user", "q"), ("assistant", "a")]
    assert said({"instruction": "q", column: [json.dumps(ANSWER)]}) == [("user", "q"), ("assistant", "Hello")]


def test_texts_in_turn_that_end_with_an_answer_are_no_prompt():
    assert said({"prompt": ["Hi", "Hello", "Who?"], "completion": "Me."})[-2:] == [
        ("user", "Who?"),
        ("assistant", "Me."),
    ]
    assert "prompt is a list of 2 texts: expected a text, or messages" in problem(
        {"prompt": ["a", "b"], "completion": "c"}
    )


@pytest.mark.parametrize("named", [{}, {"prompt": "prompt", "completion": "completion"}])
def test_messages_of_a_prompt_may_be_json_in_a_text(named):
    """As cells of CSV hold them."""
    prompt = json.dumps([{"role": "system", "content": "Be brief."}, ASK])
    expected = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")]
    for completion in ("Hello", json.dumps([ANSWER])):
        assert said({"prompt": prompt, "completion": completion}, **named) == expected


@pytest.mark.parametrize(
    "prompt", ['[{"from": "Oslo", "to": "Rome"}]', json.dumps([ASK, ANSWER]), '[{"role": "user"}]']
)
def test_json_that_asks_nothing_is_text(prompt):
    assert said({"prompt": prompt, "completion": json.dumps([ANSWER])}) == [
        ("user", prompt),
        ("assistant", json.dumps([ANSWER])),
    ]


def test_what_a_question_is_about_stands_in_the_advice_too():
    told = problem({"question": "Is it?", "passage": "It is.", "answer": True})
    assert r"--prompt-template '{question}\n\n{passage}' --completion-column answer" in told


@pytest.mark.parametrize("label", [["a", "b"], [[0, 4, "LOC"]], {"a": 1}])
def test_labels_that_are_no_single_one_are_refused_with_what_helps(label):
    told = problem({"text": "Oslo", "label": label})
    assert "expected one label a row" in told
    assert told.count("--text-column text") == 1


def test_an_answer_that_is_an_object_is_refused_with_how_to_write_it():
    told = problem({"instruction": "Extract.", "input": "Oslo", "output": {"city": "Oslo", "days": None}})
    assert "output is an object with city" in told
    assert told.endswith("expected text; an answer in JSON is text too: write it with json.dumps")


# --- rows that are messages, or hold them deeper


def test_a_list_of_messages_is_a_conversation():
    assert said([ASK, ANSWER]) == [("user", "Hi"), ("assistant", "Hello")]
    assert parse_row([ASK, ANSWER], "").form == "messages"


@pytest.mark.parametrize("message", [ASK, {"from": "human", "value": "Hi"}, {"role": "user", "content": "Hi", "id": 3}])
def test_a_row_that_is_one_message_is_refused_without_the_advice_to_learn_its_role(message):
    told = problem(message)
    assert "one message" in told
    assert '{"messages": [' in told
    assert "--prompt-column" not in told


def test_messages_inside_of_another_column_are_pointed_at():
    told = problem({"custom_id": "1", "method": "POST", "body": {"model": "m", "messages": [ASK, ANSWER]}})
    assert told.endswith("body.messages holds messages; write them into a column messages of the row itself")


@pytest.mark.parametrize("chosen", ["Hello", ANSWER, [ANSWER]])
def test_a_conversation_that_ends_in_a_chosen_and_a_rejected_answer_says_where_its_answer_is(chosen):
    told = problem({"conversations": [ASK], "chosen": chosen, "rejected": "No"})
    assert "chosen holds the answer" in told
    assert "put it behind the messages" in told


@pytest.mark.parametrize(("name", "nothing"), [("history", "[]"), ("tools", "[]"), ("tools", "null"), ("system", "")])
def test_nothing_may_be_written_as_text(name, nothing):
    """As in the cells of a CSV, and in columns that were written with json.dumps."""
    row = {"instruction": "Name a colour.", "output": "Red"}
    assert parse_row({**row, name: nothing}, "").record == parse_row(row, "").record
