"""A planned run on a module, carried out: the head is fitted to the frozen module, then the loop trains both."""

import json
import os
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble import __version__
from thimble.core.adapter import Adapter
from thimble.core.logistic import fit_probe
from thimble.errors import plural
from thimble.files.peft import load_adapter
from thimble.files.peft_config import MODEL_CLASS, PARENT_LIBRARY
from thimble.models.adapter_base import FUNCTION, LABELS, PREPROCESSING, TASK, base_notes
from thimble.models.hub_cache import hub_name_of
from thimble.training.control import Control
from thimble.training.module_plan import ModulePlan
from thimble.training.run_folder import START
from thimble.training.tasks.module_task import are_alike, cut, noting_labels
from thimble.training.tasks.reading import TRAIN, read_ahead

MOST_PROBE_ROWS = 20_000  # that a head is fitted to


def initial_adapter(plan: ModulePlan, control: Control) -> Adapter:
    """A and B before the first step, with the head that was fitted to the frozen module."""
    saved = plan.folder / START
    if plan.checkpoint and saved.is_dir():
        plan.opened.session.set_whole(load_adapter(saved).replaced)
    elif plan.kind.has_head:
        _fit_head(plan, control)
    adapter = plan.opened.session.fresh_adapter()
    settings = adapter.settings | _peft_settings(plan)
    return replace(adapter, base=_peft_name(plan), notes=notes_of(plan), settings=settings)


def _peft_settings(plan: ModulePlan) -> dict[str, Any]:
    """What tells PEFT's auto classes how to open the base: its word for the task, or where it has none the class."""
    if plan.opened.base.function:
        return {}
    library, _, name = plan.opened.base.module_class.rpartition(".")
    mapping = None if plan.kind.peft_type else {MODEL_CLASS: name, PARENT_LIBRARY: library}
    return {"task_type": plan.kind.peft_type, "auto_mapping": mapping}


def notes_of(plan: ModulePlan) -> dict[str, str]:
    """What Thimble needs to use the adapter again, beside what PEFT keeps."""
    config = plan.config
    notes = {"thimble_version": __version__, "init": config.init, TASK: config.task}
    notes |= {LABELS: json.dumps(list(plan.rows.labels), ensure_ascii=False)} if plan.rows.labels else {}
    notes |= {FUNCTION: plan.opened.base.function} if plan.opened.base.function else {}
    inputs = json.dumps(dict(plan.reading.preprocessing), sort_keys=True)
    return {**notes, PREPROCESSING: inputs, **base_notes(plan.origin["base"])}


def _peft_name(plan: ModulePlan) -> str:
    """What `base_model_name_or_path` says: the hub name or folder that PEFT opens; the file of a user's function."""
    base = plan.opened.base
    return hub_name_of(base.path) or os.path.abspath(base.path)


def _fit_head(plan: ModulePlan, control: Control) -> None:
    """Fit the head to what comes to it from the frozen module: the model that LoRA is measured against."""
    session, reading, labels = plan.opened.session, plan.reading, plan.rows.labels
    control.log.stage("fitting a head to the frozen model")
    count = len(reading.costs)
    rows = range(count) if count <= MOST_PROBE_ROWS else np.linspace(0, count - 1, MOST_PROBE_ROWS).astype(int).tolist()
    found, classes = list[NDArray[Any]](), list[int]()
    order = sorted(rows, key=lambda row: -reading.costs[row])
    parts = cut(order, reading.costs, plan.execution.micro_tokens, are_alike(reading))
    batches = read_ahead(reading, TRAIN, parts)
    for made in session.head_inputs(noting_labels(batches, classes), plan.execution):
        found.append(made)
        control.log.progress("running training rows through it, row", sum(map(len, found)), len(rows))
    probe = fit_probe(np.concatenate(found), np.array(classes, np.int64), len(labels))
    session.set_head(probe.weight, probe.bias)
    control.log.decision(
        f"head: a logistic regression on {plural(len(rows), 'training row')} of the frozen model (L2 "
        f"{probe.penalty:g}); it is what LoRA is compared with, and is trained with it from there"
    )
