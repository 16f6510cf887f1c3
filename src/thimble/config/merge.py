"""The options of `thimble merge`."""

from dataclasses import dataclass
from typing import ClassVar

from thimble.config.options import Options, option
from thimble.config.values import WHOLE_PATH, at_least, share


@dataclass(frozen=True)
class MergeConfig(Options):
    """The options of `thimble merge`."""

    group: ClassVar[str] = "merge"

    adapter: tuple[str, ...] = option((), "Adapter folders, or the run folders that hold them; several are added up.",
        positional=True, path=WHOLE_PATH, metavar="ADAPTER")  # fmt: skip
    base: str | None = option(None, "Base to merge into: a Hugging Face folder or a hub name; with --truncate or "
        "--rank it is only checked that the adapters fit it.", path=WHOLE_PATH, metavar="BASE")  # fmt: skip
    out: str = option("", "Folder to write; it must not exist yet, or be empty.", path=WHOLE_PATH, metavar="DIR")
    truncate: float | None = option(None, "Write a smaller adapter: each layer keeps the smallest rank that holds this "
        "share of its update's energy (squared singular values), such as 0.99; 1 drops only what is zero. Without it, "
        "and without --rank, the adapter is merged into the base.", check=share, metavar="SHARE")  # fmt: skip
    rank: int | None = option(None, "Write a smaller adapter: the most rank any layer keeps.", check=at_least(1))
