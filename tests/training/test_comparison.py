"""Verdicts over pretended runs: without an effect hardly any is told as a gain, and a true gain is told."""

import re

import numpy as np
import pytest

from run_reports import full_report, steps
from thimble.core.labels import AnswerCounts
from thimble.core.metrics import LossSum
from thimble.core.significance import LEAST_ROWS, LOSS_CHANCE
from thimble.report.verdict import judge
from thimble.training.answers import Answer, mean_scores
from thimble.training.comparison import both_label_reports, compare_losses, compare_metrics
from thimble.training.guard import LEAST_TO_STOP, Plateau

RUNS, MANY_RUNS, ROWS, WATCHES = 200, 1000, 30, 9
NOISE = {
    "normal": lambda random, shape: random.normal(0, 0.3, shape),
    "heavy tails": lambda random, shape: 0.2 * random.standard_t(2, shape),
    "very heavy tails": lambda random, shape: 0.1 * random.standard_t(1.2, shape),
    "uneven rows": lambda random, shape: random.normal(0, 0.2, shape) * random.lognormal(0, 1, shape[-1]),
    "many small gains, few large losses": lambda random, shape: 0.2 * (random.exponential(1, shape) - 1),
    "many small losses, few large gains": lambda random, shape: 0.2 * (1 - random.exponential(1, shape)),
}


def tell(before, after, tokens, best_step=100, watches=0, sources=(), **known):
    """The verdict of a run of 100 steps with these losses of rows, nats per token."""
    old, new = (
        {n: LossSum(loss * count, count) for n, (loss, count) in enumerate(zip(losses, tokens, strict=True))}
        for losses in (before, after)
    )
    means = [sum(losses.values(), LossSum()).mean for losses in (old, new)]
    report = full_report(
        metrics_before={}, metrics_after={}, metrics_rows=0, steps=100, best_step=best_step,
        loss_base=means[0], loss_before=means[0], loss_after=means[1],
        loss_comparison=compare_losses(old, new, sources), **known,
    )  # fmt: skip
    steps = [{"step": n, "loss": 1.0} | ({"held_out_loss": 1.0} if n <= watches else {}) for n in range(1, 101)]
    return judge(report, steps)


def pretended_run(random, noise, gain=0.0, memory=0.0):
    """A run whose rows are measured with noise at each watch, kept as the loop keeps it: the best step or the last."""
    base, tokens = random.lognormal(0.5, 0.4, ROWS), random.integers(5, 60, ROWS)
    plateau, state, best = Plateau(patience=3), noise(random, (ROWS,)), None
    for watch in range(1, WATCHES + 1):
        fresh = noise(random, (ROWS,))
        state = memory * state + np.sqrt(1 - memory**2) * fresh
        losses = base - gain + state
        if plateau.add(10 * watch, list(losses)):
            best = losses
        if plateau.is_over:
            break
    is_returned = plateau.since > 0
    kept = best if is_returned else losses
    return tell(base, kept, tokens, plateau.best_step if is_returned else 100, watch)


@pytest.mark.parametrize("runs", [RUNS, pytest.param(MANY_RUNS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("memory", [0.0, 0.8], ids=["steps apart", "steps alike"])
@pytest.mark.parametrize("name", NOISE)
def test_without_an_effect_at_most_one_run_in_twenty_is_told_as_a_gain(name, memory, runs):
    """Also where the best of ten measurements on the same rows is kept."""
    random = np.random.default_rng(7)
    told = [pretended_run(random, NOISE[name], memory=memory).tone for _ in range(runs)]
    assert told.count("good") <= 0.05 * runs
    assert told.count("bad") <= 0.05 * runs or "large losses" in name


def pieces(random, texts, gain=0.0, is_known=True):
    """The verdict of a run on 96 pieces of texts, each of which rises or falls as one; whether that is known."""
    of, tokens = np.arange(96) * texts // 96, random.integers(20, 60, 96)
    before = random.lognormal(0.5, 0.4, 96)
    after = before - gain + random.normal(0, 0.2, texts)[of] + random.normal(0, 0.05, 96)
    return tell(before, after, tokens, sources=[f"text {number}" for number in of] if is_known else ())


def test_pieces_of_a_text_are_not_taken_for_rows_that_know_nothing_of_each_other():
    random = np.random.default_rng(3)
    told = [pieces(random, 10).tone for _ in range(RUNS)]
    assert told.count("good") <= 0.05 * RUNS >= told.count("bad")
    blind = [pieces(random, 10, is_known=False).tone for _ in range(RUNS)]
    assert blind.count("good") > 0.1 * RUNS, "or the test shows nothing"
    found = pieces(random, 10, gain=1.0)
    assert found.tone == "good", found
    assert any("Of 10 texts compared" in pieces(random, 10, gain=0.1).text for _ in range(10))


@pytest.mark.parametrize("texts", [1, 3])
def test_pieces_of_very_few_texts_show_something_of_these_texts_only(texts):
    found = pieces(np.random.default_rng(0), texts, gain=1.0)
    assert found.tone == "good"
    (caution,) = found.cautions
    assert caution.startswith(f"The 96 rows compared one by one are pieces of {texts} text")


def test_every_verdict_by_the_loss_carries_its_interval():
    random = np.random.default_rng(3)
    before, tokens = random.uniform(1, 4, ROWS), [20] * ROWS
    found = tell(before, before - 0.5 + random.normal(0, 0.1, ROWS), tokens)
    low, high = map(float, re.search(r"interval of the change: (\S+) to (\S+)\)", found.text).groups())
    assert -0.56 < low < -0.5 < high < -0.44


def test_a_true_gain_as_large_as_the_spread_of_its_rows_is_told_in_most_runs():
    random = np.random.default_rng(5)
    told = [pretended_run(random, NOISE["normal"], gain=0.3).tone for _ in range(50)]
    assert told.count("good") >= 40


@pytest.mark.parametrize(("name", "least"), [("normal", 1.0), ("heavy tails", 0.82)])
def test_a_true_gain_of_half_a_nat_is_told_on_thirty_rows(name, least):
    random = np.random.default_rng(7)
    told = [pretended_run(random, NOISE[name], gain=0.5).tone for _ in range(RUNS)]
    assert told.count("good") >= least * RUNS


def test_a_gain_of_a_spread_is_told_and_a_loss_too():
    random = np.random.default_rng(3)
    before, noise, tokens = random.uniform(1, 4, ROWS), random.normal(0, 0.1, ROWS), [20] * ROWS
    assert tell(before, before - 0.1 + noise, tokens).tone == "good"
    assert tell(before, before + 0.1 + noise, tokens).tone == "bad"
    assert tell(before, before - 0.005 + noise / 100, tokens).word == "No change"


@pytest.mark.parametrize("rows", range(LEAST_ROWS))
def test_too_few_rows_tell_nothing_however_large_the_change(rows):
    for change in (-1.0, 1.0):
        verdict = tell([3.0] * rows, [3.0 + change] * rows, [20] * rows)
        assert verdict.tone == "unknown"
        assert verdict.word == ("Too few rows to tell" if rows else "Not measured")


def test_the_fewest_rows_that_all_fall_tell_a_gain():
    falls = [0.5, 0.6, 0.4, 0.55, 0.45, 0.5, 0.52, 0.48][:LEAST_ROWS]
    assert tell([3.0] * LEAST_ROWS, [3.0 - fall for fall in falls], [20] * LEAST_ROWS).tone == "good"
    assert 2.0**-LEAST_ROWS <= LOSS_CHANCE < 2.0 ** -(LEAST_ROWS - 1)


def test_rows_that_choose_nothing_need_no_clearer_gain():
    before = [3.0, 3.1, 2.9, 3.0, 3.2, 2.8, 3.0, 3.1]
    after = [value - fall for value, fall in zip(before, [0.5, 0.6, 0.4, 0.55, 0.45, 0.5, 0.52, 0.48], strict=True)]
    assert tell(before, after, [20] * 8, watches=9).word == "Unclear"
    assert tell(before, after, [20] * 8, watches=9, untouched_rows=8).tone == "good"
    watched = [{**row, "held_out_loss": 1.0} for row in steps(20)]
    few = {
        "rows_before": 30,
        "rows_after": 30,
        "rows": 30,
        "better": 6,
        "worse": 0,
        "chance": 2**-6,
        "chance_worse": 1.0,
    }
    report = full_report(
        metrics_before={"exact match": 0.0}, metrics_after={"exact match": 0.2}, metrics_rows=30, best_step=10,
        metric_comparisons={"exact match": few},
    )  # fmt: skip
    assert judge(report, watched).word == "Unclear"
    assert judge(report | {"untouched_rows": 30}, watched).word == "Partly"


def test_patience_ends_hardly_any_run_whose_loss_only_shakes_however_few_the_rows():
    random, ended = np.random.default_rng(0), {}
    for rows in (3, LEAST_TO_STOP):
        ended[rows] = 0
        for _ in range(400):
            plateau, base = Plateau(patience=3), random.normal(1, 0.5, rows)
            for step in range(10):
                plateau.add(step, list(base + random.normal(0, 0.1, rows)))
                if plateau.is_over:
                    ended[rows] += 1
                    break
    assert max(ended.values()) / 400 <= 0.04


# ---- answers --------------------------------------------------------------------------------------------------------


def answers(*scores, references=None):
    return [Answer("q", (references or ["x"] * len(scores))[n], "w", row, f"row {n}") for n, row in enumerate(scores)]


def test_metrics_are_compared_on_the_rows_that_have_them_and_were_not_trained_on():
    before = answers({"a": 0.0}, {"a": 0.0, "b": 1.0}, {}, {"a": 1.0})
    after = answers({"a": 1.0}, {"a": 1.0}, {"a": 1.0}, {"a": 0.0, "b": 0.5})
    found = compare_metrics(before, after, {"row 0", "row 1", "row 2"})
    assert found["a"] == {
        "rows_before": 3, "rows_after": 4, "rows": 2, "better": 2, "worse": 0, "chance": 0.25, "chance_worse": 1.0,
        "low": pytest.approx(0.5 - 1.96 * (0.75 / 4) ** 0.5), "high": 1.0,
    }  # fmt: skip
    assert (found["b"]["rows_before"], found["b"]["rows_after"], found["b"]["rows"]) == (1, 1, 0)


def test_losses_are_compared_so_that_their_mean_is_the_change_of_the_loss():
    before = {n: LossSum(3.0 * (n + 1), n + 1) for n in range(8)}
    after = {n: LossSum(2.0 * (n + 1), n + 1) for n in range(1, 9)}
    found = compare_losses(before, after)
    assert (found["rows"], found["better"], found["worse"]) == (7, 7, 0)  # 0 is only in the one, 8 in the other
    assert found["chance"] == pytest.approx(2**-7)


def test_labels_are_scored_before_and_after_beside_their_training_rows():
    learned = AnswerCounts()
    for label in ["yes"] * 30 + ["no"] * 10:
        learned.add(label)
    rows = [Answer("q", label, written, {}, "") for label, written in [("yes", "yes"), ("no", "yes"), ("no", "Well,")]]
    report = both_label_reports(rows, rows, learned)
    assert report["training_rows"] == {"yes": 30, "no": 10}
    assert report["after"]["confusion"] == {"yes": {"yes": 1}, "no": {"(other)": 1, "yes": 1}}
    assert (report["after"]["majority"], report["after"]["baseline"]) == ("yes", pytest.approx(1 / 3))


@pytest.mark.parametrize("runs", [RUNS, pytest.param(MANY_RUNS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rows", [30, 200])
def test_answers_that_change_by_chance_alone_are_told_as_a_gain_in_at_most_one_run_of_twenty(rows, runs):
    """Rows are hard or easy, and each is answered twice by one and the same model; four metrics go together."""
    random, told = np.random.default_rng(11), []
    for _ in range(runs):
        chance = random.beta(0.7, 0.7, rows)
        fields = random.binomial(4, chance, (2, rows)) / 4
        both = [
            answers(*({"valid JSON": float(share > 0), "right function": float(share > 0.25),
                       "all arguments right": float(share == 1), "fields right": share} for share in shares))
            for shares in fields
        ]  # fmt: skip
        told.append(told_of(*both))
    gains = [verdict for verdict in told if verdict.word in ("Yes", "Mostly", "Partly")]
    assert len(gains) <= 0.05 * runs
    assert sum("It got worse" in verdict.text for verdict in told) <= 0.05 * runs


def heard(errors, characters, rows=40):
    """Answers to spoken rows with so many wrong characters each, by turns short and long."""
    return [
        Answer("", "", "", {"CER": wrong / size, "exact match": float(not wrong)}, f"row {n}", sizes={"CER": size})
        for n, (wrong, size) in enumerate([*zip(errors, characters, strict=True)] * (rows // 2))
    ]


def told_of(before, after):
    """The verdict of a run whose answers are these."""
    compared = compare_metrics(before, after, {answer.source for answer in before})
    measured = {"metrics_before": mean_scores(before), "metrics_after": mean_scores(after), "metrics_rows": len(before)}
    return judge(full_report(**measured, metric_comparisons=compared, best_step=100, steps=100), steps(100))


@pytest.mark.parametrize(
    ("before", "after", "tone", "words"),
    [
        ((4, 30), (0, 2), "good", "“CER” went from 100.0\N{NARROW NO-BREAK SPACE}% to 5.9"),
        ((4, 30), (3, 12), "good", "Mostly"),
        ((4, 30), (4, 22), "mixed", "Partly"),
        ((0, 2), (4, 30), "bad", "It got worse"),
        ((1, 12), (6, 40), "bad", "to 135.3"),
        ((0, 2), (0, 2), "unknown", "good at it"),
        ((4, 30), (4, 30), "bad", "no better"),
    ],
)
def test_fewer_errors_are_told_as_a_gain_and_more_as_a_loss(before, after, tone, words):
    said = told_of(heard(before, (4, 30)), heard(after, (4, 30)))
    assert said.tone == tone
    assert words in f"{said.word}. {said.text}"


def test_the_interval_of_errors_is_that_of_all_characters():
    found = compare_metrics(heard((4, 30), (4, 30)), heard((0, 15), (4, 30)), {f"row {n}" for n in range(40)})["CER"]
    assert (found["better"], found["worse"]) == (40, 0)
    assert found["chance"] < 0.001 < found["chance_worse"]
    assert found["low"] < -19 / 34 < found["high"] < 0
