"""From records to token ids and labels. Knows the tokenizer and the template of a base, but no framework."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from thimble.data.context import Context, fit
from thimble.data.encode_notes import context_warnings_of, notes_of, warnings_of
from thimble.data.marks import MARKERS, first_mark, is_written
from thimble.data.messages import answers, has_tools
from thimble.data.rows import Record
from thimble.data.template import ChatTemplate, Message, Renderings
from thimble.data.tokenizer import Tokenizer
from thimble.data.turns import Piece, Turns
from thimble.errors import BaseModelError, DataError

IGNORED = -100  # label of a position at which nothing is learned
Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Row:
    """One encoded example."""

    ids: Ids  # int32 (T,), token ids
    labels: Ids  # int32 (T,), already shifted: labels[t] is ids[t + 1] if that is to be learned, else `IGNORED`
    source: str  # where the example came from
    truncated_tokens: int = 0  # how many tokens were cut off

    @property
    def target_tokens(self) -> int:
        """How many positions carry a label."""
        return int(np.count_nonzero(self.labels != IGNORED))


class Question(NamedTuple):
    """What to ask a model, and what it should answer."""

    ids: Ids
    reference: str


class Encoder:
    """Turns records into rows for one base."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        seq_len: int,
        loss_on: str = "auto",
        vocab_size: int | None = None,
        context_tokens: int | None = None,
    ) -> None:
        """Prepare to encode.

        Args:
            tokenizer: Of the base.
            template: Of the base, or None if it has none.
            seq_len: Longest row, in tokens.
            loss_on: "completions" (all assistant turns), "all", or "auto": all for plain text, else completions.
            vocab_size: Tokens the base knows: some tokenizers have marks beyond, such as those for pictures.
            context_tokens: Most tokens of a question and its answer; None sets no limit.
        """
        self._tokenizer = tokenizer
        self._template = template
        self._seq_len = seq_len
        self._loss_on = loss_on
        self._vocab_size = math.inf if vocab_size is None else vocab_size
        self._context = None if context_tokens is None else Context(context_tokens, context_tokens)
        self._seen: Counter[str] = Counter()
        self._first_marks: dict[str, str] = {}
        stops = [text for text, index in tokenizer.special_tokens.items() if index in tokenizer.stop_ids]
        self._marks = {*MARKERS, *tokenizer.special_tokens}
        self._turns = Turns(template, tokenizer.special_tokens, stops, tokenizer.eos_token) if template else None
        if template:
            template.start()

    def ask(self, record: Record) -> Renderings | None:
        """Have the template write, in the background, what `encode` reads; None if it reads nothing."""
        is_written = self._turns is not None and record.text is None
        return self._turns.ask(record.messages or (), record.tools) if is_written else None

    def encode(self, record: Record, written: Renderings | None = None) -> list[Row]:
        """Encode one record, by what `ask` gave for it if it was asked ahead; a DataError if the template refuses it.

        A record is one row; a text longer than `seq_len` is as many as it takes, each beginning with the last token of
        the one before, so that every token is learned once.
        """
        rows = self._text_rows(record) if record.text is not None else [self._chat_row(record, written)]
        self._seen["beyond"] += sum(self._context is not None and len(row.ids) > self._context.tokens for row in rows)
        return rows

    def _chat_row(self, record: Record, written: Renderings | None) -> Row:
        pieces, has_all = self._pieces(record, written)
        self._count(record, has_all)
        self._count_unwritten(record, has_all, "".join(piece.text for piece in pieces))
        ids, learned = self._tokens(pieces)
        if self._loss_on == "all":
            self._seen["overruled"] += any(turn.get("weight") == 0 for turn in record.messages or ())
            learned = [True] * len(ids)
        self._check(record, ids, learned)
        return self._fit(ids, learned, record.source)

    def question(self, record: Record) -> Question | None:
        """The question whose answer is the last assistant turn, as the training row begins.

        Without its oldest turns if it is longer than the context; None if it is still, and for plain text.
        """
        question = None if record.text is not None else self._question(record)
        if question is None or self._context is None or len(question.ids) <= self._context.prompt_tokens:
            return question
        try:
            return self._question(self._fitted(record, self._context))
        except DataError:
            self._seen["unanswerable"] += 1
            return None

    def _fitted(self, record: Record, context: Context) -> Record:
        """A record without the oldest turns of its question; a DataError if that is too long even so."""
        messages = record.messages or ()
        last = max(
            index for index, turn in enumerate(messages) if turn["role"] == "assistant" and turn.get("weight", 1)
        )

        def shortened(kept: Sequence[Message]) -> Record:
            return replace(record, messages=(*map(dict, kept), *messages[last:]))

        def count(kept: Sequence[Message]) -> int:
            question = self._question(shortened(kept))
            return len(question.ids) if question else 0

        kept, left_out = fit(messages[:last], context, count)
        self._seen["shortened"] += bool(left_out)
        return shortened(kept)

    def _question(self, record: Record) -> Question | None:
        pieces, _ = self._pieces(record)
        last = max((index for index, piece in enumerate(pieces) if piece.is_learned), default=0)
        while last and pieces[last - 1].is_learned:
            last -= 1  # an end that the template did not write stands in a piece of its own
        if not last:
            return None
        ids, _ = self._tokens(pieces[:last])
        reference = pieces[last].text
        return Question(np.asarray(ids, np.int32), self._turns.bare(reference) if self._turns else reference)

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, told: Mapping[str, Any] | None = None
    ) -> Ids:
        """Encode a conversation that waits for an answer, exactly as the training rows begin: int32 (T,).

        The chat template is `told` variables by their names; a DataError if it does not read one.
        """
        ids, _ = self._tokens(self._require_turns().prompt(messages, tools, told or {}))
        return np.asarray(ids, np.int32)

    def opening(self, record: Record) -> Ids:
        """Encode a record that waits for its answer: int32 (T,). What is to be continued as plain text stays bare."""
        if record.text is None and (self._template is not None or record.prompt is None):
            return self.prompt(record.messages or (), record.tools)
        ids, _ = self._tokens([Piece(record.prompt or "" if record.text is None else record.text, False)])
        return np.asarray(ids, np.int32)

    @property
    def notes(self) -> list[str]:
        """What the user should know about how the records encoded so far were written."""
        return notes_of(self._seen, self._first_marks, self._template, self._loss_on)

    @property
    def warnings(self) -> list[str]:
        """What may spoil what is learned from the records encoded so far."""
        return warnings_of(self._seen, self._first_marks)

    @property
    def context_warnings(self) -> list[str]:
        """What became of rows and questions that are longer than the context."""
        return context_warnings_of(self._seen, self._context.tokens) if self._context else []

    def _check(self, record: Record, ids: Sequence[int], learned: Sequence[bool]) -> None:
        """Count whether the record has been through a template before, and whether its answer has an end."""
        texts = (message.get("content") or "" for message in record.messages or ())
        if mark := first_mark(texts, self._marks):
            self._count_mark("marked", mark, record)
        last = next(itertools.compress(reversed(ids), reversed(learned)), None)
        self._seen["open"] += last is not None and last not in self._tokenizer.stop_ids

    def _count_mark(self, seen: str, mark: str, record: Record) -> None:
        self._first_marks.setdefault(seen, f"{mark} in {record.source}")
        self._seen[seen] += 1

    def _pieces(self, record: Record, written: Renderings | None = None) -> tuple[list[Piece], bool]:
        if self._template is None and record.completion is not None:
            end = self._tokenizer.eos_token
            joined = [Piece(record.prompt or "", False), Piece(record.completion, True)]
            return joined + [Piece(end, True)] * bool(end), True
        return self._require_turns().cut(record.messages or (), record.tools, written)

    def _count(self, record: Record, has_all: bool) -> None:
        """Remember what was met, for the notes."""
        if self._template is None:
            self._seen["raw"] += 1
            self._seen["glued"] += (record.prompt or "")[-1:].isalnum() and (record.completion or "")[:1].isalnum()
            return
        messages = record.messages or ()
        uses_tools = has_tools(messages, record.tools)
        has_system = any(turn["role"] == "system" for turn in messages)
        writes_tools = uses_tools and not self._template.knows_tools(record.tools)
        self._seen["chat"] += 1
        self._seen["tools as text"] += writes_tools
        self._seen["with system"] += has_system
        self._seen["with marks"] += any(messages[index].get("weight") == 0 for index in answers(messages))
        self._seen["without system"] += not has_system and not writes_tools
        self._seen["last only"] += not has_all

    def _count_unwritten(self, record: Record, has_all: bool, text: str) -> None:
        """Count whether the template leaves out what messages hold beside their content."""
        messages = record.messages or ()
        learned = [index for index in answers(messages) if messages[index].get("weight", 1)]
        thoughts = (messages[index].get("reasoning_content") for index in (learned if has_all else learned[-1:]))
        self._seen["without thoughts"] += any(said.strip() not in text for said in thoughts if said)
        named = (turn.get("name") for turn in messages if turn["role"] != "tool")
        self._seen["without names"] += any(str(name) not in text for name in named if name)
        said = (turn for turn in messages[: learned[-1] + 1 if learned else 0] if turn["role"] != "tool")
        self._seen["unwritten"] += not all(is_written(turn.get("content") or "", text) for turn in said)
        self._seen["goes on"] += bool(learned) and learned[-1] + 1 < len(messages)

    def _require_turns(self) -> Turns:
        if self._turns is None:
            raise BaseModelError(
                "the base has no chat template, so conversations cannot be written for it: give rows with prompt and "
                "completion, or with text, or use a base with a chat template (an instruct model)."
            )
        return self._turns

    def _tokens(self, pieces: Sequence[Piece]) -> tuple[list[int], list[bool]]:
        encoded = self._tokenizer.encode_pieces([piece.text for piece in pieces])
        ids = self._known([index for part in encoded for index in part])
        learned = [piece.is_learned for piece, part in zip(pieces, encoded, strict=True) for _ in part]
        if self._begins_bare(ids):
            return [self._tokenizer.bos_id or 0, *ids], [False, *learned]
        return ids, learned

    def _known(self, ids: list[int]) -> list[int]:
        """Refuse tokens that the base has no numbers for."""
        last = max(ids, default=0)
        if last >= self._vocab_size:
            raise DataError(
                f'the text holds "{self._tokenizer.piece(last)}", token {last:,}, which the base does not know (it has '
                f"{self._vocab_size:,}): take it out of the text"
            )
        return ids

    def _begins_bare(self, ids: Sequence[int]) -> bool:
        return self._tokenizer.add_bos and list(ids[:1]) != [self._tokenizer.bos_id]

    def _fit(self, ids: list[int], learned: list[bool], source: str) -> Row:
        """Cut a row to `seq_len`: from the right, or from the left if nothing to learn would be left."""
        length = self._seq_len
        if len(ids) <= length:
            return _row(ids, learned, source, 0)
        if any(learned[1:length]) or not any(learned):
            return _row(ids[:length], learned[:length], source, len(ids) - length)
        end = len(learned) - learned[::-1].index(True)
        head = [ids[0]] if self._tokenizer.add_bos else []  # models that expect bos do badly without it
        start = end - length + len(head)
        kept, kept_learned = head + ids[start:end], [False] * len(head) + learned[start:end]
        return _row(kept, kept_learned, source, len(ids) - len(kept))

    def _text_rows(self, record: Record) -> list[Row]:
        self._seen["text"] += 1
        if mark := first_mark([record.text or ""], MARKERS):
            is_other = self._template is not None and mark not in self._template.source
            self._count_mark("marked otherwise" if is_other else "marked as here", mark, record)
        ids = self._known(self._tokenizer.encode(record.text or ""))
        eos = self._tokenizer.eos_id
        ids += [eos] if eos is not None and ids[-1:] != [eos] else []
        head = [self._tokenizer.bos_id or 0] if self._begins_bare(ids) else []
        is_learned = self._loss_on != "completions"
        if len(head) + len(ids) <= self._seq_len:
            ids = head + ids
            return [_row(ids, [is_learned] * len(ids), record.source, 0)]
        first = self._seq_len - len(head)
        step = first - 1
        rows = []
        for start in range(0, len(ids) - 1, step):
            part = head + ids[start : start + first]
            learned = [is_learned] * len(part)
            if start and head:
                learned[1] = False  # this token was learned at the end of the piece before
            rows.append(_row(part, learned, record.source, 0))
        return rows


def _row(ids: list[int], learned: list[bool], source: str, truncated_tokens: int) -> Row:
    targets = [token if is_learned else IGNORED for token, is_learned in zip(ids[1:], learned[1:], strict=True)]
    labels = np.asarray([*targets, IGNORED][: len(ids)], np.int32)
    return Row(np.asarray(ids, np.int32), labels, source, truncated_tokens)
