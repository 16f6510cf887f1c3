"""Choosing next tokens from logits, for each request with a random stream of its own."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FIRST_LOOK = 256  # likeliest tokens sorted at first: they nearly always hold `top_p`


@dataclass(frozen=True)
class SamplingOptions:
    """How an answer is written.

    Attributes:
        max_new_tokens: Longest answer, in tokens.
        stop_ids: Tokens that end an answer; they are not part of it.
        temperature: 0 takes the likeliest token.
        top_p: Only the likeliest tokens that make up this share are drawn from (Holtzman et al., arXiv:1904.09751).
        seed: Of the random stream.
    """

    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Sampler:
    """Chooses the tokens of one request.

    Args:
        options: How.
    """

    def __init__(self, options: SamplingOptions) -> None:
        self._options = options
        self._random = np.random.Generator(np.random.Philox(key=options.seed))

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Take the likeliest token, or draw one: float32 (vocabulary,) to its number."""
        if self._options.temperature == 0:
            return int(logits.argmax())
        weights = np.exp((logits - logits.max()).astype(np.float64) / self._options.temperature)
        tokens = self._nucleus(weights)
        drawn = np.cumsum(weights[tokens])
        return int(tokens[min(np.searchsorted(drawn, self._random.random() * drawn[-1], "right"), len(tokens) - 1)])

    def _nucleus(self, weights: NDArray[np.float64]) -> NDArray[np.int64]:
        """The likeliest tokens, first to last, of which all but the last hold less than `top_p`; at least one."""
        if self._options.top_p >= 1:
            return np.arange(len(weights))
        wanted = self._options.top_p * weights.sum()
        count = min(FIRST_LOOK, len(weights))
        while True:
            tokens = np.argpartition(weights, -count)[-count:]
            tokens = tokens[np.argsort(-weights[tokens], kind="stable")]
            held = np.cumsum(weights[tokens])
            if held[-1] > wanted or count == len(weights):
                return tokens[: np.searchsorted(held, wanted, "right") + 1]
            count = len(weights)
