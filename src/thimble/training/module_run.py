"""A planned run on a module, carried out: the head is fitted to the frozen module, then the loop trains both."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble import __version__
from thimble.backends.module_session import ModuleBatch
from thimble.core.adapter import Adapter
from thimble.core.logistic import fit_probe
from thimble.core.method import Init, parse_init
from thimble.core.targets import Size
from thimble.errors import plural
from thimble.files.peft import load_adapter, named_for_peft
from thimble.files.peft_config import MODEL_CLASS, PARENT_LIBRARY
from thimble.models.adapter_base import FUNCTION, LABELS, PREPROCESSING, TASK, base_notes
from thimble.models.hub_cache import hub_name_of
from thimble.training.calibration import Calibration, CalibrationData
from thimble.training.control import Control
from thimble.training.initialise import make_adapter
from thimble.training.module_plan import ModulePlan
from thimble.training.run_folder import START
from thimble.training.tasks.module_task import are_alike, cut, noting_labels
from thimble.training.tasks.reading import TRAIN, read_ahead

FOUND_ON = ("inputs", "gradients")  # needs of inits that training rows are run for
MOST_PROBE_ROWS = 20_000  # that a head is fitted to


def initial_adapter(plan: ModulePlan, control: Control) -> Adapter:
    """A and B before the first step, with the head that was fitted to the frozen module."""
    saved = plan.folder / START
    init = parse_init(plan.config.init)
    if plan.checkpoint and saved.is_dir():
        begun = load_adapter(saved)
        plan.opened.session.set_whole(begun.replaced)
        if init.needs in FOUND_ON:
            plan.opened.session.restart(replace(begun, origin=begun.layers if init.is_delta else {}))
    else:
        if plan.kind.has_head:
            _fit_head(plan, control)
        if init.needs in FOUND_ON:
            _find_start(init, plan, control)
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


def _find_start(init: Init, plan: ModulePlan, control: Control) -> None:
    """Find A and B on training rows of the first steps, at the frozen module with its fitted head."""
    began, session, reading, config = time.perf_counter(), plan.opened.session, plan.reading, plan.config

    def batches(rows: Sequence[int], most: int) -> list[ModuleBatch]:
        order = sorted(rows, key=lambda row: -reading.costs[row])
        # Texts to be written are filled up with tokens that no mask tells apart: each clip stands alone.
        parts = [[row] for row in order] if plan.kind.loss == "tokens" else cut(
            order, reading.costs, most, are_alike(reading)
        )  # fmt: skip
        return [reading.batch(TRAIN, part, None) for part in parts]

    shapes = {layer.path: layer.shape for layer in session.layers}
    data = CalibrationData.of_steps(
        range(len(reading.costs)), plan.step_schedule.rows, config.calibration_steps, general_rows=(),
        execution=plan.execution, shapes=shapes, seed=config.seed, cut=batches,
    )  # fmt: skip
    first = named_for_peft(session.fresh_adapter())
    sizes = {path: Size(first[path].rank, first[path].scale) for path in shapes}
    found = make_adapter(init, sizes, Calibration(data, session, control.log))
    session.restart(replace(found, origin=found.layers if init.is_delta else {}))
    control.log.note(f"init {init} took {time.perf_counter() - began:.1f} s")


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
    probe = fit_probe(np.concatenate(found), np.array(classes, np.int64), len(labels), plan.class_weights)
    session.set_head(probe.weight, probe.bias)
    control.log.decision(
        f"head: a logistic regression on {plural(len(rows), 'training row')} of the frozen model (L2 "
        f"{probe.penalty:g}); it is what LoRA is compared with, and is trained with it from there"
    )
