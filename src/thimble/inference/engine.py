"""The inference engine: requests in, tokens out, many at a time (continuous batching; Orca, Yu et al., OSDI 2022).

Each step reads parts of prompts that wait and writes one token of every answer that is going on. A row of a forward
pass is a request: its tokens, its slot and position in the key-value cache, and its adapter. The engine decides what
runs; a session runs it. Knows nothing of text.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from thimble.backends.session import ActiveAdapter, ForwardRow, Prompt, Session
from thimble.core.metrics import LossSum
from thimble.data.context import check_length
from thimble.inference.sampling import Sampler, SamplingOptions

PREFILL_TOKENS = 1024  # read in one pass on a worker
MAX_SLOTS = 64  # answers written in parallel: a step costs little more for many rows than for few
ADMITTED_TOGETHER = 8  # prompts read at once while answers wait for them
GROWTH_TOKENS = 256  # by which slots grow, where answers may end long before their longest


class Token(NamedTuple):
    """What a step gave a request.

    Attributes:
        request: Its number.
        id: The token, or None.
        finish: None while the answer goes on; `stop` or `length` with its end, as in the OpenAI API.
        loss: Summed over the scored prompts of a pass, told with the first of them once they have been read.
    """

    request: int
    id: int | None = None
    finish: str | None = None
    loss: LossSum | None = None


@dataclass(eq=False)
class _Request:
    """A request on its way.

    Attributes:
        number: Given by `add`.
        ids: int32 (T,): the prompt, and what is only scored behind it.
        prompt_tokens: Tokens of the prompt.
        labels: int32 (T,), or None if nothing is scored.
        options: How its answer is written.
        adapter: That it has.
        sampler: Of its own.
        slot: In the cache; -1 while it waits.
        read: Tokens of `ids` that were read.
        written: Tokens of its answer.
        last: The last of them.
        loss: Of what was read so far; the first of a group has that of all.
    """

    number: int
    ids: NDArray[np.int32]
    prompt_tokens: int
    labels: NDArray[np.int32] | None
    options: SamplingOptions
    adapter: ActiveAdapter
    sampler: Sampler
    slot: int = -1
    read: int = 0
    written: int = 0
    last: int = 0
    loss: LossSum = field(default_factory=LossSum)

    @property
    def end(self) -> int:
        """Most tokens that it will have in its slot."""
        return max(len(self.ids), self.prompt_tokens + self.options.max_new_tokens)

    @property
    def position(self) -> int:
        """Of the next token that is written."""
        return self.prompt_tokens + self.written - 1

    def row(self, tokens: int, position: int) -> ForwardRow:
        """Its row in a forward pass."""
        return ForwardRow(tokens, self.slot, position, self.end, self.adapter)


class Engine:
    """Runs requests on a session.

    Args:
        session: The base.
        num_workers: Prompts read in parallel.
        max_slots: Most answers written in parallel.
        cache_tokens: Most tokens that all slots hold; a single request is run whatever it needs.
        prefill_tokens: Most tokens of prompts read in a pass on a worker; a longer prompt is read in parts.
        is_interactive: Whether answers go on while prompts are read, so that nobody waits long. Otherwise prompts come
            first, which makes the most tokens a second.
        is_growing: Whether slots grow as answers do, as is right where answers may end long before their longest; for a
            moment a cache that grows takes up to twice its memory. Default: if it is interactive.
    """

    def __init__(
        self,
        session: Session,
        num_workers: int = 1,
        max_slots: int = MAX_SLOTS,
        cache_tokens: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
        is_interactive: bool = True,
        is_growing: bool | None = None,
    ) -> None:
        self._session, self._num_workers, self._max_slots = session, num_workers, max_slots
        self._cache_tokens, self._prefill_tokens, self._is_interactive = cache_tokens, prefill_tokens, is_interactive
        self._is_growing = is_interactive if is_growing is None else is_growing
        self._context = session.max_positions
        self._cache = session.new_cache()
        self._waiting: deque[_Request] = deque()
        self._reading: list[_Request] = []
        self._writing: list[_Request] = []
        self._count = 0

    def add(
        self,
        prompt: NDArray[np.int32],
        options: SamplingOptions,
        adapter: ActiveAdapter,
        scored: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None,
    ) -> int:
        """Take a request.

        Args:
            prompt: int32 (tokens,), at least one, and fewer than the context of the base has.
            options: How the answer is written; it ends with the context at the latest.
            adapter: From `Session.load`.
            scored: ids and labels, int32 (T,) each, of a row that begins with the prompt: its loss is measured in the
                same reading.

        Returns:
            The number of the request, by which its tokens are told apart.

        Raises:
            DataError: If the context leaves no room for an answer.
        """
        ids, labels = scored or (prompt, None)
        check_length(len(prompt), self._context)
        room = self._context - len(prompt)
        options = options if options.max_new_tokens <= room else replace(options, max_new_tokens=room)
        self._count += 1
        self._waiting.append(
            _Request(self._count, ids, len(prompt), labels, options, adapter, Sampler(options))
        )  # fmt: skip
        return self._count

    def cancel(self, number: int) -> None:
        """Forget a request; nothing more comes of it."""
        self._waiting = deque(request for request in self._waiting if request.number != number)
        self._reading = [request for request in self._reading if request.number != number]
        self._writing = [request for request in self._writing if request.number != number]

    @property
    def is_idle(self) -> bool:
        """Whether no request is left."""
        return not (self._waiting or self._reading or self._writing)

    def step(self) -> list[Token]:
        """Read some prompts and write a token of each answer that is going on."""
        self._admit()
        tokens = self._decode() if self._is_interactive or not self._reading else []
        return tokens + self._prefill() if self._reading else tokens

    # ---- slots ----------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give waiting requests slots, as far as there is room."""
        running = [*self._reading, *self._writing]
        free = self._max_slots - len(running)
        if not self._is_interactive and running and free < ADMITTED_TOGETHER:
            return
        most = max((request.end for request in running), default=0)
        while self._waiting and free:
            most = max(most, self._waiting[0].end)
            if running and self._cache_tokens is not None and (len(running) + 1) * most > self._cache_tokens:
                return
            request = self._waiting.popleft()
            taken = {other.slot for other in running}
            request.slot = next(slot for slot in itertools.count() if slot not in taken)
            running.append(request)
            self._reading.append(request)
            free -= 1

    def _reserve(self, requests: Sequence[_Request], tokens: int) -> None:
        """Have room in the cache for all slots, and in those of some requests for so many tokens more."""
        slots = 1 + max(request.slot for request in (*self._reading, *self._writing))
        ends = [request.end for request in requests]
        if self._is_growing:  # at least what is needed now, growing in few steps
            needed = [max(request.read, request.position + 1) + tokens for request in requests]
            ends = [min(end, -(-size // GROWTH_TOKENS) * GROWTH_TOKENS) for end, size in zip(ends, needed, strict=True)]
        self._cache.reserve(slots, max(ends))

    def _compact(self) -> None:
        """Move answers that are going on to slots 0, 1, 2 ..., in which the session decodes them."""
        taken = {request.slot: request for request in (*self._reading, *self._writing)}
        count = len(self._writing)
        strays = [request for request in self._writing if request.slot >= count]
        for place in range(count):
            other = taken.get(place)
            if other in self._writing:
                continue
            if other is not None:  # a prompt that is being read: out of the way
                self._move(other, next(slot for slot in itertools.count(count) if slot not in taken), taken)
            self._move(strays.pop(), place, taken)
        self._writing.sort(key=lambda request: request.slot)

    def _move(self, request: _Request, slot: int, taken: dict[int, _Request]) -> None:
        self._cache.reserve(slot + 1, 0)
        self._cache.move(request.slot, slot)
        del taken[request.slot]
        request.slot, taken[slot] = slot, request

    # ---- prompts --------------------------------------------------------------------------------------------------

    def _prefill(self) -> list[Token]:
        """Read a pass of prompts on each worker; those read to their end get their first token."""
        passes = list(self._passes())
        chosen = [request for group, _ in passes for request in group]
        self._reserve(chosen, self._prefill_tokens)
        prompts = [self._prompt(group, tokens) for group, tokens in passes]
        results = self._session.prefill(prompts, self._cache, self._num_workers)
        tokens: list[Token] = []
        for (group, size), (logits, loss) in zip(passes, results, strict=True):
            tokens += self._after_reading(group, size, logits, loss)
        return tokens

    def _passes(self) -> Iterator[tuple[list[_Request], int]]:
        """Groups of requests to read now, one a worker, and the most tokens of each: whole prompts, or part of one."""
        left = deque(self._reading)
        for _ in range(self._num_workers):
            if not left:
                return
            group, size = [left.popleft()], self._prefill_tokens
            if group[0].read == 0 and len(group[0].ids) <= size:
                tokens = len(group[0].ids)
                while left and left[0].read == 0 and tokens + len(left[0].ids) <= size:
                    tokens += len(left[0].ids)
                    group.append(left.popleft())
            yield group, size

    def _prompt(self, group: Sequence[_Request], size: int) -> Prompt:
        """What is read of a group: whole prompts, or the next part of one."""
        parts = [slice(request.read, request.read + size) for request in group]
        ids = [request.ids[part] for request, part in zip(group, parts, strict=True)]
        rows = [request.row(len(part), request.read) for request, part in zip(group, ids, strict=True)]
        starts = np.cumsum([0, *map(len, ids)])
        ends = [
            int(start) + request.prompt_tokens - 1 - request.read
            for request, part, start in zip(group, ids, starts, strict=False)
            if request.read < request.prompt_tokens <= request.read + len(part)
        ]
        labels = None
        if any(request.labels is not None for request in group):
            labels = np.concatenate([
                np.full(len(part), -100, np.int32) if request.labels is None else request.labels[place]
                for request, part, place in zip(group, ids, parts, strict=True)
            ])  # fmt: skip
        return Prompt(np.concatenate(ids), rows, ends, labels)

    def _after_reading(
        self, group: Sequence[_Request], size: int, logits: NDArray[np.float32], loss: LossSum
    ) -> list[Token]:
        """Take note of what was read."""
        tokens, rows = [], iter(logits)
        scored = next((request for request in group if request.labels is not None), group[0])
        scored.loss += loss
        for request in group:
            before, request.read = request.read, min(request.read + size, len(request.ids))
            if before < request.prompt_tokens <= request.read:
                request.last = request.sampler.choose(next(rows))
            if request.read < len(request.ids):
                continue
            self._reading.remove(request)
            if request is scored and request.labels is not None:
                tokens.append(Token(request.number, loss=request.loss))
            self._writing.append(request)
            tokens.append(self._written(request, request.last))
        return tokens

    # ---- answers --------------------------------------------------------------------------------------------------

    def _decode(self) -> list[Token]:
        """Write the next token of each answer."""
        if not self._writing:
            return []
        self._compact()
        self._reserve(self._writing, 1)
        requests = list(self._writing)
        rows = [request.row(1, request.position) for request in requests]
        logits = self._session.decode([request.last for request in requests], rows, self._cache)
        chosen = [request.sampler.choose(row) for request, row in zip(requests, logits, strict=True)]
        return [self._written(request, token) for request, token in zip(requests, chosen, strict=True)]

    def _written(self, request: _Request, token: int) -> Token:
        """Take note of a token; an answer that ends with it leaves its slot."""
        if token in request.options.stop_ids:
            self._writing.remove(request)
            return Token(request.number, None, "stop")
        request.last, request.written = token, request.written + 1
        if request.written < request.options.max_new_tokens:
            return Token(request.number, token)
        self._writing.remove(request)
        return Token(request.number, token, "length")
