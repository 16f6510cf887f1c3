"""How options are declared and built: each is a field of a frozen dataclass that knows its default, meaning and check.

The command line, the YAML file, the Python API and docs/cli.md are all derived from these dataclasses; nothing else
names a default. Building a config never raises: what is wrong is kept in `config.problems`, so that a command can
report it together with what is wrong with the data and the base. A problem with an option begins with the option as it
is typed: `--rank 0: expected at least 1`.
"""

import dataclasses
import shlex
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

from thimble.config.names import answer, our_name, plain
from thimble.config.values import AUTO, Check, as_typed, flag, one_of, parse, parse_size
from thimble.config.values import seed as check_seed
from thimble.errors import as_word

Field = dataclasses.Field[Any]


def option(
    default: Any,  # value when nobody sets it
    help: str,  # one sentence for `--help`, the docs and error messages; states the unit
    *,
    check: Check | None = None,  # returns what is wrong with a value ("expected at least 1"), or None
    choices: tuple[str, ...] | None = None,  # the only values allowed
    positional: bool = False,  # given on the command line without a flag
    is_size: bool = False,  # an amount of bytes that may be written `4GB` or `500 MB` (1 GB = 1e9 bytes)
    path: str = "",  # a pattern whose one group is the path in a value; `~` and variables in it are filled in
    metavar: str | None = None,  # placeholder shown in `--help`
) -> Any:
    """Declare one option; the dataclass field it returns is the only place that knows its default."""
    metadata = {
        "help": help, "check": check, "choices": choices, "positional": positional, "is_size": is_size,
        "path": path, "metavar": metavar,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


class Given(NamedTuple):
    """A value as it was given."""

    value: Any  # text from a command line, or what YAML or Python gave
    name: str  # under which it was given: ours or another tool's
    file: str = ""  # in which it stands; empty for a flag or a keyword

    @property
    def place(self) -> str:
        """What a message about it begins with."""
        return f"{self.file}: " if self.file else ""


@dataclass(frozen=True)
class Options:
    """The root of every option group and config: what every command takes, and how any config is built."""

    group: ClassVar[str] = "every command"

    seed: int = option(0, "Seed of every random choice; the same seed gives the same run.", check=check_seed)
    problems: tuple[str, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> Self:
        """Build a config from values by name, ours or another tool's; bad ones become defaults, named in `problems`."""
        return cls.make(*cls.sort(values))

    @classmethod
    def sort(cls, values: Mapping[str, Any], file: str = "") -> tuple[dict[str, Given], list[str]]:
        """Bring the values of a file, or of flags and keywords, under our names; with a problem for each other name."""
        known, problems = options_of(cls), []
        given: dict[str, Given] = {}
        for value in (Given(value, name, file) for name, value in values.items()):
            ours = our_name(value.name, known)
            if ours is None:
                problems.append(value.place + answer(value.name, known, positional_of(cls)))
            elif ours in given:
                twice = f"as {given[ours].name} and as {value.name}"
                problems.append(f"{value.place}{flag(ours)} is given twice, {twice}: leave one of them out")
            else:
                given[ours] = value
        return given, problems

    @classmethod
    def make(cls, given: Mapping[str, Given], problems: Iterable[str] = ()) -> Self:
        """Convert and check the values of `sort`; `problems` are those known already."""
        specs, good, problems = options_of(cls), {}, list(problems)
        for name, value in given.items():
            try:
                good[name] = convert(specs[name], value.value)
            except ValueError as error:
                other = f" (given as {value.name})" if plain(value.name) != name else ""
                problems.append(f"{value.place}{typed(specs[name], value.value)}{other}: {error}")
        return cls(**good, problems=(*problems, *cls._conflicts(good)))

    @classmethod
    def _conflicts(cls, given: Mapping[str, Any]) -> list[str]:
        """Say which of the given options exclude each other; a group adds its own to those of `super()`."""
        return []

    def resolved(self) -> dict[str, Any]:
        """All options and their values, as plain data for a config file."""
        values = {name: getattr(self, name) for name in options_of(type(self))}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def replace(self, **changes: Any) -> Self:
        """A copy with some options changed."""
        return dataclasses.replace(self, **changes)


def options_of(cls: type[Options]) -> dict[str, Field]:
    """The options of a config class by name: the positional ones first, the seed last."""
    specs = [spec for spec in dataclasses.fields(cls) if "help" in spec.metadata]
    return {spec.name: spec for spec in sorted(specs, key=lambda s: (not s.metadata["positional"], s.name == "seed"))}


def groups_of(cls: type[Options]) -> dict[str, dict[str, Field]]:
    """The options of a config class by the title of the group that declares them, in the order `--help` shows them."""
    classes = [parent for parent in cls.__mro__ if issubclass(parent, Options)]
    groups: dict[str, dict[str, Field]] = {}
    for name, spec in options_of(cls).items():
        owner = next(parent for parent in classes if name in vars(parent).get("__annotations__", ()))
        groups.setdefault(owner.group, {})[name] = spec
    return groups


def positional_of(cls: type[Options]) -> dict[str, str]:
    """The options of a config class that are given without a flag, with their placeholders."""
    return {name: spec.metadata["metavar"] for name, spec in options_of(cls).items() if spec.metadata["positional"]}


def is_path(spec: Field) -> bool:
    """Whether the value of an option names a file or a folder."""
    return bool(spec.metadata["path"])


def option_type(spec: Field) -> tuple[Any, bool]:
    """The plain type of an option and whether it may be None (`int | None` gives `(int, True)`)."""
    if typing.get_origin(spec.type) in (types.UnionType, typing.Union):
        inner = [arg for arg in typing.get_args(spec.type) if arg is not types.NoneType]
        return inner[0], True
    return spec.type, False


def is_switch(spec: Field) -> bool:
    """Whether an option is either there or not, and takes no value."""
    return option_type(spec)[0] is bool


def takes_many(spec: Field) -> bool:
    """Whether an option holds several values."""
    return typing.get_origin(option_type(spec)[0]) is tuple


def is_repeated(spec: Field) -> bool:
    """Whether a flag is given once for each value: paths may hold commas, and numbers go with something else each."""
    return takes_many(spec) and (is_path(spec) or typing.get_args(option_type(spec)[0])[0] is float)


def typed(spec: Field, value: object) -> str:
    """An option and a value as they are typed: `--rank 8`; a switch alone, `--use-dora`, or, where a file turns it off,
    `no --use-dora`; a positional one with its placeholder, `DATA mine.jsonl`.
    """
    name = spec.metadata["metavar"] if spec.metadata["positional"] else flag(spec.name)
    if is_switch(spec) and isinstance(value, bool):
        return name if value else f"no {name}"
    return f"{name} {as_typed(value)}"


def convert(spec: Field, value: Any) -> Any:
    """Convert text, or what YAML or Python gave, to the type of an option; a ValueError says what was expected."""
    kind, optional = option_type(spec)
    if value is None or (optional and value in ("none", AUTO)):
        if optional:
            return None
        raise ValueError("expected a value")
    if spec.metadata["path"] and any(
        isinstance(part, dict) for part in (value if isinstance(value, list) else [value])
    ):
        raise ValueError("expected the path of one file or folder, and nothing around it")
    result: Any
    if spec.metadata["path"] and takes_many(spec) and isinstance(value, list):
        result = tuple(map(str, value))  # as they are: a name may begin or end with a space
    else:
        result = parse_size(value) if spec.metadata["is_size"] else parse(kind, value)
    if isinstance(result, str) and not spec.metadata["path"] and any("\ud800" <= char <= "\udfff" for char in result):
        raise ValueError("expected text in UTF-8")
    choices = spec.metadata["choices"]
    if choices and result not in choices:
        result = next((choice for choice in choices if choice.casefold() == str(result).casefold()), result)
    if choices and result not in choices:
        raise ValueError(one_of(choices, result))
    check = spec.metadata["check"]
    if check and (wrong := check(result)):
        raise ValueError(wrong)
    return result


def as_command(name: str, config: Options) -> str:
    """The command line that gives these options: what has its default is left out, and all is quoted for a shell."""
    words = ["thimble", name]
    for spec in options_of(type(config)).values():
        value, quoted = getattr(config, spec.name), as_word if spec.metadata["path"] else shlex.quote
        if value == spec.default:
            continue
        values = value if isinstance(value, tuple) else (value,)
        if spec.metadata["positional"]:
            words += [quoted(str(one)) for one in values]
        elif value is True:
            words.append(flag(spec.name))
        elif is_repeated(spec):
            words += [f"{flag(spec.name)}={quoted(str(one))}" for one in values]
        else:
            words.append(f"{flag(spec.name)}={quoted(','.join(map(str, values)))}")  # it may begin with a hyphen
    return " ".join(words)
