"""A finished adapter on a module, opened for use, with the rows it is asked about."""

import json
from dataclasses import dataclass, replace
from typing import Any

from thimble.backends.module_session import ModuleSession
from thimble.backends.open import open_used_module
from thimble.config.evaluate import EvaluateConfig
from thimble.config.generate import GenerateConfig
from thimble.config.train import TrainConfig
from thimble.core.adapter import Adapter
from thimble.events import EventLog
from thimble.files.peft import find_adapter, load_adapter
from thimble.models.adapter_base import FINGERPRINT, PREPROCESSING
from thimble.models.execution import ExecutionPlan
from thimble.models.module_base import AS_BASE, ModuleBase
from thimble.report.words import FROZEN_WITH_HEAD
from thimble.training.module_adapter import Trained
from thimble.training.run_folder import START
from thimble.training.tasks.kinds import KINDS, TaskKind
from thimble.training.tasks.reading import Reading, TaskRows, warnings_of

_AS_OPTIONS = {"max_seconds": "max_seconds", "language": "language", "max_tokens": "seq_len"}  # of inputs
PASS_ROWS = 32  # of the costliest kind, run together


@dataclass(frozen=True)
class UsedModule:
    """A module with a finished adapter on it, and the rows it is asked about."""

    trained: Trained
    base: ModuleBase
    session: ModuleSession
    rows: TaskRows
    reading: Reading
    compared_with: str  # what the bare module is called; empty if it cannot be measured beside the adapter

    @property
    def kind(self) -> TaskKind:
        """Its task."""
        return KINDS[self.trained.task]

    @property
    def execution(self) -> ExecutionPlan:
        """How rows are run: a few of the costliest at a time."""
        size = PASS_ROWS * max(self.reading.valid_costs, default=1)
        return ExecutionPlan("dense", 1, size, size)


def open_used(trained: Trained, rows: TaskRows, config: TrainConfig, log: EventLog) -> UsedModule:
    """Open the base of an adapter, put it on, and make the reading of the rows as in training; see `open_trained`."""
    session, base, compared_with = open_trained(trained, log, config.store)
    reading = rows.reading(_as_trained(base, trained), config)
    for warning in warnings_of(reading):
        log.warning(warning)
    return UsedModule(trained, base, session, rows, reading, compared_with)


def open_trained(trained: Trained, log: EventLog, store: str = "auto") -> tuple[ModuleSession, ModuleBase, str]:
    """Open the base of an adapter and put it on.

    Args:
        trained: The adapter.
        log: Takes a warning if the base has other weights than the one that the adapter was trained on.
        store: How frozen weights are kept: int8, else float32.

    Returns:
        The module, its base, and what the bare module is to be called beside the adapter: of classes, empty if it has
        not the head that was fitted before training, nor one of its own.

    Raises:
        InputError: If the adapter does not fit the base.
    """
    path, adapter, kind = trained.path, trained.adapter, KINDS[trained.task]
    first = find_adapter(path).parent / START
    head = load_adapter(first).replaced if first.is_dir() and adapter.replaced else {}
    fits = all(
        name in adapter.replaced and adapter.replaced[name].shape == values.shape for name, values in head.items()
    )
    head = head if fits else {}
    session, base, drawn = open_used_module(
        trained.base, trained.task, kind.loss, trained.classes.names, adapter, head, store
    )
    wanted = adapter.notes.get(FINGERPRINT)
    if wanted and base.quick_fingerprint() != wanted:
        log.warning(
            f"adapter {path} was trained on {base.name} with other weights (hash {wanted[:12]}): an update does harm "
            "on any other model than its own"
        )
    is_whole = not kind.has_head or (trained.is_of_peft and not drawn and not base.function)
    return session, base, FROZEN_WITH_HEAD if head else "base" if is_whole else ""


def _as_trained(base: ModuleBase, trained: Trained) -> ModuleBase:
    """The base with the inputs that the adapter was trained on."""
    said = {AS_BASE: True} if trained.is_of_peft else _said(trained.adapter)
    return replace(base, preprocessing={**base.preprocessing, **said})


def _said(adapter: Adapter) -> dict[str, Any]:
    """How inputs were made in training, as the adapter carries it."""
    try:
        said = json.loads(adapter.notes.get(PREPROCESSING, "{}"))
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def as_train_config(config: EvaluateConfig | GenerateConfig, trained: Trained) -> TrainConfig:
    """The options that rows are read by, for a command that trains nothing."""
    names = ("data", "prompt_column", "completion_column", "prompt_template", "text_column", "strict", "seed", "store")
    values = {name: getattr(config, name) for name in names if getattr(config, name, None)}
    said = _said(trained.adapter)
    values |= {
        name: said[noted] for noted, name in _AS_OPTIONS.items() if isinstance(said.get(noted), int | float | str)
    }
    values["max_new_tokens"] = config.max_new_tokens
    if config.language:
        values["language"] = config.language
    return TrainConfig.build({**values, "task": trained.task})
