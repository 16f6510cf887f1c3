"""Talking: turns, switching, leaving early; conversations that share a session do not disturb one another."""

from pathlib import Path

import pytest

from samples import make_adapter
from thimble.backends.torch.session import TorchSession
from thimble.data.encode import Encoder
from thimble.data.template import ChatTemplate
from thimble.data.tokenizer import tokenizer_from_gguf
from thimble.errors import AdapterError, DataError
from thimble.inference.conversation import Conversation
from thimble.inference.sampling import SamplingOptions
from thimble.models.base import open_base

TINY = Path(__file__).parents[1] / "fixtures" / "gguf" / "smollm2.gguf"


@pytest.fixture(scope="module")
def talk():
    base = open_base(TINY)
    session, tokenizer = TorchSession(base, "fp32", "file"), tokenizer_from_gguf(base.metadata)
    template = ChatTemplate(tokenizer.chat_template, tokenizer.bos_token or "", tokenizer.eos_token or "")
    encoder = Encoder(tokenizer, template, 4096)
    adapters = {"one": session.load(make_adapter(base)), "two": session.load(make_adapter(base, b_size=0.3))}

    def start(*names, **options):
        chosen = {name: adapters[name] for name in names}
        return Conversation(session, tokenizer, encoder, chosen, SamplingOptions(8, tokenizer.stop_ids, **options))

    return start


def test_two_conversations_on_one_session_keep_their_own_adapters(talk):
    first, second = talk("one"), talk("two")
    alone = talk("one").ask("Hello"), talk("two").ask("Hello")
    assert alone[0] != alone[1]
    assert (first.ask("Hello"), second.ask("Hello")) == alone
    pieces = [talk("one").stream("Hello"), talk("two").stream("Hello")]
    heard = ["", ""]
    for _ in range(20):  # word by word in turns
        for number, stream in enumerate(pieces):
            heard[number] += next(stream, "")
    assert tuple(heard) == alone


def test_switching_to_the_base_gives_the_answers_of_the_base(talk):
    conversation = talk("one")
    assert conversation.active == "one"
    conversation.use("base")
    assert conversation.ask("Hello") == talk().ask("Hello")
    with pytest.raises(AdapterError, match="choose from base, one"):
        conversation.use("three")


def test_an_answer_that_is_left_early_keeps_what_was_heard(talk):
    conversation = talk("one")
    stream = conversation.stream("Hello")
    heard = next(stream) + next(stream)
    stream.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": heard}
    assert conversation.ask("Again")
    assert [turn["role"] for turn in conversation.messages] == ["user", "assistant"] * 2


def test_each_turn_has_a_seed_of_its_own_and_the_conversation_is_repeated_by_its_seed(talk):
    first, again = (talk("one", temperature=1.5, seed=5) for _ in range(2))
    answers = [first.ask("Hello"), first.ask("Hello")]
    assert answers == [again.ask("Hello"), again.ask("Hello")]
    assert answers[0] != answers[1]


def test_a_question_that_is_not_kept_leaves_no_trace_and_has_the_same_answer_again(talk):
    conversation = talk("one", temperature=1.0, seed=3)
    first = conversation.ask("Hello", keep=False)
    assert conversation.ask("Hello", keep=False) == first
    assert conversation.messages == []
    assert conversation.ask("Hello") == first
    assert conversation.ask("Hello", keep=False) != first  # it sees what was said before
    assert [turn["role"] for turn in conversation.messages] == ["user", "assistant"]


@pytest.fixture
def long_talk(talk):
    """A conversation with a system prompt that has outgrown the context, and the warnings of it."""
    conversation, warnings = talk("one"), []
    conversation._system, conversation._warn = "Be kind.", warnings.append
    conversation.reset()
    for number in range(12):
        conversation.ask(f"turn {number} is on the list")
    return conversation, warnings


def test_a_conversation_that_outgrows_the_context_loses_its_oldest_turns_and_says_so(long_talk):
    conversation, warnings = long_talk
    roles = [turn["role"] for turn in conversation.messages]
    assert roles[0] == "system"
    assert roles[1:] == ["user", "assistant"] * (len(roles) // 2)
    assert conversation.messages[-2]["content"] == "turn 11 is on the list"
    assert len(roles) < 1 + 2 * 12
    assert "the conversation has outgrown the context of the base (128 tokens): the oldest 2 messages" in warnings[0]
    assert len(conversation._encoder.prompt(conversation.messages[:-1])) + 8 <= 128


def test_a_turn_longer_than_the_context_is_refused_with_its_length_and_changes_nothing(talk):
    conversation = talk("one")
    conversation.ask("Hello")
    before = list(conversation.messages)
    with pytest.raises(DataError, match=r"the prompt has \d+ tokens: the context of the base is 128"):
        conversation.ask("the others are on the list " * 30)
    assert conversation.messages == before
    assert conversation.ask("Hello")


@pytest.mark.parametrize("turn", [None, 3, [{"role": "user", "content": "Hello"}]])
def test_a_turn_that_is_no_text_is_refused_and_changes_nothing(talk, turn):
    conversation = talk()
    with pytest.raises(DataError, match="expected text"):
        conversation.ask(turn)
    assert conversation.ask("Hello") == talk().ask("Hello")
