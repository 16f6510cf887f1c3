"""From the body of a request to what the engine takes: tokens, sampling options, grammar. Runs off the event loop."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from thimble.data.context import check_length
from thimble.data.rows import Record
from thimble.errors import InputError
from thimble.inference.batch import own_seed
from thimble.inference.sampling import SamplingOptions
from thimble.server.answer import Answer, Echo
from thimble.server.bodies import ENDLESS, ChatBody, CompletionBody, Generation, Message, NamedTool, Tool
from thimble.server.grammar import ANY_OBJECT, Grammar, from_choice, from_json_schema, from_regex, from_text
from thimble.server.refusal import Refusal, bad_field, from_input_error
from thimble.server.service import Service
from thimble.server.tool_calls import CallForm, CallReader, calls_grammar

MOST_ECHOED = 2_000_000  # log-probabilities of the prompts of a request, each of which takes about 0.1 KB
COMPLETION_TOKENS = 16  # of a continuation for which no length is asked, as in the OpenAI API
FEW_CHARACTERS = 16  # a token: texts of less than so many times the context are encoded without a look at their length

Ids = NDArray[np.int32]


class Part(NamedTuple):
    """One answer that is wanted."""

    prompt: Ids
    options: SamplingOptions
    answer: Answer
    echo: str = ""  # stands before the answer


def prepare_chat(service: Service, body: ChatBody) -> list[Part]:
    """The answers that a conversation asks for; a Refusal if it cannot be answered."""
    tools = body.tools if body.tool_choice != "none" else None
    ids = encode_chat(service, body.messages, tools, _variables(service, body))
    form = _form(service) if tools else None
    grammar = _grammar(service, body)
    if form and (called := _calls_grammar(body, form)):
        if grammar:
            raise bad_field("tool_choice", "not with response_format or structured_outputs")
        grammar = service.grammars.compile(called, "tools")
    longest = body.max_completion_tokens or body.max_tokens
    if body.max_tokens and longest != body.max_tokens:
        raise bad_field("max_tokens", f"expected {longest}, as in max_completion_tokens, or one of the two")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    options = _options(service, body, _limit(longest), logprobs)
    names = [tool.function.name for tool in tools or ()]

    def reader() -> CallReader | None:
        return CallReader(names, body.parallel_tool_calls is False) if tools else None

    parts = []
    for place in range(body.n or 1):
        answer = Answer(service.tokenizer, body.stops, reader())
        parts.append(Part(ids, _own(options, place, grammar), answer))
    return parts


def prepare_completion(service: Service, body: CompletionBody) -> list[Part]:
    """The continuations that are asked for, those of the first prompt first; a Refusal if there cannot be any."""
    several = len(body.prompts) > 1
    encoded = [
        encode_prompt(service, prompt, f"prompt.{place}" if several else "prompt")
        for place, prompt in enumerate(body.prompts)
    ]
    grammar = _grammar(service, body)
    longest = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    options = _options(service, body, _limit(longest or 1), body.logprobs)
    if body.echo:
        _check_echoed(encoded, body)
        options = replace(options, prompt_logprobs=body.logprobs)
    parts: list[Part] = []
    for ids, prompt in zip(encoded, body.prompts, strict=True):
        echo = _echo(service, ids, prompt) if body.echo else None
        for _ in range(body.n or 1):
            answer = Answer(service.tokenizer, body.stops, echo=echo, is_empty=longest == 0)
            parts.append(Part(ids, _own(options, len(parts), grammar), answer, echo.text if echo else ""))
    return parts


def _check_echoed(prompts: Sequence[Ids], body: CompletionBody) -> None:
    """Refuse log-probabilities that are too many to be kept until all of them are told."""
    places = sum(map(len, prompts)) * (body.n or 1)
    told = 0 if body.logprobs is None else places * (1 + body.logprobs)
    if told > MOST_ECHOED:
        raise bad_field(
            "logprobs",
            f"echo asks for {told:,} log-probabilities of prompts: expected {MOST_ECHOED:,} at most; send fewer "
            "prompts at a time, or a smaller logprobs",
        )


def _echo(service: Service, ids: Ids, prompt: str | Sequence[int]) -> Echo:
    return Echo(ids.tolist(), prompt if isinstance(prompt, str) else service.tokenizer.decode(prompt))


# ---- tokens ----------------------------------------------------------------------------------------------------------


def encode_chat(
    service: Service, messages: Sequence[Message], tools: Sequence[Tool] | None, variables: Mapping[str, Any] | None
) -> Ids:
    """A conversation that waits for an answer, int32 (T,); `variables` are for the chat template."""
    if service.model.template is None:
        raise bad_field("messages", f"{service.base_name} has no chat template: ask /v1/completions")
    try:
        service.model.template.with_variables(variables or {})
    except InputError as error:
        raise from_input_error(error, "chat_template_kwargs") from None
    _check_characters(service, sum(len(message.text) for message in messages), "messages")
    written = [_message(message, f"messages.{place}") for place, message in enumerate(messages)]
    given = [tool.model_dump(exclude_none=True, exclude={"cache_control"}) for tool in tools or ()]
    if any(message.tool_calls or message.role == "tool" for message in messages):
        _form(service, "messages")
    try:
        ids = service.encoder.prompt(written, given or None, variables)
    except InputError as error:
        raise from_input_error(error, "messages") from None
    return _checked(service, ids, "messages")


def _variables(service: Service, body: ChatBody) -> Mapping[str, Any]:
    """What the chat template is told beside the conversation: what the request says, and how long to think as
    templates are told that, by one name (gpt-oss), by the other (Qwen3), or by both.
    """
    given, effort, template = body.chat_template_kwargs or {}, body.reasoning_effort, service.model.template
    if effort is None or template is None:
        return given
    told = {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    read = {name: value for name, value in told.items() if template.reads(name)}
    if not read and effort != "none":  # a template that knows no thoughts writes none
        raise bad_field(
            "reasoning_effort",
            f"got {effort}: the chat template of {service.base_name} has no thoughts that could be longer or shorter; "
            "leave it out",
        )
    return {**read, **given}


def encode_prompt(service: Service, prompt: str | list[int], param: str, begins: bool = True) -> Ids:
    """A text or tokens to be continued, int32 (T,); a text begins with what the base expects first if `begins`."""
    if isinstance(prompt, list):
        beyond = next((token for token in prompt if token >= service.vocab_size), None)
        if beyond is not None:
            raise bad_field(param, f"token {beyond} is not one of the {service.vocab_size:,} of the base")
        ids = np.array(prompt, np.int32)
    else:
        _check_characters(service, len(prompt), param)
        try:
            record = Record(text=prompt)
            ids = service.encoder.opening(record) if begins else np.array(service.tokenizer.encode(prompt), np.int32)
        except InputError as error:
            raise from_input_error(error, param) from None
    return _checked(service, ids, param)


def _checked(service: Service, ids: Ids, param: str) -> Ids:
    if not len(ids):
        raise bad_field(param, "it has no tokens: expected at least one")
    try:
        check_length(len(ids), service.context)
    except InputError as error:
        raise Refusal(400, str(error), param, "context_length_exceeded") from None
    return ids


def _check_characters(service: Service, characters: int, param: str) -> None:
    """Refuse a text that is too long whatever its tokens are, without taking the time to encode it."""
    if characters > FEW_CHARACTERS * service.context and characters > service.longest_token * service.context:
        raise Refusal(
            400, f"the prompt has {characters:,} characters, more than the {service.context:,} tokens of the context "
            "can hold: shorten it", param, "context_length_exceeded",
        )  # fmt: skip


def _message(message: Message, param: str) -> dict[str, Any]:
    """A message as templates take it."""
    role = "system" if message.role == "developer" else message.role
    written: dict[str, Any] = {"role": role, "content": message.text}
    thoughts = message.reasoning if message.reasoning_content is None else message.reasoning_content
    noted = {"name": message.name, "tool_call_id": message.tool_call_id, "reasoning_content": thoughts}
    written |= {name: value for name, value in noted.items() if value is not None}
    if message.tool_calls:
        written["tool_calls"] = [
            {
                **({"id": call.id} if call.id else {}),
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments, f"{param}.tool_calls.{place}.function.arguments"),
                },
            }
            for place, call in enumerate(message.tool_calls)
        ]
    return written


def _arguments(text: str, param: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise bad_field(param, f"expected a JSON object in a string ({error})") from None
    if not isinstance(value, dict):
        raise bad_field(param, "expected a JSON object in a string")
    return value


# ---- form ------------------------------------------------------------------------------------------------------------


def _form(service: Service, param: str = "tools") -> CallForm:
    form = service.call_form
    if form is None:
        raise bad_field(param, f"the chat template of {service.base_name} writes calls of tools in a form that cannot "
                        "be read back: leave tools out")  # fmt: skip
    return form


def _grammar(service: Service, body: Generation) -> Grammar | None:
    """The grammar that the form of the answer asks for."""
    form, outputs = body.response_format, body.structured_outputs
    param, text = "response_format", ""
    if form and form.type == "json_object":
        text = from_json_schema(ANY_OBJECT, param)
    elif form and form.json_schema:
        param = "response_format.json_schema.schema"
        text = from_json_schema(form.json_schema.schema_, param, bool(form.json_schema.strict))
    elif outputs:
        kind = next(name for name in ("json_", "regex", "choice", "grammar") if getattr(outputs, name) is not None)
        param = f"structured_outputs.{kind.rstrip('_')}"
        text = {
            "json_": lambda: from_json_schema(outputs.json_ or {}, param),
            "regex": lambda: from_regex(outputs.regex or ""),
            "choice": lambda: from_choice(outputs.choice or ()),
            "grammar": lambda: from_text(outputs.grammar or "", param),
        }[kind]()  # fmt: skip
    return service.grammars.compile(text, param) if text else None


def _calls_grammar(body: ChatBody, form: CallForm) -> str:
    """The grammar that `tool_choice`, or a strict tool, asks for; empty if there is none."""
    tools, choice = body.tools or [], body.tool_choice
    is_strict = any(tool.function.strict for tool in tools)
    if choice in (None, "auto") and not is_strict:
        return ""
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    is_free = choice in (None, "auto")
    if is_free and not form.has_mark:
        raise bad_field("tools", "strict: only with tool_choice required, since a call has no mark of its own here")
    schemas = [_schema(tool) for tool in tools]
    is_single = isinstance(choice, NamedTool) or body.parallel_tool_calls is False
    return calls_grammar(schemas, form, is_single, is_free)


def _schema(tool: Tool) -> Mapping[str, Any]:
    called = tool.function
    return {"name": called.name, "parameters": called.parameters, "strict": bool(called.strict)}


# ---- sampling --------------------------------------------------------------------------------------------------------


def _limit(most: int | None) -> int | None:
    """How many tokens an answer may have; None where only the context ends it."""
    return None if most == ENDLESS else most


def _options(service: Service, body: Generation, longest: int | None, logprobs: int | None) -> SamplingOptions:
    """How the answers are written; what is not asked for is as in the OpenAI API."""
    most = service.limits.answer_tokens or service.context
    if longest is not None and service.limits.answer_tokens is not None and longest > most:
        raise bad_field("max_tokens", f"got {longest:,}: this server writes {most:,} at most")
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    beyond = next((token for token in bias if token >= service.vocab_size), None)
    if beyond is not None:
        raise bad_field("logit_bias", f"token {beyond} is not one of the {service.vocab_size:,} of the base")
    if body.ignore_eos and (body.response_format or body.structured_outputs):
        raise bad_field("ignore_eos", "not with response_format or structured_outputs, which say where the answer ends")
    stop_ids = frozenset() if body.ignore_eos else service.tokenizer.stop_ids
    return SamplingOptions(
        max_new_tokens=min(longest or most, service.context),
        stop_ids=stop_ids | frozenset(body.stop_token_ids or ()),
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        seed=service.next_seed() if body.seed is None else body.seed,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        logit_bias=bias,
        logprobs=logprobs,
    )


def _own(options: SamplingOptions, place: int, grammar: Grammar | None) -> SamplingOptions:
    """The options of one of several answers: a seed and a state of the grammar of its own."""
    return replace(options, seed=own_seed(options.seed, place), mask=grammar.begin() if grammar else None)
