"""From the words of a command line to a command and its options, and what to say of words that are neither.

The parser is made from the declared options; argparse reads the values and writes the help. What is wrong is never told
by argparse itself, which would exit: it is collected, so that everything is told at once and `--json` holds it too.
"""

import argparse
import difflib
import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

from thimble.config.completion import SHELLS
from thimble.config.names import COMMAND_SYNONYMS, answer, near_option, our_name, plain
from thimble.config.options import (
    Field,
    Options,
    groups_of,
    is_repeated,
    is_switch,
    options_of,
    positional_of,
    takes_many,
)
from thimble.config.values import as_typed, flag
from thimble.errors import ConfigError, as_word, listing


class CommandLike(Protocol):
    """What is needed of a command in the registry."""

    @property
    def summary(self) -> str:
        """One sentence."""

    @property
    def options(self) -> type[Options]:
        """Its config class."""


Commands = Mapping[str, CommandLike]
# Options of every command that are none of a config: they say how it is run, and may stand anywhere on the line.
SWITCHES = {"json": "Print one JSON object on stdout and nothing else.", "debug": "Show the traceback of an error."}
EVERYWHERE = (*SWITCHES, "config", "help")
WITHOUT_COMMAND = ("-h", "--help", "-V", "--version", "--completion")


class Line(NamedTuple):
    """A command line, read."""

    command: str  # empty: none is given, and `switches` says what else is wanted
    values: dict[str, Any]  # options by name
    config_file: str | None
    switches: Mapping[str, Any]  # json, debug, version, completion
    problems: list[str]  # words that are no options


class _Parser(argparse.ArgumentParser):
    """A parser that raises a ConfigError instead of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(_reworded(message))


def _reworded(message: str) -> str:
    """What argparse says, as Thimble says it."""
    if match := re.fullmatch(r"argument (\S+): expected (?:one|at least one) argument", message):
        return f"{match[1]}: its value is missing (one that begins with a dash is written {match[1]}=-x)"
    if match := re.fullmatch(r"argument (?:-\w/)?(\S+): ignored explicit argument (.*)", message):
        return f"{match[1]} takes no value, but {match[2]} is given: leave that out"
    return message.removeprefix("argument ")


def make_parser(
    commands: Commands, version: str, kind: type[argparse.ArgumentParser] = argparse.ArgumentParser
) -> argparse.ArgumentParser:
    """The parser of all commands, derived from the options of their configs."""
    parser = kind(
        prog="thimble", description="Fine-tune language models with LoRA on the machine you have.", allow_abbrev=False
    )
    parser.add_argument("-V", "--version", action="version", version=f"thimble {version}")
    help_ = "Print a script that completes commands, options and their values, and leave."
    parser.add_argument("--completion", metavar="{" + ",".join(SHELLS) + "}", default=argparse.SUPPRESS, help=help_)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in commands.items():
        sub = subparsers.add_parser(
            name, help=command.summary, description=command.summary, allow_abbrev=False, add_help=False
        )
        for title, options in groups_of(command.options).items():
            group = sub.add_argument_group(title)
            for spec in options.values():
                _add_option(group, spec)
        # The last group is that of every command.
        group.add_argument("--config", metavar="FILE.yaml", help="Read options from a YAML file; flags override it.")
        for switch, meaning in SWITCHES.items():
            group.add_argument(flag(switch), action="store_true", help=meaning)
        group.add_argument("-h", "--help", action="help", help="Show this help and exit.")
    return parser


def _add_option(group: argparse._ArgumentGroup, spec: Field) -> None:
    name, meta = spec.name, spec.metadata
    shown = "" if spec.default in (None, "", (), False) else f" (default: {as_typed(spec.default)})"
    options: dict[str, Any] = {"help": (meta["help"] + shown).replace("%", "%%"), "default": argparse.SUPPRESS}
    if meta["positional"]:
        group.add_argument(name, nargs="*" if takes_many(spec) else "?", metavar=meta["metavar"], **options)
    elif is_switch(spec):
        group.add_argument(flag(name), action="store_true", **options)
    else:
        choices = "{" + ",".join(meta["choices"]) + "}" if meta["choices"] else None
        action = "append" if is_repeated(spec) else "store"
        group.add_argument(flag(name), metavar=meta["metavar"] or choices or "N", action=action, **options)


# ---- reading --------------------------------------------------------------------------------------------------------


def switches_in(words: Sequence[str]) -> dict[str, Any]:
    """The switches on a line, wherever they stand: so a line that cannot be read is still answered as it asks."""
    words = words[: words.index("--")] if "--" in words else words
    is_version = any(word in ("-V", "--version") for word in words)
    return {name: flag(name) in words for name in SWITCHES} | {"version": is_version, "completion": None}


def read_line(words: Sequence[str], commands: Commands, version: str) -> Line:
    """Read a command line; `--help` prints and leaves, a line without a known command is a ConfigError."""
    switches, parser = switches_in(words), make_parser(commands, version, _Parser)
    if switches["version"]:
        return Line("", {}, None, switches, [])
    before, name, behind = _split(words, commands)
    if name is None:
        options = parser.parse_args(before)  # prints the help, if that is asked for
        return Line("", {}, None, {**switches, **vars(options)}, [])
    known = options_of(commands[name].options)
    problems = [f"{word} stands before the command: put it behind, as in: thimble {name} {word}" for word in before]
    kept = _without_unknown(behind, commands[name].options, problems)
    try:
        options, rest = parser.parse_known_args([name, *kept])
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from None
    values = vars(options)
    for switch in ("command", *SWITCHES):
        values.pop(switch)
    config_file = values.pop("config")
    problems += [] if problems else _too_many(name, rest, values, known)
    return Line(name, values, config_file, switches, problems)


def _split(words: Sequence[str], commands: Commands) -> tuple[list[str], str | None, list[str]]:
    """What stands before the command, the command, and what stands behind it; switches count as standing behind."""
    switches = tuple(map(flag, SWITCHES))
    found = next((place for place, word in enumerate(words) if not word.startswith("-")), len(words))
    before = [word for word in words[:found] if word not in switches]
    if found == len(words) or before[-1:] == ["--completion"]:  # the word is its value
        if wrong := [word for word in before if word.split("=")[0] not in WITHOUT_COMMAND]:
            raise ConfigError(*(_no_command(word, commands) for word in wrong))
        return [word for word in words if word not in switches], None, []
    problems = [] if words[found] in commands else [_unknown_command(words[found], commands)]
    if problems and before:  # the word may be the value of a flag
        problems = [_no_command(word, commands) for word in before]
    if problems:
        raise ConfigError(*problems)
    if "-h" in before or "--help" in before:
        return ["--help"], None, []
    return before, words[found], [*(word for word in words[:found] if word in switches), *words[found + 1 :]]


def _no_command(word: str, commands: Commands) -> str:
    """What to say of a flag that no command stands before."""
    name = word.split("=")[0]
    if any(our_name(name, (*options_of(command.options), *EVERYWHERE)) for command in commands.values()):
        return f"{name} stands before the command: put it behind one of {listing(commands, 20)}"
    return answer(name, ("version", "completion", *EVERYWHERE)).replace(" of this command", "")


def _unknown_command(word: str, commands: Commands) -> str:
    """What to say of a word that stands where a command should."""
    meant = next((name for name in COMMAND_SYNONYMS.get(word.lower(), "").split() if name in commands), None)
    near = difflib.get_close_matches(word.lower(), commands, n=1)
    advice = f"use thimble {meant}" if meant else f"did you mean {near[0]}?" if near else ""
    advice = advice or f"expected one of {listing(commands, 20)}; see thimble --help"
    return f"{word!r} is not a command: {advice}"


def _without_unknown(words: Sequence[str], config: type[Options], problems: list[str]) -> list[str]:
    """The words without flags that the command does not know and their values, each with what to type in `problems`."""
    known, positional = options_of(config), positional_of(config)
    typable = {flag(name) for name in (*known, *EVERYWHERE) if name not in positional} | {"-h"}
    kept: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*kept, word, *rest]
        name, equals, value = word.partition("=")
        if not re.match(r"--?[A-Za-z]", word):
            kept.append(word)
        elif name in typable:
            kept.append(word)
            kept += [rest.pop(0)] if not equals and rest and _takes_value(name, known) else []
        else:
            is_file = os.path.lexists(word)
            problems.append(
                f"{word} is taken for an option: to name the file, type {as_word(word)}"
                if is_file
                else answer(name, (*known, *EVERYWHERE), positional)
            )
            if not is_file and not equals and rest and not rest[0].startswith("-") and _is_value(name, rest[0], known):
                value = rest.pop(0)
            kept += _still_meant(near_option(name, known), value, positional)
    return kept


def _still_meant(ours: str | None, value: str, positional: Collection[str]) -> list[str]:
    """The words for the files that an unknown flag names: they are checked with the rest, and not told as missing."""
    named = [value] if ours in positional else [flag("out"), value] if ours == "out" else []
    return named if value else []


def _takes_value(name: str, known: Mapping[str, Field]) -> bool:
    """Whether a known flag is followed by a value."""
    option = plain(name)
    return option == "config" or (option in known and not is_switch(known[option]))


def _is_value(name: str, word: str, known: Mapping[str, Field]) -> bool:
    """Whether the word behind an unknown flag is its value, and not one that belongs to the command."""
    ours = near_option(name, known)
    return not is_switch(known[ours]) if ours else not os.path.exists(word)


def _too_many(command: str, words: Sequence[str], values: Mapping[str, Any], known: Mapping[str, Field]) -> list[str]:
    """A problem for each argument that no option takes, or one if they are the words of one file's name."""
    firsts = [values[name] for name, spec in known.items() if spec.metadata["positional"] and name in values]
    whole = " ".join([*firsts, *words]) if len(firsts) == 1 and isinstance(firsts[0], str) else ""
    if words and os.path.exists(whole):
        count = len(words) + 1
        return [f"{whole!r} is taken for {count} files: put its name in quotes: thimble {command} {as_word(whole)}"]
    is_many = any(spec.metadata["positional"] and takes_many(spec) for spec in known.values())
    advice = ": name all of them before the flags" if is_many else ""
    if not is_many and firsts and any(map(os.path.exists, words)):
        advice = ": to take several files together, lay them into one folder and name that"
    return [f"{word!r} is one argument too many for thimble {command}{advice}" for word in words]
