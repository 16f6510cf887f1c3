"""How much of waiting prompts a step reads beside answers, so that those who read an answer see no pause."""

MOST_STRETCH = 2.5  # of a step that only writes, by the prompts it reads as well
LEAST_TOKENS = 16  # of prompts in a step, however slow they are
FIRST_TOKENS = 64  # before anything was measured
WEIGHT = 0.2  # of the latest measurement in a running mean


class Pace:
    """Measures steps, and says how many tokens of prompts the next one may read."""

    def __init__(self) -> None:
        self._writing_seconds = 0.0  # of a step that only writes
        self._token_seconds = 0.0  # that a token of a prompt adds to it

    @property
    def prompt_tokens(self) -> int:
        """Tokens of prompts that may be read beside answers; a multiple of `LEAST_TOKENS`."""
        if not (self._writing_seconds and self._token_seconds):
            return FIRST_TOKENS
        tokens = int((MOST_STRETCH - 1) * self._writing_seconds / self._token_seconds)
        return max(LEAST_TOKENS, tokens // LEAST_TOKENS * LEAST_TOKENS)

    def note(self, seconds: float, prompt_tokens: int) -> None:
        """Take note of a step with answers that took so long and read so many tokens of prompts as well."""
        if not prompt_tokens:
            self._writing_seconds = _mean(self._writing_seconds, seconds)
        elif self._writing_seconds:
            added = max(seconds - self._writing_seconds, 0.05 * seconds) / prompt_tokens
            self._token_seconds = _mean(self._token_seconds, added)


def _mean(before: float, seconds: float) -> float:
    return before + WEIGHT * (seconds - before) if before else seconds
