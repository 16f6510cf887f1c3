"""Answers that follow a JSON schema, a regular expression or a grammar: llguidance says which tokens may come next."""

import functools
import json
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from thimble.data.tokenizer import Tokenizer
from thimble.server.refusal import bad_field

# White space between the parts of JSON: none, a space, or a line break with an indent, so that a weak model cannot go
# on with it for ever.
WHITESPACE = r"(\n[ ]{0,16}|[ ]?)"
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
FORMATS = frozenset("date-time date time duration email hostname ipv4 ipv6 uuid uri".split())  # llguidance has these
_LOOKS_AROUND = re.compile(r"\(\?<?[=!]")
_VALUES = frozenset({"const", "enum", "default", "examples"})  # what stands there is no schema


class Grammars:
    """Makes grammars for the tokens of one base.

    Args:
        tokenizer: Of the base.
        vocab_size: Rows of the head, which may be more than the tokenizer has tokens.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()  # two requests at once shall not both take the second that it takes

    def compile(self, grammar: str, param: str) -> "Grammar":
        """Check a grammar from one of the functions below; a Refusal that blames `param` if it is not valid."""
        with self._lock:
            tokens = self._tokens
        matcher = llguidance.LLMatcher(tokens, grammar, log_level=0)
        if matcher.is_error():
            raise bad_field(param, f"it cannot be followed: {matcher.get_error().strip()}")
        return Grammar(matcher, self._vocab_size)

    @functools.cached_property
    def _tokens(self) -> llguidance.LLTokenizer:
        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size)),
            n_vocab=self._vocab_size,
            eos_token=sorted(self._tokenizer.stop_ids) or None,
        )


class _Vocabulary:
    """A tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.tokens = [self._bytes_of(index) for index in range(vocab_size)]

    def _bytes_of(self, index: int) -> bytes:
        try:
            return self._tokenizer.piece_bytes(index)
        except IndexError:  # a row of the head that no token has
            return b""

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode(errors="replace"), special=False)


class Grammar:
    """A grammar that was checked; each answer has a state of its own in it."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def begin(self) -> "GrammarState":
        """The state before the first token."""
        return GrammarState(self._matcher.deep_copy(), self._vocab_size)


class GrammarState:
    """Where one answer stands in its grammar: the `mask` of its sampler."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size, self._count = matcher, vocab_size, 0

    def __call__(self, written: Sequence[int]) -> NDArray[np.bool_]:
        """Which tokens may follow those written so far, bool (vocabulary,); a ValueError if that takes too much."""
        if len(written) < self._count:
            self._matcher.rollback(self._count - len(written))
        self._matcher.consume_tokens(list(written[self._count :]))
        self._count = len(written)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise ValueError(f"the grammar of the answer: {self._matcher.get_error().strip()}")
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)


def from_json_schema(schema: Mapping[str, Any], param: str, is_strict: bool = True) -> str:
    """The grammar of the JSON that a schema allows; see `for_grammars`."""
    try:
        read = {**for_grammars(schema, is_strict), "x-guidance": schema_options(is_strict)}
        return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(read, ensure_ascii=False, allow_nan=False))
    except ValueError as error:
        raise bad_field(param, f"it is not a JSON schema: {error}") from None


def schema_options(is_strict: bool) -> dict[str, Any]:
    """How llguidance reads a schema: parts of it that no grammar can demand are refused, or else left out."""
    return {"whitespace_pattern": WHITESPACE, "lenient": not is_strict}


def for_grammars(schema: Any, is_strict: bool) -> Any:
    """A schema without formats that demand nothing: to JSON Schema those it does not know are notes, such as `path`.

    Unless it is strict, it is also without patterns that look around, as pydantic writes them for decimal numbers.
    """
    if isinstance(schema, list):
        return [for_grammars(inner, is_strict) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: inner if name in _VALUES else for_grammars(inner, is_strict)
        for name, inner in schema.items()
        if not isinstance(inner, str)
        or not (name == "format" and inner not in FORMATS)
        and not (name == "pattern" and not is_strict and _LOOKS_AROUND.search(inner))
    }


def from_regex(regex: str) -> str:
    """The grammar of a regular expression, as Rust writes them."""
    return llguidance.LLMatcher.grammar_from_regex(regex)


def from_choice(texts: Sequence[str]) -> str:
    """The grammar of some texts."""
    return llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in texts))


def from_text(text: str, param: str) -> str:
    """A grammar in Lark's notation or llama.cpp's GBNF."""
    try:
        return llguidance.grammar_from("grammar", text)
    except Exception as error:  # its own parser raises what it happens to meet
        raise bad_field(param, f"it is neither Lark nor GBNF: {error}") from None
