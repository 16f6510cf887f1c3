"""Forty templates and thirty conversations, written and cut into tokens as transformers does it, token for token.

Where Thimble gives a template other messages on purpose (it has no system role, or writes no tools), transformers is
given the same ones. A conversation that a template refuses is refused in its own words.
"""

import json
from datetime import datetime
from unittest.mock import patch

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from data.chat_templates import FOLDS, TEMPLATES, TOOLS
from data.conversations import CONVERSATIONS, with_text_arguments
from fixtures.tiny_tokenizers import write_tokenizer
from thimble.data.encode import Encoder
from thimble.data.messages import fold_system, has_tools, renumber
from thimble.data.model import template_of
from thimble.data.rows import Record
from thimble.data.template import ChatTemplate
from thimble.data.tokenizer import tokenizer_from_folder
from thimble.data.tool_text import write_tools
from thimble.errors import DataError

NOW = datetime(2026, 11, 28)
MARKS = (
    "<|user|> <|assistant|> <|end|> <|return|> <|call|> <|channel|> <|message|> <|start|> [INST] [/INST] <tool_call> "
    "</think> <|eot_id|> <start_of_turn> <end_of_turn> <|start_header_id|> <|end_header_id|>"
).split()
KINDS = ("qwen2", "llama-bpe", "llama", "gemma")  # of tokenizers, in turn


class Fixed(datetime):
    """The day that both sides write."""

    @classmethod
    def now(cls, tz=None):
        return NOW


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Of each kind transformers' tokenizer and ours, with marks of templates among their tokens."""
    made = []
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        write_tokenizer(kind, folder)
        theirs = AutoTokenizer.from_pretrained(folder)
        theirs.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
        theirs.save_pretrained(folder)
        made.append((theirs, tokenizer_from_folder(folder)))
    return made


def given_to(name, messages, tools):
    """The messages and tools that Thimble gives a template."""
    if has_tools(messages, tools) and name not in TOOLS:
        messages, tools = write_tools(messages, tools), None
    return (fold_system(messages) if name in FOLDS else messages), tools


def outcome(write, *given, **options):
    """What is written, or the words of the refusal."""
    try:
        return write(*given, **options)
    except Exception as error:  # a template may raise anything
        return error


def theirs_of(tokenizer, name, messages, tools, **options):
    """What transformers writes; calls whose ids the template refuses get others, as Thimble gives them."""
    given = {"chat_template": TEMPLATES[name], "tools": tools, **options}
    found = outcome(tokenizer.apply_chat_template, messages, **given)
    if isinstance(found, Exception) and has_tools(messages, tools):
        return outcome(tokenizer.apply_chat_template, renumber(messages), **given)
    return found


def test_there_are_forty_templates_and_thirty_conversations():
    assert (len(TEMPLATES), len(CONVERSATIONS)) == (40, 30)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_written_and_cut_into_tokens_as_transformers_does_it(name, pairs):
    theirs, ours = pairs[list(TEMPLATES).index(name) % len(KINDS)]
    ours.chat_template = TEMPLATES[name]
    template = template_of(ours)
    template._now = NOW
    assert (template.takes_system, template.uses_tools) == (name not in FOLDS, name in TOOLS)
    asked = {key: template.ask(*case, [(len(case[0]), prompt) for prompt in (False, True)])
             for key, case in CONVERSATIONS.items()}  # fmt: skip
    refused = 0
    with patch.object(chat_template_utils, "datetime", Fixed):
        for key, (messages, tools) in CONVERSATIONS.items():
            given = given_to(name, messages, tools)
            for prompt in (False, True):
                text = theirs_of(theirs, name, *given, add_generation_prompt=prompt, tokenize=False)
                written = outcome(asked[key].text, (len(messages), prompt))
                if isinstance(text, Exception):
                    assert isinstance(written, DataError), (key, prompt)
                    assert str(text) in str(written), (key, prompt)
                    refused += 1
                    continue
                assert written == text, (key, prompt)
                ids = theirs_of(theirs, name, *given, add_generation_prompt=prompt, return_dict=False)
                assert ours.encode(written) == ids, (key, prompt)
    assert refused < 2 * len(CONVERSATIONS) / 2


# Of these a row is not what transformers writes of the whole, on purpose. A learned piece and a given one share no
# token, so white space at the beginning of an answer is cut as it comes after a prompt; and where a template rewrites a
# turn once others follow, a row has it as it is written when it is asked for.
CUT = {"spaces around"}
ROWS_APART = {
    "chatml": CUT, "zephyr": CUT, "llama 3.1": set(), "gemma 3": set(), "qwen 3": {"two answers in a row"},
    "channels": set(),
    # Its system text and its tools stand in the last question alone.
    "mistral 3": {
        "system", "many turns", "empty system", "spaces around", "other scripts", "Jinja in the text",
        "quotes and slashes", "thinking", "calls side by side", "tools nobody calls",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS_APART)
def test_rows_and_prompts_have_the_tokens_of_transformers(name, pairs):
    theirs, ours = pairs[0]
    ours.chat_template = TEMPLATES[name]
    template = template_of(ours)
    template._now = NOW
    encoder, apart = Encoder(ours, template, 10**6), set()
    with patch.object(chat_template_utils, "datetime", Fixed):
        for key, (messages, tools) in CONVERSATIONS.items():
            answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
            end = answers[-1] + 1 if answers else len(messages)  # nothing is learned behind the last answer
            for prompt, part in ((False, messages[:end]), (True, messages)):
                given = given_to(name, part, tools)
                ids = theirs_of(theirs, name, *given, add_generation_prompt=prompt, return_dict=False)
                row = None if prompt else outcome(encoder.encode, Record(messages, tools=tools))
                found = outcome(encoder.prompt, messages, tools) if prompt else row
                if isinstance(ids, Exception):
                    assert isinstance(found, DataError), key
                    continue
                found = (found if prompt else found[0].ids).tolist()
                apart |= {key} if found != ids[: len(found)] else set()
    assert apart == ROWS_APART[name]


def test_an_answer_is_learned_as_it_is_written_behind_the_prompt_that_asks_for_it(pairs):
    """Mistral writes the system text into the last question, which an answer behind it makes an earlier one."""
    theirs, ours = pairs[0]
    ours.chat_template = TEMPLATES["mistral 3"]
    messages, _ = CONVERSATIONS["system"]
    (row,) = Encoder(ours, template_of(ours), 1000).encode(Record(messages))
    prompt = theirs_of(theirs, "mistral 3", messages[:-1], None, add_generation_prompt=True, return_dict=False)
    assert row.ids[: len(prompt)].tolist() == prompt
    assert ours.decode(row.ids[len(prompt) :]) == " Hello" + ours.eos_token
    assert ours.decode(prompt) == "[INST] Be kind.\n\nHi[/INST]"


# ---- what differs on purpose -----------------------------------------------------------------------------------------


def test_a_system_prompt_goes_before_the_first_question_of_a_template_without_a_system_role():
    messages, _ = CONVERSATIONS["system"]
    for name in FOLDS:
        assert "Be kind.\n\nHi" in ChatTemplate(TEMPLATES[name]).render(messages)
        with pytest.raises(Exception, match="System role not supported|must alternate"):
            chat_template_utils.render_jinja_template([messages], chat_template=TEMPLATES[name], bos_token="")


def test_tools_are_written_as_text_for_a_template_that_would_leave_them_out():
    messages, tools = CONVERSATIONS["a call"]
    theirs, _ = chat_template_utils.render_jinja_template([messages], tools=tools, chat_template=TEMPLATES["chatml"])
    assert "weather" not in theirs[0]
    text = ChatTemplate(TEMPLATES["chatml"]).render(messages, tools)
    assert "<tools>" in text
    assert '"city":"Oslo"' in text


def test_arguments_are_text_for_a_template_that_wants_text():
    source = TEMPLATES["qwen 2.5"].replace("tool_call.arguments | tojson", "'' + tool_call.arguments")
    messages, tools = CONVERSATIONS["calls side by side"]
    theirs, _ = chat_template_utils.render_jinja_template(
        [with_text_arguments(messages)], tools=tools, chat_template=source
    )
    assert ChatTemplate(source).render(messages, tools) == theirs[0]
    assert '"arguments": {"words": ["é", "<b>"], "deep": null}' in theirs[0]


def test_a_missing_content_is_an_empty_text_and_a_missing_bos_token_too():
    messages = [{"role": "user", "content": None}]
    assert ChatTemplate("{{ bos_token + 'x' }}[{{ messages[0].content }}]").render(messages) == "x[]"


def test_a_base_that_expects_bos_gets_it_where_the_template_writes_none(pairs):
    theirs, ours = pairs[KINDS.index("llama-bpe")]
    ours.chat_template = TEMPLATES["chatml"]
    messages, _ = CONVERSATIONS["one question"]
    ids = theirs.apply_chat_template(messages, chat_template=TEMPLATES["chatml"], add_generation_prompt=True,
                                     return_dict=False)  # fmt: skip
    assert Encoder(ours, template_of(ours), 1000).prompt(messages).tolist() == [ours.bos_id, *ids]


# ---- what was another text before ------------------------------------------------------------------------------------


def test_thoughts_go_by_the_names_that_templates_read():
    source = "{% for m in messages %}{{ m.reasoning_content }}/{{ m.thinking }}/{{ m.content }};{% endfor %}"
    for name in ("reasoning_content", "thinking", "reasoning"):
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", name: "hm"}]
        theirs, _ = chat_template_utils.render_jinja_template(
            [chat_template_utils._alias_reasoning_fields(messages)], chat_template=source
        )
        assert ChatTemplate(source).render(messages) == theirs[0] == "//x;hm/hm/y;"


def test_a_call_keeps_the_order_of_its_keys_and_what_else_it_says():
    calls = [{"id": "call00001", "type": "function", "index": 0, "function": {"name": "f", "arguments": {}}}]
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    template = ChatTemplate(TEMPLATES["json of all"])
    assert json.dumps(calls) in template.render(messages)


def test_a_template_that_refuses_to_end_with_a_question_is_known_by_what_it_writes_before_an_answer():
    refusal = "{% if not add_generation_prompt and messages[-1].role == 'user' %}{{ raise_exception('no') }}{% endif %}"
    template = ChatTemplate(refusal + "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>")
    assert template.takes_system
    assert template.opening == "<user>"
    assert not template.uses_date


def test_of_templates_by_name_the_one_for_tools_is_taken_where_transformers_takes_it(tmp_path):
    """As in Hermes 2 Pro, Hermes 3 and Command R; without a template of that name the default writes all."""
    write_tokenizer("qwen2", tmp_path)
    made = AutoTokenizer.from_pretrained(tmp_path)
    made.chat_template = {"default": TEMPLATES["chatml"], "tool_use": TEMPLATES["hermes"]}
    made.save_pretrained(tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), template_of(tokenizer_from_folder(tmp_path))
    plain = [(messages, tools) for messages, tools in CONVERSATIONS.values() if tools or not has_tools(messages, tools)]
    seen = set()
    for messages, tools in plain:
        expected = outcome(theirs.apply_chat_template, messages, tools=tools, tokenize=False)
        if not isinstance(expected, Exception):
            seen.add(bool(tools))
            assert ours.render(messages, tools) == expected
    assert seen == {False, True}
