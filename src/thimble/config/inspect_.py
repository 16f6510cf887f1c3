"""The options of `thimble inspect`."""

from dataclasses import dataclass
from typing import ClassVar

from thimble.config.groups import BaseOptions, ColumnOptions
from thimble.config.options import option


@dataclass(frozen=True)
class InspectConfig(BaseOptions, ColumnOptions):
    """The options of `thimble inspect`."""

    group: ClassVar[str] = "inspection"

    path: str | None = option(None, "What to look into: an adapter or run folder, or a base; default: the base.",
        positional=True, metavar="PATH")  # fmt: skip
    other: str | None = option(None, "A second adapter to compare the first with.", positional=True, metavar="PATH2")
    out: str | None = option(None, "Folder to draw figures into, each as PNG and SVG.", metavar="FOLDER")
    blocks: tuple[str, ...] = option((), "Blocks whose weights are decomposed, such as 0,7,15; default: all of a small "
        "base, an even spread of a large one.", metavar="NUMBERS")  # fmt: skip
    data: str | None = option(None, "Examples: report which share of their gradient the A of each init captures, "
        "instead.", metavar="DATA")  # fmt: skip
