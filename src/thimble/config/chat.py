"""The options of `thimble chat`."""

from dataclasses import dataclass
from typing import ClassVar

from thimble.config.groups import AnswerOptions
from thimble.config.options import option
from thimble.config.values import at_least


@dataclass(frozen=True)
class ChatConfig(AnswerOptions):
    """The options of `thimble chat`."""

    group: ClassVar[str] = "answers"

    temperature: float = option(0.7, "Sampling temperature; 0 always takes the likeliest token.", check=at_least(0))
    prompt: str | None = option(None, "Answer this once and leave, instead of talking. Without it each line of a pipe "
        "is a turn of one conversation, and the answers alone are printed.", metavar="TEXT")  # fmt: skip
