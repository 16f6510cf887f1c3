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
        top_k: Only so many of the likeliest tokens are drawn from; 0 sets no limit.
        min_p: Only tokens at least so likely, as a share of the likeliest, are drawn from (Nguyen et al.,
            arXiv:2407.01082).
        seed: Of the random stream, below 2^128.
    """

    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
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
        """Take the likeliest token, or draw one: float32 (vocabulary,) to its number.

        The limits work one after the other, as in transformers: top_k, then top_p of what that leaves, then min_p.
        """
        options = self._options
        if options.temperature == 0:
            return int(logits.argmax())
        weights = np.exp((logits - logits.max()).astype(np.float64) / options.temperature)
        tokens = self._likeliest(weights)
        drawn = np.cumsum(weights[tokens])
        return int(tokens[min(np.searchsorted(drawn, self._random.random() * drawn[-1], "right"), len(tokens) - 1)])

    def _likeliest(self, weights: NDArray[np.float64]) -> NDArray[np.int64]:
        """The tokens that are drawn from, first to last in likelihood where a limit is set; at least one."""
        options = self._options
        if 0 < options.top_k < len(weights):
            tokens = _sorted(weights, options.top_k)
            tokens = tokens[: _nucleus(weights[tokens], options.top_p * weights[tokens].sum())]
        elif options.top_p < 1:
            wanted = options.top_p * weights.sum()
            tokens = _sorted(weights, min(FIRST_LOOK, len(weights)))
            if weights[tokens].sum() <= wanted:
                tokens = _sorted(weights, len(weights))
            tokens = tokens[: _nucleus(weights[tokens], wanted)]
        else:
            tokens = np.arange(len(weights))
        return tokens[weights[tokens] >= options.min_p] if options.min_p else tokens  # the likeliest weighs 1


def _sorted(weights: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The likeliest tokens, first to last."""
    tokens = np.argpartition(weights, -count)[-count:]
    return tokens[np.argsort(-weights[tokens], kind="stable")]


def _nucleus(weights: NDArray[np.float64], wanted: float) -> int:
    """How many of the tokens, sorted, it takes to come above the weight that is wanted."""
    return int(np.searchsorted(np.cumsum(weights), wanted, "right")) + 1
