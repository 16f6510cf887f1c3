"""What a finished adapter on a module is for: its notes say it, or else PEFT's folder and the base that it names.

PEFT keeps no labels, no preprocessing, and of the task its `task_type` alone, or the class that was trained. The rest
is in the folder of the base; what neither says is asked for by name.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thimble.backends.open import class_count, fitting_tasks, openable_tasks
from thimble.config.values import AUTO
from thimble.core.adapter import Adapter
from thimble.data.model import find_module_base
from thimble.errors import AdapterError, ConfigError, InputError, listing
from thimble.events import EventLog
from thimble.files.peft import CONFIG_FILE, WEIGHTS_FILE, find_adapter, load_adapter
from thimble.files.peft_config import MODEL_CLASS, PARENT_LIBRARY, read_adapter_config
from thimble.files.tensors import open_tensors
from thimble.models.adapter_base import FUNCTION, NAME_IT, TASK, labels_of, manifest_base
from thimble.models.hub_cache import cached_snapshot, is_hub_form
from thimble.models.module_base import ModuleBase, is_function
from thimble.training.task_choice import TEXT, base_config, writes_texts
from thimble.training.tasks.kinds import KINDS
from thimble.training.tasks.reading import Classes

# What PEFT's task_type may mean here, as far as the base can be opened for it. It has no word for pictures and sound.
PEFT_TASKS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classify-text", "classify-image", "classify-audio"),
    "FEATURE_EXTRACTION": ("embed",),
    "SEQ_2_SEQ_LM": ("transcribe",),
    "TOKEN_CLS": (),
    "QUESTION_ANS": (),
}


@dataclass(frozen=True)
class Trained:
    """An adapter as its folder says what it is for."""

    path: str  # as the user gave it
    adapter: Adapter
    task: str
    classes: Classes
    base: ModuleBase
    is_of_peft: bool = False  # whether another trainer wrote it, which heard and saw as the base's own extractor does


# ---- whether it is one ----------------------------------------------------------------------------------------------


def is_of_module(paths: Sequence[str], asked: str, named: str | None) -> bool:
    """Whether adapters are of another task than text: by --task and --base, as far as these are given, or by their own.

    An adapter that cannot be read is taken for one of text, where what is wrong with it is told.
    """
    if asked != AUTO or is_function(named):
        return asked != TEXT
    return any(task_of(path) in KINDS or _is_of_module_in_peft(path, named) for path in paths)


def task_of(path: str) -> str:
    """The task of an adapter, by its notes; empty for one without, or that cannot be read."""
    try:
        return str(open_tensors(find_adapter(path) / WEIGHTS_FILE).metadata.get(TASK, ""))  # the header alone is read
    except (InputError, OSError, ValueError):
        return ""


def _is_of_module_in_peft(path: str, named: str | None) -> bool:
    """Whether PEFT's folder is of a model that writes no text: by its task, its class, or what its base is."""
    try:
        config = read_adapter_config(find_adapter(path) / CONFIG_FILE)
    except (InputError, OSError, ValueError):
        return False
    if config.task_type is not None:
        return config.task_type in PEFT_TASKS
    base = base_config(named or str(cached_snapshot(config.base) or config.base))
    if base.get("is_encoder_decoder") is True:
        return True
    if not config.auto_mapping:
        return not writes_texts(base.get("architectures"))
    is_known = config.auto_mapping[PARENT_LIBRARY].startswith("transformers.")  # else a class of somebody's own
    return is_known and not writes_texts([config.auto_mapping[MODEL_CLASS]])


# ---- read -----------------------------------------------------------------------------------------------------------


def read_trained(path: str, asked: str, named: str | None, log: EventLog) -> Trained:
    """An adapter with its task, classes and base.

    Args:
        path: An adapter folder or a run folder.
        asked: The task that the user names, or `auto`.
        named: The base that the user names; None takes the one that the adapter was trained on.
        log: Takes what PEFT's folder left open, and how it was decided.

    Returns:
        The adapter.

    Raises:
        InputError: If notes are damaged, the base is not found, or the task is not known.
    """
    if not path:
        raise ConfigError("no adapter is given: name its folder, or the run folder around it")
    adapter = load_adapter(path)
    base = named or _place_of(path, adapter)
    task = adapter.notes.get(TASK, "")
    if not task:
        return _of_peft(path, adapter, find_module_base(base, asked), asked, log)
    if task not in KINDS:
        raise AdapterError(f"adapter {path} is for {task or 'text'!r}: expected one of {listing(KINDS, 9)}")
    if asked not in (AUTO, task):
        raise ConfigError(f"--task {asked}: adapter {path} was trained for {task}; leave it out")
    labels = labels_of(adapter)
    if labels is None:
        raise AdapterError(f"adapter {path} has damaged labels in the notes of its tensor file: copy it again")
    return Trained(path, adapter, task, Classes(labels), find_module_base(base, task))


def _place_of(path: str, adapter: Adapter) -> str:
    """Where the base of an adapter lies: where it was, beside the run folder that was moved with it, or in the cache of
    the hub, which nothing is fetched into.
    """
    manifest, run = manifest_base(find_adapter(path).parent), find_adapter(path).parent
    beside = manifest.get("path_from_run")
    places = [manifest.get("path"), os.path.normpath(run / beside) if isinstance(beside, str) else None, adapter.base]
    function = adapter.notes.get(FUNCTION, "")
    for place in places:
        if isinstance(place, str) and place and os.path.lexists(place):
            return f"{place}:{function}" if function and place.endswith(".py") else place
    if snapshot := cached_snapshot(adapter.base):
        return str(snapshot)
    fetched = f", as in --base {adapter.base}, which fetches it" if is_hub_form(adapter.base) else ""
    raise AdapterError(
        f"the base of adapter {path}, {adapter.base or 'which it does not name'}, is not found: {NAME_IT}{fetched}"
    )


# ---- of another trainer ---------------------------------------------------------------------------------------------


def _of_peft(path: str, adapter: Adapter, base: ModuleBase, asked: str, log: EventLog) -> Trained:
    """An adapter without notes; what its folder and its base leave open is asked for."""
    if base.function and asked == AUTO:
        raise ConfigError(f"adapter {path} does not say what it is for, nor does a function of your own: add --task")
    classes = dict.fromkeys(KINDS, "") if base.function else openable_tasks(base)
    task = asked if asked != AUTO else _task_in_peft(path, adapter, base, classes)
    if task not in classes:
        raise ConfigError(
            f"--task {task}: base {base.name} is a {base.model_type}, which transformers opens for "
            f"{listing(classes, 9) or 'none of the tasks'}"
        )
    log.decision(f"task: {task}" + (", as asked for" if asked != AUTO else _why(adapter, base, classes[task])))
    if not KINDS[task].has_head:
        return Trained(path, adapter, task, Classes(()), base, is_of_peft=True)
    count = class_count(base, task, adapter)
    labels = _own_labels(base, count)
    names = labels or tuple(f"LABEL_{number}" for number in range(count))
    return Trained(path, adapter, task, Classes(names, bool(labels)), base, is_of_peft=True)


def _task_in_peft(path: str, adapter: Adapter, base: ModuleBase, classes: Mapping[str, str]) -> str:
    """The one task that the folder of an adapter and its base leave; else an error that asks for it."""
    said, mapped = adapter.settings.get("task_type"), adapter.settings.get("auto_mapping")
    if said in PEFT_TASKS:
        found = [task for task in PEFT_TASKS[said] if task in classes]
        what = f"says {said}, which of its base, a {base.model_type}, Thimble does not run"
    elif mapped:
        found = [task for task, name in classes.items() if name == mapped[MODEL_CLASS]]
        what = f"is of a {mapped[MODEL_CLASS]}, which Thimble does not run"
    else:
        found = fitting_tasks(base, classes, adapter)
        what = f"does not say what it is for, and its layers are in {len(found)} classes of its base"
    if len(found) == 1:
        return found[0]
    openable = listing(found or classes, 9)
    hint = f"name it with --task, as one of {openable}" if openable else "thimble.attach(model, adapter=folder) uses it"
    raise AdapterError(f"adapter {path} {what}: {hint}")


def _why(adapter: Adapter, base: ModuleBase, trained: str) -> str:
    """What told the task, as the end of a sentence."""
    said, mapped = adapter.settings.get("task_type"), adapter.settings.get("auto_mapping")
    if said in PEFT_TASKS:
        return f", since PEFT calls it {said} and its base is a {base.model_type}; --task names another"
    return f", since {'it was trained on' if mapped else 'its layers are those of'} a {trained}; --task names another"


def _own_labels(base: ModuleBase, count: int) -> tuple[str, ...]:
    """The labels that a base names in its config, if they are as many and more than numbers; else none."""
    said = base.config.get("id2label")
    labels = tuple(str(said.get(str(number), "")) for number in range(count)) if isinstance(said, Mapping) else ()
    is_named = len(said or ()) == count and all(labels) and any(label != f"LABEL_{n}" for n, label in enumerate(labels))
    return labels if is_named else ()
