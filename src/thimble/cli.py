"""The command line: argv to config to command to printed report. The only file that prints or exits."""

import argparse
import errno
import json
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from thimble import __version__
from thimble.commands import COMMANDS, Command
from thimble.config.names import answer
from thimble.config.options import Field, groups_of, option_type, options_of, takes_many
from thimble.config.sources import build_config
from thimble.config.values import as_typed, flag
from thimble.errors import InputError, RunError, ThimbleError, as_word, escaped
from thimble.report.streams import prepare_streams, say, silence, write_result
from thimble.report.terminal import Progress, to_json

EXIT_INTERRUPTED = {signal.SIGINT: 130, signal.SIGTERM: 143}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; exit codes: 0 done, 2 refused, 3 the run failed, 130 or 143 interrupted, 1 a fault of ours."""
    prepare_streams()
    is_json = is_debug = False
    try:
        parser = make_parser()
        options, unknown = parser.parse_known_args(argv)
        if not options.command:
            parser.print_help()
            return 0
        is_json, is_debug = options.json, options.debug
        return _run(options, unknown)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED[signal.SIGINT]
    except BrokenPipeError:  # who read the output has left: so does a chat
        silence(sys.stdout)
        return 0
    except Exception as error:
        if is_debug:
            raise
        problems, exit_code = _explained(error)
        _complain(problems)
        if is_json:
            write_result(json.dumps({"error": list(problems), "exit_code": exit_code}))
        return exit_code


def _explained(error: Exception) -> tuple[Sequence[str], int]:
    """What went wrong, and the exit code that says so."""
    if isinstance(error, ThimbleError):
        return error.problems, error.exit_code
    if isinstance(error, OSError):
        is_full = error.errno == errno.ENOSPC
        return [f"the disk is full ({error.filename or error})" if is_full else str(error)], 3
    if isinstance(error, MemoryError):
        return [f"memory ran out ({error}): free some, or take a smaller base or shorter rows"], 3
    if isinstance(error, ImportError) and not (error.name or "").startswith("thimble"):
        why = f"{error.name or 'a package'} cannot be loaded ({error})"
        return [f"{why}: install it again, or, if `ulimit -v` limits the memory of a process, allow it more"], 2
    fault = f"a fault of Thimble's own: {type(error).__name__}: {error} (add --debug to see where, and report it)"
    return [fault], 1


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands, derived from the options of their configs."""
    parser = argparse.ArgumentParser(
        prog="thimble", description="Fine-tune language models with LoRA on the machine you have.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"thimble {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        about = {"help": command.summary, "description": command.summary}
        sub = commands.add_parser(name, **about, allow_abbrev=False, add_help=False)
        for title, options in groups_of(command.options).items():
            group = sub.add_argument_group(title)
            for spec in options.values():
                _add_option(group, spec)
        # The last group is that of every command.
        group.add_argument("--config", metavar="FILE.yaml", help="Read options from a YAML file; flags override it.")
        group.add_argument("--json", action="store_true", help="Print one JSON object on stdout and nothing else.")
        group.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
        group.add_argument("-h", "--help", action="help", help="Show this help and exit.")
    return parser


def _add_option(group: argparse._ArgumentGroup, spec: Field) -> None:
    kind, _ = option_type(spec)
    name, meta = spec.name, spec.metadata
    shown = "" if spec.default in (None, "", (), False) else f" (default: {as_typed(spec.default)})"
    options: dict[str, Any] = {"help": (meta["help"] + shown).replace("%", "%%"), "default": argparse.SUPPRESS}
    if meta["positional"]:
        group.add_argument(name, nargs="*" if takes_many(spec) else "?", metavar=meta["metavar"], **options)
    elif kind is bool:
        group.add_argument(flag(name), action="store_true", **options)
    else:
        choices = "{" + ",".join(meta["choices"]) + "}" if meta["choices"] else None
        action = "append" if name == "adapter" else "store"
        group.add_argument(flag(name), metavar=meta["metavar"] or choices or "N", action=action, **options)


def _run(options: argparse.Namespace, unknown: list[str]) -> int:
    values = vars(options)
    command, config_file, is_json = COMMANDS[values.pop("command")], values.pop("config"), values.pop("json")
    values.pop("debug")
    config = build_config(command.options, values, config_file, _unknown_words(command, unknown))
    if not command.renderer_path:
        return _chat(command, config, is_json)
    progress = Progress(sys.stderr)
    stop = _StopFlag(command.kept_on_stop)
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


def _unknown_words(command: Command, unknown: list[str]) -> list[str]:
    """A problem for each argument that no option takes, with what to type instead."""
    options = options_of(command.options)
    known = (*options, "config", "json", "debug")
    problems = [
        f"{word} is taken for an option: to name the file, type {as_word(word)}"
        if os.path.lexists(word)
        else answer(word.split("=")[0], known)
        for word in unknown
        if word.startswith("-")
    ]
    if not problems:  # else a word may be the value of an unknown flag
        is_many = any(spec.metadata["positional"] and takes_many(spec) for spec in options.values())
        advice = ": name all of them before the flags" if is_many else ""
        problems = [f"{word!r} is one argument too many for thimble {command.name}{advice}" for word in unknown]
    return problems


class _StopFlag:
    """Turns the first Ctrl-C or termination into a request to stop; the second ends the process at once."""

    def __init__(self, kept: str) -> None:
        self.kept = kept  # what the command leaves, for the message
        self.signal: signal.Signals | None = None
        for number in EXIT_INTERRUPTED:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.signal:
            os._exit(EXIT_INTERRUPTED[signal.Signals(number)])
        self.signal = signal.Signals(number)
        say(f"\nstopping after this step, {self.kept} (once more to leave at once)", sys.stderr)

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
