"""What is left out of a conversation that is too long: whole exchanges, the oldest first, never half a tool call."""

import pytest

from thimble.data.context import Context, check_length, fit
from thimble.errors import DataError

CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}


def turn(role, tokens):
    return {"role": role, "content": "x" * tokens}


def count(messages):
    """As if a character were a token, and each message had two more."""
    return sum(len(message["content"]) + 2 for message in messages)


def kept(messages, tokens, answer_tokens=10):
    fitted = fit(messages, Context(tokens, answer_tokens), count)
    assert count(fitted.messages) < tokens
    assert len(fitted.messages) + fitted.left_out == len(messages)
    return "".join(message["role"][0] for message in fitted.messages)


EXCHANGE = [turn("user", 8), turn("assistant", 8)]


@pytest.mark.parametrize(
    ("messages", "tokens", "roles"),
    [
        ([*EXCHANGE * 3, turn("user", 8)], 80, "uauauau"),
        ([*EXCHANGE * 3, turn("user", 8)], 79, "uauau"),
        ([*EXCHANGE * 3, turn("user", 8)], 39, "uau"),
        ([*EXCHANGE * 3, turn("user", 8)], 38, "u"),
        ([*EXCHANGE * 3, turn("user", 8)], 11, "u"),
        ([turn("system", 8), *EXCHANGE * 3, turn("user", 8)], 60, "suau"),
        ([turn("system", 4), turn("system", 2), *EXCHANGE * 3, turn("user", 8)], 60, "ssuau"),
        ([turn("assistant", 20), *EXCHANGE, turn("user", 8)], 60, "uau"),
        ([turn("user", 8), CALL, turn("tool", 30), turn("assistant", 8), turn("user", 8)], 60, "u"),
        ([*EXCHANGE, turn("user", 8), CALL, turn("tool", 8)], 34, "uat"),
        ([turn("user", 30), turn("user", 8)], 40, "u"),
    ],
    ids=str,
)
def test_the_oldest_exchanges_go_first(messages, tokens, roles):
    assert kept(messages, tokens) == roles


def test_a_long_conversation_is_not_counted_turn_by_turn():
    seen = []
    messages = [*EXCHANGE * 5000, turn("user", 8)]
    fitted = fit(messages, Context(100, 10), lambda part: seen.append(1) or count(part))
    assert count(fitted.messages) <= 90
    assert len(seen) < 20


@pytest.mark.parametrize(
    "messages", [[turn("user", 50)], [turn("system", 45), *EXCHANGE, turn("user", 8)], [*EXCHANGE, turn("user", 50)]]
)
def test_what_is_too_long_alone_is_refused_with_both_lengths(messages):
    with pytest.raises(DataError, match=r"the prompt has 5\d tokens: the context of the base is 50"):
        fit(messages, Context(50, 10), count)


def test_the_last_turn_may_take_the_room_of_the_answer_but_for_one_token():
    assert kept([*EXCHANGE, turn("user", 47)], 50) == "u"
    check_length(49, 50)
    with pytest.raises(DataError, match="50 tokens"):
        check_length(50, 50)


def test_an_answer_longer_than_the_context_leaves_three_quarters_to_the_prompt():
    assert (Context(128, 512).prompt_tokens, Context(128, 8).prompt_tokens, Context(1, 1).prompt_tokens) == (96, 120, 0)
