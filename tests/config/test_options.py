"""Options: declared once, converted by their type, all problems at once."""

import pytest

from thimble.config.options import MergeConfig, TrainConfig, options_of, parse_size


def problems(**values):
    return "\n".join(TrainConfig.build({"data": "x", **values}).problems)


def test_a_number_may_be_written_as_yaml_leaves_it():
    config = TrainConfig.build({"data": "x", "learning_rate": "1e-5", "rank": "8", "resume": "false"})
    assert (config.learning_rate, config.rank, config.resume, config.problems) == (1e-5, 8, False, ())


def test_words_of_other_tools_are_understood():
    config = TrainConfig.build({"data": "x", "lora_r": 4, "cutoff_len": 99, "lr": 1e-3})
    assert (config.rank, config.seq_len, config.learning_rate) == (4, 99, 1e-3)


def test_a_misspelt_knob_is_answered_with_the_right_one():
    assert problems(learnin_rate=1) == "learnin_rate is not a option of this command: did you mean learning_rate?"


def test_a_knob_of_another_tool_is_answered_with_what_to_use():
    assert "use batch_tokens" in problems(micro_batch_size=2)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("rank", 0, "rank is 0: expected at least 1"),
        ("rank", 1.5, "rank is 1.5: expected a whole number"),
        ("rank", "many", "rank is 'many': expected a whole number"),
        ("rank", True, "rank is True: expected a whole number"),
        ("learning_rate", -1e-4, "learning_rate is -0.0001: expected a finite number above 0"),
        ("learning_rate", "nan", "learning_rate is 'nan': expected a finite number above 0"),
        ("learning_rate", "inf", "learning_rate is 'inf': expected a finite number above 0"),
        ("valid_split", 1, "valid_split is 1: expected a fraction"),
        ("compute", "bf61", "did you mean bf16?"),
        ("memory_budget", "lots", "expected a size such as 4GB or 500MB"),
        ("seed", -1, "seed is -1: expected at least 0"),
        ("resume", "perhaps", "resume is 'perhaps': expected true or false"),
    ],
)
def test_a_bad_value_is_told_with_what_was_expected(option, value, message):
    assert message in problems(**{option: value})


def test_every_problem_is_told_at_once():
    text = problems(rank=0, learning_rate="nan", learnin_rate=3, epochs=1, max_steps=2)
    assert text.count("\n") == 3
    assert "epochs and max_steps are given together" in text


def test_resume_needs_to_know_what_to_resume():
    assert "resume is set without out" in problems(resume=True)


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4e9), ("500 MB", 5e8), ("1GiB", 2**30), ("50000", 5e4), ("1.5kb", 1500)]
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("config", [TrainConfig, MergeConfig])
def test_every_knob_has_help_and_a_default_that_passes_its_own_check(config):
    for name, spec in options_of(config).items():
        assert spec.metadata["help"].endswith("."), name
        check = spec.metadata["check"]
        assert spec.default is None or check is None or check(spec.default) is None, name
