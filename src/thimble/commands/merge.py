"""`thimble merge`: adapters added up and made smaller, or merged into the weights of a base."""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from thimble.config.options import MergeConfig
from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors, rank_for, svd_of_update, total, truncate
from thimble.core.lowrank import merge as merge_weight
from thimble.data.model import find_base
from thimble.errors import AdapterError, BaseModelError, ConfigError, Problems, RunError, listing, plural
from thimble.events import EventLog, OnEvent, ShouldStop, ignore, never
from thimble.files.blocks import dequantize, quantize
from thimble.files.peft import KEY, MAX_RANK, WEIGHTS_FILE, find_adapter, save_adapter
from thimble.files.tensors import open_tensors, rewrite_safetensors
from thimble.files.untrusted import is_inside
from thimble.models.adapters import open_adapters
from thimble.models.base import Base, Weight, weight_files
from thimble.training.run_folder import atomic_folder, check_new_folder

ROUNDING_LIMIT = 0.1  # share of an update that rounding may change before a warning
WINDOW_VALUES = 4_000_000  # numbers of a weight that are merged at a time
FLOATS = ("F32", "F16", "BF16")
# Files that describe a model; links to them are followed wherever they lead.
DESCRIPTIONS = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
    "model.safetensors.index.json", "preprocessor_config.json",
}  # fmt: skip
# Other copies of the weights that a folder may hold; taken along unmerged they would contradict the merged ones.
WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".tflite",
}  # fmt: skip


@dataclass(frozen=True)
class MergedLayer:
    """What became of the update of one layer.

    Attributes:
        name: Path of the layer.
        dtype: Type of the numbers written.
        rank_before: Rank of the update, of several adapters the sum of their ranks.
        rank_after: Rank kept; 0 once merged into the base.
        parameters_before: Numbers the adapters hold for it.
        parameters_after: Numbers the new adapter holds for it; 0 once merged into the base.
        bytes_before: Their size in the files of the adapters.
        bytes_after: Their size in the new one.
        norm: Length of the update before, the Frobenius norm of what is added to W.
        error: Length of what the update changed by, as a share of `norm`: what truncation cut off, or, merged into the
            base, what was lost by rounding to `dtype`.
    """

    name: str
    dtype: str
    rank_before: int
    rank_after: int
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    norm: float
    error: float


@dataclass(frozen=True)
class MergedKind:
    """The layers of one kind together.

    Attributes:
        kind: Last part of their paths, such as `q_proj`; `all` for all layers.
        layers: How many.
        rank_before: Least and most rank before.
        rank_after: Least and most rank after.
        parameters_before: Numbers before.
        parameters_after: Numbers after.
        bytes_before: Their size in files.
        bytes_after: Their size in the new file.
        error: Length of all that changed, as a share of the length of all updates.
        worst_error: Largest error of a layer.
        worst_layer: Which layer that is.
    """

    kind: str
    layers: int
    rank_before: list[int]
    rank_after: list[int]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    error: float
    worst_error: float
    worst_layer: str


@dataclass
class MergeReport:
    """What was merged, and what it cost.

    Attributes:
        status: `done`, or `interrupted`, in which case nothing was written.
        wrote: `adapter` or `base`.
        out: The folder written.
        adapters: What was merged.
        base: Name of the base; empty if none was opened.
        layers: One per adapted layer.
        kinds: The same by kind of layer; the last is `all`.
        rounding: Of a merged base: type of the weights to the largest error of a layer of that type.
        messages: Decisions, notes and warnings, in order.
    """

    status: str
    wrote: str
    out: str
    adapters: list[str]
    base: str
    layers: list[MergedLayer]
    kinds: list[MergedKind]
    rounding: dict[str, float]
    messages: dict[str, list[str]]


class _StoppedError(Exception):
    """The user wants it to end."""


@dataclass(frozen=True)
class _Work:
    """What was opened and found to fit together."""

    adapters: Mapping[str, Adapter]
    base: Base | None
    updates: Mapping[str, Factors]
    bytes_before: Mapping[str, int]
    log: EventLog
    should_stop: ShouldStop

    def move_on(self, done: int) -> None:
        """Tell how far it is, and end here if the user wishes."""
        self.log.progress("layers", done, len(self.updates))
        if self.should_stop():
            raise _StoppedError


def merge(config: MergeConfig, on_event: OnEvent = ignore, should_stop: ShouldStop = never) -> MergeReport:
    """Add adapters up, and write them as a smaller adapter or merged into the base.

    Args:
        config: The options.
        on_event: Hears of progress.
        should_stop: Asked between layers; nothing is written then.

    Returns:
        The report.

    Raises:
        InputError: With every problem found.
        RunError: If a merged weight does not fit its dtype.
    """
    work = _prepare(config, EventLog(on_event), should_stop)
    shrinks = _shrinks(config)
    layers: list[MergedLayer] = []
    status = "done"
    try:
        with atomic_folder(Path(config.out)) as folder:
            if shrinks:
                layers = _write_adapter(work, config.truncate or 1.0, config.rank or MAX_RANK, folder)
            else:
                layers = _write_base(work, folder)
    except _StoppedError:
        status = "interrupted"
    if not shrinks:
        _warn_of_rounding(layers, work.log)
    rounding: dict[str, float] = {}
    for layer in layers if not shrinks else ():
        rounding[layer.dtype] = max(layer.error, rounding.get(layer.dtype, 0.0))
    return MergeReport(
        status=status,
        wrote="adapter" if shrinks else "base",
        out=config.out,
        adapters=list(work.adapters),
        base=work.base.name if work.base else "",
        layers=layers,
        kinds=_by_kind(layers),
        rounding=rounding,
        messages=work.log.messages,
    )


def _shrinks(config: MergeConfig) -> bool:
    """Whether a smaller adapter is wanted instead of a merged base."""
    return config.truncate is not None or config.rank is not None


# ---- checks ---------------------------------------------------------------------------------------------------------


def _prepare(config: MergeConfig, log: EventLog, should_stop: ShouldStop) -> _Work:
    """Open everything and check all that can be wrong."""
    problems = Problems(config.problems)
    log.stage("reading the adapters")
    if not config.adapter:
        problems.add("no adapter is given: name an adapter folder or a run folder, as in: thimble merge runs/mine-1")
    problems.attempt(_check_names, config.adapter)
    base = problems.attempt(find_base, config.base) if config.base is not None else None
    adapters = open_adapters(config.adapter, base, problems)
    problems.attempt(_check_sum, adapters)
    needed = sum(factors.A.size + factors.B.size for a in adapters.values() for factors in a.layers.values()) * 4
    if not _shrinks(config) and not config.problems:  # a bad truncate means the other case
        needed = problems.attempt(_check_base, config.base, base, adapters) or 0
    if config.out:
        problems.attempt(check_new_folder, Path(config.out), needed)
    else:
        problems.add("no out is given: name the folder to write, such as --out merged")
    problems.required()
    names = {adapter.base for adapter in adapters.values()}
    if len(names) > 1:
        log.warning(f"the adapters were made for different bases, {listing(sorted(names))}: their sum may do neither")
    if any(factors.magnitude is not None for adapter in adapters.values() for factors in adapter.layers.values()):
        log.note("DoRA: the lengths of the rows are kept as they are; ranks and errors are those of B A")
    return _Work(adapters, base, _add_up(adapters), _stored_bytes(config.adapter), log, should_stop)


def _check_names(paths: Sequence[str]) -> None:
    """Refuse an adapter given twice: it would count twice, or once, and both could be meant."""
    seen = [Path(path).resolve() for path in paths]
    twice = {str(path) for path, place in zip(paths, seen, strict=True) if seen.count(place) > 1}
    if twice:
        raise ConfigError(f"adapter {listing(sorted(twice))} is given more than once: name each adapter once")


def _check_sum(adapters: Mapping[str, Adapter]) -> None:
    """Refuse adapters that cannot be added up."""
    wrong = []
    shapes: dict[str, tuple[tuple[int, int], str]] = {}
    for path, adapter in adapters.items():
        for layer, factors in adapter.layers.items():
            shape = (len(factors.B), factors.A.shape[1])
            known, first = shapes.setdefault(layer, (shape, path))
            if known != shape:
                wrong.append(f"{layer} is (out, in) {shape} in {path} but {known} in {first}")
    problems = [f"the adapters do not belong to the same base: {listing(wrong, 2)}"] if wrong else []
    with_magnitude = [
        path for path, adapter in adapters.items() if any(f.magnitude is not None for f in adapter.layers.values())
    ]
    if len(adapters) > 1 and with_magnitude:
        problems.append(
            f"adapter {listing(with_magnitude)} is DoRA: it sets the lengths of the rows of W + scale B A, and lengths "
            "do not add up; merge one at a time"
        )
    if problems:
        raise AdapterError(*problems)


def _check_base(name: str | None, base: Base | None, adapters: Mapping[str, Adapter]) -> int:
    """Refuse a base that cannot take an update; give the bytes that will be written."""
    if name is None:
        raise ConfigError(
            "no base is given: name with --base the Hugging Face folder to merge into, or write a smaller adapter with "
            "--truncate 0.99"
        )
    if base is None:  # what is wrong with it is already told
        return 0
    if base.metadata is not None:
        raise BaseModelError(
            f"base {name} is a GGUF file, whose blocks would have to be rounded again, which costs more than a small "
            "update is worth: keep the adapter beside it (thimble chat --adapter), or merge into a folder of float "
            "weights (exporting to GGUF comes with thimble export)"
        )
    layers = {layer for adapter in adapters.values() for layer in adapter.layers}
    weights = {layer: base.weights[f"{layer}.weight"] for layer in layers if f"{layer}.weight" in base.weights}
    wrong = [f"{layer} is {weight.dtype}" for layer, weight in sorted(weights.items()) if weight.dtype not in FLOATS]
    if wrong:
        raise BaseModelError(f"base {name} cannot be merged into: {listing(wrong, 2)}; expected {', '.join(FLOATS)}")
    files = [*weight_files(base.path), *_other_files(base.path)]
    return sum(path.stat().st_size for path in files)


def _stored_bytes(paths: Sequence[str]) -> dict[str, int]:
    """Bytes that each layer takes in the files of all adapters."""
    sizes: dict[str, int] = {}
    for path in paths:
        for name, info in open_tensors(find_adapter(path) / WEIGHTS_FILE).tensors.items():
            match = KEY.match(name)
            if match:
                sizes[match["path"]] = sizes.get(match["path"], 0) + info.nbytes
    return sizes


def _add_up(adapters: Mapping[str, Adapter]) -> dict[str, Factors]:
    """The sum of all adapters, layer by layer."""
    parts: dict[str, list[Factors]] = {}
    for adapter in adapters.values():
        for layer, factors in adapter.layers.items():
            parts.setdefault(layer, []).append(factors)
    return {layer: total(updates) for layer, updates in parts.items()}


# ---- a smaller adapter ----------------------------------------------------------------------------------------------


def _write_adapter(work: _Work, energy: float, most: int, folder: Path) -> list[MergedLayer]:
    """Cut every update to the rank wanted and write them as one adapter."""
    work.log.stage("cutting the updates")
    kept, layers = {}, []
    for layer, factors in work.updates.items():
        small, norm, error = cut(factors, energy, min(most, MAX_RANK))
        kept[layer] = small
        layers.append(
            MergedLayer(
                layer,
                "F32",
                factors.rank,
                small.rank,
                _count(factors),
                _count(small),
                work.bytes_before[layer],
                4 * _count(small),
                norm,
                error,
            )  # fmt: skip
        )
        work.move_on(len(layers))
    first = next(iter(work.adapters.values()))
    is_same_base = len({adapter.base for adapter in work.adapters.values()}) == 1
    save_adapter(replace(first, layers=kept, base=first.base if is_same_base else "", origin={}), folder)
    return layers


def cut(factors: Factors, energy: float, most: int) -> tuple[Factors, float, float]:
    """Cut an update to the smallest rank that keeps a share of its energy.

    Args:
        factors: The update; a magnitude is kept.
        energy: Share of ‖scale · B A‖² wanted, above 0 and at most 1.
        most: The most rank kept, whatever it costs.

    Returns:
        The update, as it was if no rank is saved; ‖scale · B A‖_F before; and the relative error.
    """
    values = svd_of_update(factors).values
    norm = float(np.linalg.norm(values))
    rank = min(rank_for(values, energy), most)
    if rank >= factors.rank:
        return factors, norm, 0.0
    small, error = truncate(factors, rank)
    return small, norm, error


def _count(factors: Factors) -> int:
    return factors.A.size + factors.B.size + (0 if factors.magnitude is None else factors.magnitude.size)


# ---- a merged base --------------------------------------------------------------------------------------------------


def _write_base(work: _Work, folder: Path) -> list[MergedLayer]:
    """Copy a Hugging Face folder with the updates added to its weights, tensor by tensor."""
    base = work.base
    assert base is not None, "checked by _check_base"
    work.log.stage(f"merging into {base.name}")
    for path in _other_files(base.path):
        place = folder / path.relative_to(base.path)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    done: list[MergedLayer] = []
    for shard in weight_files(base.path):
        changed: dict[str, Callable[[], Iterator[memoryview]]] = {}
        for layer in work.updates:
            weight = base.weights[f"{layer}.weight"]
            if weight.file.path == shard:
                changed[weight.info.name] = partial(_merged_rows, work, layer, weight, done)
        rewrite_safetensors(open_tensors(shard), folder / shard.name, changed)
    return done


def _other_files(folder: Path) -> list[Path]:
    """What describes a model in a Hugging Face folder: no weights, no programs.

    What a link brings in from outside of it is taken only under a name that a model's files have.
    """
    files = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        is_weight = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".bin.index.json")
        if is_weight or path.suffix == ".py" or any(part.startswith(".") for part in parts):
            continue
        if path.is_file() and (path.name in DESCRIPTIONS or is_inside(path, folder)):
            files.append(path)
    return files


def _merged_rows(work: _Work, layer: str, weight: Weight, done: list[MergedLayer]) -> Iterator[memoryview]:
    """The bytes of a merged weight, some rows at a time; afterwards what rounding did to it is added to `done`."""
    factors = work.updates[layer]
    num_rows, columns = weight.shape
    step = max(1, WINDOW_VALUES // columns)
    # Wide enough that what is lost is lost by rounding to the file's type, and rounding happens once.
    wide = np.float64 if weight.dtype == "F32" else np.float32
    lost = size = 0.0
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        old = dequantize(weight.raw()[rows], weight.dtype, (rows.stop - rows.start, columns))
        magnitude = None if factors.magnitude is None else factors.magnitude[rows]
        update = Factors(factors.A, factors.B[rows], factors.scale, magnitude)
        exact = merge_weight(old.astype(wide), update)
        size += float(np.linalg.norm(exact - old)) ** 2
        if not math.isfinite(size):
            raise RunError(f"{layer} of the base holds numbers that are NaN or Inf: nothing is written")
        try:
            packed = quantize(exact.astype(np.float32), weight.dtype)
        except BaseModelError as error:
            raise RunError(f"{layer}: {error}: nothing is written") from None
        lost += float(np.linalg.norm(dequantize(packed, weight.dtype, old.shape) - exact)) ** 2
        weight.release(rows)
        yield packed.data
    error = math.sqrt(lost / size) if size else 0.0
    before = (factors.rank, 0, _count(factors), 0, work.bytes_before[layer], 0)
    done.append(MergedLayer(layer, weight.dtype, *before, math.sqrt(size), error))
    work.move_on(len(done))


def _warn_of_rounding(layers: Sequence[MergedLayer], log: EventLog) -> None:
    bad = sorted((layer for layer in layers if layer.error > ROUNDING_LIMIT), key=lambda layer: -layer.error)
    if bad:
        worst = bad[0]
        log.warning(
            f"rounding to {worst.dtype} changed the updates of {plural(len(bad), 'layer')} by more than "
            f"{ROUNDING_LIMIT:.0%}, most that of {worst.name} ({worst.error:.0%}): keep the adapter beside the base "
            "(thimble chat --adapter), or merge into a folder of F32 weights"
        )


# ---- the report -----------------------------------------------------------------------------------------------------


def _by_kind(layers: Sequence[MergedLayer]) -> list[MergedKind]:
    """Figures by kind of layer, in the order they come, and over all."""
    kinds: dict[str, list[MergedLayer]] = {}
    for layer in layers:
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    return [_summary(kind, group) for kind, group in {**kinds, "all": list(layers)}.items() if group]


def _summary(kind: str, layers: Sequence[MergedLayer]) -> MergedKind:
    squares = sum(layer.norm**2 for layer in layers)
    lost = sum((layer.norm * layer.error) ** 2 for layer in layers)
    worst = max(layers, key=lambda layer: layer.error)
    before, after = ([getattr(layer, name) for layer in layers] for name in ("rank_before", "rank_after"))
    names = ("parameters_before", "parameters_after", "bytes_before", "bytes_after")
    sums = [sum(getattr(layer, name) for layer in layers) for name in names]
    error = math.sqrt(lost / squares) if squares else 0.0
    return MergedKind(
        kind, len(layers), [min(before), max(before)], [min(after), max(after)], *sums, error, worst.error, worst.name
    )
