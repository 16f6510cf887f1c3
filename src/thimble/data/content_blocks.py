"""Messages whose calls, results and thoughts are blocks of their content, as messages of OpenAI's.

The blocks are those of Anthropic's Messages API, `tool_use`, `tool_result` and `thinking`, beside `text`; thoughts may
be parts of text themselves, as in Mistral's.
"""

from collections.abc import Mapping
from typing import Any

CALL, RESULT, THOUGHT = "tool_use", "tool_result", "thinking"
KINDS = (CALL, RESULT, THOUGHT)


def unfolded(turn: Any) -> list[Any]:
    """The messages that one with blocks stands for: results first, as they come before what is said of them.

    Whatever a block holds besides stays a key of the message that it becomes, so that it is read or told there. A
    message without such blocks is returned as it is.
    """
    parts = turn.get("content") if isinstance(turn, Mapping) else None
    if not isinstance(parts, list | tuple) or not any(_kind(part) in KINDS for part in parts):
        return [turn]
    blocks = {kind: [part for part in parts if _kind(part) == kind] for kind in KINDS}
    others = [part for part in parts if _kind(part) not in KINDS]
    messages: list[Any] = [_result(block) for block in blocks[RESULT]]
    if others or blocks[CALL] or blocks[THOUGHT]:
        said = {**turn, "content": others}
        said |= {"tool_calls": [_call(block) for block in blocks[CALL]]} if blocks[CALL] else {}
        for block in blocks[THOUGHT]:
            said |= {**_rest(block, THOUGHT, "closed"), THOUGHT: _joined(said.get(THOUGHT), _thought(block))}
        messages.append(said)
    return messages


def _kind(part: Any) -> Any:
    return part.get("type") if isinstance(part, Mapping) else None


def _thought(block: Mapping[str, Any]) -> Any:
    """The text of a thought; anything that is none is left to be refused."""
    given = block.get(THOUGHT)
    parts = given if isinstance(given, list | tuple) else ()
    texts = [part.get("text") for part in parts if _kind(part) == "text"]
    is_text = parts and len(texts) == len(parts) and all(isinstance(text, str) for text in texts)
    return "".join(texts) if is_text else given


def _joined(*thoughts: Any) -> Any:
    found = [thought for thought in thoughts if thought]
    return "\n\n".join(found) if all(isinstance(thought, str) for thought in found) else found[-1]


def _call(block: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": block.get("name"), "arguments": block.get("input")}
    return {"type": "function", "id": block.get("id"), "function": function, **_rest(block, "id", "name", "input")}


def _result(block: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "role": "tool", "tool_call_id": block.get("tool_use_id"), "content": block.get("content") or "",
        **_rest(block, "tool_use_id", "content"),
    }  # fmt: skip


def _rest(block: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in block.items() if key not in ("type", *names) and value not in (None, False)}
