"""Which inputs dropout leaves out: a function of seed, step, row, token, layer and column, and of nothing else.

A counter-based generator answers for every element on its own, so that the mask depends neither on how a step is split
into micro-batches nor on the backend: the torch session asks the same questions inside its kernels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(counter: Sequence[NDArray[Any] | int], key: Sequence[int]) -> NDArray[np.uint32]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, sections 3.2 and 3.3).

    The counter has four and the key two 32-bit words; the result is uint32 (..., 4), four words for each counter.

    >>> [hex(word) for word in philox((0, 0, 0, 0), (0, 0)).tolist()]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    a, b, c, d = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter))
    for number in range(_ROUNDS):
        first, second = (np.uint64(key[i] + number * _KEY_STEPS[i] & 0xFFFFFFFF) for i in (0, 1))
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]  # 32 by 32 bits give 64: high and low word
        a, b, c, d = (right >> _HALF) ^ b ^ first, right & _LOW, (left >> _HALF) ^ d ^ second, left & _LOW
    return np.stack([a, b, c, d], axis=-1).astype(np.uint32)


def keep_mask(
    key: tuple[int, int], layer: int, rows: NDArray[Any], tokens: NDArray[Any], columns: int, rate: float
) -> NDArray[np.bool_]:
    """Which elements of the input of a group of projections stay, bool (T, columns), times `keep_factor(rate)`.

    Element (row, token, column j) is dropped if lane j % 4 of Philox with counter (j // 4, token, row, layer) is below
    `drop_threshold(rate)`; rows and tokens are whole numbers (T,), the place of each token's row in the step and its
    own in the row. The key is the seed of the run and the number of the step, from 0; 32 bits of each count. Layers are
    numbered in the order they run: 4 · block + 0 for q, k and v, 1 for the output of attention, 2 for gate and up, 3
    for down.
    """
    fours = np.arange(-(-columns // 4))  # columns that share a counter
    counter = (fours, np.asarray(tokens)[:, None], np.asarray(rows)[:, None], layer)
    words = philox(counter, [word & 0xFFFFFFFF for word in key])
    kept = words >= np.uint32(drop_threshold(rate))  # (T, columns / 4, 4)
    return kept.reshape(len(words), 4 * len(fours))[:, :columns]


def drop_threshold(rate: float) -> int:
    """Elements whose 32-bit word is below it are dropped: floor(rate · 2³²)."""
    return int(rate * 2**32)


def keep_factor(rate: float) -> np.float32:
    """What elements that stay are multiplied by, so that their sum keeps its mean: 1 / (1 - rate)."""
    return np.float32(1 / (1 - rate))
