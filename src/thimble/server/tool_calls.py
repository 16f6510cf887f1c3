"""Calls of tools in what a model writes: found while it comes, demanded by a grammar, and known to be readable at all.

Templates that know no tools are given them as `data/tool_text` writes them, with calls in `<tool_call>` blocks. Other
templates have a form of their own, and are only given tools if calls in it can be read back.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import llguidance

from thimble.core.metrics import parse_tool_calls
from thimble.data.template import ChatTemplate
from thimble.data.tool_text import call_text
from thimble.server.grammar import for_grammars, schema_options
from thimble.server.stop_text import StopText

OPENING, CLOSING = "<tool_call>", "</tool_call>"
_PROBE = {"name": "probe_call", "arguments": {"probe_key": "probe_value"}}
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_call",
        "description": "probe",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string"}}},
    },
}


class Call(NamedTuple):
    """A call that a model wrote."""

    name: str
    arguments: str  # JSON

    def as_sent(self, index: int | None = None) -> dict[str, Any]:
        """In OpenAI's form; in a chunk of a stream with its place among the calls."""
        function = {"name": self.name, "arguments": self.arguments}
        place = {} if index is None else {"index": index}
        return {**place, "id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


class CallForm(NamedTuple):
    """How a template writes a call: the text before and behind the JSON, and the name of the arguments in it."""

    before: str
    behind: str
    key: str  # `arguments` or `parameters`

    @property
    def has_mark(self) -> bool:
        """Whether a call has a mark that no other text has."""
        return OPENING in self.before


def call_form(template: ChatTemplate, special_tokens: Sequence[str]) -> CallForm | None:
    """How calls look for a base, found by having its template write one; None if that cannot be read back."""
    if not template.uses_tools:
        text = call_text({"content": "", "tool_calls": [{"function": _PROBE}]})
    else:
        asked = [{"role": "user", "content": "probe"}]
        call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": _PROBE}]}
        before = template.render(asked, [_PROBE_TOOL], add_generation_prompt=True)
        whole = template.render([*asked, call], [_PROBE_TOOL])
        text = whole.removeprefix(before) if whole.startswith(before) else whole[whole.rfind('{"name"') :]
    for token in special_tokens:  # a model writes them, but they are no text of an answer
        text = text.replace(token, "")
    found = re.search(r'(\{"name": ?"probe_call".*"probe_value"\}\})', text, re.DOTALL)
    if parse_tool_calls(text.strip()) != [_PROBE] or found is None:
        return None
    key = "parameters" if '"parameters"' in found[0] else "arguments"
    return CallForm(text[: found.start()].lstrip(), text[found.end() :].rstrip(), key)


def calls_grammar(tools: Sequence[Mapping[str, Any]], form: CallForm, is_single: bool, is_free: bool) -> str:
    """A grammar of calls of some tools, each `{"name": ..., "parameters": schema}`.

    It allows nothing else; or, if `is_free`, also text, but after the mark of a call only a valid one. Where no tool is
    `strict`, what no grammar can demand of a schema is left out.
    """
    is_strict = any(tool.get("strict") for tool in tools)
    alternatives = [
        {
            "type": "object",
            "properties": {"name": {"const": tool["name"]}, form.key: _parameters(tool, place, is_strict)},
            "required": ["name", form.key],
            "additionalProperties": False,
        }
        for place, tool in enumerate(tools)
    ]
    before, behind = (json.dumps(text) if text else "" for text in (form.before, form.behind))
    schema = {"anyOf": alternatives, "x-guidance": schema_options(is_strict)}
    rules = [f"body: %json {json.dumps(schema)}"]
    if is_free:  # a lazy lexeme ends where the mark does, so that no text can hold it
        rules += ["start: call* TEXT", f"call: mark body {behind}", f"mark[lazy]: TEXT {before}", r"TEXT: /(.|\n)*/"]
    else:
        more = "" if is_single or not form.has_mark else ' ("\\n" call)*'
        rules += [f"start: call{more}", f"call: {before} body {behind}"]
    return llguidance.LLMatcher.grammar_from_lark("\n".join(rules))


def _parameters(tool: Mapping[str, Any], place: int, is_strict: bool) -> Mapping[str, Any]:
    """The schema of the arguments, with a name of its own: what it refers to (`#/$defs/...`) is looked for inside.

    Its draft is left out, since older ones overlook a name beside a reference.
    """
    given = for_grammars(tool.get("parameters") or {"type": "object"}, is_strict)
    return {"$id": f"urn:tool:{place}", **{name: value for name, value in given.items() if name != "$schema"}}


class CallReader:
    """Splits what a model writes into text for the client and calls, each as soon as it is whole.

    A block that is no call, and JSON that is none, stays text.

    Args:
        names: Of the tools; JSON without a block around it has to name one of them.
        is_single: Whether to end with the first call.
    """

    def __init__(self, names: Sequence[str], is_single: bool = False) -> None:
        self._names, self._is_single = set(names), is_single
        self._before = StopText([OPENING])
        self._held = ""  # of a block that is open, or of an answer that began as JSON
        self._is_json = False
        self._has_begun = self._is_behind_call = False  # white space there belongs to no text
        self.is_over = False
        self.count = 0

    def add(self, text: str) -> tuple[str, list[Call]]:
        """What text and which calls there are by now."""
        if self.is_over or not text:
            return "", []
        if not self._has_begun:
            self._held += text
            if not self._held.strip():
                return "", []
            text, self._held, self._has_begun = self._held, "", True
            self._is_json = text.lstrip()[0] in "{["
        if self._is_json:
            self._held += text
            return "", []
        return self._split(text)

    def _split(self, text: str) -> tuple[str, list[Call]]:
        told, calls = "", []
        while text and not self.is_over:
            if not self._before.is_stopped:
                text = text.lstrip() if self._is_behind_call else text
                self._is_behind_call = self._is_behind_call and not text
                whole = self._before.pending + text
                told += self._before.add(text)
                if not self._before.is_stopped:
                    break
                text = whole[whole.index(OPENING) + len(OPENING) :]
            self._held += text
            block, closing, text = self._held.partition(CLOSING)
            if not closing:
                break
            self._held, self._before = "", StopText([OPENING])
            found = self._calls(OPENING + block + CLOSING)
            calls += found
            told += "" if found else OPENING + block + CLOSING
            self._is_behind_call = bool(found)
        return told, calls

    def end(self) -> tuple[str, list[Call]]:
        """What is left when nothing more comes."""
        if self.is_over:
            return "", []
        if self._is_json:
            calls = self._calls(self._held, are_named=True)
            return ("" if calls else self._held), calls
        if self._before.is_stopped:
            text = OPENING + self._held
            calls = self._calls(text)
            return ("" if calls else text), calls
        return self._before.end() + self._held, []

    def _calls(self, text: str, are_named: bool = False) -> list[Call]:
        found = parse_tool_calls(text.strip()) or []
        if are_named and not all(call["name"] in self._names for call in found):
            return []
        found = found[:1] if self._is_single else found
        self.is_over = bool(found) and self._is_single
        self.count += len(found)
        return [Call(call["name"], json.dumps(call["arguments"], ensure_ascii=False)) for call in found]
