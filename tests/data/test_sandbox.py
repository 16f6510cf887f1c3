"""Templates from untrusted sources: what they may not do, what it may cost, and that all else is as under plain Jinja."""

import json
import random
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path

import jinja2.ext
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from thimble.data.sandbox import budget
from thimble.data.sandbox import environment as sandbox
from thimble.data.sandbox.budget import Budget, RunawayTemplateError

from stress.templates import ESCAPES, LIMIT_MEGABYTES, LIMIT_SECONDS, PAYLOADS, grown_template, try_template
from thimble.data.template import MAX_CHARACTERS, ChatTemplate
from thimble.errors import BaseModelError, DataError
from thimble.files.tensors import open_tensors

TESTS = Path(__file__).parents[1]
SYSTEM, USER = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi <you> & 'me'\n\nÆ 😀"}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "call00000", "function": {
    "name": "weather", "arguments": {"city": "Oslo", "days": 2, "deep": {"a": [1, None, True, 1.5]}}}}]}  # fmt: skip
RESULT = {"role": "tool", "content": "rain", "tool_call_id": "call00000", "name": "weather"}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "é <b>", "parameters": {
        "type": "object", "required": ["city"], "properties": {
            "city": {"type": "string", "enum": ["Oslo", "Bergen"]}, "days": {"type": "integer"}}}}}
    for name in ("weather", "news")
]  # fmt: skip
CHATML = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def seen():
    """What came of each payload, in a process of its own that hears every audit event."""
    done = subprocess.run([sys.executable, "-m", "stress.watched"], cwd=TESTS, capture_output=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_hostile_template_is_stopped_in_time_and_reaches_nothing(name, seen):
    found = seen[name]
    assert found["error"] in ("", "BaseModelError", "RunawayTemplateError", "DataError"), found["said"]
    assert found["seconds"] < LIMIT_SECONDS
    assert found["megabytes"] < LIMIT_MEGABYTES
    # Jinja reads an attribute before it asks whether the template may have it.
    assert [event for event in found["asked"] if not event.startswith("object.__getattr__ (<generator")] == []
    outside = ("os.", "subprocess.", "socket.", "ctypes.", "shutil.", "pickle.")
    assert [event for event in found["compiled"] if event.startswith(outside)] == []


@pytest.mark.parametrize("name", ESCAPES)
def test_an_escape_writes_nothing_of_what_it_sought(name, seen):
    said = seen[name]["said"]
    assert seen[name]["error"] or not any(word in said for word in ("<class", "<function", "uid=", "0x", "{'__")), said


def test_the_payloads_are_many():
    assert len(PAYLOADS) >= 200


def test_most_of_the_payloads_would_have_run_under_plain_jinja_too():
    """They are what they are said to be: none of the escapes is stopped only because it is not Jinja."""
    plain = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    read = 0
    for source in ESCAPES.values():
        try:
            read += bool(plain.parse(source))
        except jinja2.TemplateSyntaxError:
            pass
    assert read >= len(ESCAPES) - 4


def test_grown_templates_are_stopped_or_harmless():
    dice = random.Random(1)
    for _ in range(100):
        source = grown_template(dice)
        assert try_template(source)[1] == "", source


# --- the same as under plain Jinja


def plain(source, messages, tools=None, **more):
    """The oracle: Jinja's own sandbox with the options of transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
        value, ensure_ascii=ensure_ascii, **options
    )
    return environment.from_string(source).render(messages=messages, tools=tools, add_generation_prompt=False, **more)


def ours(source, messages, tools=None, **more):
    template = sandbox.compile_template(source, datetime(2026, 1, 2))
    given = {"messages": messages, "tools": tools, "add_generation_prompt": False}
    with Budget(messages, tools):
        return "".join(template.root_render_func(template.new_context(given | more)))


LEGIT = [
    CHATML,
    "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.length }}"
    "{{ loop.first }}{{ loop.last }}{{ loop.depth }}{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}|{% endfor %}",
    "{% for m in messages %}{{ loop.previtem.role if loop.previtem else '-' }}>{{ m.role }}>"
    "{% if not loop.last %}{{ loop.nextitem.role }}{% endif %};{% endfor %}",
    "{% for m in messages if m.role != 'system' %}{{ loop.index }}/{{ loop.length }} {{ m.role }}{% if loop.last %}!"
    "{% endif %}{% else %}none{% endfor %}",
    "{% for m in [] %}x{% else %}empty{% endfor %}{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}"
    "{% endif %}"
    "{{ m.role }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "{% for item in [1, [2, [3, 4]], 5] recursive %}{{ loop.depth }}{% if item is iterable %}({{ loop(item) }})"
    "{% else %}{{ item }}{% endif %}{% endfor %}",
    "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}{{ messages[0] | items | list }}",
    "{% for key, value in tools[0].function.parameters.properties | dictsort %}{{ key }}{{ value.type }}{% endfor %}",
    "{{ messages[1:] | length }}{{ messages[::-1] | map(attribute='role') | join(',') }}{{ messages[-1].role }}"
    "{{ messages[:2][0]['content'][2:-1] }}{{ messages[0]['content'][0] }}",
    "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.found = true %}"
    "{% set ns.n = ns.n + 1 %}{% endif %}{% endfor %}{{ ns.found }}{{ ns.n }}",
    "{% macro turn(m, end='<e>') %}[{{ m.role }}]{{ caller() if caller else m.content }}{{ end }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% call turn(m, end='!') %}inner {{ m.role }}{% endcall %}{% endfor %}",
    "{% macro schema(x) %}{% if x is mapping %}{% for k in x %}{{ k }}:{{ schema(x[k]) }};{% endfor %}"
    "{% elif x is string %}"
    "{{ x }}{% elif x is iterable %}[{% for y in x %}{{ schema(y) }},{% endfor %}]{% else %}{{ x }}{% endif %}"
    "{% endmacro %}"
    "{{ schema(tools) }}",
    "{{ tools | tojson }}{{ tools | tojson(indent=4) }}{{ tools[0] | tojson(separators=(',', ':'), sort_keys=true) }}"
    "{{ 'é' | tojson(ensure_ascii=true) }}",
    "{% set text = messages[1].content %}{{ text | upper }}{{ text | lower }}{{ text | title }}{{ text | capitalize }}"
    "{{ text | trim }}{{ text | replace('i', 'oo') }}{{ text | replace('i', 'oo', 1) }}{{ text | reverse }}"
    "{{ text | length }}{{ text | wordcount }}{{ text | indent(2) }}{{ text | indent('> ', true, true) }}"
    "{{ text | center(40) }}{{ text | truncate(9) }}{{ text | truncate(5, true, '!', 0) }}{{ text | wordwrap(5) }}"
    "{{ text | e }}{{ text | escape | upper }}{{ text | safe }}{{ text | list | first }}{{ text | string | last }}",
    "{{ ('<' | safe) + '<b>' }}{{ ('%s' | safe) % '<' }}{{ '<' ~ ('<' | e) }}{{ ['<' | e, '<'] | join('&') }}"
    "{{ ('a,b' | safe).split(',') }}{{ ('-' | safe).join(['<', '>']) }}",
    "{% set t = messages[2].content %}{{ t.split('</think>')[-1].lstrip('\n') }}{{ t.split('</think>', 1) }}"
    "{{ t.rsplit('<', 1)[0] }}{{ t.startswith('<think>') }}{{ t.endswith(('o', 'x')) }}{{ t.find('h') }}"
    "{{ t.count('h') }}"
    "{{ t.partition('>') }}{{ t.rstrip('lo') }}{{ t.strip() }}{{ t.splitlines() }}{{ '-'.join(['a', 'b']) }}"
    "{{ t.replace('h', 'HH') }}{{ 'x'.zfill(3) }}{{ 'x'.rjust(3, '.') }}{{ t.removeprefix('<') }}{{ '5'.isdigit() }}",
    "{{ [3, 1, 2] | sort }}{{ [3, 1, 2] | sort(reverse=true) | first }}{{ ['b', 'A'] | sort }}{{ [1, 2] | sum }}"
    "{{ [[1], [2]] | sum(start=[]) }}{{ [1, 5] | max }}{{ [4, 2] | min }}{{ ['a', 'A', 'b'] | unique | list }}"
    "{{ [1, 2, 3] | batch(2, 0) | list }}{{ [1, 2, 3] | slice(2) | list }}{{ [1, 2] | reverse | list }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ messages | rejectattr('content') | list }}"
    "{{ [1, 2, 3] | select('odd') | list }}{{ [1, 2, 3] | reject('gt', 2) | list }}"
    "{{ messages | map(attribute='role') | list }}"
    "{{ ['a'] | map('upper') | join }}{{ messages | groupby('role') | map('first') | list }}"
    "{{ ['a b'] | map('replace', ' ', '') | list }}",
    "{{ '%s is %d, %5.2f%% %(x)s' | replace('%(x)s', '') | format('a', 3, 2.5) }}{{ '%(a)s' % {'a': 1} }}"
    "{{ '%r' % ['x'] }}"
    "{{ '{} {:>5} {x!r:.2} {0[0]}'.format('ab', 3, x='yz') }}{{ '{0.role}'.format({'role': 1}) if false }}",
    "{{ 1 + 2 * 3 ** 2 - 7 // 2 / 4 % 3 }}{{ -3 | abs }}{{ 2.567 | round(2) }}{{ 2.4 | round(0, 'ceil') | int }}"
    "{{ '42' | int + '1.5' | float }}{{ 'x' | int(7) }}{{ 'ff' | int(base=16) }}{{ '=' * 5 }}{{ [0] * 3 }}",
    "{{ 1 < 2 < 3 }}{{ 1 < 2 > 5 }}{{ 'i' in messages[1].content }}{{ 'role' in messages[0] }}{{ 2 not in [1, 3] }}"
    "{{ messages[0] in messages }}{{ messages == messages }}{{ [1] + [2] == [1, 2] }}{{ 'a' ~ 1 ~ none ~ [1] }}",
    "{{ missing | default('d') }}{{ missing is defined }}{{ none | default('x', true) }}{{ missing }}"
    "{{ messages[0].nothing }}"
    "{{ 'yes' if tools is not none and tools | length > 0 else 'no' }}{{ 3 is divisibleby 3 }}{{ 2 is even }}",
    "{% set content %}{% for m in messages %}{{ m.role }} {% endfor %}{% endset %}{{ content | trim }}"
    "{% set x | upper %}abc{% endset %}{{ x }}{% filter lower %}ABC{% endfilter %}{% with y = 3 %}{{ y }}{% endwith %}",
    "{% block greeting %}{{ messages[0].role }}{% endblock %}{{ self.greeting() }}{% raw %}{{ x }}{% endraw %}"
    "{# note #}",
    "{% set a, b = 1, (2, 3) %}{{ a }}{{ b }}{{ {'k': a, b: 2}[b] }}{{ dict(x=1, y=2) }}{{ dict([('p', 1)]) }}"
    "{{ range(2, 9, 3) | list }}",
    "{% set c = cycler('odd', 'even') %}{{ c.next() }}{{ c.next() }}{{ c.current }}{% set j = joiner(', ') %}"
    "{{ j() }}a{{ j() }}b",
    "{{ messages | pprint }}{{ tools | string }}{{ messages[0].get('x', 'y') }}{{ messages[0].keys() | list }}"
    "{{ messages[0].copy() }}{{ [1, 2, 1].count(1) }}{{ ['a', 'b'].index('b') }}",
    "{% macro v() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ v(1, 2, a=3) }}{{ v(*[1, 2], **{'b': 4}) }}",
]  # fmt: skip


@pytest.mark.parametrize("source", LEGIT)
@pytest.mark.parametrize("messages", [[SYSTEM, USER, ANSWER], [SYSTEM, USER, ANSWER, CALL, RESULT, ANSWER]], ids=len)
def test_a_template_that_means_well_writes_what_plain_jinja_writes(source, messages):
    assert ours(source, messages, TOOLS) == plain(source, messages, TOOLS)


@pytest.mark.parametrize("source", LEGIT)
def test_a_long_conversation_is_written_as_a_short_one_is(source):
    messages = [SYSTEM, USER, ANSWER] + [USER, ANSWER] * 249
    assert ours(source, messages, TOOLS) == plain(source, messages, TOOLS)


@pytest.mark.parametrize("letter", ["a", "é", "漢", "😀", "\x01"])
@pytest.mark.parametrize("count", [1, 3000])
def test_a_conversation_of_a_million_characters_is_written(letter, count):
    source = (
        "{% for m in messages %}{% set c = m.content | trim %}{% if '</think>' in c %}"
        "{% set c = c.split('</think>')[-1]"
        ".lstrip('\n') %}{% endif %}{{ '<|' + m.role + '|>' + c + '<|end|>' ~ ('' if c | tojson | length else '') }}"
        "{% endfor %}"
    )
    messages = [{"role": "user", "content": letter * (900_000 // count)}] * count
    text = ChatTemplate(source).render(messages)
    assert text == f"<|user|>{letter * (900_000 // count)}<|end|>" * count


def test_a_conversation_that_is_too_long_is_not_blamed_on_the_template():
    with pytest.raises(DataError, match=r"wrote more than 1,000,000 characters.*Shorten it"):
        ChatTemplate(CHATML).render([{"role": "user", "content": "a" * (MAX_CHARACTERS + 1)}])
    source = (
        CHATML
        + "{% for a in messages %}{% for b in messages %}{% for c in messages %}{% endfor %}{% endfor %}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"conversation of 2,000 messages and 36,000 characters.*Shorten it"):
        ChatTemplate(source).render([{"role": "user", "content": "abc"}] * 2000)


def test_a_runaway_template_is_told_from_a_refusal_in_one_sentence():
    with pytest.raises(
        RunawayTemplateError, match=r"does what no template may: it takes more than .* Use a base"
    ) as caught:
        ChatTemplate("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}").render([USER])
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    "tag", ["{% include 'a' %}", "{% import 'a' as a %}", "{% from 'a' import b %}", "{% extends 'a' %}"]
)
def test_a_template_that_asks_for_another_file_is_refused_when_it_is_read(tag):
    with pytest.raises(BaseModelError, match=r"uses {% (include|import|extends) %} \(line 2\)"):
        ChatTemplate("x\n" + tag)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x" * 1_000_001, "has 1,000,001 characters: expected at most 1,000,000"),
        ("{{ a }}" * 5000, "more than 12,000 words and signs"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
        ("{% for a in b %}" * 30 + "{% endfor %}" * 30, "cannot be compiled: too many statically nested blocks"),
        ("{{ x | urlize }}", "not valid Jinja: No filter named 'urlize'"),
    ],
)
def test_a_template_that_is_too_much_to_compile_is_refused(source, said):
    with pytest.raises(BaseModelError, match=said.replace("(", r"\(")):
        ChatTemplate(source)


def test_a_template_that_probes_run_away_in_is_not_tried_again():
    """What a template can do is asked for before it is used; each question could cost a second."""
    began = budget.time.thread_time()
    with pytest.raises(RunawayTemplateError):
        ChatTemplate("{% macro m(n) %}{% set a = m(n - 1) ~ m(n - 1) if n else '' %}{% endmacro %}{{ m(60) }}").render(
            [USER, CALL, RESULT], TOOLS
        )
    assert budget.time.thread_time() - began < LIMIT_SECONDS


def test_a_long_refusal_is_shortened():
    with pytest.raises(DataError) as caught:
        ChatTemplate("{{ raise_exception('x' * 100000) }}").render([USER])
    assert len(str(caught.value)) < 1000


def test_threads_do_not_pay_for_each_other():
    """Each of these takes most of what a rendering has."""
    source = "{% for a in range(300000) %}{% endfor %}{{ messages[0].content }}"
    template, texts = ChatTemplate(source), []
    threads = [threading.Thread(target=lambda: texts.append(template.render([USER]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [USER["content"]] * 8


def test_each_rendering_begins_with_a_whole_budget():
    template = ChatTemplate("{% for a in range(300000) %}{% endfor %}x")
    assert [template.render([USER]) for _ in range(8)] == ["x"] * 8


def test_units_taken_for_the_worst_case_are_given_back():
    with Budget([]) as spent:
        budget.produce(30_000_000, str, "short")
        budget.produce(30_000_000, str, "short")
        spent.spend(budget.MAX_UNITS - 100)
        with pytest.raises(RunawayTemplateError):
            spent.spend(101)


def test_a_value_weighs_each_part_as_often_as_it_is_reached():
    ten = [list(range(10))] * 10
    with Budget([]):
        assert budget.measure(ten) == (2 + 10 * 2 + 100, 3)
        assert budget.weigh("a" * 3200) == 101


def test_the_time_of_a_rendering_is_that_of_its_thread(monkeypatch):
    monkeypatch.setattr(budget, "MAX_SECONDS", 0.05)
    with pytest.raises(RunawayTemplateError, match=r"more than 0.05 s of the processor"):
        ChatTemplate("{% for a in range(400000) %}{% set x = messages[0].content %}{% endfor %}").render([USER])


@pytest.mark.slow
def test_templates_that_come_with_transformers_and_the_fixtures_are_written_as_transformers_writes_them():
    from transformers.models.llama4 import processing_llama4
    from transformers.models.smolvlm import processing_smolvlm
    from transformers.utils.chat_template_utils import _compile_jinja_template

    sources = {processing_llama4.chat_template, processing_smolvlm.DEFAULT_CHAT_TEMPLATE}
    for path in (TESTS / "fixtures" / "gguf").glob("*.gguf"):
        sources.add(open_tensors(path).metadata.get("tokenizer.chat_template") or CHATML)
    conversations = [[USER], [SYSTEM, USER], [SYSTEM, USER, ANSWER, USER], [USER, CALL, RESULT, ANSWER]]
    for source in sources:
        for messages in conversations:
            given = {"bos_token": "<s>", "eos_token": "</s>"}
            outcomes = []
            for write in (ours, lambda source, *more, **given: _compile_jinja_template(source).render(
                messages=more[0], tools=more[1], add_generation_prompt=False, **given)):  # fmt: skip
                try:
                    outcomes.append(write(source, messages, None, **given))
                except Exception as error:
                    outcomes.append(str(error))
            assert outcomes[0] == outcomes[1]
