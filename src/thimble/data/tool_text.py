"""How tools are written for a base whose chat template does not know them; the only place that does.

The form is that of Hermes and Qwen, which most programs that serve models can parse:

- Definitions stand in the system message, one JSON object a line, between `<tools>` and `</tools>`.
- A call is assistant text: `<tool_call>`, a JSON object with `name` and `arguments`, `</tool_call>`.
- A result is a user turn: `<tool_response>`, the result, `</tool_response>`; results in a row share one turn.

Every token costs a small model time and attention, so the instruction is short and the definitions are compact JSON
without the outer `{"type": "function", "function": ...}`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]

_BEFORE = "# Tools\n\nYou may call these functions:\n<tools>\n"
_AFTER = '\n</tools>\n\nTo call one, write:\n<tool_call>\n{"name":...,"arguments":{...}}\n</tool_call>'


def write_tools(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Turn a conversation with tools into one of plain text, of the roles system, user and assistant.

    The system text of the user stays in front of the definitions; without one there is none but the definitions.
    """
    written: list[dict[str, Any]] = []
    for before, message in zip([None, *messages], messages, strict=False):
        if message["role"] == "tool":
            said = message["content"]
            # Data in this very form already hold the tags.
            block = (
                said if said.lstrip().startswith("<tool_response>") else f"<tool_response>\n{said}\n</tool_response>"
            )
            if before and before["role"] == "tool":
                written[-1]["content"] += "\n" + block
            else:
                written.append({"role": "user", "content": block})
        elif message.get("tool_calls"):
            written.append({"role": "assistant", "content": call_text(message)})
        else:
            written.append(dict(message))
    if tools:
        text = definitions_text(tools)
        if written and written[0]["role"] == "system":
            own = written[0]["content"]
            written[0] = {"role": "system", "content": f"{own}\n\n{text}" if own else text}
        else:
            written.insert(0, {"role": "system", "content": text})
    return written


def definitions_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """The part of the system message that names the tools and how to call them."""
    lines = [_compact(tool.get("function", tool)) for tool in tools]
    return _BEFORE + "\n".join(lines) + _AFTER


def call_text(message: Message) -> str:
    """What the assistant writes for a turn with calls: its text, if any, then one block a call."""
    calls = [{key: call["function"][key] for key in ("name", "arguments")} for call in message["tool_calls"]]
    blocks = [f"<tool_call>\n{_compact(call)}\n</tool_call>" for call in calls]
    return "\n".join([message["content"]] * bool(message.get("content")) + blocks)


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
