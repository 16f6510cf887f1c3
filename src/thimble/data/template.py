"""Conversation to text, by the Jinja chat template that came with the base.

A template is a program from an untrusted source: it runs in a sandbox, with its work, its time and its output bounded.
What templates differ in (a system role, tools, the form of a call's arguments) is found by trying, not by reading them.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from thimble.data.sandbox.budget import MAX_CHARACTERS, Budget, RunawayTemplateError
from thimble.data.sandbox.environment import compile_template, shortened
from thimble.data.tool_text import write_tools
from thimble.errors import BaseModelError, DataError

Message = Mapping[str, Any]

_USER, _SYSTEM, _RESULT = "probe user text", "probe system text", "probe result text"
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "probe description",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string"}}, "required": ["probe_key"]},
    },
}


class ChatTemplate:
    """One chat template; rendering is deterministic, the date included."""

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "", *, now: datetime | None = None) -> None:
        """Compile a template.

        Args:
            source: Jinja source.
            bos_token: Text of the token that begins a document, for templates that write it.
            eos_token: Text of the token that ends one.
            now: The time a template may ask for; fixed, so that all rows of a run agree.

        Raises:
            BaseModelError: If the source is not valid Jinja, too long, or asks for other files.
        """
        self.source = source
        self._now = now or datetime.now()
        self._context = {"bos_token": bos_token, "eos_token": eos_token}
        self._template = compile_template(source, self._now)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """Write a conversation as the text the base was trained on.

        Args:
            messages: Conversation in OpenAI form; arguments of calls as objects.
            tools: Tool definitions in OpenAI form, or None.
            add_generation_prompt: Whether to end with the beginning of an assistant turn.

        Returns:
            The text, special tokens written out.

        Raises:
            DataError: If the template refuses this conversation, with its own words.
            BaseModelError: If the template itself goes wrong.
        """
        messages = _complete(messages)
        has_tools = tools or any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
        if has_tools and not self.uses_tools:
            messages, tools = write_tools(messages, tools), None
        if not self.takes_system:
            messages = _fold_system(messages)
        if not (has_tools and self.uses_tools):
            return self._run(messages, None, add_generation_prompt)
        messages = self._with_arguments(messages)
        try:
            return self._run(messages, tools, add_generation_prompt)
        except DataError:
            # Mistral's templates refuse the ids other services give to calls; any id will do.
            return self._run(_renumber(messages), tools, add_generation_prompt)

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether the template has a place for a system message."""
        conversation = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}]
        return _SYSTEM in self._try(conversation)

    @functools.cached_property
    def uses_tools(self) -> bool:
        """Whether the template writes tool definitions, calls and results by itself."""
        return self._argument_form is not None

    @functools.cached_property
    def default_system(self) -> str | None:
        """The system prompt the template adds when a conversation has none."""
        if not self.takes_system:
            return None
        user = {"role": "user", "content": _USER}
        explicit = self._try([{"role": "system", "content": _SYSTEM}, user])
        before, _, rest = explicit.partition(_SYSTEM)
        after = rest.partition(_USER)[0]
        opening = self.opening
        if len(opening) < len(before) + len(after) or not (opening.startswith(before) and opening.endswith(after)):
            return None
        return opening[len(before) : len(opening) - len(after)].strip() or None

    @functools.cached_property
    def opening(self) -> str:
        """What the template writes before the first user text of a conversation without a system message."""
        return self._try([{"role": "user", "content": _USER}]).partition(_USER)[0]

    @functools.cached_property
    def uses_date(self) -> bool:
        """Whether what the template writes depends on the day."""
        if "strftime_now" not in self.source:
            return False
        other = ChatTemplate(self.source, **self._context, now=datetime(1999, 1, 2))
        return other.opening != self.opening

    @functools.cached_property
    def _argument_form(self) -> type | None:
        """dict or str, the form in which the template wants a call's arguments; None if it knows no tools."""
        for form in (dict, str):
            arguments: Any = {"probe_key": "probe_value"}
            call = {"name": "probe_call", "arguments": arguments if form is dict else json.dumps(arguments)}
            conversation = [
                {"role": "user", "content": _USER},
                {"role": "assistant", "content": "", "tool_calls": [_call(call, 0)]},
                {"role": "tool", "name": "probe_call", "tool_call_id": _call_id(0), "content": _RESULT},
            ]
            text = self._try(conversation, [_TOOL])
            wanted = ("probe description", "probe_call", "probe_value", _RESULT)
            if all(word in text for word in wanted) and "{'probe_key'" not in text and '\\"probe_key' not in text:
                return form
        return None

    def _with_arguments(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        if self._argument_form is dict:
            return [dict(message) for message in messages]
        written = []
        for message in messages:
            calls = message.get("tool_calls")
            if calls:
                functions = (dict(call["function"]) for call in calls)
                texts = [f | {"arguments": json.dumps(f["arguments"], ensure_ascii=False)} for f in functions]
                calls = [{**call, "function": text} for call, text in zip(calls, texts, strict=True)]
            written.append({**message, "tool_calls": calls} if calls else dict(message))
        return written

    def _try(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        try:
            return self._run(messages, tools, False)
        except RunawayTemplateError:
            raise
        except (DataError, BaseModelError):
            return ""

    def _run(self, messages: Sequence[Message], tools: Sequence[Any] | None, add_generation_prompt: bool) -> str:
        from jinja2.exceptions import SecurityError, TemplateError

        given = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            with Budget(messages, tools):
                return self._write(given | self._context)
        except (DataError, BaseModelError):
            raise
        except SecurityError as error:
            raise BaseModelError(
                f"the chat template of the base does what no template may: {shortened(error)}"
            ) from error
        except TemplateError as error:
            raise DataError(f"the chat template of the base refuses this conversation: {shortened(error)}") from error
        except (RecursionError, MemoryError) as error:
            raise RunawayTemplateError("it calls itself without end, or fills the memory") from error
        except Exception as error:  # a program from an untrusted source may raise anything
            raise DataError(f"the chat template of the base fails on this conversation: {shortened(error)}") from error

    def _write(self, variables: dict[str, Any]) -> str:
        chunks, length = [], 0
        # Not by render, which compiles code of its own to tell where an error was.
        for chunk in self._template.root_render_func(self._template.new_context(variables)):
            chunks.append(chunk)
            length += len(chunk)
            if length > MAX_CHARACTERS:
                raise DataError(
                    f"the chat template wrote more than {MAX_CHARACTERS:,} characters: expected one conversation. "
                    "Shorten it."
                )
        return "".join(chunks)


def _complete(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Fill what templates rely on: text content everywhere, and ids that tie results to calls."""
    completed, waiting, count = [], [], 0
    for message in messages:
        message = {**message, "content": message.get("content") or ""}
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                calls.append(
                    {"type": "function", "id": call.get("id") or _call_id(count), "function": call["function"]}
                )
                count += 1
            message["tool_calls"] = calls
            waiting = [(call["id"], call["function"]["name"]) for call in calls]
        elif message["role"] == "tool":
            _answer(message, waiting)
        completed.append(message)
    return completed


def _answer(message: dict[str, Any], waiting: list[tuple[str, str]]) -> None:
    """Give a tool result the id and name of the call it answers: the named one, else the next without an answer."""
    known = next((call for call in waiting if call[0] == message.get("tool_call_id")), None)
    call = known or (waiting[0] if waiting else None)
    if call is None:
        return
    waiting.remove(call)
    message.setdefault("tool_call_id", call[0])
    message.setdefault("name", call[1])


def _renumber(messages: Sequence[Message]) -> list[dict[str, Any]]:
    new: dict[str, str] = {}
    for message in messages:
        for call in message.get("tool_calls") or ():
            new.setdefault(call["id"], _call_id(len(new)))
    written = []
    for message in messages:
        message = dict(message)
        if message.get("tool_calls"):
            message["tool_calls"] = [{**call, "id": new[call["id"]]} for call in message["tool_calls"]]
        if message["role"] == "tool":
            message["tool_call_id"] = new.get(message.get("tool_call_id", ""), _call_id(0))
        written.append(message)
    return written


def _call(function: Mapping[str, Any], number: int) -> dict[str, Any]:
    return {"type": "function", "id": _call_id(number), "function": dict(function)}


def _call_id(number: int) -> str:
    return f"call{number:05d}"  # nine letters and digits: the strictest template accepts nothing else


def _fold_system(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Put system text in front of the next user turn, for templates that have no system role."""
    folded: list[dict[str, Any]] = []
    pending: list[str] = []
    for message in messages:
        if message["role"] == "system":
            pending.append(message["content"])
            continue
        message = dict(message)
        if pending and message["role"] == "user":
            message["content"] = "\n\n".join([*pending, message["content"]])
            pending = []
        elif pending and not folded:
            folded.append({"role": "user", "content": "\n\n".join(pending)})
            pending = []
        folded.append(message)
    return folded + ([{"role": "user", "content": "\n\n".join(pending)}] if pending else [])
