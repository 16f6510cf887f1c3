"""The OpenAPI document, and requests made from it and from damaged bytes: none may hurt the server."""

import asyncio
import json
import random

import pytest

from thimble.server.routes import ROUTES

SEEDS = [
    ("/v1/chat/completions", {
        "model": "tickets", "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": [
            {"type": "text", "text": "y"}]}], "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "n": 2, "stop": ["a"],
        "logprobs": True, "top_logprobs": 1, "stream": False, "seed": 3, "logit_bias": {"5": 1.5},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "tool_choice": "auto"}),
    ("/v1/chat/completions", {
        "messages": [{"role": "user", "content": "y"}], "max_tokens": 2, "stream": True,
        "stream_options": {"include_usage": True}, "response_format": {"type": "json_schema", "json_schema": {
            "name": "n", "schema": {"type": "object", "properties": {"a": {"enum": [1, "b", None]}}}}}}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 1, "echo": True, "lora": [{"id": 0, "scale": 1}]}),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "max_tokens": 1,
                         "structured_outputs": {"regex": "[ab]{2}"}}),
    ("/tokenize", {"prompt": "a b", "return_token_strs": True}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
    ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/nowhere"}),
    ("/v1/unload_lora_adapter", {"lora_name": "x"}),
]  # fmt: skip
PIECES = [b'"', b"{", b"}", b"[", b"]", b"null", b"-1", b"1e309", b"\\u0000", b"\xff", b":", b",", b"0", b'""', b"true"]


def test_the_document_names_every_route_and_every_field(server):
    document = server.http.get("/openapi.json").json()
    told = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert told == {(route.method, route.path.replace(":path", "")) for route in ROUTES}
    chat = document["components"]["schemas"]["ChatBody"]["properties"]
    assert chat.keys() >= {"messages", "model", "stop", "tools", "response_format", "lora"}


def damaged(data: bytes, random_: random.Random) -> bytes:
    """A body with a few bytes changed, taken out, doubled or put in."""
    made = bytearray(data)
    for _ in range(random_.randint(1, 4)):
        place = random_.randrange(len(made) + 1)
        kind = random_.randrange(4)
        if kind == 0 and place < len(made):
            made[place] = random_.randrange(256)
        elif kind == 1:
            del made[place : place + random_.randint(1, 8)]
        elif kind == 2:
            made[place:place] = made[place : place + random_.randint(1, 20)]
        else:
            made[place:place] = random_.choice(PIECES)
    return bytes(made)


async def ask(app, path: str, data: bytes) -> tuple[int, bytes]:
    """Ask an application without a network: status and body."""
    told = {"status": 0, "body": b""}
    given = iter([{"type": "http.request", "body": data, "more_body": False}])

    async def receive():
        return next(given, None) or await asyncio.Future()  # the client stays

    async def send(message):
        told["status"] = message.get("status", told["status"])
        told["body"] += message.get("body", b"")

    headers = [(b"host", b"localhost"), (b"authorization", b"Bearer admin")]
    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "root_path": "", "scheme": "http",
        "query_string": b"", "headers": headers, "http_version": "1.1", "asgi": {"version": "3.0"},
    }  # fmt: skip
    await app(scope, receive, send)
    return told["status"], told["body"]


@pytest.mark.parametrize("number", range(len(SEEDS)))
def test_damaged_bodies_are_answered_or_refused(server, number):
    random_, (path, body) = random.Random(number), SEEDS[number]
    data = json.dumps(body).encode()

    async def ask_all():
        for _ in range(250):
            sent = damaged(data, random_)
            status, told = await ask(server.app, path, sent)
            assert 200 <= status < 500, (sent, told)
            if status >= 400:
                assert json.loads(told)["error"]["message"], sent

    asyncio.run_coroutine_threadsafe(ask_all(), server.loop).result(120)
    assert server.chat(max_tokens=2).usage.completion_tokens <= 2
