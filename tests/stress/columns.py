"""Rows under any names: every filled column is used, told or refused, and what is suggested can be typed and works."""

import random
import shlex
from collections.abc import Callable, Iterator
from typing import Any

from stress import Line
from stress.files import try_all
from stress.grammar import HOSTILE

KNOWN = (
    "messages conversations conversation prompt question query instruction input completion response answer answers "
    "output target text label context documents system system_prompt history tools functions chosen rejected images "
    "weight score id source input_ids"
).split()
OTHER = (
    "Frage", "Antwort", "the body", "it's", "a.b", "-x", "--out", "{a}", "{", "a}b", "%s", "ß", "İ", "质问",
    "\ufeffprompt",
    "e\u0301", "\u202eabc", "a\nb", "\x1b[2J", "", " ", "x" * 300, "auto", "none", "null", "0", "a\\nb",
    "$HOME", "`id`", "\ud800",
)  # fmt: skip
TURNS = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, {"from": "gpt", "value": "he"})


def column_names(count: int) -> Line:
    """Rows with known and unknown columns in any spelling, some of them named by options."""
    return try_all("rows under any names of columns", _cases(count))


def _cases(count: int) -> Iterator[Callable[[], object]]:
    dice = random.Random(0)
    for _ in range(count):
        row = {_spelt(dice): _value(dice, number) for number in range(dice.randint(1, 6))}
        options = _options(row, dice) if dice.random() < 0.5 else {}
        yield lambda row=row, options=options: _check(row, options)


def _spelt(dice: random.Random) -> str:
    if dice.random() < 0.3:
        return dice.choice(OTHER)
    name = dice.choice(KNOWN)
    change = dice.choice(
        [str, str, str.upper, str.title, lambda text: f" {text} ", lambda text: text.replace("_", "-")]
    )
    return change(name)


def _value(dice: random.Random, number: int) -> Any:
    """A value that no other column of the row has."""
    if dice.random() < 0.15:
        return dice.choice(HOSTILE)
    kinds = (
        f"text {number}", number + 2, number / 7, [f"one {number}", "two"], {"en": f"a {number}", "de": "b"},
        [{**turn, "name": f"n{number}"} for turn in dice.choices(TURNS, k=2)], [[f"u{number}", "v"]],
        [{"name": f"f{number}"}],
    )  # fmt: skip
    return kinds[0] if dice.random() < 0.6 else dice.choice(kinds)


def _options(row: dict[str, Any], dice: random.Random) -> dict[str, str]:
    names = [*row, dice.choice(OTHER)]
    template = dice.choice(["{}", "{} {}", "{{{}}}", r"\n{}", "{"]).replace("{}", f"{{{dice.choice(names)}}}")
    return dice.choice([
        {"text_column": dice.choice(names)},
        {"prompt_column": dice.choice(names), "completion_column": dice.choice(names)},
        {"prompt_template": template, "completion_column": dice.choice(names)},
    ])  # fmt: skip


def _check(row: dict[str, Any], options: dict[str, str]) -> None:
    from thimble.config.train import TrainConfig
    from thimble.data.columns import NamedColumns
    from thimble.data.rows import RowReader
    from thimble.errors import ConfigError, DataError

    def config_of(given: dict[str, str]) -> TrainConfig:
        config = TrainConfig.build({"data": "x", **given})
        if config.problems:
            raise ConfigError(*config.problems)
        return config

    def read(columns: dict[str, Any], given: dict[str, str]) -> Any:
        reader = RowReader(NamedColumns.of(config_of(given)))
        parsed = reader.parse(columns, "")
        reader.check()
        return parsed

    try:
        parsed = read(row, options)
    except DataError as error:
        _try_advice(row, str(error), read)
        raise
    for name, value in row.items():
        rest = {key: cell for key, cell in row.items() if key != name}
        if not _is_told(name, value, parsed.left.filled) and _gives(rest, options, parsed.record, read):
            raise AssertionError(f"{name!r} is lost of {row!r} with {options}")


def _is_told(name: str, value: Any, told: list[str]) -> bool:
    from thimble.data.row_values import is_filled, shown

    return not is_filled(value) or any(text == shown(name) or text.startswith(f"{shown(name)}.") for text in told)


def _gives(row: dict[str, Any], options: dict[str, str], record: Any, read: Callable[..., Any]) -> bool:
    from thimble.errors import InputError

    try:
        return bool(read(row, options).record == record)
    except InputError:
        return False


def _try_advice(row: dict[str, Any], text: str, read: Callable[..., Any]) -> None:
    """Type what a refusal suggests."""
    _, is_given, advice = text.partition("if yours have other names, add ")
    if is_given:
        words = [word for part in shlex.split(advice) for word in (part.split("=", 1) if part[:2] == "--" else [part])]
        names = [word.removeprefix("--").replace("-", "_") for word in words[::2]]
        read(row, dict(zip(names, words[1::2], strict=True)))
