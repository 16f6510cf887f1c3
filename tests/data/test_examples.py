"""What validation rows have in common with training rows."""

import numpy as np

from thimble.data.encode import IGNORED, Row
from thimble.data.encode_all import EncodeReport
from thimble.data.examples import Examples


def row(question, answer, before=()):
    """A row of token ids: other turns, one of them learned, then a question and its answer."""
    ids = [*before, *question, *answer]
    learned = [False, *([True] * (len(before) - 1) if before else []), *[False] * len(question), *[True] * len(answer)]
    learned = learned[-len(ids) :]
    labels = [token if is_learned else IGNORED for token, is_learned in zip(ids[1:], learned[1:], strict=True)]
    return Row(np.array(ids, np.int32), np.array([*labels, IGNORED], np.int32), "")


def examples(train, valid):
    return Examples(None, None, tuple(train), EncodeReport(), tuple(valid), (), EncodeReport())


OTHERS = [row([1, number], [9]) for number in range(100, 110)]


def test_a_validation_row_is_known_or_only_its_question_is():
    found = examples([*OTHERS, row([1, 2, 3], [4])], [row([1, 2, 3], [4]), row([1, 2, 3], [5]), row([1, 2], [3, 4])])
    assert (found.known, found.asked) == ({0, 2}, {1})


def test_what_counts_is_the_last_question_with_all_before_it():
    told, other = (5, 6, 7), (5, 6, 8)
    found = examples(
        [*OTHERS, row([1, 2], [4], told)], [row([1, 2], [3], told), row([1, 2], [3], other), row([1, 2], [3])]
    )
    assert (found.known, found.asked) == (set(), {0})


def test_a_question_that_most_rows_ask_and_plain_text_are_no_leak():
    jokes = [row([1, 2], [number]) for number in range(20)]
    assert examples(jokes[:15], jokes[15:]).asked == set()
    texts = [Row(np.array([1, n]), np.array([n, IGNORED]), "") for n in range(9)]
    assert examples(texts[:5], texts[5:]).asked == set()
