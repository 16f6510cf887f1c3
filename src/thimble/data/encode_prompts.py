"""All prompts to token ids that leave room for an answer, kept in a file without a name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from thimble.data.context import Context, check_length, fit
from thimble.data.encode import Encoder, Ids
from thimble.data.messages import Message
from thimble.data.prompts import Prompt
from thimble.data.records import Skipped
from thimble.data.rows import Record
from thimble.data.spool import Items, Spool
from thimble.errors import DataError, plural


class Encoded(NamedTuple):
    """A prompt as the model reads it."""

    row: int
    left_out: int  # messages that are too old for the context
    ids: Ids  # int32 (T,)


@dataclass
class EncodedPrompts:
    """What can be answered, and what cannot."""

    items: Spool[Encoded] = field(default_factory=lambda: Spool(_packed, _unpacked))
    problems: dict[int, str] = field(default_factory=dict)  # row to why it cannot be answered
    shortened: list[str] = field(default_factory=list)  # sources of conversations without their oldest turns
    crowded: list[str] = field(default_factory=list)  # sources of prompts with less room than the longest answer needs

    def warnings(self, context: Context) -> list[str]:
        """What the user should know about prompts that come near the context."""
        limit, warnings = f"the context of the base ({context.tokens:,} tokens)", []
        if self.shortened:
            warnings.append(
                f"{plural(len(self.shortened), 'conversation')} longer than {limit}: answered without the oldest "
                f"turns, first {self.shortened[0]}"
            )
        if self.crowded:
            warnings.append(
                f"{plural(len(self.crowded), 'prompt')} with room for fewer than --max-new-tokens "
                f"{context.answer_tokens} behind {'it' if len(self.crowded) == 1 else 'them'} in {limit}: there the "
                f"answers end with the context, first {self.crowded[0]}"
            )
        return warnings


def encode_prompts(
    prompts: Items[Prompt],
    encoder: Encoder,
    context: Context,
    system: str | None,
    skipped: Skipped,
    on_row: Callable[[int, int], None],
) -> EncodedPrompts:
    """Encode prompts; what the template refuses, and what fills the context alone, is noted in `skipped`.

    `system` is put in front of conversations without a system message. `on_row` is told how many are done, of how many.
    """
    encoded = EncodedPrompts()
    for done, prompt in enumerate(prompts, start=1):
        if prompt.record is None:
            encoded.problems[prompt.row] = prompt.problem
        else:
            _add(prompt, _with_system(prompt.record, system), encoder, context, skipped, encoded)
        on_row(done, len(prompts))
    return encoded


def _add(
    prompt: Prompt, record: Record, encoder: Encoder, context: Context, skipped: Skipped, encoded: EncodedPrompts
) -> None:
    try:
        ids, left_out = encoder.opening(record), 0
        if record.messages and len(ids) > context.prompt_tokens:
            ids, left_out = _fitted(record, record.messages, encoder, context)
        check_length(len(ids), context.tokens)
    except DataError as error:
        skipped.add(prompt.source, *error.problems)
        encoded.problems[prompt.row] = "; ".join(error.problems)
        return
    encoded.shortened += [prompt.source] * bool(left_out)
    encoded.crowded += [prompt.source] * (len(ids) + context.answer_tokens > context.tokens)
    encoded.items.append(Encoded(prompt.row, left_out, ids))


def _fitted(record: Record, messages: Sequence[Message], encoder: Encoder, context: Context) -> tuple[Ids, int]:
    """The ids of a conversation without its oldest turns, and how many messages they are."""

    def ids_of(kept: Sequence[Message]) -> Ids:
        return encoder.opening(replace(record, messages=tuple(map(dict, kept))))

    kept, left_out = fit(messages, context, lambda part: len(ids_of(part)))
    return ids_of(kept), left_out


def _with_system(record: Record, system: str | None) -> Record:
    messages = record.messages or ()
    if not system or not messages or messages[0]["role"] == "system":
        return record
    return replace(record, messages=({"role": "system", "content": system}, *messages))


def _packed(encoded: Encoded) -> bytes:
    head = np.array([encoded.row, encoded.left_out], np.int64)
    return head.tobytes() + np.asarray(encoded.ids, np.int32).tobytes()


def _unpacked(packed: bytes) -> Encoded:
    row, left_out = np.frombuffer(packed[:16], np.int64).tolist()
    return Encoded(row, left_out, np.frombuffer(packed[16:], np.int32))
