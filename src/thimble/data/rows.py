"""From one row, in any of the forms in wide use, to a checked record.

Knows the forms; knows neither files nor models. What is wrong is raised as `DataError`, all of a row at once, without
the place: the caller puts the file and line in front.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from thimble.errors import DataError, Problems, listing

Row = Mapping[str, Any]

PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("instruction", "response"))
FORMS = (
    "messages", "conversations", *(f"{prompt} and {completion}" for prompt, completion in PAIRS),
    "instruction, input and output", "text",
)  # fmt: skip
ROLES = {"developer": "system", "function": "tool"} | {role: role for role in ("system", "user", "assistant", "tool")}
SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "tool": "tool",
    "observation": "tool", "function_call": "assistant",
}  # fmt: skip
OPTIONAL = ("system", "tools", "functions", "history")  # columns that may be empty
# What is kept of a message beside role and content; reasoning_content is written by templates of thinking models.
MESSAGE_KEYS = ("name", "tool_call_id", "reasoning_content", "weight")


@dataclass(frozen=True)
class Record:
    """One example: a conversation or a text."""

    messages: tuple[dict[str, Any], ...] | None = None  # OpenAI form; the arguments of calls are objects
    text: str | None = None  # plain text, instead of messages
    tools: tuple[dict[str, Any], ...] | None = None  # OpenAI tool definitions
    source: str = ""  # "train.jsonl line 12"
    prompt: str | None = None  # prompt and completion as given: a base without chat template joins them
    completion: str | None = None


class Parsed(NamedTuple):
    """A record with what the row told about itself."""

    record: Record
    form: str  # "Alpaca"
    unused: frozenset[str]  # columns that were not read


def parse_row(row: Any, source: str) -> Parsed:
    """Recognise the form of a row and check it; a DataError says everything that is wrong with it."""
    if not isinstance(row, Mapping):
        raise DataError(f"the row is {describe(row)}: expected an object in one of the forms {'; '.join(FORMS)}")
    given = {key: value for key, value in row.items() if value is not None and (value != "" or key not in OPTIONAL)}
    form, columns, read = _recognise(row)
    problems = Problems()
    fields = problems.attempt(read, given) or {}
    tools = problems.attempt(_tools, given)
    if problems.found:
        raise DataError(*problems.found)
    if tools and fields.get("messages"):
        form, fields["tools"] = f"{form} with tools", tools
    elif any(message.get("tool_calls") for message in fields.get("messages") or ()):
        form = f"{form} with tools"
    return Parsed(Record(source=source, **fields), form, frozenset(set(row) - set(columns)))


def describe(value: Any) -> str:
    """Say what kind of thing a value is, with its beginning."""
    if value is None:
        return "missing"
    if isinstance(value, str):
        return f'"{value[:40]}{"..." if len(value) > 40 else ""}"' if value else "empty"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, Mapping):
        return f"an object with {listing(value) or 'nothing in it'}"
    return f"{value!r}"


def _recognise(row: Row) -> tuple[str, tuple[str, ...], Callable[[Row], dict[str, Any]]]:
    """The form of a row, the columns it uses, and how to read it; the first that fits wins."""
    extra = ("system", "tools", "functions")
    if "messages" in row or "conversations" in row:
        key = "messages" if "messages" in row else "conversations"
        turns = _loaded(row[key])
        first = turns[0] if isinstance(turns, list) and turns else {}
        is_sharegpt = isinstance(first, Mapping) and "from" in first
        return "ShareGPT" if is_sharegpt else "messages", (key, *extra), partial(_chat, key=key)
    if "instruction" in row and "output" in row:
        return "Alpaca", ("instruction", "input", "output", "history", *extra), _alpaca
    for prompt, completion in PAIRS:
        if prompt in row and completion in row:
            read = _conversational if isinstance(row[completion], list | tuple) else _pair
            form = f"{prompt} and {completion}"
            return form, (prompt, completion, *extra), partial(read, prompt_key=prompt, completion_key=completion)
    if "text" in row:
        return "plain text", ("text",), _plain
    hint = " (Thimble learns from answers, not from preferences: keep the chosen one)" if "chosen" in row else ""
    raise DataError(f"the columns are {listing(row) or 'none'}{hint}: expected one of the forms {'; '.join(FORMS)}")


def _plain(given: Row) -> dict[str, Any]:
    text = _text(given.get("text"), "text")
    if not text.strip():
        raise DataError("text is empty: expected the text to learn")
    return {"text": text}


def _chat(given: Row, key: str) -> dict[str, Any]:
    return {"messages": _conversation(_messages(given.get(key), key), given)}


def _pair(given: Row, prompt_key: str, completion_key: str) -> dict[str, Any]:
    prompt = _text(given.get(prompt_key, ""), prompt_key)
    completion = _text(given.get(completion_key), completion_key)
    if not completion.strip():
        raise DataError(f"{completion_key} is empty: expected the text to learn")
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return {"messages": _conversation(turns, given), "prompt": prompt, "completion": completion}


def _conversational(given: Row, prompt_key: str, completion_key: str) -> dict[str, Any]:
    prompt = given.get(prompt_key, [])
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(prompt, prompt_key)
    completion = _messages(given.get(completion_key), completion_key)
    # Only the completion is learned, though the prompt may hold assistant turns too.
    turns = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in turns]
    return {"messages": _conversation([*turns, *completion], given)}


def _alpaca(given: Row) -> dict[str, Any]:
    instruction, context = (_text(given.get(key, ""), key) for key in ("instruction", "input"))
    output = _text(given.get("output"), "output")
    if not output.strip():
        raise DataError("output is empty: expected the text to learn")
    turns = _history(_loaded(given.get("history", [])))
    question = "\n\n".join(part for part in (instruction, context) if part)
    turns += [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    return {"messages": _conversation(turns, given)}


def _history(pairs: Any) -> list[dict[str, Any]]:
    if not isinstance(pairs, list | tuple):
        raise DataError(f"history is {describe(pairs)}: expected a list of pairs, [[question, answer], ...]")
    turns = []
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"history {number} is {describe(pair)}: expected a pair of texts, [question, answer]")
        turns += [{"role": "user", "content": _text(pair[0], f"history {number}")}]
        turns += [{"role": "assistant", "content": _text(pair[1], f"history {number}")}]
    return turns


def _conversation(turns: list[dict[str, Any]], given: Row) -> tuple[dict[str, Any], ...]:
    """Put the column `system` in front and make sure there is something to learn."""
    if "system" in given and not (turns and turns[0]["role"] == "system"):
        turns = [{"role": "system", "content": _text(given["system"], "system")}, *turns]
    if not any(turn["role"] == "assistant" and turn.get("weight", 1) for turn in turns):
        found = listing(turn["role"] for turn in turns)
        raise DataError(f"there is nothing to learn: expected a message of the role assistant, found {found or 'none'}")
    return tuple(turns)


def _messages(turns: Any, key: str) -> list[dict[str, Any]]:
    turns = _loaded(turns)
    if not isinstance(turns, list | tuple):
        raise DataError(f"{key} is {describe(turns)}: expected a list of messages, each with role and content")
    if not turns:
        raise DataError(f"{key} is empty: expected messages, each with role and content")
    problems = Problems()
    checked = [problems.attempt(_message, turn, f"{key} {number}") for number, turn in enumerate(turns, start=1)]
    if problems.found:
        raise DataError(*problems.found)
    return [turn for turn in checked if turn is not None]


def _message(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} is {describe(turn)}: expected an object with role and content")
    turn = {key: value for key, value in turn.items() if value is not None}
    if "from" in turn:
        return _sharegpt_message(turn, where)
    given = turn.get("role")
    if not isinstance(given, str) or given not in ROLES:
        raise DataError(f"{where} role is {describe(given)}: expected system, user, assistant or tool")
    message: dict[str, Any] = {"role": ROLES[given]}
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else None)
    if calls and message["role"] == "assistant":
        message["tool_calls"] = _calls(calls, f"{where} tool_calls")
        message["content"] = _content(turn.get("content", ""), f"{where} content") or None
    else:
        message["content"] = _content(turn.get("content"), f"{where} content")
    _check_answer(message, f"{where} content")
    return message | {key: turn[key] for key in MESSAGE_KEYS if key in turn}


def _sharegpt_message(turn: Row, where: str) -> dict[str, Any]:
    given = turn["from"]
    if not isinstance(given, str) or given not in SHAREGPT_ROLES:
        raise DataError(f"{where} from is {describe(given)}: expected {listing(SHAREGPT_ROLES, most=20)}")
    message: dict[str, Any] = {"role": SHAREGPT_ROLES[given]}
    value = turn.get("value")
    if given == "function_call":
        calls = _loaded(value)
        message["tool_calls"] = _calls(calls if isinstance(calls, list) else [calls], f"{where} value")
        message["content"] = None
    else:
        message["content"] = _content(value, f"{where} value")
    _check_answer(message, f"{where} value")
    return message | {key: turn[key] for key in MESSAGE_KEYS if key in turn}


def _check_answer(message: Row, where: str) -> None:
    empty = not (message["content"] or "").strip() and not message.get("tool_calls")
    if message["role"] == "assistant" and empty:
        raise DataError(f"{where} is empty: expected what the assistant says, or tool_calls")


def _content(value: Any, where: str) -> str:
    """The text of a message; OpenAI's list of parts is joined as long as all parts are text."""
    if not isinstance(value, list | tuple):
        return _text(value, where)
    texts = []
    for number, part in enumerate(value, start=1):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise DataError(
                f"{where} part {number} is {f'of type {kind}' if kind else describe(part)}: expected parts of type "
                "text; images, sound and files cannot be learned"
            )
        texts.append(_text(part.get("text"), f"{where} part {number}"))
    return "".join(texts)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} is {describe(value)}: expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} has half of a character at position {error.start} (a lone surrogate): expected whole characters"
        ) from error
    return value


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    calls = _loaded(calls)
    if not isinstance(calls, list | tuple):
        raise DataError(f"{where} is {describe(calls)}: expected a list of calls")
    checked = []
    for number, call in enumerate(calls, start=1):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise DataError(f"{where} {number} is {describe(call)}: expected an object with name and arguments")
        arguments = _loaded(function.get("arguments") or {})
        if not isinstance(arguments, Mapping):
            raise DataError(
                f"{where} {number} ({name}) has as arguments {describe(arguments)}: expected a JSON object, such as "
                '{"city": "Oslo"}'
            )
        identity = {"id": str(call["id"])} if call.get("id") else {}
        checked.append({"type": "function", **identity, "function": {"name": name, "arguments": dict(arguments)}})
    return checked


def _tools(given: Row) -> tuple[dict[str, Any], ...]:
    key = "tools" if "tools" in given else "functions"
    definitions = _loaded(given.get(key, []))
    if not isinstance(definitions, list | tuple):
        raise DataError(f"{key} is {describe(definitions)}: expected a list of tool definitions")
    checked = []
    for number, tool in enumerate(definitions, start=1):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{key} {number} is {describe(tool)}: expected a tool definition with name, description and parameters"
            )
        checked.append({"type": "function", "function": dict(function)})
    return tuple(checked)


def _loaded(value: Any) -> Any:
    """Read JSON that was stored as text, as CSV files and some data sets do; other text stays as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def said(counts: Mapping[str, int]) -> str:
    """Say in which form the rows are, by how many there are of each, with counts if they are mixed."""
    if len(counts) < 2:
        return next(iter(counts), "")
    return ", ".join(f"{form} ({count:,})" for form, count in sorted(counts.items(), key=lambda item: -item[1]))
