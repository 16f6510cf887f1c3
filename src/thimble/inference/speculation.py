"""Speculation by n-grams (prompt lookup): what followed the last tokens before is guessed to follow them again.

A guess is read together with the token before it, and what it costs is little where a step waits for memory. It is kept
only as far as the sampler, asked after each of its tokens in turn, chooses the same: that is the rule of speculative
sampling (Leviathan et al., arXiv:2211.17192) for a draft that is certain of itself. So answers are what they are
without it, whatever the options of sampling; only their speed depends on the guesses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from thimble.inference.request import ActiveRequest

NGRAMS = (4, 2)  # tokens that have to agree, the longer ones tried first
MOST_DRAFTED = 12  # tokens of a guess
MEMORY = 0.9  # of guesses and of times: what each new one leaves of the weight of those before
FIRST_RATE = 0.6  # of guessed tokens that are right, before any was tried
FIRST_COST = 0.3  # of a further token, as a share of what a pass of one takes, before any was timed
PROBE_EVERY = 32  # tokens without a guess, after which one token is tried again


@dataclass
class Drafter:
    """Guesses how one request goes on.

    Attributes:
        history: Its tokens so far.
    """

    history: list[int]
    _found: dict[tuple[int, ...], int] = field(default_factory=dict)  # n-gram to the place behind its latest one
    _right: float = FIRST_RATE
    _tried: float = 1.0
    _since: int = 0  # tokens since the last guess

    def __post_init__(self) -> None:
        tokens, self.history = self.history, []
        self.add(tokens)
        self._since = 0

    def add(self, tokens: Sequence[int]) -> None:
        """The request went on."""
        for token in tokens:
            for size in NGRAMS:
                if len(self.history) >= size:
                    self._found[tuple(self.history[-size:])] = len(self.history)
            self.history.append(int(token))
        self._since += len(tokens)

    def draft(self, cost: float, rows: int = 1, most: int = MOST_DRAFTED) -> list[int]:
        """Guess the next tokens: as many as pay.

        Args:
            cost: Of a further token in the pass, as a share of what the pass takes without.
            rows: Requests that write a token in it.
            most: Tokens that there is room for.

        Returns:
            Their numbers, none if nothing like the last ones was seen or no guess pays.
        """
        start = next((self._found[key] for size in NGRAMS if (key := tuple(self.history[-size:])) in self._found), None)
        if start is None:
            return []
        count = min(self._best(cost, rows), most)
        if count == 0 and self._since >= PROBE_EVERY:
            count = min(1, most)
        guessed: list[int] = []
        for place in range(start, start + count):  # it may go on into itself
            guessed.append(self.history[place] if place < len(self.history) else guessed[place - len(self.history)])
        return guessed

    def note(self, drafted: int, accepted: int) -> None:
        """Learn how many tokens of a guess were right."""
        if drafted:
            self._right = MEMORY * self._right + accepted
            self._tried = MEMORY * self._tried + accepted + (accepted < drafted)
            self._since = 0

    def _best(self, cost: float, rows: int) -> int:
        """How many guessed tokens make the most tokens a second."""
        rate, expected, best, best_speed = self._right / self._tried, float(rows), 0, float(rows)
        for count in range(1, MOST_DRAFTED + 1):
            expected += rate**count
            if (speed := expected / (1 + cost * count)) > best_speed:
                best, best_speed = count, speed
        return best


@dataclass
class TokenCost:
    """What a further token costs in a pass, from how long passes took: a line fitted to tokens and seconds."""

    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)  # weight, Σ n, Σ n², Σ seconds, Σ n · seconds

    def note(self, tokens: int, seconds: float) -> None:
        """A pass over so many tokens took so long."""
        new = (1.0, tokens, tokens * tokens, seconds, tokens * seconds)
        self._sums = [MEMORY * old + value for old, value in zip(self._sums, new, strict=True)]

    def share(self, tokens: int) -> float:
        """The cost of one more token than so many, as a share of what those take."""
        slope = self._slope
        if slope is None:
            return FIRST_COST / max(tokens, 1)
        whole = self.seconds(tokens)
        return slope / whole if whole > 0 else 1.0

    def seconds(self, tokens: float) -> float:
        """How long a pass over so many tokens takes; there was at least one."""
        weight, n, _, t, _ = self._sums
        slope = self._slope or 0.0
        return (t - slope * n) / weight + slope * tokens

    @property
    def _slope(self) -> float | None:
        """Seconds of a further token; None while passes of one length alone were timed."""
        weight, n, nn, t, nt = self._sums
        spread = weight * nn - n * n
        return None if spread <= 1e-6 * max(weight, 1) ** 2 else max((weight * nt - n * t) / spread, 0.0)


class Speculation:
    """Guesses of all requests of an engine.

    Args:
        most_tokens: Tokens of a pass in which each comes to the same whatever is read beside it; 0 allows no guess.
    """

    def __init__(self, most_tokens: int) -> None:
        self._most, self._cost = most_tokens, TokenCost()
        self._drafters: WeakKeyDictionary[ActiveRequest, Drafter] = WeakKeyDictionary()

    def guess(self, requests: Sequence[ActiveRequest]) -> None:
        """Guess how some requests go on that write a token each in the next pass."""
        room = self._most - len(requests)
        for request in requests if room > 0 else ():
            written = request.sampler.written
            drafter = self._drafters.get(request)
            if drafter is None:
                drafter = self._drafters[request] = Drafter(request.ids[: request.prompt_tokens].tolist())
            drafter.add(written[len(drafter.history) - request.prompt_tokens :])
            most = min(room, request.options.max_new_tokens - len(written) - 1)
            request.guessed = drafter.draft(self._cost.share(len(requests)), len(requests), max(most, 0))
            room -= len(request.guessed)

    def note(self, request: ActiveRequest, drafted: int, accepted: int) -> None:
        """Learn how many tokens of a guess were right."""
        self._drafters[request].note(drafted, accepted)

    def note_pass(self, tokens: int, seconds: float) -> None:
        """Learn how long a pass over written tokens took."""
        self._cost.note(tokens, seconds)
