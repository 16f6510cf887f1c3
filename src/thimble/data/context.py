"""Prompts that fit the context of a base: a long conversation loses its oldest turns, a long prompt is refused."""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from thimble.data.messages import Message
from thimble.errors import DataError

ANSWER_SHARE = 4  # of the context: one part in so many is kept for the answer when turns are left out


@dataclass(frozen=True)
class Context:
    """What there is room for."""

    tokens: int  # most tokens of a prompt and its answer together
    answer_tokens: int  # longest answer that is wanted

    @property
    def prompt_tokens(self) -> int:
        """Longest prompt that is left as it is: one with room for the whole answer, or for one of a fair length."""
        return self.tokens - min(self.answer_tokens, max(1, self.tokens // ANSWER_SHARE))


class Fitted(NamedTuple):
    """A conversation that leaves room for an answer."""

    messages: list[Message]  # those that are kept
    left_out: int  # how many are not: the oldest, but for the system message


def fit(messages: Sequence[Message], context: Context, count: Callable[[Sequence[Message]], int]) -> Fitted:
    """Leave the oldest turns out of a conversation that waits for an answer, if it is too long for the context.

    `count` says how many tokens a conversation has. What is left out ends where a user turn begins, so that no answer
    stands without its question and no tool result without its call. The system message and all from the last user turn
    on are kept; a DataError if they alone are too long.
    """
    head, starts = _exchanges(messages)
    counted: dict[int, int] = {}

    def fits(start: int) -> bool:
        counted[start] = count([*messages[:head], *messages[start:]])
        return counted[start] <= context.prompt_tokens

    place = 0
    if not fits(starts[0]):
        last = len(starts) - 1
        place = bisect.bisect_left(starts, True, lo=min(1, last), hi=last, key=fits)
        if starts[place] in counted or not fits(starts[place]):
            check_length(counted[starts[place]], context.tokens)
    return Fitted([*messages[:head], *messages[starts[place] :]], starts[place] - head)


def check_length(tokens: int, context: int) -> None:
    """Refuse a prompt that fills the context, with a DataError."""
    if tokens >= context:
        raise DataError(
            f"the prompt has {tokens:,} tokens: the context of the base is {context:,}, with at least one for the "
            "answer; shorten it, or use a base with a longer context"
        )


def _exchanges(messages: Sequence[Message]) -> tuple[int, list[int]]:
    """How many system messages begin a conversation, and where each part that may be left out begins."""
    head = next((place for place, message in enumerate(messages) if message["role"] != "system"), 0)
    users = (place for place, message in enumerate(messages) if message["role"] == "user")
    return head, [head, *(place for place in users if place > head)]
