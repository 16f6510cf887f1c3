"""What is wrong with a request, in the form of OpenAI's errors, with the field that is to be mended."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from thimble.errors import InputError, escaped

MOST_TOLD = 8  # problems of one request
SHOWN_CHARACTERS = 200  # of a name that a client gave

_OWN_FIELD = re.compile(r"([a-z_]+): ")
# What is meant by the kinds of pydantic, where its own words are not enough.
_WORDS = {
    "extra_forbidden": "this field is not supported",
    "missing": "this field is required",
}


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
    found = error.errors(include_url=False, include_context=False)
    pairs = list(dict.fromkeys(_told(item, body) for item in found))
    lines = [f"{path}: {said}" if path else said for path, said in pairs]
    more = [f"and {len(lines) - MOST_TOLD} more"] if len(lines) > MOST_TOLD else []
    code = "unsupported_parameter" if found[0]["type"] == "extra_forbidden" else None
    return Refusal(400, "\n".join(lines[:MOST_TOLD] + more), pairs[0][0] or None, code)


def _told(item: Mapping[str, Any], body: Any) -> tuple[str, str]:
    """A problem: the path of its field, and what is wrong there."""
    path, said = _path(item["loc"], body), str(_WORDS.get(item["type"], item["msg"]))
    if item["type"] != "value_error":
        return path, said.replace("Input should be", "expected")
    said = said.removeprefix("Value error, ")
    own = _OWN_FIELD.match(said)  # a check of several fields says which one it blames
    if own:
        path, said = ".".join(filter(None, (path, own[1]))), said[own.end() :]
    return path, said


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
