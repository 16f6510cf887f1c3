"""Chat templates from untrusted sources that reach out, hang or fill the memory: each is stopped by an error of ours.

The payloads are by hand: the escapes known from other programs, and a bomb for every way to make much of little. The
rest is grown from a grammar of the same parts.
"""

import gc
import random
import re
import resource
import time
from dataclasses import dataclass

from stress import Line

LIMIT_SECONDS = 0.5  # of the processor's time, in this process
LIMIT_SECONDS_OF_TEMPLATE = 6.0  # in the template's: compiling, asking what it can do, and rendering, a second each
LIMIT_MEGABYTES, LIMIT_MEGABYTES_OF_TEMPLATE = 64.0, 400.0

_TWICE = "{% set n = namespace(a=X, b=X) %}{% for i in range(60) %}{% set n.a = STEP %}{% endfor %}"
_GROWN = _TWICE.replace("X", "[1]").replace("STEP", "[n.a, n.a]")  # written out: 2**60 numbers
_TUPLES = _TWICE.replace("X", "(1,)").replace("STEP", "(n.a, n.a)")
_DEEP = "{% set n = namespace(a=X) %}{% for i in range(100000) %}{% set n.a = STEP %}{% endfor %}"
_DEEP_TUPLE = _DEEP.replace("X", "(1,)").replace("STEP", "(n.a,)")
_DEEP_LIST = _DEEP.replace("X", "[1]").replace("STEP", "[n.a]")
_MEGA = "{% set t = 'abcdefghij' * 80000 %}"
_LETTERS = "{% set t = 'a' * 400000 %}"

# What template injections of other programs did: CVE-2024-34359, CVE-2024-56326, CVE-2025-27516, CVE-2026-5760 and kin.
ESCAPES = {
    "subclasses": "{% for c in ''.__class__.__base__.__subclasses__() %}{{ c.__name__ }}{% endfor %}",
    "warning": "{% for x in ().__class__.__base__.__subclasses__() %}{% if 'warning' in x.__name__ %}"
    "{{ x()._module.__builtins__['__import__']('os').popen('id').read() }}{% endif %}{% endfor %}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "joiner": "{{ joiner.__init__.__globals__.os.system('id') }}",
    "namespace": "{{ namespace.__init__.__globals__.os.system('id') }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "self": "{{ self.__init__.__globals__.__builtins__.__import__('os').system('id') }}",
    "self context": "{{ self._TemplateReference__context.environment }}",
    "raise_exception": "{{ raise_exception.__globals__['__builtins__']['eval']('1') }}",
    "strftime_now": "{{ strftime_now.__self__.__class__ }}{{ strftime_now.__closure__ }}",
    "range": "{{ range.__globals__ }}",
    "dict": "{{ dict.__globals__ }}{{ dict.__base__ }}",
    "dict fromkeys": "{{ dict.fromkeys([1]).__class__ }}",
    "format": "{{ '{0.__class__.__base__}'.format(1) }}",
    "format of a function": "{{ '{0.__globals__}'.format(raise_exception) }}",
    "format_map": "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "format kept": "{% set f = '{0.__class__.__mro__}'.format %}{{ f(1) }}",
    "format mapped": "{{ ['{0.__class__}'.format]|map('call')|list }}",
    "format by attr": "{{ ('{0.__class__.__init__}'|attr('format'))(1) }}",
    "format_map by attr": "{{ ('{x.__class__}'|attr('format_map'))({'x': 1}) }}",
    "format of a mapped attribute": "{{ (['{0.__class__}']|map(attribute='format')|first)(1) }}",
    "format of marked text": "{{ ('{0.__class__}'|safe).format(1) }}",
    "format in a loop": "{% for f in ['{0.__class__.__mro__[1]}'.format] %}{{ f(1) }}{% endfor %}",
    "attr": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "attr escaped": "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "item": "{{ ''['__class__']['__mro__'][1]['__subclasses__']() }}",
    "item escaped": "{{ ''['\\x5f\\x5fclass\\x5f\\x5f'] }}",
    "item joined": "{{ ''['__cla' ~ 'ss__'] }}",
    "mapped attribute": "{{ ['']|map(attribute='__class__.__base__')|list }}",
    "grouped attribute": "{{ ['']|groupby('__class__') }}",
    "selected attribute": "{{ ['']|selectattr('__class__')|list }}",
    "summed attribute": "{{ ['']|sum(attribute='__class__') }}",
    "joined attribute": "{{ ['']|join(attribute='__class__.__init__.__globals__') }}",
    "generator": "{{ (x for x in y).gi_frame }}",
    "generator of a filter": "{{ ([1]|map('string')).gi_frame.f_back.f_globals }}",
    "generator of a filter, code": "{{ ([1]|select).gi_code.co_consts }}",
    "macro": "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "macro environment": "{% macro m() %}{% endmacro %}{{ m._environment.loader }}{{ m.__init__ }}",
    "caller": "{% macro m() %}{{ caller.__class__.__init__.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "loop": "{% for x in [1] %}{{ loop._iterator.gi_frame }}{{ loop.__init__.__globals__ }}{% endfor %}",
    "namespace attribute": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__init__.__globals__ }}",
    "namespace by pairs": "{% set ns = namespace({'__class__': 1}) %}{{ ns.__class__ }}",
    "exception": "{{ raise_exception(''.__class__) }}",
    "undefined": "{{ nothing.__class__.__init__.__globals__ }}",
    "environment": "{{ environment.from_string('{{ 1 }}') }}",
    "context": "{{ context.environment.globals }}{{ request.application.__globals__ }}",
    "config": "{{ config.__class__.from_envvar.__globals__ }}{{ get_flashed_messages.__globals__ }}",
    "append": "{{ messages.append({'role': 'user'}) }}",
    "clear": "{{ messages[0].clear() }}",
    "update": "{{ messages[0].update(role='x') }}",
    "pop": "{{ messages.pop() }}{{ messages[0].pop('role') }}",
    "setdefault": "{{ messages[0].setdefault('a', 1) }}",
    "sort in place": "{{ messages.sort() }}{{ messages.reverse() }}",
    "encode": "{{ 'x'.encode('utf-16').__class__ }}{{ 'x'.encode('idna') }}",
    "translate": "{{ 'abc'.translate({97: 'x' * 99}) }}{{ 'x'.maketrans('a', 'b') }}",
    "bytes": "{{ (1).to_bytes(1000000000, 'big') }}{{ (1).from_bytes }}",
    "include": "{% include '/etc/passwd' %}",
    "include what is missing": "{% include ['a', 'b'] ignore missing %}",
    "import": "{% import 'os' as os %}{{ os.system('id') }}",
    "import from": "{% from 'os' import system %}{{ system('id') }}",
    "extends": "{% extends 'base.html' %}",
    "extends with blocks": "{% extends messages %}{% block a %}{% endblock %}",
    "autoescape": "{% autoescape true %}{{ '<' * 10 }}{% endautoescape %}",
    "debug": "{% debug %}",
    "do": "{% do messages.append(1) %}",
    "inner filter": "{{ [-1000000000]|map('=spend')|list }}",
    "inner filter counts": "{% for x in [[1, 2]]|map('=count', -1000000) %}{{ x }}{% endfor %}",
}

# Ways to hang or to fill the memory.
BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over text": _LETTERS + "{% for a in t %}{% for b in t %}{% endfor %}{% endfor %}",
    "loops over lists": _LETTERS + "{% set l = t|list %}{% for a in l %}{% for b in l %}{% endfor %}{% endfor %}",
    "loops that select": _LETTERS + "{% for a in t if a == 'b' %}{% endfor %}{% for a in t for b in t %}{% endfor %}",
    "loops that set": "{% set n = namespace(a=0) %}{% for a in range(9999999) %}{% set n.a = n.a + 1 %}{% endfor %}",
    "a loop that calls itself": "{% for a in [[1]] recursive %}{{ loop([[1], [1]]) }}{% endfor %}",
    "a loop of ranges": "{% for a in range(100000) recursive %}{{ loop(range(100000)) }}{% endfor %}",
    "a wide loop body": "{% for a in range(999999) %}" + "{% set x = {} %}" * 1500 + "{% endfor %}",
    "lists that are kept": "{% set n = namespace(l=[]) %}{% for a in range(99999) %}{% set n.l = [n.l"
    + ", {}" * 2000
    + "] %}{% endfor %}",
    "lists that grow": "{% set n = namespace(l=[]) %}{% for a in range(99999) %}{% set n.l = n.l + [a] %}{% endfor %}",
    "range": "{{ range(10**18)|list|length }}",
    "range in text": "{{ range(0, 999999)|string }}{{ range(999999)|list }}",
    "range of large steps": "{{ range(0, 10**15 * 2305843, 2305843009213693951)|unique|list|length }}",
    "range spread": "{{ cycler(*range(999999)).next() }}{{ dict(*range(999999)) }}",
    "range sought": "{% for a in range(999999) %}{{ -1 in range(999999) }}{% endfor %}",
    "range in a range": "{{ range(999999)|map('string')|map('length')|select('gt', 99)|list }}" * 30,
    "+ doubled": _TWICE.replace("X", "'x'").replace("STEP", "n.a + n.a") + "{{ n.a|length }}",
    "~ doubled": _TWICE.replace("X", "'x'").replace("STEP", "n.a ~ n.a") + "{{ n.a|length }}",
    "~ many": _MEGA + "{{ (" + "~".join("t" * 500) + ")|length }}",
    "+ of lists": _TWICE.replace("X", "[1]").replace("STEP", "n.a + n.a"),
    "+ of tuples": _TWICE.replace("X", "(1,)").replace("STEP", "n.a + n.a"),
    "+ of marked text": _TWICE.replace("X", "'<'|safe").replace("STEP", "n.a + '<' * 100000"),
    "set blocks doubled": _TWICE.replace(
        "{% set n.a = STEP %}", "{% set y %}{{ n.a }}{{ n.a }}{% endset %}{% set n.a = y %}"
    ).replace("X", "'xx'"),
    "set blocks of constants": "{% set y %}{% for a in range(999999) %}" + "x" * 100000 + "{% endfor %}{% endset %}",
    "set blocks of a filter": "{% set y | upper %}{% for a in range(999999) %}"
    + "x" * 9999
    + "{% endfor %}{% endset %}",
    "filter blocks": "{% filter upper %}{% for a in range(999999) %}" + "x" * 9999 + "{% endfor %}{% endfilter %}",
    "blocks by name": "{% block b %}{% for a in range(9999) %}"
    + "x" * 9999
    + "{% endfor %}{% endblock %}{{ self.b() }}",
    "blocks that call themselves": "{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}",
    "macros in macros": "".join(
        f"{{% macro m{i}() %}}{f'{{{{ m{i - 1}() }}}}' * 10 if i else 'x'}{{% endmacro %}}" for i in range(12)
    )
    + "{{ m11() }}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{% set a = m(n - 1) %}"
    "{% set b = m(n - 1) %}{% endif %}"
    "{% endmacro %}{{ m(60) }}",
    "macros by their caller": "{% macro m(n) %}{% if n %}{% call m(n - 1) %}{{ caller() }}{{ caller() }}{% endcall %}"
    "{% endif %}{{ caller() }}{% endmacro %}{% call m(60) %}x{% endcall %}",
    "macros of constants": "{% macro m() %}" + "x" * 90000 + "{% endmacro %}{% for a in range(9999) %}{% set y = m() %}"
    "{% endfor %}",
    "wide macros": "{% macro m() %}" + "{% set x = [1] %}" * 1500 + "{% endmacro %}"
    "{% for a in range(999999) %}{{ m() }}{% endfor %}",
    "output": "{% for a in range(1000) %}{% for b in range(900) %}0123456789{% endfor %}{% endfor %}",
    "text": "{{ 'a' * 10**9 }}",
    "text of a list": "{{ ([0] * 10**9)|length }}",
    "text of the left": "{{ 10**9 * 'a' }}",
    "powers": "{{ 10 ** 1000 }}",
    "powers of powers": "{{ 9 ** 9 ** 9 ** 9 }}",
    "products": _TWICE.replace("X", "10").replace("STEP", "n.a * n.a"),
    "large numbers": "{{ 0x" + "f" * 100000 + " % 7 }}",
    "numbers of text": _LETTERS + "{{ ('f' * 400000)|int(base=16) % 7 }}{{ ('9' * 400000)|int }}",
    "rounds": "{{ 5|round(-1000000000) }}",
    "rounds up": "{{ 5|round(1000000000, 'ceil') }}",
    "rounds text": "{{ 'abc'|round(8, 'floor') }}",
    "center": "{{ 'a'|center(10**9) }}",
    "center at compile time": "{{ 'a'|center(1000000000) }}",
    "center, method": "{{ 'a'.center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "rjust": "{{ 'a'.rjust(1000000000, '…') }}",
    "zfill": "{{ '1'.zfill(1000000000) }}",
    "expandtabs": "{{ '\\t'.expandtabs(1000000000) }}",
    "indent": "{{ 'a\\na'|indent(1000000000) }}",
    "indent by text": _MEGA + "{{ ('\\n' * 400000)|indent(t, true, true) }}",
    "indent of lines": "{{ ('a\\n' * 100000)|indent(100000) }}",
    "printf": "{{ '%1000000000d'|format(1) }}",
    "printf, precision": "{{ '%.1000000000f'|format(1) }}",
    "printf, stars": "{{ '%*d' % (1000000000, 1) }}",
    "printf, operator": "{{ '%1000000000s' % 'x' }}",
    "printf, keys": "{{ '%(a(b))1000000000d' % {'a(b)': 1} }}",
    "printf, keys again": _MEGA + "{{ ('%(a)s' * 1000) % {'a': t} }}",
    "printf, many": "{{ ('%999d' * 100000) % (range(100000)|list) }}",
    "printf, odd": "{{ '%1000000000d' is odd }}{{ '%1000000000d' is even }}",
    "printf, divisible": "{{ '%1000000000d' is divisibleby 3 }}",
    "printf, selected": "{{ ['%1000000000d']|select('odd')|list }}",
    "printf, unclosed": "{{ ('%(' * 100000) % {} }}",
    "printf, repr": _MEGA + "{{ '%r%a' % (t, '\\U0001f600' * 400000) }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "format, nested": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format, precision": "{{ '{:.1000000000f}'.format(1.5) }}",
    "format, many": _MEGA + "{{ ('{0}' * 1000).format(t)|length }}",
    "format, fields": "{{ ('{0:>999}' * 100000).format(1)|length }}",
    "format, repr": _GROWN + "{{ '{!r}'.format(n.a) }}",
    "replace": "{{ ('a' * 10000)|replace('a', 'b' * 100000) }}",
    "replace, empty": "{{ ('a' * 100000).replace('', 'b' * 100000)|length }}",
    "replace, chained": "{{ 'a'" + ".replace('a', 'aaaaaaaaaa')" * 12 + "|length }}",
    "join": "{{ (range(100000)|list)|join('x' * 100000) }}",
    "join, method": "{{ ('x' * 100000).join(('a' * 100000)|list)|length }}",
    "join of what grows": _GROWN + "{{ [n.a, n.a]|join }}",
    "capitals": "{% for a in range(9999) %}{{ ('ΐ' * 400000)|upper|length }}{% endfor %}",
    "titles": _LETTERS + "{{ ('a ' * 400000)|title|length }}",
    "split": "{{ ('a b ' * 200000).split()|length }}{{ ('ab' * 400000).split('a')|length }}" * 9,
    "split into lines": "{{ ('\\n' * 900000).splitlines()|length }}" * 9,
    "search backwards": "{{ ('a' * 800000).rfind('b' + 'a' * 400000) }}",
    "search backwards, split": "{{ ('a' * 800000).rsplit('a' * 200000 + 'b' + 'a' * 200000)|length }}",
    "searches": "{% for a in range(999999) %}{{ 'b' * 90 in 'a' * 400000 }}{% endfor %}",
    "strip": _LETTERS
    + "{% for a in range(999) %}{{ t.strip('bcdefghijklmnopqrstuvwxyz' * 9999 + 'a')|length }}{% endfor %}",
    "starts": _LETTERS + "{% for a in range(9999999) %}{{ t.startswith((t, t, t)) }}{% endfor %}",
    "equal texts": "{% set s = 'a' * 400000 %}"
    + _LETTERS
    + "{% for a in range(9999999) %}{% if s == t %}{% endif %}{% endfor %}",
    "equal to what grows": _GROWN + "{% set m = namespace(a=[1]) %}{% for i in range(60) %}{% set m.a = [m.a, m.a] %}"
    "{% endfor %}{{ n.a == m.a }}",
    "in what grows": _GROWN + "{{ 1 in n.a }}{{ [1] in n.a }}{{ n.a in [n.a ~ ''] }}",
    "text of what grows": _GROWN + "{{ n.a }}",
    "JSON of what grows": _GROWN + "{{ n.a|tojson }}",
    "pprint of what grows": _GROWN + "{{ n.a|pprint }}",
    "string of what grows": _GROWN + "{{ n.a|string }}",
    "sort of what grows": _GROWN + "{{ [n.a, n.a]|sort }}{{ [n.a]|max }}",
    "index of what grows": _GROWN + "{{ [1].index(n.a) }}",
    "refusal of what grows": _GROWN + "{{ raise_exception(n.a) }}",
    "name of what grows": _GROWN + "{{ messages[n.a] }}",
    "map of what grows": _GROWN + "{{ [1]|map(n.a)|list }}",
    "changed of what grows": _GROWN + "{% for x in [1, 2] %}{{ loop.changed(n.a) }}{% endfor %}",
    "namespaces that grow": "{% set n = namespace(a=1) %}{% for i in range(60) %}"
    "{% set n.a = namespace(a=n.a, b=n.a) %}"
    "{% endfor %}{{ n }}",
    "a namespace in itself": "{% set n = namespace() %}{% set n.a = n %}{{ n }}",
    "hash of tuples that grow": _TUPLES + "{{ {n.a: 1} }}",
    "hash of tuples, item": _TUPLES + "{{ messages[0][n.a] }}",
    "hash of tuples, get": _TUPLES + "{{ messages[0].get(n.a) }}",
    "hash of tuples, unique": _TUPLES + "{{ [n.a, n.a]|unique|list }}",
    "hash of tuples, in": _TUPLES + "{{ n.a in messages[0] }}",
    "hash of tuples, map": _TUPLES + "{{ [1]|map(n.a)|list }}{{ [1]|select(n.a)|list }}",
    "hash of tuples, dict": _TUPLES + "{{ dict([(n.a, 1)]) }}",
    "hash of deep tuples": _DEEP_TUPLE + "{{ {n.a: 1} }}",
    "hash of deep tuples, item": _DEEP_TUPLE + "{{ messages[0][n.a] }}",
    "hash of deep tuples, unique": _DEEP_TUPLE + "{{ [n.a]|unique|list }}",
    "text of deep lists": _DEEP_LIST + "{{ n.a }}{{ n.a|tojson }}",
    "sort of deep lists": _DEEP_LIST + "{{ [n.a, [n.a]]|sort }}",
    "keys that collide": "{% set m = 2305843009213693951 %}{% set n = namespace(l=[]) %}{% for i in range(20000) %}"
    "{% set n.l = n.l + [(i * m, 1)] %}{% endfor %}{{ dict(n.l)|length }}",
    "keys that collide, unique": "{% set m = 2305843009213693951 %}{% set n = namespace(l=[]) %}"
    "{% for i in range(9999) %}"
    "{% set n.l = [i * m] + n.l %}{% endfor %}{{ n.l|unique|list|length }}",
    "JSON with an indent": "{{ [[[1]]]|tojson(indent=1000000000) }}",
    "JSON with an indent of text": _MEGA + "{{ [[[1, 2], 3], 4]|tojson(indent=t) }}",
    "JSON with separators": _MEGA + "{{ (range(10000)|list)|tojson(separators=(t, t)) }}",
    "JSON in JSON": "{% set n = namespace(a='\"') %}{% for i in range(60) %}{% set n.a = n.a|tojson %}{% endfor %}",
    "JSON of control characters": "{{ ('\\x01' * 900000)|tojson(ensure_ascii=true)|length }}" * 9,
    "sort": "{{ range(999999)|sort(reverse=true)|length }}",
    "sort by a long name": "{{ (range(100000)|list)|sort(attribute='a.' * 10000) }}",
    "map by a long name": "{{ (range(100000)|list)|map(attribute='a.' * 100000)|list }}",
    "sum of lists": "{{ [[1] * 1000] * 10000|sum(start=[]) }}{{ ([[1] * 1000] * 10000)|sum(start=[])|length }}",
    "batch": "{{ [1]|batch(1000000000, 'x')|list|length }}",
    "batch of nothing": "{{ range(999999)|batch(1)|map('list')|list|length }}",
    "slice": "{{ [1]|slice(1000000000)|list|length }}",
    "slice, filled": "{% for x in [1]|slice(1000000000, 'x') %}{% endfor %}",
    "slices": _MEGA + "{% for a in range(999999) %}{% set x = t[1:] %}{% endfor %}",
    "slices that are kept": _MEGA
    + "{% set n = namespace(l=[]) %}{% for a in range(9999) %}{% set n.l = n.l + [t[a:]] %}"
    "{% endfor %}",
    "reversed": _MEGA + "{% for a in range(999999) %}{% set x = t|reverse %}{% endfor %}",
    "groupby": "{{ range(999999)|groupby('real')|length }}",
    "wordwrap": "{{ ('a' * 400000)|wordwrap(1) }}",
    "wordwrap with long ends": "{{ ('a ' * 9000)|wordwrap(1, wrapstring='x' * 100000) }}",
    "wordcount": _MEGA + "{% for a in range(9999) %}{{ t|wordcount }}{% endfor %}",
    "pprint": "{{ range(99999)|list|pprint }}{{ messages|pprint }}",
    "truncate": _MEGA + "{{ t|truncate(900000, end=t) }}{% for a in range(9999) %}{{ t|truncate(9) }}{% endfor %}",
    "escape": "{{ ('<' * 900000)|escape|escape|escape|escape|length }}",
    "striptags": "{{ ('<!---->' * 100000)|striptags }}",
    "urlize": "{{ ('www.' * 100000)|urlize }}",
    "xmlattr": "{{ {'a': 'b' * 900000}|xmlattr }}",
    "lipsum": "{{ lipsum(n=100000000) }}",
    "random": "{{ range(999999)|random }}",
    "cycler": "{% set c = cycler('a', 'b') %}{% for a in range(9999999) %}{% set x = c.next() %}{% endfor %}",
    "joiner": "{% set j = joiner('x' * 100000) %}{% for a in range(9999999) %}{% set x = j() %}{% endfor %}",
    "dates": "{{ strftime_now('%Y' * 1000000) }}",
    "dates of a width": "{{ strftime_now('%1000000000Y') }}",
    "dates in a loop": "{% for a in range(9999999) %}{% set x = strftime_now('%c' * 90) %}{% endfor %}",
    "a filter that never finds": "{{ range(999999)|select('gt', 9999999)|first }}" * 9,
    "filters in filters": "{{ range(999999)" + "|map('string')|map('int')" * 50 + "|list|length }}",
    "length of a loop": "{% for a in range(999999)|map('string') %}{{ loop.length }}{% endfor %}",
    "variables of a loop": "{% for a in range(9999) %}{% block b scoped %}{% endblock %}{% endfor %}",
    "a deep expression": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a long sum": "{{ 1" + " + 1" * 5000 + " }}",
    "a long product": "{{ 1" + " * 1" * 5000 + " }}",
    "many nots": "{{ " + "not " * 9000 + "1 }}",
    "many minuses": "{{ " + "-" * 9000 + "1 }}",
    "deep ifs": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "deep loops": "{% for a in [1, 2] %}" * 30 + "x" + "{% endfor %}" * 30,
    "deep lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "many elifs": "{% if 0 %}" + "{% elif 0 %}" * 2000 + "{% endif %}",
    "long attributes": "{{ messages" + ".a" * 3000 + " }}",
    "many words": "{{ a }}" * 100000,
    "much text": "x" * 2000000,
    "a long name": "{{ " + "a" * 500000 + " }}",
    "a long number": "{{ " + "1" * 100000 + " }}",
    "unclosed": "{{ '" + "a" * 500000,
    "unclosed raw": "{% raw %}" * 5000,
    "unclosed comments": "{#" * 100000,
    "a slice of slices": "{{ messages[1:2, 3:4] }}",
    "infinity": "{{ 1e999 }}{{ 1e999|int }}{{ -1e999|round }}",
    "keywords": "{{ dict(**{1: 2}) }}{{ namespace(**range(9)) }}",
    "null characters": "{{ '\\x00' }}\x00{{ '\\ud800' }}",
}
PAYLOADS = ESCAPES | {f"{name}, as a bomb" if name in ESCAPES else name: source for name, source in BOMBS.items()}

CONVERSATION = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi, how is the weather?"}]


@dataclass
class Outcome:
    """What came of a template.

    Attributes:
        is_stopped: Whether one of our errors stopped it.
        said: The error or the text.
        wrong: What should not have happened, if anything.
    """

    is_stopped: bool = False
    said: str = ""
    wrong: str = ""


def try_template(source: str) -> Outcome:
    """Render a short conversation; the process of the template ends with that."""
    from thimble.data.template import ChatTemplate
    from thimble.errors import BaseModelError, DataError

    ours, theirs, outcome = time.process_time(), _seconds_of_children(), Outcome()
    template = None
    try:
        template = ChatTemplate(source, "<s>", "</s>")
        outcome.said = template.render(CONVERSATION)
    except (BaseModelError, DataError) as error:
        outcome.is_stopped, outcome.said = True, str(error)
    except BaseException as error:
        outcome.wrong = f"{type(error).__name__}: {error}"
    del template
    ours, theirs = time.process_time() - ours, _seconds_of_children() - theirs
    if ours > LIMIT_SECONDS or theirs > LIMIT_SECONDS_OF_TEMPLATE:
        outcome.wrong = f"took {ours:.1f} s here and {theirs:.1f} s in the process of the template"
    return outcome


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def peak_megabytes(who: int = resource.RUSAGE_SELF) -> float:
    return resource.getrusage(who).ru_maxrss / 1000


def hostile_templates(count: int) -> Line:
    """All payloads, and as many grown templates as are missing to `count`."""
    began, dice, stopped, wrong = time.perf_counter(), random.Random(0), 0, 0
    try_template("warm")
    gc.collect()
    before = peak_megabytes()
    for number in range(count):
        name, source = _nth(number, dice)
        outcome = try_template(source)
        stopped += outcome.is_stopped
        if peak_megabytes() > before + LIMIT_MEGABYTES:
            outcome.wrong, before = f"memory grew to {peak_megabytes():.0f} MB", peak_megabytes()
        if outcome.wrong:
            wrong += 1
            print("   ", name, outcome.wrong[:200], source[:2000] if number >= len(PAYLOADS) else "")
    theirs = peak_megabytes(resource.RUSAGE_CHILDREN)
    wrong += theirs > LIMIT_MEGABYTES_OF_TEMPLATE
    note = f"{stopped} stopped, the others harmless; peak memory of a template's process {theirs:.0f} MB"
    return Line("hostile chat templates", count, wrong, time.perf_counter() - began, note)


def _nth(number: int, dice: random.Random) -> tuple[str, str]:
    return list(PAYLOADS.items())[number] if number < len(PAYLOADS) else (f"grown {number}", grown_template(dice))


# --- templates from a grammar: T is a text, N a number, L a list, D a dict, A any of them


def _listed(block: str) -> list[str]:
    """Patterns that stand with two spaces or a line's end between them."""
    return re.split(r"\s{2,}", block.strip())


_LEAVES = {
    "T": _listed(
        r"""
        'x'  'ab\n'  'ΐ😀'  '%s %5d'  '{} {:>9}'  n.t  n.t  'ab' * 9999  '\n' * 9999  bos_token  messages[0].content
        '%999d'  '<é>'|safe
        """
    ),
    "N": _listed(
        r"""
        0  1  -1  7  60  999  100000  10**9  1.5  1e308  2305843009213693951  n.n  n.n  i
        """
    ),
    "L": _listed(
        r"""
        []  [1, 'a']  n.l  n.l  messages  range(9)  range(9999)  (1, 2)  [n.l, n.l]
        """
    ),
    "D": _listed(
        r"""
        {}  {'a': 1}  n.d  messages[0]  messages[-1]
        """
    ),
}
_GROWS = {
    "T": _listed(
        r"""
        (T + T)  (T + T + T)  (T ~ A)  (T * N)  (T % A)  (T % (A, A))  T[N:N]  T[::-1]  A|string  A|tojson
        A|tojson(indent=N)  L|join(T)  T.join(L)  L|map('string')|join  T|upper  T|title  T|trim  T|trim(T)  T|center(N)
        T|indent(N)  T|indent(T, true)  T|replace(T, T)  T.replace(T, T)  T|truncate(N)  T.format(A, A)  T.format(*L)
        T|format(A)  T.zfill(N)  T.ljust(N)  T.strip(T)  T|escape  T|wordwrap(N)  A|pprint  T.split(T)[N]
        T.rsplit(T)|last  m(A)  m(m(A))  (T if A else T)  strftime_now(T)  T.partition(T)[-1]  T|reverse
        T.splitlines()|first  T|capitalize  D.role  n|string
        """
    ),
    "N": _listed(
        r"""
        (N + N)  (N - N)  (N * N)  (N ** N)  (N // N)  (N % N)  (N / N)  A|length  T.find(T)  T.rfind(T)  T.count(T)
        T|int  T|int(N, N)  T|float  N|round(N)  N|round(N, 'ceil')  N|abs  L|sum  L|max  T|wordcount  L.index(A)
        (A == A)|int  (A in L)|int  (T in T)|int  (A < A)|int  (A is odd)|int
        """
    ),
    "L": _listed(
        r"""
        [A, A]  [A]  (A, A)  (L + L)  (L * N)  T|list  L|list  range(N)  range(N, N, N)  L[N:N]  T.split()  T.split(T)
        T.splitlines()  L|sort  L|sort(attribute=T)  L|reverse|list  L|unique|list  L|batch(N)|list  L|batch(N, A)|list
        L|slice(N)|list  L|map('string')|list  L|map('length')|list  L|map(attribute=T)|list  L|select('eq', A)|list
        L|reject('in', L)|list  L|selectattr(T)|list  D.items()|list  D|dictsort  L|groupby(N)  L|groupby(T)
        D.keys()|list  D.values()|list  L|map('upper')|map('list')|list  L|sum(start=L)  L|map('replace', T, T)|list
        dict(D).items()  [n.l, n.l]  [n.l, n]
        """
    ),
    "D": _listed(
        r"""
        {T: A}  {A: A}  {(A, A): A}  dict(a=A)  dict(D, b=A)  dict(L|batch(2))  D.copy()  {'a': D, 'b': D}
        """
    ),
}
_STATEMENTS = _listed(
    r"""
        {{ A }}  {{ T }}  {% set n.t = T %}  {% set n.n = N %}  {% set n.l = L %}  {% set n.d = D %}
        {% set n.t = n.t + n.t %}  {% set n.l = [n.l, n.l] %}  {% set n.l = n.l + n.l %}  {% for i in L %}S{% endfor %}
        {% for i in range(N) %}S{% endfor %}  {% for i in T if A %}S{% endfor %}
        {% for i in L recursive %}S{{ loop(L) }}{% endfor %}
        {% for i in L %}{{ loop.length }}S{% if loop.last %}{% break %}{% endif %}{% endfor %}
        {% if A %}S{% else %}S{% endif %}  {% set t %}S{% endset %}{% set n.t = t %}  {% set t | upper %}S{% endset %}
        {% filter trim %}S{% endfilter %}  {% macro m(a=T, i=N) %}S{% endmacro %}
        {% macro m(a=A, i=0) %}S{{ m(N) }}{% endmacro %}  {% call m(A) %}S{% endcall %}
        {% for i in range(60) %}S{% endfor %}
    """
)
_HEAD = (
    "{% set i = 0 %}{% macro m(a, i=0) %}{{ a }}{% endmacro %}"
    "{% set n = namespace(t='xy', n=2, l=[1, 2], d={'a': 1}) %}"
)
_HOLE = re.compile(r"\b[TNLDAS]\b")


def grown_template(dice: random.Random) -> str:
    """A template of random statements, with a namespace and a macro at hand."""
    return _HEAD + "".join(_filled(dice, "S", 4) for _ in range(dice.randint(1, 6)))


def _filled(dice: random.Random, kind: str, depth: int) -> str:
    if kind == "S":
        pattern = dice.choice(_STATEMENTS if depth > 1 else _STATEMENTS[:9])
    else:
        kind = dice.choice("TNLD") if kind == "A" or dice.random() < 0.03 else kind
        pattern = dice.choice(_GROWS[kind] if depth > 0 and dice.random() < 0.7 else _LEAVES[kind])
    return _HOLE.sub(lambda hole: _bracketed(_filled(dice, hole[0], depth - 1), hole[0]), pattern)


def _bracketed(text: str, kind: str) -> str:
    return text if kind == "S" or text.isalnum() else f"({text})"
