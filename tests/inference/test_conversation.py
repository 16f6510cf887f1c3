"""Talking: turns, switching, leaving early; conversations that share a session do not disturb one another."""

from pathlib import Path

import pytest

from samples import make_adapter
from thimble.backends.torch.session import TorchSession
from thimble.data.encode import Encoder
from thimble.data.template import ChatTemplate
from thimble.data.tokenizer import tokenizer_from_gguf
from thimble.errors import AdapterError
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
