"""`thimble chat` on a tiny base, whose context is 128 tokens: one question, a pipe, and a conversation in Python."""

import io
import json

import pytest

import thimble
from thimble.errors import DataError

FLAGS = ("--compute", "fp32", "--max-new-tokens", "4", "--temperature", "0")
LONG = "the list is on it and the others are in it. " * 20


@pytest.fixture
def piped(thimble, monkeypatch, tiny_base):
    """Give lines to `thimble chat` through a pipe."""

    def run(text: str):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        return thimble("chat", "--base", tiny_base, *FLAGS)

    return run


def test_one_question_is_answered_as_text_or_as_json(thimble, tiny_base):
    code, out, err = thimble("chat", "--base", tiny_base, *FLAGS, "--prompt", "Hello")
    assert (code, err) == (0, "")
    code, written, _ = thimble("chat", "--base", tiny_base, *FLAGS, "--prompt", "Hello", "--json")
    assert json.loads(written) == {"answer": out.removesuffix("\n"), "adapter": "base"}


def test_a_question_longer_than_the_context_is_refused_with_both_lengths(thimble, tiny_base):
    code, out, err = thimble("chat", "--base", tiny_base, *FLAGS, "--prompt", LONG)
    assert (code, out) == (2, "")
    assert "thimble: the prompt has " in err
    assert "tokens: the context of the base is 128" in err


def test_a_pipe_gets_the_answers_alone_and_is_told_when_turns_are_left_out(piped):
    code, out, err = piped("Hello\n\nHello\n")
    assert (code, err, out.count("\n")) == (0, "", 2)
    code, out, err = piped("the others are on the list and in it\n" * 8)
    assert (code, out.count("\n")) == (0, 8)
    assert "warning: the conversation has outgrown the context of the base (128 tokens)" in err


def test_a_line_that_is_too_long_does_not_end_a_pipe(piped):
    code, out, err = piped(f"{LONG}\nHello\n")
    assert (code, out.count("\n")) == (2, 1)
    assert "the prompt has" in err


def test_talking_as_json_needs_a_question(thimble, tiny_base):
    code, out, _ = thimble("chat", "--base", tiny_base, "--json")
    assert (code, json.loads(out)["exit_code"]) == (2, 2)


def test_in_python_turns_that_are_left_out_are_a_warning_and_a_long_one_is_an_error(tiny_base):
    talk = thimble.chat(base=tiny_base, compute="fp32", max_new_tokens=4)
    with pytest.warns(UserWarning, match="outgrown the context"):
        list(map(talk.ask, ["the others are on the list and in it"] * 8))
    with pytest.raises(DataError, match="the context of the base is 128"):
        talk.ask(LONG)


@pytest.fixture
def trained(tiny_base, tmp_path):
    """Train an adapter for a moment with options that say how its prompts are made."""

    def run(**options):
        rows = [{"head": f"ticket {n}", "body": f"it broke {n} times", "label": "account"} for n in range(12)]
        thimble.train(
            rows, base=tiny_base, out=str(tmp_path / "run"), compute="fp32", rank=2, max_steps=1, eval_rows=0,
            seq_len=128, **options,
        )  # fmt: skip
        return str(tmp_path / "run")

    return run


def test_a_turn_is_written_into_the_prompt_template_of_the_run(trained, tiny_base):
    run, told = trained(prompt_template="Ticket: {body}!", completion_column="label"), []
    talk = thimble.chat(base=tiny_base, adapter=[run], on_event=told.append, max_new_tokens=2, compute="fp32")
    talk.ask("it is late")
    assert talk.messages[0]["content"] == "Ticket: it is late!"
    assert any("--prompt-template 'Ticket: {body}!'" in event.text for event in told if event.kind == "decision")
    talk.reset()
    talk.use("base")
    talk.ask("it is late")
    assert talk.messages[0]["content"] == "it is late"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt_template": "{head}: {body}", "completion_column": "label"}, "prompts made of several columns"),
        ({"text_column": "body"}, "was trained on plain text, which it continues"),
    ],
)
def test_a_chat_that_cannot_ask_as_the_run_did_says_so(trained, tiny_base, options, said):
    with pytest.warns(UserWarning, match=said):
        talk = thimble.chat(base=tiny_base, adapter=[trained(**options)], max_new_tokens=2, compute="fp32")
    talk.ask("it is late")
    assert talk.messages[0]["content"] == "it is late"
