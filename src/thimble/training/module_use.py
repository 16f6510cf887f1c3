"""A finished adapter on a module, opened for use: what it was trained for stands in its notes, and in PEFT's folder."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from thimble.backends.module_session import ModuleSession
from thimble.backends.open import open_used_module
from thimble.config.groups import ColumnOptions
from thimble.config.train import TrainConfig
from thimble.core.adapter import Adapter
from thimble.data.model import find_module_base
from thimble.errors import AdapterError, InputError, listing
from thimble.events import EventLog
from thimble.files.peft import WEIGHTS_FILE, find_adapter, load_adapter
from thimble.files.tensors import open_tensors
from thimble.models.adapter_base import (
    FINGERPRINT,
    FUNCTION,
    NAME_IT,
    PREPROCESSING,
    TASK,
    labels_of,
    manifest_base,
)
from thimble.models.execution import ExecutionPlan
from thimble.models.module_base import ModuleBase
from thimble.training.run_folder import START
from thimble.training.tasks.kinds import KINDS, TaskKind
from thimble.training.tasks.reading import Reading, TaskRows

_AS_OPTIONS = {"max_seconds": "max_seconds", "language": "language", "max_tokens": "seq_len"}  # of inputs
PASS_ROWS = 32  # of the costliest kind, run together


@dataclass(frozen=True)
class Trained:
    """An adapter as its folder says what it is for."""

    path: str  # as the user gave it
    adapter: Adapter
    task: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class UsedModule:
    """A module with a finished adapter on it, and the rows it is asked about."""

    trained: Trained
    base: ModuleBase
    session: ModuleSession
    rows: TaskRows
    reading: Reading
    has_first_head: bool  # whether the bare base has the head that was fitted before training

    @property
    def kind(self) -> TaskKind:
        """Its task."""
        return KINDS[self.trained.task]

    @property
    def execution(self) -> ExecutionPlan:
        """How rows are run: a few of the costliest at a time."""
        size = PASS_ROWS * max(self.reading.valid_costs, default=1)
        return ExecutionPlan("dense", 1, size, size)


def task_of(path: str) -> str:
    """The task of an adapter, by its notes; empty for one that is of text, or cannot be read."""
    try:
        return str(open_tensors(find_adapter(path) / WEIGHTS_FILE).metadata.get(TASK, ""))  # the header alone is read
    except (InputError, OSError, ValueError):
        return ""


def is_of_module(paths: Sequence[str]) -> bool:
    """Whether adapters are of another task than text."""
    return any(task_of(path) in KINDS for path in paths)


def read_trained(path: str) -> Trained:
    """An adapter with its notes; an AdapterError if they are damaged."""
    adapter = load_adapter(path)
    task = adapter.notes.get(TASK, "")
    if task not in KINDS:
        raise AdapterError(f"adapter {path} is for {task or 'text'!r}: expected one of {listing(KINDS, 9)}")
    labels = labels_of(adapter)
    if labels is None:
        raise AdapterError(f"adapter {path} has damaged labels in the notes of its tensor file: copy it again")
    return Trained(path, adapter, task, labels)


def open_used(trained: Trained, named: str | None, rows: TaskRows, config: TrainConfig, log: EventLog) -> UsedModule:
    """Open the base of an adapter, put it on, and make the reading of the rows as in training; see `open_trained`."""
    session, base, has_first_head = open_trained(trained, named, log)
    reading = rows.reading(_as_trained(base, trained.adapter), config)
    return UsedModule(trained, base, session, rows, reading, has_first_head)


def open_trained(trained: Trained, named: str | None, log: EventLog) -> tuple[ModuleSession, ModuleBase, bool]:
    """Open the base of an adapter and put it on.

    Args:
        trained: The adapter.
        named: The base that the user names; None takes the one that the adapter was trained on.
        log: Takes which base that is, and a warning if it has other weights.

    Returns:
        The module, its base, and whether the bare base has the head that was fitted before training.

    Raises:
        InputError: If the base is not found, or the adapter does not fit it.
    """
    path, adapter = trained.path, trained.adapter
    base = find_module_base(named or _place_of(path, adapter), trained.task)
    first = find_adapter(path).parent / START
    head = load_adapter(first).replaced if first.is_dir() and adapter.replaced else {}
    fits = all(
        name in adapter.replaced and adapter.replaced[name].shape == values.shape for name, values in head.items()
    )
    kind = KINDS[trained.task]
    session, base = open_used_module(base, trained.task, kind.loss, trained.labels, adapter, head if fits else {})
    wanted = adapter.notes.get(FINGERPRINT)
    if wanted and base.quick_fingerprint() != wanted:
        log.warning(
            f"adapter {path} was trained on {base.name} with other weights (hash {wanted[:12]}): an update does harm "
            "on any other model than its own"
        )
    return session, base, bool(head) and fits


def _as_trained(base: ModuleBase, adapter: Adapter) -> ModuleBase:
    """The base with the inputs that the adapter was trained on."""
    return replace(base, preprocessing={**base.preprocessing, **_said(adapter)})


def _said(adapter: Adapter) -> dict[str, Any]:
    """How inputs were made in training, as the adapter carries it."""
    try:
        said = json.loads(adapter.notes.get(PREPROCESSING, "{}"))
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _place_of(path: str, adapter: Adapter) -> str:
    """Where the base of an adapter lies: where it was, or beside the run folder that was moved with it."""
    manifest, run = manifest_base(find_adapter(path).parent), find_adapter(path).parent
    beside = manifest.get("path_from_run")
    places = [manifest.get("path"), os.path.normpath(run / beside) if isinstance(beside, str) else None, adapter.base]
    function = adapter.notes.get(FUNCTION, "")
    for place in places:
        if isinstance(place, str) and place and os.path.lexists(place):
            return f"{place}:{function}" if function and place.endswith(".py") else place
    if adapter.base and not os.path.isabs(adapter.base) and not Path(adapter.base).suffix:
        return adapter.base  # a hub name
    raise AdapterError(
        f"the base of adapter {path}, {adapter.base or 'which it does not name'}, is not found: {NAME_IT}"
    )


def as_train_config(config: ColumnOptions, trained: Trained) -> TrainConfig:
    """The options that rows are read by, for a command that trains nothing."""
    names = ("data", "prompt_column", "completion_column", "prompt_template", "text_column", "strict", "seed")
    values = {name: getattr(config, name) for name in names if getattr(config, name, None)}
    said = _said(trained.adapter)
    values |= {
        name: said[noted] for noted, name in _AS_OPTIONS.items() if isinstance(said.get(noted), int | float | str)
    }
    return TrainConfig.build({**values, "task": trained.task})
