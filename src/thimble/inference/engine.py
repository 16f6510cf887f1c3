"""The inference engine: requests in, tokens out, many at a time (continuous batching; Orca, Yu et al., OSDI 2022).

Each step reads parts of prompts that wait and writes one token of every answer that is going on. A row of a forward
pass is a request: its tokens, its blocks of the key-value cache, its position and its adapter. The engine decides what
runs; a session runs it. Knows nothing of text.
"""

import itertools
import time
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from thimble.backends.session import ActiveAdapter, Pass, Session
from thimble.core.metrics import LossSum
from thimble.data.context import check_length
from thimble.data.encode import IGNORED
from thimble.inference.blocks import Blocks
from thimble.inference.fair_queue import READ_COST, WRITTEN_COST, FairQueue
from thimble.inference.pace import Pace
from thimble.inference.prefixes import Prefixes
from thimble.inference.request import ActiveRequest, Token
from thimble.inference.sampling import NothingAllowedError, Sampler, SamplingOptions, log_probs
from thimble.inference.speculation import Speculation

PREFILL_TOKENS = 1024  # read in one pass on a worker
TOLD_TOKENS = 128  # read in one pass where log-probabilities of all are told: their logits take up to 0.5 MB each
MAX_SLOTS = 64  # answers written in parallel: a step costs little more for many rows than for few
ADMITTED_TOGETHER = 8  # prompts read at once while answers wait for them

Part = tuple[ActiveRequest, int]  # a request, and how many further tokens of it are read


class Load(NamedTuple):
    """What an engine has to do.

    Attributes:
        waiting: Requests that have not begun.
        running: Requests that have.
        used_tokens: Room that requests have taken in the cache.
        unused_tokens: Room in it that no request has, and that holds what later ones can use again.
        evicted_tokens: Room that held such, and had to be given up, since the beginning.
    """

    waiting: int
    running: int
    used_tokens: int
    unused_tokens: int
    evicted_tokens: int


class Engine:
    """Runs requests on a session; one thread at a time calls it, any of them.

    Args:
        session: The base.
        num_workers: Prompts read in parallel.
        max_slots: Most requests at work at a time; others wait.
        cache_tokens: Most tokens that the key-value cache holds; a single request is run whatever it needs.
        prefill_tokens: Most tokens of prompts read in a pass on a worker; a longer prompt is read in parts.
        is_interactive: Whether answers go on while prompts are read, so that nobody waits long. Otherwise prompts come
            first, which makes the most tokens a second.
        keeps_prefixes: Whether what one request has read is used again by those that begin alike with an adapter of
            the same content.
        kept_tokens: Most tokens that stay in the cache for that without a request that uses them; None for as many as
            the cache has room for.
    """

    def __init__(
        self,
        session: Session,
        num_workers: int = 1,
        max_slots: int = MAX_SLOTS,
        cache_tokens: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
        is_interactive: bool = True,
        keeps_prefixes: bool = False,
        kept_tokens: int | None = None,
    ) -> None:
        self._session, self._num_workers, self._max_slots = session, num_workers, max_slots
        self._prefill_tokens, self._is_interactive = prefill_tokens, is_interactive
        self._context = session.max_positions
        self._cache = session.new_cache()
        self._blocks = Blocks(*(most and most // self._cache.block_tokens for most in (cache_tokens, kept_tokens)))
        self._prefixes = Prefixes(self._blocks, self._cache, session) if keeps_prefixes else None
        self._pace, self._speculation = Pace(), Speculation(session.independent_tokens)
        self._waiting: FairQueue[ActiveRequest] = FairQueue()
        self._reading: list[ActiveRequest] = []
        self._writing: list[ActiveRequest] = []
        self._count = 0

    def add(
        self,
        prompt: NDArray[np.int32],
        options: SamplingOptions,
        adapter: ActiveAdapter,
        scored: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None,
        customer: Hashable | None = None,
    ) -> int:
        """Take a request.

        Args:
            prompt: int32 (tokens,), at least one, and fewer than the context of the base has.
            options: How the answer is written; it ends with the context at the latest.
            adapter: From `Session.load`.
            scored: ids and labels, int32 (T,) each, of a row that begins with the prompt: its loss is measured in the
                same reading.
            customer: Whose request it is: customers take turns. Without one, those with the same adapter are one.

        Returns:
            The number of the request, by which its tokens are told apart.

        Raises:
            DataError: If the context leaves no room for an answer.
        """
        ids, labels = scored or (prompt, None)
        check_length(len(prompt), self._context)
        room = self._context - len(prompt)
        options = options if options.max_new_tokens <= room else replace(options, max_new_tokens=room)
        customer = id(adapter) if customer is None else customer
        self._count += 1
        request = ActiveRequest(
            self._count, ids, len(prompt), labels, options, adapter, customer, Sampler(options, prompt)
        )  # fmt: skip
        self._waiting.add(customer, request)
        return self._count

    def cancel(self, number: int) -> None:
        """Forget a request: nothing more comes of it, and its room is free for the next step."""
        for request in [*self._waiting, *self._reading, *self._writing]:
            if request.number == number:
                self._waiting.remove(request.customer, request)
                self._leave(request)

    @property
    def is_idle(self) -> bool:
        """Whether no request is left."""
        return not (self._waiting or self._reading or self._writing)

    @property
    def load(self) -> Load:
        """What there is to do."""
        running, size, blocks = len(self._reading) + len(self._writing), self._cache.block_tokens, self._blocks
        rooms = (blocks.used * size, blocks.unused * size, blocks.evictions * size)
        return Load(len(self._waiting), running, *rooms)

    def step(self) -> list[Token]:
        """Read some prompts and write a token of each answer that is going on."""
        self._admit()
        if self._reading and not (self._writing and self._is_interactive):
            return self._prefill()
        if not self._writing:
            return []
        began = time.perf_counter()
        self._writing.sort(key=lambda request: id(request.adapter))  # so that the rows of an adapter lie together
        self._speculation.guess(self._writing)
        written = [(request, 1 + len(request.guessed)) for request in self._writing]
        answers, size = len(written), sum(size for _, size in written)
        parts = self._beside(self._pace.prompt_tokens(answers, size, len(self._reading))) if self._reading else []
        tokens = self._run([[*written, *parts]])
        seconds = time.perf_counter() - began
        self._pace.note(seconds, answers, size, sum(size for _, size in parts))
        if not parts:
            self._speculation.note_pass(size, seconds)
        return tokens

    # ---- room -----------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Let waiting requests begin, as far as there is room."""
        running = [*self._reading, *self._writing]
        free = self._max_slots - len(running)
        if not self._is_interactive and running and free < ADMITTED_TOGETHER:
            return
        taken = sum(map(self._blocks_of, running))
        for _ in range(free if self._waiting else 0):
            if not self._waiting:
                return
            taken += self._blocks_of(self._waiting.first())
            if running and self._blocks.most is not None and taken > self._blocks.most:
                return
            request = self._waiting.take()
            request.begun = time.perf_counter()
            running.append(request)
            self._reading.append(request)
            if self._prefixes and request.labels is None and not request.tells_prompt:
                self._prefixes.begin(request)

    def _blocks_of(self, request: ActiveRequest) -> int:
        """Most blocks that a request comes to."""
        return -(-request.end // self._cache.block_tokens)

    def _reserve(self, passes: Sequence[Sequence[Part]]) -> None:
        """Have blocks for what is read next."""
        for request, size in (part for parts in passes for part in parts):
            while len(request.blocks) * self._cache.block_tokens < request.read + size:
                request.blocks.append(self._blocks.take())
        self._cache.reserve(self._blocks.count)

    def _leave(self, request: ActiveRequest) -> None:
        """Give back what a request holds."""
        for requests in (self._reading, self._writing):
            if request in requests:
                requests.remove(request)
                if self._prefixes and request.chain:
                    self._prefixes.keep_last(request)
                self._blocks.release(request.blocks)
        if self.is_idle:  # so that what many took at once is not held for good
            self._cache.discard(self._blocks.emptied())

    # ---- prompts --------------------------------------------------------------------------------------------------

    def _prefill(self) -> list[Token]:
        """Read a pass of prompts on each worker; those read to their end get their first token."""
        return self._run(list(self._passes()))

    def _passes(self) -> Iterator[list[Part]]:
        """Requests to read now, one group a worker, and how much of each: whole prompts, or part of one."""
        left, most = deque(self._ready()), self._most_read
        for _ in range(self._num_workers):
            if not left:
                return
            parts = [(left[0], min(left.popleft().unread, most))]
            if not parts[0][0].read and parts[0][1] == parts[0][0].unread:
                tokens = parts[0][1]
                while left and not left[0].read and tokens + left[0].unread <= most:
                    tokens += left[0].unread
                    parts.append((left[0], left.popleft().unread))
            yield parts

    @property
    def _most_read(self) -> int:
        """Most tokens of prompts that a pass reads now."""
        is_told = any(request.tells_prompt for request in self._reading)
        return min(self._prefill_tokens, TOLD_TOKENS) if is_told else self._prefill_tokens

    def _ready(self) -> list[ActiveRequest]:
        """Requests whose prompts are read now; of those that begin alike, the first one alone."""
        return self._prefixes.leaders(self._reading) if self._prefixes else self._reading

    def _beside(self, most: int) -> list[Part]:
        """Parts of prompts to read beside answers: even shares, so that a short prompt does not wait for a long one."""
        left, parts = min(most, self._most_read), []
        ready = sorted(self._ready(), key=lambda request: request.unread)
        for place, request in enumerate(ready):
            if size := min(request.unread, -(-left // (len(ready) - place))):
                parts.append((request, size))
                left -= size
        return parts

    # ---- passes ---------------------------------------------------------------------------------------------------

    def _run(self, passes: Sequence[Sequence[Part]]) -> list[Token]:
        """Read so many further tokens of requests, and choose the next one of those that are read to their end."""
        self._reserve(passes)
        batches = [self._batch(parts) for parts in passes]
        results = self._session.forward(batches, self._cache, self._num_workers)
        return [
            token
            for parts, (logits, loss) in zip(passes, results, strict=True)
            for token in self._after(parts, logits, loss)
        ]

    def _batch(self, parts: Sequence[Part]) -> Pass:
        """What a pass reads, and after which of its tokens logits are wanted."""
        ids, labels, start = [], [], 0
        ends: list[int] = []
        is_scored = any(request.labels is not None for request, _ in parts)
        for request, size in parts:
            place = slice(request.read, request.read + size)
            is_prompt = request.unread > 0
            ids.append(request.ids[place] if is_prompt else request.tokens(place.start, place.stop))
            ids.append(np.array(request.guessed, np.int32))
            if is_scored:
                labels.append(np.full(size, IGNORED, np.int32) if request.labels is None else request.labels[place])
            ends += [start + place for place in request.wanted_places(size)]
            start += size
        rows = [request.row(size) for request, size in parts]
        return Pass(np.concatenate(ids), rows, ends, np.concatenate(labels) if is_scored else None)

    def _after(self, parts: Sequence[Part], logits: NDArray[np.float32], loss: LossSum) -> list[Token]:
        """Take note of what was read."""
        tokens, rows = [], iter(logits)
        scored = next((request for request, _ in parts if request.labels is not None), None)
        if scored:
            scored.loss += loss
        for request, size in parts:
            self._waiting.charge(request.customer, size * (WRITTEN_COST if request.sampler.written else READ_COST))
            if request.guessed:
                tokens += self._after_guess(request, rows)
                continue
            has_next = request.next_place(size) is not None
            if request.tells_prompt:
                request.note_prompt(itertools.islice(rows, size - has_next))
            request.read += size
            if self._prefixes and request.chain:
                self._prefixes.note(request)
            if has_next:
                told = request.prompt_log_probs if request.tells_prompt else None
                request.next = self._chosen(request, next(rows))._replace(prompt=told)
            if request.unread <= 0:
                tokens += self._told(request, request is scored)
        return tokens

    def _after_guess(self, request: ActiveRequest, rows: Iterator[NDArray[np.float32]]) -> list[Token]:
        """Choose the next tokens of a request for as long as they are those that were guessed, and one more."""
        guessed, request.guessed = request.guessed, []
        logits, tokens = [next(rows) for _ in range(1 + len(guessed))], []
        for right, row in zip([*guessed, None], logits, strict=True):
            request.read += 1
            if self._prefixes and request.chain:
                self._prefixes.note(request)
            request.next = self._chosen(request, row)
            tokens += self._told(request, is_scored=False)
            if request.next.finish or request.next.id != right:
                break
        self._speculation.note(request, len(guessed), len(tokens) - 1)
        return tokens

    def _told(self, request: ActiveRequest, is_scored: bool) -> list[Token]:
        """The next token of a request that is read to its end, and first the loss of those scored with it."""
        tokens = [Token(request.number, loss=request.loss)] if is_scored else []
        request.forget_scored()
        if request.next.finish:
            self._leave(request)
        elif request in self._reading:
            self._reading.remove(request)
            self._writing.append(request)
        return [*tokens, request.next]

    def _chosen(self, request: ActiveRequest, logits: NDArray[np.float32]) -> Token:
        """Choose the next token of an answer, or end it."""
        number, options, written = request.number, request.options, request.sampler.written
        try:
            token = request.sampler.choose(logits)
        except NothingAllowedError:
            return Token(number, finish="stop", usage=request.usage)
        except Exception as error:  # a mask is the caller's own program: what it raises ends this answer alone
            return Token(number, finish="error", usage=request.usage, error=f"{type(error).__name__}: {error}")
        seconds = time.perf_counter() - request.begun if len(written) == 1 else None
        logprobs = None if options.logprobs is None else log_probs(logits, token, options.logprobs)
        if token in options.stop_ids:
            end = Token(number, None, "stop", logprobs=logprobs, stopped_by=token)
            return end._replace(usage=request.usage, prefill_seconds=seconds)
        finish = None if len(written) < options.max_new_tokens else "length"
        usage = request.usage if finish or len(written) == 1 else None
        return Token(number, token, finish, logprobs=logprobs, usage=usage, prefill_seconds=seconds)
