"""One answer while it is written: from tokens to text, calls and log-probabilities, as they may go out."""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from thimble.data.tokenizer import Tokenizer
from thimble.inference.request import Token
from thimble.inference.sampling import LogProbs
from thimble.inference.text_stream import TextStream
from thimble.server.stop_text import StopText
from thimble.server.tool_calls import Call, CallReader


class Place(NamedTuple):
    """A token that is told with its log-probability."""

    id: int
    log_probs: LogProbs | None  # None of the first token of a prompt, which nothing stands before
    offset: int  # of its text in the answer, in characters


class Echo(NamedTuple):
    """A prompt that is told before the answer, with the log-probabilities of its tokens."""

    ids: Sequence[int]
    text: str


class Delta(NamedTuple):
    """What came to an answer."""

    text: str = ""
    calls: Sequence[Call] = ()
    places: Sequence[Place] = ()
    finish: str | None = None  # as in the OpenAI API, with its end


class Answer:
    """Turns the tokens of one answer into what may go out.

    Args:
        tokenizer: Of the base.
        stops: Texts that end it; neither they nor their beginnings go out.
        calls: Finds calls of tools in it, if it may have any.
        echo: Stands before it, with log-probabilities; a token that ends the answer is told with them, too.
        is_empty: Whether nothing but the echo is wanted.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], calls: CallReader | None = None, echo: Echo | None = None,
        is_empty: bool = False,
    ) -> None:  # fmt: skip
        self._stream, self._stop, self._calls = TextStream(tokenizer), StopText(stops), calls
        self._echo, self._is_empty, self._tokenizer = echo, is_empty, tokenizer
        self._written = self._released = 0  # characters that the tokens made, and those of them that may go out
        self._places: deque[Place] = deque()
        self.tokens = 0
        self.finish: str | None = None

    def take(self, token: Token) -> Delta:
        """Take the next token; the answer is over once `finish` is set."""
        before = _echoed(self._echo, token.prompt, self._tokenizer) if self._echo and token.prompt is not None else []
        if self._is_empty:
            self.finish = "length"
            return Delta("", [], before, self.finish)
        delta = self._taken(token)
        return delta._replace(places=[*before, *delta.places])

    def _taken(self, token: Token) -> Delta:
        piece = ""
        if token.id is not None:
            self.tokens += 1
            if token.logprobs is not None:
                self._places.append(Place(token.id, token.logprobs, self._written))
            piece = self._stream.add(token.id)
        elif self._echo and token.logprobs is not None and token.stopped_by is not None:
            self._places.append(Place(token.stopped_by, token.logprobs, self._written))
        piece += self._stream.end() if token.finish else ""
        self._written += len(piece)
        text = self._stop.add(piece)
        self.finish = "stop" if self._stop.is_stopped else token.finish
        text += self._stop.end() if self.finish else ""
        self._released += len(text)
        places = self._places_out()
        calls: list[Call] = []
        if self._calls:
            text, calls = self._read_calls(self._calls, text)
        return Delta(text, calls, places, self.finish)

    def _read_calls(self, reader: CallReader, text: str) -> tuple[str, list[Call]]:
        text, calls = reader.add(text)
        if reader.is_over:
            self.finish = self.finish or "stop"
        if self.finish:
            rest, more = reader.end()
            text, calls = text + rest, calls + more
        if self.finish == "stop" and reader.count:
            self.finish = "tool_calls"
        return text, calls

    def _places_out(self) -> list[Place]:
        """Tokens whose text goes out, at least in part; at the end also those that made none."""
        out, begin = [], len(self._echo.text) if self._echo else 0
        is_whole = self.finish is not None and self._released == self._written
        while self._places and (is_whole or self._places[0].offset < self._released):
            place = self._places.popleft()
            out.append(place._replace(offset=begin + place.offset))
        return out


def _echoed(echo: Echo, log_probs: Sequence[LogProbs], tokenizer: Tokenizer) -> list[Place]:
    """The tokens of a prompt, with those behind the first as the model thought of them."""
    stream, offset, places = TextStream(tokenizer), 0, []
    for token, found in zip(echo.ids, [None, *log_probs], strict=True):
        places.append(Place(token, found, offset))
        offset = min(offset + len(stream.add(token)), len(echo.text))
    return places


def chat_log_probs(places: Sequence[Place], tokenizer: Tokenizer) -> dict[str, Any]:
    """As chat completions tell them."""

    def told(token: int, value: float) -> dict[str, Any]:
        data = tokenizer.piece_bytes(token)
        return {"token": data.decode(errors="replace"), "logprob": value, "bytes": list(data)}

    content = [
        {
            **told(place.id, place.log_probs.chosen),
            "top_logprobs": [told(token, value) for token, value in place.log_probs.top],
        }
        for place in places
        if place.log_probs
    ]
    return {"content": content, "refusal": None}


def completion_log_probs(places: Sequence[Place], tokenizer: Tokenizer) -> dict[str, Any]:
    """As completions tell them: the token itself is among the likeliest, too, even if it is none of them."""

    def likeliest(place: Place, found: LogProbs) -> dict[str, float]:
        return {tokenizer.piece(token): value for token, value in (*found.top, (place.id, found.chosen))}

    return {
        "tokens": [tokenizer.piece(place.id) for place in places],
        "token_logprobs": [place.log_probs and place.log_probs.chosen for place in places],
        "top_logprobs": [place.log_probs and likeliest(place, place.log_probs) for place in places],
        "text_offset": [place.offset for place in places],
    }  # fmt: skip
