"""The answers of one request, from the engine's tokens to what may go out; the same for streams and whole replies."""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from thimble.server.answer import Delta
from thimble.server.prepare import Part
from thimble.server.refusal import Refusal
from thimble.server.service import Chosen, Service

PING_SECONDS = 15.0  # after which a stream in which nothing came says that it lives


@dataclass
class Times:
    """When the tokens of an answer came, in seconds."""

    prefill: float  # that its prompt was read
    first: float  # on the clock of `time.monotonic`, as the next
    last: float


class Generation:
    """A request under way. Whoever makes one closes it, whatever happens.

    Args:
        service: That answers it.
        parts: The answers that are wanted.
        chosen: The adapter that they have.
        log: Takes what may be told of the request.

    Raises:
        Refusal: If there is no place for it.
    """

    def __init__(self, service: Service, parts: Sequence[Part], chosen: Chosen, log: dict[str, Any]) -> None:
        self._service, self._metrics, self._parts, self._log = service, service.metrics, parts, log
        self.name, self._log["model"] = chosen.name, chosen.name
        self._began = time.monotonic()
        self._times: dict[int, Times] = {}  # of the tokens of an answer
        self._cached: dict[int, int] = {}  # tokens of the prompt of an answer that an earlier request had read
        self._stream = service.engine.stream(len(parts), service.limits.seconds)
        self._is_closed = False
        service.under_way.add(self)
        for part in parts:
            self._stream.add(part.prompt, part.options, chosen.adapter)

    async def deltas(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        """What comes to the answers, by their places; an empty list if nothing did for a while. A Refusal if the engine
        fails, if nothing came in time, or if a grammar cannot be followed.
        """
        unfinished = set(range(len(self._parts)))
        while unfinished:
            told = []
            for place, token in await self._stream.next(PING_SECONDS):
                if place not in unfinished:
                    continue
                if token.finish == "error":
                    raise Refusal(400, token.error or "the answer cannot be continued")
                if token.usage:
                    self._cached[place] = token.usage.cached_tokens
                self._note_time(place, token.prefill_seconds)
                delta = self._parts[place].answer.take(token)
                if delta.finish:
                    unfinished.discard(place)
                    self._stream.cancel(place)
                told.append((place, delta))
            yield told

    @property
    def usage(self) -> dict[str, Any]:
        """What it took so far; a prompt counts once, however many answers it has."""
        prompts = {id(part.prompt): len(part.prompt) for part in self._parts}
        first = {id(part.prompt): place for place, part in reversed(list(enumerate(self._parts)))}
        prompt, written = sum(prompts.values()), sum(part.answer.tokens for part in self._parts)
        cached = sum(self._cached.get(place, 0) for place in first.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    @property
    def has_begun(self) -> bool:
        """Whether a token came."""
        return self._stream.has_begun

    def close(self) -> None:
        """End it, finished or not, and count it."""
        if self._is_closed:
            return
        self._is_closed = True
        self._service.under_way.discard(self)
        self._stream.close()
        finishes = [part.answer.finish or "abort" for part in self._parts]
        for place, (part, finish) in enumerate(zip(self._parts, finishes, strict=True)):
            self._metrics.note_prompt(len(part.prompt), self._cached.get(place, 0))
            self._metrics.note_answer(part.answer.tokens, finish)
            if times := self._times.get(place):
                self._metrics.note_phases(times.prefill, times.last - times.first)
        self._metrics.note_request(time.monotonic() - self._began)
        usage = self.usage
        self._log |= {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
        self._log["cached_tokens"] = usage["prompt_tokens_details"]["cached_tokens"]
        self._log["finish"] = ",".join(finishes)

    def _note_time(self, place: int, prefill: float | None) -> None:
        now, times = time.monotonic(), self._times.get(place)
        if times:
            self._metrics.note_gap(now - times.last)
            times.last = now
            return
        waited = now - self._began
        prefill = min(prefill or 0.0, waited)
        self._metrics.note_first(waited, prefill)
        if not self._times:
            self._log["first_token_seconds"] = round(waited, 4)
        self._times[place] = Times(prefill, now, now)
