from datetime import datetime

import pytest

from thimble.data import tool_text
from thimble.data.template import ChatTemplate
from thimble.data.template_process import MAX_CHARACTERS
from thimble.errors import BaseModelError, DataError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Helpful.<|im_end|>\n{% endif %}" + CHATML
)
TOOLS = (
    "{% if tools %}[TOOLS]{% for tool in tools %}{{ tool | tojson }}{% endfor %}[/TOOLS]{% endif %}"
    "{% for message in messages %}{% if message.tool_calls %}{% for call in message.tool_calls %}"
    "[CALL {{ call.id }} {{ call.function.name }} ARGUMENTS]{% endfor %}"
    "{% elif message.role == 'tool' %}[RESULT {{ message.tool_call_id }} {{ message.content }}]"
    "{% else %}[{{ message.role }}]{{ message.content }}{% endif %}{% endfor %}"
)
OBJECT_ARGUMENTS = TOOLS.replace("ARGUMENTS", "{{ call.function.arguments | tojson }}")
TEXT_ARGUMENTS = TOOLS.replace("ARGUMENTS", "{{ '' + call.function.arguments }}")

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Weather", "parameters": {"type": "object"}},
}


def call(identity=None, name="weather", **arguments):
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": identity, **made} if identity else made


def calling(*calls, content=None):
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def result(content, **more):
    return {"role": "tool", "content": content, **more}


def test_a_conversation_is_written_by_the_template():
    template = ChatTemplate(CHATML)
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert template.render([USER], add_generation_prompt=True) == text
    assert template.render([USER, ANSWER]) == text + "Hello<|im_end|>\n"


def test_special_tokens_are_at_hand():
    assert ChatTemplate("{{ bos_token }}x{{ eos_token }}", "<s>", "</s>").render([USER]) == "<s>x</s>"


def test_smollm_adds_a_system_prompt_of_its_own(smollm_template):
    assert smollm_template.default_system == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert smollm_template.takes_system
    assert not smollm_template.uses_tools


@pytest.mark.slow
def test_smollm_is_written_as_transformers_writes_it(smollm_file, smollm_template):
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(smollm_file.parent, gguf_file=smollm_file.name)
    system = {"role": "system", "content": "Be kind & <brief>."}
    for messages in ([USER], [USER, ANSWER], [system, USER, ANSWER, USER]):
        for more in (False, True):
            expected = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=more)
            assert smollm_template.render(messages, add_generation_prompt=more) == expected


def test_blocks_loops_filters_and_marks_behave_as_in_transformers():
    source = (
        "{% for message in messages %}\n"
        "    {% if loop.index > 1 %}\n{% break %}\n{% endif %}\n"
        "{% generation %}{{ message.content }}{% endgeneration %}|{{ {'b': '<é>', 'a': [1]} | tojson }}"
        "|{{ {'a': 1} | tojson(indent=1) }}|{{ strftime_now('%d %b %Y') }}\n"
        "{% endfor %}"
    )
    text = ChatTemplate(source, now=datetime(2026, 11, 23)).render([USER, ANSWER])
    assert text == 'Hi|{"b": "<é>", "a": [1]}|{\n "a": 1\n}|23 Nov 2026\n'


@pytest.mark.slow
def test_the_environment_is_that_of_transformers():
    from transformers.utils.chat_template_utils import _compile_jinja_template

    for source in (CHATML, NO_SYSTEM, DEFAULT_SYSTEM, OBJECT_ARGUMENTS):
        expected = _compile_jinja_template(source).render(messages=[USER, ANSWER], tools=None)
        assert ChatTemplate(source).render([USER, ANSWER]) == expected


# --- content in parts

# The templates of LLaVA 1.5, LLaVA-NeXT on Mistral and SmolVLM, as the hub has them.
PARTS = {
    "llava": (
        "{% for message in messages %}"
        "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
        "{% if message['role'] != 'assistant' %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
        "{% endfor %}{% else %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "llava-next": (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}{% elif message['role'] == 'user' %}"
        "{{ '[INST] ' }}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ content['text'] }}{% endfor %}{{' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'][0]['text'] + '</s> '}}{% else %}{{ raise_exception('no such role') }}{% endif %}"
        "{% endfor %}"
    ),
    "smolvlm": (
        "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
        "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
        "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
        "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_template_that_leaves_out_content_that_is_a_text_is_given_parts(name):
    from transformers.utils.chat_template_utils import _compile_jinja_template

    theirs, template = _compile_jinja_template(PARTS[name]), ChatTemplate(PARTS[name])
    assert template.takes_system
    for messages in ([{"role": "system", "content": "Be kind."}, USER, ANSWER, USER], [USER, ANSWER]):
        parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
        for prompt in (False, True):
            expected = theirs.render(messages=parts, add_generation_prompt=prompt)
            assert "Hello" in expected
            assert template.render(messages, add_generation_prompt=prompt) == expected


def test_tools_are_written_as_text_for_a_template_of_parts_that_knows_none():
    text = ChatTemplate(PARTS["smolvlm"]).render([USER, calling(call(city="Oslo")), result("rain")], [WEATHER])
    assert '{"name":"weather","description":"Weather"' in text
    assert '{"name":"weather","arguments":{"city":"Oslo"}}' in text
    assert "<tool_response>\nrain" in text


# --- system prompts and the date


def test_a_default_system_prompt_is_found():
    template = ChatTemplate(DEFAULT_SYSTEM)
    assert template.default_system == "You are Helpful."
    assert template.opening == "<|im_start|>system\nYou are Helpful.<|im_end|>\n<|im_start|>user\n"


@pytest.mark.parametrize("source", [CHATML, NO_SYSTEM])
def test_no_default_system_prompt_is_found_where_there_is_none(source):
    assert ChatTemplate(source).default_system is None


@pytest.mark.parametrize(
    "source", [NO_SYSTEM, "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endfor %}"]
)
def test_system_text_goes_before_the_first_user_text_if_the_template_has_no_place_for_it(source):
    template = ChatTemplate(source)
    assert not template.takes_system
    text = template.render([{"role": "system", "content": "Be kind."}, USER, ANSWER])
    assert "Be kind.\n\nHi" in text
    assert "Be kind." in template.render([{"role": "system", "content": "Be kind."}])


def test_a_template_that_writes_the_date_is_known_and_keeps_to_one():
    dated = ChatTemplate("{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}", now=datetime(2026, 1, 2))
    assert dated.uses_date
    assert dated.render([USER]) == "2026-01-02 Hi"
    assert not ChatTemplate(CHATML).uses_date


# --- tools


def test_tools_are_left_to_a_template_that_knows_them():
    template = ChatTemplate(OBJECT_ARGUMENTS)
    assert template.uses_tools
    text = template.render([USER, calling(call("abc", city="Oslo")), result("rain", tool_call_id="abc")], [WEATHER])
    assert text.startswith('[TOOLS]{"type": "function", "function": {"name": "weather"')
    assert text.endswith('[user]Hi[CALL abc weather {"city": "Oslo"}][RESULT abc rain]')


def test_arguments_are_given_as_text_to_templates_that_want_text():
    template = ChatTemplate(TEXT_ARGUMENTS)
    assert template.uses_tools
    assert '[CALL call00000 weather {"city": "Østby"}]' in template.render(
        [USER, calling(call(city="Østby"))], [WEATHER]
    )


def test_missing_ids_of_calls_are_made_up_and_tied_to_their_results():
    messages = [USER, calling(call(city="a"), call(city="b")), result("1"), result("2"), calling(call()), result("3")]
    text = ChatTemplate(OBJECT_ARGUMENTS).render(messages, [WEATHER])
    assert "[RESULT call00000 1][RESULT call00001 2]" in text
    assert "[RESULT call00002 3]" in text


def test_ids_that_a_template_refuses_are_replaced():
    strict = (
        "{% for message in messages %}{% for call in message.tool_calls or [] %}{% if call.id | length != 9 %}"
        "{{ raise_exception('nine') }}{% endif %}{% endfor %}{% endfor %}"
    )
    template = ChatTemplate(strict + OBJECT_ARGUMENTS)
    text = template.render([USER, calling(call("call_abc123")), result("rain", tool_call_id="call_abc123")], [WEATHER])
    assert "[CALL call00000 weather {}][RESULT call00000 rain]" in text


def test_a_template_without_tools_gets_them_as_text():
    system = {"role": "system", "content": "Be kind."}
    messages = [system, USER, calling(call(city="Oslo"), call(city="Bergen")), result("rain"), result("sun"), ANSWER]
    text = ChatTemplate(DEFAULT_SYSTEM).render(messages, [WEATHER])
    assert text == (
        "<|im_start|>system\nBe kind.\n\n# Tools\n\nYou may call these functions:\n<tools>\n"
        '{"name":"weather","description":"Weather","parameters":{"type":"object"}}\n</tools>\n\n'
        'To call one, write:\n<tool_call>\n{"name":...,"arguments":{...}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nHi<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name":"weather","arguments":{"city":"Oslo"}}\n</tool_call>\n'
        '<tool_call>\n{"name":"weather","arguments":{"city":"Bergen"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n"
    )


def test_tools_as_text_replace_the_default_system_prompt():
    text = ChatTemplate(DEFAULT_SYSTEM).render([USER], [WEATHER])
    assert "You are Helpful" not in text
    assert text.startswith("<|im_start|>system\n# Tools\n")


def test_tools_as_text_go_to_the_user_turn_if_there_is_no_system_role():
    text = ChatTemplate(NO_SYSTEM).render([USER], [WEATHER])
    assert text.startswith("<|im_start|>user\n# Tools\n")
    assert text.endswith("</tool_call>\n\nHi<|im_end|>\n")


def test_calls_without_definitions_are_written_too():
    text = ChatTemplate(CHATML).render([USER, calling(call(), content="One moment.")])
    assert 'One moment.\n<tool_call>\n{"name":"weather","arguments":{}}\n</tool_call>' in text
    assert "# Tools" not in text


def test_a_template_for_tools_writes_the_conversations_that_have_some():
    template = ChatTemplate(DEFAULT_SYSTEM, tool_use=OBJECT_ARGUMENTS)
    assert template.uses_tools
    assert template.knows_tools([WEATHER])
    assert not template.knows_tools(None)
    assert template.render([USER], [WEATHER]) == ChatTemplate(OBJECT_ARGUMENTS).render([USER], [WEATHER])
    assert template.render([USER]) == ChatTemplate(DEFAULT_SYSTEM).render([USER])
    assert template.default_system == "You are Helpful."


def test_a_template_for_tools_that_writes_none_is_not_taken():
    assert ChatTemplate(CHATML, tool_use=NO_SYSTEM).render([USER], [WEATHER]) == (
        ChatTemplate(CHATML).render([USER], [WEATHER])
    )


def test_the_instruction_around_the_tools_is_short():
    assert len(tool_text.definitions_text([]).split()) <= 25


def test_nothing_given_is_changed():
    messages = [USER, calling(call("abc", city="Oslo")), result("rain")]
    before = repr(messages)
    for source in (CHATML, OBJECT_ARGUMENTS, TEXT_ARGUMENTS):
        ChatTemplate(source).render(messages, [WEATHER])
    assert repr(messages) == before


# --- what may go wrong


def test_a_template_that_is_not_jinja_is_refused_with_its_line():
    with pytest.raises(BaseModelError, match=r"not valid Jinja: Unexpected end of template.*line 2 of the template"):
        ChatTemplate("a\n{% for x in y %}").render([USER])


def test_a_refused_conversation_is_told_in_the_words_of_the_template():
    template = ChatTemplate("{{ raise_exception('Roles must alternate') }}")
    with pytest.raises(DataError, match="refuses this conversation: Roles must alternate"):
        template.render([USER])


@pytest.mark.parametrize(
    "source", ["{{ messages[0].content + 1 }}", "{{ 1 / 0 }}", "{% for x in 5 %}{% endfor %}", "{{ nothing.at.all }}"]
)
def test_a_template_that_fails_says_why(source):
    with pytest.raises(DataError, match="chat template of the base (fails on|refuses) this conversation: .+"):
        ChatTemplate(source).render([USER])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ 'a' * 1000000000 }}",
        "{{ 9 ** 999999999 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_may_neither_reach_out_nor_run_away(source):
    with pytest.raises((BaseModelError, DataError)):
        ChatTemplate(source).render([USER])


def test_output_without_end_is_cut():
    endless = "{% for a in range(1000) %}{% for b in range(900) %}0123456789{% endfor %}{% endfor %}"
    with pytest.raises(DataError, match=f"more than {MAX_CHARACTERS:,} characters"):
        ChatTemplate(endless).render([USER])


THINKING = CHATML + "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"


def test_a_template_is_told_more_than_the_conversation_if_it_asks_for_it():
    template = ChatTemplate(THINKING, bos_token="<s>")
    plain, told = template.render([USER]), template.with_variables({"enable_thinking": False})
    assert told.render([USER]) == plain + "<think></think>"
    assert template.render([USER]) == template.with_variables({"enable_thinking": True}).render([USER]) == plain


@pytest.mark.parametrize("name", ["thinking", "messages", "add_generation_prompt", "bos_token", "enable"])
def test_what_a_template_does_not_read_or_is_told_anyway_is_refused(name):
    with pytest.raises(DataError, match=f"takes no {name}"):
        ChatTemplate(THINKING + "{{ bos_token }}", bos_token="<s>").with_variables({"enable_thinking": True, name: 1})


def test_a_template_of_its_own_for_tools_is_told_the_same():
    template = ChatTemplate(CHATML, tool_use=OBJECT_ARGUMENTS + "{{ '[quick]' if effort == 'low' else '' }}")
    told = template.with_variables({"effort": "low"})
    assert told.render([USER], [WEATHER]) == template.render([USER], [WEATHER]) + "[quick]"
    assert told.render([USER]) == template.render([USER])
