"""`thimble serve`: one base and many adapters behind the HTTP interface of OpenAI."""

import gc
import importlib
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thimble.backends.open import choose_decode, choose_store, open_session
from thimble.config.serve import ServeConfig
from thimble.data.model import Model, base_with_adapters, log_base, model_with_adapters, open_model
from thimble.errors import EXTRAS, ConfigError, MissingPackageError, Problems, as_word, install_line, listing
from thimble.events import Event, EventLog, OnEvent, ShouldStop, ignore, never
from thimble.inference.adapters import BASE_NAME, AdapterRegistry
from thimble.inference.engine import Engine
from thimble.inference.warm_up import warm_up
from thimble.models.cost import cache_token_bytes, int8_cache_token_bytes
from thimble.models.execution import activation_dtype
from thimble.models.machine import available_bytes

if TYPE_CHECKING:
    from thimble.server.service import CacheRoom, Service

MEMORY_SHARE = 3  # of the free memory, one part in so many is for keys and values
KEPT_SHARE, KEPT_BYTES = 8, 1_000_000_000  # one part in so many, at most so much: of those, and of adapters, what stays
RUNS = "runs"  # where `thimble train` puts what it makes
LOCAL = ("127.0.0.1", "localhost", "::1")  # addresses that no other machine can reach


@dataclass
class ServeReport:
    """What a server did.

    Attributes:
        address: Where it listened.
        base: Name of the base.
        adapters: Names of the adapters in the end.
        requests: Requests that came.
        refused: Those of them that were refused, or failed.
        prompt_tokens: Tokens of their prompts.
        completion_tokens: Tokens that were written.
        seconds: How long it listened.
        messages: Decisions, notes and warnings, in order.
    """

    address: str
    base: str
    adapters: list[str] = field(default_factory=list)
    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    messages: dict[str, list[str]] = field(default_factory=dict)


def serve(config: ServeConfig, on_event: OnEvent = ignore, should_stop: ShouldStop = never) -> ServeReport:
    """Serve until `should_stop` says so; an InputError if that cannot be begun."""
    check_packages()
    from thimble.server.gate import Keys
    from thimble.server.routes import make_app
    from thimble.server.run import address_of, listen
    from thimble.server.run import serve as run

    log, problems = EventLog(on_event), Problems(config.problems)
    keys, admin_keys = _keys("THIMBLE_API_KEY", config.api_key), _keys("THIMBLE_ADMIN_KEY", config.admin_key)
    if not (keys or config.host in LOCAL):
        problems.add(f"--host {config.host}: other machines can reach that, so it wants an --api-key")
    free = available_bytes()
    for name, size in (("adapter-memory", config.adapter_memory), ("prefix-cache", config.prefix_cache)):
        if (size or 0) > free:
            problems.add(f"--{name} {size}: expected at most the memory that is free, {free / 1e9:.2f} GB")
    if config.log:
        problems.attempt(_check_log, config.log)
    opened = problems.attempt(listen, config.host, config.port)
    model, adapters = _open(config, problems, log)
    if model:
        problems.attempt(
            model.base.check_own, "thimble serve", "ask it with thimble chat, or a whole file with generate"
        )
    opened, model = problems.required(opened, model)
    service = _make_service(config, model, adapters, log, should_stop)
    report = ServeReport(address_of(opened), service.base_name, messages=log.messages)
    hosts = {*LOCAL, config.host, *config.allowed_host} if config.host in LOCAL else {*config.allowed_host} or None
    began = time.perf_counter()
    with _told(config.log, report, log, on_event) as on_request, _collecting_less():
        app = make_app(service, Keys(keys, admin_keys), hosts, on_request)
        run(app, service, opened, should_stop, partial(_greet, service, report, bool(keys), log), config.drain_seconds)
    report.seconds, report.adapters = time.perf_counter() - began, service.adapters.names
    return report


def check_packages() -> None:
    """Say in one line what to install, if a package is missing that only serving needs."""
    try:
        for name in EXTRAS["serve"].replace("-", "_").split():
            importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(
            f"thimble serve needs packages that are not installed ({error.name}): {install_line('serve')}"
        ) from None


def _check_log(path: str) -> None:
    """Refuse a file to add lines to that cannot be written, before the base is read; a new one is not kept yet."""
    try:
        is_new = not os.path.lexists(path)
        with open(path, "a", encoding="utf-8"):
            pass
        if is_new:
            os.unlink(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"--log {path}: cannot be written ({why}): name another file") from None


def _keys(variable: str, given: str | Sequence[str] | None) -> list[str]:
    """Keys as they were given, else as the environment has them, separated by commas."""
    given = [given] if isinstance(given, str) else given
    return list(given or filter(None, map(str.strip, os.environ.get(variable, "").split(","))))


def _open(config: ServeConfig, problems: Problems, log: EventLog) -> tuple[Model | None, dict[str, str]]:
    """The base, and the adapters by their names; those that are found without being named may be left out."""
    from thimble.server.adapters import find_adapters
    from thimble.server.service import means_base

    named = find_adapters(config.adapter, problems)
    if config.adapter:
        model, _ = model_with_adapters(config.base, list(named.values()), problems, log)
        for name, path in named.items():
            if model and means_base(name, model.base):
                problems.add(
                    f"--adapter {as_word(path)}: {name} is the name of the base: give it one of its own, as in "
                    f"--adapter other={as_word(path)}"
                )
        return model, named
    model = problems.attempt(open_model, config.base)
    found = find_adapters([RUNS], Problems()) if Path(RUNS).is_dir() else {}
    for name, path in list(found.items()) if model else ():
        unfit = Problems()
        base_with_adapters(config.base, [path], unfit, EventLog(ignore))
        if model and (name == BASE_NAME or means_base(name, model.base)):
            unfit.add(f"{path} is called as the base is: name it with --adapter other={as_word(path)}")
        if unfit.found:
            del found[name]
            log.warning(f"not served: {unfit.found[0]}")
    return model, found


def _make_service(
    config: ServeConfig, model: Model, adapters: Mapping[str, str], log: EventLog, should_stop: ShouldStop
) -> "Service":
    from thimble.backends.torch.compute import choose_compute
    from thimble.backends.torch.threads import num_cores
    from thimble.server.engine_thread import EngineThread
    from thimble.server.service import Limits, Service

    log_base(model.base, log, model.tokenizer)
    compute, why = choose_compute(config.compute, config.remeasure)
    log.decision(f"compute: {why}")
    decode = choose_decode(config.decode, model.base)
    store = choose_store(config.store, model.base, compute)[0][0]
    session = open_session(model, compute, store, decode=decode, cache_type=config.cache_type)
    resident = _kept_bytes(config.adapter_memory)
    log.decision(f"adapters: up to {resident / 1e9:.2f} GB stay in memory (--adapter-memory)")
    registry = AdapterRegistry(session, model.base, resident)
    for name, path in adapters.items():
        registry.add(name, path)
    cache = _cache_room(config, model, activation_dtype(compute, store), log)
    log.stage("compiling what answers run through: up to a minute when a version of Thimble first runs on a machine")
    warm_up(session, num_cores(), should_stop)
    registry.read_ahead()
    session.release()  # what compiling and reading took

    def make_engine() -> Engine:
        kept = cache.kept_tokens
        return Engine(session, num_cores(), config.max_running, cache.tokens, keeps_prefixes=True, kept_tokens=kept)

    limits = Limits(
        config.max_body, config.max_new_tokens, config.max_running + config.max_waiting, config.max_seconds, cache
    )  # fmt: skip
    return Service(model, EngineThread(make_engine, limits.requests), registry, limits, config.seed)


def _kept_bytes(given: int | None) -> int:
    """Memory for what stays for later requests, adapters or prefixes, as it was given or as this machine has it."""
    return min(available_bytes() // KEPT_SHARE, KEPT_BYTES) if given is None else given


def _cache_room(config: ServeConfig, model: Model, dtype: str, log: EventLog) -> "CacheRoom":
    """How many tokens the key-value cache may hold and keep, told with the memory that they take."""
    from thimble.server.service import CacheRoom

    spec, is_rounded, kept_bytes = model.base.spec, config.cache_type == "int8", _kept_bytes(config.prefix_cache)
    token_bytes = int8_cache_token_bytes(spec) if is_rounded else cache_token_bytes(spec, dtype)
    most, kept = max(available_bytes() // MEMORY_SHARE, kept_bytes) // token_bytes, kept_bytes // token_bytes
    log.decision(
        f"keys and values: {'int8' if is_rounded else dtype}, {token_bytes / 1e3:.1f} KB a token; up to {most:,} "
        f"tokens ({most * token_bytes / 1e9:.2f} GB, taken as they are needed); {kept:,} of them "
        f"({kept * token_bytes / 1e9:.2f} GB; --prefix-cache) stay for requests that begin alike"
    )
    return CacheRoom(most, kept, token_bytes)


@contextmanager
def _collecting_less() -> Iterator[None]:
    """Within this, Python looks for garbage among new objects alone: to go through all takes as long as some steps."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _told(
    path: str | None, report: ServeReport, log: EventLog, on_event: OnEvent
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What takes each request that is over: it is counted, told as an event, and added to a file if there is one. A
    file that finds no room costs its lines, and no request its answer.
    """
    file, is_lost = open(path, "a", encoding="utf-8") if path else None, False  # noqa: SIM115 - closed below

    def on_request(entry: dict[str, Any]) -> None:
        nonlocal is_lost
        report.requests += 1
        report.refused += entry["status"] >= 400
        report.prompt_tokens += entry.get("prompt_tokens", 0)
        report.completion_tokens += entry.get("completion_tokens", 0)
        on_event(Event("request", _line(entry), entry))
        if file and not is_lost:
            try:
                file.write(json.dumps(entry) + "\n")
                file.flush()
            except OSError as error:
                is_lost = True
                log.warning(
                    f"--log {path}: cannot be written any more ({error.strerror}): requests are not logged there"
                )

    try:
        yield on_request
    finally:
        with suppress(OSError):  # what found no room still finds none
            if file:
                file.close()


def _line(entry: Mapping[str, Any]) -> str:
    """A request in one line for people."""
    words = [time.strftime("%H:%M:%S"), str(entry["status"]), entry["method"], entry["path"], entry.get("model", "")]
    if "completion_tokens" in entry:
        words.append(f"{entry['prompt_tokens']}+{entry['completion_tokens']} tokens")
    words += [f"{entry['seconds']:.2f} s", entry.get("error", "")]
    return " ".join(filter(None, words))


def _greet(service: "Service", report: ServeReport, has_keys: bool, log: EventLog) -> None:
    """Say what is served and where, and how to ask it."""
    names = service.adapters.names
    log.decision(f"base: {service.base_name}; " + (f"adapters: {listing(names)}" if names else "no adapters"))
    log.stage(f"serving at {report.address}/v1 until Ctrl-C; ask it:\n{_curl(service, report.address, has_keys)}")


def _curl(service: "Service", address: str, has_keys: bool) -> str:
    """A line that works as it is printed."""
    model = next(iter(service.adapters.names), service.base_name)
    is_chat = service.model.template is not None
    body = {"messages": [{"role": "user", "content": "Hello"}]} if is_chat else {"prompt": "Hello"}
    path = "chat/completions" if is_chat else "completions"
    key = ' -H "Authorization: Bearer $THIMBLE_API_KEY"' if has_keys else ""
    return f"curl {address}/v1/{path}{key} -d {shlex.quote(json.dumps({'model': model, **body}))}"
