"""Options that exclude each other."""

import pytest

from thimble.config.train import TrainConfig


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"energy": 0.9}, "--energy 0.9: only with --rank auto, not 16"),
        ({"rank": 8, "rank_budget": 999}, "--rank-budget 999: only with --rank auto, not 8"),
        ({"rank": "auto", "energy": 0.9, "rank_budget": 1000}, "--rank-budget 1000 --energy 0.9: give one of them"),
        ({"rank": "auto", "rank_pattern": "q_proj=4"}, "--rank-pattern q_proj=4: not with --rank auto"),
        ({"rank": "auto", "alpha_pattern": {"q_proj": 4}}, "--alpha-pattern q_proj=4: not with --rank auto"),
        ({"rank_pattern": "q_proj=2.5"}, "--rank-pattern q_proj=2.5: expected whole numbers as ranks"),
        ({"compute": "int8", "store": "dense"}, "--compute int8: not with store dense, which keeps the weights as"),
        ({"epochs": 1, "max_steps": 2}, "--epochs 1 --max-steps 2: give one of --epochs, --max-steps, --max-minutes"),
        ({"resume": True}, "--resume: name the run folder to continue"),
        ({"prompt_column": "a"}, "--prompt-column a: name what is to be learned too, with --completion-column"),
        ({"prompt_template": "{a}"}, "--prompt-template {a}: name what is to be learned too, with --completion-column"),
        (
            {"completion_column": "a b"},
            "--completion-column 'a b': name the prompt too, with --prompt-column or --prompt",
        ),
        ({"completion_column": "a", "prompt_column": "a"}, "--completion-column a: the prompt holds that column too"),
        (
            {"completion_column": "a", "prompt_template": "{b} {a}"},
            "--completion-column a: the prompt holds that column",
        ),
        (
            {"completion_column": "a", "prompt_column": "b", "prompt_template": "{c}"},
            "--prompt-column b --prompt-template {c}: give one of them",
        ),
        (
            {"text_column": "a", "completion_column": "b"},
            "--text-column a --completion-column b: give columns of plain",
        ),
        ({"prompt_template": "{a", "completion_column": ""}, "--prompt-template {a: { at character 1 has no partner"),
        (
            {"prompt_template": "a {}"},
            "--prompt-template 'a {}': {} at character 3 names no column; write {{ and }} for",
        ),
        ({"prompt_template": "a }"}, "--prompt-template 'a }': } at character 3 has no partner"),
        ({"prompt_template": "a {{b}}"}, "expected at least one column in braces, such as {question}"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options, said):
    (problem,) = TrainConfig.build({"data": "x", **options}).problems
    assert said in problem


@pytest.mark.parametrize(
    "options",
    [
        {"rank": "auto", "energy": 0.9},
        {"compute": "int8", "store": "int8"},
        {"compute": "int8", "store": "file"},
        {"compute": "bf16-int8", "store": "dense"},
        {"text_column": "auto"},
        {"prompt_feature": "none", "completion_feature": "auto"},
        {"prompt_template": "{a, b}", "completion_column": "c"},
    ],
)
def test_options_that_go_together_are_accepted(options):
    assert TrainConfig.build({"data": "x", **options}).problems == ()
