"""What clients made for other servers send, and what they make of the answers."""

import gzip
import inspect
import json
import socket

import openai
import pydantic
import pytest

from thimble.server.bodies import Message
from thimble.server.prepare import _message
from thimble.server.service import Limits

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather", "strict": True,
        "parameters": {
            "type": "object", "properties": {"city": {"type": "string", "maxLength": 4}}, "required": ["city"],
            "additionalProperties": False,
        },
    },
}  # fmt: skip
# Every parameter of the official client with a value that it may have: what is done, and what is refused.
DONE = {
    "frequency_penalty": 0.5, "logit_bias": {"5": 1}, "logprobs": True, "max_completion_tokens": 2, "max_tokens": 2,
    "metadata": {"chat": "1"}, "modalities": ["text"], "n": 2, "parallel_tool_calls": True, "presence_penalty": 0.5,
    "prompt_cache_key": "k", "response_format": {"type": "text"}, "safety_identifier": "s", "seed": 1,
    "service_tier": "auto", "stop": ["a", "b"], "store": False, "stream": False, "temperature": 1,
    "tool_choice": "none", "tools": [TOOL], "top_logprobs": 0, "top_p": 0.5, "user": "u",
}  # fmt: skip
REFUSED = {
    "audio": {"voice": "x", "format": "wav"}, "function_call": "auto", "functions": [{"name": "f"}],
    "moderation": {"model": "m"}, "prediction": {"type": "content", "content": "x"},
    "prompt_cache_options": {"mode": "implicit"}, "prompt_cache_retention": "24h", "reasoning_effort": "low",
    "stream_options": {"include_usage": True}, "verbosity": "low", "web_search_options": {},
}  # fmt: skip
OF_COMPLETIONS = {"echo": True, "best_of": 1, "logprobs": 1, "suffix": ""}
ITS_OWN = {"messages", "model", "prompt", "extra_headers", "extra_query", "extra_body", "timeout", "self"}


def parameters(method):
    return set(inspect.signature(method).parameters) - ITS_OWN


def test_every_parameter_of_the_official_client_is_known_to_these_tests(server):
    assert parameters(server.client.chat.completions.create) == DONE.keys() | REFUSED.keys()
    assert parameters(server.client.completions.create) <= DONE.keys() | OF_COMPLETIONS.keys() | {"stream_options"}


@pytest.mark.parametrize("name", DONE)
def test_a_parameter_of_the_official_client_is_taken(server, name):
    answer = server.client.chat.completions.create(model="smollm2", messages=HI, **{"max_tokens": 2, name: DONE[name]})
    assert answer.choices[0].finish_reason in ("length", "stop")


@pytest.mark.parametrize("name", REFUSED)
def test_a_parameter_that_cannot_be_honoured_is_refused_by_its_name(server, name):
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.chat.completions.create(model="smollm2", messages=HI, max_tokens=2, **{name: REFUSED[name]})
    assert caught.value.param == name


@pytest.mark.parametrize("name", sorted(parameters(openai.resources.Completions.create) - {"stream_options", "stream"}))
def test_a_parameter_of_completions_is_taken(server, name):
    options = {"max_tokens": 2, name: {**DONE, **OF_COMPLETIONS}[name]}
    assert server.client.completions.create(model="smollm2", prompt="x", **options).choices


def test_a_stream_may_be_asked_to_have_no_padding(server):
    options = {"include_usage": True, "include_obfuscation": False}
    *_, last = server.chat(stream=True, stream_options=options)
    assert last.usage.completion_tokens == 12
    with pytest.raises(openai.BadRequestError) as caught:
        server.chat(stream=True, stream_options={"include_obfuscation": True})
    assert caught.value.param == "stream_options.include_obfuscation"


# ---- what the official client does beside plain calls ----------------------------------------------------------------


class Point(pydantic.BaseModel):
    x: int = pydantic.Field(ge=0, le=9)


def test_an_answer_is_parsed_into_a_class(server):
    answer = server.client.chat.completions.parse(
        model="smollm2", messages=HI, response_format=Point, max_tokens=60, temperature=0
    )
    assert 0 <= answer.choices[0].message.parsed.x <= 9
    again = server.client.chat.completions.create(
        model="smollm2", messages=[*HI, answer.choices[0].message, *HI], max_tokens=2
    )
    assert again.usage.prompt_tokens > answer.usage.prompt_tokens


def test_what_the_streaming_helper_gathered_can_be_sent_back(server):
    options = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 300, "parallel_tool_calls": False}
    with server.client.chat.completions.stream(model="smollm2", messages=HI, temperature=0, **options) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.done" in kinds
    (call,) = message.tool_calls
    told = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    for sent in (message, message.model_dump(), {"role": "assistant", "tool_calls": [call.model_dump()]}):
        server.client.chat.completions.create(
            model="smollm2", messages=[*HI, sent, told], tools=[TOOL], max_tokens=2
        )  # fmt: skip


@pytest.mark.parametrize(
    ("what", "ask"),
    [
        ("/v1/embeddings", lambda client: client.embeddings.create(model="smollm2", input="x")),
        ("/v1/responses", lambda client: client.responses.create(model="smollm2", input="x")),
        ("/v1/moderations", lambda client: client.moderations.create(input="x")),
    ],
)
def test_a_service_that_is_not_there_is_told_with_those_that_are(server, what, ask):
    with pytest.raises(openai.NotFoundError) as caught:
        ask(server.client)
    assert f"there is no {what}" in str(caught.value)
    assert CHAT in str(caught.value)


def test_marks_of_what_is_to_be_cached_change_nothing(server):
    """LiteLLM, Cline and others put them on parts and tools for every server."""
    mark = {"cache_control": {"type": "ephemeral"}}
    plain = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "tools": [TOOL]}
    marked = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", **mark}]}],
              "tools": [{**TOOL, **mark}]}  # fmt: skip
    told = [server.post("/tokenize", body).json()["tokens"] for body in (plain, marked)]
    assert told[0] == told[1]


def test_thoughts_are_taken_by_the_name_that_vllm_gives_them_too():
    told = [_message(Message(role="assistant", content="x", **{name: "hm"}), "messages.0")
            for name in ("reasoning_content", "reasoning")]  # fmt: skip
    assert told[0] == told[1]
    assert told[0]["reasoning_content"] == "hm"


# ---- pages in a browser ----------------------------------------------------------------------------------------------

PAGE = "http://localhost:3000"


def asks_first(server, origin=PAGE, **more):
    """What a browser sends before the request of a page at another place."""
    headers = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-own"}
    return server.http.options(CHAT, headers={"Origin": origin, **headers, **more})


def test_a_page_of_this_machine_may_read_the_answer(server):
    told = asks_first(server)
    assert told.status_code == 200
    assert told.headers["access-control-allow-origin"] == PAGE
    assert told.headers["access-control-allow-methods"] == "GET, POST"
    assert told.headers["access-control-allow-headers"] == "authorization,x-own"
    for body, status in (({"prompt": "x", "max_tokens": 1}, 200), ({"prompt": 3}, 400)):
        answer = server.post(TEXT, body, Origin=PAGE)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, PAGE)
        assert "Origin" in answer.headers["vary"]
        assert "x-request-id" in answer.headers["access-control-expose-headers"]


def test_a_page_of_another_site_may_not(server):
    for answer in (asks_first(server, "http://evil.com"), server.post(TEXT, {"prompt": "x"}, Origin="http://evil.com")):
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


def test_a_browser_asks_without_the_key_and_reads_that_it_is_missing(run_server):
    with run_server(keys=(("one",), ())) as running:
        assert asks_first(running).status_code == 200
        refused = running.post(CHAT, {"messages": HI}, Origin=PAGE)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)


def test_what_is_no_page_gets_no_headers_for_pages(server):
    assert not [name for name in server.http.get("/health").headers if name.startswith("access-control")]


# ---- on the wire -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/v1/models/tickets", "/metrics"])
def test_the_head_of_what_can_be_got_can_be_asked_for(server, path):
    whole, head = server.http.get(path), server.http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]


def test_a_body_may_come_in_chunks(server):
    data = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    answer = server.http.post(TEXT, content=iter([data[:5], data[5:]]))
    assert answer.status_code == 200, answer.text


def test_a_body_that_is_packed_is_told_so(server):
    data = gzip.compress(json.dumps({"prompt": "x", "max_tokens": 1}).encode())
    answer = server.post(TEXT, data, **{"Content-Encoding": "gzip"})
    assert answer.status_code == 415
    assert "gzip" in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "Content-Encoding"


def test_a_connection_is_kept_and_a_client_that_asks_before_it_sends_is_told_to(server):
    data = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as opened:
        for _ in range(2):
            opened.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
            assert opened.recv(1000).startswith(b"HTTP/1.1 100 ")
            opened.sendall(data)
            told = b""
            while b"total_tokens" not in told or not told.endswith(b"}}"):
                told += opened.recv(65536)
            assert told.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_minus_one_sets_no_limit_of_its_own(run_server, name):
    """llama.cpp and LM Studio write an answer of any length so; the OpenAI API refuses it."""
    with run_server(limits=Limits(answer_tokens=20)) as running:
        asked = {"model": "smollm2", "temperature": 0, "ignore_eos": True}
        chat = running.post("/v1/chat/completions", {**asked, "messages": HI, name: -1}).json()
        assert chat["usage"]["completion_tokens"] == 20
        text = running.post("/v1/completions", {**asked, "prompt": "x", "max_tokens": -1}).json()
        assert text["usage"]["completion_tokens"] == 20


@pytest.mark.parametrize("target", ["http://localhost{}?v=1", "HTTP://LOCALHOST:80{}", "https://127.0.0.1{}"])
def test_a_whole_address_may_be_asked_for_as_by_a_proxy(server, target):
    assert ask(server, f"GET {target.format('/v1/models')} HTTP/1.1\r\nHost: localhost").startswith("HTTP/1.1 200 ")


def test_the_name_in_a_whole_address_is_the_one_that_is_checked(server):
    told = ask(server, "GET http://evil.com/v1/models HTTP/1.1\r\nHost: localhost")
    assert told.startswith("HTTP/1.1 403 ")
    assert "evil.com" in told


def test_a_probe_of_http_1_0_needs_no_name(server):
    assert ask(server, "GET /health HTTP/1.0\r\nX-Probe: 1").startswith("HTTP/1.1 200 ")


@pytest.mark.parametrize("word", ["Identity", ""])
def test_a_body_that_is_said_to_be_as_it_is_is_read(server, word):
    assert server.post(TEXT, {"prompt": "x", "max_tokens": 1}, **{"Content-Encoding": word}).status_code == 200


def test_a_mark_of_byte_order_before_a_body_is_passed_over(server):
    assert server.post(TEXT, b'\xef\xbb\xbf{"prompt": "x", "max_tokens": 1}').status_code == 200


def ask(server, head):
    """What is answered to a head as it goes over the wire."""
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as opened:
        opened.sendall(f"{head}\r\nConnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: opened.recv(65536), b"")).decode()
