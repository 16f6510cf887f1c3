"""What few rows can tell: whether a difference, measured row by row, is more than chance would bring."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

CHANCE = 0.025  # a difference of counts is clear if chance alone would bring it less often than this
# Likewise of losses. Stricter, because their tests are exact for even distributions only: where many rows gain a little
# and a few lose much, the share of false alarms is several times this.
LOSS_CHANCE = 0.005
LEAST_ROWS = math.ceil(math.log2(1 / LOSS_CHANCE))  # 8: chance alone moves fewer rows all one way more often than that
NEARLY_ALL = 0.95  # of the rows
MOST_EXACT = 13  # rows for which every choice of signs is tried; of more rows, DRAWS of them
DRAWS = 10_000
FEWEST_DRAWS, MOST_DRAWN = 1_000, 5_000_000  # of a bootstrap, and numbers in all of them


@dataclass(frozen=True)
class Paired:
    """The differences of some rows, measured twice."""

    rows: int  # rows compared
    better: int  # of them, rows with a difference above 0
    worse: int  # and below
    t: float  # of the mean, corrected for skewness; NaN for fewer than three rows or differences that are all the same
    chance: float  # that random signs alone would give a mean as high or higher
    chance_worse: float  # or as low or lower
    low: float = math.nan  # 95 % interval of the mean; NaN for fewer than two rows, and in older reports
    high: float = math.nan
    groups: int = 0  # how many groups the rows belong to, where some belong together; else 0


def compare(differences: Sequence[float], counts: Sequence[float] | None = None) -> Paired:
    """Compare rows measured twice: differences above 0 are gains; NaN and Inf are not compared. Order does not matter,
    and the same rows give the same figures. If `counts` says what each difference is summed over, such as tokens, the
    mean is that of a token.
    """
    sums = np.asarray(differences, np.float64)
    weights = np.ones(len(sums)) if counts is None else np.asarray(counts, np.float64)
    sums, weights = sums[np.isfinite(sums)], weights[np.isfinite(sums)]
    values = sums / (weights.mean() if len(weights) else 1.0)
    signs = int((values > 0).sum()), int((values < 0).sum())
    return Paired(len(values), *signs, _hall_t(values), *_flip(values), *bootstrap(sums, weights))


def is_clear(paired: Paired, chance: float = LOSS_CHANCE) -> bool:
    """Whether the rows gained by more than chance, by two tests that err in different cases.

    Where nearly all rows gain, one that loses much does not undo it, though it may hide the mean.
    """
    if paired.rows < LEAST_ROWS or not paired.chance <= chance:
        return False
    if paired.better >= NEARLY_ALL * paired.rows or math.isnan(paired.t):
        return True
    return paired.t > t_quantile(chance, paired.rows - 1)


def _flip(values: NDArray[np.float64]) -> tuple[float, float]:
    """The chances of a sum as high and as low, by the sign-flipping test of Fisher (The Design of Experiments, 1935,
    section 21): exact for any distribution of differences that is even about 0, however heavy its tails.
    """
    count, total, near = len(values), values.sum(), 1e-9 * np.abs(values).sum()
    sums = _signs(count) @ np.sort(values)  # so that the draws do not depend on the order of rows
    high, low = float((sums >= total - near).mean()), float((sums <= total + near).mean())
    return (high, low) if count <= MOST_EXACT else ((DRAWS * high + 1) / (DRAWS + 1), (DRAWS * low + 1) / (DRAWS + 1))


@functools.lru_cache(maxsize=2)
def _signs(count: int) -> NDArray[np.float32]:
    """Choices of signs, float32 (choices, count): all of them where that are few."""
    if count <= MOST_EXACT:
        return (1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)).astype(np.float32)
    return (1 - 2 * np.random.default_rng(0).integers(0, 2, (DRAWS, count), np.int8)).astype(np.float32)


def bootstrap(sums: ArrayLike, counts: ArrayLike | None = None) -> tuple[float, float]:
    """A 95 % interval of the mean of rows, or of what `sums` come to for each of `counts`; NaN for fewer than two rows.

    Rows are drawn again with replacement (Efron, Ann. Statist. 7, 1979), from a fixed seed. Its quantiles are taken as
    far out as Student's t is wider than a normal distribution, or few rows would give too narrow an interval
    (Hesterberg, The American Statistician 69, 2015: the expanded percentile interval).
    """
    sums = np.asarray(sums, np.float64)
    weights = np.ones(len(sums)) if counts is None else np.asarray(counts, np.float64)
    rows = len(sums)
    if rows < 2:
        return math.nan, math.nan
    order = np.lexsort((sums, weights))  # so that the draws do not depend on the order of rows
    drawn = _draws(rows) @ np.stack([sums[order], weights[order]], 1)
    far = t_quantile(CHANCE, rows - 1) * math.sqrt(rows / (rows - 1))
    tail = math.erfc(far / math.sqrt(2)) / 2
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [tail, 1 - tail])
    return float(low), float(high)


@functools.lru_cache(maxsize=2)
def _draws(rows: int) -> NDArray[np.float64]:
    """How often each row is drawn, float64 (draws, rows); of very many rows fewer draws, which are as good there."""
    draws = max(FEWEST_DRAWS, min(DRAWS, MOST_DRAWN // rows))
    return np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), draws).astype(np.float64)


def _hall_t(values: NDArray[np.float64]) -> float:
    """Student's t of the mean, made even by the cubic of Hall (J. R. Stat. Soc. B 54, 1992, section 2): it takes the
    skewness of the differences into account, and still grows with their mean.
    """
    count = len(values)
    if count < 3 or not values.std() > 1e-12 * np.abs(values).max():
        return math.nan
    mean, deviation = values.mean(), values.std(ddof=1)
    skewness = ((values - mean) ** 3).sum() * count / ((count - 1) * (count - 2)) / deviation**3
    size = mean / deviation
    even = size + skewness * size**2 / 3 + skewness**2 * size**3 / 27 + skewness / (6 * count)
    return float(even * math.sqrt(count))


@functools.lru_cache(maxsize=64)
def t_quantile(chance: float, freedom: int) -> float:
    """What Student's t exceeds with this chance, above 0 and up to a half: the integral of its density, inverted."""
    low, high = 0.0, 1.0
    while t_chance(high, freedom) > chance:
        low, high = high, high * 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_chance(middle, freedom) > chance else (low, middle)
    return (low + high) / 2


def t_chance(t: float, freedom: int) -> float:
    """The chance that Student's t is above `t`, from 0 on: with t = sqrt(freedom) tan(x), its density is a power of
    cos(x), which is summed by Simpson's rule.
    """
    x = np.linspace(math.atan(t / math.sqrt(freedom)), math.pi / 2, 2001)
    density = np.cos(x).clip(0) ** (freedom - 1)
    weights = np.ones_like(x)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi) / 2
    return float(math.exp(log_scale) * (density @ weights) * (x[1] - x[0]) / 3)


def sign_test(more: int, less: int) -> float:
    """The chance that of rows that changed, each one way or the other by chance, so many or more went the first way.

    One-sided, exact; of answers that are right or wrong this is McNemar's test (Psychometrika 12, 1947).
    """
    more, changed = int(more), int(more) + int(less)  # of any kind of whole numbers: these are larger than 64 bits
    ways: int = sum(math.comb(changed, count) for count in range(more, changed + 1))
    return ways / (1 << changed)


def fisher(before: int, after: int, rows: int) -> float:
    """Fisher's exact test, one-sided: the chance that so many of all right answers are on the second side.

    For two counts of the same number of rows of which nobody knows any more which row is which.
    """
    total = before + after
    if not 0 <= before < after <= rows:
        return 1.0
    tail = range(after, min(rows, total) + 1)
    chance = (_log_choose(rows, k) + _log_choose(rows, total - k) - _log_choose(2 * rows, total) for k in tail)
    return sum(map(math.exp, chance))


def _log_choose(of: int, some: int) -> float:
    return math.lgamma(of + 1) - math.lgamma(some + 1) - math.lgamma(of - some + 1)


def wilson(share: float, rows: int) -> tuple[float, float]:
    """Wilson's 95 % interval (JASA 22, 1927): where a share would lie on very many rows of the same kind."""
    z = 1.96
    middle = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def share_interval(better: int, worse: int, rows: int) -> tuple[float, float]:
    """A 95 % interval of the difference of two shares of the same rows, of which so many rose and so many fell: that of
    Wald with one row more on either side (Bonett and Price, J. Educ. Behav. Stat. 37, 2012).
    """
    up, down = (better + 1) / (rows + 2), (worse + 1) / (rows + 2)
    half = 1.96 * math.sqrt((up + down - (up - down) ** 2) / (rows + 2))
    return max(up - down - half, -1.0), min(up - down + half, 1.0)
