"""`thimble chat` in a terminal or a pipe: lines in, answers out. With cli.py the only file that prints."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from thimble.errors import InputError

FENCE = '"""'  # begins and ends a turn of several lines
HISTORY_LINES = 1000
HELP = """\
/use NAME   talk to another adapter, or to base; alone it lists them
/reset      forget what was said (also /clear)
/help       this list (also /?)
/quit       leave (also /exit, /bye, Ctrl-D)
\"""         begins and ends a turn of several lines
Ctrl-C stops an answer, or drops a line that is not sent."""

Complain = Callable[[Iterable[str]], None]


def talk_in_terminal(talk: Any, complain: Complain, history: Path) -> None:
    """Talk until the user leaves, with lines that can be edited and a history of them."""
    names = f" /use NAME switches ({', '.join(talk.names)})," if len(talk.names) > 1 else ""
    print(f"Talking to {talk.active}.{names} /reset forgets, /help lists more, /quit leaves.")
    with _line_editing(history):
        for text in _typed(talk):
            if text.startswith(FENCE):
                _answer(talk, text.removeprefix(FENCE).removesuffix(FENCE).strip("\n"), complain)
            elif not text.startswith("/"):
                _answer(talk, text, complain)
            elif text.split()[0] in ("/quit", "/exit", "/bye"):
                return
            else:
                _obey(talk, text, complain)


def talk_in_pipe(talk: Any, lines: Iterable[str], complain: Complain) -> int:
    """Answer each line of a pipe as a turn of one conversation; prints the answers alone, gives the exit code."""
    code = 0
    if isinstance(lines, io.TextIOWrapper):  # a byte that is no UTF-8 does not end the conversation
        lines.reconfigure(errors="replace")
    for line in lines:
        if line.strip() and not _answer(talk, line.strip(), complain):
            code = 2
    return code


def history_file() -> Path:
    """Where lines are kept between chats; of a user without a home they are not."""
    home = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(home):  # as the XDG specification has it
        home = os.path.join(os.path.expanduser("~"), ".local", "state")
    return Path(os.devnull if home.startswith("~") else home) / "thimble" / "chat_history"


def write(pieces: Iterable[str]) -> None:
    """Print an answer as it comes."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _answer(talk: Any, text: str, complain: Complain) -> bool:
    """One turn; Ctrl-C stops the answer, not the chat. Says whether there was one."""
    try:
        write(talk.stream(text))
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print(" [stopped]")
    except InputError as error:
        complain(error.problems)
        return False
    return True


def _obey(talk: Any, text: str, complain: Complain) -> None:
    command, _, name = text.partition(" ")
    try:
        if command in ("/reset", "/clear"):
            talk.reset()
            print("forgotten")
        elif command == "/use" and name.strip():
            talk.use(name.strip())
        elif command == "/use":
            print(", ".join(talk.names))
        elif command in ("/help", "/?"):
            print(HELP)
        else:
            print(f"there is no command {command}; to begin a turn with /, put {FENCE} around it\n{HELP}")
    except InputError as error:
        complain(error.problems)


def _typed(talk: Any) -> Iterator[str]:
    """What the user types until the end of input: a line, or several with `FENCE` before and behind them."""
    while True:
        print()
        try:
            text = input(f"{talk.active} > ").strip()
            while text.startswith(FENCE) and not (len(text) > len(FENCE) and text.endswith(FENCE)):
                text += "\n" + input("... ").rstrip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D leaves)")
            continue
        if text.strip('" \n'):
            yield text


@contextlib.contextmanager
def _line_editing(history: Path) -> Iterator[None]:
    """Let lines be edited and earlier ones be found, where the system can; kept between chats where there is room."""
    try:
        import readline
    except ImportError:
        yield
        return
    with contextlib.suppress(OSError):  # there is none yet
        readline.read_history_file(history)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a home that cannot be written
            history.parent.mkdir(parents=True, exist_ok=True)
            history.touch(mode=0o600)
            readline.set_history_length(HISTORY_LINES)
            readline.write_history_file(history)
