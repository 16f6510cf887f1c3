"""The options of `thimble chat`."""

from dataclasses import dataclass
from typing import ClassVar

from thimble.config.groups import AdapterListOptions
from thimble.config.options import option
from thimble.config.values import above, at_least


@dataclass(frozen=True)
class ChatConfig(AdapterListOptions):
    """The options of `thimble chat`."""

    group: ClassVar[str] = "answers"

    system: str | None = option(None, "System prompt; default: the template's own.", metavar="TEXT")
    prompt: str | None = option(None, "Answer this once and leave, instead of talking.", metavar="TEXT")
    temperature: float = option(0.7, "Sampling temperature; 0 always takes the likeliest token.", check=at_least(0))
    top_p: float = option(0.95, "Sample from the likeliest tokens that make up this share.", check=above(0))
    max_new_tokens: int = option(512, "Longest answer, in tokens.", check=at_least(1))
