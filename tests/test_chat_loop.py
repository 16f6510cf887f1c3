"""Talking in a terminal and in a pipe: what is typed, what is printed, and what is left when it ends."""

import io

import pytest

from thimble import chat_loop
from thimble.errors import AdapterError, DataError


class Talk:
    """Answers with what it heard."""

    def __init__(self):
        self.active, self.names, self.heard = "mine", ["base", "mine"], []

    def stream(self, text):
        if "too long" in text:
            raise DataError("the prompt has 900 tokens")
        if text == "wait":
            yield "begun"
            raise KeyboardInterrupt
        self.heard.append(text)
        yield from ("re: ", text)

    def reset(self):
        self.heard = []

    def use(self, name):
        if name not in self.names:
            raise AdapterError(f"there is no adapter {name!r} here")
        self.active = name


@pytest.fixture
def typed(monkeypatch, capsys, tmp_path):
    """Type lines into a terminal; gives the talk, what was printed, and what was complained of."""

    def run(*lines):
        monkeypatch.setattr("sys.stdin", io.StringIO())
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        waiting = iter(lines)

        def next_line(prompt=""):
            line = next(waiting, EOFError)
            if not isinstance(line, str):
                raise line
            return line

        monkeypatch.setattr("builtins.input", next_line)
        talk, complaints = Talk(), []
        chat_loop.talk_in_terminal(talk, complaints.extend, tmp_path / "state" / "history")
        return talk, capsys.readouterr().out, complaints

    return run


def test_lines_are_turns_and_the_end_of_input_leaves(typed):
    talk, out, _ = typed("Hello", "  ", "And?")
    assert talk.heard == ["Hello", "And?"]
    assert "Talking to mine. /use NAME switches (base, mine), /reset forgets, /help lists more, /quit leaves." in out
    assert "re: Hello\n" in out


@pytest.mark.parametrize("word", ["/quit", "/exit", "/bye"])
def test_each_word_for_leaving_leaves(typed, word):
    assert typed("Hello", word, "And?")[0].heard == ["Hello"]


@pytest.mark.parametrize("word", ["/reset", "/clear"])
def test_a_conversation_is_forgotten(typed, word):
    assert typed("Hello", word, "And?")[0].heard == ["And?"]


def test_switching_lists_switches_and_says_what_there_is_not(typed):
    talk, out, complaints = typed("/use", "/use base", "/use other")
    assert talk.active == "base"
    assert "base, mine\n" in out
    assert complaints == ["there is no adapter 'other' here"]


@pytest.mark.parametrize(("word", "shown"), [("/help", "Ctrl-C stops an answer"), ("/?", "Ctrl-D"), ("/foo x", "/foo")])
def test_help_says_what_can_be_typed_and_an_unknown_command_is_no_turn(typed, word, shown):
    talk, out, _ = typed(word)
    assert (talk.heard, shown in out, "/reset      forget" in out) == ([], True, True)


def test_a_turn_of_several_lines_stands_between_three_quotes(typed):
    talk, _, _ = typed('"""one', "", '  two"""', '"""/not a command"""', '"""', "three", '"""')
    assert talk.heard == ["one\n\n  two", "/not a command", "three"]


def test_ctrl_c_stops_the_answer_or_drops_the_line_but_does_not_leave(typed):
    talk, out, _ = typed("wait", KeyboardInterrupt, "Hello")
    assert talk.heard == ["Hello"]
    assert "begun [stopped]" in out
    assert "(/quit or Ctrl-D leaves)" in out


def test_a_turn_that_is_refused_is_told_and_the_talk_goes_on(typed):
    talk, _, complaints = typed("much too long", "Hello")
    assert (talk.heard, complaints) == (["Hello"], ["the prompt has 900 tokens"])


def test_lines_are_kept_for_the_next_talk_where_the_home_can_be_written(typed, tmp_path):
    pytest.importorskip("readline")
    typed("Hello")
    assert (tmp_path / "state" / "history").exists()
    assert (tmp_path / "state" / "history").stat().st_mode & 0o077 == 0


def test_a_home_that_cannot_be_written_does_not_matter(typed, tmp_path):
    (tmp_path / "state").write_text("a file where the folder would be")
    assert typed("Hello")[0].heard == ["Hello"]


def test_in_a_pipe_the_answers_alone_are_printed_and_every_line_is_text(capsys):
    talk, complaints = Talk(), []
    lines = ["Hello\r\n", "\n", "/quit\n", '"""\n', "And?"]
    assert chat_loop.talk_in_pipe(talk, lines, complaints.extend) == 0
    assert capsys.readouterr().out == 're: Hello\nre: /quit\nre: """\nre: And?\n'
    assert chat_loop.talk_in_pipe(talk, ["too long", "Hello"], complaints.extend) == 2
    assert (capsys.readouterr().out, complaints) == ("re: Hello\n", ["the prompt has 900 tokens"])


def test_bytes_that_are_no_text_do_not_end_a_pipe(capsys):
    lines = io.TextIOWrapper(io.BytesIO(b"caf\xe9\nHello\n"), encoding="utf-8")
    assert chat_loop.talk_in_pipe(Talk(), lines, [].extend) == 0
    assert capsys.readouterr().out == "re: caf\ufffd\nre: Hello\n"


def test_the_history_is_in_the_folder_for_state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert chat_loop.history_file() == tmp_path / "thimble" / "chat_history"


def test_a_user_without_a_home_leaves_no_history_behind(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    for state in ("", "relative"):
        monkeypatch.setenv("XDG_STATE_HOME", state)
        with chat_loop._line_editing(chat_loop.history_file()):
            pass
    assert list(tmp_path.iterdir()) == []
