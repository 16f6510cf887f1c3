"""Chat and completions through OpenAI's own client."""

import dataclasses
import json
import re

import openai
import pytest

import served
from thimble.data.template import ChatTemplate

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 4}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "maximum": 9, "minimum": 0}, "y": {"enum": ["a", "b"]}},
    "required": ["x", "y"],
    "additionalProperties": False,
}


def joined(stream):
    """Text, finish and calls of each choice of a stream, and the usage."""
    texts, finishes, calls, usage = {}, {}, {}, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts.setdefault(choice.index, "")
            texts[choice.index] += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                calls.setdefault(choice.index, []).append((call.function.name, call.function.arguments))
            finishes[choice.index] = choice.finish_reason or finishes.get(choice.index)
    return texts, finishes, calls, usage


def test_a_whole_answer_has_openai_s_form(server):
    answer = server.chat()
    assert (answer.object, answer.model, answer.choices[0].message.role) == ("chat.completion", "smollm2", "assistant")
    assert answer.id.startswith("chatcmpl-")
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (12, answer.usage.prompt_tokens + 12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1, "seed": 5, "n": 3},
        {"stop": ["e", "q"]},
        {"logprobs": True, "top_logprobs": 2},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": {"40": 5}},
        {"extra_body": {"top_k": 3, "min_p": 0.01, "repetition_penalty": 1.2}, "temperature": 0.9, "seed": 1},
    ],
)
def test_a_stream_says_what_the_whole_answer_does(server, options):
    whole = server.chat(**options)
    texts, finishes, _, usage = joined(server.chat(**options, stream=True, stream_options={"include_usage": True}))
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert finishes == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert any(texts.values())


def test_a_stream_ends_with_done_and_carries_openai_s_events(server):
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 2}
    answer = server.post("/v1/chat/completions", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0]["finish_reason"] in ("length", "stop")


def test_seeds_make_choices_and_repeat_them(server):
    asked = {"temperature": 1, "n": 4, "max_tokens": 20}
    first, same, other = (server.chat(**asked, seed=seed) for seed in (1, 1, 2))
    texts = [[choice.message.content for choice in answer.choices] for answer in (first, same, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 4
    one = server.chat(temperature=1, max_tokens=20, seed=1)
    assert one.choices[0].message.content == texts[0][0]


def test_a_request_without_a_seed_gets_another_one_each_time(server):
    texts = {server.chat(temperature=1, max_tokens=20).choices[0].message.content for _ in range(3)}
    assert len(texts) == 3


def test_an_answer_ends_before_a_stop_string_wherever_its_tokens_begin(server):
    text = server.complete(max_tokens=40).choices[0].text
    stops = {text[start : start + size] for start in range(0, len(text) - 6, 3) for size in (1, 2, 5)}
    stops = [stop for stop in sorted(stops) if "\ufffd" not in stop][:30]
    assert len(stops) > 4
    for stop in stops:
        answer = server.complete(max_tokens=40, stop=stop)
        assert answer.choices[0].text == text[: text.index(stop)], stop
        assert answer.choices[0].finish_reason == "stop"
        streamed = "".join(chunk.choices[0].text for chunk in server.complete(max_tokens=40, stop=stop, stream=True))
        assert streamed == answer.choices[0].text


def test_a_stop_string_that_does_not_come_holds_nothing_back(server):
    text = server.complete(max_tokens=40).choices[0].text
    assert server.complete(max_tokens=40, stop=[text[-1] + "nowhere", text[2:] + "!"]).choices[0].text == text


def test_log_probabilities_are_of_the_tokens_that_are_told(server):
    answer = server.chat(logprobs=True, top_logprobs=3).choices[0]
    told = answer.logprobs.content
    assert len(told) == 12
    assert b"".join(bytes(place.bytes) for place in told).decode(errors="replace") == answer.message.content
    for place in told:
        assert place.logprob == max(top.logprob for top in place.top_logprobs)  # temperature 0 takes the likeliest
        assert len(place.top_logprobs) == 3
    older = server.complete(logprobs=2).choices[0].logprobs
    assert len(older.tokens) == len(older.token_logprobs) == len(older.top_logprobs) == len(older.text_offset) == 12
    assert older.text_offset[0] == 0
    assert older.text_offset == sorted(older.text_offset)


def test_log_probabilities_of_a_stopped_answer_end_with_its_text(server):
    whole = server.complete(max_tokens=30, logprobs=0).choices[0]
    stop = whole.text[8:10]
    cut = server.complete(max_tokens=30, logprobs=0, stop=stop).choices[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.logprobs.text_offset == [place for place in whole.logprobs.text_offset if place < len(cut.text)]


def test_prompts_may_be_texts_tokens_and_several(server):
    texts = ["the cat", "in the"]
    tokens = [server.post("/tokenize", {"prompt": text}).json()["tokens"] for text in texts]
    by_text = server.complete(texts, n=2, temperature=1, seed=3)
    by_token = server.complete(tokens, n=2, temperature=1, seed=3)
    assert [choice.text for choice in by_text.choices] == [choice.text for choice in by_token.choices]
    assert [choice.index for choice in by_text.choices] == [0, 1, 2, 3]
    assert by_text.usage.prompt_tokens == sum(map(len, tokens))
    alone = server.complete(texts[0], temperature=1, seed=3)
    assert alone.choices[0].text == by_text.choices[0].text
    assert server.complete(tokens[0]).choices[0].text == server.complete(texts[0]).choices[0].text


def test_echo_puts_the_prompt_in_front(server):
    plain, echoed = server.complete(), server.complete(echo=True)
    assert echoed.choices[0].text == "the cat" + plain.choices[0].text
    streamed = "".join(chunk.choices[0].text for chunk in server.complete(echo=True, stream=True))
    assert streamed == echoed.choices[0].text


def loglikelihoods(answer, contexts):
    """As lm-evaluation-harness reads them (models/openai_completions.py, parse_logprobs)."""
    found = []
    for choice, context in zip(sorted(answer.choices, key=lambda choice: choice.index), contexts, strict=True):
        told = choice.logprobs
        values, tops = told.token_logprobs[context:-1], told.top_logprobs[context:-1]
        found.append((sum(values), all(value == max(top.values()) for value, top in zip(values, tops, strict=True))))
    return found


@pytest.mark.parametrize("bias", [{}, {"314": 100}])
def test_continuations_are_scored_by_echo_with_log_probabilities(server, bias):
    """What lm-evaluation-harness asks for; with a bias the answer ends before its first token."""
    texts = ["the cat sat", "a dog"]
    ids = [server.post("/tokenize", {"prompt": text}).json()["tokens"] for text in texts]
    asked = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1, "logit_bias": bias}
    answer = server.complete(ids, **asked)
    found = loglikelihoods(answer, [2, 1])
    for choice, own, (value, _), context in zip(answer.choices, ids, found, [2, 1], strict=True):
        told = choice.logprobs
        assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset) == len(own) + 1
        assert (told.token_logprobs[0], told.top_logprobs[0], told.text_offset[0]) == (None, None, 0)
        expected = 0.0
        for place in range(context, len(own)):  # token by token, each forced to be the next one
            forced = server.complete(own[:place], max_tokens=1, logprobs=0, logit_bias={str(own[place]): 100})
            expected += forced.choices[0].logprobs.token_logprobs[0]
        assert value == pytest.approx(expected, abs=1e-3)
    assert server.complete(ids, **asked).choices[0].logprobs == answer.choices[0].logprobs  # kept prefixes or none
    assert answer.usage.completion_tokens == (0 if bias else 2)


def test_the_token_itself_is_among_the_likeliest_that_are_told(server):
    """As OpenAI and vLLM have it: up to one more than were asked for."""
    told = server.complete(max_tokens=1, logprobs=1, logit_bias={"200": 100}).choices[0].logprobs
    (top,) = told.top_logprobs
    assert top[told.tokens[0]] == told.token_logprobs[0] < max(top.values())
    assert len(top) == 2


def test_a_prompt_alone_is_scored_without_an_answer(server):
    asked = {"echo": True, "logprobs": 2}
    scored, longer = server.complete(max_tokens=0, **asked), server.complete(max_tokens=4, **asked)
    choice, other = scored.choices[0], longer.choices[0]
    assert (choice.text, choice.finish_reason, scored.usage.completion_tokens) == ("the cat", "length", 0)
    assert choice.logprobs.token_logprobs == other.logprobs.token_logprobs[: len(choice.logprobs.tokens)]
    assert other.logprobs.text_offset[len(choice.logprobs.tokens)] == len("the cat")
    assert server.complete(max_tokens=0, echo=True).choices[0].text == "the cat"
    texts, places = "", []
    for chunk in server.complete(max_tokens=4, stream=True, **asked):
        texts += chunk.choices[0].text
        places += chunk.choices[0].logprobs.token_logprobs if chunk.choices[0].logprobs else []
    assert (texts, places) == (other.text, other.logprobs.token_logprobs)


def test_logit_bias_and_stop_tokens_reach_the_sampler(server):
    forced = server.complete(logit_bias={"65": 100}, logprobs=0).choices[0]
    assert len(set(forced.logprobs.tokens)) == 1
    stopped = server.complete(logit_bias={"65": 100}, extra_body={"stop_token_ids": [65]})
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("", "stop")
    ended = server.complete(logit_bias={"314": 100})
    assert (ended.choices[0].finish_reason, ended.usage.completion_tokens) == ("stop", 0)
    endless = server.complete(logit_bias={"314": 100}, extra_body={"ignore_eos": True})
    assert (endless.choices[0].finish_reason, endless.usage.completion_tokens) == ("length", 12)


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_follows_a_json_schema(server, is_streamed, temperature):
    asked = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}},
        "max_tokens": 400, "temperature": temperature, "seed": 4,
    }  # fmt: skip
    if is_streamed:
        texts, finishes, _, _ = joined(server.chat(**asked, stream=True))
        text, finish = texts[0], finishes[0]
    else:
        choice = server.chat(**asked).choices[0]
        text, finish = choice.message.content, choice.finish_reason
    value = json.loads(text)
    assert value.keys() == {"x", "y"}
    assert isinstance(value["x"], int)
    assert value["y"] in ("a", "b")
    assert finish == "stop"


@pytest.mark.parametrize(
    ("form", "allowed"),
    [
        ({"choice": ["yes", "no", "m\u00fcde"]}, r"yes|no|m\u00fcde"),
        ({"regex": "[ab]{3}c"}, "[ab]{3}c"),
        ({"grammar": 'root ::= "x" ("y" | "z") "."'}, r"x[yz]\."),
        ({"grammar": 'start: "x" ("y" | "z") "."'}, r"x[yz]\."),
        ({"json": {"const": 7}}, "7"),
    ],
)
def test_an_answer_follows_a_grammar(server, form, allowed):
    answer = server.chat(extra_body={"structured_outputs": form}, n=4, temperature=1, seed=2, max_tokens=30)
    for choice in answer.choices:
        assert re.fullmatch(allowed, choice.message.content), choice.message.content
        assert choice.finish_reason == "stop"


@pytest.mark.parametrize("word", ["path", "password", "binary", "json-string"])
def test_a_format_that_names_no_known_form_is_a_note(server, word):
    schema = {
        "type": "object", "required": ["format"], "additionalProperties": False,
        "properties": {"format": {"type": "string", "format": word, "maxLength": 1}},
    }  # fmt: skip
    asked = {"type": "json_schema", "json_schema": {"name": "file", "schema": schema}}
    text = server.chat(response_format=asked, max_tokens=90, temperature=1, seed=3).choices[0].message.content
    assert len(json.loads(text)["format"]) <= 1
    tool = {"type": "function", "function": {"name": "read", "parameters": schema}}
    assert server.chat(tools=[tool], tool_choice="required", max_tokens=2).choices[0].finish_reason == "length"


def test_a_format_among_values_stays_as_it_is(server):
    schema = {"enum": [{"format": "path"}], "default": {"format": "path"}}
    asked = {"type": "json_schema", "json_schema": {"name": "file", "schema": schema}}
    text = server.chat(response_format=asked, max_tokens=90).choices[0].message.content
    assert json.loads(text) == {"format": "path"}


def test_a_format_that_is_known_holds(server):
    asked = {"type": "json_schema", "json_schema": {"name": "day", "schema": {"type": "string", "format": "date"}}}
    text = server.chat(response_format=asked, max_tokens=30, temperature=1, seed=3).choices[0].message.content
    assert re.fullmatch(r'"\d{4}-\d\d-\d\d"', text)


def test_json_object_gives_an_object(server):
    answer = server.chat(response_format={"type": "json_object"}, max_tokens=60)
    assert answer.choices[0].message.content.lstrip().startswith("{")


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_is_called_where_that_is_asked_for(server, choice, is_streamed):
    asked = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 300, "parallel_tool_calls": False}
    if is_streamed:
        texts, finishes, calls, _ = joined(server.chat(**asked, stream=True))
        (name, arguments), finish, text = calls[0][0], finishes[0], texts[0]
        assert len(calls[0]) == 1
    else:
        told = server.chat(**asked).choices[0]
        assert len(told.message.tool_calls) == 1
        call = told.message.tool_calls[0]
        assert call.id.startswith("call_")
        name, arguments, finish, text = call.function.name, call.function.arguments, told.finish_reason, None
    assert name == "weather"
    assert json.loads(arguments).keys() == {"city"}
    assert finish == "tool_calls"
    assert not text


@pytest.mark.parametrize("white", [" ", "\t", "\r"])
def test_a_call_that_is_demanded_does_not_go_on_with_white_space_for_ever(server, white):
    wanted = {str(token): 100 for token in server.post("/tokenize", {"prompt": white}).json()["tokens"]}
    told = server.chat(
        tools=[TOOL], tool_choice="required", parallel_tool_calls=False, logit_bias=wanted, max_tokens=300
    )
    assert told.choices[0].finish_reason == "tool_calls"


def test_a_conversation_with_calls_can_go_on(server):
    first = server.chat(tools=[TOOL], tool_choice="required", max_tokens=300, parallel_tool_calls=False)
    message = first.choices[0].message
    answer = server.client.chat.completions.create(
        model="smollm2", max_tokens=5, tools=[TOOL],
        messages=[
            {"role": "user", "content": "say it"}, message,
            {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"},
        ],
    )  # fmt: skip
    assert answer.usage.prompt_tokens > first.usage.prompt_tokens


def test_tools_are_left_out_of_the_prompt_where_none_may_be_called(server):
    without, with_tools = server.chat(), server.chat(tools=[TOOL])
    assert server.chat(tools=[TOOL], tool_choice="none").usage.prompt_tokens == without.usage.prompt_tokens
    assert with_tools.usage.prompt_tokens > without.usage.prompt_tokens


def test_adapters_are_asked_by_their_names(server):
    base = server.chat().choices[0].message.content
    tickets, poems = (server.chat(model=name) for name in ("tickets", "poems"))
    said = {base, tickets.choices[0].message.content, poems.choices[0].message.content}
    assert len(said) == 3
    assert (tickets.model, poems.model) == ("tickets", "poems")
    assert server.chat(model="smollm2:tickets").choices[0].message.content == tickets.choices[0].message.content
    for number in (0, "tickets"):
        listed = server.chat(extra_body={"lora": [{"id": number, "scale": 1.0}]})
        assert listed.choices[0].message.content == tickets.choices[0].message.content
    off = server.chat(extra_body={"lora": [{"id": "tickets", "scale": 0}]})
    assert off.choices[0].message.content == base
    assert len({server.chat(model=name).system_fingerprint for name in ("smollm2", "tickets", "poems")}) == 3


def test_models_are_listed_before_they_are_used(server):
    models = list(server.client.models.list())
    assert [model.id for model in models][:3] == ["smollm2", "tickets", "poems"]
    assert [model.parent for model in models][:3] == [None, "smollm2", "smollm2"]
    assert server.client.models.retrieve("tickets").id == "tickets"
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("nobody")


def test_a_prompt_that_was_read_is_not_read_again(server):
    text = "a long beginning that two prompts have in common " * 4
    first = server.chat(text + "one", model="poems")
    second = server.chat(text + "two", model="poems")
    other = server.chat(text + "two", model="smollm2")
    assert first.usage.prompt_tokens_details.cached_tokens < 10
    assert second.usage.prompt_tokens_details.cached_tokens > 50
    assert other.usage.prompt_tokens_details.cached_tokens < 10  # another adapter has other keys and values
    stopped = server.chat(text + "three", model="poems", stop=["e", "a", "o", " "], max_tokens=50)
    assert stopped.usage.prompt_tokens_details.cached_tokens > 50


def test_tokens_and_back(server):
    told = server.post("/tokenize", {"prompt": "the cat", "return_token_strs": True}).json()
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert server.post("/detokenize", {"tokens": told["tokens"]}).json() == {"prompt": "the cat"}
    chat = server.post("/tokenize", {"messages": [{"role": "user", "content": "the cat"}]}).json()
    assert chat["count"] == server.chat("the cat").usage.prompt_tokens


def test_content_may_come_in_parts_and_developers_are_the_system(server):
    def ask(*messages):
        options = {"model": "smollm2", "temperature": 0, "max_tokens": 8}
        return server.client.chat.completions.create(messages=list(messages), **options).choices[0].message.content

    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    assert ask({"role": "user", "content": parts}) == ask({"role": "user", "content": "the cat"})
    said = [
        ask({"role": role, "content": "be brief"}, {"role": "user", "content": "x"}) for role in ("system", "developer")
    ]
    assert said[0] == said[1]


def test_a_chat_template_is_told_what_a_request_asks_for(model, session, adapter_folders):
    template = ChatTemplate(served.CHATML + "{% if enable_thinking is false %}<think></think>{% endif %}")
    with served.started(dataclasses.replace(model, template=template), session, adapter_folders) as running:
        body = {"messages": [{"role": "user", "content": "Hi"}]}

        def text(**more):
            tokens = running.post("/tokenize", {**body, **more}).json()["tokens"]
            return running.post("/detokenize", {"tokens": tokens}).json()["prompt"]

        quick = {"chat_template_kwargs": {"enable_thinking": False}}
        assert text(**quick) == text() + "<think></think>"

        def count(**more):
            answer = running.post("/v1/chat/completions", {**body, **more, "max_tokens": 1})
            return answer.json()["usage"]["prompt_tokens"]

        quick_tokens, plain_tokens = count(**quick), count()
        assert quick_tokens > plain_tokens
        effort = {name: count(reasoning_effort=name) for name in ("none", "low", "max")}
        assert effort == {"none": quick_tokens, "low": plain_tokens, "max": plain_tokens}
        own = {"chat_template_kwargs": {"enable_thinking": True}}
        assert count(reasoning_effort="none", **own) == plain_tokens, "what is said of the template goes first"
        for name in ("thinking", "messages"):
            refused = running.post("/v1/chat/completions", {**body, "chat_template_kwargs": {name: 1}})
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == "chat_template_kwargs"
            assert f"takes no {name}" in refused.json()["error"]["message"]


def test_how_long_to_think_is_told_to_templates_by_the_name_that_they_read(model, session, adapter_folders):
    levels = "{% if reasoning_effort is defined %}Reasoning: {{ reasoning_effort }}{% endif %}"
    template = ChatTemplate(levels + served.CHATML)
    with served.started(dataclasses.replace(model, template=template), session, adapter_folders) as running:
        asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        told = [
            running.post("/v1/chat/completions", {**asked, **more}).json()["usage"]["prompt_tokens"]
            for more in ({}, {"reasoning_effort": "high"}, {"chat_template_kwargs": {"reasoning_effort": "high"}})
        ]
    assert told[0] < told[1] == told[2]


def test_thoughts_are_not_asked_of_a_template_that_has_none(server):
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    assert server.post("/v1/chat/completions", {**body, "reasoning_effort": "none"}).status_code == 200
    refused = server.post("/v1/chat/completions", {**body, "reasoning_effort": "low"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "reasoning_effort"
    assert "has no thoughts" in refused.json()["error"]["message"]
