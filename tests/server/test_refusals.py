"""What is refused, with which status, and which field the error names; tables are made from the routes."""

import json
import socket

import openai
import pytest

from thimble.server.routes import ROUTES
from thimble.server.service import Limits

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
PATHS = sorted({route.path.replace("{model:path}", "smollm2") for route in ROUTES})
WITH_BODY = [route.path for route in ROUTES if route.body]
CLIENTS = [route for route in ROUTES if route.access != "public"]


def check(answer, status, param=None, code=None):
    """An error in OpenAI's form."""
    error = answer.json()["error"]
    assert answer.status_code == status, answer.text
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert (error["param"], error["code"]) == (param, code), error
    return error["message"]


# ---- fields ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        (
            {"messages": [*HI, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "messages.1.tool_calls.0.function.arguments",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "a"}]}, "messages.0.tool_call_id"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_completion_tokens": -2}, "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop.1"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"seed": "x"}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"320": 1}}, "logit_bias"),
        ({"logit_bias": {"3": 101}}, "logit_bias.3"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "search"}]}, "tools.0.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "foo"}}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "["}}, "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "@@"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"json": {"$ref": "#/nowhere"}}}, "structured_outputs.json"),
        ({"lora": [{"id": 9}]}, "lora.0.id"),
        ({"lora": [{"id": 0, "scale": 1e308}]}, "lora.0.scale"),
        ({"lora": [{"id": "tickets"}], "model": "poems"}, "lora"),
        ({"model": 3}, "model"),
    ],
)
def test_a_bad_field_is_named(server, change, param):
    check(server.post(CHAT, {"messages": HI, **change}), 400, param)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"store": True}, "store"),
        ({"modalities": ["audio"]}, "modalities.0"),
        ({"service_tier": "flex"}, "service_tier"),
    ],
)
def test_a_service_that_is_not_given_is_named(server, change, param):
    check(server.post(CHAT, {"messages": HI, **change}), 400, param)


def test_fields_that_are_null_and_notes_of_the_client_change_nothing(server):
    """LangChain, Open WebUI and others send all fields that they have."""
    asked = {"messages": HI, "max_tokens": 3, "temperature": 0}
    nulls = {"functions": None, "function_call": None, "audio": None, "prediction": None, "reasoning_effort": None}
    notes = {"user": "u", "metadata": {"chat_id": "1"}, "safety_identifier": "s", "prompt_cache_key": "k"}
    usual = {"store": False, "service_tier": "auto", "modalities": ["text"], "tools": [], "tool_choice": "auto"}
    plain, full = (server.post(CHAT, {**asked, **more}) for more in ({}, {**nulls, **notes, **usual}))
    assert full.status_code == 200, full.text
    assert full.json()["choices"] == plain.json()["choices"]
    deep = {"messages": [{"role": "user", "content": "hi", "mood": None}], "max_tokens": 1}
    assert server.post(CHAT, deep).status_code == 200


def test_a_field_that_is_not_known_deep_inside_is_named(server):
    body = {"messages": [{"role": "user", "content": "x", "mood": 1}]}
    check(server.post(CHAT, body), 400, "messages.0.mood", "unsupported_parameter")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt.1"),
        ({"prompt": [1, 320]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt.1"),
        ({"prompt": [[1], []]}, "prompt.1"),
        ({"prompt": None}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -2, "echo": True}, "max_tokens"),
        ({"ignore_eos": True, "response_format": {"type": "json_object"}}, "ignore_eos"),
    ],
)
def test_a_bad_field_of_a_completion_is_named(server, change, param):
    check(server.post(TEXT, {"prompt": "x", **change}), 400, param)


@pytest.mark.parametrize("path", WITH_BODY)
def test_an_unknown_field_is_refused_and_not_ignored(server, path):
    answer = server.post(path, {"mirostat": 2}, Authorization="Bearer admin")
    assert answer.status_code == 400
    assert "mirostat: this field is not supported" in answer.json()["error"]["message"]


def test_all_that_is_wrong_is_told_at_once(server):
    message = check(server.post(CHAT, {"messages": HI, "n": 0, "top_p": 7, "stop": ""}), 400, "top_p")
    assert all(name in message for name in ("n:", "top_p:", "stop:"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"messages": []}, "messages: expected a length of at least 1, got an empty list"),
        ({"messages": "secret"}, "messages: expected a list, got text of 6 characters"),
        ({"messages": ["secret"]}, "messages.0: expected an object, got text of 6 characters"),
        ({"messages": [{"role": "robot", "content": "x"}]}, """'tool', got "robot\""""),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content: expected text, got 3"),
        ({"temperature": -1}, "temperature: expected at least 0, got -1"),
        ({"temperature": "secret"}, "temperature: expected a number, got text of 6 characters"),
        ({"top_p": 1.5}, "top_p: expected at most 1, got 1.5"),
        ({"n": 1.5}, "n: expected a whole number, got 1.5"),
        ({"stream": "yes"}, "stream: expected true or false, got text of 3 characters"),
        ({"stop": ""}, "stop: expected a length of at least 1, got empty text"),
        ({"stop": ["a"] * 17}, "stop: expected a length of at most 16, got a list of 17"),
        ({"tools": {}}, "tools: expected a list, got an empty object"),
        ({"messages": [{"role": "user", "content": "x", "refusal": "no"}]}, "refusal: expected null, got text"),
        ({"repeat_penalty": 1.1}, "repeat_penalty: this field is not supported; use repetition_penalty"),
        ({"functions": [{"name": "f"}]}, "functions: this field is not supported; use tools"),
        (
            {"response_format": {"type": "json_object", "schema": {}}},
            "response_format.schema: this field is not supported; use response_format.json_schema",
        ),
    ],
)
def test_what_was_expected_and_what_came_is_said_in_plain_words(server, change, said):
    answer = server.post(CHAT, {"messages": HI, **change})
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400
    assert said in message
    assert "secret" not in message, "what was asked is not told to logs"
    assert "nput should" not in message
    assert "valid" not in message


def test_a_model_that_is_not_there_is_named_with_those_that_are(server):
    with pytest.raises(openai.NotFoundError) as caught:
        server.chat(model="gpt-4")
    assert caught.value.code == "model_not_found"
    assert "smollm2" in str(caught.value)
    assert "tickets" in str(caught.value)
    for body in ({"prompt": "x", "model": "gpt-4"}, {"prompt": "x", "lora": [{"id": "gpt-4"}]}):
        assert server.post(TEXT, body).status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "the " * 2000}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "the " * 200_000}]}, "messages"),
        (TEXT, {"prompt": "the " * 2000}, "prompt"),
        (TEXT, {"prompt": "the " * 200_000}, "prompt"),
        (TEXT, {"prompt": [3] * 1024}, "prompt"),
    ],
)
def test_a_prompt_beyond_the_context_is_refused(server, path, body, param):
    check(server.post(path, body), 400, param, "context_length_exceeded")


def test_a_longer_answer_than_the_server_writes_is_refused(run_server):
    with run_server(limits=Limits(answer_tokens=20)) as running:
        check(running.post(CHAT, {"messages": HI, "max_tokens": 21}), 400, "max_tokens")
        assert running.chat(max_tokens=20).usage.completion_tokens <= 20


# ---- bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WITH_BODY)
@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b'{"a": NaN}', b'{"a": "\\ud800"}',
        b"[" * 100_000, b'{"a":' * 1000 + b"1" + b"}" * 1000, b'{"messages":' + b"[" * 70 + b"]" * 70 + b"}",
    ],
    ids=lambda body: str(body[:12]),
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(server, path, body):
    answer = server.post(path, body, Authorization="Bearer admin")
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("path", WITH_BODY)
def test_a_body_that_is_too_long_is_refused(run_server, path):
    with run_server(limits=Limits(body_bytes=1000)) as running:
        answer = running.post(path, b" " * 5000, Authorization="Bearer admin")
        assert (answer.status_code, answer.json()["error"]["param"]) == (413, None)
        chunked = running.http.post(path, content=iter([b" " * 600] * 5), headers={"Authorization": "Bearer admin"})
        assert chunked.status_code == 413


# ---- routes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_a_method_that_a_route_does_not_take_is_refused(server, path, method):
    matching = [route for route in ROUTES if route.path.replace("{model:path}", "smollm2") == path]
    if method in [route.method for route in matching]:
        return
    answer = server.http.request(method, path)
    check(answer, 405)
    assert matching[0].method in answer.headers["allow"]


@pytest.mark.parametrize(
    "path", ["/v2", "/v1/chat/completions/", "/v1//models", "/v1/%00", "/metrics/x", "/v1/models/"]
)
def test_a_path_that_is_not_there_is_refused(server, path):
    check(server.http.get(path), 404)


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/v1/chat/completions", "/v1/chat/completions/"])
def test_a_base_url_that_is_not_right_is_answered_with_the_one_that_is(server, path):
    said = server.http.post(path, json={"messages": HI}).json()["error"]["message"]
    assert "this is /v1/chat/completions here" in said
    assert f"the base URL of a client is {str(server.http.base_url).rstrip('/')}/v1" in said


# ---- keys ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(run_server):
    with run_server(keys=(("one", "zw\u00f6lf"), ("admin",))) as running:
        yield running


@pytest.mark.parametrize("route", CLIENTS, ids=lambda route: route.path)
@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer two", "Bearer on", "Bearer onee", "Basic one", "one", "Bearer \xff"]
)
def test_every_route_wants_the_key(locked, route, header):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    answer = locked.http.request(route.method, route.path.replace("{model:path}", "smollm2"), headers=headers)
    check(answer, 401, code="invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_an_unknown_path_wants_the_key_too(locked):
    check(locked.http.get("/nowhere"), 401, code="invalid_api_key")


@pytest.mark.parametrize("key", ["one", "zw\u00f6lf", "admin"])
def test_the_right_key_opens(locked, key):
    answer = locked.http.get("/v1/models", headers={"Authorization": f"Bearer {key}".encode()})
    assert answer.status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_health_wants_no_key(locked, path):
    assert locked.http.get(path).status_code == 200


@pytest.mark.parametrize("route", [route for route in ROUTES if route.access == "admin"], ids=lambda route: route.path)
def test_what_is_served_is_changed_with_the_admin_key_alone(locked, run_server, route):
    check(locked.post(route.path, {}, Authorization="Bearer one"), 401, code="invalid_api_key")
    assert locked.post(route.path, {}, Authorization="Bearer admin").status_code == 400
    with run_server(keys=((), ())) as running:
        message = check(running.post(route.path, {}, Authorization="Bearer x"), 403)
        assert "--admin-key" in message


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.com", "evil.com:8000", "127.0.0.1.evil.com", "localhost.evil.com", "", "[::1"])
def test_a_request_to_another_name_is_refused(server, host):
    check(server.http.get("/health", headers={"Host": host}), 403, "Host")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:9", "localhost."])
def test_the_names_of_this_machine_are_taken(server, host):
    assert server.http.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.com", "null", "http://127.0.0.1.evil.com", "http://["])
def test_a_page_of_another_site_is_refused(server, origin):
    check(server.post(TEXT, {"prompt": "x"}, Origin=origin), 403, "Origin")


def test_a_page_of_this_machine_is_taken(server):
    body = {"prompt": "x", "max_tokens": 1}
    assert server.post(TEXT, body, Origin="http://localhost:3000").status_code == 200


def test_a_server_for_others_takes_any_name_but_pages_of_its_own_alone(run_server):
    with run_server(keys=(("one",), ()), hosts=None) as running:
        headers = {"Authorization": "Bearer one", "Host": "models.example:80"}
        assert running.http.get("/v1/models", headers=headers).status_code == 200
        own = {**headers, "Origin": "https://models.example"}
        assert running.http.get("/v1/models", headers=own).status_code == 200
        check(running.http.get("/v1/models", headers={**headers, "Origin": "https://evil.com"}), 403, "Origin")


def test_log_probabilities_of_more_prompts_than_memory_is_for_are_refused(server):
    """A body of 200 KB could otherwise have the server keep gigabytes of them."""
    body = {"prompt": [[5] * 1000] * 64, "n": 16, "echo": True, "logprobs": 20, "max_tokens": 0}
    said = check(server.post(TEXT, body), 400, "logprobs")
    assert said == (
        "logprobs: echo asks for 21,504,000 log-probabilities of prompts: expected 2,000,000 at most; send fewer "
        "prompts at a time, or a smaller logprobs"
    )
    body = {"prompt": [[5] * 1000] * 2, "echo": True, "logprobs": 20, "max_tokens": 0}
    assert server.post(TEXT, body).status_code == 200


# ---- what is told ----------------------------------------------------------------------------------------------------


def test_the_log_says_nothing_of_what_was_asked_or_answered(server, wait_until):
    answer = server.chat("the secret word", max_tokens=20, extra_headers={"X-Request-Id": "the-one"})

    def entries():
        return [entry for entry in server.log if entry["request"] == "the-one"]

    wait_until(entries)  # it is written once the answer has been sent, and others may end meanwhile
    (entry,) = entries()
    assert "secret" not in json.dumps(server.log)
    assert answer.choices[0].message.content not in json.dumps(server.log)
    assert entry.keys() >= {"time", "request", "status", "seconds", "model", "prompt_tokens", "completion_tokens"}
    assert (entry["status"], entry["model"], entry["completion_tokens"]) == (200, "smollm2", 20)


def test_a_request_is_known_by_a_name(server):
    assert server.http.get("/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert server.http.get("/health", headers={"X-Request-Id": "a b"}).headers["x-request-id"].startswith("req_")


def test_a_line_that_is_no_http_is_refused(server):
    with socket.create_connection(server.address.removeprefix("http://").split(":")) as opened:
        opened.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert opened.recv(100).startswith(b"HTTP/1.1 400")
