"""Conversation to text, by the Jinja chat template that came with the base.

A template is a program from an untrusted source: it runs in a process of its own, its time, memory and output bounded.
What templates differ in (a system role, tools, the form of content and of a call's arguments) is found by trying, not
by reading them.
"""

import copy
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from thimble.data.messages import Message, complete, fold_system, has_tools, renumber
from thimble.data.template_process import MAX_CHARACTERS, MAX_MEMORY_BYTES, Asked, TemplateProcess
from thimble.data.template_trials import RESULT, SYSTEM, TOOL, TRIALS, USER, Conversation, in_parts
from thimble.data.template_worker import DIED, EXCESS, FAILED, FORBIDDEN, INVALID, LATER, LONG, TEXT
from thimble.data.tool_text import write_tools
from thimble.errors import BaseModelError, DataError, listing

Prefix = tuple[int, bool]  # of a conversation: number of messages, whether the beginning of an answer is behind them

GIVEN = ("messages", "tools", "documents", "add_generation_prompt")  # what every template is told
MAX_SOURCE = 1_000_000  # characters of a template
MAX_REQUEST_BYTES = 16_000_000  # of a conversation as JSON, which takes up to 12 bytes a character
MAX_SAID = 500  # characters of an error of a template
LONG_BYTES, LONG_MESSAGES = 100_000, 1000  # from here on a conversation itself may be too much


class UnusableTemplateError(BaseModelError):
    """A chat template that no conversation can be written with."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the chat template of the base {what}. Use a base whose template is intact.")


class ChatTemplate:
    """One chat template; rendering is deterministic, the date included. Threads may share it."""

    def __init__(
        self, source: str, bos_token: str = "", eos_token: str = "",
        *, tool_use: str | None = None, more_tokens: Mapping[str, str] | None = None, now: datetime | None = None,
    ) -> None:  # fmt: skip
        """Take a template; its process starts when it is first needed, or by `start`.

        Args:
            source: Jinja source.
            bos_token: Text of the token that begins a document, for templates that write it.
            eos_token: Text of the token that ends one.
            tool_use: Jinja source for conversations with definitions of tools, for bases that have one of its own; it
                is taken instead, as by transformers, if it writes them.
            more_tokens: Texts of other special tokens by the names that templates know them by, such as `pad_token`.
            now: The time a template may ask for; fixed, so that all rows of a run agree.

        Raises:
            BaseModelError: If the source is too long. What else is wrong with it is found when it is first used.
        """
        if len(source) > MAX_SOURCE:
            raise UnusableTemplateError(f"has {len(source):,} characters: expected at most {MAX_SOURCE:,}")
        self.source = source
        self._now = now or datetime.now()
        self._process = TemplateProcess(source, {**(more_tokens or {}), "bos_token": bos_token, "eos_token": eos_token})
        self._variables: Mapping[str, Any] = {}
        self._own_names = {*GIVEN, *self._process.setup.request["variables"]}
        self._tool_use: ChatTemplate | None = None
        if tool_use:
            self._tool_use = ChatTemplate(tool_use, bos_token, eos_token, more_tokens=more_tokens, now=self._now)

    def with_variables(self, variables: Mapping[str, Any]) -> "ChatTemplate":
        """The same template and process, told more than the conversation, such as `enable_thinking` of Qwen3.

        Args:
            variables: By name, as JSON has them.

        Returns:
            The template.

        Raises:
            DataError: If it does not read one of them: that would change nothing.
        """
        unread = [name for name in variables if not self.reads(name)]
        if unread := [*unread, *(name for name in variables if name in self._own_names)]:
            raise DataError(f"the chat template of the base takes no {listing(unread)}")
        return self._with(variables) if variables else self

    def reads(self, name: str) -> bool:
        """Whether a variable is named in the template, so that telling it may change what is written."""
        source = self.source + (self._tool_use.source if self._tool_use else "")
        return re.search(rf"\b{re.escape(name)}\b", source) is not None

    def _with(self, variables: Mapping[str, Any]) -> "ChatTemplate":
        _ = self.takes_system, self._argument_form  # which are the same for all, and found once
        told = copy.copy(self)
        told._variables, told._tool_use = variables, self._tool_use and self._tool_use._with(variables)
        return told

    def start(self) -> None:
        """Start the process of the template, without waiting for it."""
        self._process.start()

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
        prefix = (len(messages), add_generation_prompt)
        return self.ask(messages, tools, [prefix]).text(prefix)

    def ask(self, messages: Sequence[Message], tools: Sequence[Any] | None, wanted: Sequence[Prefix]) -> "Renderings":
        """Have prefixes of a conversation written while the caller does something else.

        Args:
            messages: Conversation in OpenAI form; arguments of calls as objects.
            tools: Tool definitions in OpenAI form, or None.
            wanted: The prefixes.

        Returns:
            The texts to come.

        Raises:
            BaseModelError: If the template cannot be used at all.
        """
        return Renderings(self._for(tools), messages, tools, wanted)

    def _for(self, tools: Sequence[Any] | None) -> "ChatTemplate":
        """The template that writes a conversation with these tools."""
        own = self._tool_use if tools else None
        return self if own is None or own._argument_form is None else own

    @functools.cached_property
    def isolation(self) -> str | None:
        """What this system lets a chat template do that it should not; None if nothing."""
        kind, lacking = self._process.replies(self._process.setup)[0]
        meant = {
            "time": "work on for a minute", "memory": "fill the memory", "files": "open files and connections",
            "calls": "rename and remove files if it gets out of its sandbox",
        }  # fmt: skip
        return listing(meant[word] for word in lacking.split()) or None if kind == TEXT else None

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether the template has a place for a system message."""
        return SYSTEM in self._tried("system").lower()

    @property
    def uses_tools(self) -> bool:
        """Whether the template writes tool definitions, calls and results by itself."""
        return self.knows_tools([TOOL])

    def knows_tools(self, tools: Sequence[Any] | None) -> bool:
        """Whether calls and results of a conversation with these definitions are written as the base knows them."""
        return self._for(tools)._argument_form is not None

    @functools.cached_property
    def default_system(self) -> str | None:
        """The system prompt the template adds when a conversation has none."""
        if not self.takes_system:
            return None
        before, _, rest = self._tried("system").partition(SYSTEM)
        after = rest.partition(USER)[0]
        opening = self.opening
        if len(opening) < len(before) + len(after) or not (opening.startswith(before) and opening.endswith(after)):
            return None
        return opening[len(before) : len(opening) - len(after)].strip() or None

    @functools.cached_property
    def opening(self) -> str:
        """What the template writes before the first user text of a conversation without a system message."""
        return self._tried("user").partition(USER)[0]

    @functools.cached_property
    def uses_date(self) -> bool:
        """Whether what the template writes depends on the day."""
        if "strftime_now" not in self.source:
            return False
        messages, tools = TRIALS["user"]
        other = self._send([(self._formed(messages), tools)], [(0, 1, False), (0, 1, True)], datetime(1999, 1, 2))
        return (self._try(other, 0) or self._try(other, 1)).partition(USER)[0] != self.opening

    @functools.cached_property
    def _argument_form(self) -> type | None:
        """dict or str, the form in which the template wants a call's arguments; None if it knows no tools."""
        wanted = ("probe description", "probe_call", "probe_value", RESULT)
        for form, name in ((dict, "arguments"), (str, "arguments as text")):
            text = self._tried(name)
            if all(word in text for word in wanted) and "{'probe_key'" not in text and '\\"probe_key' not in text:
                return form
        return None

    def _tried(self, name: str) -> str:
        """What the template writes for one of `TRIALS`, with the beginning of an answer if it refuses it without."""
        return self._written(self._trials[1], name)

    def _written(self, trials: Asked, name: str) -> str:
        number = list(TRIALS).index(name)
        return self._try(trials, number) or self._try(trials, len(TRIALS) + number)

    def _try(self, asked: Asked, number: int) -> str:
        try:
            return self._text(asked, number)
        except UnusableTemplateError:
            raise
        except (DataError, BaseModelError):
            return ""

    @functools.cached_property
    def _trials(self) -> tuple[bool, Asked]:
        """Whether the template takes content in parts alone, and what it writes of `TRIALS` in the form that it takes.

        Templates of models for pictures and text leave out content that is a text (LLaVA, Idefics3, SmolVLM). Found as
        by llama.cpp (`requires_typed_content`).
        """
        as_text = self._send_trials(TRIALS.values())
        if USER in self._written(as_text, "user").lower():
            return False, as_text
        typed = self._send_trials((in_parts(messages), tools) for messages, tools in TRIALS.values())
        takes_parts = USER in self._written(typed, "user").lower()
        return takes_parts, typed if takes_parts else as_text

    def _send_trials(self, trials: Iterable[Conversation]) -> Asked:
        conversations = list(trials)
        wanted = [(number, len(made[0]), ends) for ends in (False, True) for number, made in enumerate(conversations)]
        return self._send(conversations, wanted)

    def _formed(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Messages with their content in the form that this template takes."""
        return in_parts(messages) if self._trials[0] else messages

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

    def _prepare(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> Conversation:
        """A conversation and tools as this template takes them."""
        messages = complete(messages)
        is_with_tools = has_tools(messages, tools)
        knows_tools = self._argument_form is not None
        if is_with_tools and not knows_tools:
            messages, tools = write_tools(messages, tools), None
        if not self.takes_system:
            messages = fold_system(messages)
        if not (is_with_tools and knows_tools):
            return self._formed(messages), None
        return self._formed(self._with_arguments(messages)), tools

    def _send(
        self,
        conversations: Sequence[Conversation],
        wanted: Sequence[tuple[int, int, bool]],
        now: datetime | None = None,
    ) -> Asked:
        """Ask for renderings, each (index of the conversation, number of messages, add_generation_prompt)."""
        request = {"conversations": conversations, "wanted": wanted, "now": (now or self._now).isoformat()}
        if self._variables:
            request["variables"] = self._variables
        try:
            asked = Asked(request)
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"this conversation cannot be given to the chat template of the base: {error}") from error
        if len(asked.payload) > MAX_REQUEST_BYTES:
            raise _too_long(asked)
        self._process.ask(asked)
        return asked

    def _text(self, asked: Asked, number: int) -> str:
        """Wait for a text."""
        kind, said = self._process.replies(asked)[number]
        if kind == LATER:
            asked = Asked(asked.request | {"wanted": [asked.request["wanted"][number]]})
            self._process.ask(asked)
            return self._text(asked, 0)
        if kind == TEXT:
            return said
        raise _error(kind, said, asked)


class Renderings:
    """Prefixes of a conversation as a template writes them, asked for together and written in the background.

    Args:
        template: The template.
        messages: Conversation in OpenAI form.
        tools: Tool definitions, or None.
        wanted: What `text` will be asked for.
    """

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        wanted: Sequence[Prefix],
    ) -> None:
        self._template, self._messages, self._tools = template, messages, tools
        self._places = {prefix: number for number, prefix in enumerate(wanted)}
        whole = template._prepare(messages, tools)
        conversations, asked = [whole], []
        is_plain = template.takes_system and not has_tools(messages, tools)  # a prefix is prepared as the whole is
        for length, prompt in wanted:
            if is_plain or length == len(messages):
                asked.append((0, length if is_plain else len(whole[0]), prompt))
                continue
            part = template._prepare(messages[:length], tools)
            is_prefix = part[1] == whole[1] and part[0] == whole[0][: len(part[0])]
            asked.append((0 if is_prefix else len(conversations), len(part[0]), prompt))
            conversations += [] if is_prefix else [part]
        try:
            self._asked: Asked | DataError = template._send(conversations, asked)
        except DataError as error:
            self._asked = error  # of this conversation, and not to be told before its turn

    def text(self, prefix: Prefix) -> str:
        """Wait for a text; a prefix that was not wanted is asked for now.

        Args:
            prefix: Number of messages, and whether to end with the beginning of an assistant turn.

        Returns:
            The text, special tokens written out.

        Raises:
            DataError: If the template refuses this conversation.
            BaseModelError: If the template itself goes wrong.
        """
        if isinstance(self._asked, DataError):
            raise self._asked
        if prefix not in self._places:
            return Renderings(self._template, self._messages, self._tools, [prefix]).text(prefix)
        number = self._places[prefix]
        try:
            return self._template._text(self._asked, number)
        except DataError:
            index, count, prompt = self._asked.request["wanted"][number]
            messages, tools = self._asked.request["conversations"][index]
            if not has_tools(messages[:count], tools):
                raise
            # Mistral's templates refuse the ids other services give to calls; any id will do.
            renumbered = (renumber(messages[:count]), tools)
            return self._template._text(self._template._send([renumbered], [(0, count, prompt)]), 0)


def _error(kind: int, said: str, asked: Asked) -> Exception:
    """What a reply without a text means to the user."""
    said = said if len(said) <= MAX_SAID else said[:MAX_SAID] + "..."  # a template may have made it long
    may_not = f"does what no template may: {said or f'it takes more than {MAX_MEMORY_BYTES / 1e6:g} MB of memory'}"
    if kind == LONG:
        return DataError(
            f"the chat template wrote more than {MAX_CHARACTERS:,} characters: expected one conversation. Shorten it."
        )
    if kind == EXCESS and (len(asked.payload) > LONG_BYTES or _count(asked) > LONG_MESSAGES):
        return _too_long(asked)
    unusable = {EXCESS: may_not, INVALID: f"is not valid Jinja: {said}", DIED: f"cannot be used: its process {said}"}
    if kind in unusable:
        return UnusableTemplateError(unusable[kind])
    if kind == FORBIDDEN:
        return BaseModelError(f"the chat template of the base {may_not}")
    what = "fails on" if kind == FAILED else "refuses"
    return DataError(f"the chat template of the base {what} this conversation: {said}")


def _too_long(asked: Asked) -> DataError:
    return DataError(
        f"this conversation of {_count(asked):,} messages and {len(asked.payload):,} bytes is more than the chat "
        f"template of the base can write in the time and memory it has: expected at most {MAX_CHARACTERS:,} "
        "characters. Shorten it."
    )


def _count(asked: Asked) -> int:
    return len(asked.request["conversations"][0][0]) if "conversations" in asked.request else 0
