"""A conversation with a base or an adapter, which can be switched while talking."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from thimble.backends.session import ActiveAdapter, Session
from thimble.data.encode import Encoder
from thimble.data.tokenizer import Tokenizer
from thimble.errors import AdapterError, listing
from thimble.inference.engine import Engine
from thimble.inference.sampling import SamplingOptions
from thimble.inference.text_stream import TextStream

BASE_NAME = "base"


class Conversation:
    """A model one can talk to; holds the turns so far. Any number of them share a session.

    Args:
        session: The base in memory.
        tokenizer: Of the base.
        encoder: Turns messages into prompts.
        adapters: By name, from `Session.load`; `base` is always there and means none. The last one is used.
        options: How answers are written; each turn has a seed of its own.
        system: System prompt, or None for the template's own.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        encoder: Encoder,
        adapters: Mapping[str, ActiveAdapter],
        options: SamplingOptions,
        system: str | None = None,
    ) -> None:
        self._engine = Engine(session, max_slots=1)
        self._tokenizer, self._encoder, self._options, self._system = tokenizer, encoder, options, system
        self._adapters = {BASE_NAME: session.load(None), **adapters}
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

    def ask(self, text: str) -> str:
        """Say something, and wait for the whole answer."""
        return "".join(self.stream(text))

    def stream(self, text: str) -> Iterator[str]:
        """Say something and hear the answer piece by piece; what was heard is kept if it is left early.

        Args:
            text: The user's turn.

        Yields:
            str: Pieces of the answer, as they are written.
        """
        self.messages.append({"role": "user", "content": text})
        options = replace(self._options, seed=self._options.seed + self._turns_taken)
        self._turns_taken += 1
        request = self._engine.add(self._encoder.prompt(self.messages), options, self._adapters[self.active])
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
            self.messages.append({"role": "assistant", "content": "".join(heard)})
