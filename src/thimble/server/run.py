"""Listens until it is told to stop, then lets the answers that were begun come to their end."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from thimble.errors import ConfigError
from thimble.server.refusal import Refusal
from thimble.server.service import Service

ASK_SECONDS = 0.1  # between questions whether to stop
HEAD_SECONDS = 30.0  # in which a connection has to send the head of a request
MOST_CONNECTIONS = 1000
LEAVE_SECONDS = 2  # for connections to close once all answers are over
HEAD_BYTES = 32_768


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address, before the base is loaded, so that one that is taken is told at once."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        opened = socket.socket(family, socket.SOCK_STREAM)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: cannot be listened at ({error.strerror or error}): name another port, or "
            "--port 0 for any that is free"
        ) from None
    return opened


def address_of(opened: socket.socket) -> str:
    """Where a socket is reached; one that listens everywhere, by this machine."""
    host, port = opened.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(
    app: ASGIApp,
    service: Service,
    opened: socket.socket,
    should_stop: Callable[[], bool],
    on_ready: Callable[[], None],
    drain_seconds: float,
) -> None:
    """Answer requests until `should_stop` says so, and for so many seconds more those that were begun."""
    asyncio.run(_serve(app, service, opened, should_stop, on_ready, drain_seconds))


async def _serve(
    app: ASGIApp,
    service: Service,
    opened: socket.socket,
    should_stop: Callable[[], bool],
    on_ready: Callable[[], None],
    drain_seconds: float,
) -> None:
    config = uvicorn.Config(
        app, http=_Connection, ws="none", lifespan="off", log_config=None, log_level="critical", access_log=False,
        proxy_headers=False, server_header=False, timeout_graceful_shutdown=LEAVE_SECONDS,
        limit_concurrency=MOST_CONNECTIONS, h11_max_incomplete_event_size=HEAD_BYTES,
    )  # fmt: skip
    server = _Server(config)
    service.engine.start()
    listening = asyncio.create_task(server.serve(sockets=[opened]))
    try:
        while not (server.started or listening.done()):
            await asyncio.sleep(ASK_SECONDS / 10)
        on_ready()
        while not (listening.done() or should_stop()):
            await asyncio.sleep(ASK_SECONDS)
        await _drain(service, drain_seconds)
    finally:
        server.should_exit = True
        await listening
        await asyncio.to_thread(service.engine.stop)


async def _drain(service: Service, seconds: float) -> None:
    """Begin nothing more, and wait for what was begun; what is not over by then is told so."""
    service.is_draining = True
    end = time.monotonic() + seconds
    while service.engine.requests and time.monotonic() < end:
        await asyncio.sleep(ASK_SECONDS)
    service.engine.end_all(Refusal(503, "the server stops, and could not wait for the end of this answer"))


class _Server(uvicorn.Server):
    """A server that leaves signals to the command line."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


class _Connection(H11Protocol):
    """A connection that is closed if no request comes, or one that does not come to the end of its head."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self.loop.call_later(HEAD_SECONDS, self._close_unless_new, self.cycle)

    def on_response_complete(self) -> None:
        """Begin to wait for the next one."""
        cycle = self.cycle
        super().on_response_complete()
        self.loop.call_later(HEAD_SECONDS, self._close_unless_new, cycle)

    def _close_unless_new(self, cycle: object) -> None:
        if self.cycle is cycle and not self.transport.is_closing():
            self.transport.close()
