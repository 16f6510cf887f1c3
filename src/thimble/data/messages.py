"""Conversations as chat templates rely on them: text everywhere, ids that tie results to calls, no role too many."""

from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names of the same; templates read one of the first two


def has_tools(messages: Sequence[Message], tools: Sequence[Any] | None) -> bool:
    """Whether a conversation defines, calls or answers tools."""
    return bool(tools) or any(message["role"] == "tool" or message.get("tool_calls") for message in messages)


def answers(messages: Sequence[Message]) -> list[int]:
    """Which messages answer something: all of the assistant but those that open the conversation.

    What stands before the first question or tool result was asked for by nobody, so no prompt will ask for it later.
    In a conversation without any question, the text before asks.
    """
    asking = (index for index, message in enumerate(messages) if message["role"] in ("user", "tool"))
    first = next(asking, 0)
    return [index for index, message in enumerate(messages) if index > first and message["role"] == "assistant"]


def complete(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Fill what templates rely on: text content everywhere, thoughts by both names, ids that tie results to calls."""
    completed, waiting, count = [], [], 0
    for message in messages:
        message = {**message, "content": message.get("content") or ""}
        thoughts = next((message[name] for name in THOUGHTS if message.get(name) is not None), None)
        if thoughts is not None:
            message = {"thinking": thoughts, **message, "reasoning_content": thoughts}
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                calls.append({**call, "type": "function", "id": call.get("id") or call_id(count)})
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


def renumber(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Give the calls new ids, and their results with them."""
    new: dict[str, str] = {}
    for message in messages:
        for call in message.get("tool_calls") or ():
            new.setdefault(call["id"], call_id(len(new)))
    written = []
    for message in messages:
        message = dict(message)
        if message.get("tool_calls"):
            message["tool_calls"] = [{**call, "id": new[call["id"]]} for call in message["tool_calls"]]
        if message["role"] == "tool":
            message["tool_call_id"] = new.get(message.get("tool_call_id", ""), call_id(0))
        written.append(message)
    return written


def fold_system(messages: Sequence[Message]) -> list[dict[str, Any]]:
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


def call_id(number: int) -> str:
    """The id of a call that has none."""
    return f"call{number:05d}"  # nine letters and digits: the strictest template accepts nothing else
