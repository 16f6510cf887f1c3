"""Figures from sums and from answers."""

import math

import pytest

from thimble.core.metrics import LossSum, average, exact, goodness, parse_tool_calls, tool_calls, valid_json

CALL = '<tool_call>\n{"name":"weather","arguments":{"city":"Paris","days":3}}\n</tool_call>'


def test_losses_add_up_whatever_the_batching():
    assert (LossSum(6.0, 2) + LossSum(2.0, 6)).mean == 1.0
    assert math.isnan(LossSum().mean)


@pytest.mark.parametrize(
    ("answer", "scores"),
    [
        (CALL, (1, 1, 1, 1)),
        ('{"name": "weather", "arguments": {"days": 3.0, "city": "Paris"}}', (1, 1, 1, 1)),
        ('{"name": "weather", "parameters": {"city": "Paris", "days": "3"}}', (1, 1, 0, 0.5)),
        ('{"name": "weather", "arguments": {"city": "Paris", "days": 3, "extra": 1}}', (1, 1, 0, 1)),
        ('{"name": "wether", "arguments": {"city": "Paris", "days": 3}}', (1, 0, 0, 0)),
        ('{"name": "weather", "arguments": "{\\"city\\": \\"Paris\\", \\"days\\": 3}"}', (1, 1, 1, 1)),
        ("weather(city='Paris', days=3)", (0, 0, 0, 0)),
        (CALL + CALL, (1, 0, 0, 0)),
        ("", (0, 0, 0, 0)),
    ],
)
def test_tool_calls_are_scored_by_form_name_and_arguments(answer, scores):
    assert tuple(tool_calls(answer, CALL).values()) == scores


def test_a_call_cut_off_at_the_end_of_its_block_still_counts_if_its_json_is_whole():
    assert parse_tool_calls(CALL.removesuffix("</tool_call>"))


def test_json_fields_are_compared_by_path():
    scores = valid_json('{"a": {"b": 1}, "c": [1, 3]}', '{"a": {"b": 1}, "c": [1, 2]}')
    assert scores == {"valid JSON": 1.0, "all fields right": 0.0, "fields right": pytest.approx(2 / 3)}
    assert valid_json("not json", "{}")["valid JSON"] == 0.0


def test_true_is_not_one():
    assert valid_json('{"a": 1}', '{"a": true}')["fields right"] == 0.0


def test_exact_match_ignores_only_outer_white_space():
    assert exact(" yes\n", "yes") == {"exact match": 1.0}
    assert exact("Yes", "yes") == {"exact match": 0.0}


def test_averages_are_taken_figure_by_figure():
    assert average([{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.0}]) == {"a": 0.5, "b": 0.0}
    assert average([]) == {}


def test_a_rate_of_errors_counts_as_many_times_as_a_row_has_characters():
    scores, sizes = [{"CER": 0.5, "exact match": 0.0}, {"CER": 0.0, "exact match": 1.0}], [{"CER": 2.0}, {"CER": 8.0}]
    assert average(scores, sizes) == {"CER": 0.1, "exact match": 0.5}


def test_fewer_errors_are_better_and_more_of_anything_else():
    assert goodness("CER", 0.2) > goodness("CER", 0.9) > goodness("CER", 1.4)
    assert goodness("accuracy", 0.9) > goodness("accuracy", 0.2)
