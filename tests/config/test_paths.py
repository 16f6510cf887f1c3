"""`~` and variables of the environment in paths: alike for every option, in flags, YAML and Python."""

import os
from pathlib import Path

import pytest
import yaml

from thimble.cli import main
from thimble.commands import COMMANDS
from thimble.config.options import options_of, takes_many
from thimble.config.paths import expanded
from thimble.config.sources import build_config
from thimble.config.train import TrainConfig
from thimble.errors import ConfigError

PATHS = [
    (name, spec.name)
    for name, command in COMMANDS.items()
    for spec in options_of(command.options).values()
    if spec.metadata["path"]
]
FORMS = {"init": "adapter:{}", "metric": "{}.py:name"}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "some where")
    monkeypatch.delenv("UNSET", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_option_that_names_a_file_or_a_folder_is_known_to():
    assert {name for _, name in PATHS} == {"data", "base", "adapter", "out", "init", "metric", "path", "other", "log"}


@pytest.mark.parametrize("way", ["flag", "YAML"])
@pytest.mark.parametrize(("command", "name"), PATHS)
def test_every_path_is_filled_in_alike(command, name, way, home):
    options = COMMANDS[command].options
    is_many, form = takes_many(options_of(options)[name]), FORMS.get(name, "{}")
    given = {text: form.format(text) for text in ("~/a b", "$HOME/a b", "${HOME}/a b", "rel/$PLACE", "a$")}
    right = [form.format(text) for text in (*[f"{home}/a b"] * 3, "rel/some where", "a$")]
    for text, expected in zip(given.values(), right, strict=True):
        value = [text] if is_many else text
        if way == "YAML":
            Path("options.yaml").write_text(yaml.safe_dump({name: value}))
        config = build_config(
            options, {name: value} if way == "flag" else {}, "options.yaml" if way == "YAML" else None
        )
        assert (getattr(config, name), config.problems) == ((expected,) if is_many else expected, ())


@pytest.mark.parametrize("name", ["~", "$PLACE", "~/x", "a${HOME}b"])
def test_a_file_that_is_called_that_is_meant(name):
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert expanded(name) == name


def test_a_config_file_is_found_alike(home):
    Path("my options.yaml").write_text("rank: 3\n")
    assert build_config(TrainConfig, {}, "$HOME/my options.yaml").rank == 3
    with pytest.raises(ConfigError, match="config file .UNSET/o.yaml: .*the variable UNSET is not set"):
        build_config(TrainConfig, {}, "$UNSET/o.yaml")


def test_what_is_not_set_is_named_but_may_be_part_of_the_name_of_what_is_made(monkeypatch):
    with pytest.raises(ConfigError) as caught:
        build_config(TrainConfig, {"data": "$UNSET/mine.jsonl", "out": "cash in $UNSET", "rank": 0})
    assert caught.value.problems == (
        "DATA '$UNSET/mine.jsonl': there is no such file, and the variable UNSET is not set: set it, or name the file",
        "--rank 0: expected at least 1",
    )
    assert build_config(TrainConfig, {"data": "mine.jsonl", "out": "cash in $UNSET"}).out == "cash in $UNSET"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user whom the system does not know
    with pytest.raises(ConfigError, match="this user has none"):
        build_config(TrainConfig, {"data": "~/mine.jsonl"})


@pytest.mark.parametrize(
    "argv",
    [["plan", "$UNSET/a.jsonl"], ["chat", "--base", "$UNSET/b"], ["inspect", "$UNSET/b"], ["export", "$UNSET/a"]],
    ids=lambda argv: argv[0],
)
def test_a_path_with_a_variable_that_is_not_set_is_told_once(argv, capsys):
    assert main(argv) == 2
    assert capsys.readouterr().err.count("$UNSET") == 1


def test_adapters_in_a_file_may_stand_in_one_text_and_their_names_are_taken_as_they_are():
    options = COMMANDS["evaluate"].options
    Path("one, two").mkdir()
    assert build_config(options, {"adapter": "one, two"}).adapter == ("one, two",)
    assert build_config(options, {"adapter": "one,two"}).adapter == ("one", "two")
    assert build_config(options, {"adapter": [" one ", Path("~/two")]}).adapter == (
        " one ",
        os.path.expanduser("~/two"),
    )
