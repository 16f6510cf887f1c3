"""The one table of routes, the application made of it, and the OpenAPI document made of it."""

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Collection
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route as Path
from starlette.types import ASGIApp, Receive, Scope, Send

from thimble.errors import InputError
from thimble.server import catalogue
from thimble.server.bodies import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    LoadAdapterBody,
    TokenizeBody,
    UnloadAdapterBody,
)
from thimble.server.chat import answer_chat
from thimble.server.completions import answer_completion
from thimble.server.gate import Gate, Keys, OnRequest
from thimble.server.refusal import Refusal, from_input_error, from_validation
from thimble.server.replies import Events, Query, Reply, Text
from thimble.server.sending import ClientGoneError, read_json, send_events, send_json, send_refusal, send_text
from thimble.server.service import Service

RETRY_SECONDS = 10  # until a server that stops may be there again

Handler = Callable[[Service, Query[Any]], Awaitable[Reply]]


class Route(NamedTuple):
    """One route."""

    method: Literal["GET", "POST"]
    path: str
    handler: Handler
    summary: str
    body: type[Body] | None = None
    access: Literal["public", "client", "admin"] = "client"
    is_answering: bool = False  # whether it begins work that a server which stops does not begin
    gives: str = "application/json"


async def _routes(service: Service, query: Query[None]) -> Reply:
    """What there is."""
    return {
        "server": "thimble", "model": service.base_name,
        "routes": {f"{route.method} {route.path}": route.summary for route in ROUTES},
    }  # fmt: skip


async def _openapi(service: Service, query: Query[None]) -> Reply:
    from thimble.server.openapi import document

    return document(ROUTES)


ROUTES = (
    Route("POST", "/v1/chat/completions", answer_chat, "The next message of a conversation.", ChatBody,
          is_answering=True),
    Route("POST", "/v1/completions", answer_completion, "The continuation of texts or tokens.", CompletionBody,
          is_answering=True),
    Route("GET", "/v1/models", catalogue.list_models, "The base and all adapters."),
    Route("GET", "/v1/models/{model:path}", catalogue.show_model, "One of them."),
    Route("POST", "/v1/load_lora_adapter", catalogue.load_adapter, "Serve an adapter from now on.", LoadAdapterBody,
          "admin"),
    Route("POST", "/v1/unload_lora_adapter", catalogue.unload_adapter, "Serve an adapter no longer.",
          UnloadAdapterBody, "admin"),
    Route("POST", "/tokenize", catalogue.tokenize, "A text or a conversation as tokens.", TokenizeBody),
    Route("POST", "/detokenize", catalogue.detokenize, "Tokens as text.", DetokenizeBody),
    Route("GET", "/health", catalogue.health, "Whether the engine runs.", access="public"),
    Route("GET", "/ready", catalogue.ready, "Whether requests are taken.", access="public"),
    Route("GET", "/metrics", catalogue.metrics, "Figures for Prometheus, under the names of vLLM.",
          gives="text/plain"),
    Route("GET", "/openapi.json", _openapi, "This table as an OpenAPI document."),
    Route("GET", "/", _routes, "What there is."),
)  # fmt: skip


def make_app(service: Service, keys: Keys, hosts: Collection[str] | None, on_request: OnRequest) -> ASGIApp:
    """The application: the table behind the gate, with whose arguments it is made."""
    paths = [Path(route.path, _Endpoint(service, keys, route), methods=[route.method]) for route in ROUTES]
    app = Starlette(routes=paths, exception_handlers={HTTPException: _no_route})
    app.router.redirect_slashes = False
    public = [route.path for route in ROUTES if route.access == "public"]
    return Gate(app, keys, public, hosts, on_request)


async def _no_route(request: Request, error: Exception) -> JSONResponse:
    """A path or a method that there is not."""
    status, headers = (error.status_code, error.headers) if isinstance(error, HTTPException) else (500, None)
    known = list(dict.fromkeys(route.path for route in ROUTES))
    what = f"there is no {request.url.path[:100]}: there are {', '.join(known)}"
    path = f"/{request.url.path.strip('/')}"
    meant = [other for other in known if other in (path, f"/v1{path}") or (other != "/" and path.endswith(other))]
    if meant:
        base = f"{request.url.scheme}://{request.url.netloc[:100]}/v1"
        what = f"there is no {request.url.path[:100]}: this is {meant[0]} here; the base URL of a client is {base}"
    if status == 405:
        what = f"{request.url.path[:100]} takes no {request.method[:20]}"
    refusal = Refusal(status, what, headers=headers)
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


class _Endpoint:
    """One route as an application: it reads the body, has it answered, and stops that when the client leaves."""

    def __init__(self, service: Service, keys: Keys, route: Route) -> None:
        self._service, self._keys, self._route = service, keys, route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        log = scope["state"]["log"]
        try:
            query = await self._query(scope, receive, log)
            await self._answer_unless_gone(query, receive, send)
        except Refusal as refusal:
            log["error"] = refusal.message
            await send_refusal(refusal, send)
        except ClientGoneError:
            return

    async def _query(self, scope: Scope, receive: Receive, log: dict[str, Any]) -> Query[Any]:
        headers = Headers(scope=scope)
        if self._route.access == "admin":
            self._keys.check_admin(headers)
        if self._route.is_answering and self._service.is_draining:
            raise Refusal(
                503, "the server stops, and begins no further answers",
                headers={"Retry-After": str(RETRY_SECONDS), "Connection": "close"},
            )  # fmt: skip
        body = None
        if self._route.body:
            value = await read_json(headers, receive, self._service.limits.body_bytes)
            try:
                body = self._route.body.model_validate(value)
            except ValidationError as error:
                raise from_validation(error, value) from None
        return Query(body, scope["path_params"], log)

    async def _answer_unless_gone(self, query: Query[Any], receive: Receive, send: Send) -> None:
        answering = asyncio.create_task(self._answer(query, send))
        leaving = asyncio.create_task(_wait_until_gone(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            is_gone = not answering.done()
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)
        if is_gone:
            query.log["is_gone"] = True
            raise ClientGoneError
        answering.result()

    async def _answer(self, query: Query[Any], send: Send) -> None:
        try:
            reply = await self._route.handler(self._service, query)
        except InputError as error:
            raise from_input_error(error, None) from None
        except (Refusal, ClientGoneError, asyncio.CancelledError):
            raise
        except Exception as error:
            query.log["traceback"] = traceback.format_exc()
            raise Refusal(500, f"a fault of the server: {type(error).__name__}: {error}") from error
        if isinstance(reply, Events):
            await send_events(reply, send, query.log)
        elif isinstance(reply, Text):
            await send_text(reply, send)
        else:
            await send_json(reply, send)


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
