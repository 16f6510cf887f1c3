"""The command line: argv to config to command to printed report. The only file that prints or exits."""

import argparse
import errno
import json
import os
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from thimble import __version__
from thimble.commands import COMMANDS, Command
from thimble.config import command_line
from thimble.config.command_line import Line, read_line, switches_in
from thimble.config.completion import SHELLS, completion_script
from thimble.config.sources import build_config
from thimble.config.values import one_of
from thimble.errors import InputError, RunError, ThimbleError, escaped
from thimble.report.streams import prepare_streams, say, silence, write_result
from thimble.report.terminal import Progress, to_json

HANGUP = getattr(signal, "SIGHUP", None)  # the terminal was closed, or the connection to it lost
EXIT_INTERRUPTED = {number: 128 + number for number in (signal.SIGINT, signal.SIGTERM, HANGUP) if number}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; exit codes: 0 done, 2 refused, 3 the run failed, above 128 interrupted, 1 a fault of ours."""
    prepare_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    switches = switches_in(words)
    try:
        return _run(read_line(words, COMMANDS, __version__))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED[signal.SIGINT]
    except BrokenPipeError:  # who read the output has left: so does a chat
        silence(sys.stdout)
        return 0
    except Exception as error:
        if switches["debug"]:
            raise
        problems, exit_code = _explained(error)
        _complain(problems)
        if switches["json"]:
            write_result(json.dumps({"error": list(problems), "exit_code": exit_code}))
        return exit_code


def _explained(error: Exception) -> tuple[Sequence[str], int]:
    """What went wrong, and the exit code that says so."""
    if isinstance(error, ThimbleError):
        return error.problems, error.exit_code
    if isinstance(error, OSError):
        is_full = error.errno == errno.ENOSPC
        return [f"the disk is full ({error.filename or error})" if is_full else str(error)], 3
    # torch has no error of its own for memory that it was not given.
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        return [f"memory ran out ({error}): free some, or take a smaller base or shorter rows"], 3
    if isinstance(error, ImportError) and not (error.name or "").startswith("thimble"):
        why = f"{error.name or 'a package'} cannot be loaded ({error})"
        return [f"{why}: install it again, or, if `ulimit -v` limits the memory of a process, allow it more"], 2
    fault = f"a fault of Thimble's own: {type(error).__name__}: {error} (add --debug to see where, and report it)"
    return [fault], 1


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    return command_line.make_parser(COMMANDS, __version__)


def _run(line: Line) -> int:
    if not line.command:
        return _answer_without_command(line.switches)
    _check_working_folder()
    command, is_json = COMMANDS[line.command], line.switches["json"]
    config = build_config(command.options, line.values, line.config_file, line.problems)
    if not command.renderer_path:
        return _chat(command, config, is_json)
    progress = Progress(sys.stderr)
    stop = _StopFlag(command.when_stopped)
    callbacks: dict[str, Any] = {"on_event": progress.on_event, "should_stop": stop}
    if "should_wait" in command.listeners:
        pause = _PauseFlag(progress)
        callbacks |= {"on_event": pause.on_event, "should_wait": pause}
    report = command.function(config, **{name: callbacks[name] for name in command.listeners})
    progress.end()
    problem = write_result(to_json(report) if is_json else escaped(command.renderer(report), kept="\n"))
    if problem:
        place = f"; what was made is in {report.out}" if getattr(report, "out", None) else ""
        raise RunError(f"the report cannot be written to standard output ({problem}){place}")
    return EXIT_INTERRUPTED[stop.signal] if stop.signal else 0


def _check_working_folder() -> None:
    """Refuse to work where no relative path leads anywhere, and where torch's own libraries cannot load one another."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise InputError(
            "the working folder is gone: it was deleted or moved; change to another, as in: cd ~"
        ) from None


def _answer_without_command(switches: Mapping[str, Any]) -> int:
    """What a line without a command asks for: the version, a script for a shell, or the help."""
    shell = switches["completion"]
    if switches["version"]:
        print(json.dumps({"version": __version__}) if switches["json"] else f"thimble {__version__}")
    elif shell in SHELLS:
        print(completion_script(shell, {name: (it.summary, it.options) for name, it in COMMANDS.items()}), end="")
    elif shell is not None:
        raise InputError(f"--completion {shell}: {one_of(SHELLS, shell)}")
    elif switches["json"]:
        raise InputError(
            f"no command is given: name one of {', '.join(COMMANDS)}, as in: thimble plan mine.jsonl --json"
        )
    else:
        make_parser().print_help()
    return 0


class _StopFlag:
    """Turns the first Ctrl-C, termination or loss of the terminal into a request to stop.

    The second ends the process at once, but for the loss of the terminal, of which shell and system both tell. That is
    nothing to stop for where it is ignored, as by nohup.
    """

    def __init__(self, when: str) -> None:
        self.when = when  # the command ends, and what it leaves
        self.signal: signal.Signals | None = None
        for number in EXIT_INTERRUPTED:
            if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.signal and number == HANGUP:
            return
        if self.signal:
            os._exit(EXIT_INTERRUPTED[signal.Signals(number)])
        self.signal = signal.Signals(number)
        say(f"\nstopping {self.when} (once more to leave at once)", sys.stderr)

    def __call__(self) -> bool:
        return self.signal is not None


class _PauseFlag:
    """Turns Ctrl-Z into a request to pause: the run saves a checkpoint, then the process stops.

    While no steps are taken, and when Ctrl-Z is pressed once more, the process stops at once, as it does for every
    other command. `fg` or the signal CONT continues it.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._is_training = self._is_asked = self._is_announced = False
        if hasattr(signal, "SIGTSTP"):
            signal.signal(signal.SIGTSTP, self._on_signal)

    def on_event(self, event: Any) -> None:
        """Note whether steps are being taken, and show the event."""
        if event.kind in ("stage", "step"):
            self._is_training = event.kind == "step"
        self._progress.on_event(event)

    def _on_signal(self, number: int, frame: object) -> None:
        if self._is_asked or not self._is_training:
            self._stop_process()
            return
        self._is_asked = True
        say("\npausing after this step (once more to pause at once)", sys.stderr)

    def _stop_process(self) -> None:
        self._is_asked = self._is_announced = False
        os.kill(os.getpid(), signal.SIGSTOP)  # the process stops here until it is continued

    def __call__(self) -> str:
        if self._is_announced:
            self._stop_process()
        self._is_announced = self._is_asked
        return "asked for with Ctrl-Z; fg goes on, or kill -CONT" if self._is_asked else ""


def _chat(command: Command, config: Any, is_json: bool) -> int:
    from thimble import chat_loop

    is_talk = config.prompt is None
    if is_talk and is_json:
        raise InputError("chat with --json needs --prompt: it answers once")
    progress = Progress(sys.stderr)
    is_in_terminal = is_talk and sys.stdin.isatty()
    talk = command.function(config, progress.on_event if is_in_terminal else progress.on_warning)
    progress.end()
    if is_in_terminal:
        chat_loop.talk_in_terminal(talk, _complain, chat_loop.history_file())
        return 0
    if is_talk:
        try:
            return chat_loop.talk_in_pipe(talk, sys.stdin, _complain)
        except BrokenPipeError:  # the reader has had enough
            silence(sys.stdout)
            return 0
    if is_json:
        answer = talk.ask(config.prompt)
        print(json.dumps({"answer": answer, "adapter": talk.active}))
    else:
        chat_loop.write(talk.stream(config.prompt))
    return 0


def _complain(problems: Iterable[str]) -> None:
    for problem in problems:
        say("thimble: " + escaped(problem, kept="\n"), sys.stderr)


def run() -> NoReturn:
    """Entry point of the command: exits with the code of `main`."""
    try:
        code: Any = main()
    except SystemExit as leaving:  # of the parser, with help or a refusal
        code = leaving.code
    write_result("", end="")  # what is buffered must not fail later, where nobody catches it
    sys.exit(code)
