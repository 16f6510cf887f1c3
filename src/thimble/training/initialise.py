"""Where training begins: the rank of each layer, and A and B; drawn, decomposed, or found by looking at the data.

What can be refused without the base is (`check_start`); the rest is made once it is loaded and before anything is
written, so that a weight that cannot be decomposed still refuses the run.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from thimble.config.options import TrainConfig, read_pattern
from thimble.core.adapter import Adapter, fresh_adapter
from thimble.core.inits import corda, eva, from_sketch, from_weight, loftq, with_zero_b
from thimble.core.method import ADAPTER, AUTO, INITS, init_name
from thimble.core.targets import Size, size_layers
from thimble.data.model import Model
from thimble.errors import Problems, listing
from thimble.events import EventLog
from thimble.files.peft import load_adapter
from thimble.models.adapters import check_fits
from thimble.models.spec import DecoderSpec
from thimble.training import run_folder
from thimble.training.calibration import AUTO_RANK, MOST_RANK, CalibrationData, choose, choose_ranks
from thimble.training.checkpoint import latest_checkpoint

if TYPE_CHECKING:
    from thimble.backends.torch.session import TorchSession
    from thimble.training.plan import RunPlan

FLOAT_TYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        adapter: The adapter before the first step.
        config: The options, with init and ranks resolved.
        numbers: What was measured for the choice, by name, and the seconds it all took.
    """

    adapter: Adapter
    config: TrainConfig
    numbers: dict[str, Any] = field(default_factory=dict)


# ---- before the base is loaded --------------------------------------------------------------------------------------


def _plan_sizes(config: TrainConfig, spec: DecoderSpec, layers: Sequence[str]) -> dict[str, Size]:
    """Rank and scale of each layer as far as they are known before training; rank auto counts as the most it may be."""
    shapes = spec.linear_shapes()
    if config.rank is None and config.energy is not None:
        return {layer: Size(min(MOST_RANK, *shapes[layer]), 1.0) for layer in layers}
    rank = config.rank or AUTO_RANK
    if config.rank_budget is not None:
        rank = max(1, math.ceil(config.rank_budget / sum(sum(shapes[layer]) for layer in layers)))
    ranks, alphas = read_pattern(config.rank_pattern), read_pattern(config.alpha_pattern)
    return size_layers(layers, rank, config.alpha, ranks, alphas, config.use_rslora, spec.num_layers)


def check_start(config: TrainConfig, model: Model, layers: Sequence[str], folder: Path) -> dict[str, Size]:
    """Refuse ranks and starts that cannot be.

    Args:
        config: The options.
        model: The base.
        layers: Paths of the adapted layers.
        folder: The run folder, which knows where it began if it is resumed.

    Returns:
        Sizes of the layers, as far as they are known.

    Raises:
        InputError: With every problem found, naming the layers.
        AdapterError: If the adapter to start from cannot be read or does not fit.
    """
    shapes, init = model.base.spec.linear_shapes(), config.init
    if init_name(init) == ADAPTER:
        is_resumed = config.resume and latest_checkpoint(folder) and (folder / run_folder.START).is_dir()
        path = str(folder / run_folder.START) if is_resumed else init.removeprefix(ADAPTER + ":")
        adapter = load_adapter(path)
        check_fits(path, adapter, model.base)
        return {layer: Size(factors.rank, factors.scale) for layer, factors in adapter.layers.items()}
    problems = Problems()
    sizes = problems.attempt(_plan_sizes, config, model.base.spec, layers)
    plain = config.replace(rank_pattern=(), alpha_pattern=())
    sizes = sizes or _plan_sizes(plain, model.base.spec, layers)  # so that what else is wrong is told too
    problems.add(*_rank_problems(config, sizes, shapes))
    if init == "orthogonal" and any(size.rank % 2 for size in sizes.values()):
        odd = sorted({size.rank for size in sizes.values() if size.rank % 2})
        problems.add(f"init orthogonal makes A and B of halves, and rank is {listing(odd)}: expected even ranks")
    least = sum(sum(shapes[layer]) for layer in layers)
    if config.rank_budget is not None and config.rank_budget < least:
        problems.add(f"rank_budget is {config.rank_budget:,}: expected at least {least:,}, rank 1 for every layer")
    problems.add(*_loftq_problems(config, model, layers))
    problems.required()
    return sizes


def _rank_problems(config: TrainConfig, sizes: Mapping[str, Size], shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """For each rank that is too large for a layer, the smallest such layer."""
    if config.rank is None:
        return []
    parts, halved = (2, ", halved for gradient:lora-ga") if config.init == "gradient:lora-ga" else (1, "")
    smallest: dict[int, str] = {}
    for layer, size in sizes.items():
        known = smallest.setdefault(size.rank, layer)
        if min(shapes[layer]) < min(shapes[known]):
            smallest[size.rank] = layer
    return [
        f"rank is {rank}: expected at most {min(shapes[layer]) // parts}, the smaller side of {layer} "
        f"{shapes[layer]}{halved}"
        for rank, layer in sorted(smallest.items())
        if rank > min(shapes[layer]) // parts
    ]


def _loftq_problems(config: TrainConfig, model: Model, layers: Sequence[str]) -> list[str]:
    if config.init != "loftq":
        return []
    kinds = sorted({model.base.weights[f"{layer}.weight"].dtype for layer in layers} - set(FLOAT_TYPES))
    problems = []
    starts = "init loftq starts from what quantising loses, and"
    if kinds:
        problems.append(
            f"{starts} {model.base.name} is quantised already ({listing(kinds)}): take the folder of float weights it "
            "was made from, or another init"
        )
    if config.store != "int8" and config.compute != "int8":
        problems.append(f"{starts} store {config.store} does not quantise: add --store int8")
    return problems


# ---- after it is loaded ---------------------------------------------------------------------------------------------


def make_start(run_plan: "RunPlan", session: "TorchSession", log: EventLog) -> Start:
    """Decide what was left open about init and ranks, and make the adapter that training begins with.

    Args:
        run_plan: The run.
        session: The loaded base.
        log: Hears of progress and decisions.

    Returns:
        The start.

    Raises:
        BaseModelError: If weights that are to be decomposed are zero or NaN or Inf.
    """
    began = time.perf_counter()
    calibration, config, sizes = CalibrationData(run_plan, session, log), run_plan.config, run_plan.sizes
    numbers: dict[str, Any] = {}
    if config.init == AUTO:
        chosen, numbers = choose(calibration, lambda init: _a_of(config.replace(init=init), calibration))
        config = config.replace(init=chosen, calibration_steps=calibration.steps)
    if init_name(config.init) == ADAPTER:
        log.decision("ranks and scales: those of the adapter to start from")
        config = _with_sizes(config, sizes)
    elif config.rank is None:
        sizes, found = choose_ranks(config, calibration)
        numbers |= found
        config = _with_sizes(config, sizes)
    init = INITS[init_name(config.init)]
    adapter = _MAKERS[init.needs](config, sizes, calibration)
    if init.is_delta:
        adapter = replace(adapter, origin=adapter.layers)
    if config.use_dora:
        adapter = session.with_magnitudes(adapter)
    numbers["seconds"] = time.perf_counter() - began
    if init.needs != "nothing" or numbers.keys() > {"seconds"}:
        log.note(f"start: init {config.init} took {numbers['seconds']:.1f} s")
    if config.explain:
        _explain(numbers, log)
    return Start(adapter, config, numbers)


def _explain(numbers: Mapping[str, Any], log: EventLog) -> None:
    """Tell what was measured, a line for each start and each layer."""
    for name, kinds in numbers.get("captured_by_kind", {}).items():
        parts = ", ".join(f"{kind} {share:.3f}" for kind, share in kinds.items())
        log.note(f"share of the gradient captured by {name}: {numbers['captured'][name]:.3f}; {parts}")
    for name, rank in numbers.get("ranks", {}).items():
        log.note(f"rank of {name}: {rank}")


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


# ---- A and B, by what they are made of ------------------------------------------------------------------------------


def _drawn(config: TrainConfig, sizes: Mapping[str, Size], calibration: CalibrationData) -> Adapter:
    return fresh_adapter(calibration.run_plan.model.base.spec.linear_shapes(), config.init, sizes, config.seed)


def _from_weights(config: TrainConfig, sizes: Mapping[str, Size], calibration: CalibrationData) -> Adapter:
    found = {
        path: from_weight(config.init, values, *sizes[path])
        for path, values in calibration.weights(f"init {config.init} decomposes it")
    }
    return Adapter(found)


def _from_inputs(config: TrainConfig, sizes: Mapping[str, Size], calibration: CalibrationData) -> Adapter:
    from thimble.backends.torch.calibrate import input_moments

    shapes, found = calibration.run_plan.model.base.spec.linear_shapes(), {}
    is_knowledge = config.init == "corda:knowledge"
    what = "general text" if is_knowledge else f"{calibration.steps} steps"
    calibration.log.stage(f"looking at the inputs of every layer over {what}")
    for paths, moments in input_moments(
        calibration.session, calibration.general() if is_knowledge else calibration.batches()
    ):
        shared: dict[int, NDArray[np.float32]] = {}  # layers that read the same input begin with the same A
        for path in paths:
            if path not in sizes:
                continue
            rank, scale = sizes[path]
            if config.init.startswith("corda"):
                found[path] = corda(calibration.session.file_weight(path), moments, rank, scale, is_knowledge)
                continue
            if rank not in shared:
                shared[rank] = eva(moments, rank, config.init == "eva:centred")
            found[path] = with_zero_b(shared[rank], shapes[path][0], scale)
    return Adapter({path: found[path] for path in sizes})


def _from_gradients(config: TrainConfig, sizes: Mapping[str, Size], calibration: CalibrationData) -> Adapter:
    factor = 2 if config.init == "gradient:lora-ga" else 1
    ranks = {path: size.rank * factor for path, size in sizes.items()}
    sketches = calibration.sketches(ranks, config.init == "weighted-pca")
    shapes = calibration.run_plan.model.base.spec.linear_shapes()
    return Adapter(
        {path: from_sketch(config.init, sketches[path], shapes[path], *size) for path, size in sizes.items()}
    )


def _from_quantising(config: TrainConfig, sizes: Mapping[str, Size], calibration: CalibrationData) -> Adapter:
    found = {
        path: loftq(values, calibration.session.kept_weight(path), *sizes[path])
        for path, values in calibration.weights("init loftq decomposes what quantising it loses")
    }
    return Adapter(found)


def _from_adapter(config: TrainConfig, sizes: Mapping[str, Size], calibration: CalibrationData) -> Adapter:
    adapter = load_adapter(config.init.removeprefix(ADAPTER + ":"))
    return Adapter(adapter.layers)


_MAKERS: dict[str, Callable[[TrainConfig, Mapping[str, Size], CalibrationData], Adapter]] = {
    "nothing": _drawn, "weights": _from_weights, "inputs": _from_inputs, "gradients": _from_gradients,
    "quantised": _from_quantising, "adapter": _from_adapter,
}  # fmt: skip


def _a_of(config: TrainConfig, calibration: CalibrationData) -> dict[str, NDArray[np.float32]]:
    adapter = _MAKERS[INITS[config.init].needs](config, calibration.run_plan.sizes, calibration)
    return {path: np.asarray(factors.A, np.float32) for path, factors in adapter.layers.items()}
