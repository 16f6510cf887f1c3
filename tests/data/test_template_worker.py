"""Templates from untrusted sources: what they may not do, what they may cost, and that all else is as in Jinja."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jinja2.ext
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stress.templates import ESCAPES, PAYLOADS, grown_template, try_template
from thimble.data import template_process
from thimble.data.template import ChatTemplate, UnusableTemplateError
from thimble.data.template_process import MAX_CHARACTERS, Asked, TemplateProcess
from thimble.data.template_worker import TEXT
from thimble.errors import BaseModelError, DataError
from thimble.files.tensors import open_tensors

TESTS = Path(__file__).parents[1]
SOURCES = TESTS.parent / "src"
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


HANGS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def children():
    """Processes that were started here and have not ended, or that nobody has waited for."""
    stats = (path.read_text() for path in Path("/proc").glob("[0-9]*/stat") if path.exists())
    return {int(stat.split()[0]) for stat in stats if int(stat.rpartition(")")[2].split()[1]) == os.getpid()}


@pytest.fixture
def impatient(monkeypatch):
    """Limits that are soon reached."""
    monkeypatch.setattr(template_process, "MAX_SECONDS", 0.2)


@pytest.mark.parametrize("name", [*ESCAPES, *list(PAYLOADS)[len(ESCAPES) :: 12]])
def test_a_hostile_template_is_stopped_or_harmless(name, impatient):
    outcome = try_template(PAYLOADS[name])
    assert outcome.wrong == ""
    if name in ESCAPES and not outcome.is_stopped:
        assert not any(word in outcome.said for word in ("<class", "<function", "uid=", "0x", "{'__")), outcome.said


def test_the_payloads_are_many():
    assert len(PAYLOADS) >= 238


def test_most_of_the_escapes_are_read_by_jinja():
    """They are what they are said to be: none of the escapes is stopped only because it is not Jinja."""
    plain = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    read = 0
    for source in ESCAPES.values():
        try:
            read += bool(plain.parse(source))
        except jinja2.TemplateSyntaxError:
            pass
    assert read >= len(ESCAPES) - 4


def test_grown_templates_are_stopped_or_harmless(impatient):
    dice = random.Random(1)
    for _ in range(10):
        source = grown_template(dice)
        assert try_template(source).wrong == "", source


# --- what is left to a template that gets out of Jinja's sandbox

ATTEMPTS = {
    "read a file": "open('/etc/passwd')",
    "write a file": "open(sys.argv[1] + '/made', 'w')",
    "remove a file": "os.remove(sys.argv[1] + '/file')",
    "rename a file": "os.rename(sys.argv[1] + '/file', sys.argv[1] + '/other')",
    "see a file": "os.stat(sys.argv[1])",
    "make a folder": "os.mkdir(sys.argv[1] + '/made')",
    "connect": "socket.socket()",
    "run a program": "os.execv('/bin/true', ['true'])",
    "fork": "os.fork()",
    "kill": "os.kill(os.getppid(), 0)",
    "raise a limit": "resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))",
    "make a thread": "threading.Thread(target=int).start()",
    "fill the memory": "bytearray(10**9)",
}


@pytest.mark.skipif(os.uname().machine != "x86_64" or sys.platform != "linux", reason="needs the filter of calls")
def test_a_confined_process_can_do_nothing_to_its_system(tmp_path):
    (tmp_path / "file").write_text("x")
    lines = ["import ctypes, os, resource, socket, sys, threading", "from thimble.data.template_worker import _confine"]
    lines += ["lacking = _confine(256_000_000)", "def attempt(name, call):", "    try: call()"]
    lines += ["    except (OSError, RuntimeError, MemoryError, ValueError): return", "    print(name, flush=True)"]
    lines += [f"attempt({name!r}, lambda: {call})" for name, call in ATTEMPTS.items()] + ["print('lacking', [lacking])"]
    command = [sys.executable, "-c", "\n".join(lines), str(tmp_path)]
    done = subprocess.run(command, env={"PYTHONPATH": str(SOURCES)}, capture_output=True, text=True, check=False)
    assert done.stdout == "lacking ['']\n", done.stderr


def test_all_of_it_is_in_force_here():
    if sys.platform == "linux" and os.uname().machine == "x86_64":
        assert ChatTemplate(CHATML).isolation is None


def test_what_a_system_lacks_is_told(monkeypatch):
    template = ChatTemplate(CHATML)
    monkeypatch.setattr(template, "_process", type("Process", (), {
        "setup": None, "replies": lambda self, asked: [(TEXT, "memory calls")]})())  # fmt: skip
    assert template.isolation == "fill the memory, rename and remove files if it gets out of its sandbox"


def test_the_environment_of_the_user_is_not_passed_on():
    assert "PATH" not in template_process.ENVIRONMENT
    assert "HF_TOKEN" not in template_process.ENVIRONMENT


# --- a process that ends, hangs or is not there


def worker(template):
    return template._process._process


def test_a_process_that_is_killed_is_started_again():
    template = ChatTemplate(CHATML)
    expected = template.render([USER])
    os.kill(worker(template).pid, signal.SIGKILL)
    assert template.render([USER]) == expected


def test_renderings_that_were_asked_for_survive_the_end_of_the_process():
    template = ChatTemplate(CHATML)
    expected = [template.render([{"role": "user", "content": f"{number}" * 9}]) for number in range(50)]
    asked = [template.ask([{"role": "user", "content": f"{number}" * 9}], None, [(1, False)]) for number in range(50)]
    texts = []
    for number, written in enumerate(asked):
        if number in (10, 30):
            os.kill(worker(template).pid, signal.SIGKILL)
        texts.append(written.text((1, False)))
    assert texts == expected


def test_a_process_that_ends_again_and_again_refuses_the_template(monkeypatch, tmp_path):
    program = tmp_path / "program.py"
    program.write_text("raise SystemExit(7)")
    monkeypatch.setattr(template_process, "PROGRAM", str(program))
    with pytest.raises(UnusableTemplateError, match=r"its process ended twice, with exit code 7. Use a base"):
        ChatTemplate(CHATML).render([USER])


@pytest.mark.parametrize(
    "bytes_", ["b'\\x00\\x04\\x00\\x00\\x00\\xff\\xff\\xff\\xff'", "b'x' * 99", "b'\\0\\xff\\xff\\xff\\x7f'"]
)
def test_a_process_that_writes_no_replies_refuses_the_template(monkeypatch, tmp_path, bytes_):
    program = tmp_path / "program.py"
    program.write_text(f"import sys, time\nsys.stdout.buffer.write({bytes_})\nsys.stdout.flush()\ntime.sleep(9)")
    monkeypatch.setattr(template_process, "PROGRAM", str(program))
    with pytest.raises(UnusableTemplateError, match="its process did not answer, or not with a reply"):
        ChatTemplate(CHATML).render([USER])


def test_a_process_that_hangs_is_ended(monkeypatch):
    template = ChatTemplate(CHATML)
    template.render([USER])
    monkeypatch.setattr(template_process, "PATIENCE_SECONDS", 2)
    os.kill(worker(template).pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(UnusableTemplateError, match="its process did not answer"):
        template.render([{"role": "user", "content": "x" * 500_000}])  # more than a pipe holds
    assert time.monotonic() - began < 20
    assert template.render([USER])


def test_a_template_that_cannot_be_started_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(BaseModelError, match="process of the chat template cannot be started: .*No such file"):
        ChatTemplate(CHATML).render([USER])


def test_the_process_ends_with_its_template():
    before = children()
    template = ChatTemplate(CHATML)
    template.render([USER])
    assert children() - before
    del template
    assert children() <= before


def test_nothing_is_started_before_it_is_needed():
    before = children()
    template = ChatTemplate(CHATML)
    assert children() <= before
    del template


@pytest.mark.parametrize("options", [[], ["-P"], ["-I"]])
def test_a_script_without_a_guard_is_run_once(tmp_path, options):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(SOURCES)!r}]\nfrom thimble.data.template import ChatTemplate\n"
        "print('begun')\nprint(ChatTemplate('{{ messages[0].content }}').render([{'role': 'user', 'content': 'Hi'}]))\n"
    )
    (tmp_path / "jinja2.py").write_text("raise SystemExit('this is not jinja2')")
    done = subprocess.run([sys.executable, *options, str(script)], cwd="/", capture_output=True, text=True, check=False)
    if options:
        assert (done.stdout, done.stderr) == ("begun\nHi\n", "")
    else:
        assert done.stdout.count("begun") == 1


def test_two_templates_and_many_threads_do_not_disturb_each_other():
    templates = [ChatTemplate(f"{number}{{{{ messages[0].content }}}}") for number in range(2)]
    wrong, threads = [], []

    def work(number):
        for turn in range(50):
            text = f"{number} {turn}"
            if templates[number % 2].render([{"role": "user", "content": text}]) != f"{number % 2}{text}":
                wrong.append(text)

    for number in range(6):
        threads.append(threading.Thread(target=work, args=(number,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert wrong == []


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


@functools.lru_cache(1)
def process_of(source):
    return TemplateProcess(source, {})


def ours(source, messages, tools=None, **more):
    process = process_of(source) if not more else TemplateProcess(source, more)
    asked = Asked({"conversations": [[messages, tools]], "wanted": [[0, len(messages), False]], "now": "2026-01-02"})
    process.ask(asked)
    ((kind, said),) = process.replies(asked)
    if kind != TEXT:
        raise DataError(said)
    return said


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


LONG = [SYSTEM, USER, ANSWER] + [USER, ANSWER] * 249


@pytest.mark.parametrize("source", LEGIT)
def test_a_template_that_means_well_writes_what_plain_jinja_writes(source):
    for messages in ([SYSTEM, USER, ANSWER], [SYSTEM, USER, ANSWER, CALL, RESULT, ANSWER], LONG):
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
    with pytest.raises(DataError, match=r"conversation of 2,000 messages and 72,100 bytes.*Shorten it"):
        ChatTemplate(source).render([{"role": "user", "content": "abc"}] * 2000)


def test_a_runaway_template_is_told_from_a_refusal_in_one_sentence():
    with pytest.raises(
        UnusableTemplateError, match=r"does what no template may: it takes more than .* Use a base"
    ) as caught:
        ChatTemplate("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}").render([USER])
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    "tag", ["{% include 'a' %}", "{% import 'a' as a %}", "{% from 'a' import b %}", "{% extends 'a' %}"]
)
def test_a_template_that_asks_for_another_file_is_refused(tag):
    with pytest.raises(BaseModelError, match=r"asks for another file.*line 2"):
        ChatTemplate("x\n" + tag).render([USER])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x" * 1_000_001, "has 1,000,001 characters: expected at most 1,000,000"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "maximum recursion depth exceeded"),
        ("{% for a in b %}" * 30 + "{% endfor %}" * 30, "not valid Jinja: too many statically nested blocks"),
        ("{{ x | random }}", "not valid Jinja: No filter named 'random'"),
    ],
)
def test_a_template_that_is_too_much_to_compile_is_refused(source, said):
    with pytest.raises(UnusableTemplateError, match=said):
        ChatTemplate(source).render([USER])


def test_a_long_refusal_is_shortened():
    with pytest.raises(DataError) as caught:
        ChatTemplate("{{ raise_exception('x' * 100000) }}").render([USER])
    assert len(str(caught.value)) < 1000


def test_the_texts_of_a_long_conversation_are_written_though_they_are_too_much_for_one_request():
    messages = [{"role": "user", "content": str(number % 10) * 9000} for number in range(100)]
    template, wanted = ChatTemplate(CHATML), [(number, False) for number in range(1, 101)]
    written = template.ask(messages, None, wanted)
    assert [len(written.text(prefix)) for prefix in wanted] == [9017 * number for number in range(1, 101)]


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
