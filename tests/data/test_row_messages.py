"""Messages in the words of many tools: roles, marks, parts, calls, thoughts."""

import json

import pytest

from thimble.data.row_messages import MARKS
from thimble.data.rows import parse_row
from thimble.errors import DataError

ASK, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def read(*messages, **row):
    return parse_row({"messages": list(messages), **row}, "").record.messages


def problem(*messages):
    with pytest.raises(DataError) as caught:
        read(*messages)
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize(
    ("given", "role"),
    [
        *[(name, "user") for name in ("user", "human", "USER", "prompter")],
        *[(name, "assistant") for name in ("assistant", "gpt", "model", "bot", "ai", "chatgpt", "bing", "bard", "AI")],
        *[
            (name, "tool")
            for name in (
                "environment",
                "tool",
                "function",
                "ipython",
                "observation",
                "tool_response",
                "function_response",
            )
        ],
        *[(name, "system") for name in ("system", "developer", "System")],
    ],
)
@pytest.mark.parametrize(("key", "text"), [("role", "content"), ("from", "value"), ("role", "value"), ("from", "text")])
def test_a_role_has_many_names(given, role, key, text):
    first = {key: given, text: "said"}
    before = [ASK] if role == "assistant" else []
    assert read(*before, first, ASK, ANSWER)[len(before)] == {"role": role, "content": "said"}


@pytest.mark.parametrize("role", ["function_call", "tool_call"])
@pytest.mark.parametrize("call", ['{"name": "f", "arguments": {"a": 1}}', '[{"name": "f", "parameters": {"a": 1}}]'])
def test_a_call_may_be_a_message_of_its_own(role, call):
    called, result = {"from": role, "value": call}, {"from": "observation", "value": "3"}
    message = read(ASK, called, result, ANSWER)[1]
    function = {"name": "f", "arguments": {"a": 1}}
    assert message == {"role": "assistant", "tool_calls": [{"type": "function", "function": function}], "content": None}


# --- what is not learned

YES = (True, 1, 1.0, "true", "1", "True", "yes")
NO = (False, 0, 0.0, "false", "0", "False", "no")


@pytest.mark.parametrize("key", [*MARKS, "loss_mask", "Train", "loss-weight"])
def test_a_mark_says_whether_a_message_is_learned(key):
    learns = MARKS.get(key, True)
    for value in (*YES, *NO):
        marked = read(ASK, ANSWER | {key: value}, ASK, ANSWER)[1]
        assert marked == ANSWER | {"weight": int((value in YES) == learns)}, value
    assert read(ASK, ANSWER | {key: None})[1] == ANSWER
    assert read(ASK | {key: not learns}, ANSWER)[0] == ASK  # which is so anyway


@pytest.mark.parametrize("value", [0.5, 2, -1, "some", "0.5", [0, 1], {"a": 1}, float("inf")])
def test_a_mark_that_is_neither_yes_nor_no_is_refused(value):
    assert "messages 2 weight is " in problem(ASK, ANSWER | {"weight": value})
    assert "expected 0 or 1, true or false" in problem(ASK, ANSWER | {"weight": value})


@pytest.mark.parametrize("role", ["user", "system", "tool"])
@pytest.mark.parametrize("mark", [{"train": True}, {"weight": 1}, {"masked": False}], ids=str)
def test_what_is_not_of_the_assistant_cannot_be_learned(role, mark):
    (key,) = mark
    found = problem({"role": role, "content": "x", **mark}, ASK, ANSWER)
    assert f"messages 1 is marked as learned by {key}, but only assistant messages are" in found


def test_marks_that_contradict_one_another_are_refused():
    assert "as learned by weight and as not learned by loss" in problem(ASK, ANSWER | {"weight": 1, "loss": False})
    assert read(ASK, ANSWER | {"weight": 1, "masked": False})[1]["weight"] == 1


@pytest.mark.parametrize("key", ["train_detail", "training_detail"])
def test_a_part_of_a_message_cannot_be_learned(key):
    detail = [{"begin_offset": 0, "end_offset": 3, "train": False}]
    assert f"messages 2 has {key}: a message is learned as a whole" in problem(ASK, ANSWER | {key: detail})


def test_a_prompt_of_messages_is_not_learned_unless_it_is_marked():
    marked = [ASK, ANSWER | {"train": True}, ASK, ANSWER, ASK]
    messages = parse_row({"prompt": marked, "completion": [ANSWER]}, "").record.messages
    assert [message.get("weight") for message in messages] == [None, 1, None, 0, None, None]


# --- what a message says


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_are_handed_on_under_the_name_that_templates_read(key):
    message = read(ASK, ANSWER | {key: "Hm."})[1]
    assert (message["reasoning_content"], message[key]) == ("Hm.", "Hm.")


def test_a_refusal_is_what_the_assistant_says():
    assert read(ASK, {"role": "assistant", "content": None, "refusal": "No."})[1] == ANSWER | {"content": "No."}


@pytest.mark.parametrize(
    "part", [{"type": "text", "text": "a"}, {"type": "input_text", "text": "a"}, {"text": "a"}], ids=str
)
def test_parts_of_text_are_joined_whatever_their_name(part):
    assert read({"role": "user", "content": [part, part]}, ANSWER)[0]["content"] == "aa"


@pytest.mark.parametrize("key", ["image", "images", "audio", "video", "files"])
def test_what_is_no_text_is_refused_by_name(key):
    assert f"messages 1 has {key}: images, sound and files cannot be learned" in problem(ASK | {key: ["x"]}, ANSWER)


@pytest.mark.parametrize(
    "tool", [{"type": "function", "name": "f", "parameters": {}}, '{"name": "f", "parameters": {}}'], ids=str
)
def test_a_definition_may_be_flat_or_text(tool):
    tools = parse_row({"messages": [ASK, ANSWER], "tools": [tool]}, "").record.tools
    assert tools == ({"type": "function", "function": {"name": "f", "parameters": {}}},)


def test_messages_that_are_stored_column_by_column_are_messages():
    """As `to_json` of datasets writes a sequence of objects."""
    for keys in (("role", "content"), ("from", "value")):
        columns = dict(zip(keys, (["user", "assistant"], ["Hi", "Hello"]), strict=True))
        assert parse_row({"messages": columns}, "").record.messages == (ASK, ANSWER)
    with pytest.raises(DataError, match="messages is an object with role, content: expected a list of messages"):
        parse_row({"messages": {"role": ["user"], "content": ["a", "b"]}}, "")


# --- content in blocks

USE = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "rain"}
CALL = {"type": "function", "id": "toolu_1", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def text(said):
    return {"type": "text", "text": said}


def test_blocks_of_calls_and_results_are_calls_and_results():
    calling = {"role": "assistant", "content": [text("One moment."), USE]}
    answered = {"role": "user", "content": [RESULT, text("And in Bergen?")]}
    assert read(ASK, calling, answered, ANSWER) == (
        ASK,
        {"role": "assistant", "tool_calls": [CALL], "content": "One moment."},
        {"role": "tool", "content": "rain", "tool_call_id": "toolu_1"},
        {"role": "user", "content": "And in Bergen?"},
        ANSWER,
    )
    alone = read(
        ASK, {"role": "assistant", "content": [USE], "weight": 0}, {"role": "user", "content": [RESULT]}, ANSWER
    )
    assert alone[1] == {"role": "assistant", "tool_calls": [CALL], "content": None, "weight": 0}
    assert [turn["role"] for turn in alone] == ["user", "assistant", "tool", "assistant"]


def test_a_result_may_be_of_parts_and_an_error_is_told():
    result = {**RESULT, "content": [text("ra"), text("in")], "is_error": True, "cache_control": {"type": "ephemeral"}}
    row = {"messages": [ASK, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [result]}, ANSWER]}
    parsed = parse_row(row, "")
    assert parsed.record.messages[2]["content"] == "rain"
    assert parsed.left.filled == ["messages.is_error", "messages.cache_control"]


def test_blocks_of_thoughts_are_thoughts():
    said = {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": "x"}, text("Yes")]}
    message = read(ASK, said)[1]
    assert message == {"role": "assistant", "content": "Yes", "thinking": "Hm.", "reasoning_content": "Hm."}


def test_thoughts_may_be_parts_of_text_as_mistral_writes_them():
    thought = {"type": "thinking", "thinking": [text("First "), text("this.")], "closed": True}
    row = {"messages": [ASK, {"role": "assistant", "content": [thought, thought, text("Yes")]}]}
    parsed = parse_row(row, "")
    assert parsed.record.messages[1]["reasoning_content"] == "First this.\n\nFirst this."
    assert parsed.left.filled == []


@pytest.mark.parametrize("thought", [{"a": 1}, [{"type": "image"}], 3])
def test_thoughts_that_are_no_text_are_refused(thought):
    said = problem(ASK, {"role": "assistant", "content": [{"type": "thinking", "thinking": thought}, text("Yes")]})
    assert "messages 2 thinking is " in said
    assert "expected text" in said


def test_tools_as_python_prints_them_are_told_from_json():
    row = {"messages": [ASK, ANSWER], "tools": "[{'name': 'f', 'parameters': {}}]"}
    with pytest.raises(DataError, match="as Python prints it, which is no JSON: write the column with json.dumps"):
        parse_row(row, "")


def test_a_block_that_lacks_what_it_should_hold_is_no_fault():
    empty = {"type": "thinking"}
    assert read(ASK, {"role": "assistant", "content": [empty, empty, text("Yes")]})[1]["content"] == "Yes"
    assert "expected an object with name and arguments" in problem(
        ASK, {"role": "assistant", "content": [{"type": "tool_use"}]}
    )


def test_what_no_block_may_be_is_refused_by_its_type_without_a_word_of_pictures():
    said = problem(ASK, {"role": "assistant", "content": [{"type": "server_tool_use", "name": "f"}]})
    assert "part 1 is of type server_tool_use: expected parts of type text, tool_use, tool_result, thinking" in said
    assert "images" not in said
    assert "images" in problem({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER)


def test_a_schema_of_inputs_is_that_of_parameters():
    for key in ("input_schema", "inputSchema"):
        tool = {"name": "weather", "description": "Weather", key: {"type": "object"}}
        function = {"name": "weather", "description": "Weather", "parameters": {"type": "object"}}
        assert parse_row({"messages": [ASK, ANSWER], "tools": [tool]}, "").record.tools == (
            {"type": "function", "function": function},
        )


def test_a_system_text_may_come_in_parts():
    for key, value in (
        ("system", [text("Be "), text("brief.")]),
        ("systemInstruction", {"role": "system", "parts": [{"text": "Be "}, {"text": "brief."}]}),
    ):
        assert read(ASK, ANSWER, **{key: value})[0] == {"role": "system", "content": "Be brief."}


def test_messages_of_gemini_are_messages():
    row = {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}, {"role": "model", "parts": [{"text": "Hello"}]}]}
    assert parse_row(row, "").record.messages == (ASK, ANSWER)


# --- tools in a message

TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": {}}}


@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tools_that_a_system_message_defines_are_those_of_the_row(key):
    for given in ([TOOL], [TOOL["function"]], json.dumps([TOOL])):
        row = {"messages": [{"role": "system", "content": "Be brief.", key: given}, ASK, ANSWER]}
        parsed = parse_row(row, "")
        assert parsed.record.tools == (TOOL,)
        assert parsed.record.messages[0] == {"role": "system", "content": "Be brief."}
        assert parsed.form == "messages with tools"
        assert not parsed.left.filled
        assert parse_row(row | {"tools": [TOOL]}, "").record.tools == (TOOL,)


def test_tools_in_a_column_and_others_in_a_message_are_refused():
    row = {"messages": [{"role": "system", "content": "", "tools": [TOOL]}, ASK, ANSWER]}
    other = {"type": "function", "function": {**TOOL["function"], "name": "other"}}
    with pytest.raises(DataError, match="tools are defined differently in two places of the row"):
        parse_row(row | {"tools": [other]}, "")


@pytest.mark.parametrize("half", [{"a": "\ud83d"}, {"\ud83d": 1}, '{"a": "\\ud83d"}'])
def test_half_of_a_character_in_a_call_is_refused_in_its_row(half):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": half}}]}
    assert "messages 2 tool_calls 1 has half of a character" in problem(ASK, call)


def test_half_of_a_character_in_a_definition_or_a_name_is_refused_in_its_row():
    with pytest.raises(DataError, match="tools 1 has half of a character"):
        read(ASK, ANSWER, tools=[{"name": "f", "description": "\ud83d"}])
    assert "messages 1 name has half of a character" in problem({**ASK, "name": "\ud83d"}, ANSWER)


def test_parts_of_definitions_and_calls_may_be_json_in_a_text():
    """As data sets write them whose tables would give every tool the fields of all others."""
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    function = {"name": "f", "parameters": schema}
    for given in ({"name": "f", "parameters": json.dumps(schema)}, json.dumps(function)):
        parsed = parse_row({"messages": [ASK, ANSWER], "tools": [{"type": "function", "function": given}]}, "")
        assert parsed.record.tools == ({"type": "function", "function": function},)
    call = {"role": "assistant", "tool_calls": [{"function": json.dumps({"name": "f", "arguments": {"a": "b"}})}]}
    assert read(ASK, call)[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": "b"}}
