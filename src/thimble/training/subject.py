"""What `thimble inspect` was pointed at, opened, checked and measured: a base, an adapter or two adapters."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from thimble.config.inspect_ import InspectConfig
from thimble.core.adapter import Adapter, conflicts
from thimble.data.model import base_with_adapters, is_hub_name, log_base
from thimble.errors import AdapterError, BaseModelError, ConfigError, Problems, listing, plural
from thimble.events import EventLog, ShouldStop
from thimble.files.foreign_adapters import what_lies_there
from thimble.files.peft import CONFIG_FILE, WEIGHTS_FILE
from thimble.files.peft_config import MODEL_CLASS
from thimble.models.adapter_base import TASK, labels_of
from thimble.models.adapters import is_of_other_layers, load_adapters
from thimble.models.gguf_adapter import is_gguf_adapter
from thimble.models.places import find_place
from thimble.models.survey import Row, Subject, choose_blocks


def open_subject(config: InspectConfig, problems: Problems, log: EventLog) -> Subject:
    """Open what was named, as far as it can be, and check that it fits together."""
    names = [name for name in (config.path, config.other) if name is not None]
    kinds = [problems.attempt(_kind_of, name) for name in names]
    named = list(zip(names, kinds, strict=True))
    bases, adapters = ([name for name, kind in named if kind == wanted] for wanted in ("base", "adapter"))
    problems.add(*_misplaced(config, bases, adapters))
    base, opened, named_base = None, {}, bases[0] if bases else config.base
    others = [name for name in adapters if is_of_other_layers(name)]
    if named_base is None and (others or len(adapters) == 2):  # for themselves, or compared with one another
        opened = load_adapters(adapters, problems, is_of_text=False)
        for name, adapter in opened.items() if others else ():
            log.note(f"{name}: {_purpose(adapter)}")
    elif others:
        problems.add(
            f"adapter {others[0]} updates more than linear layers of a text model, whose weights alone are looked "
            "into: leave out --base"
        )
    elif named_base is not None or None not in kinds:
        base, opened = base_with_adapters(named_base, adapters, problems, log)
    if base:
        log_base(base, log)
    kind = "two adapters" if len(adapters) == 2 else "adapter" if adapters else "base"
    if len(opened) == 2:
        problems.attempt(_check_alike, opened)
    blocks: list[int] = []
    if base and kind != "two adapters":
        chosen = problems.attempt(choose_blocks, base, list(opened.values()), config.blocks)
        blocks, known = chosen or ([], 0)
        if not config.blocks and len(blocks) < known:
            log.decision(
                f"blocks {listing(blocks, 40)} of {known} are decomposed, an even spread, since all of them would "
                "take long: name others with --blocks"
            )
    measured = [adapter.by_expert() for adapter in opened.values()]
    return Subject(kind, [base.name] if kind == "base" and base else adapters, base, measured, blocks)


def _purpose(adapter: Adapter) -> str:
    """What an adapter of another model than one of text is for, and what of it is no low-rank update."""
    task, labels, said = adapter.notes.get(TASK), labels_of(adapter), adapter.settings.get("task_type")
    mapped = adapter.settings.get("auto_mapping")
    in_peft = f"PEFT's {said}" if said else f"a {mapped[MODEL_CLASS]}" if mapped else "a model of its own"
    whole = f"; trained whole: {listing(sorted(adapter.replaced))}" if adapter.replaced else ""
    return f"for {task or in_peft}{f', labels {listing(labels)}' if labels else ''}{whole}"


def _kind_of(name: str) -> str:
    """`adapter` or `base`, by the files that are there; a ConfigError if it is neither."""
    place = Path(name)
    if any((folder / CONFIG_FILE).is_file() for folder in (place, place / "adapter")) or is_gguf_adapter(place):
        return "adapter"
    if _is_base(place) or is_hub_name(name):
        return "base"
    inner = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
    found = listing(inner) or "nothing" if place.is_dir() else ""
    state = f"it holds {found}" if found else "it is another file" if place.exists() else "it does not exist"
    known = what_lies_there(place, inner) if place.exists() else ""
    raise ConfigError(
        f"{name} is neither a base nor an adapter: {state}; expected a GGUF file, a Hugging Face folder (config.json "
        f"and safetensors), an adapter folder ({CONFIG_FILE} and {WEIGHTS_FILE}) or the run folder around it"
        f"{'; ' * bool(known)}{known}"
    )


def _is_base(place: Path) -> bool:
    """Whether a base lies there, or something of one that only its opening can tell what is wrong with."""
    if not place.exists():
        return False
    try:
        found = find_place(place).path
    except BaseModelError:
        return True
    if found.is_dir():
        return (found / "config.json").is_file()
    with found.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def _misplaced(config: InspectConfig, bases: Sequence[str], adapters: Sequence[str]) -> list[str]:
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
        problems.append("--blocks is given with two adapters: leave it out, no weight is decomposed to compare them")
    return problems


def _check_alike(adapters: Mapping[str, Adapter]) -> None:
    """Refuse two adapters that cannot have been trained on one base, or that share no layer."""
    (one, first), (two, second) = adapters.items()
    if not any(layer in second.layers for layer in first.layers):
        raise AdapterError(f"adapters {one} and {two} have no layer in common: there is nothing to compare")
    wrong = conflicts(adapters)
    if wrong:
        raise AdapterError(*wrong)


def measure_subject(subject: Subject, log: EventLog, should_stop: ShouldStop) -> tuple[list[Row], list[str]]:
    """Measure layer by layer, until the user has enough: a row a layer, and the weights that say nothing, with why."""
    layers = subject.layers()
    rows: list[Row] = []
    skipped: list[str] = []
    log.stage(f"measuring {plural(len(layers), 'layer')}")
    for done, layer in enumerate(layers, 1):
        if should_stop():
            log.warning(f"stopped early: {done - 1} of {plural(len(layers), 'layer')} were measured")
            break
        row, fault = subject.measure(layer)
        rows += [row] if row else []
        if fault:
            skipped.append(f"{layer}: its weight {fault}")
            log.warning(f"{layer} of the base {fault}: nothing can be said about it")
        log.progress("layers", done, len(layers))
    if subject.kind == "base" and len(skipped) == len(layers):
        raise BaseModelError(*(f"base {subject.names[0]}: {what}" for what in skipped))
    return rows, skipped
