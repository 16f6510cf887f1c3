"""Conversations by which a chat template shows what it can write: who speaks, tools, and content in parts."""

import json
from collections.abc import Sequence
from typing import Any

from thimble.data.messages import Message, call_id

Conversation = tuple[Sequence[Message], Sequence[Any] | None]  # messages, tools

USER, SYSTEM, RESULT = "probe user text", "probe system text", "probe result text"
TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "probe description",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string"}}, "required": ["probe_key"]},
    },
}
_ASKED = {"role": "user", "content": USER}


def _of_tools(arguments: Any) -> Conversation:
    call = {"type": "function", "id": call_id(0), "function": {"name": "probe_call", "arguments": arguments}}
    result = {"role": "tool", "name": "probe_call", "tool_call_id": call_id(0), "content": RESULT}
    return [_ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}, result], [TOOL]


TRIALS: dict[str, Conversation] = {
    "system": ([{"role": "system", "content": SYSTEM}, _ASKED], None),
    "user": ([_ASKED], None),
    "arguments": _of_tools({"probe_key": "probe_value"}),
    "arguments as text": _of_tools(json.dumps({"probe_key": "probe_value"})),
}


def in_parts(messages: Sequence[Message]) -> list[Message]:
    """Messages whose content is a list of one part that is text, as models for pictures and text have it."""
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
