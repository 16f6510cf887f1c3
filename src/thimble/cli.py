"""The command line: argv to config to command to printed report. The only file that prints or exits."""

import argparse
import difflib
import errno
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import Field
from typing import Any, NoReturn, get_origin

from thimble import __version__
from thimble.api import CONFIGS, build_config
from thimble.config.options import Options, option_type, options_of
from thimble.errors import InputError, ThimbleError
from thimble.report.inspect_text import render_inspect
from thimble.report.terminal import (
    Progress,
    render_evaluate,
    render_merge,
    render_plan,
    render_train,
    to_json,
)

SUMMARIES = {
    "train": "Learn from examples; writes a run folder with the adapter and a report.",
    "plan": "Say what a training run would decide, need and cost, without training.",
    "evaluate": "Measure a base and adapters on the same rows.",
    "chat": "Talk to a base or an adapter, and switch between them.",
    "inspect": "CalibrationData into the weights of a base, into an adapter, or compare two adapters.",
    "merge": "Make an adapter smaller, or merge it into a base of float weights.",
}
RENDERERS = {
    "train": render_train, "plan": render_plan, "evaluate": render_evaluate, "inspect": render_inspect,
    "merge": render_merge,
}  # fmt: skip
EXIT_INTERRUPTED = {signal.SIGINT: 130, signal.SIGTERM: 143}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments; default: those of the process.

    Returns:
        The exit code: 0 done, 2 refused, 3 failed honestly, 130 or 143 interrupted, 1 a fault of ours.
    """
    parser = make_parser()
    options, unknown = parser.parse_known_args(argv)
    if not options.command:
        parser.print_help()
        return 0
    is_json, is_debug = options.json, options.debug
    try:
        return _run(options, unknown)
    except ThimbleError as error:
        if is_debug:
            raise
        return _failed(error.problems, error.exit_code, is_json)
    except OSError as error:
        if is_debug:
            raise
        is_full = error.errno == errno.ENOSPC
        return _failed([f"the disk is full ({error.filename or error})" if is_full else str(error)], 3, is_json)
    except MemoryError as error:
        if is_debug:
            raise
        return _failed([f"memory ran out ({error}): free some, or take a smaller base or shorter rows"], 3, is_json)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if is_debug:
            raise
        told = f"a fault of Thimble's own: {type(error).__name__}: {error} (add --debug to see where, and report it)"
        return _failed([told], 1, is_json)


def _failed(problems: Sequence[str], exit_code: int, is_json: bool) -> int:
    """Tell what went wrong, to people and, if asked, to programs."""
    _complain(problems)
    if is_json:
        print(json.dumps({"error": list(problems), "exit_code": exit_code}, ensure_ascii=False))
    return exit_code


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands, derived from the options of their configs."""
    parser = argparse.ArgumentParser(
        prog="thimble", description="Fine-tune language models with LoRA on the machine you have.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"thimble {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command, config in CONFIGS.items():
        sub = commands.add_parser(command, help=SUMMARIES[command], description=SUMMARIES[command], allow_abbrev=False)
        _add_options(sub, config)
        sub.add_argument("--config", metavar="FILE.yaml", help="Read options from a YAML file; flags override it.")
        sub.add_argument("--json", action="store_true", help="Print one JSON object on stdout and nothing else there.")
        sub.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


def _add_options(parser: argparse.ArgumentParser, config: type[Options]) -> None:
    for name, spec in options_of(config).items():
        kind, _ = option_type(spec)
        meta = spec.metadata
        shown = "" if spec.default in (None, "", (), False) else f" (default: {_shown(spec.default)})"
        options: dict[str, Any] = {"help": (meta["help"] + shown).replace("%", "%%"), "default": argparse.SUPPRESS}
        if meta["positional"]:
            parser.add_argument(name, nargs="*" if _takes_many(spec) else "?", metavar=meta["metavar"], **options)
        elif kind is bool:
            parser.add_argument(_flag(name), action="store_true", **options)
        else:
            choices = "{" + ",".join(meta["choices"]) + "}" if meta["choices"] else None
            metavar = meta["metavar"] or choices or "N"
            action = "append" if name == "adapter" else "store"
            parser.add_argument(_flag(name), metavar=metavar, action=action, **options)


def _takes_many(spec: Field[Any]) -> bool:
    return get_origin(option_type(spec)[0]) is tuple


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(default: Any) -> str:
    return (
        ",".join(default)
        if isinstance(default, tuple)
        else f"{default:g}"
        if isinstance(default, float)
        else str(default)
    )


def _run(options: argparse.Namespace, unknown: list[str]) -> int:
    values = vars(options)
    command, config_file, is_json = values.pop("command"), values.pop("config"), values.pop("json")
    values.pop("debug")
    config = build_config(command, values, config_file, _unknown_flags(command, unknown))
    if command == "chat":
        return _chat(config, is_json)
    stop = _StopFlag("writing nothing" if command == "merge" else "keeping what was learned")
    progress = Progress(sys.stderr)
    from thimble.api import load_command

    if command == "plan":
        report = load_command(command)(config, progress.on_event)
    elif command == "train":
        pause = _PauseFlag(progress)
        report = load_command(command)(config, pause.on_event, stop, pause)
    else:
        report = load_command(command)(config, progress.on_event, stop)
    progress.end()
    if is_json:
        print(to_json(report))
    else:
        print(RENDERERS[command](report))
    return EXIT_INTERRUPTED[stop.signal] if stop.signal else 0


def _unknown_flags(command: str, unknown: list[str]) -> list[str]:
    """A problem for each argument that no option takes, with the nearest flag."""
    options = options_of(CONFIGS[command])
    flags = [_flag(name) for name in options] + ["--config", "--json", "--debug"]
    problems = []
    for word in unknown:
        if word.startswith("-"):
            near = difflib.get_close_matches(word.split("=")[0], flags, n=1)
            hint = f"did you mean {near[0]}?" if near else f"see thimble {command} --help"
            problems.append(f"{word.split('=')[0]} is not a flag of thimble {command}: {hint}")
        elif not any(other.startswith("-") for other in unknown):
            is_many = any(spec.metadata["positional"] and _takes_many(spec) for spec in options.values())
            advice = ": name all of them before the flags" if is_many else ""
            problems.append(f"{word!r} is one argument too many for thimble {command}{advice}")
    return problems


class _StopFlag:
    """Turns the first Ctrl-C or termination into a polite request, the second into an end."""

    def __init__(self, result: str) -> None:
        self.result = result
        self.signal: signal.Signals | None = None
        for number in EXIT_INTERRUPTED:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: object) -> None:
        if self.signal:
            os._exit(EXIT_INTERRUPTED[signal.Signals(number)])
        self.signal = signal.Signals(number)
        print(f"\nstopping after this step and {self.result} (once more to leave at once)", file=sys.stderr)

    def __call__(self) -> bool:
        return self.signal is not None


class _PauseFlag:
    """Turns Ctrl-Z into a request to pause: the run saves a checkpoint first, then the process is stopped.

    While no steps are taken, and when it is pressed once more, it stops at once, as it does for every other command.
    `fg` or the signal CONT goes on.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._is_learning = self._is_asked = self._is_told = False
        if hasattr(signal, "SIGTSTP"):
            signal.signal(signal.SIGTSTP, self._on_signal)

    def on_event(self, event: Any) -> None:
        """Take note of whether steps are being taken."""
        if event.kind in ("stage", "step"):
            self._is_learning = event.kind == "step"
        self._progress.on_event(event)

    def _on_signal(self, number: int, frame: object) -> None:
        if self._is_asked or not self._is_learning:
            self._rest()
            return
        self._is_asked = True
        print("\npausing after this step (once more to pause at once)", file=sys.stderr)

    def _rest(self) -> None:
        self._is_asked = self._is_told = False
        os.kill(os.getpid(), signal.SIGSTOP)  # here the process rests

    def __call__(self) -> str:
        if self._is_told:
            self._rest()
        self._is_told = self._is_asked
        return "asked for with Ctrl-Z; fg goes on, or kill -CONT" if self._is_asked else ""


def _chat(config: Any, is_json: bool) -> int:
    from thimble.commands.chat import open_conversation

    progress = Progress(sys.stderr)
    talk = open_conversation(config, progress.on_event) if config.prompt is None else open_conversation(config)
    progress.end()
    if config.prompt is not None:
        answer = talk.ask(config.prompt, _no_text if is_json else _write)
        print(json.dumps({"answer": answer, "adapter": talk.active}, ensure_ascii=False) if is_json else "")
        return 0
    if is_json:
        raise InputError("chat with --json needs --prompt: it answers once")
    print(f"Talking to {talk.active}. /use NAME switches ({', '.join(talk.names)}), /reset forgets, /quit leaves.")
    while True:
        try:
            line = input(f"\n{talk.active} > ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if line in ("/quit", "/exit"):
            return 0
        _answer(talk, line)


def _answer(talk: Any, line: str) -> None:
    """One turn: a command or something to answer; Ctrl-C stops the answer, not the chat."""
    try:
        if line == "/reset":
            talk.reset()
            print("forgotten")
        elif line.startswith("/use"):
            talk.use(line.removeprefix("/use").strip())
        elif line.startswith("/"):
            print("commands: /use NAME, /reset, /quit")
        elif line:
            talk.ask(line, _write)
            print()
    except KeyboardInterrupt:
        print(" [stopped]")
    except InputError as error:
        _complain(error.problems)


def _write(piece: str) -> None:
    print(piece, end="", flush=True)


def _no_text(piece: str) -> None:
    """Hear a piece of the answer and say nothing."""


def _complain(problems: Sequence[str]) -> None:
    for problem in problems:
        print(f"thimble: {problem}", file=sys.stderr)


def run() -> NoReturn:
    """Entry point of the command: exits with the code of `main`."""
    sys.exit(main())


if __name__ == "__main__":
    run()
