"""How the run that trained an adapter made its prompts: columns named there, which others need not name again."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from thimble.config.groups import COLUMNS, ColumnOptions
from thimble.config.sources import CONFIG_FILE, build_config
from thimble.config.train import TrainConfig
from thimble.config.values import read_template
from thimble.data.columns import typed_option
from thimble.errors import ConfigError


def columns_of_run(config: ColumnOptions, adapters: Sequence[str]) -> TrainConfig | None:
    """The options of the run that trained the last adapter, if columns were named there and none are named now."""
    return None if not adapters or any(getattr(config, name) for name in COLUMNS) else run_with_columns(adapters[-1])


def run_with_columns(adapter: str) -> TrainConfig | None:
    """The options of the run that trained an adapter, if columns were named there."""
    place = Path(adapter)
    run = next((folder for folder in (place, place.parent) if (folder / CONFIG_FILE).is_file()), None)
    with contextlib.suppress(ConfigError):  # beside an adapter anything may lie
        found = build_config(TrainConfig, {}, str(run / CONFIG_FILE)) if run else None
        return found if found and any(getattr(found, name) for name in COLUMNS) else None
    return None


def typed_columns(run: ColumnOptions) -> str:
    """The options that name its columns, as they are typed."""
    return " ".join(typed_option(name, getattr(run, name)) for name in COLUMNS if getattr(run, name))


def turn_form(run: ColumnOptions) -> Callable[[str], str] | None:
    """What writes one text into the prompt template of a run; None if it takes more than one text, or there is none.

    >>> turn_form(ColumnOptions(prompt_template="Ticket: {body}", completion_column="label"))("it broke")
    'Ticket: it broke'
    """
    pieces = read_template(run.prompt_template)
    if len({name for _, name in pieces if name}) != 1:
        return None
    return lambda text: "".join(before + (text if name else "") for before, name in pieces)
