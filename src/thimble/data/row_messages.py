"""Messages of a row, in the words of any tool in wide use, as those of OpenAI; every key is read or told.

What a message may say is listed here: roles, keys, marks for what is not to be learned, parts, calls. What is wrong is
raised as `DataError`, all of a conversation at once.
"""

from collections.abc import Mapping
from typing import Any

from thimble.data.columns import Fields, Left, folded
from thimble.data.content_blocks import KINDS, unfolded
from thimble.data.row_values import describe, is_filled, loaded, printed, refuse_halves, text_of, yes_or_no
from thimble.errors import DataError, Problems, listing

CALL = "call"  # a role of its own in some tools: an assistant message that is a call
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "ai": "assistant",
    "chatbot": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "tool": "tool",
    "function": "tool", "ipython": "tool", "observation": "tool", "toolresponse": "tool", "toolresult": "tool",
    "functionresponse": "tool", "environment": "tool", "functionresult": "tool", "functioncall": CALL, "toolcall": CALL,
}  # fmt: skip
SHOWN_ROLES = {
    "role": "system, user, assistant or tool",
    "from": "system, human, user, gpt, assistant, tool, observation, function_call",
}
CONTENTS = ("content", "value", "text", "parts")
PLAIN_KEYS = (("role", "content"), ("from", "value"))  # of most messages
THOUGHTS = ("reasoningcontent", "reasoning", "thinking")  # templates of thinking models write the first
TEXT_PARTS = ("text", "inputtext", "outputtext")
_PARTS = listing(("text", *KINDS))
# Marks on a message: whether 1 or true says that it is learned.
MARKS = {
    "weight": True, "loss": True, "train": True, "training": True, "trainable": True, "lossmask": True,
    "lossscale": True, "lossweight": True, "mask": False, "masked": False,
}  # fmt: skip
PARTIAL_MARKS = ("traindetail", "trainingdetail")
MEDIA = ("image", "images", "audio", "audios", "video", "videos", "file", "files")

Message = dict[str, Any]


def read_messages(turns: Any, key: str, left: Left) -> list[Message]:
    """Check the messages that stand in the column `key`; keys that nobody reads are noted in `left`."""
    turns = in_turn(_in_rows(loaded(turns)))
    if not isinstance(turns, list | tuple):
        raise DataError(
            f"{key} is {describe(turns)}{printed(turns)}: expected a list of messages, each with role and content"
        )
    if not turns:
        raise DataError(f"{key} is empty: expected messages, each with role and content")
    problems, checked = Problems(), []
    for number, turn in enumerate(turns, start=1):
        for message in (part for said in spoken(loaded(turn)) for part in unfolded(said)):
            checked.append(problems.attempt(_message, message, f"{key} {number}", key, left))
    if problems.found:
        raise DataError(*problems.found)
    return [turn for turn in checked if turn is not None]


def in_turn(turns: Any) -> Any:
    """Messages of texts that two speakers say in turn, the user first, as LIMA has them; others as they are."""
    if not are_texts(turns) or len(turns) < 2:
        return turns
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(turns)]


def are_texts(value: Any) -> bool:
    """Whether a value is a list of texts, none of which is a message as JSON."""
    is_list = isinstance(value, list | tuple) and bool(value) and all(isinstance(text, str) for text in value)
    return is_list and not any(isinstance(loaded(text), Mapping) for text in value)


def _in_rows(turns: Any) -> Any:
    """Messages one by one that are stored column by column, {"role": [...], "content": [...]}; others as they are."""
    is_table = isinstance(turns, Mapping) and is_message(turns) and all(isinstance(c, list) for c in turns.values())
    if not is_table or len(set(map(len, turns.values()))) != 1:
        return turns
    return [dict(zip(turns, cells, strict=True)) for cells in zip(*turns.values(), strict=True)]


def spoken(turn: Any) -> list[Any]:
    """A message, or those of an object that has roles as its keys, as in {"human": "Hi", "assistant": "Hello"}."""
    if not isinstance(turn, Mapping) or not turn or not all(folded(str(key)) in ROLES for key in turn):
        return [turn]
    return [{"role": str(key), "content": value} for key, value in turn.items() if is_filled(value)]


def is_message(value: Any) -> bool:
    """Whether a value looks like a message, in whatever words."""
    if not isinstance(value, Mapping) or not value:
        return False
    keys = {folded(str(key)) for key in value}
    return bool(keys & {"role", "from"}) or keys <= set(ROLES)


def are_messages(value: Any) -> bool:
    """Whether a value is a list of what looks like messages, or that as JSON."""
    turns = loaded(value)
    return isinstance(turns, list | tuple) and bool(turns) and all(map(is_message, turns))


def as_messages(value: Any) -> Any:
    """A list of the message that stands alone where several may; any other value as it is."""
    return [value] if _is_plain(value) else value


def asked_messages(value: Any) -> Any:
    """The messages of a prompt: one or several, or these as JSON in a text, as in CSV; any other value as it is.

    JSON that ends with an answer asks nothing, and may well be what a question is about.
    """
    turns = written_messages(value)
    is_answered = isinstance(value, str) and isinstance(turns, list) and _role_of(turns[-1]) not in ("user", "tool")
    return value if is_answered else turns


def written_messages(value: Any) -> Any:
    """One or several messages that stand in a text as JSON; any other text is one, and any other value as it is."""
    turns = as_messages(loaded(value))
    if not isinstance(value, str):
        return turns
    is_chat = isinstance(turns, list) and bool(turns) and all(_is_plain(turn) and _role_of(turn) for turn in turns)
    return turns if is_chat else value


def _role_of(turn: Mapping[str, Any]) -> str | None:
    return ROLES.get(folded(str(turn.get("role") or turn.get("from"))))


def _is_plain(value: Any) -> bool:
    return isinstance(value, Mapping) and any(value.keys() >= set(keys) for keys in PLAIN_KEYS)


def _message(turn: Any, where: str, column: str, left: Left) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} is {describe(turn)}: expected an object with role and content")
    if tuple(turn) in PLAIN_KEYS and (message := _plain(turn, where)):
        return message
    fields = Fields({key: value for key, value in turn.items() if value is not None}, column)
    role = _role(fields, where)
    refuse_media(fields, where)
    learned = _mark(fields, where, "assistant" if role == CALL else role)
    message: Message = {"role": "assistant" if role == CALL else role}
    if role == CALL:
        message |= _said_call(fields, where, left)
    elif role == "assistant":
        message |= _answer(fields, where, left)
    else:
        key = fields.first(CONTENTS) or "content"
        message["content"] = content_text(fields.take(key), f"{where} {fields.shown(key)}", column, left)
    if role == "system" and (tools := read_tools(fields, left)):
        message["tools"] = tools  # of the row, as it is defined there
    for key, name in (("name", "name"), ("toolcallid", "tool_call_id")):
        message |= {name: fields.take(key)} if key in fields else {}
        refuse_halves(message.get(name), f"{where} {name}")
    fields.leave(left)
    return message | ({"weight": int(learned)} if learned is not None else {})


def _plain(turn: Mapping[str, Any], where: str) -> Message | None:
    """A message of a role and a text, as most are; None if it needs a closer look."""
    (_, given), (key, content) = turn.items()
    role = ROLES.get(given, CALL) if isinstance(given, str) else CALL
    is_plain = role != CALL and isinstance(content, str) and not content.isspace() and bool(content)
    return {"role": role, "content": text_of(content, f"{where} {key}")} if is_plain else None


def _role(fields: Fields, where: str) -> str:
    key = fields.first(("role", "from")) or "role"
    given = fields.take(key)
    role = ROLES.get(folded(given)) if isinstance(given, str) else None
    if role is None:
        raise DataError(f"{where} {fields.shown(key)} is {describe(given)}: expected {SHOWN_ROLES[key]}")
    return role


def refuse_media(fields: Fields, where: str) -> None:
    """Refuse what is no text beside a text: pictures, sound, files."""
    found = fields.first_filled(MEDIA)
    if found:
        raise DataError(
            f"{where} has {fields.shown(found)}: images, sound and files cannot be learned; leave such rows out, or "
            f"take {fields.shown(found)} out if the text stands without it"
        )


def _mark(fields: Fields, where: str, role: str) -> bool | None:
    """Whether the message is marked as learned; None if nothing is said."""
    if partial := fields.first_filled(PARTIAL_MARKS):
        raise DataError(
            f"{where} has {fields.shown(partial)}: a message is learned as a whole or not at all; split it into "
            "messages, or mark it with train"
        )
    said: dict[bool, str] = {}
    for key in fields.among(MARKS):
        given = fields.take(key)
        switch = yes_or_no(given)
        if switch is None and is_filled(given):
            raise DataError(
                f"{where} {fields.shown(key)} is {describe(given)}: expected 0 or 1, true or false, because a message "
                "is learned as a whole or not at all"
            )
        if switch is not None:
            said[switch == MARKS[key]] = fields.shown(key)
    if len(said) == 2:
        raise DataError(f"{where} is marked as learned by {said[True]} and as not learned by {said[False]}")
    if True in said and role != "assistant":
        raise DataError(
            f"{where} is marked as learned by {said[True]}, but only assistant messages are, and this is one of role "
            f"{role}: take the mark out, or turn what is to be learned into an assistant message"
        )
    return next(iter(said), None) if role == "assistant" else None


def _answer(fields: Fields, where: str, left: Left) -> Message:
    """What an assistant message says: text or calls, and thoughts."""
    key = fields.first((*CONTENTS, "refusal")) or "content"
    shown = f"{where} {fields.shown(key)}"
    calls = fields.take("toolcalls")
    if not calls and fields.is_filled("functioncall"):
        calls = [loaded(fields.take("functioncall"))]
    thoughts = fields.first(THOUGHTS)
    message: Message = {}
    if calls:
        message["tool_calls"] = _calls(calls, f"{where} tool_calls", left)
        message["content"] = content_text(fields.take(key) or "", shown, fields.within, left) or None
    else:
        message["content"] = content_text(fields.take(key), shown, fields.within, left)
    if thoughts and fields.is_filled(thoughts):
        text = text_of(fields.take(thoughts), f"{where} {fields.shown(thoughts)}")
        message |= {fields.shown(thoughts): text, "reasoning_content": text}  # the template may read either
    if not (message["content"] or "").strip() and not message.get("tool_calls"):
        raise DataError(f"{shown} is empty: expected what the assistant says, or tool_calls")
    return message


def _said_call(fields: Fields, where: str, left: Left) -> Message:
    """A call that is a message of its own: its text is the call, or a list of them, as JSON."""
    key = fields.first(CONTENTS) or "value"
    calls = loaded(fields.take(key))
    calls = calls if isinstance(calls, list | tuple) else [calls]
    return {"tool_calls": _calls(calls, f"{where} {fields.shown(key)}", left), "content": None}


def content_text(value: Any, where: str, column: str, left: Left) -> str:
    """The text of a message, or of an object that holds it; a list of parts is joined as long as all are text."""
    if isinstance(value, Mapping) and (inner := Fields(value, column)).first_filled(CONTENTS):
        value = inner.take(inner.first_filled(CONTENTS) or "")
        inner.take("role")
        inner.leave(left)
    if not isinstance(value, list | tuple):
        return text_of(value, where)
    texts = []
    for number, part in enumerate(value, start=1):
        fields = Fields(part if isinstance(part, Mapping) else {}, f"{column}.content")
        kind = fields.take("type")
        is_text = folded(str(kind)) in TEXT_PARTS if kind else "text" in fields
        if not is_text:
            is_media = any(word in folded(str(kind or part)) for word in MEDIA)
            expected = "text; images, sound and files cannot be learned" if is_media else _PARTS
            raise DataError(
                f"{where} part {number} is {f'of type {kind}' if kind else describe(part)}: expected parts of type "
                f"{expected}"
            )
        texts.append(text_of(fields.take("text"), f"{where} part {number}"))
        fields.leave(left)
    return "".join(texts)


def _calls(calls: Any, where: str, left: Left) -> list[Message]:
    calls = loaded(calls)
    if not isinstance(calls, list | tuple):
        raise DataError(f"{where} is {describe(calls)}: expected a list of calls")
    return [_call(loaded(call), f"{where} {number}", left) for number, call in enumerate(calls, start=1)]


def _call(call: Any, where: str, left: Left) -> Message:
    outer = Fields(call if isinstance(call, Mapping) else {}, "tool_calls")
    inner = loaded(outer.take("function")) if "function" in outer else None
    function = Fields(inner, "tool_calls.function") if isinstance(inner, Mapping) else outer
    name = function.take("name")
    if not isinstance(name, str) or not name:
        raise DataError(f"{where} is {describe(call)}: expected an object with name and arguments")
    given = function.first(("arguments", "parameters")) or "arguments"
    arguments = loaded(function.take(given) or {})
    if not isinstance(arguments, Mapping):
        raise DataError(
            f"{where} ({name}) has as arguments {describe(arguments)}: expected a JSON object, such as "
            '{"city": "Oslo"}'
        )
    outer.take("type")
    identity = outer.take("id")
    for fields in {id(outer): outer, id(function): function}.values():
        fields.leave(left)
    identified = {"id": str(identity)} if identity else {}
    read = {"type": "function", **identified, "function": {"name": name, "arguments": dict(arguments)}}
    refuse_halves(read, where)
    return read


def read_tools(fields: Fields, left: Left) -> tuple[Message, ...]:
    """The definitions of tools in a row, as those of OpenAI."""
    key = fields.first(("tools", "functions")) or "tools"
    shown, definitions = fields.shown(key), loaded(fields.take(key))
    if not is_filled(definitions) or definitions == "null":  # as json.dumps writes None
        return ()
    if not isinstance(definitions, list | tuple):
        raise DataError(
            f"{shown} is {describe(definitions)}{printed(definitions)}: expected a list of tool definitions"
        )
    return tuple(_tool(loaded(tool), f"{shown} {number}", left) for number, tool in enumerate(definitions, start=1))


def _tool(tool: Any, where: str, left: Left) -> Message:
    outer = Fields(tool if isinstance(tool, Mapping) else {}, "tools")
    function = loaded(outer.take("function")) if "function" in outer else tool
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(
            f"{where} is {describe(tool)}: expected a tool definition with name, description and parameters"
        )
    if function is tool:  # flat, with or without the type in it
        function = {key: value for key, value in tool.items() if key != "type"}
    else:
        outer.take("type")
        outer.leave(left)
    schema = next((key for key in function if folded(str(key)) == "inputschema"), None)  # Anthropic's name, and MCP's
    if schema is not None and "parameters" not in function:
        function = {"parameters" if key == schema else key: value for key, value in function.items()}
    if isinstance(schema := loaded(function.get("parameters")), Mapping):
        function = {**function, "parameters": schema}
    refuse_halves(function, where)
    return {"type": "function", "function": dict(function)}


def roles_of(messages: list[Message]) -> str:
    """The roles of some messages, for an error."""
    return listing(message["role"] for message in messages) or "none"
