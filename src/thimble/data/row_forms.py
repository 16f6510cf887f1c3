"""The forms that rows come in: which columns make one, and how they become messages or text.

The first form whose columns are filled wins; if none is, the first whose columns are there says what is missing. What
stands in the prompt is written here too: columns like context below the question, system in front, history before.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from thimble.config.values import read_template
from thimble.data.columns import LABELS, MOST_LISTED, Fields, Left, NamedColumns, folded, suggestion, typed_option
from thimble.data.messages import answers
from thimble.data.row_messages import (
    ROLES,
    Message,
    are_messages,
    are_texts,
    as_messages,
    asked_messages,
    content_text,
    in_turn,
    is_message,
    read_messages,
    refuse_media,
    roles_of,
    written_messages,
)
from thimble.data.row_values import cell_text, describe, is_filled, loaded, shown, sole, text_of, yes_or_no
from thimble.errors import DataError, Problems, listing

CHATS = ("messages", "conversations")
# If they hold a list: often they are a text.
ALSO_CHATS = ("conversation", "dialog", "dialogue", "turns", "chat", "contents")
PROMPTS = ("prompt", "question", "query", "instruction", "input", "inputs", "user", "human")
COMPLETIONS = ("completion", "response", "answer", "output", "answers", "target", "targets", "assistant", "gpt")
KNOWN_PAIRS = (
    ("instruction", "output"), ("prompt", "completion"), ("prompt", "response"), ("question", "answer"),
    ("instruction", "response"),
)  # fmt: skip
PAIRS = tuple(dict.fromkeys((*KNOWN_PAIRS, *((prompt, answer) for prompt in PROMPTS for answer in COMPLETIONS))))
CONTEXTS = ("input", "context", "contexts", "document", "documents", "passage", "passages", "background")
SYSTEMS = ("system", "systemprompt", "systemmessage", "systeminstruction")
HISTORIES = ("history", "chathistory", "conversationhistory")
OPTIONAL = (*CONTEXTS, *SYSTEMS, *HISTORIES, "tools", "functions")  # columns that may be empty
JUDGEMENTS = ("label", "ktotag")  # whether an answer is good
REJECTED = ("rejected", "rejectedresponse", "rejectedmessages", "nonpreferredoutput")
FORMS = (
    "messages", "conversations", *(f"{prompt} and {completion}" for prompt, completion in KNOWN_PAIRS[1:]),
    "instruction, input and output", "text",
)  # fmt: skip


class Form(NamedTuple):
    """How a row is read."""

    name: str  # "Alpaca"
    read: Callable[[], dict[str, Any]]  # the fields of a record


def recognise(fields: Fields, named: NamedColumns, left: Left) -> Form:
    """The form of a row; a DataError names the columns of one that has none, and says how to name them."""
    form = _named(fields, named, left) if named else None
    for is_there in (fields.is_filled, fields.__contains__):
        form = form or _chat(fields, left, is_there) or _pair(fields, left, is_there) or _plain(fields, is_there)
    if form is None:
        raise DataError(_unknown(fields))
    return form


# ---- forms


def _named(fields: Fields, named: NamedColumns, left: Left) -> Form:
    """The columns that the user named, whatever else is there."""
    if named.text:
        return Form("plain text", lambda: _text(cell_text(fields.cell(named.text), shown(named.text)), named.text))

    def read() -> dict[str, Any]:
        prompt = named_prompt(fields, named)
        answer = _cell(fields, named.completion)
        return _asked(fields, left, (prompt, shown(named.prompt)), (answer, shown(named.completion)))

    asked = [named.prompt] if named.prompt else [name for _, name in read_template(named.template) if name]
    return Form(f"{', '.join(map(shown, asked)) or 'a fixed prompt'} and {shown(named.completion)}", read)


def named_prompt(fields: Fields, named: NamedColumns) -> Any:
    """What the columns of the prompt hold that the user named: text, or the messages of one column."""
    if not named.template:
        return _cell(fields, named.prompt)
    return "".join(
        before + (cell_text(sole(fields.cell(name)), shown(name)) if name else "")
        for before, name in read_template(named.template)
    )


def _chat(fields: Fields, left: Left, is_there: Callable[[str], bool]) -> Form | None:
    names = [name for name in CHATS if is_there(name)]
    names += [name for name in fields.among(ALSO_CHATS) if is_there(name) and are_messages(fields.peek(name))]
    if not names:
        return None
    turns = loaded(fields.peek(names[0]))
    first = loaded(turns[0]) if isinstance(turns, list | tuple) and turns else None
    is_sharegpt = isinstance(first, Mapping) and "from" in first

    def read() -> dict[str, Any]:
        column = fields.shown(names[0])
        _refuse_other_uses(fields)
        return {"messages": _conversation(read_messages(fields.take(names[0]), column, left), fields, left)}

    is_in_turn = turns is not in_turn(turns)
    return Form("texts in turn, the user's first" if is_in_turn else "ShareGPT" if is_sharegpt else "messages", read)


def _pair(fields: Fields, left: Left, is_there: Callable[[str], bool]) -> Form | None:
    prompts, completions = fields.among(PROMPTS), fields.among(COMPLETIONS)
    if not prompts or not completions:
        return None
    found = (pair for pair in PAIRS if pair[0] in prompts and pair[1] in completions and is_there(pair[1]))
    prompt, completion = next(found, (None, None))
    if prompt is None or completion is None:
        return None
    is_alpaca = (prompt, completion) == KNOWN_PAIRS[0]
    contexts = [name for name in fields.among(CONTEXTS) if name != prompt and fields.is_filled(name)]
    between = "" if is_alpaca or not contexts else f", {', '.join(map(fields.shown, contexts))}"

    def read() -> dict[str, Any]:
        _refuse_other_uses(fields)
        asked = (_with_contexts(fields, prompt, contexts), fields.shown(prompt))
        answer = fields.take(completion), fields.shown(completion)
        if completion in ("answer", "answers", "target", "targets") or are_texts(answer[0]):
            answer = _first_answer(*answer, left), answer[1]
        record = _asked(fields, left, asked, answer)
        return {"messages": record["messages"]} if is_alpaca else record

    return Form("Alpaca" if is_alpaca else f"{prompt}{between} and {completion}", read)


def _plain(fields: Fields, is_there: Callable[[str], bool]) -> Form | None:
    if not is_there("text"):
        return None

    def read() -> dict[str, Any]:
        label = fields.first_filled(LABELS)
        if label and isinstance(fields.peek("text"), str):
            raise DataError(_text_and_label(fields, fields.shown(label), sole(fields.peek(label))))
        refuse_media(fields, "the row")
        column = fields.shown("text")
        return _text(text_of(fields.take("text"), column), column)

    return Form("plain text", read)


def _text_and_label(fields: Fields, label: str, value: Any) -> str:
    """What to say to a text with a label: either may be what is to be learned."""
    alone = f"to learn the text alone, add {typed_option('text_column', fields.shown('text'))}"
    if not isinstance(value, str | int | float):
        return f"the row holds text and {label}, which is {describe(value)}: expected one label a row; {alone}"
    return f"the row holds text and {label}: to learn the {label} of a text, add {suggestion(fields)}; {alone}"


# ---- what they are made of


def _text(text: str, column: str) -> dict[str, Any]:
    if not text.strip():
        raise DataError(f"{shown(column)} is empty: expected the text to learn")
    return {"text": text}


def _asked(fields: Fields, left: Left, prompt: tuple[Any, str], completion: tuple[Any, str]) -> dict[str, Any]:
    """Messages of a prompt and what is learned, each a text or messages, and the name of its column."""
    prompt = asked_messages(prompt[0]), prompt[1]
    is_chat = isinstance(prompt[0], list | tuple)
    completion = (written_messages if is_chat else as_messages)(completion[0]), completion[1]
    if isinstance(completion[0], list | tuple):
        replies = read_messages(*completion, left)
    else:
        text = text_of(*completion) if isinstance(completion[0], str) else _no_text(fields, prompt[1], *completion)
        if not text.strip():
            raise DataError(f"{completion[1]} is empty: expected the text to learn")
        replies = [{"role": "assistant", "content": text}]
    if replies[0] == {"role": "user", "content": prompt[0]}:
        replies = replies[1:]  # as in pairs of whole conversations
    if is_chat:
        if are_texts(prompt[0]) and len(prompt[0]) % 2 == 0:
            raise DataError(f"{prompt[1]} is a list of {len(prompt[0])} texts: expected a text, or messages with roles")
        # Only the completion is learned, though the prompt may hold assistant turns too.
        turns = [
            {**turn, "weight": turn.get("weight", 0)} if turn["role"] == "assistant" else turn
            for turn in read_messages(*prompt, left)
        ]
    else:
        turns = [{"role": "user", "content": text_of(prompt[0] or "", prompt[1])}]
    history = _history(fields, left)
    messages = _conversation([*history, *turns, *replies], fields, left)
    is_bare = len(messages) == 2 and isinstance(prompt[0] or "", str) and isinstance(completion[0], str)
    return {"messages": messages} | ({"prompt": prompt[0] or "", "completion": completion[0]} if is_bare else {})


def _no_text(fields: Fields, prompt: str, value: Any, completion: str) -> NoReturn:
    how = ""
    is_json = isinstance(fields.peek(folded(completion)), str)  # as in sets of calls, whose answers are written JSON
    if is_json or isinstance(value, int | float):
        options = _asking_option(fields, prompt), typed_option("completion_column", completion)
        what = "JSON in a text is learned as it stands" if is_json else "numbers are read as text"
        how = f"; {what} from columns that are named: add {' '.join(options)}"
    elif isinstance(value, Mapping):
        how = "; an answer in JSON is text too: write it with json.dumps"
    raise DataError(f"{completion} is {describe(value)}: expected text{how}")


def _asking_option(fields: Fields, prompt: str) -> str:
    """The option that names what is asked, with what that is about."""
    contexts = (name for name in fields.among(CONTEXTS) if fields.is_filled(name) and name != folded(prompt))
    names = [prompt, *map(fields.shown, contexts)]
    if len(names) == 1:
        return typed_option("prompt_column", prompt)
    return typed_option("prompt_template", r"\n\n".join(f"{{{name}}}" for name in names))


def _with_contexts(fields: Fields, prompt: str, contexts: Sequence[str]) -> Any:
    """A prompt with the columns that belong to it below, such as the text that a question is about."""
    value = asked_messages(fields.take(prompt))
    if isinstance(value, list | tuple):
        return value  # messages, which say it all
    parts = [text_of(value or "", fields.shown(prompt))]
    problems = Problems()
    for name in contexts:
        parts.append(problems.attempt(_context, fields.take(name), fields.shown(name)) or "")
    if problems.found:
        raise DataError(*problems.found)
    return "\n\n".join(part for part in parts if part)


def _context(value: Any, column: str) -> str:
    value = loaded(value) if isinstance(loaded(value), list) else value
    if not isinstance(value, list | tuple):
        return text_of(value, column)
    return "\n\n".join(text_of(part, f"{column} {number}") for number, part in enumerate(value, start=1))


def _first_answer(given: Any, column: str, left: Left) -> Any:
    """The first of several answers: of a list of texts, or of an object with them, as in SQuAD and TriviaQA."""
    value = loaded(given) if column.endswith("s") else given  # one answer may be a text that looks like JSON
    if isinstance(value, Mapping):
        inner = Fields(value, column)
        value = inner.take(inner.first(("text", "value")) or "text")
        inner.leave(left)
    if not isinstance(value, list | tuple) or any(is_message(answer) for answer in value):
        return value
    if not is_filled(value):
        raise DataError(
            f"{column} is empty: expected a text; leave out questions without one, or write what is answered"
        )
    if any(is_filled(answer) and answer != value[0] for answer in value[1:]):
        left.add(f"{column} behind the first")
    return value[0]


def _history(fields: Fields, left: Left) -> list[Message]:
    """Earlier turns: pairs of question and answer, or messages."""
    name = fields.first_left(HISTORIES)
    if name is None:
        return []
    column, pairs = fields.shown(name), loaded(fields.take(name))
    if not isinstance(pairs, list | tuple):
        raise DataError(f"{column} is {describe(pairs)}: expected a list of pairs, [[question, answer], ...]")
    if pairs and all(is_message(pair) for pair in pairs):
        return read_messages(pairs, column, left)
    turns = []
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"{column} {number} is {describe(pair)}: expected a pair of texts, [question, answer]")
        turns += [{"role": "user", "content": text_of(pair[0], f"{column} {number}")}]
        turns += [{"role": "assistant", "content": text_of(pair[1], f"{column} {number}")}]
    return turns


def _conversation(turns: list[Message], fields: Fields, left: Left) -> tuple[Message, ...]:
    """Put the column `system` in front and make sure there is something to learn."""
    name = fields.first_left(SYSTEMS)
    system = content_text(fields.take(name), fields.shown(name), fields.shown(name), left) if name else ""
    if system and turns and turns[0]["role"] == "system":
        if turns[0]["content"].strip() != system.strip():
            raise DataError(
                f"{fields.shown(name or '')} and the first message are two system texts: leave one of them out"
            )
    elif system:
        turns = [{"role": "system", "content": system}, *turns]
    if not any(turn["role"] == "assistant" for turn in turns):
        found = f"expected a message of the role assistant, found {roles_of(turns)}"
        raise DataError(f"there is nothing to learn: {found}{_where_chosen(fields)}")
    if not answers(turns):
        raise DataError(
            "there is nothing to learn: the assistant opens the conversation, and nobody asks for what it says; put a "
            "question before it, or give it as text"
        )
    if not any(turns[index].get("weight", 1) for index in answers(turns)):
        raise DataError("there is nothing to learn: every answer is marked as not learned")
    return tuple(turns)


def _cell(fields: Fields, name: str) -> Any:
    """The value of a column that the user named: text, or messages."""
    value = as_messages(sole(fields.cell(name)))
    is_chat = isinstance(value, list | tuple) and value and all(is_message(turn) for turn in value)
    return value if is_chat else cell_text(value, shown(name))


# ---- what is not learned from


def _refuse_other_uses(fields: Fields) -> None:
    """Refuse rows that are made for something else, and would teach what nobody means."""
    refuse_media(fields, "the row")
    for label in fields.among(JUDGEMENTS):
        if yes_or_no(fields.peek(label)) is None:
            continue
        raise DataError(
            f"{fields.shown(label)} is {fields.peek(label)!r} beside an answer: Thimble learns from answers, not "
            "from preferences or judgements (KTO, classification of pairs); keep the rows whose answers are good, and "
            "take the column out"
        )


def _unknown(fields: Fields) -> str:
    """What to say to columns that make no form."""
    found = f"the columns are {listing(map(shown, fields), MOST_LISTED) or 'none'}"
    forms = f"expected one of the forms {'; '.join(FORMS)}"
    if any(map(fields.is_filled, (*REJECTED, "chosen"))):
        why = "Thimble learns from answers, not from preferences: keep the chosen one"
        return f"{found} ({why}): {forms}{_how_to_keep(fields)}"
    if fields.is_filled("inputids"):
        return (
            f"{found}: the row is tokens already (input_ids), and Thimble makes the tokens itself: give the text they "
            "were made of, as messages, prompt and completion, or text"
        )
    if str(fields.peek("role") or fields.peek("from")).lower() in ROLES:
        return (
            f"{found}: the row is one message, and a row is a whole conversation: write all messages of one into a "
            'list, as in {"messages": [{"role": "user", "content": "..."}, ...]}'
        )
    held = [key for key in fields if are_messages(fields.value(key))]
    if held:
        return f"{found}: {shown(held[0])} holds messages; call that column messages"
    within = [f"{shown(key)}.{shown(name)}" for key, name in _inner_messages(fields)]
    if within:
        return f"{found}: {within[0]} holds messages; write them into a column messages of the row itself"
    listed = [name for name in ALSO_CHATS if isinstance(loaded(fields.peek(name)), list | tuple)]
    if listed:
        return f"{found}: {fields.shown(listed[0])} is a list: expected messages in it, each with role and content"
    options = suggestion(fields)
    return f"{found}: {forms}" + (f"; if yours have other names, add {options}" if options else "")


def _how_to_keep(fields: Fields) -> str:
    """How to learn the chosen answer of a pair."""
    prompt = fields.first_filled(PROMPTS)
    if prompt and fields.is_filled("chosen"):
        names = {"prompt_column": prompt, "completion_column": "chosen"}
        options = " ".join(typed_option(option, fields.shown(name)) for option, name in names.items())
        return f"; to learn the chosen answers, add {options}"
    return (
        "; to learn the chosen conversations, call that column messages" if are_messages(fields.peek("chosen")) else ""
    )


def _where_chosen(fields: Fields) -> str:
    """Where the answer of a conversation stands that ends in a pair of answers."""
    if not fields.is_filled("chosen"):
        return ""
    why = "Thimble learns from answers, not from preferences"
    return f"; {fields.shown('chosen')} holds the answer: put it behind the messages, and leave rejected out ({why})"


def _inner_messages(fields: Fields) -> Iterator[tuple[str, str]]:
    """Columns that are objects with messages in them, and the keys of those."""
    for key in fields:
        value = fields.value(key)
        if isinstance(value, Mapping):
            yield from ((key, name) for name in value if are_messages(value[name]))
