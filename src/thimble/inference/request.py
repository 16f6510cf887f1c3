"""A request on its way through the engine: what is known of it, and what it is told."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from thimble.backends.session import ActiveAdapter, ForwardRow
from thimble.core.metrics import LossSum
from thimble.inference.sampling import LogProbs, Sampler, SamplingOptions, log_probs


class Usage(NamedTuple):
    """What a request took, in tokens.

    Attributes:
        prompt_tokens: Of its prompt.
        cached_tokens: Those of them that did not have to be read, since an earlier request had been.
        completion_tokens: Of its answer.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class Token(NamedTuple):
    """What a step gave a request.

    Attributes:
        request: Its number.
        id: The token, or None.
        finish: None while the answer goes on; with its end `stop` or `length`, as in the OpenAI API, or `error`.
        loss: Summed over the scored prompts of a pass, told with the first of them once they have been read.
        logprobs: What the model thought of the place, where that is asked for.
        usage: What the request took so far, told with the first token and with the end.
        error: Why it ended in an error: what its mask raised.
        prefill_seconds: From when it began to its first token, told with that.
        prompt: What the model thought of each token of the prompt behind the first, where that is asked for; told with
            the first token.
        stopped_by: The token that ended it, which is not part of it.
    """

    request: int
    id: int | None = None
    finish: str | None = None
    loss: LossSum | None = None
    logprobs: LogProbs | None = None
    usage: Usage | None = None
    error: str | None = None
    prefill_seconds: float | None = None
    prompt: Sequence[LogProbs] | None = None
    stopped_by: int | None = None


@dataclass(eq=False)
class ActiveRequest:
    """A request from `add` to its end.

    Attributes:
        number: Given by `add`.
        ids: int32 (T,): the prompt, and what is only scored behind it.
        prompt_tokens: Tokens of the prompt.
        labels: int32 (T,), or None if nothing is scored.
        options: How its answer is written.
        adapter: That it has.
        customer: Whose it is.
        sampler: Of its own; it holds the answer so far.
        chain: Keys of its blocks that are full, behind the one they all begin with; None if its blocks are its own.
        blocks: Of the cache.
        read: Tokens of prompt and answer that are in them.
        cached_tokens: Those of them that an earlier request had read.
        loss: Of what was read so far; the first of a group has that of all.
        next: The latest token that was chosen.
        guessed: Tokens that may follow it, read with it in the next pass.
        prompt_log_probs: Of the tokens of the prompt behind the first that were read so far, if they are to be told.
        begun: When it got a place, on the clock of `time.perf_counter`.
    """

    number: int
    ids: NDArray[np.int32]
    prompt_tokens: int
    labels: NDArray[np.int32] | None
    options: SamplingOptions
    adapter: ActiveAdapter
    customer: Hashable
    sampler: Sampler
    chain: list[bytes] | None = None
    blocks: list[int] = field(default_factory=list)
    read: int = 0
    cached_tokens: int = 0
    loss: LossSum = field(default_factory=LossSum)
    next: Token = Token(0)
    guessed: list[int] = field(default_factory=list)
    prompt_log_probs: list[LogProbs] = field(default_factory=list)
    begun: float = 0.0

    @property
    def end(self) -> int:
        """Most tokens that its blocks will have to hold."""
        return max(len(self.ids), self.prompt_tokens + self.options.max_new_tokens)

    @property
    def unread(self) -> int:
        """Tokens that are still to be read before it writes."""
        return len(self.ids) - self.read

    @property
    def tells_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are still to be told."""
        return self.options.prompt_logprobs is not None and not self.sampler.written

    @property
    def usage(self) -> Usage:
        """What it took so far."""
        written = self.sampler.written
        stops = bool(written) and written[-1] in self.options.stop_ids
        return Usage(self.prompt_tokens, self.cached_tokens, len(written) - stops)

    def next_place(self, size: int) -> int | None:
        """After which of its next `size` tokens the next one of its answer is chosen; None if after none of them."""
        if self.labels is not None and self.sampler.written:
            return None  # it was chosen, and only what is scored behind the prompt is still to be read
        place = self.prompt_tokens + len(self.sampler.written) - 1 - self.read
        return place if place < size else None

    def wanted_places(self, size: int) -> range:
        """After which of its next `size` tokens, and of those guessed behind them, logits are wanted."""
        place = self.next_place(size)
        if self.tells_prompt:
            return range(size)
        return range(0) if place is None else range(place, place + 1 + len(self.guessed))

    def note_prompt(self, rows: Iterable[NDArray[np.float32]]) -> None:
        """Take note of the logits after the next tokens of the prompt, float32 (vocabulary,) each."""
        count = self.options.prompt_logprobs or 0
        told = zip(rows, self.ids[self.read + 1 : self.prompt_tokens].tolist(), strict=False)
        self.prompt_log_probs += [log_probs(logits, token, count) for logits, token in told]

    def forget_scored(self) -> None:
        """Go on behind the prompt, once what is scored has been read."""
        if self.labels is not None:
            self.ids, self.labels, self.read = self.ids[: self.prompt_tokens], None, self.prompt_tokens

    def row(self, tokens: int) -> ForwardRow:
        """Its row in a forward pass that reads so many further tokens."""
        return ForwardRow(tokens, tuple(self.blocks), self.read, self.end, self.adapter, self.unread <= 0)

    def tokens(self, start: int, stop: int) -> NDArray[np.int32]:
        """Tokens of prompt and answer by their places."""
        prompt = self.ids[: self.prompt_tokens][start:stop]
        behind = self.sampler.written[max(start - self.prompt_tokens, 0) : max(stop - self.prompt_tokens, 0)]
        return np.concatenate([prompt, np.array(behind, np.int32)])
