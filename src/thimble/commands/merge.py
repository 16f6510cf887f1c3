"""`thimble merge`: adapters added up and made smaller, or merged into the weights of a base."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from thimble.config.merge import MergeConfig
from thimble.core.adapter import Adapter, add_up, conflicts, sum_problems
from thimble.data.model import base_with_adapters, log_base
from thimble.errors import ConfigError, Problems, listing
from thimble.events import EventLog, OnEvent, ShouldStop, ignore, never
from thimble.models import merged
from thimble.models.adapter_base import FINGERPRINT, base_of
from thimble.models.adapters import load_adapters
from thimble.models.base import Base
from thimble.training.run_folder import atomic_folder, check_new_folder


@dataclass
class MergeReport:
    """What was merged, and what it cost.

    Attributes:
        status: `done`, or `interrupted`, in which case nothing was written.
        wrote: `adapter` or `base`.
        out: The folder written.
        adapters: What was merged.
        base: Name of the base; empty if none was opened.
        needs_base: Path of the base to name with the new adapter, if that alone does not lead to it.
        layers: One per adapted layer.
        kinds: The same by kind of layer; the last is `all`.
        rounding: Of a merged base: dtype of the weights to the largest error of a layer of that dtype.
        messages: Decisions, notes and warnings, in order.
    """

    status: str
    wrote: str
    out: str
    adapters: list[str]
    base: str
    needs_base: str
    layers: list[merged.MergedLayer]
    kinds: list[merged.MergedKind]
    rounding: dict[str, float]
    messages: dict[str, list[str]]


class _StoppedError(Exception):
    """The user wants the work to end."""


def merge(config: MergeConfig, on_event: OnEvent = ignore, should_stop: ShouldStop = never) -> MergeReport:
    """Add adapters up, and write them as a smaller adapter or merged into the base; nothing if stopped on the way."""
    log, shrinks, out = EventLog(on_event), _shrinks(config), Path(config.out).absolute()
    adapters, base = _prepare(config, log)
    updates, sizes = add_up(adapters.values()), merged.stored_bytes(config.adapter)
    layers: list[merged.MergedLayer] = []

    def on_layer(layer: merged.MergedLayer) -> None:
        layers.append(replace(layer, bytes_before=sizes[layer.name]))
        log.progress("layers", len(layers), len(updates))
        if should_stop():
            raise _StoppedError

    status = "done"
    try:
        with atomic_folder(Path(config.out)) as folder:
            if shrinks or base is None:
                log.stage("truncating the updates")
                merged.write_truncated(list(adapters.values()), updates, config.truncate, config.rank, folder, on_layer)
            else:
                log.stage(f"merging into {base.name}")
                merged.write_merged(base, updates, folder, on_layer)
    except _StoppedError:
        status = "interrupted"
    rounding = {} if shrinks else merged.worst_by_dtype(layers)
    if any(error > merged.ROUNDING_LIMIT for error in rounding.values()):
        log.warning(merged.rounding_warning(layers))
    needs_base = _base_to_name(str(out), adapters, base) if shrinks and status == "done" else ""
    return MergeReport(
        status, "adapter" if shrinks else "base", config.out, list(adapters), base.name if base else "", needs_base,
        layers, merged.by_kind(layers), rounding, log.messages,
    )  # fmt: skip


def _shrinks(config: MergeConfig) -> bool:
    """Whether a smaller adapter is wanted instead of a merged base."""
    return config.truncate is not None or config.rank is not None


def _prepare(config: MergeConfig, log: EventLog) -> tuple[dict[str, Adapter], Base | None]:
    """Open everything and check all that can be wrong."""
    problems = Problems(config.problems)
    log.stage("reading the adapters")
    if not config.adapter:
        problems.add("no adapter is given: name an adapter folder or a run folder, as in: thimble merge runs/mine-1")
    problems.attempt(_check_names, config.adapter)
    base, adapters = None, {}
    if config.base is None and (_shrinks(config) or config.problems):  # a bad --truncate asks for an adapter
        adapters = load_adapters(config.adapter, problems)
    elif config.adapter:
        base, adapters = base_with_adapters(config.base, config.adapter, problems, log)
    problems.add(*conflicts(adapters), *sum_problems(adapters))
    needed = sum(4 * factors.num_parameters for a in adapters.values() for factors in a.layers.values())
    if not _shrinks(config) and not config.problems:
        if config.base is None and base is None:
            problems.add(
                "no base is given: name with --base the Hugging Face folder to merge into, or write a smaller adapter "
                "with --truncate 0.99"
            )
        layers = sorted({layer for adapter in adapters.values() for layer in adapter.layers})
        needed = (problems.attempt(merged.check_mergeable, base, layers, *list(adapters)[:1]) if base else None) or 0
    if config.out:
        problems.attempt(check_new_folder, Path(config.out), needed)
    else:
        problems.add("no out is given: name the folder to write, such as --out merged")
    problems.required()
    if base:
        log_base(base, log)
    names = {adapter.base for adapter in adapters.values()}
    if len({adapter.notes.get(FINGERPRINT, adapter.base) for adapter in adapters.values()}) > 1:
        log.warning(f"the adapters were made for different bases, {listing(sorted(names))}: their sum may do neither")
    if any(adapter.has_magnitudes for adapter in adapters.values()):
        log.note("DoRA: the lengths of the rows are kept as they are; ranks and errors are those of B A")
    return adapters, base


def _base_to_name(out: str, adapters: Mapping[str, Adapter], base: Base | None) -> str:
    """The path of the base to name with a new adapter: empty if it is found from there, or nobody knows where it is."""
    problems = Problems()
    base = base or problems.attempt(base_of, adapters)
    again = problems.attempt(base_of, load_adapters([out], problems))
    return str(base.path) if base and (again is None or again.path.resolve() != base.path.resolve()) else ""


def _check_names(paths: Sequence[str]) -> None:
    """Refuse an adapter given twice: it would count twice, or once, and both could be meant."""
    places = [Path(path).resolve() for path in paths]
    twice = {str(path) for path, place in zip(paths, places, strict=True) if places.count(place) > 1}
    if twice:
        raise ConfigError(f"adapter {listing(sorted(twice))} is given more than once: name each adapter once")
