"""Who may come in: hosts, origins and keys are checked before anything else is looked at; what came is logged.

A page in a browser can send requests to a server on the same machine, and, once its name leads there (DNS rebinding),
read the answers: so a server for this machine alone wants to be called by the names of this machine. A page that may
come may also read what it is answered, for which its browser wants headers (CORS, as the Fetch standard has it).
"""

import hmac
import re
import secrets
import time
from collections.abc import Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from thimble.server.refusal import Refusal
from thimble.server.replies import Text
from thimble.server.sending import send_refusal, send_text

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
GONE = 499  # what the log says of a client that left, as nginx does
ASKED_AGAIN_SECONDS = 600  # after which a browser asks again whether a page may come
_WHOLE_ADDRESS = re.compile(r"https?://(?P<host>[^/?#]*)(?P<path>(/.*)?)", re.IGNORECASE | re.DOTALL)
_REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)

OnRequest = Callable[[dict[str, Any]], None]


class Keys:
    """The keys of clients, and those of who may change what is served."""

    def __init__(self, clients: Collection[str], admins: Collection[str]) -> None:
        self._clients, self._admins = list(clients), list(admins)

    def check_client(self, headers: Headers) -> None:
        """Refuse a client without a key, if there are any."""
        if self._clients and not self._is_one_of(headers, [*self._clients, *self._admins]):
            raise self._wrong("the key of the server", headers)

    def check_admin(self, headers: Headers) -> None:
        """Refuse who may not change what is served."""
        if not self._admins:
            raise Refusal(403, "this route is off: it is there once the server is started with --admin-key")
        if not self._is_one_of(headers, self._admins):
            raise self._wrong("the admin key of the server", headers)

    def _is_one_of(self, headers: Headers, keys: Collection[str]) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # All are compared, each in a time that does not depend on how much of it is right.
        found = [hmac.compare_digest(given.strip().encode("latin-1"), key.encode()) for key in keys]
        return scheme.lower() == "bearer" and any(found)

    def _wrong(self, what: str, headers: Headers) -> Refusal:
        is_given = "authorization" in headers
        said = "is not the one that was given" if is_given else "is missing"
        message = f"{what} {said}: send the header Authorization: Bearer KEY"
        return Refusal(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


class Gate:
    """Lets requests in to an application, and tells of each how it went.

    Args:
        app: Behind it.
        keys: Of clients.
        public: Paths that want no key.
        hosts: Names that the server may be called by; None for any.
        on_request: Told of each request that is over.
    """

    def __init__(
        self, app: ASGIApp, keys: Keys, public: Collection[str], hosts: Collection[str] | None, on_request: OnRequest
    ) -> None:
        self._app, self._keys, self._public, self._on_request = app, keys, frozenset(public), on_request
        self._hosts = None if hosts is None else frozenset(map(str.lower, hosts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            return
        headers, began = Headers(scope=_as_asked_here(scope)), time.monotonic()
        given = headers.get("x-request-id", "")
        name = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(8)}"
        log: dict[str, Any] = {
            "time": time.time(), "request": name, "method": scope["method"], "path": scope["path"], "status": GONE,
        }  # fmt: skip
        scope.setdefault("state", {})["log"] = log

        added = [(b"x-request-id", name.encode())]

        async def send_named(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                log["status"] = message["status"]
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        try:
            self._check_names(headers)
            added += _for_pages(headers)
            await self._let_in(scope, headers, receive, send_named)
        except Refusal as refusal:
            await send_refusal(refusal, send_named)
        finally:
            log["seconds"] = round(time.monotonic() - began, 4)
            self._on_request(log)

    async def _let_in(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        if scope["method"] == "OPTIONS" and {"origin", "access-control-request-method"} <= set(headers):
            await send_text(Text(b"", "text/plain"), send)  # the headers of `_for_pages` are the answer
            return
        if scope["path"] not in self._public:
            self._keys.check_client(headers)
        await self._app(scope, receive, send)

    def _check_names(self, headers: Headers) -> None:
        """Refuse a request that was sent to another name, or from a page of another site."""
        host = _host_of(f"//{headers.get('host', '')}")
        # No browser leaves the name out; probes in HTTP/1.0 do.
        if self._hosts is not None and "host" in headers and host not in self._hosts:
            raise Refusal(403, f"this server is not called {host or 'that'}: name it with --allowed-host", "Host")
        origin = headers.get("origin")
        if origin is not None and _host_of(origin) not in (self._hosts or {host}):
            raise Refusal(
                403, f"pages of {origin[:100]} may not use this server: name it with --allowed-host", "Origin"
            )


def _as_asked_here(scope: Scope) -> Scope:
    """A request for a whole address, as clients send it by a proxy: its name is that of `Host`, as RFC 9112 has it."""
    if "://" in scope["path"] and (found := _WHOLE_ADDRESS.fullmatch(scope["path"])):
        others = [(name, value) for name, value in scope["headers"] if name != b"host"]
        scope["headers"] = [*others, (b"host", found["host"].encode())]
        scope["path"] = found["path"] or "/"
        scope["raw_path"] = scope["path"].encode()
    return scope


def _for_pages(headers: Headers) -> list[tuple[bytes, bytes]]:
    """What a browser wants to hear before it hands an answer to a page that may come; nothing for other clients."""
    if (origin := headers.get("origin")) is None:
        return []
    told = {
        "access-control-allow-origin": origin,
        "access-control-expose-headers": "x-request-id, retry-after",
        "vary": "Origin",
    }
    if "access-control-request-method" in headers:
        told |= {
            "access-control-allow-methods": "GET, POST",
            "access-control-allow-headers": headers.get("access-control-request-headers", ""),
            "access-control-max-age": str(ASKED_AGAIN_SECONDS),
        }
    return [(name.encode(), value.encode("latin-1")) for name, value in told.items()]


def _host_of(address: str) -> str:
    """The name or number in an address, without its port; empty if there is none."""
    try:
        return (urlsplit(address).hostname or "").lower().rstrip(".")
    except ValueError:
        return ""
