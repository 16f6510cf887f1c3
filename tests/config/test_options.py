"""Options: declared once, converted by their type, all problems at once, in groups."""

import datetime

import pytest

from thimble.commands import COMMANDS
from thimble.config.groups import DataOptions, InitOptions, RunOptions
from thimble.config.options import groups_of, options_of, typed
from thimble.config.train import TrainConfig

ALL = pytest.mark.parametrize("options", [command.options for command in COMMANDS.values()], ids=list(COMMANDS))


def problems(**values):
    return "\n".join(TrainConfig.build({"data": "x", **values}).problems)


def test_a_number_may_be_written_as_yaml_leaves_it():
    config = TrainConfig.build({"data": "x", "learning_rate": "1e-5", "rank": "8", "use_dora": "false"})
    assert (config.learning_rate, config.rank, config.use_dora, config.problems) == (1e-5, 8, False, ())


def test_a_choice_may_be_written_in_other_letters():
    config = TrainConfig.build({"data": "x", "compute": "FP32", "schedule": "Constant"})
    assert (config.compute, config.schedule, config.problems) == ("fp32", "constant", ())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("rank", 0, "--rank 0: expected at least 1"),
        ("rank", 1.5, "--rank 1.5: expected a whole number"),
        ("rank", "many", "--rank many: expected a whole number"),
        ("rank", True, "--rank true: expected a whole number"),
        ("rank", "", "--rank '': expected a whole number"),
        ("learning_rate", -1e-4, "--learning-rate -0.0001: expected a finite number above 0"),
        ("learning_rate", "nan", "--learning-rate nan: expected a finite number above 0"),
        ("learning_rate", "inf", "--learning-rate inf: expected a finite number above 0"),
        ("lr", "fast", "--learning-rate fast (given as lr): expected a number"),
        ("valid_split", 1, "--valid-split 1: expected a fraction"),
        ("compute", "bf61", "did you mean bf16?"),
        ("memory_budget", "lots", "--memory-budget lots: expected a size such as 4GB or 500MB"),
        ("seed", -1, "--seed -1: expected at least 0"),
        ("seed", 2**63, "--seed 9223372036854775808: expected at most 9223372036854775807"),  # of 64 bits with a sign
        ("rank", datetime.date(2026, 11, 30), "--rank 2026-11-30: expected a whole number"),  # as YAML reads a date
        ("resume", "perhaps", "--resume perhaps: expected true or false"),
        ("out", ["a", "b"], "--out a,b: expected text"),
        ("data", ["a"], "DATA a: expected text"),
    ],
)
def test_a_bad_value_is_named_as_it_is_typed_with_what_was_expected(option, value, message):
    assert message in problems(**{option: value})


def test_every_problem_is_named_at_once():
    text = problems(rank=0, learning_rate="nan", learnin_rate=3, epochs=1, max_steps=2)
    assert text.count("\n") == 3


def test_an_option_that_is_given_under_two_names_is_refused():
    assert problems(lora_r=4, rank=8) == "--rank is given twice, as lora_r and as rank: leave one of them out"


def test_a_bad_value_leaves_the_default():
    assert TrainConfig.build({"rank": 0, "alpha": 8}).replace(problems=()) == TrainConfig(alpha=8.0)


@ALL
def test_every_option_has_help_and_a_default_that_passes_its_own_check(options):
    for name, spec in options_of(options).items():
        assert spec.metadata["help"].endswith("."), name
        check = spec.metadata["check"]
        assert spec.default is None or check is None or check(spec.default) is None, name


@ALL
def test_the_groups_hold_every_option_once_and_what_every_command_takes_is_last(options):
    groups = groups_of(options)
    assert sorted(name for group in groups.values() for name in group) == sorted(options_of(options))
    assert list(groups)[-1] == "every command"


def test_a_group_stands_where_its_first_option_stands():
    assert list(groups_of(TrainConfig)) == [
        "data", "base", "task", "adapter", "init", "optimiser", "evaluation", "run", "every command",
    ]  # fmt: skip
    assert list(groups_of(TrainConfig)["init"]) == ["init", "calibration_steps", "explain"]


def test_a_config_is_one_of_each_of_its_groups():
    config = TrainConfig.build({"data": "x"})
    assert all(isinstance(config, group) for group in (DataOptions, InitOptions, RunOptions))


def test_a_config_is_written_as_plain_data_that_makes_it_again():
    config = TrainConfig.build({"data": "x", "targets": "mlp,q_proj", "rank": "auto"})
    assert config.resolved()["targets"] == ["mlp", "q_proj"]
    assert TrainConfig.build(config.resolved()) == config


def test_an_option_is_shown_as_it_is_typed():
    specs = options_of(TrainConfig)
    assert typed(specs["targets"], ("q_proj", "mlp")) == "--targets q_proj,mlp"
    assert typed(specs["data"], "my data.jsonl") == "DATA 'my data.jsonl'"
