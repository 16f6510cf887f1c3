"""`thimble merge`: adapters combined and made smaller, merged into the weights of a base, or taken off them again."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from thimble.config.merge import MergeConfig, combining
from thimble.config.values import flag
from thimble.core.adapter import Adapter, conflicts
from thimble.core.combine import Combination, combination_problems, combine
from thimble.core.lowrank import Factors
from thimble.data.model import base_with_adapters, find_base, log_base
from thimble.errors import ConfigError, InputError, Problems, listing
from thimble.events import EventLog, OnEvent, ShouldStop, ignore, never
from thimble.files.peft import named_for_peft
from thimble.models import merged
from thimble.models.adapter_base import FINGERPRINT, base_of
from thimble.models.adapters import check_all_fit, check_is_of_layers, load_adapters, stored_bytes
from thimble.models.base import Base
from thimble.report.card import derived_card
from thimble.training.card import about_adapter, write_card
from thimble.training.module_adapter import is_of_module, read_trained
from thimble.training.module_use import open_trained
from thimble.training.run_folder import atomic_folder, check_new_folder


@dataclass
class MergeReport:
    """What was merged, and what it cost.

    Attributes:
        status: `done`, or `interrupted`, in which case nothing was written.
        wrote: `adapter` or `base`.
        out: The folder written.
        adapters: What was merged.
        weights: What each of them was multiplied by.
        combination_type: How they became one.
        base: Name of the base; empty if none was opened.
        needs_base: Path of the base to name with the new adapter, if that alone does not lead to it.
        original: With --unmerge, path of the base whose bytes the weights have again; empty if only within rounding.
        layers: One per adapted layer.
        kinds: The same by kind of layer; the last is `all`.
        rounding: Of a merged base: dtype of the weights to the largest error of a layer of that dtype.
        messages: Decisions, notes and warnings, in order.
        loader: The class of transformers that opens a merged base, or the function of the user's own that made it.
    """

    status: str
    wrote: str
    out: str
    adapters: list[str]
    weights: list[float]
    combination_type: str
    base: str
    needs_base: str
    original: str
    layers: list[merged.MergedLayer]
    kinds: list[merged.MergedKind]
    rounding: dict[str, float]
    messages: dict[str, list[str]]
    loader: str = "AutoModelForCausalLM"


class _StoppedError(Exception):
    """The user wants the work to end."""


def merge(config: MergeConfig, on_event: OnEvent = ignore, should_stop: ShouldStop = never) -> MergeReport:
    """Combine adapters; write a smaller adapter, a base with them or one without; nothing if stopped on the way."""
    log, out = EventLog(on_event), Path(config.out).absolute()
    if is_of_module(config.adapter, config.task, config.base):
        return _merge_module(config, log)
    adapters, base = _prepare(config, log)
    layers: list[merged.MergedLayer] = []
    status, original = "done", None
    try:
        with atomic_folder(Path(config.out)) as folder:
            updates = _combined(adapters, config, log, should_stop)
            on_layer = _layer_counter(layers, stored_bytes(config.adapter, base), len(updates), log, should_stop)
            if config.writes_adapter or base is None:
                log.stage("truncating the updates")
                written = merged.write_truncated(
                    list(adapters.values()), updates, config.truncate, config.rank, folder, on_layer
                )
                write_card(folder, derived_card(about_adapter(written, base), "merge", config, _facts(config, layers)))
            elif config.unmerge:
                original = _original(adapters, base, updates, log)
                log.stage(f"unmerging from {base.name}")
                merged.write_unmerged(base, original, updates, folder, on_layer)
            else:
                log.stage(f"merging into {base.name}")
                merged.write_merged(base, updates, folder, on_layer)
    except _StoppedError:
        status = "interrupted"
    rounding = {} if config.writes_adapter else merged.worst_by_dtype(layers)
    if any(error > merged.ROUNDING_LIMIT for error in rounding.values()):
        log.warning(merged.rounding_warning(layers))
    is_adapter = config.writes_adapter and status == "done"
    return MergeReport(
        status, "adapter" if config.writes_adapter else "base", config.out, list(adapters), list(config.weights),
        config.combination_type, base.name if base else "",
        _base_to_name(str(out), adapters, base) if is_adapter else "", str(original.path) if original else "",
        layers, merged.by_kind(layers), rounding, log.messages,
    )  # fmt: skip


def _merge_module(config: MergeConfig, log: EventLog) -> MergeReport:
    """Write a module with one adapter in its weights, beside what else its folder holds."""
    problems = Problems(config.problems)
    if len(config.adapter) > 1 or config.writes_adapter or config.unmerge:
        problems.add("adapters on modules are merged one by one into their base: give one ADAPTER and --out, no more")
    problems.add(*(f"{flag(name)} is for several adapters: leave it out" for name in combining(config)))
    problems.attempt(check_new_folder, Path(config.out), 0)
    trained = problems.attempt(read_trained, next(iter(config.adapter), ""), config.task, config.base, log)
    (trained,) = problems.required(trained)
    session, base, _ = open_trained(trained, log)
    log.stage(f"merging into {base.name}")
    with atomic_folder(Path(config.out)) as folder:
        moved = session.save_merged(folder)
        for path in base.path.iterdir() if base.path.is_dir() else ():
            if (
                path.suffix in (".json", ".txt")
                and not (folder / path.name).exists()
                and "safetensors" not in path.name
            ):
                shutil.copyfile(path, folder / path.name)
    layers = [
        merged.MergedLayer(
            path, "F32", factors.rank, 0, factors.num_parameters, 0, 4 * factors.num_parameters, 0, moved[path], 0.0
        )
        for path, factors in named_for_peft(trained.adapter).items()
    ]  # fmt: skip
    return MergeReport(
        "done", "base", config.out, list(config.adapter), list(config.weights), config.combination_type, base.name, "",
        "", layers, merged.by_kind(layers), {}, log.messages, base.loader,
    )  # fmt: skip


def _combined(
    adapters: Mapping[str, Adapter], config: MergeConfig, log: EventLog, should_stop: ShouldStop
) -> dict[str, Factors]:
    """The adapters as one, layer by layer."""
    how = Combination(
        config.weights, config.combination_type, config.density or 1.0, config.majority_sign_method, config.rank,
        config.seed,
    )  # fmt: skip
    updates = {}
    for path, factors in combine(list(adapters.values()), how):
        updates[path] = factors
        log.progress("layers combined", len(updates), 0)
        if should_stop():
            raise _StoppedError
    return updates


def _facts(config: MergeConfig, layers: Sequence[merged.MergedLayer]) -> list[tuple[str, str]]:
    """What the card of a new adapter says of what it was made from."""
    names = [
        Path(path).name + f" x {weight:g}" * (weight != 1)
        for path, weight in zip(config.adapter, config.weights, strict=True)
    ]
    kept = f"{1 - merged.by_kind(layers)[-1].error ** 2:.2%} of the energy of their updates"
    return [("made from", listing(names)), ("combined as", config.combination_type), ("keeps", kept)]


def _layer_counter(
    layers: list[merged.MergedLayer], sizes: Mapping[str, int], number: int, log: EventLog, should_stop: ShouldStop
) -> Callable[[merged.MergedLayer], None]:
    """What keeps the layers that are done, and ends the work if the user wants that."""

    def on_layer(layer: merged.MergedLayer) -> None:
        layers.append(replace(layer, bytes_before=sizes[layer.name]))
        log.progress("layers", len(layers), number)
        if should_stop():
            raise _StoppedError

    return on_layer


def _original(
    adapters: Mapping[str, Adapter], base: Base, updates: Mapping[str, Factors], log: EventLog
) -> Base | None:
    """The base that the adapters were merged into, if it is here and, with them, is what the folder holds."""
    problems = Problems()
    log.stage("comparing with the original base")
    original = problems.attempt(base_of, adapters)
    if original and original.metadata is None and merged.is_merge_of(base, original, updates):
        log.note(f"{base.name} is {original.path} and the adapters, bit for bit: its weights are written as they were")
        return original
    if any(adapter.has_magnitudes for adapter in adapters.values()):
        raise InputError(
            "an adapter is DoRA: merged, the rows of the weights have other lengths, and what those were only the "
            f"original base knows, which {'is not what this folder was made of' if original else 'is not found'}"
        )
    why = f"{original.path} with the adapters is not what it holds" if original else "the original base is not found"
    log.warning(
        f"{why}: the updates are subtracted, and what rounding lost when they were merged stays lost, about as much as "
        "is lost now"
    )
    return None


def _prepare(config: MergeConfig, log: EventLog) -> tuple[dict[str, Adapter], Base | None]:
    """Open everything and check all that can be wrong."""
    problems = Problems(config.problems)
    log.stage("reading the adapters")
    if not config.adapter:
        problems.add("no adapter is given: name an adapter folder or a run folder, as in: thimble merge runs/mine-1")
    problems.attempt(_check_names, config.adapter)
    base, adapters = _opened(config, problems, log)
    for path, adapter in adapters.items():
        problems.attempt(check_is_of_layers, path, adapter)
    wrong = conflicts(adapters)
    problems.add(*wrong, *([] if wrong else combination_problems(adapters, config.combination_type)))
    problems.add(*_weight_problems(adapters, config.weights))
    needed = sum(4 * factors.num_parameters for a in adapters.values() for factors in a.layers.values())
    if not config.writes_adapter and not config.problems:
        if base is None and config.base is None:
            problems.add(_no_base(config.unmerge))
        layers = sorted({layer for adapter in adapters.values() for layer in adapter.layers})
        needed = (problems.attempt(merged.check_mergeable, base, layers, *list(adapters)[:1]) if base else None) or 0
    if config.out:
        problems.attempt(check_new_folder, Path(config.out), needed)
    else:
        problems.add("no out is given: name the folder to write, such as --out merged")
    problems.required()
    if base:
        log_base(base, log)
    _log_adapters(adapters, log)
    return adapters, base


def _opened(config: MergeConfig, problems: Problems, log: EventLog) -> tuple[Base | None, dict[str, Adapter]]:
    """The base, if one is needed, and the adapters."""
    if config.unmerge and config.base is not None:  # of other weights than the adapters were trained on, of course
        base = problems.attempt(find_base, config.base)
        adapters = load_adapters(config.adapter, problems, base)
        if base:
            check_all_fit(adapters, base, problems, lambda _: None)
        return base, adapters
    # A bad --truncate asks for an adapter.
    if config.unmerge or (config.base is None and (config.writes_adapter or config.problems)):
        return None, load_adapters(config.adapter, problems)
    return base_with_adapters(config.base, config.adapter, problems, log) if config.adapter else (None, {})


def _no_base(unmerge: bool) -> str:
    if unmerge:
        return "no base is given: name with --base the folder that the adapters were merged into"
    return (
        "no base is given: name with --base the Hugging Face folder to merge into, or write a smaller adapter with "
        "--truncate 0.99"
    )


def _weight_problems(adapters: Mapping[str, Adapter], weights: Sequence[float]) -> list[str]:
    """Refuse a part of a DoRA adapter: lengths of rows are what they are, or not there."""
    weighted = [
        name for (name, adapter), weight in zip(adapters.items(), weights, strict=False)
        if weight != 1 and adapter.has_magnitudes
    ]  # fmt: skip
    return [
        f"adapter {name} is DoRA, which sets the lengths of the rows of the weights and has no half: leave out its "
        "--weight"
        for name in weighted
    ]


def _log_adapters(adapters: Mapping[str, Adapter], log: EventLog) -> None:
    names = {adapter.base for adapter in adapters.values()}
    if len({adapter.notes.get(FINGERPRINT, adapter.base) for adapter in adapters.values()}) > 1:
        log.warning(f"the adapters were made for different bases, {listing(sorted(names))}: their sum may do neither")
    if any(adapter.has_magnitudes for adapter in adapters.values()):
        log.note("DoRA: the lengths of the rows are kept as they are; ranks and errors are those of B A")


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
