"""`thimble inspect`: what is in a base or an adapter, what two adapters share, what inits make of some data."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from thimble.config.inspect_ import InspectConfig
from thimble.errors import ConfigError, Problems, listing
from thimble.events import EventLog, OnEvent, ShouldStop, ignore, never
from thimble.models.base import Base
from thimble.models.inspection import InitShares, Overlap, Spectrum, Update
from thimble.models.survey import by_movement, grouped, summary
from thimble.report.figures import figure_files, write_figures
from thimble.training.init_shares import measure_init_shares, plan_measurement
from thimble.training.run_folder import check_folder
from thimble.training.subject import measure_subject, open_subject

FIGURE_BYTES = 10_000_000  # room that figures are sure not to exceed
NO_FORECAST = "A larger share does not predict which init trains better (docs/math.md has what was measured)."


@dataclass
class InspectReport:
    """What was found, layer by layer and in summary.

    Attributes:
        subject: `base`, `adapter`, `two adapters` or `inits`.
        names: What was inspected.
        base: Name of the base; empty if none was needed.
        num_blocks: Blocks that it has.
        blocks: Of these, the ones whose weights were decomposed.
        dtypes: Parameters of the base by dtype.
        spectra: One a weight, of a base.
        updates: One a layer, of an adapter.
        overlaps: One a layer that both of two adapters have.
        inits: One a layer: the share of its gradient that the A of some inits capture.
        by_kind: Means over the layers of a kind; a cosine is that of all their updates taken together, a share that of
            all their gradients.
        by_block: Means over the layers of a block.
        overall: Means over all layers.
        moved: Layers that an adapter moved, by relative norm, the furthest first.
        unmoved: Layers whose update is zero.
        skipped: Weights of which nothing can be said, and why.
        only_in: Layers that only one of two adapters has, by its name.
        figures: Files that were drawn.
        remark: What must not be read into the figures.
        seconds: Time it took.
        messages: Decisions, notes and warnings.
    """

    subject: str
    names: list[str]
    base: str = ""
    num_blocks: int = 0
    blocks: list[int] = field(default_factory=list)
    dtypes: dict[str, int] = field(default_factory=dict)
    spectra: list[Spectrum] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    overlaps: list[Overlap] = field(default_factory=list)
    inits: list[InitShares] = field(default_factory=list)
    by_kind: dict[str, dict[str, float]] = field(default_factory=dict)
    by_block: dict[str, dict[str, float]] = field(default_factory=dict)
    overall: dict[str, float] = field(default_factory=dict)
    moved: list[str] = field(default_factory=list)
    unmoved: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    only_in: dict[str, list[str]] = field(default_factory=dict)
    figures: list[str] = field(default_factory=list)
    remark: str = ""
    seconds: float = 0.0
    messages: dict[str, list[str]] = field(default_factory=dict)


def inspect(config: InspectConfig, on_event: OnEvent = ignore, should_stop: ShouldStop = never) -> InspectReport:
    """Look into a base, an adapter or two adapters, one weight at a time; or measure what inits make of some data."""
    log, began = EventLog(on_event), time.perf_counter()
    report = _inspect_inits(config, log) if config.data is not None else _inspect_subject(config, log, should_stop)
    rows = report.spectra or report.updates or report.overlaps or report.inits
    report.by_kind, report.by_block, report.overall = grouped(rows, "kind"), grouped(rows, "block"), summary(rows)
    if config.out and rows:
        log.stage("drawing")
        report.figures = write_figures(Path(config.out), asdict(report))
        if not report.figures:
            log.warning("no figure was drawn: there is nothing in the blocks to show")
    report.seconds, report.messages = time.perf_counter() - began, log.messages
    return report


def _inspect_subject(config: InspectConfig, log: EventLog, should_stop: ShouldStop) -> InspectReport:
    """Measure the layers of a base, of an adapter or of two adapters."""
    log.stage("opening what was named")
    problems = Problems(config.problems)
    subject = open_subject(config, problems, log)
    if config.out is not None:
        problems.attempt(_check_out, config.out, subject.kind)
    problems.required()
    if subject.kind == "adapter" and subject.adapters[0].has_magnitudes:
        log.note("the magnitudes of DoRA are left out of account, except in the count of intruders")
    rows, skipped = measure_subject(subject, log, should_stop)
    moved, unmoved = by_movement(rows)
    found: dict[str, Any] = {_FIELDS[subject.kind]: rows, **(_described(subject.base) if subject.base else {})}
    return InspectReport(
        subject.kind, subject.names, blocks=subject.blocks, moved=moved, unmoved=unmoved, skipped=skipped,
        only_in=subject.only_in(), **found,
    )  # fmt: skip


_FIELDS = {"base": "spectra", "adapter": "updates", "two adapters": "overlaps"}


def _described(base: Base) -> dict[str, Any]:
    return {"base": base.name, "num_blocks": base.spec.num_layers, "dtypes": base.dtypes()}


def _inspect_inits(config: InspectConfig, log: EventLog) -> InspectReport:
    """Measure what share of the gradient of some data each init captures."""
    run_plan = plan_measurement(config, log)
    shares, about = measure_init_shares(run_plan, log), _described(run_plan.model.base)
    return InspectReport("inits", [config.data or ""], inits=shares, remark=NO_FORECAST, **about)


def _check_out(out: str, kind: str) -> None:
    check_folder(Path(out), is_resumed=True, needed_bytes=FIGURE_BYTES)
    there = [name for name in figure_files(kind) if (Path(out) / name).exists()]
    if there:
        raise ConfigError(f"--out is {out}, which holds {listing(there)}: name another folder, or take them away")
