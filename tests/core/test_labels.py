"""Labels: when answers are labels, what is odd about them, and how well they are found."""

import pytest

from thimble.core.labels import AnswerCounts, label_of, oddities, score_labels, stratified


def count(answers):
    counts = AnswerCounts()
    for answer in answers:
        counts.add(answer)
    return counts


@pytest.mark.parametrize(
    ("answers", "are_labels"),
    [
        (["yes", "no"] * 10, True),
        (["billing\n", " billing", "shipping"] * 5, True),
        (['{"label": "a", "n": 1}', '{"n": 1, "label": "a"}', '{"label": "b"}'] * 5, True),
        ([f"intent {n % 77}" for n in range(770)], True),
        (["positiv"] * 19 + ["negativ"], True),
        (["ja", "nein"] * 4, False),  # too few rows to say
        (["yes"] * 30, False),
        ([f"answer {n}" for n in range(30)], False),
        ([f"{n} it is" for n in range(15)] * 2, False),  # each twice
        (["I do not know."] * 20 + [f"It is {n}." for n in range(20)], False),
        (["yes, because " + "of this and that " * 10, "no, because " + "of that and this " * 10] * 20, False),
        (["a\nb", "c\nd"] * 20, False),
        ([""] * 40, False),
        ([], False),
    ],
    ids=lambda value: None if isinstance(value, bool) else f"{len(value)} rows, {value[0][:12]!r}" if value else "none",
)
def test_labels_are_few_short_texts_that_repeat(answers, are_labels):
    assert count(answers).are_labels == are_labels


def test_very_many_answers_take_little_memory():
    counts = count(f"answer {n}" for n in range(5000))
    assert len(counts.found) == 1000
    assert counts.rows == 5000


def test_scores_are_those_of_scikit_learn():
    """Its documentation of classification_report: y_true = 0 1 2 2 2, y_pred = 0 0 2 2 1."""
    scores = score_labels(zip("abccc", "aaccb", strict=True), {})
    by_label = {score.label: score for score in scores.labels}
    assert [by_label[x].precision for x in "abc"] == [0.5, 0.0, 1.0]
    assert [by_label[x].recall for x in "abc"] == [1.0, 0.0, pytest.approx(2 / 3)]
    assert [by_label[x].f1 for x in "abc"] == [pytest.approx(2 / 3), 0.0, pytest.approx(0.8)]
    assert scores.macro_f1 == pytest.approx(0.49, abs=0.005)
    assert scores.accuracy == 0.6
    assert (scores.majority, scores.baseline) == ("c", 0.6)
    assert scores.confusion == {"c": {"c": 2, "b": 1}, "a": {"a": 1}, "b": {"a": 1}}


def test_an_answer_that_is_no_label_is_other_and_costs_no_label_its_precision():
    scores = score_labels([("yes", "Yes, of course."), ("yes", "yes"), ("no", "")], {"yes": 5, "no": 5, "maybe": 3})
    assert scores.confusion == {"yes": {"(other)": 1, "yes": 1}, "no": {"(other)": 1}}
    assert {score.label: (score.precision, score.recall) for score in scores.labels} == {
        "yes": (1.0, 0.5),
        "no": (0.0, 0.0),
    }


def test_the_majority_is_that_of_the_training_rows_where_they_are_known():
    scores = score_labels([("a", "b"), ("a", "a"), ("b", "b")], {"b": 9, "a": 1})
    assert (scores.majority, scores.baseline) == ("b", pytest.approx(1 / 3))


def test_a_model_that_always_writes_one_label_does_not_beat_the_baseline():
    pairs = [("yes", "yes")] * 8 + [("no", "yes")] * 2
    assert score_labels(pairs, {}).baseline_chance == 1.0
    assert score_labels([("yes", "yes")] * 8 + [("no", "no")] * 8, {"yes": 1}).baseline_chance == 2**-8


def test_nothing_answered_is_no_fault():
    scores = score_labels([], {})
    assert (scores.rows, scores.labels, scores.majority) == (0, [], "")


@pytest.mark.parametrize("most", [3, 4, 10, 37, 100, 500])
def test_rows_are_drawn_from_every_label_by_their_shares(most):
    labels = ["a"] * 80 + ["b"] * 15 + ["c"] * 4 + ["d"]
    chosen = stratified(labels, most)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(most, 100)
    counts = {label: sum(labels[number] == label for number in chosen) for label in "abcd"}
    assert all(counts[label] for label in "abcd"[:most])
    if most >= 10:
        assert counts["a"] >= counts["b"] >= counts["c"] >= counts["d"] == 1
        assert counts["a"] == pytest.approx(0.8 * len(chosen), abs=2)


@pytest.mark.parametrize(
    ("learned", "held", "words"),
    [
        (["a"] * 95 + ["b"] * 5, ["a", "b"], ["94% of the rows have the label 'a'"]),
        (["a"] * 20 + ["b"] * 3, ["a", "b"], ["fewer than 5 training rows", "'b' (3)"]),
        (["a"] * 20 + ["b"] * 10, ["a", "c", "b"], ["no training row has: 'c'"]),
        (["a"] * 20 + ["b"] * 10, ["a"], ["without a validation row, whose answers are not measured: 'b'"]),
        (["Yes"] * 20 + ["yes"] * 10 + ["no"] * 10, ["no"], ["probably one: 'Yes' (20), 'yes' (10)"]),
        (["same"] * 20, ["same"], ["all 21 rows have the same answer, 'same'"]),
    ],
    ids=["unbalanced", "few rows", "unseen", "unmeasured", "alike", "all the same"],
)
def test_what_is_odd_about_labels_is_told(learned, held, words):
    told = " ".join(oddities(count(learned), count(held)))
    for word in words:
        assert word in told


def test_ordinary_labels_are_not_odd():
    assert oddities(count(["a", "b", "c"] * 20), count(["a", "b", "c"])) == []
    assert oddities(count(f"text {n}" for n in range(50)), count(["text 3"])) == []


def test_json_is_compared_whatever_the_order_of_its_keys():
    assert label_of(' {"b": 1, "a": "x"}\n') == label_of('{"a":"x","b":1}')
    assert label_of("{not json") == "{not json"
