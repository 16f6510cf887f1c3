"""Which part of a rendered conversation the model is to write: the assistant turns, found by rendering prefixes.

A turn begins where the generation prompt ends, so that what is learned is exactly what is asked for later. Its end is
the token that ends the answer; what the template writes behind that is not learned. Knows text only, no ids.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from os.path import commonprefix
from typing import Any, NamedTuple

from thimble.data.marks import THINKING
from thimble.data.messages import answers
from thimble.data.template import ChatTemplate, Message, Renderings


class Piece(NamedTuple):
    """A part of a text; no token may cross from one piece into the next."""

    text: str
    is_learned: bool


class Turns:
    """Cuts conversations into what is given and what is learned, for one template."""

    def __init__(self, template: ChatTemplate, specials: Collection[str], stops: Collection[str], eos: str) -> None:
        """Prepare to look for the ends of turns, by the texts of all special tokens and of those that end an answer.

        `eos` is written behind the last answer if the template writes no end.
        """
        self._template = template
        self._special = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)")
        self._stops = frozenset(stops)
        self._eos = eos

    def ask(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> Renderings:
        """Have the template write, in the background, all that `cut` reads."""
        end = _end_of_learned(messages) or len(messages)
        learnable = answers(messages[:end]) if _end_of_learned(messages) else []
        return self._template.ask(messages[:end], tools, _wanted((end, False), learnable))

    def cut(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, written: Renderings | None = None
    ) -> tuple[list[Piece], bool]:
        """Cut a conversation behind its last learned turn, into pieces that are given and pieces that are learned.

        Assistant turns of weight 0 are not learned. Also returns whether all others are: if the template writes earlier
        turns differently once others follow (it strips their thinking), only the last one can be.
        """
        written = written or self.ask(messages, tools)
        end = _end_of_learned(messages)
        if not end:
            return [Piece(written.text((len(messages), False)), False)], True
        messages = messages[:end]
        are_learned = [bool(messages[index].get("weight", 1)) for index in answers(messages)]
        text = written.text((end, False))
        spans = self._spans(messages, written, text)
        if spans is None:
            return self._last_turn(messages, written, text), sum(are_learned) == 1
        return self._ended(self._pieces(text[: spans[-1][1]], spans, are_learned)), True

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, variables: Mapping[str, Any]
    ) -> list[Piece]:
        """Cut a conversation that waits for an answer as `cut` does, so that both give the same tokens."""
        wanted = _wanted((len(messages), True), answers(messages))
        return self._prompt(messages, self._template.with_variables(variables).ask(messages, tools, wanted))

    def _prompt(self, messages: Sequence[Message], written: Renderings) -> list[Piece]:
        text = written.text((len(messages), True))
        spans = self._spans(messages, written, text) or []
        return self._pieces(text, spans, [False] * len(spans))

    def bare(self, text: str) -> str:
        """An answer without the tokens that end it."""
        run = self._ending(text)
        return text[: run[0].start()] if run else text

    def _spans(self, messages: Sequence[Message], written: Renderings, text: str) -> list[tuple[int, int]] | None:
        """Begin and end of every assistant turn in the text; None if it does not hold one as the template wrote it."""
        spans = []
        for index in answers(messages):
            before = written.text((index, True))
            is_last = index == len(messages) - 1
            upto = text if is_last else written.text((index + 1, False))
            end = self._end(upto, len(before), text)
            if not upto.startswith(before) or end is None:
                return None
            spans.append((len(before), end))
        return spans

    def _end(self, upto: str, start: int, text: str) -> int | None:
        """Where the turn that begins at `start` ends in the whole text; `upto` is rendered with nothing behind it."""
        run = self._ending(upto[start:])
        if run:
            stop = next((match for match in run if match[0] in self._stops), run[0])
            end = start + stop.end()
            return end if text.startswith(upto[:end]) else None
        if not text.startswith(upto):
            return None
        # Some templates end an answer only where the next turn begins.
        follower = self._special.match(text, len(upto))
        return follower.end() if follower else len(upto)

    def _ending(self, text: str) -> list[re.Match[str]]:
        """The special tokens at the end of a text, with nothing but white space between and behind them."""
        run: list[re.Match[str]] = []
        edge = len(text.rstrip())
        for match in reversed(list(self._special.finditer(text))):
            if match.end() != edge:
                break
            run.insert(0, match)
            edge = len(text[: match.start()].rstrip())
        return run

    def _pieces(self, text: str, spans: list[tuple[int, int]], learned: list[bool]) -> list[Piece]:
        pieces, edge = [], 0
        for (start, end), is_learned in zip(spans, learned, strict=True):
            pieces += [Piece(text[edge:start], False), Piece(text[start:end], is_learned)]
            edge = end
        return [piece for piece in [*pieces, Piece(text[edge:], False)] if piece.text]

    def _ended(self, pieces: list[Piece]) -> list[Piece]:
        """Add the end of the document if the template has not ended the last answer."""
        is_open = not self._ending(pieces[-1].text)
        return [*pieces, Piece(self._eos, True)] if is_open and self._eos else pieces

    def _last_turn(self, messages: Sequence[Message], written: Renderings, whole: str) -> list[Piece]:
        given = self._prompt(messages[:-1], written)
        asked = "".join(piece.text for piece in given)
        if whole.startswith(asked):
            answer = whole[len(asked) :]
        else:
            start = self._start(asked, whole, messages)
            answer = _close_thinking(asked, whole[start:], messages[-1])
        end = self._end(answer, 0, answer)
        return self._ended([*given, Piece(answer[:end], True)])

    def _start(self, asked: str, whole: str, messages: Sequence[Message]) -> int:
        """Where the last answer begins in the whole text, if that does not begin with what is asked.

        The generation prompt may hold more than the turn begins with, such as the opening of a thinking part: then it
        begins behind the last token or line they share. If the message before is still to come there, the template
        wrote that differently too, and the answer is found by its text.
        """
        shared = commonprefix([asked, whole])
        start = max([shared.rfind("\n") + 1, *(match.end() for match in self._special.finditer(shared))])
        said, given = ((message.get("content") or "").strip() for message in (messages[-1], messages[-2]))
        place = max(whole.rfind(said) if said else -1, 0)
        if not given or given not in whole[start:place]:
            return start
        behind, tail = whole.rfind(given, start, place) + len(given), asked.rpartition(given)[2]
        return behind + len(tail) if whole.startswith(tail, behind) else place


def _end_of_learned(messages: Sequence[Message]) -> int:
    """Behind which message nothing is learned any more; 0 if nothing is."""
    learned = [index for index in answers(messages) if messages[index].get("weight", 1)]
    return learned[-1] + 1 if learned else 0


def _wanted(whole: tuple[int, bool], indices: Sequence[int]) -> list[tuple[int, bool]]:
    """What to render: the whole, and what comes before and with each answer."""
    return list(dict.fromkeys([whole, *(part for index in indices for part in ((index, True), (index + 1, False)))]))


def _close_thinking(asked: str, answer: str, message: Message) -> str:
    for opening, closing in THINKING:
        if not asked.rstrip().endswith(opening) or closing in answer:
            continue
        newline = "\n" if asked.endswith("\n") else ""
        thoughts, has_thoughts, said = (message.get("content") or "").partition(closing)
        if not has_thoughts:
            return f"{newline}{closing}{newline * 2}{answer}"
        # The template has cut the thoughts off, but they are what is to be learned.
        thoughts, said = thoughts.strip().removeprefix(opening).strip("\n"), said.strip()
        ending = answer.partition(said)[2] if said else answer
        return f"{thoughts}{newline}{closing}{newline * 2}{said}{ending}"
    return answer
