"""The one thread that runs the engine, and what requests hear of it: the event loop never waits for a forward pass.

Compiled loops may be called from one thread only, so all that touches the engine is an order in a queue, carried out
between two steps. What a step wrote goes to the event loop in one call. A request whose client does not take what it is
given is dropped once its buffer is full, so that a slow client holds up nobody.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from thimble.backends.session import ActiveAdapter
from thimble.errors import InputError
from thimble.inference.engine import Engine, Load
from thimble.inference.request import Token
from thimble.inference.sampling import SamplingOptions
from thimble.server.refusal import Refusal, from_input_error

MOST_BUFFERED = 2048  # tokens of one client that it has not taken yet
STUCK_SECONDS = 300.0  # of one step, after which the engine counts as dead
ENDED = "the engine does not run any more: start the server again"
RETRY_SECONDS = 5  # that a client is asked to wait when all places are taken


class Heard(NamedTuple):
    """What came of one of the answers of a stream."""

    place: int  # of the answer, in the order of `Stream.add`
    token: Token


class EngineThread:
    """Runs an engine in a thread of its own.

    Args:
        make_engine: Makes the engine; called again if a step fails, so that what it left cannot spoil the next.
        most_requests: Answers that may wait or be written at the same time; more are refused.
    """

    def __init__(self, make_engine: Callable[[], Engine], most_requests: int) -> None:
        self._make_engine, self._most_requests = make_engine, most_requests
        self._engine = make_engine()
        self._orders: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._streams: dict[int, tuple[Stream, int]] = {}  # by number of the engine; the thread's own
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._is_stopping = False
        self._is_broken = False  # the thread ends by an error: no engine could be made in place of one that failed
        self._step_began: float | None = None
        self.load: Load = self._engine.load  # as it was a moment ago
        self.requests = 0  # answers under way; the event loop's own, as is the next
        self.open: set[Stream] = set()
        self.error = ""  # of the last step that failed

    def start(self) -> None:
        """Begin, from within the event loop that will be told."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End after the step that is running, and wait for that."""
        self._is_stopping = True
        self._orders.put(lambda: None)
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs, and no step takes as long as none can."""
        began, runs = self._step_began, self._thread.is_alive() and not self._is_broken
        return runs and (began is None or time.monotonic() - began < STUCK_SECONDS)

    def stream(self, answers: int, seconds: float) -> "Stream":
        """Take up a client that wants some answers, in so many seconds at most; a Refusal if there is no place, or if
        nothing would come.
        """
        if not self.is_alive:
            raise Refusal(503, ENDED)
        if self.requests + answers > self._most_requests:
            raise Refusal(
                429, f"all {self._most_requests} places are taken: try again in {RETRY_SECONDS} seconds",
                code="rate_limit_exceeded", headers={"Retry-After": str(RETRY_SECONDS)},
            )  # fmt: skip
        self.requests += answers
        return Stream(self, answers, time.monotonic() + seconds)

    def end_all(self, error: Refusal) -> None:
        """End all answers that are under way."""
        for stream in list(self.open):
            stream.fail(error)

    # ---- in the engine's thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self._is_broken = True
            self.error = _named(error.__context__ or error)  # what failed first, if it could not be mended
            self._post(self.end_all, Refusal(500, f"the engine failed: {self.error}; {ENDED}"))
            raise

    def _work(self) -> None:
        while not self._is_stopping:
            self._carry_out(is_waiting=self._engine.is_idle)
            self.load = self._engine.load
            if self._engine.is_idle or self._is_stopping:
                continue
            self._step_began = time.monotonic()
            try:
                tokens = self._engine.step()
                self.load = self._engine.load  # before anybody hears of the step: who asks then finds it counted
                self._tell([(*self._streams[token.request], token) for token in tokens])
            except Exception as error:  # whatever it is, the next request must find an engine that works
                self._give_up(error)
            self._step_began = None
            self.load = self._engine.load

    def _carry_out(self, is_waiting: bool) -> None:
        """Carry out the orders that have come; wait for one if there is nothing else to do."""
        try:
            while True:
                self._orders.get(block=is_waiting)()
                is_waiting = False
        except Empty:
            return

    def _add(self, stream: "Stream", place: int, prompt: NDArray[np.int32], options: SamplingOptions,
             adapter: ActiveAdapter) -> None:  # fmt: skip
        if stream.is_over:
            return
        try:
            number = self._engine.add(prompt, options, adapter)
        except InputError as error:
            self._post(stream.fail, from_input_error(error, None))
            return
        self._streams[number] = (stream, place)

    def _cancel(self, stream: "Stream", places: Sequence[int]) -> None:
        numbers = [number for number, (other, place) in self._streams.items() if other is stream and place in places]
        for number in numbers:
            self._engine.cancel(number)
            del self._streams[number]

    def _tell(self, told: list[tuple["Stream", int, Token]]) -> None:
        for _, _, token in told:
            if token.finish:
                del self._streams[token.request]
        self._post(_deliver, told)

    def _give_up(self, error: Exception) -> None:
        """Begin anew with another engine, and tell all requests that this one failed."""
        self.error = _named(error)
        streams = dict.fromkeys(stream for stream, _ in self._streams.values())
        self._streams.clear()
        self._engine = self._make_engine()
        self.load = self._engine.load
        refusal = Refusal(500, f"the engine failed, and was started again: {self.error}")
        for stream in streams:
            self._post(stream.fail, refusal)

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _deliver(told: list[tuple["Stream", int, Token]]) -> None:
    for stream, place, token in told:
        stream.put(Heard(place, token))


class Stream:
    """What the engine writes for one client, which may want several answers. Used in the event loop alone.

    Args:
        thread: Of the engine.
        answers: How many `add` will be called for.
        deadline: When the answers end, however far they are, on the clock of `time.monotonic`.
    """

    def __init__(self, thread: EngineThread, answers: int, deadline: float) -> None:
        self._thread, self._answers, self._deadline = thread, answers, deadline
        self._heard: deque[Heard] = deque()
        self._news = asyncio.Event()
        self._error: Refusal | None = None
        self._open: set[int] = set()
        self._count = 0
        self.has_begun = False  # whether a token came
        self.is_over = False  # read by the engine's thread too
        thread.open.add(self)

    def add(self, prompt: NDArray[np.int32], options: SamplingOptions, adapter: ActiveAdapter) -> int:
        """Ask for an answer to a prompt, int32 (T,); gives its place."""
        place, self._count = self._count, self._count + 1
        self._open.add(place)
        self._thread._orders.put(lambda: self._thread._add(self, place, prompt, options, adapter))
        return place

    def put(self, heard: Heard) -> None:
        """Take what the engine wrote."""
        if self.is_over or heard.place not in self._open:
            return
        self.has_begun = True
        if heard.token.finish:
            self._open.discard(heard.place)
        self._heard.append(heard)
        if len(self._heard) > MOST_BUFFERED:
            self.fail(Refusal(408, f"the client left {MOST_BUFFERED:,} tokens unread: the answer is dropped"))
        self._news.set()

    def fail(self, error: Refusal) -> None:
        """End with an error."""
        self.close()
        self._error = error
        self._news.set()

    async def next(self, seconds: float) -> list[Heard]:
        """What was written since the last call, as soon as there is something; empty if there is not for so long. A
        Refusal if the engine failed, or if no token came by the deadline.
        """
        left = self._deadline - time.monotonic()
        if not self._news.is_set() and left > 0:
            try:
                async with asyncio.timeout(min(seconds, left)):  # wait_for of Python 3.11 may swallow a cancellation
                    await self._news.wait()
            except TimeoutError:
                left = self._deadline - time.monotonic()
        if self._error:
            raise self._error
        if left <= 0:
            self._end_in_time()
        self._news.clear()
        heard = list(self._heard)
        self._heard.clear()
        return heard

    def _end_in_time(self) -> None:
        """End what is still written as if it had come to its longest; a Refusal if nothing was."""
        if not self.has_begun:
            raise Refusal(
                429, f"the request waited until its time was over: try again in {RETRY_SECONDS} seconds",
                code="rate_limit_exceeded", headers={"Retry-After": str(RETRY_SECONDS)},
            )  # fmt: skip
        self._heard += [Heard(place, Token(0, None, "length")) for place in sorted(self._open)]
        self.cancel(*self._open)

    def cancel(self, *places: int) -> None:
        """Want no more of some answers; the engine forgets them before its next step."""
        chosen = [place for place in places if place in self._open]
        self._open.difference_update(chosen)
        if chosen:
            self._thread._orders.put(lambda: self._thread._cancel(self, chosen))

    def close(self) -> None:
        """Want nothing more; frees the places."""
        if not self.is_over:
            self.cancel(*self._open)
            self._thread.requests -= self._answers
            self._thread.open.discard(self)
            self.is_over = True
