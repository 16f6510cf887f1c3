"""The options of `thimble inspect`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from thimble.config.groups import COLUMNS, BaseOptions, ColumnOptions
from thimble.config.options import option
from thimble.config.values import WHOLE_PATH, flag


@dataclass(frozen=True)
class InspectConfig(BaseOptions, ColumnOptions):
    """The options of `thimble inspect`."""

    group: ClassVar[str] = "inspection"

    path: str | None = option(None, "What to look into: an adapter or run folder, or a base; default: the base.",
        positional=True, path=WHOLE_PATH, metavar="PATH")  # fmt: skip
    other: str | None = option(
        None, "A second adapter to compare the first with.", positional=True, path=WHOLE_PATH, metavar="PATH2"
    )
    out: str | None = option(
        None, "Folder to draw figures into, each as PNG and SVG.", path=WHOLE_PATH, metavar="FOLDER"
    )
    blocks: tuple[str, ...] = option((), "Blocks whose weights are decomposed, such as 0,7,15; default: all of a small "
        "base, an even spread of a large one.", metavar="NUMBERS")  # fmt: skip
    data: str | None = option(None, "Examples: report which share of their gradient the A of each init captures, "
        "instead.", path=WHOLE_PATH, metavar="DATA")  # fmt: skip

    @classmethod
    def _conflicts(cls, given: Mapping[str, Any]) -> list[str]:
        columns = [] if given.get("data") else [flag(name) for name in COLUMNS if given.get(name)]
        alone = [f"{' '.join(columns)}: only with --data, whose columns are meant"] if columns else []
        return [*super()._conflicts(given), *alone]
