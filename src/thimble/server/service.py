"""What a server holds: one base, its adapters, the engine, and its limits."""

import asyncio
import functools
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, ParamSpec, Protocol, TypeVar

from thimble.backends.session import ActiveAdapter
from thimble.data.encode import Encoder
from thimble.data.model import Model
from thimble.errors import listing
from thimble.inference.adapters import AdapterRegistry
from thimble.models.base import Base
from thimble.server.bodies import LoraScale
from thimble.server.engine_thread import EngineThread
from thimble.server.grammar import Grammars
from thimble.server.metrics import Metrics, Now
from thimble.server.refusal import Refusal, bad_field
from thimble.server.tool_calls import CallForm, call_form

P = ParamSpec("P")
T = TypeVar("T")
PREPARED_TOGETHER = 2  # requests: a hostile grammar takes up one of them, not every core


def served_name(base: Base) -> str:
    """What requests call a base: its name, of a file without its suffix."""
    return base.name.removesuffix(".gguf")


def means_base(name: str, base: Base) -> bool:
    """Whether requests by a name mean the base, with the suffix of its file or without."""
    return name.removesuffix(".gguf") == served_name(base)


class CacheRoom(NamedTuple):
    """How large the key-value cache may become.

    Attributes:
        tokens: That it holds at most; None for no limit.
        kept_tokens: Most of them that stay for later requests without one that uses them; None for no limit.
        token_bytes: What the keys and values of one take.
    """

    tokens: int | None = None
    kept_tokens: int | None = None
    token_bytes: int = 0


@dataclass(frozen=True)
class Limits:
    """What clients may take.

    Attributes:
        body_bytes: Of a request.
        answer_tokens: Longest answer; None for what the context leaves.
        requests: Answers that wait or are written at a time.
        seconds: From a request to the end of its answer.
        cache: Room of the key-value cache.
    """

    body_bytes: int = 4_000_000
    answer_tokens: int | None = None
    requests: int = 320
    seconds: float = 600.0
    cache: CacheRoom = CacheRoom()


class UnderWay(Protocol):
    """A request that is answered."""

    name: str  # of its adapter, or of the base

    @property
    def has_begun(self) -> bool:
        """Whether it has got past waiting."""


class Chosen(NamedTuple):
    """What answers a request."""

    name: str  # as the reply tells it
    adapter: ActiveAdapter
    fingerprint: str  # of base and adapter: another one may give other answers to the same request


class Service:
    """One base with its adapters and the engine that runs them.

    Args:
        model: The base with tokenizer and template.
        engine: The thread of its engine.
        adapters: By name.
        limits: Of clients.
        seed: Of the seeds that requests get which name none.
    """

    def __init__(
        self, model: Model, engine: EngineThread, adapters: AdapterRegistry, limits: Limits, seed: int
    ) -> None:
        self.model, self.engine, self.adapters, self.limits = model, engine, adapters, limits
        self.tokenizer, spec = model.tokenizer, model.base.spec
        self.base_name = served_name(model.base)
        self.context, self.vocab_size = spec.max_positions, spec.vocab_size
        self.encoder = Encoder(self.tokenizer, model.template, self.context, vocab_size=self.vocab_size)
        self.grammars = Grammars(self.tokenizer, self.vocab_size)
        self.metrics = Metrics(self.base_name, self._now)
        self.started = int(time.time())
        self.is_draining = False
        self.under_way: set[UnderWay] = set()  # requests
        self._seeds = random.Random(seed)
        self._workers = ThreadPoolExecutor(PREPARED_TOGETHER, "prepare")

    async def prepare(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do the work of a request that may take long, off the event loop."""
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._workers, call)

    def next_seed(self) -> int:
        """A seed for a request that names none."""
        return self._seeds.getrandbits(63)

    @functools.cached_property
    def longest_token(self) -> int:
        """Of all tokens, in bytes, which is at least as many characters."""
        return max(len(self.tokenizer.piece_bytes(index)) for index in range(self.tokenizer.last_id + 1))

    @functools.cached_property
    def call_form(self) -> CallForm | None:
        """How the base writes calls of tools; None if they cannot be read back."""
        return (
            call_form(self.model.template, [text for text in self.tokenizer.special_tokens if text])
            if self.model.template
            else None
        )

    # ---- models -----------------------------------------------------------------------------------------------------

    def is_base(self, name: str | None) -> bool:
        """Whether a name means the base."""
        return not name or means_base(name, self.model.base)

    def own_name(self, name: str) -> str:
        """The name of an adapter, which may stand behind that of the base: `base:adapter`."""
        return name.removeprefix(f"{self.base_name}:") if name not in self.adapters.names else name

    def check_name(self, name: str | None) -> None:
        """Refuse a name that is neither the base's nor an adapter's."""
        if not self.is_base(name) and self.own_name(name or "") not in self.adapters.names:
            known = listing([self.base_name, *self.adapters.names], 20)
            raise Refusal(404, f"there is no model {(name or '')[:128]!r}: choose from {known}", "model",
                          "model_not_found")  # fmt: skip

    async def choose(self, name: str | None, lora: Sequence[LoraScale] | None) -> Chosen:
        """The adapter that a request names, by its model or in a list of weights; a Refusal if there is none."""
        self.check_name(name)
        weights: list[tuple[str, float]] = []
        if lora is not None:
            if not self.is_base(name):
                raise bad_field("lora", "not with an adapter as the model: name the base")
            weights = [(self._adapter_name(item, place), item.scale) for place, item in enumerate(lora)]
            names = [name for name, _ in weights]
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise bad_field("lora", f"{twice} is there twice: give it one scale")
            weights = [(name, scale) for name, scale in weights if scale]
        elif not self.is_base(name):
            weights = [(self.own_name(name or ""), 1.0)]
        adapter = await self.prepare(self.adapters.get, dict(weights))
        told = weights[0][0] if len(weights) == 1 else self.base_name
        content = f"_{adapter.identity[:12]}" if weights else ""
        return Chosen(told, adapter, f"fp_{self._fingerprint[:12]}{content}")

    def _adapter_name(self, item: LoraScale, place: int) -> str:
        names, param = self.adapters.names, f"lora.{place}.id"
        if isinstance(item.id, int):
            if item.id >= len(names):
                raise bad_field(param, f"got {item.id}: there are {len(names)} adapters, counted from 0")
            return names[item.id]
        if self.own_name(item.id) not in names:
            raise Refusal(404, f"{param}: there is no adapter {item.id[:128]!r}", param, "model_not_found")
        return self.own_name(item.id)

    @functools.cached_property
    def _fingerprint(self) -> str:
        return self.model.base.quick_fingerprint()

    def _now(self) -> Now:
        load, cache = self.engine.load, self.limits.cache
        most, size = cache.tokens or max(load.used_tokens, 1), cache.token_bytes
        adapters = [(request.name, request.has_begun) for request in self.under_way if request.name != self.base_name]
        running, waiting = (
            tuple(sorted({name for name, has_begun in adapters if has_begun == is_so})) for is_so in (True, False)
        )
        known = self.adapters
        return Now(
            load.running, load.waiting, load.used_tokens / most, running, waiting, self.limits.requests,
            len(known.names), known.resident_bytes, known.most_bytes, known.loads, known.evictions,
            (load.used_tokens + load.unused_tokens) * size, load.unused_tokens * size, (cache.kept_tokens or 0) * size,
            load.evicted_tokens,
        )  # fmt: skip
