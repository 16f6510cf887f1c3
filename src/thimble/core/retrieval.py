"""How far up right answers stand among all, and how alike two orders of the same rows are."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

RECALLS = (1, 5, 10)  # places up to which a right answer counts as found
AT_ONCE = 512  # questions compared with all answers at a time


def ranks(
    questions: NDArray[np.float32], answers: NDArray[np.float32], right: Sequence[Sequence[int]]
) -> NDArray[np.int64]:
    """The place of the best right answer of each question, from 1: one more than the wrong answers as near or nearer.

    A wrong answer that is exactly as near counts as nearer, or embeddings that are all the same would find everything.

    Args:
        questions: Embeddings, float32 (questions, width).
        answers: Embeddings of the candidates, float32 (answers, width); the inner product says how near they are.
        right: Of each question, the numbers of the answers that are right; one that is named twice counts once.

    Returns:
        int64 (questions,).

    Raises:
        ValueError: If a question has no right answer.
    """
    missing = [number for number, own in enumerate(right) if not len(own)]
    if missing:
        raise ValueError(f"question {missing[0]} has no right answer")
    found = np.empty(len(questions), np.int64)
    for start in range(0, len(questions), AT_ONCE):
        near = questions[start : start + AT_ONCE] @ answers.T
        for row, similar in enumerate(near, start):
            own = similar[sorted({*right[row]})]  # a pair that stands in several rows names its answer in each
            found[row] = 1 + (similar >= own.max()).sum() - (own >= own.max()).sum()
    return found


def rank_scores(rank: int) -> dict[str, float]:
    """The figures of a rank: its reciprocal, whose mean is MRR (Voorhees, TREC-8, 1999), and whether it is near enough
    to be found among the first few.
    """
    return {"MRR": 1 / rank} | {f"recall@{places}": float(rank <= places) for places in RECALLS}


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation (Am. J. Psychology 15, 1904), -1 to 1; 0 if one side is the same everywhere."""
    parts = spearman_parts(first, second)
    return float(parts.mean()) if len(parts) else 0.0


def spearman_parts(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """What each row adds to Spearman's correlation, float64 (rows,): their mean is it.

    A row has 1 - d²/2, where d is the distance of its two ranks, both scaled to a standard deviation of 1: so a row
    rises exactly where its ranks come nearer to each other. All are 0 if one side is the same everywhere.
    """
    scaled = [_scaled_ranks(np.asarray(side, np.float64)) for side in (first, second)]
    if not all(side.any() for side in scaled):
        return np.zeros(len(scaled[0]))
    return 1 - (scaled[0] - scaled[1]) ** 2 / 2


def _scaled_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks with mean 0 and standard deviation 1, where values that are the same have the mean of their ranks."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle = (np.cumsum(counts) - (counts - 1) / 2)[places] if len(values) else values
    away = middle - middle.mean() if len(values) else values
    deviation = away.std() if len(values) else 0.0
    return away / deviation if deviation else np.zeros(len(values))
