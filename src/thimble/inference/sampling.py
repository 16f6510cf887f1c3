"""Choosing next tokens from logits, for each request with a random stream of its own.

Options mean what they mean in vLLM and in the OpenAI API. They work in this order: `mask`, `logit_bias`, penalties,
`temperature`, `top_k`, `top_p`, `min_p`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FIRST_LOOK = 256  # likeliest tokens sorted at first: they nearly always hold `top_p`

# Told the tokens of the answer so far; says which may come next, bool (vocabulary,), or None for all of them.
Mask = Callable[[Sequence[int]], NDArray[np.bool_] | None]


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
        presence_penalty: Taken off the logit of a token that stands in the answer.
        frequency_penalty: Taken off the logit of a token for each time that it stands in the answer.
        repetition_penalty: Positive logits of tokens of prompt and answer are divided by it, negative ones multiplied
            (Keskar et al., CTRL, arXiv:1909.05858); 1 changes nothing.
        logit_bias: Added to the logits of some tokens.
        mask: Which tokens may come next, as a grammar says it; None allows all of them.
        logprobs: How many of the likeliest tokens are told at each place, with the log-probability of the chosen one;
            None tells nothing. They are those of the model, before any of these options.
        prompt_logprobs: The same of each token of the prompt behind the first, which is then read anew, whatever an
            earlier request had read of it.
    """

    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    mask: Mask | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class LogProbs(NamedTuple):
    """What the model thought of a place.

    Attributes:
        chosen: Log-probability of the token that was chosen.
        top: The likeliest tokens with theirs, the likeliest first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


class NothingAllowedError(Exception):
    """A mask leaves no token that could come next."""


class Sampler:
    """Chooses the tokens of one request.

    Args:
        options: How.
        prompt: int32 (T,), of which `repetition_penalty` knows.
    """

    def __init__(self, options: SamplingOptions, prompt: NDArray[np.int32] | Sequence[int] = ()) -> None:
        self._options = options
        self._random = np.random.Generator(np.random.Philox(key=options.seed))
        self._counts: dict[int, int] = {}  # how often each token stands in the answer
        self._repeated = set(map(int, prompt)) if options.repetition_penalty != 1 else set()
        self.written: list[int] = []

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Take the likeliest token, or draw one.

        The limits work one after the other, as in transformers: top_k, then top_p of what that leaves, then min_p.

        Args:
            logits: float32 (vocabulary,).

        Returns:
            The number of the token, which joins `written`.

        Raises:
            NothingAllowedError: If the mask allows none.
        """
        adjusted = self._adjusted(logits)
        token = int(adjusted.argmax()) if self._options.temperature == 0 else self._drawn(adjusted)
        self._counts[token] = self._counts.get(token, 0) + 1
        self.written.append(token)
        return token

    def _adjusted(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits after mask, bias and penalties; the very same array where none of them is set."""
        options = self._options
        allowed = options.mask(self.written) if options.mask else None
        penalised = self._repeated | self._counts.keys() if self._has_penalty else ()
        if allowed is None and not options.logit_bias and not penalised:
            return logits
        adjusted = logits.copy()
        if allowed is not None:
            if not allowed.any():
                raise NothingAllowedError
            adjusted[: len(allowed)][~allowed[: len(logits)]] = -np.inf
            adjusted[len(allowed) :] = -np.inf  # rows that pad a head have no token
        if options.logit_bias:
            adjusted[list(options.logit_bias)] += np.array(list(options.logit_bias.values()), np.float32)
        if penalised:
            self._penalise(adjusted, np.fromiter(penalised, np.int64))
        return adjusted

    @property
    def _has_penalty(self) -> bool:
        options = self._options
        return bool(options.presence_penalty or options.frequency_penalty or options.repetition_penalty != 1)

    def _penalise(self, logits: NDArray[np.float32], tokens: NDArray[np.int64]) -> None:
        """Change the logits of tokens that were there before, in place."""
        options, found = self._options, logits[tokens]
        rate = np.float32(options.repetition_penalty)
        found = np.where(found > 0, found / rate, found * rate)
        counts = np.array([self._counts.get(int(token), 0) for token in tokens], np.float32)
        logits[tokens] = found - options.frequency_penalty * counts - options.presence_penalty * (counts > 0)

    def _drawn(self, logits: NDArray[np.float32]) -> int:
        """Draw a token by its share of softmax(logits / temperature), within the limits."""
        with np.errstate(over="ignore"):  # at hardly any temperature all but the likeliest are infinitely unlikely
            weights = np.exp((logits - logits.max()).astype(np.float64) / self._options.temperature)
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


def log_probs(logits: NDArray[np.float32], token: int, count: int) -> LogProbs:
    """What is told of a place: float32 (vocabulary,), the token that stands there, and how many of the likeliest."""
    top = float(logits.max())
    log_sum = top + float(np.log(np.exp(logits.astype(np.float64) - top).sum()))
    likeliest = _sorted(logits, min(count, len(logits))) if count else np.empty(0, np.int64)
    return LogProbs(
        float(logits[token]) - log_sum, tuple((int(other), float(logits[other]) - log_sum) for other in likeliest)
    )


def _sorted(weights: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """The likeliest tokens, first to last."""
    tokens = np.argpartition(weights, -count)[-count:]
    return tokens[np.argsort(-weights[tokens], kind="stable")]


def _nucleus(weights: NDArray[np.float64], wanted: float) -> int:
    """How many of the tokens, sorted, it takes to come above the weight that is wanted."""
    return int(np.searchsorted(np.cumsum(weights), wanted, "right")) + 1
