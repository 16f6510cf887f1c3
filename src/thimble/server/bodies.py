"""What requests may hold: fields of OpenAI, with some of vLLM and llama.cpp. Any other is refused, none is ignored.

Names for the client's own records (`user`, `metadata`, `safety_identifier`, `prompt_cache_key`) change nothing, nor
does what OpenAI's client adds to a message that it was given (`parsed`, `index`). A field that is null is one that is
not there, known or not: clients write out all that they have.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from thimble.core.method import MOST_SCALE

MOST_CHOICES = 16
MOST_STOPS, LONGEST_STOP = 16, 256  # strings, characters
MOST_LOGPROBS = 20
MOST_PROMPTS = 64
INT64 = 2**63
ENDLESS = -1  # as many tokens as there is room for, as llama.cpp and LM Studio say it

Token = Annotated[int, Field(ge=0, lt=2**31)]


def _kind_of(*kinds: tuple[str, Callable[[Any], bool]]) -> Discriminator:
    """Tells which of several forms a value has, so that a problem is told of that form alone; else the last one."""
    return Discriminator(lambda value: next((tag for tag, is_it in kinds[:-1] if is_it(value)), kinds[-1][0]))


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and bool(value) and isinstance(value[0], kind)


class Body(BaseModel):
    """The root of every request: unknown fields, and values that would have to be converted, are refused."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=False,
        json_schema_extra={"additionalProperties": {"type": "null"}},
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        """What is given, without unknown fields that are null."""
        if not isinstance(value, dict):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {name: inner for name, inner in value.items() if inner is not None or name in known}


# ---- conversations ---------------------------------------------------------------------------------------------------


class TextPart(Body):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: str
    cache_control: Any = Field(None, description="Nothing: what begins as an earlier request is not read again anyway.")


Variables = Annotated[dict[str, Any], Field(max_length=16)]

Content = Annotated[
    Annotated[list[TextPart], Tag("parts")] | Annotated[str, Tag("text")],
    _kind_of(("parts", _is_list), ("text", bool)),
]


class CalledFunction(Body):
    """A function and the arguments it was called with."""

    name: str
    arguments: str = "{}"
    parsed_arguments: Any = Field(None, description="What a client made of the arguments.")


class ToolCall(Body):
    """A call that an assistant message made."""

    id: str | None = None
    index: int | None = Field(None, description="The place that it had in a stream.")
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One message; what an answer of the server holds can be sent back as it is."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = Field(None, description="As vLLM calls reasoning_content.")
    parsed: Any = Field(None, description="What a client made of the content.")
    refusal: None = None
    annotations: None | Annotated[list[Any], Field(max_length=0)] = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls: only an assistant message has them, not one of the {self.role}")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError(f"tool_call_id: only a tool message has it, not one of the {self.role}")
        if self.content is None and not self.tool_calls:
            raise ValueError("content: this field is required")
        return self

    @property
    def text(self) -> str:
        """Its content, parts joined."""
        parts = self.content or ""
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)


class Function(Body):
    """A function that may be called."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool that may be called."""

    type: Literal["function"]
    function: Function
    cache_control: Any = Field(None, description="Nothing, as in the parts of a message.")


class FunctionName(Body):
    """A function by its name."""

    name: str


class NamedTool(Body):
    """The tool that has to be called."""

    type: Literal["function"] = "function"
    function: FunctionName


ToolChoice = Annotated[
    Annotated[NamedTool, Tag("named")] | Annotated[Literal["none", "auto", "required"], Tag("word")],
    _kind_of(("named", lambda value: isinstance(value, dict)), ("word", bool)),
]


# ---- how an answer is written ----------------------------------------------------------------------------------------


class JsonSchema(Body):
    """A schema that the answer follows."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: expected with the type json_schema, and with no other")
        return self


class StructuredOutputs(Body):
    """The form of the answer as vLLM asks for it: one of these."""

    json_: dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = Field(None, max_length=10_000)
    choice: Annotated[list[str], Field(min_length=1, max_length=1000)] | None = None
    grammar: str | None = Field(None, max_length=100_000, description="In Lark's notation or llama.cpp's GBNF.")

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if sum(value is not None for value in (self.json_, self.regex, self.choice, self.grammar)) != 1:
            raise ValueError("expected one of json, regex, choice and grammar")
        return self


class LoraScale(Body):
    """An adapter with its weight, as in llama.cpp; 0 leaves it out."""

    id: Annotated[
        Annotated[int, Field(ge=0), Tag("number")] | Annotated[str, Tag("name")],
        _kind_of(("number", lambda value: isinstance(value, int)), ("name", bool)),
    ] = Field(description="Its name, or its place in the list of adapters of /v1/models, counted from 0.")
    scale: float = Field(1.0, ge=-MOST_SCALE, le=MOST_SCALE)


class StreamOptions(Body):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = Field(None, description="No event is padded.")


Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]


def _some_tokens(value: int) -> int:
    if not value:
        raise ValueError(f"expected at least 1, or {ENDLESS} for no limit")
    return value


MostTokens = Annotated[int, Field(ge=ENDLESS), AfterValidator(_some_tokens)]


class Generation(Body):
    """What chat and completions have in common."""

    model: str | None = Field(None, description="The base or an adapter, by its name; default: the base.")
    max_tokens: MostTokens | None = Field(None, description=f"{ENDLESS} sets no limit but the context.")
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1 set no limit.")
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stop: (
        Annotated[
            Annotated[list[Stop], Field(max_length=MOST_STOPS), Tag("several")] | Annotated[Stop, Tag("one")],
            _kind_of(("several", _is_list), ("one", bool)),
        ]
        | None
    ) = None
    stop_token_ids: list[Token] | None = Field(None, max_length=MOST_STOPS)
    ignore_eos: bool | None = None
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)  # what it makes of a logit stays finite
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Literal[False] | None = Field(None, description="Nothing is stored.")
    service_tier: Literal["auto", "default"] | None = None
    lora: list[LoraScale] | None = Field(None, max_length=16)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @field_validator("logit_bias")
    @classmethod
    def _are_tokens(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or ():
            if not (key.isascii() and key.isdigit() and len(key) <= 10):
                raise ValueError(f"expected token ids as keys, got {key[:40]!r}")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options: only with stream")
        is_formed = self.response_format is not None and self.response_format.type != "text"
        if is_formed and self.structured_outputs:
            raise ValueError("structured_outputs: not with response_format")
        return self

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatBody(Generation):
    """A request for the next message of a conversation."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: MostTokens | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: Variables | None = Field(None, description="What the chat template is told, by name.")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="How long to think before the answer; none: not at all."
    )
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None

    @model_validator(mode="after")
    def _is_chat(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs")
        is_free = self.tool_choice in (None, "none") or (self.tool_choice == "auto" and self.tools is not None)
        if not is_free and not self.tools:
            raise ValueError("tool_choice: only with tools")
        if isinstance(self.tool_choice, NamedTool):
            names = [tool.function.name for tool in self.tools or ()]
            if self.tool_choice.function.name not in names:
                raise ValueError(f"tool_choice: expected one of {', '.join(names)}")
        return self


class CompletionBody(Generation):
    """A request for the continuation of texts."""

    prompt: Annotated[
        Annotated[
            list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=MOST_PROMPTS),
            Tag("lists of tokens"),
        ]
        | Annotated[list[Token], Tag("tokens")]
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS), Tag("texts")]
        | Annotated[str, Tag("text")],
        _kind_of(
            ("lists of tokens", _is_list_of(list)), ("tokens", _is_list_of(int)), ("texts", _is_list), ("text", bool)
        ),
    ]  # fmt: skip
    max_tokens: int | None = Field(None, ge=ENDLESS, description=f"{ENDLESS} sets no limit; 0 only with echo.")
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool | None = Field(None, description="The prompt stands before the answer; with logprobs, so do its own.")
    best_of: int | None = Field(None, description="Only as large as n: nothing is thrown away.")
    suffix: Literal[""] | None = Field(None, description="Nothing is written between two texts.")

    @model_validator(mode="after")
    def _is_completion(self) -> Self:
        if self.best_of not in (None, self.n or 1):
            raise ValueError(f"best_of: expected {self.n or 1}, as many as n")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError(f"max_tokens: expected at least 1, {ENDLESS} for no limit, or 0 with echo")
        return self

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Each prompt, as text or as tokens."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


# ---- the other routes ------------------------------------------------------------------------------------------------


class TokenizeBody(Body):
    """A text or a conversation to be cut into tokens, as in vLLM."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[Tool] | None = Field(None, max_length=128)
    chat_template_kwargs: Variables | None = Field(None, description="What the chat template is told, by name.")
    add_special_tokens: bool = Field(True, description="Whether a prompt begins with the token the base expects first.")
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: expected a prompt or messages")
        if self.tools and self.messages is None:
            raise ValueError("tools: only with messages")
        if self.chat_template_kwargs and self.messages is None:
            raise ValueError("chat_template_kwargs: only with messages")
        return self


class DetokenizeBody(Body):
    """Tokens to be joined to a text."""

    model: str | None = None
    tokens: list[Token]


class LoadAdapterBody(Body):
    """An adapter to be served from now on, as in vLLM."""

    lora_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    lora_path: str = Field(max_length=4096, pattern=r"^[^\x00]+$", description="A folder or a GGUF file of the server.")
    load_inplace: bool = Field(False, description="Whether it may take the place of the one that has its name.")


class UnloadAdapterBody(Body):
    """An adapter that is served no longer."""

    lora_name: str
