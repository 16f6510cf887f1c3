"""Calls in what a model writes, however it is cut; and whether those of a template can be read back."""

import json

import llguidance
import pytest

from fixtures.tiny_tokenizers import CHATML
from thimble.data.template import ChatTemplate
from thimble.server.stop_text import StopText
from thimble.server.tool_calls import CallForm, CallReader, call_form, calls_grammar

BYTES = llguidance.LLTokenizer("byte")
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
OTHER = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
QWEN = (
    "{% if tools %}# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}\n<tool_call>\n{\"name\": \"{{ call.function.name }}\", "
    "\"arguments\": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for message in messages %}"
    "{% if message.role == 'user' %}[INST]{{ message.content }}[/INST]{% elif message.tool_calls %}[TOOL_CALLS]["
    "{% for call in message.tool_calls %}{\"name\": \"{{ call.function.name }}\", \"arguments\": "
    "{{ call.function.arguments | tojson }}}{% endfor %}]</s>{% else %}{{ message.content }}{% endif %}{% endfor %}"
)  # fmt: skip
LLAMA = QWEN.replace("\n<tool_call>\n", "").replace("\n</tool_call>", "").replace('"arguments"', '"parameters"')
XML = QWEN.replace('{"name": "{{ call.function.name }}", "arguments": ', "<f={{ call.function.name }}>")


def read(text, cuts=(), **options):
    """Text and calls of an answer that comes in pieces."""
    reader, told, calls = CallReader(["f", "g"], **options), "", []
    edges = [0, *cuts, len(text)]
    for start, end in zip(edges, edges[1:], strict=False):
        out, found = reader.add(text[start:end])
        told, calls = told + out, calls + found
    out, found = reader.end()
    return told + out, [(call.name, json.loads(call.arguments)) for call in calls + found]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text", ("plain text", [])),
        ("a < b and <tool", ("a < b and <tool", [])),
        (CALL, ("", [("f", {"x": 1})])),
        (f"Let me see.\n{CALL}", ("Let me see.\n", [("f", {"x": 1})])),
        (f"{CALL}\n{OTHER}\n", ("", [("f", {"x": 1}), ("g", {})])),
        (f"{CALL}\n and that", ("and that", [("f", {"x": 1})])),
        (CALL.removesuffix("\n</tool_call>"), ("", [("f", {"x": 1})])),
        ("<tool_call>no JSON</tool_call> more", ("<tool_call>no JSON</tool_call> more", [])),
        ("<tool_call>{", ("<tool_call>{", [])),
        (' {"name": "f", "parameters": {"x": 1}}', ("", [("f", {"x": 1})])),
        ('[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]', ("", [("f", {}), ("g", {})])),
        ('{"name": "nobody", "arguments": {}}', ('{"name": "nobody", "arguments": {}}', [])),
        ('{"x": 1}', ('{"x": 1}', [])),
        ("  ", ("  ", [])),
        ("", ("", [])),
    ],
)
def test_text_and_calls_are_told_apart_wherever_the_answer_is_cut(text, expected):
    assert read(text) == expected
    assert read(text, range(1, len(text))) == expected
    for cut in range(1, len(text)):
        assert read(text, [cut]) == expected


def test_a_single_call_ends_the_answer():
    assert read(f"{CALL}\n{OTHER} and", is_single=True) == ("", [("f", {"x": 1})])
    assert read(f"{CALL}\n{OTHER} and", range(1, 90), is_single=True) == ("", [("f", {"x": 1})])


def test_a_call_is_told_as_soon_as_it_is_whole():
    reader = CallReader(["f"])
    assert reader.add(f"ask {CALL}")[1]
    assert reader.add("<tool_call>") == ("", [])


@pytest.mark.parametrize(
    ("source", "before", "key"),
    [
        (CHATML, "<tool_call>\n", "arguments"),
        (QWEN, "<tool_call>\n", "arguments"),
        (MISTRAL, "[", "arguments"),
        (LLAMA, "", "parameters"),
    ],
)
def test_the_form_of_calls_is_found_by_having_one_written(source, before, key):
    form = call_form(ChatTemplate(source), ["<|im_end|>", "<|im_start|>", "[TOOL_CALLS]", "</s>"])
    assert (form.before, form.key) == (before, key)


def test_a_form_that_cannot_be_read_back_is_none():
    template = ChatTemplate(XML)
    assert template.uses_tools
    assert call_form(template, ["<|im_end|>", "<|im_start|>"]) is None


@pytest.mark.parametrize("cuts", [1, 2, 3, 5, 50])
def test_no_part_of_a_stop_string_goes_out(cuts):
    text = "one STO two STOP three"
    stop, out = StopText(["STOP", "zzz"]), ""
    for start in range(0, len(text), cuts):
        out += stop.add(text[start : start + cuts])
        assert "one STO two ".startswith(out)
    assert out + stop.end() == "one STO two "
    assert stop.is_stopped


def test_the_first_of_several_stop_strings_ends_the_text():
    stop = StopText(["bc", "abcd", "d"])
    assert [stop.add(piece) for piece in ("xa", "b", "c")] == ["x", "", "a"]
    assert stop.end() == ""


def is_allowed(grammar, text):
    """Whether a grammar can be followed, and allows a text to begin so."""
    if llguidance.LLMatcher.validate_grammar(grammar):
        return False
    return llguidance.LLMatcher(BYTES, grammar).try_consume_tokens(list(text.encode())) == len(text)


def test_arguments_refer_to_what_stands_in_their_own_schema():
    """Nested classes come as `$ref` to `$defs` of the schema of one tool, whatever the others have there."""
    tools = [
        {
            "name": name,
            "parameters": {
                "type": "object", "properties": {"to": {"$ref": "#/$defs/To"}, "again": {"$ref": "#"}},
                "required": ["to"], "additionalProperties": False, "$defs": {"To": {"enum": [value]}},
            },
        }
        for name, value in (("send", "mail"), ("call", "phone"))
    ]  # fmt: skip
    grammar = calls_grammar(tools, CallForm("<tool_call>", "</tool_call>", "arguments"), is_single=True, is_free=False)
    for name, value, is_right in [("send", "mail", True), ("send", "phone", False), ("call", "phone", True)]:
        inner = {"to": value, "again": {"to": value}}
        text = f"<tool_call>{json.dumps({'name': name, 'arguments': inner})}</tool_call>"
        assert is_allowed(grammar, text) is is_right, text


@pytest.mark.parametrize(
    "draft", ["http://json-schema.org/draft-07/schema#", "http://json-schema.org/draft-04/schema#"]
)
def test_a_schema_of_an_older_draft_may_be_a_reference_alone(draft):
    """As zod-to-json-schema writes a named object; a list of `items` still says what stands at each place."""
    pair = {"type": "array", "items": [{"const": 1}, {"const": 2}], "minItems": 2, "maxItems": 2}
    inner = {"type": "object", "properties": {"pair": pair}, "required": ["pair"], "additionalProperties": False}
    schema = {"$ref": "#/definitions/A", "definitions": {"A": inner}, "$schema": draft}
    form = CallForm("<tool_call>", "</tool_call>", "arguments")
    grammar = calls_grammar([{"name": "f", "parameters": schema}], form, is_single=True, is_free=False)
    for value, is_right in [([1, 2], True), ([2, 1], False)]:
        text = f"<tool_call>{json.dumps({'name': 'f', 'arguments': {'pair': value}})}</tool_call>"
        assert is_allowed(grammar, text) is is_right, text


PRICE = {
    "type": "object", "required": ["price", "tags"], "additionalProperties": False,
    "properties": {
        "price": {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"},  # as pydantic has Decimal
        "tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},  # and sets
    },
}  # fmt: skip


@pytest.mark.parametrize("is_strict", [False, True])
def test_what_no_grammar_can_demand_is_left_out_unless_the_tool_is_strict(is_strict):
    form = CallForm("<tool_call>", "</tool_call>", "arguments")
    tools = [{"name": "f", "parameters": PRICE, "strict": is_strict}]
    grammar = calls_grammar(tools, form, is_single=True, is_free=False)
    assert is_allowed(grammar, '<tool_call>{"name": "f", "arguments": {"price": "1.5", "tags": []}}') is not is_strict
    if not is_strict:
        assert not is_allowed(grammar, '<tool_call>{"name": "f", "arguments": {"tags": []')
