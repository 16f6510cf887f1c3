"""What finished adapters on modules say of rows: measured for `evaluate`, or line by line for `generate`."""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from thimble.config.evaluate import EvaluateConfig
from thimble.config.generate import GenerateConfig
from thimble.config.train import unused
from thimble.data.examples import log_skipped
from thimble.data.sentences import EMBED
from thimble.errors import AdapterError, ConfigError, Problems, RunError, listing, plural
from thimble.events import EventLog, ShouldStop
from thimble.files.atomic import write_atomic
from thimble.training.answers import write_answers
from thimble.training.control import Control
from thimble.training.module_adapter import Trained, read_trained
from thimble.training.module_use import UsedModule, as_train_config, open_used
from thimble.training.protocols import Scores
from thimble.training.run_folder import make_folder
from thimble.training.tasks.kinds import KINDS
from thimble.training.tasks.module_task import ModuleTask, are_alike, cut
from thimble.training.tasks.reading import VALID, TaskRows, Telling
from thimble.training.watch import Watch


def measure_adapters(
    config: EvaluateConfig, log: EventLog, should_stop: ShouldStop
) -> tuple[UsedModule, dict[str, Scores]]:
    """Measure adapters of one task on the same rows, and first what they are compared with.

    Given are the last module that was opened, and the scores by name: of `base`, or of the frozen model with a trained
    head where the run folder still has that head, and of each adapter.
    """
    problems = Problems(config.problems)
    trained = [found for path in config.adapter or ("",) if (found := _read(path, config, problems, log))]
    rows = problems.attempt(_rows, trained, config, True) if trained and len(trained) >= len(config.adapter) else None
    (rows,) = problems.required(rows)
    _log_rows(rows, log)
    scores: dict[str, Scores] = {}
    for one in trained:
        if should_stop():
            break
        used = open_used(one, rows, as_train_config(config, one), log)
        task, control = ModuleTask(used.reading, Watch(), used.base.name), Control(log, should_stop)
        names = {one.path: used.session.load(one.adapter)}
        if not scores and used.compared_with:
            names = {used.compared_with: used.session.load(None), **names}
        elif not scores:
            why = (
                "the base has no head for these classes" if one.is_of_peft
                else "the head that was fitted before training is not there (it lies in start/ of the run folder)"
            )  # fmt: skip
            log.note(f"{why}: the adapter is measured alone")
        for name, active in names.items():
            log.stage(f"measuring {name}")
            scores[name] = task.evaluate(used.session, active, used.execution, control)
    return used, scores


def predictions(
    config: GenerateConfig, log: EventLog, should_stop: ShouldStop
) -> tuple[UsedModule, Iterator[dict[str, Any]]]:
    """The adapter that is asked, and a line for each row, as they are ready."""
    problems = Problems(config.problems)
    trained = _read(next(iter(config.adapter), ""), config, problems, log)
    rows = problems.attempt(_rows, [trained], config, False) if trained else None
    ends = (".jsonl", ".npy") if trained and trained.task == EMBED else (".jsonl",)
    if config.out and not config.out.endswith(ends):
        arrays = ", or in .npy for an array of embeddings alone" if len(ends) > 1 else ""
        problems.add(
            f"--out {config.out}: predictions are written as JSON lines; name a file that ends in .jsonl{arrays}"
        )
    if config.resume:
        problems.add("--resume: predictions are made anew, which takes a pass over the rows; leave it out")
    trained, rows = problems.required(trained, rows)
    _log_rows(rows, log)
    used = open_used(trained, rows, as_train_config(config, trained), log)
    if not isinstance(used.reading, Telling):
        raise ConfigError(
            f"adapter {trained.path} is for {trained.task}, which says nothing of single rows: thimble evaluate "
            "measures how well they are told apart"
        )
    return used, _lines(used, used.reading, log, should_stop)


def write_predictions(
    path: str, lines: Sequence[Mapping[str, Any]], errors: Sequence[Mapping[str, Any]], log: EventLog
) -> None:
    """Write lines as JSON, and behind them those of rows that cannot be used; or of a file in .npy the embeddings
    alone, as an array float32 (rows, width) of numpy.
    """
    if not path.endswith(".npy"):
        write_answers(path, [*lines, *errors], log)
        return
    made = io.BytesIO()
    np.save(made, np.array([line["embedding"] for line in lines], np.float32))
    try:
        make_folder(Path(path).absolute().parent)
        write_atomic(Path(path), [made.getbuffer()])
    except OSError as error:
        raise RunError(f"the embeddings cannot be written to {path} ({error.strerror or error})") from None


def _lines(used: UsedModule, telling: Telling, log: EventLog, should_stop: ShouldStop) -> Iterator[dict[str, Any]]:
    reading, session, execution, done = used.reading, used.session, used.execution, 0
    active = session.load(used.trained.adapter)
    log.stage(f"asking about {plural(len(reading.valid_costs), 'row')}")
    parts = cut(range(len(reading.valid_costs)), reading.valid_costs, execution.micro_tokens, are_alike(reading))
    for numbers in parts:
        if should_stop():
            return
        batch = reading.batch(VALID, numbers, None)
        outputs = [row for made in session.outputs(active, iter([batch]), execution) for row in made]
        yield from telling.lines(outputs, numbers)
        done += len(numbers)
        log.progress("rows answered,", done, len(reading.valid_costs))


def _read(path: str, config: EvaluateConfig | GenerateConfig, problems: Problems, log: EventLog) -> Trained | None:
    return problems.attempt(read_trained, path, config.task, config.base, log)


def _rows(trained: list[Trained], config: EvaluateConfig | GenerateConfig, needs_answers: bool) -> TaskRows:
    """The rows that adapters are asked about, which have to be for one task, with the same labels."""
    kinds = {(one.task, one.classes) for one in trained}
    if len(kinds) > 1:
        tasks = listing(f"{one.path} ({one.task}, {plural(len(one.classes.names), 'label')})" for one in trained)
        raise AdapterError(f"the adapters are for different tasks or labels: {tasks}; measure them one by one")
    if not config.data:
        raise ConfigError(
            "no data is given: name a file or folder, as in: thimble evaluate pictures/ --adapter runs/mine-1"
        )
    first = trained[0]
    if problems := unused(config, first.task):
        raise ConfigError(*problems)
    return KINDS[first.task].measured_rows(as_train_config(config, first), first.classes, needs_answers)


def _log_rows(rows: TaskRows, log: EventLog) -> None:
    for note in rows.told:
        log.note(note)
    log_skipped(rows.skipped, log)
    for warning in rows.warnings:
        log.warning(warning)
