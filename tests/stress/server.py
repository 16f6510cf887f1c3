"""Requests that nobody would send: damaged bytes, and whatever the server's own OpenAPI document allows and forbids.

Each has to be answered or refused, never with a fault of the server, and within some time.
"""

import asyncio
import json
import random
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import served
from stress import Line

MOST_SECONDS = 5.0  # for one request of few tokens
PIECES = [b'"', b"{", b"}", b"[", b"]", b"null", b"-1", b"1e309", b"\\u0000", b"\xff", b":", b",", b"0", b'""', b"true"]
BODIES = [
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
    ("/v1/completions", {"prompt": [[1, 2], [3]], "max_tokens": 1, "structured_outputs": {"regex": "[ab]{2}"}}),
    ("/tokenize", {"prompt": "a b", "return_token_strs": True}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
    ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/nowhere"}),
    ("/v1/unload_lora_adapter", {"lora_name": "x"}),
]  # fmt: skip


@contextmanager
def _server() -> Iterator[served.Running]:
    model = served.tiny_model()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # numbers that are none: a fault of the engine
        adapters = served.save_adapters(model, Path(folder))
        limits = served.Limits(answer_tokens=64, requests=1000)
        with served.started(model, served.tiny_session(model), adapters, limits=limits) as running:
            running.chat(max_tokens=2)  # compiles what it takes
            yield running


def fuzz_bodies(count: int) -> Line:
    """Bodies with a few bytes changed, taken out, doubled or put in, straight to the application."""
    began, wrong, slowest = time.perf_counter(), 0, 0.0
    with _server() as running:

        async def ask_all() -> None:
            nonlocal wrong, slowest
            for number in range(count):
                path, body = BODIES[number % len(BODIES)]
                sent, start = damaged(json.dumps(body).encode(), random.Random(number)), time.perf_counter()
                status, told = await running.ask(path, sent)
                seconds = time.perf_counter() - start
                slowest = max(slowest, seconds)
                if not is_fair(status, told) or seconds > MOST_SECONDS:
                    wrong += 1
                    print(f"{path} {sent!r}: {status} {told[:300]!r} in {seconds:.1f} s")

        asyncio.run_coroutine_threadsafe(ask_all(), running.loop).result()
        wrong += not running.chat(max_tokens=2).choices
    note = f"bodies with damaged bytes, answered or refused; the slowest took {slowest:.1f} s"
    return Line("server bodies", count, wrong, time.perf_counter() - began, note)


def is_fair(status: int, told: bytes) -> bool:
    """Whether a request was answered, or refused in OpenAI's form."""
    if 200 <= status < 300:
        return True
    return 400 <= status < 500 and bool(json.loads(told)["error"]["message"])


def damaged(data: bytes, dice: random.Random) -> bytes:
    """Bytes of which a few were changed."""
    made = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        place = dice.randrange(len(made) + 1)
        kind = dice.randrange(4)
        if kind == 0 and place < len(made):
            made[place] = dice.randrange(256)
        elif kind == 1:
            del made[place : place + dice.randint(1, 8)]
        elif kind == 2:
            made[place:place] = made[place : place + dice.randint(1, 20)]
        else:
            made[place:place] = dice.choice(PIECES)
    return bytes(made)


def made_requests(count: int) -> Line:
    """Requests that schemathesis makes from the OpenAPI document, those that it forbids among them."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    began, wrong, tried = time.perf_counter(), 0, 0
    with _server() as running:
        document = running.http.get("/openapi.json").json()
        schema = schemathesis.openapi.from_dict(document)
        operations = [found.ok() for found in schema.get_all_operations()]
        kinds = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
        cases = [operation.as_strategy(generation_mode=kind) for operation in operations for kind in kinds]

        @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate], derandomize=True,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(st.one_of(cases))
        def ask(case: schemathesis.Case) -> None:
            nonlocal wrong, tried
            tried += 1
            start = time.perf_counter()
            answer = case.call(base_url=running.address, headers={"Authorization": "Bearer admin"}, timeout=60)
            if not is_fair(answer.status_code, answer.content) or time.perf_counter() - start > MOST_SECONDS:
                wrong += 1
                print(f"{case.method} {case.path} {case.body!r}: {answer.status_code} {answer.text[:300]}")

        ask()
    return Line("server requests", tried, wrong, time.perf_counter() - began, "made from the OpenAPI document")
