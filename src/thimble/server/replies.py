"""What handlers are given and what they give: plain data, events of a stream, or text."""

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

B = TypeVar("B")


@dataclass(frozen=True)
class Query(Generic[B]):
    """A request as a handler gets it.

    Attributes:
        body: Checked; None if the route takes none.
        path: What stands in the path in place of its names.
        log: Takes what may be told of the request: never what it says, nor what is answered.
    """

    body: B
    path: Mapping[str, str]
    log: dict[str, Any]


class Events(NamedTuple):
    """A stream of events: each is sent as it comes, None as a sign of life."""

    events: AsyncIterator[dict[str, Any] | None]
    close: Callable[[], None]  # called in the end, whatever happens


class Text(NamedTuple):
    """A text of some media type."""

    content: bytes
    media_type: str
    status: int = 200


Reply = dict[str, Any] | Events | Text
