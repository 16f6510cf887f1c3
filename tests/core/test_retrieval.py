"""How far up right answers stand, and how alike two orders are."""

import math

import numpy as np
import pytest

from thimble.core.retrieval import rank_scores, ranks, spearman, spearman_parts


def test_the_rank_of_a_right_answer_is_one_more_than_the_wrong_ones_before_it():
    questions = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    answers = np.array([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], np.float32)
    # similarities: question 0: 0.6, 1, 0, -1; question 1: 0.8, 0, 1, 0
    assert ranks(questions, answers, [[0], [1]]).tolist() == [2, 4]  # of question 1, answer 3 ties and counts before
    assert ranks(questions, answers, [[1], [2]]).tolist() == [1, 1]


def test_the_best_of_several_right_answers_counts_and_the_others_stand_in_nobodys_way():
    questions = np.array([[1.0, 0.0]], np.float32)
    answers = np.array([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0]], np.float32)
    assert ranks(questions, answers, [[2, 3]]).tolist() == [3]
    assert ranks(questions, answers, [[0, 1, 2]]).tolist() == [1]


def test_embeddings_that_are_all_the_same_find_nothing():
    same = np.ones((5, 3), np.float32)
    assert ranks(same, same, [[row] for row in range(5)]).tolist() == [5] * 5


def test_ranks_are_those_of_sorting_whatever_the_number_of_rows():
    drawn = np.random.default_rng(0)
    questions, answers = drawn.normal(size=(600, 4)).astype(np.float32), drawn.normal(size=(70, 4)).astype(np.float32)
    right = [[int(drawn.integers(70))] for _ in range(600)]
    order = np.argsort(-(questions @ answers.T), axis=1)
    expected = [int(np.flatnonzero(order[row] == right[row][0])[0]) + 1 for row in range(600)]
    assert ranks(questions, answers, right).tolist() == expected


def test_a_question_without_a_right_answer_is_refused():
    with pytest.raises(ValueError, match="question 1 has no right answer"):
        ranks(np.ones((2, 2), np.float32), np.ones((2, 2), np.float32), [[0], []])


def test_the_scores_of_a_rank():
    assert rank_scores(1) == {"MRR": 1.0, "recall@1": 1.0, "recall@5": 1.0, "recall@10": 1.0}
    assert rank_scores(4) == {"MRR": 0.25, "recall@1": 0.0, "recall@5": 1.0, "recall@10": 1.0}
    assert rank_scores(10)["recall@10"] == 1.0
    assert rank_scores(11) == {"MRR": 1 / 11, "recall@1": 0.0, "recall@5": 0.0, "recall@10": 0.0}


def test_spearman_of_a_table_in_books():
    """IQ and hours of television, whose coefficient is -29/165."""
    iq = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110]
    hours = [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]
    assert spearman(iq, hours) == pytest.approx(-29 / 165)


def test_spearman_gives_ties_the_mean_of_their_ranks():
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5)
    assert spearman([1, 2, 2, 3], [10, 20, 30, 40]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman([1, 2, 2, 3], [5, 5, 5, 5]) == 0.0
    assert spearman([], []) == 0.0


def test_the_parts_of_the_rows_have_spearman_as_their_mean_and_rise_where_the_rank_comes_nearer():
    drawn = np.random.default_rng(1)
    given = np.round(drawn.normal(size=200), 1)
    found = np.round(given + drawn.normal(size=200), 1)
    parts = spearman_parts(found, given)
    assert parts.mean() == pytest.approx(spearman(found, given))
    assert spearman_parts([1, 2, 3, 4], [1, 2, 3, 4]).tolist() == pytest.approx([1, 1, 1, 1])
    assert spearman_parts([2, 1, 3, 4], [1, 2, 3, 4])[0] < 1


def test_a_right_answer_that_is_named_twice_counts_once():
    """A pair that stands twice among the rows names its answer twice; two were taken off for it, and one came first."""
    questions, answers = np.eye(3, dtype=np.float32), np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]], np.float32)
    assert ranks(questions[:1], answers, [[1, 1]]).tolist() == [1]
    assert ranks(questions[:1], -answers, [[1, 1, 1]]).tolist() == [3]
