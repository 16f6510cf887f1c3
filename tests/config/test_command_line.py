"""The words of a command line: read, or answered with what to type; nothing exits, nothing is said twice."""

import re

import pytest

from thimble.commands import COMMANDS
from thimble.config.command_line import read_line
from thimble.config.names import COMMAND_SYNONYMS, ELSEWHERE, SYNONYMS, answer
from thimble.config.options import options_of, positional_of
from thimble.config.values import flag
from thimble.errors import ConfigError


def read(line: str):
    return read_line(line.split(), COMMANDS, "1.2.3")


def said(line: str) -> str:
    """What is wrong with a line, one problem a line."""
    try:
        return "\n".join(read(line).problems)
    except ConfigError as error:
        return "\n".join(error.problems)


@pytest.mark.parametrize(
    "line",
    ["train x --rank 8 --json", "--json train x --rank 8", "train --json x --rank=8", "train --rank 8 x --json"],
)
def test_switches_may_stand_anywhere(line):
    found = read(line)
    assert (found.command, found.values, found.switches["json"]) == ("train", {"data": "x", "rank": "8"}, True)
    assert not found.problems


@pytest.mark.parametrize("line", ["-V", "--version", "train --version", "--json -V", "train x -V"])
def test_the_version_is_asked_for_anywhere(line):
    assert (read(line).command, read(line).switches["version"]) == ("", True)


def test_behind_two_dashes_nothing_is_a_flag():
    found = read("train -- --json")
    assert (found.values, found.switches["json"]) == ({"data": "--json"}, False)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("trian x", "'trian' is not a command: did you mean train?"),
        ("Train x", "'Train' is not a command: did you mean train?"),
        ("finetune x", "'finetune' is not a command: use thimble train"),
        ("fuse x", "'fuse' is not a command: use thimble merge"),
        ("help", "'help' is not a command: expected one of train, plan, "),
        ("--verbose", "--verbose is not an option: leave it out: messages are always printed"),
        ("--rank 8 train x", "--rank stands before the command"),
        ("--rank=8 train x", "--rank=8 stands before the command: put it behind, as in: thimble train --rank=8"),
        ("--rnak", "--rnak is not an option: "),
        ("train x --rank", "--rank: its value is missing"),
        ("train x --rank --json", "--rank: its value is missing (one that begins with a dash is written --rank=-x)"),
        ("train x --json=1", "--json takes no value, but '1' is given"),
        ("train x --resume=yes", "--resume takes no value, but 'yes' is given"),
        ("train x y", "'y' is one argument too many for thimble train"),
        ("--completion", "--completion: its value is missing"),
    ],
)
def test_what_cannot_be_read_is_told_and_nothing_exits(line, expected):
    assert expected in said(line)


@pytest.mark.parametrize(
    ("typed", "advice"),
    [
        ("--lr", "use --learning-rate"), ("--iters", "use --max-steps"), ("--batch-size", "use --batch-tokens: "),
        ("--model", "use --base"), ("--num-epochs", "use --epochs"), ("--lora-rank", "use --rank"),
        ("--lora-r", "use --rank"), ("--lora_r", "use --rank"), ("-r", "use --rank"), ("--output-dir", "use --out"),
        ("--output", "use --out"), ("--max-length", "use --seq-len"), ("--learning_rate", "use --learning-rate"),
        ("--dataset", "give DATA without a flag"), ("--data", "give DATA without a flag"),
        ("--dta", "give DATA without a flag"), ("--verbose", "leave it out: "), ("-v", "leave it out: "),
        ("--quiet", "leave it out: "), ("--lora-alpha", "use --alpha"), ("--rnak", "did you mean --rank?"),
        ("--Rank", "did you mean --rank?"), ("--jsn", "did you mean --json?"), ("--xyzzy", "see the list under --help"),
    ],
)  # fmt: skip
def test_a_flag_of_another_tool_is_answered_and_takes_its_value_along(typed, advice):
    """The value is not taken for the data, and what is right beside it is read."""
    for line in (
        f"train {typed} 7 x --seq-len 64",
        f"train x {typed} 7 --seq-len 64",
        f"train x --seq-len 64 {typed}=7",
    ):
        found = read(line)
        assert found.problems == [f"{typed} is not an option of this command: {found.problems[0].split(': ', 1)[1]}"]
        assert advice in found.problems[0]
        assert found.values["seq_len"] == "64"
        assert found.values.get("data") == "x" or "DATA" in advice


@pytest.mark.parametrize("name", COMMANDS)
def test_no_suggestion_is_what_was_typed_or_cannot_be_typed(name):
    """Over every name that any tool uses, and names nearly right, for each command."""
    known, positional = options_of(COMMANDS[name].options), positional_of(COMMANDS[name].options)
    typable = {flag(option) for option in known if option not in positional} | {
        "--json",
        "--debug",
        "--help",
        "--config",
    }
    names = {*SYNONYMS, *ELSEWHERE, *known, *(option[:-1] for option in known), *(option + "s" for option in known)}
    for given in sorted(names):
        text = answer(flag(given), (*known, "json", "debug", "config", "help"), positional)
        advice = text.split(": ", 1)[1]
        if advice.startswith(("use --", "did you mean --")) and given not in ELSEWHERE:
            suggested = re.search(r"--[a-z][a-z0-9-]*", advice)[0]
            assert suggested != flag(given), text
            assert suggested in typable, text


def test_a_unknown_switch_does_not_take_the_data_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text("")
    assert read("train --fast mine.jsonl").values == {"data": "mine.jsonl"}


def test_names_of_commands_elsewhere_are_none_of_ours():
    assert not set(COMMAND_SYNONYMS) & set(COMMANDS)
    assert {name for names in COMMAND_SYNONYMS.values() for name in names.split()} - {"generate"} <= set(COMMANDS)


@pytest.mark.parametrize("line", ["generate x --lr 3", "evaluate x --lr 3"])
def test_another_name_for_an_option_of_other_commands_is_not_guessed_to_be_one_of_these(line):
    assert said(line) == "--lr is not an option of this command: see the list under --help"
