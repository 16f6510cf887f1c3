"""Bodies in and replies out, on the wire: JSON within limits, whole replies, and events while a client reads them."""

import asyncio
import codecs
import json
from typing import Any

import pydantic_core
from starlette.datastructures import Headers
from starlette.types import Receive, Send

from thimble.server.refusal import Refusal
from thimble.server.replies import Events, Text

MOST_NESTED = 64  # levels of a body
BODY_SECONDS = 30.0  # in which a body has to be here
SWALLOWED = 16  # times the limit that is still read of a body that is too long, so that its client hears of it
UNREAD_SECONDS = 30.0  # after which a client that takes nothing is left
DONE = b"data: [DONE]\n\n"
PING = b": still at work\n\n"
_EVENT_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


async def read_json(headers: Headers, receive: Receive, most_bytes: int) -> Any:
    """The body of a request as plain data; a Refusal if it is packed, too long, too slow, too deep, or no JSON."""
    packed = headers.get("content-encoding", "")
    if packed.lower() not in ("", "identity"):
        raise Refusal(415, f"the body is packed ({packed[:40]}): send it as plain JSON", "Content-Encoding")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            data = await _read(headers, receive, most_bytes)
    except TimeoutError:
        raise Refusal(408, f"the body was not here after {BODY_SECONDS:g} seconds") from None
    try:
        value = pydantic_core.from_json(data.removeprefix(codecs.BOM_UTF8), allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    if _is_deeper(value, MOST_NESTED):
        raise Refusal(400, f"the body is nested more than {MOST_NESTED} levels deep")
    if not isinstance(value, dict):
        raise Refusal(400, "the body: expected a JSON object")
    return value


async def _read(headers: Headers, receive: Receive, most: int) -> bytes:
    said = headers.get("content-length", "")
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        size += len(message.get("body", b""))
        if size <= most:
            parts.append(message.get("body", b""))
        if not message.get("more_body") or size > SWALLOWED * most:
            break
    if size > most:
        raise Refusal(413, f"the body has {said or f'over {most}'} bytes: expected {most:,} at most")
    return b"".join(parts)


class ClientGoneError(Exception):
    """The client left."""


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether plain data are nested more than so many levels deep."""
    layer = [value]
    for _ in range(levels):
        layer = [
            inner
            for outer in layer
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not layer:
            return False
    return True


async def send_refusal(refusal: Refusal, send: Send) -> None:
    """Send an error."""
    await send_text(Text(_json(refusal.body), "application/json", refusal.status), send, refusal.headers)


async def send_json(value: dict[str, Any], send: Send) -> None:
    """Send plain data."""
    await send_text(Text(_json(value), "application/json"), send)


async def send_text(text: Text, send: Send, headers: dict[str, str] | None = None) -> None:
    """Send a whole reply."""
    sent = {"content-type": text.media_type, "content-length": str(len(text.content)), **(headers or {})}
    await send({"type": "http.response.start", "status": text.status, "headers": _raw(sent)})
    await send({"type": "http.response.body", "body": text.content})


async def send_events(reply: Events, send: Send, log: dict[str, Any]) -> None:
    """Send events as they come, and `[DONE]`; an error that comes up is one of them. A client that does not read is
    left after a while.
    """
    try:
        await send({
            "type": "http.response.start", "status": 200,
            "headers": _raw({"content-type": "text/event-stream; charset=utf-8", **_EVENT_HEADERS}),
        })  # fmt: skip
        try:
            async for event in reply.events:
                await _send_part(PING if event is None else b"data: " + _json(event) + b"\n\n", send)
        except Refusal as refusal:
            log["error"] = refusal.message
            await _send_part(b"data: " + _json(refusal.body) + b"\n\n", send)
        await _send_part(DONE, send)
        await send({"type": "http.response.body", "body": b""})
    finally:
        reply.close()


async def _send_part(data: bytes, send: Send) -> None:
    try:
        async with asyncio.timeout(UNREAD_SECONDS):
            await send({"type": "http.response.body", "body": data, "more_body": True})
    except TimeoutError:
        raise ClientGoneError from None


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _raw(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]
