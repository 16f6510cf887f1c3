"""What is wrong with a request, in the form of OpenAI's errors, with the field that is to be mended."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from thimble.errors import InputError, escaped, plural

MOST_TOLD = 8  # problems of one request
SHOWN_CHARACTERS = 200  # of a name that a client gave
# What other servers, and earlier versions of the API, call fields of a request that are there.
_INSTEAD = {
    other: ours
    for ours, others in {
        "tools": "functions", "tool_choice": "function_call", "repetition_penalty": "repeat_penalty",
        "max_tokens": "num_predict n_predict max_new_tokens max_length", "stop": "stop_sequences",
        "response_format": "format", "structured_outputs": "grammar json_schema guided_json guided_regex "
        "guided_choice guided_grammar", "chat_template_kwargs": "enable_thinking think thinking",
        "reasoning_effort": "reasoning", "response_format.json_schema": "response_format.schema",
        "lora": "adapter adapters adapter_id lora_name lora_path",
    }.items()
    for other in others.split()
}  # fmt: skip
LONGEST_WORD = 40  # characters of a value that was to be one of some words

_OWN_FIELD = re.compile(r"([a-z_]+): ")
# What is expected by the kinds of problems that pydantic finds, with what it knows of each (`ctx`).
_EXPECTED = {
    **dict.fromkeys(("too_short", "string_too_short"), "a length of at least {min_length}"),
    **dict.fromkeys(("too_long", "string_too_long"), "a length of at most {max_length}"),
    "string_pattern_mismatch": "text that matches {pattern}", "literal_error": "{expected}",
    "greater_than_equal": "at least {ge}", "less_than_equal": "at most {le}", "less_than": "less than {lt}",
    "finite_number": "a number that is not infinite", "int_from_float": "a whole number", "int_type": "a whole number",
    "float_type": "a number", "bool_type": "true or false", "string_type": "text", "string_unicode": "text",
    "list_type": "a list", "dict_type": "an object", "model_type": "an object", "none_required": "null",
}  # fmt: skip


class Refusal(Exception):
    """A request that is not answered.

    Args:
        status: Of HTTP.
        message: What is wrong, the value, and what was expected.
        param: Path of the field, such as `messages.0.content`; None if no field is to blame.
        code: As OpenAI names it, or None.
        headers: To be sent beside it.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """As it is sent."""
        kind = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        other = "invalid_request_error" if self.status < 500 else "server_error"
        message = escaped(self.message, kept="\n")
        error = {"message": message, "type": kind.get(self.status, other), "param": self.param, "code": self.code}
        return {"error": error}


def bad_field(param: str, message: str, code: str | None = None) -> Refusal:
    """A field with a value that cannot be honoured."""
    return Refusal(400, f"{param}: {message}", param, code)


def from_input_error(error: InputError, param: str | None) -> Refusal:
    """What Thimble refuses, as the fault of a field."""
    return Refusal(400, "\n".join(error.problems), param)


def from_validation(error: ValidationError, body: Any) -> Refusal:
    """Fields that are wrong, all of them; `param` and `code` are of the first."""
    found = error.errors(include_url=False)
    pairs = list(dict.fromkeys(_told(item, body) for item in found))
    lines = [f"{path}: {said}" if path else said for path, said in pairs]
    more = [f"and {len(lines) - MOST_TOLD} more"] if len(lines) > MOST_TOLD else []
    code = "unsupported_parameter" if found[0]["type"] == "extra_forbidden" else None
    return Refusal(400, "\n".join(lines[:MOST_TOLD] + more), pairs[0][0] or None, code)


def _told(item: Mapping[str, Any], body: Any) -> tuple[str, str]:
    """A problem: the path of its field, and what is wrong there."""
    path, kind = _path(item["loc"], body), item["type"]
    if kind == "extra_forbidden":
        ours = _INSTEAD.get(path)
        return path, "this field is not supported" + (f"; use {ours}" if ours else "")
    if kind == "missing":
        return path, "this field is required"
    if kind in _EXPECTED:
        given = _given(item["input"], is_word=kind == "literal_error")
        known = {
            name: f"{value:g}" if isinstance(value, float) else value for name, value in item.get("ctx", {}).items()
        }
        return path, f"expected {_EXPECTED[kind].format(**known)}, got {given}"
    said = str(item["msg"]).removeprefix("Value error, ")
    own = _OWN_FIELD.match(said)  # a check of several fields says which one it blames
    if own:
        path, said = ".".join(filter(None, (path, own[1]))), said[own.end() :]
    return path, said


def _given(value: Any, is_word: bool) -> str:
    """A value as it is told: a number or a word as it is; of all else, which may be what was asked, how long it is."""
    if isinstance(value, str) and not (is_word and len(value) <= LONGEST_WORD):
        return f"text of {plural(len(value), 'character')}" if value else "empty text"
    if isinstance(value, list | dict):
        kind = "list" if isinstance(value, list) else "object"
        return f"{'a' if kind == 'list' else 'an'} {kind} of {len(value):,}" if value else f"an empty {kind}"
    return json.dumps(value)[:SHOWN_CHARACTERS]


def _path(loc: Sequence[int | str], body: Any) -> str:
    """Where a problem is in the body; names that pydantic gives to alternatives of a type are left out."""
    kept: list[str] = []
    for place, part in enumerate(loc):
        is_last = place == len(loc) - 1
        if isinstance(body, dict) and (part in body or is_last):
            kept.append(str(part)[:SHOWN_CHARACTERS])
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            kept.append(str(part))
            body = body[part]
    return ".".join(kept)
