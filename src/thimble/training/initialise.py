"""The adapter before the first step: the rank of each layer, and A and B; random, decomposed, or found on data.

What can be refused without the loaded base is (`check_init`); the rest is made once it is loaded and before anything is
written, so that a weight that cannot be decomposed still refuses the run.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from thimble.backends.capabilities import THROUGH_TRANSFORMERS
from thimble.config.train import TrainConfig
from thimble.config.values import read_pattern
from thimble.core.adapter import Adapter, fresh_adapter
from thimble.core.inits import BUILDERS, LayerData
from thimble.core.method import AUTO_RANK, INITS, Init
from thimble.core.targets import Size, size_layers
from thimble.data.model import Model
from thimble.errors import AdapterError, ConfigError, Problems, as_word, listing
from thimble.events import EventLog
from thimble.files.peft import load_adapter
from thimble.models.adapters import check_fits, check_is_of_text
from thimble.models.gguf_adapter import is_gguf
from thimble.models.merged import FLOAT_DTYPES
from thimble.models.model_spec import ModelSpec, adapted_shapes
from thimble.training import run_folder
from thimble.training.calibration import (
    CAPABILITY,
    MOST_RANK,
    Calibration,
    CalibrationData,
    CalibrationSession,
    Energy,
    choose_ranks,
)
from thimble.training.checkpoint import latest_checkpoint

COMPARED = ("kaiming", "eva", "gradient")  # their A x are equally long: one learning rate is right for all


@dataclass(frozen=True)
class Initialization:
    """What a run begins with."""

    adapter: Adapter  # the adapter before the first step
    config: TrainConfig  # the options, with ranks resolved
    measured: dict[str, Any] = field(default_factory=dict)  # what ranks were chosen by, and the seconds it all took


# ---- before the base is loaded --------------------------------------------------------------------------------------


def check_init(init: Init, config: TrainConfig, model: Model, layers: Sequence[str], folder: Path) -> dict[str, Size]:
    """Refuse ranks and initializations that cannot be, naming the layers; the sizes, as far as they are known."""
    if init.needs == "adapter":
        is_resumed = config.resume and latest_checkpoint(folder) and (folder / run_folder.START).is_dir()
        path = str(folder / run_folder.START) if is_resumed else init.path
        if is_gguf(path):
            command = f"thimble export {as_word(path)} --base {as_word(str(model.base.path))} --to peft --out folder"
            raise AdapterError(
                f"--init {init}: a run begins with an adapter folder, and this is a GGUF file; make a folder of it by "
                f"{command}, and take --init adapter:folder"
            )
        adapter = load_adapter(path)
        check_is_of_text(path, adapter)
        check_fits(path, adapter, model.base)
        return {layer: Size(factors.rank, factors.scale) for layer, factors in adapter.layers.items()}
    problems, shapes = Problems(), adapted_shapes(model.base.spec)
    if not model.base.is_own:
        who = f"{model.base.name}, which runs through transformers,"
        problems.attempt(_check_capability, init, config, THROUGH_TRANSFORMERS, who)
    sizes = problems.attempt(_plan_sizes, config, model.base.spec, layers)
    plain = config.replace(rank_pattern=(), alpha_pattern=())
    sizes = sizes or _plan_sizes(plain, model.base.spec, layers)  # so that what else is wrong is reported too
    if config.rank is not None:
        sizes = {**sizes, **narrowed(config.rank, init, sizes, model.base.spec)}
        problems.add(*_rank_problems(init, sizes, shapes))
    least = sum(sum(shapes[layer]) for layer in layers)
    if config.rank_budget is not None and config.rank_budget < least:
        problems.add(f"--rank-budget {config.rank_budget:,}: expected at least {least:,}, rank 1 for every layer")
    if init.needs == "quantised":
        problems.add(*_quantised_problems(init, config, model, layers))
    problems.required()
    return sizes


def _plan_sizes(config: TrainConfig, spec: ModelSpec, layers: Sequence[str]) -> dict[str, Size]:
    """Rank and scale of each layer as far as they are known before training; rank auto counts as the most it may be."""
    shapes = adapted_shapes(spec)
    if config.rank is None and config.energy is not None:
        return {layer: Size(min(MOST_RANK, *shapes[layer]), 1.0) for layer in layers}
    rank = config.rank or AUTO_RANK
    if config.rank_budget is not None:
        rank = max(1, math.ceil(config.rank_budget / sum(sum(shapes[layer]) for layer in layers)))
    ranks, alphas = read_pattern(config.rank_pattern), read_pattern(config.alpha_pattern)
    sizes = size_layers(layers, rank, config.alpha, ranks, alphas, config.use_rslora, spec.num_layers)
    experts = {path: shape[0] for path, shape in spec.parameter_shapes().items()}
    return {path: Size(size.rank * experts.get(path, 1), size.scale) for path, size in sizes.items()}


def narrowed(rank: int, init: Init, sizes: Mapping[str, Size], spec: ModelSpec) -> dict[str, Size]:
    """All that they can have for layers too narrow for the rank that others have, such as gates of one output.

    Their scale is that of the others. A rank that no layer can have, or that a pattern gives, is left as it is.
    """
    shapes = {path: shape for path, shape in spec.linear_shapes().items() if path in sizes}
    most = {path: init.most_rank(shape) for path, shape in shapes.items()}
    if rank > max(most.values(), default=0):
        return {}
    return {
        path: Size(init.allowed_rank(rank, shape), sizes[path].scale)
        for path, shape in shapes.items()
        if most[path] < rank and sizes[path].rank in (rank, init.allowed_rank(rank, shape))
    }


def _rank_problems(init: Init, sizes: Mapping[str, Size], shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """For each rank that is too large for a layer, the smallest such layer; and the ranks that no layer can have."""
    falling = sorted(reversed(list(sizes)), key=lambda layer: -min(shapes[layer]))
    smallest = {sizes[layer].rank: layer for layer in falling}  # the last of a rank stays: the first of the smallest
    shared = f", of whose gradient init {init} takes {init.ranks_read} directions for each rank"
    problems = [
        f"--rank {rank}: expected at most {init.most_rank(shapes[layer])} for {layer}, which is (out, in) "
        f"{shapes[layer]}{shared if init.ranks_read > 1 else ''}"
        for rank, layer in sorted(smallest.items())
        if rank > init.most_rank(shapes[layer])
    ]
    if odd := [rank for rank in sorted(smallest) if rank % init.rank_step]:
        problems.append(f"--rank {listing(odd)}: expected a multiple of {init.rank_step} for init {init}")
    return problems


def _quantised_problems(init: Init, config: TrainConfig, model: Model, layers: Sequence[str]) -> list[str]:
    """Why the base, or how it is kept, leaves nothing for an init that is made from what quantising loses."""
    dtypes = sorted({model.base.weights[f"{layer}.weight"].dtype for layer in layers} - set(FLOAT_DTYPES))
    problems, why = [], f"init {init} is made from what quantising loses, and"
    if dtypes:
        problems.append(
            f"{why} {model.base.name} is quantised already ({listing(dtypes)}): take the folder of float weights it "
            "was made from, or another init"
        )
    if config.store != "int8" and (config.compute != "int8" or config.store == "file"):
        problems.append(f"{why} --store {config.store} does not quantise: add --store int8")
    return problems


# ---- after it is loaded ---------------------------------------------------------------------------------------------


def initialise(
    init: Init,
    config: TrainConfig,
    sizes: Mapping[str, Size],
    data: CalibrationData,
    session: CalibrationSession,
    log: EventLog,
) -> Initialization:
    """Choose the ranks that were left open, and make the adapter that training begins with."""
    began, measured = time.perf_counter(), dict[str, Any]()
    _check_capability(init, config, session.capabilities)
    calibration = Calibration(data, session, log)
    if init.needs == "adapter":
        log.decision("ranks and scales: those of the adapter that training goes on with")
        config = _with_sizes(config, sizes)
    elif config.rank is None:
        sizes = choose_ranks(config, init, calibration)
        measured["ranks"] = {path: size.rank for path, size in sizes.items()}
        config = _with_sizes(config, sizes)
    adapter = make_adapter(init, sizes, calibration)
    if init.is_delta:
        adapter = replace(adapter, origin=adapter.layers)
    if config.use_dora:
        adapter = session.with_magnitudes(adapter)
    seconds = time.perf_counter() - began
    if init.needs != "nothing" or measured:
        log.note(f"init {init} took {seconds:.1f} s")
    return Initialization(adapter, config, {**measured, "seconds": seconds})


def _check_capability(init: Init, config: TrainConfig, capabilities: Set[str], who: str = "this backend") -> None:
    """Refuse by name what needs calibration, or the weights, where the session has none to give."""
    needed = {"nothing": "", "adapter": "", "weights": "weights"}.get(init.needs, CAPABILITY)
    wanted = [f"--init {init}"] if needed and needed not in capabilities else []
    wanted += (
        ["--rank auto"] if config.rank is None and init.needs != "adapter" and CAPABILITY not in capabilities else []
    )
    if wanted:
        plain = listing(
            name for name, known in INITS.items() if known.needs == "nothing" or known.needs in capabilities
        )
        raise ConfigError(
            f"{listing(wanted)}: {who} cannot calibrate; expected a number for --rank, and an --init of {plain} "
            "or adapter:PATH"
        )


def _with_sizes(config: TrainConfig, sizes: Mapping[str, Size]) -> TrainConfig:
    """The options that give every layer its size again."""
    alphas = {
        path: size.scale * (math.sqrt(size.rank) if config.use_rslora else size.rank) for path, size in sizes.items()
    }
    rank = Counter(size.rank for size in sizes.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return config.replace(
        rank=rank, alpha=alpha, rank_budget=None, energy=None,
        rank_pattern=tuple(f"{path}={size.rank}" for path, size in sizes.items() if size.rank != rank),
        alpha_pattern=tuple(f"{path}={number!r}" for path, number in alphas.items() if number != alpha),
    )  # fmt: skip


def captured_by_inits(
    sizes: Mapping[str, Size], calibration: Calibration[CalibrationSession]
) -> dict[str, dict[str, Energy]]:
    """What each row of A captures of ‖G‖², and ‖G‖², of the gradient of W on other rows, by init and layer path."""
    candidates = {}
    for name in COMPARED:
        layers = make_adapter(INITS[name], sizes, calibration).layers
        candidates[name] = {path: np.asarray(factors.A, np.float32) for path, factors in layers.items()}
    calibration.log.stage("measuring the gradient of other rows")
    return calibration.captured(candidates)


# ---- A and B, from what the init needs ------------------------------------------------------------------------------


def make_adapter(init: Init, sizes: Mapping[str, Size], calibration: Calibration[Any]) -> Adapter:
    """Gather what an init needs for each layer, and build A and B from it."""
    if init.needs == "adapter":
        return Adapter(load_adapter(init.path).layers)
    if init.needs == "nothing":
        data = calibration.data
        return fresh_adapter(data.shapes, init.name, sizes, data.seed, data.experts)
    build, data = BUILDERS[init.name], calibration.data
    bare = {path: LayerData(path, data.shapes[path], *size, data.seed) for path, size in sizes.items()}
    layers = {layer.path: build(layer) for layer in _GATHERED[init.needs](init, bare, calibration)}
    return Adapter({path: layers[path] for path in sizes})


Gathering = Callable[[Init, Mapping[str, LayerData], Calibration[Any]], Iterator[LayerData]]


def _weights(init: Init, layers: Mapping[str, LayerData], calibration: Calibration[Any]) -> Iterator[LayerData]:
    weights = calibration.weights(f"init {init} decomposes it")
    return (replace(layers[path], weight=weight) for path, weight in weights)


def _inputs(init: Init, layers: Mapping[str, LayerData], calibration: Calibration[Any]) -> Iterator[LayerData]:
    for paths, moments in calibration.moments(init.uses_general_text):
        for path in paths:
            if path in layers:  # in delta form it takes a piece of W
                weight = calibration.session.file_weight(path) if init.is_delta else None
                yield replace(layers[path], weight=weight, moments=moments)


def _gradients(init: Init, layers: Mapping[str, LayerData], calibration: Calibration[Any]) -> Iterator[LayerData]:
    ranks = {path: layer.rank * init.ranks_read for path, layer in layers.items()}
    sketches = calibration.sketches(ranks, init.is_weighted)
    return (replace(layer, sketch=sketches[path]) for path, layer in layers.items())


def _quantised(init: Init, layers: Mapping[str, LayerData], calibration: Calibration[Any]) -> Iterator[LayerData]:
    for path, weight in calibration.weights(f"init {init} decomposes what quantising it loses"):
        yield replace(layers[path], weight=weight, kept=calibration.session.kept_weight(path))


_GATHERED: dict[str, Gathering] = {
    "weights": _weights, "inputs": _inputs, "gradients": _gradients, "quantised": _quantised,
}  # fmt: skip
