"""What tells that a text has been through a chat template, and whether a template has written a text at all."""

import re
from collections.abc import Collection, Iterable

# How other templates mark turns: text that holds them has been through one already.
MARKERS = (
    "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<|start_header_id|>",
    "<|eot_id|>", "<|user|>", "<|assistant|>", "### Instruction:", "### Response:", "### Human:", "### Assistant:",
)  # fmt: skip
# How thinking begins and ends: generation prompts of some models open it, and an answer without it must close it.
THINKING = (("<think>", "</think>"), ("<|START_THINKING|>", "<|END_THINKING|>"))
_LIKE_MARKS = re.compile(r"<[^<>\s]{1,64}>|\[/?[A-Z_]{2,32}\]|### [A-Z][a-z]+:")  # what is worth looking up


def first_mark(texts: Iterable[str], marks: Collection[str]) -> str:
    """The first of some marks that stands in one of the texts; empty if none does."""
    return next((found for text in texts for found in _LIKE_MARKS.findall(text) if found in marks), "")


def is_written(said: str, text: str) -> bool:
    """Whether what a message says stands in a text, by its first word: templates trim, join and cut thoughts off."""
    for _, closing in THINKING:
        said = said.rpartition(closing)[2]
    words = said.split(maxsplit=1)
    return not words or words[0] in text or words[0].casefold() in text.casefold()
