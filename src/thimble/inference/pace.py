"""How much of waiting prompts a step reads beside answers, so that those who read an answer see no pause."""

from thimble.inference.speculation import TokenCost

MOST_STRETCH = 2.0  # of a step that only writes, by the prompts it reads as well; the worst of many are at three
LEAST_TOKENS, MOST_TOKENS = 4, 256  # of prompts in a step, however slow or fast they are
FIRST_TOKENS = 24  # before anything was measured
MOST_GROWTH = 2  # of a mean length: the line is not known far beyond what it was fitted to
WEIGHT = 0.2  # of the latest measurement in a running mean
LEAST_SPREAD = 4.0  # of lengths, as a standard deviation in tokens, that tell what a token costs


class Pace:
    """Measures steps, and says how many tokens of prompts the next one may read.

    Reading adds `first + token · n` seconds to a step: read in float32, the weights are decoded once, whatever is read.
    Where that alone stretches a step further than it may be, a step reads until two thirds of what it adds are for
    tokens: shorter ones would make more pauses, and hardly shorter ones.
    """

    def __init__(self) -> None:
        self._writing = TokenCost()  # of steps that only write
        self._per_answer = 0.0  # tokens that such a step reads for each answer: its last, and those that are guessed
        self._means: tuple[float, ...] = ()  # of n, of what was added, of n², of n times what was added
        self._token_seconds = 0.0  # that a token of a prompt adds

    def prompt_tokens(self, answers: int, written: int, waiting: int) -> int:
        """How much of prompts may be read beside answers.

        Where more wait for their first token than read an answer, a second of a pause costs fewer people than a second
        of reading serves, so prompts get as much more of the time.

        Args:
            answers: That the step goes on with.
            written: Tokens that it reads of them, guessed ones among them.
            waiting: Requests that wait for the end of their prompts.

        Returns:
            Tokens, a multiple of `LEAST_TOKENS`.
        """
        times = max(1.0, waiting / answers)
        if not (self._per_answer and self._means):
            return min(int(times * FIRST_TOKENS), MOST_TOKENS)
        tokens, added = self._means[:2]
        first = max(0.0, added - self._token_seconds * tokens)
        allowed = (1 + times * (MOST_STRETCH - 1)) * self._writing.seconds(answers * self._per_answer)
        left = allowed - self._writing.seconds(written) - first
        for_tokens = left if left > 0 else 2 * first
        wanted = int(min(for_tokens / self._token_seconds, MOST_GROWTH * max(tokens, LEAST_TOKENS)))
        return min(max(LEAST_TOKENS, wanted // LEAST_TOKENS * LEAST_TOKENS), MOST_TOKENS)

    def note(self, seconds: float, answers: int, written: int, prompt_tokens: int) -> None:
        """Take note of a step with answers that took so long and read so many tokens of prompts as well."""
        if not prompt_tokens:
            self._writing.note(written, seconds)
            before, now = self._per_answer, written / answers
            self._per_answer = before + WEIGHT * (now - before) if before else now
        elif self._per_answer:
            self._note_added(max(seconds - self._writing.seconds(written), 0.05 * seconds), prompt_tokens)

    def _note_added(self, added: float, tokens: int) -> None:
        """Fit the line, by least squares that forget; passes of one length alone keep its slope, or go through 0."""
        latest = (tokens, added, tokens**2, tokens * added)
        before = self._means or latest
        self._means = tuple(old + WEIGHT * (new - old) for old, new in zip(before, latest, strict=True))
        mean, seconds, squares, products = self._means
        spread = squares - mean**2
        through_zero = seconds / mean
        if spread >= LEAST_SPREAD**2:
            slope = (products - mean * seconds) / spread
            self._token_seconds = min(max(slope, 0.05 * through_zero), through_zero)
        else:
            self._token_seconds = min(self._token_seconds or through_zero, through_zero)
