"""A metric of the user's own: refused before any work where that can be seen, and never a fault of Thimble's."""

import pytest

from thimble.core.labels import AnswerCounts
from thimble.core.metrics import average
from thimble.errors import ConfigError
from thimble.events import EventLog, ignore
from thimble.training.answers import Answer
from thimble.training.before_after import all_answers
from thimble.training.metric import choose_metric, score_answers


@pytest.fixture
def metric(tmp_path):
    def choose(text, name="score"):
        path = tmp_path / "my metric.py"
        path.write_text(text)
        return choose_metric(f"{path}:{name}", ["x"], AnswerCounts())

    return choose


def score(metric, *written):
    log = EventLog(ignore)
    answers = [Answer("q", "ref", text, {}, f"mine.jsonl line {n + 1}") for n, text in enumerate(written)]
    return [dict(answer.scores) for answer in score_answers(answers, metric, log)], log.messages["warning"]


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("return len(answer) / 10", {"score": 0.2}),
        ("return answer == 'ok'", {"score": 1.0}),
        ("return {'a': True, 'b': 2}", {"a": 1.0, "b": 2.0}),
        ("import numpy; return numpy.float32(0.5)", {"score": 0.5}),
        ("import numpy; return {'a': numpy.bool_(True)}", {"a": 1.0}),
        ("import collections; return collections.Counter(a=3)", {"a": 3.0}),
        ("return {}", {}),
    ],
)
def test_a_number_a_truth_value_or_a_dict_of_them_is_taken(metric, body, found):
    scores, _ = score(metric(f"def score(answer, reference):\n    {body}\n"), "ok")
    assert scores == [found]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return reference['key']", ["line 2 (return reference['key']): TypeError"]),
        ("raise ValueError('no verb')", ["line 2", "ValueError: no verb"]),
        ("return 1 / 0", ["line 2", "ZeroDivisionError"]),
        ("import json; return json.loads(answer)", ["line 2", "JSONDecodeError"]),
        ("import sys; sys.exit(3)", ["line 2", "SystemExit: 3"]),
        ("assert False", ["line 2", "AssertionError"]),
        ("def deep(): return deep()\n    return deep()", ["line 2", "RecursionError"]),
        ("pass", ["line 1: score returned nothing (None)", "expected a number or a dict of numbers"]),
        ("return 'good'", ["score returned 'good'"]),
        ("return float('nan')", ["score returned nan"]),
        ("return {'a': 1, 'b': None}", ["score returned {'a': 1, 'b': None} for 'b'"]),
        ("return [1, 2]", ["score returned [1, 2]"]),
        ("return 1, 2", ["score returned (1, 2)"]),
    ],
)
def test_a_metric_that_fails_on_an_answer_is_named_with_line_and_row(metric, body, words):
    scores, warnings = score(metric(f"def score(answer, reference):\n    {body}\n"), "one", "two")
    assert scores == [{}, {}]
    (warning,) = warnings
    assert "my metric.py" in warning
    assert "2 of 2 answers" in warning
    assert "on the answer to mine.jsonl line 1" in warning
    for word in words:
        assert word in warning


def test_a_line_of_the_answer_file_says_why_the_metric_has_no_figure(metric):
    text = "def score(answer, reference):\n    return 1 / (answer != 'x')\n"
    answers = [Answer("q", "ref", "x", {}), Answer("q", "ref", "y", {})]
    failed, scored = score_answers(answers, metric(text), EventLog(ignore))
    assert "line 2 (return 1 / (answer != 'x')): ZeroDivisionError" in failed.described()["problem"]
    assert "problem" not in scored.described()
    (line, other) = all_answers([failed, scored], [scored, failed])
    assert line["problem_before"] == other["problem_after"] == failed.problem
    assert "problem_after" not in line


def test_the_line_named_is_the_users_own_though_another_file_raised(metric, tmp_path):
    (tmp_path / "beside.py").write_text("def half(text):\n    return text.nothing\n")
    text = "from beside import half\n\n\ndef score(answer, reference):\n    a = 1\n    return half(answer)\n"
    _, (warning,) = score(metric(text), "x")
    assert "my metric.py line 6 (return half(answer)): AttributeError" in warning


def test_rows_may_have_different_figures_each_averaged_over_the_rows_that_have_it(metric):
    text = "def score(answer, reference):\n    return {'a': 1.0} if answer == 'x' else {'a': 0.0, 'b': 0.5}\n"
    scores, warnings = score(metric(text), "x", "y", "z", "x")
    assert average(scores) == {"a": 0.5, "b": 0.5}
    assert warnings == []


def test_a_metric_that_fails_on_some_answers_scores_the_others(metric):
    scores, (warning,) = score(metric("def score(answer, reference):\n    return 1 / (answer != 'x')\n"), "x", "y")
    assert scores == [{}, {"score": 1.0}]
    assert "1 of 2 answers" in warning


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def score(answer):\n    pass\n", ["score(answer)", "line 1", "an answer and a reference"]),
        ("\ndef score(a, b, c):\n    pass\n", ["score(a, b, c)", "line 2"]),
        ("def score(*, answer, reference):\n    pass\n", ["score(*, answer, reference)"]),
        ("async def score(answer, reference):\n    pass\n", ["async or a generator"]),
        ("def score(answer, reference):\n    yield 1\n", ["async or a generator"]),
        ("score = 3\n", ["defines no function score(answer, reference)"]),
        ("def other(a, b):\n    pass\n", ["defines no function score"]),
        ("def score(answer, reference)\n    pass\n", ["line 1 is not Python"]),
        ("import nothing_of_that_name\n", ["line 1 (import nothing_of_that_name): ModuleNotFoundError"]),
        ("x = 1\ny = x / 0\n", ["line 2 (y = x / 0): ZeroDivisionError"]),
        ("raise SystemExit(1)\n", ["SystemExit: 1"]),
    ],
)
def test_what_cannot_be_a_metric_is_refused_before_any_work(metric, text, words):
    with pytest.raises(ConfigError) as refused:
        metric(text)
    for word in (*words, "my metric.py"):
        assert word in str(refused.value)


@pytest.mark.parametrize(
    "text",
    ["def score(answer, reference, strict=True):\n    return 1\n", "def score(*texts):\n    return 1\n",
     "class Score:\n    def __call__(self, a, b):\n        return 1\nscore = Score()\n",
     "import functools\nscore = functools.partial(lambda n, a, b: n, 1)\n"],
    ids=["defaults", "stars", "object", "partial"],
)  # fmt: skip
def test_whatever_can_be_called_with_two_texts_is_taken(metric, text):
    (scores,), _ = score(metric(text), "x")
    assert scores == {"score": 1.0}


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("accuracy", ["labels reports that"]),
        ("F1", ["labels reports that"]),
        ("exact_match", ["--metric exact is its name"]),
        ("rouge", ["expected auto, none, exact, labels, json, tools, or your own function as file.py:name"]),
        ("score.py", ["name the function too, as in score.py:score"]),
        ("gone.py:score", ["there is no file gone.py"]),
    ],
)
def test_a_name_that_is_no_metric_is_answered_with_those_that_are(wanted, words):
    with pytest.raises(ConfigError) as refused:
        choose_metric(wanted, ["x"], AnswerCounts())
    for word in (f"--metric {wanted}", *words):
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("references", "name"),
    [
        (["yes", "no"] * 10, "labels"),
        (['{"a": 1}', '{"a": 2}'] * 10, "json"),
        (['{"name": "f", "arguments": {}}'] * 12, "tools"),
        ([f"answer {n}" for n in range(12)], "exact"),
        (["word " * 20] * 12, "none"),
        ([], "none"),
    ],
)
def test_auto_takes_what_suits_the_references(references, name):
    counts = AnswerCounts()
    for reference in references:
        counts.add(reference)
    assert choose_metric("auto", references, counts).name == name


def test_the_module_of_a_metric_can_be_found_by_its_name(metric):
    text = """from __future__ import annotations
import dataclasses

@dataclasses.dataclass
class Seen:
    length: int

def score(answer, reference):
    return Seen(len(answer)).length
"""
    assert score(metric(text), "ok")[0] == [{"score": 2.0}]


def test_a_metric_may_change_where_python_looks_for_modules(metric):
    text = "import sys\nsys.path.pop(0)\ndef score(answer, reference):\n    return 1\n"
    assert score(metric(text), "ok")[0] == [{"score": 1.0}]
