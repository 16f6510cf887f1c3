"""`thimble inspect`: what is inside a base, inside an adapter, and what two adapters have in common."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from thimble.config.options import InspectConfig
from thimble.core.adapter import Adapter
from thimble.core.lowrank import Array, Factors
from thimble.data.model import find_base, is_hub_name
from thimble.errors import AdapterError, BaseModelError, ConfigError, Problems, listing, plural
from thimble.events import EventLog, OnEvent, ShouldStop, ignore, never
from thimble.files.peft import CONFIG_FILE, WEIGHTS_FILE
from thimble.models.adapters import open_adapters
from thimble.models.base import Base, Weight
from thimble.models.inspection import (
    Overlap,
    Spectrum,
    Update,
    find_block,
    in_order,
    overlap_of,
    spectrum_of,
    update_of,
)
from thimble.report.figures import figure_files, write_figures
from thimble.training.run_folder import check_folder

MOST_OPERATIONS = 1e12  # about a minute on two cores; a base that takes more has its blocks sampled
LEAST_BLOCKS = 3  # sampled, however large they are
FIGURE_BYTES = 10_000_000  # room that figures are sure not to exceed


@dataclass
class InspectReport:
    """What was found, layer by layer and in summary.

    Attributes:
        subject: `base`, `adapter` or `two adapters`.
        names: What was looked into.
        base: Name of the base; empty if none was needed.
        num_blocks: Blocks that it has.
        blocks: Of these, the ones whose weights were decomposed.
        dtypes: Numbers in the base by type.
        spectra: One a weight, of a base.
        updates: One a layer, of an adapter.
        overlaps: One a layer that both of two adapters have.
        by_kind: Means over the layers of a kind; a cosine is that of all their updates taken together.
        by_block: Means over the layers of a block.
        overall: Means over all layers.
        moved: Layers that an adapter moved, by relative norm, the furthest first.
        unmoved: Layers whose update is zero.
        skipped: Weights of which nothing can be said, and why.
        only_in: Layers that only one of two adapters has, by its name.
        figures: Files that were drawn.
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
    by_kind: dict[str, dict[str, float]] = field(default_factory=dict)
    by_block: dict[str, dict[str, float]] = field(default_factory=dict)
    overall: dict[str, float] = field(default_factory=dict)
    moved: list[str] = field(default_factory=list)
    unmoved: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    only_in: dict[str, list[str]] = field(default_factory=dict)
    figures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    messages: dict[str, list[str]] = field(default_factory=dict)


def inspect(config: InspectConfig, on_event: OnEvent = ignore, should_stop: ShouldStop = never) -> InspectReport:
    """CalibrationData into a base, an adapter or two adapters; reads one weight at a time.

    Args:
        config: The options.
        on_event: Hears of progress.
        should_stop: Asked between layers; what is measured by then is returned.

    Returns:
        The report.

    Raises:
        InputError: With every problem found.
    """
    log = EventLog(on_event)
    began = time.perf_counter()
    subject = _open(config, log)
    report = InspectReport(subject.kind, subject.names)
    if subject.base:
        report.base, report.num_blocks = subject.base.name, subject.base.spec.num_layers
        report.blocks, report.dtypes = subject.blocks, subject.base.dtypes()
    rows = _MEASURES[subject.kind](subject, report, log, should_stop)
    report.by_kind, report.by_block = _grouped(rows, "kind"), _grouped(rows, "block")
    report.overall = _summary(rows)
    if config.out and rows:
        log.stage("drawing")
        report.figures = write_figures(Path(config.out), asdict(report))
        if not report.figures:
            log.warning("no figure was drawn: there is nothing in the blocks to show")
    report.seconds, report.messages = time.perf_counter() - began, log.messages
    return report


# ---- what was named -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Subject:
    """What is looked into, opened and checked: a base, an adapter on a base, or two adapters."""

    kind: str
    names: list[str]
    base: Base | None
    adapters: list[Adapter]
    blocks: list[int]


def _open(config: InspectConfig, log: EventLog) -> _Subject:
    problems = Problems(config.problems)
    log.stage("opening what was named")
    names = [name for name in (config.path, config.other) if name is not None]
    kinds = [problems.attempt(_kind_of, name) for name in names]
    bases, adapters = (
        [name for name, kind in zip(names, kinds, strict=True) if kind == wanted] for wanted in ("base", "adapter")
    )
    problems.add(*_misplaced(config, bases, adapters))
    base = None
    if config.base is not None or bases or (None not in kinds and len(adapters) < 2):
        base = problems.attempt(find_base, bases[0] if bases else config.base)
    opened = open_adapters(adapters, base, problems)
    if opened and base and problems.found and config.base is None and not bases:
        problems.add(f"the base is taken to be {base.name}: name the one that the adapter was trained on with --base")
    if len(opened) == 2:
        problems.attempt(_check_alike, opened)
    kind = "two adapters" if len(adapters) == 2 else "adapter" if adapters else "base"
    problems.attempt(_check_out, config.out, kind)
    blocks = problems.attempt(_choose_blocks, config, base, opened, log) if base and kind != "two adapters" else []
    problems.required()
    shown = [base.name] if kind == "base" and base else adapters
    return _Subject(kind, shown, base, list(opened.values()), blocks or [])


def _kind_of(name: str) -> str:
    """`adapter` or `base`, by the files that are there; a ConfigError if it is neither."""
    place = Path(name)
    if any((folder / CONFIG_FILE).is_file() for folder in (place, place / "adapter")):
        return "adapter"
    if (place / "config.json").is_file() or _is_gguf(place) or is_hub_name(name):
        return "base"
    found = listing(sorted(inner.name for inner in place.iterdir())) or "nothing" if place.is_dir() else ""
    state = f"it holds {found}" if found else "it is another file" if place.exists() else "it does not exist"
    raise ConfigError(
        f"{name} is neither a base nor an adapter: {state}; expected a GGUF file, a Hugging Face folder (config.json "
        f"and safetensors), an adapter folder ({CONFIG_FILE} and {WEIGHTS_FILE}) or the run folder around it"
    )


def _is_gguf(place: Path) -> bool:
    if not place.is_file():
        return False
    with place.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def _misplaced(config: InspectConfig, bases: list[str], adapters: list[str]) -> list[str]:
    """What is wrong with the names taken together."""
    problems = []
    if len(bases) == 2:
        problems.append(f"two bases are given, {bases[0]} and {bases[1]}: name one base, or two adapters")
    if bases and config.base is not None:
        problems.append(f"two bases are given, {bases[0]} and --base {config.base}: name one")
    if bases and adapters:
        problems.append(f"{bases[0]} is a base and {adapters[0]} an adapter: name the base with --base")
    if len(adapters) == 2 and adapters[0] == adapters[1]:
        problems.append(f"{adapters[0]} is named twice: name two adapters to compare")
    if len(adapters) == 2 and config.blocks:
        problems.append("blocks is given with two adapters: leave it out, no weight is decomposed to compare them")
    return problems


def _check_alike(adapters: Mapping[str, Adapter]) -> None:
    """Refuse two adapters that cannot have been trained on one base, or that share no layer."""
    (one, first), (two, second) = adapters.items()
    shared = [layer for layer in first.layers if layer in second.layers]
    shapes = {layer: [_shape(adapter.layers[layer]) for adapter in (first, second)] for layer in shared}
    wrong = [f"{layer} is {a} in one and {b} in the other" for layer, (a, b) in shapes.items() if a != b]
    if not shared:
        raise AdapterError(f"adapters {one} and {two} have no layer in common: there is nothing to compare")
    if wrong:
        raise AdapterError(f"adapters {one} and {two} are of different bases: {listing(wrong, 2)}")


def _shape(factors: Factors) -> tuple[int, int]:
    return factors.B.shape[0], factors.A.shape[1]


def _check_out(out: str | None, kind: str) -> None:
    if out is None:
        return
    check_folder(Path(out), is_resumed=True, needed_bytes=FIGURE_BYTES)
    there = [name for name in figure_files(kind) if (Path(out) / name).exists()]
    if there:
        raise ConfigError(f"out is {out}, which holds {listing(there)}: name another folder, or take them away")


def _choose_blocks(config: InspectConfig, base: Base, adapters: Mapping[str, Adapter], log: EventLog) -> list[int]:
    """The blocks that were asked for; else all, or an even spread of as many as take about a minute."""
    layers = [layer for adapter in adapters.values() for layer in adapter.layers] or list(base.spec.linear_shapes())
    shapes = base.spec.linear_shapes()
    known = sorted({find_block(layer) for layer in layers if layer in shapes} - {None})
    if config.blocks:
        wrong = [name for name in config.blocks if not name.isdecimal() or int(name) not in known]
        if wrong:
            raise ConfigError(f"blocks names {listing(wrong)}: expected some of {listing(known, 40)}")
        return sorted({int(name) for name in config.blocks})
    work = sum(_operations(shapes[layer]) for layer in layers if layer in shapes) * (2 if adapters else 1)
    count = min(len(known), max(LEAST_BLOCKS, int(len(known) * MOST_OPERATIONS / max(work, 1))))
    if count < len(known):
        blocks = sorted({known[round(at)] for at in np.linspace(0, len(known) - 1, count)})
        log.decision(
            f"blocks {listing(blocks, 40)} of {len(known)} are decomposed, an even spread, since all of them would "
            "take long: name others with --blocks"
        )
        return blocks
    return known


def _operations(shape: tuple[int, int]) -> float:
    """Floating-point operations of an SVD by way of the smaller Gram matrix."""
    small, large = sorted(shape)
    return 2.0 * small**2 * large + 9.0 * small**3


# ---- measuring ------------------------------------------------------------------------------------------------------


def _read(layer: str, weight: Weight, report: InspectReport, log: EventLog) -> Array | None:
    """The weight of a layer, float32 (out, in); None, and told, if it has no spectrum."""
    matrix = weight.read()
    weight.release(slice(0, weight.shape[0]))  # a base may be larger than memory
    fault = "holds numbers that are NaN or Inf" if not np.isfinite(matrix).all() else ""
    fault = fault or ("is all zeros" if not matrix.any() else "")
    if not fault:
        return matrix
    report.skipped.append(f"{layer}: its weight {fault}")
    log.warning(f"{layer} of the base {fault}: nothing can be said about it")
    return None


def _look_into_base(
    subject: _Subject, report: InspectReport, log: EventLog, should_stop: ShouldStop
) -> Sequence[Spectrum]:
    assert subject.base
    layers = [layer for layer in subject.base.spec.linear_shapes() if find_block(layer) in subject.blocks]
    log.stage(f"decomposing {plural(len(layers), 'weight')} of {plural(len(subject.blocks), 'block')}")
    for done, layer in enumerate(layers, 1):
        if _is_stopped(should_stop, done, len(layers), log):
            break
        weight = subject.base.weights[f"{layer}.weight"]
        matrix = _read(layer, weight, report, log)
        if matrix is not None:
            report.spectra.append(spectrum_of(layer, matrix, weight))
        log.progress("weights", done, len(layers))
    if len(report.skipped) == len(layers):
        raise BaseModelError(*(f"base {subject.base.name}: {what}" for what in report.skipped))
    return report.spectra


def _is_stopped(should_stop: ShouldStop, done: int, total: int, log: EventLog) -> bool:
    if should_stop():
        log.warning(f"stopped early: {done - 1} of {plural(total, 'layer')} were looked at")
        return True
    return False


def _look_into_adapter(
    subject: _Subject, report: InspectReport, log: EventLog, should_stop: ShouldStop
) -> Sequence[Update]:
    assert subject.base
    layers = subject.adapters[0].layers
    log.stage(f"looking at {plural(len(layers), 'layer')}, beside {plural(len(subject.blocks), 'block')} of the base")
    if any(factors.magnitude is not None for factors in layers.values()):
        log.note("the magnitudes of DoRA are left out of account, except in the count of intruders")
    for done, layer in enumerate(in_order(layers), 1):
        if _is_stopped(should_stop, done, len(layers), log):
            break
        matrix = _read(layer, subject.base.weights[f"{layer}.weight"], report, log)
        report.updates.append(update_of(layer, layers[layer], matrix, find_block(layer) in subject.blocks))
        log.progress("layers", done, len(layers))
    report.unmoved = [update.layer for update in report.updates if not update.norm]
    moved = [update for update in report.updates if update.norm and update.relative_norm is not None]
    report.moved = [update.layer for update in sorted(moved, key=lambda update: -(update.relative_norm or 0.0))]
    return report.updates


def _compare_adapters(
    subject: _Subject, report: InspectReport, log: EventLog, should_stop: ShouldStop
) -> Sequence[Overlap]:
    first, second = (adapter.layers for adapter in subject.adapters)
    shared = in_order(layer for layer in first if layer in second)
    log.stage(f"comparing {plural(len(shared), 'layer')}")
    for done, layer in enumerate(shared, 1):
        if _is_stopped(should_stop, done, len(shared), log):
            break
        report.overlaps.append(overlap_of(layer, first[layer], second[layer]))
    report.unmoved = [row.layer for row in report.overlaps if not all(row.norms)]
    for name, own, others in zip(subject.names, (first, second), (second, first), strict=True):
        report.only_in[name] = in_order(layer for layer in own if layer not in others)
    return report.overlaps


_MEASURES: dict[str, Any] = {
    "base": _look_into_base, "adapter": _look_into_adapter, "two adapters": _compare_adapters,
}  # fmt: skip


# ---- in summary -----------------------------------------------------------------------------------------------------


def _grouped(rows: Iterable[Any], name: str) -> dict[str, dict[str, float]]:
    groups: dict[str, list[Any]] = {}
    for row in rows:
        groups.setdefault(str(getattr(row, name)), []).append(row)
    return {group: _summary(members) for group, members in groups.items()}


def _summary(rows: Sequence[Any]) -> dict[str, float]:
    """How many layers, and means of all their numbers that are known."""
    means: dict[str, float] = {"layers": len(rows)}
    for spec in fields(rows[0]) if rows else ():
        known = [value for row in rows if isinstance(value := getattr(row, spec.name), int | float)]
        if known and spec.name != "block":
            means[spec.name] = float(np.mean(known))
    if "cosine" in means:
        means["cosine"] = _joint_cosine(rows)
    return means


def _joint_cosine(overlaps: Sequence[Overlap]) -> float:
    """Cosine between two adapters over some layers, their updates laid end to end as one vector each."""
    inner = sum((row.cosine or 0.0) * row.norms[0] * row.norms[1] for row in overlaps)
    lengths = [math.sqrt(sum(row.norms[side] ** 2 for row in overlaps)) for side in (0, 1)]
    return inner / (lengths[0] * lengths[1]) if all(lengths) else 0.0
