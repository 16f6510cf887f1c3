"""A conversation with a base or an adapter, which can be switched while talking."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from thimble.backends.session import ActiveAdapter, Session
from thimble.data.context import Context, fit
from thimble.data.encode import Encoder
from thimble.data.tokenizer import Tokenizer
from thimble.errors import AdapterError, DataError, listing, plural
from thimble.inference.engine import Engine
from thimble.inference.sampling import SamplingOptions
from thimble.inference.text_stream import TextStream

BASE_NAME = "base"


class Conversation:
    """A model one can talk to; holds the turns so far, so that each answer depends on those before.

    To answer many questions that have nothing to do with one another use `thimble.generate`, or ask each with
    `keep=False`. Any number of conversations share a session.

    Args:
        session: The base in memory.
        tokenizer: Of the base.
        encoder: Turns messages into prompts.
        adapters: By name, from `Session.load`; `base` is always there and means none. The last one is used.
        options: How answers are written; each turn has a seed of its own.
        system: System prompt, or None for the template's own.
        warn: Told when the conversation outgrows the context of the base and loses its oldest turns.
        forms: By name of an adapter, what writes a turn into the prompt that it was trained on.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        encoder: Encoder,
        adapters: Mapping[str, ActiveAdapter],
        options: SamplingOptions,
        system: str | None = None,
        warn: Callable[[str], None] = lambda text: None,
        forms: Mapping[str, Callable[[str], str]] | None = None,
    ) -> None:
        self._engine = Engine(session, max_slots=1, keeps_prefixes=True)
        self._tokenizer, self._encoder, self._options, self._system = tokenizer, encoder, options, system
        self._context, self._warn = Context(session.max_positions, options.max_new_tokens), warn
        self._adapters = {BASE_NAME: session.load(None), **adapters}
        self._forms = forms or {}
        self._turns_taken = 0
        self.active = next(reversed(self._adapters))
        self.messages: list[dict[str, Any]] = []
        self.reset()

    @property
    def names(self) -> list[str]:
        """What `use` takes."""
        return list(self._adapters)

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def use(self, name: str) -> None:
        """Switch to an adapter, or to `base`; the conversation goes on.

        Args:
            name: One of `names`.

        Raises:
            AdapterError: If there is no adapter of that name.
        """
        if name not in self._adapters:
            raise AdapterError(f"there is no adapter {name!r} here: choose from {listing(self.names)}")
        self.active = name

    def ask(self, text: str, keep: bool = True) -> str:
        """Say something, and wait for the whole answer.

        Args:
            text: The user's turn.
            keep: Whether this turn and its answer become part of the conversation. With False the next question is
                asked as if this one had not been, and the same question gets the same answer.

        Returns:
            The answer.

        Raises:
            DataError: If the turn alone is longer than the context of the base.
        """
        return "".join(self.stream(text, keep))

    def stream(self, text: str, keep: bool = True) -> Iterator[str]:
        """Say something and hear the answer piece by piece; what was heard is kept if it is left early.

        Args:
            text: The user's turn.
            keep: As in `ask`.

        Yields:
            str: Pieces of the answer, as they are written.

        Raises:
            DataError: If the turn alone is longer than the context of the base, or no text.
        """
        if not isinstance(text, str):
            kind = type(text).__name__
            raise DataError(f"the turn is of type {kind}: expected text; earlier turns are kept by themselves")
        asked = self._forms[self.active](text) if self.active in self._forms else text
        messages = self._fitted([*self.messages, {"role": "user", "content": asked}])
        options = replace(self._options, seed=self._options.seed + self._turns_taken * keep)
        request = self._engine.add(self._encoder.prompt(messages), options, self._adapters[self.active])
        if keep:
            self.messages, self._turns_taken = messages, self._turns_taken + 1
        heard, pieces = [], TextStream(self._tokenizer)
        try:
            while not self._engine.is_idle:
                for token in self._engine.step():
                    piece = "" if token.id is None else pieces.add(token.id)
                    piece += pieces.end() if token.finish else ""
                    heard.append(piece)
                    if piece:
                        yield piece
        finally:
            self._engine.cancel(request)
            if keep:
                messages.append({"role": "assistant", "content": "".join(heard)})

    def _fitted(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The conversation without its oldest turns if it is longer than the context; they do not come back."""
        fitted = fit(messages, self._context, lambda kept: len(self._encoder.prompt(kept)))
        if fitted.left_out:
            self._warn(
                f"the conversation has outgrown the context of the base ({self._context.tokens:,} tokens): the oldest "
                f"{plural(fitted.left_out, 'message')} can no longer be part of it"
            )
        return [dict(message) for message in fitted.messages]
