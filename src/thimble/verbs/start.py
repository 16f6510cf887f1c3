"""Where training begins: the rank of each layer, and A and B; drawn, decomposed, or found by looking at the data.

Everything here happens after the base is loaded and before anything is written, so a weight that cannot be decomposed
refuses the run.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from thimble.core.adapter import Adapter, fresh_adapter, load_adapter
from thimble.core.config import TrainConfig, read_pattern
from thimble.core.lowrank import svd
from thimble.core.method import ADAPTER, AUTO, INITS, init_name
from thimble.core.starts import Sketch, corda, eva, from_sketch, from_weight, loftq, with_zero_b
from thimble.core.targets import Size, share_out, size_layers
from thimble.data.batches import Batch, micro_batches
from thimble.errors import BaseModelError, ConfigError, listing
from thimble.verbs.events import Teller
from thimble.verbs.prepare import Model, check_fits

if TYPE_CHECKING:
    from thimble.torch_backend.session import TorchSession
    from thimble.verbs.job import Job

AUTO_RANK = 16  # whose number of parameters rank auto shares out when no budget is given
RANK_SPREAD = 2  # times the mean rank, and a quarter of it, are the bounds of rank auto
MOST_RANK = 128  # by a share of energy
FLOAT_TYPES = ("F32", "F16", "BF16")
AUTO_INITS = ("kaiming", "eva", "gradient")  # whose A x are equally long: one learning rate is right for all
CLEARLY_MORE = 5.0  # times as much of the gradient must a start that costs a look at the data capture
WORTH_SHARING = 1.05  # times as much must ranks by layer capture as one rank for all
MOST_STEPS = 2000  # of longer runs, a faster beginning is a small part
LOOK_SHARE = 0.02  # of a run that init auto may take, as far as that gives it LEAST_LOOK steps to look at
LEAST_LOOK, MOST_LOOK = 2, 8
LOOK_COST = 3.0  # steps that looking at one step takes: two passes for gradients, one forward for inputs


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        adapter: The adapter before the first step.
        config: The knobs, with init and ranks resolved.
        numbers: What was measured for the choice, by name, and the seconds it all took.
    """

    adapter: Adapter
    config: TrainConfig
    numbers: dict[str, Any] = field(default_factory=dict)


# ---- before the base is loaded --------------------------------------------------------------------------------------


def plan_sizes(config: TrainConfig, layers: Sequence[str]) -> dict[str, Size]:
    """Rank and scale of each layer as far as they are known before training; rank auto counts as its mean."""
    rank = AUTO_RANK if config.rank is None else config.rank
    ranks, alphas = read_pattern(config.rank_pattern), read_pattern(config.alpha_pattern)
    return size_layers(layers, rank, config.alpha, ranks, alphas, config.use_rslora)


def check_start(config: TrainConfig, model: Model, layers: Sequence[str]) -> dict[str, Size]:
    """Refuse ranks and starts that cannot be.

    Args:
        config: The knobs.
        model: The base.
        layers: Paths of the adapted layers.

    Returns:
        Sizes of the layers, as far as they are known.

    Raises:
        ConfigError: With every problem found, naming the layers.
        AdapterError: If the adapter to start from cannot be read or does not fit.
    """
    sizes, shapes, init = plan_sizes(config, layers), model.base.spec.linear_shapes(), config.init
    if init_name(init) == ADAPTER:
        path = init.removeprefix(ADAPTER + ":")
        adapter = load_adapter(path)
        check_fits(path, adapter, model.base)
        return {layer: Size(factors.rank, factors.scale) for layer, factors in adapter.layers.items()}
    problems = _rank_problems(config, sizes, shapes)
    if init == "orthogonal" and any(size.rank % 2 for size in sizes.values()):
        odd = sorted({size.rank for size in sizes.values() if size.rank % 2})
        problems.append(f"init orthogonal makes A and B of halves, and rank is {listing(odd)}: expected even ranks")
    least = sum(sum(shapes[layer]) for layer in layers)
    if config.rank_budget is not None and config.rank_budget < least:
        problems.append(f"rank_budget is {config.rank_budget:,}: expected at least {least:,}, rank 1 for every layer")
    problems += _loftq_problems(config, model, layers)
    if problems:
        raise ConfigError(*problems)
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


def make_start(job: "Job", session: "TorchSession", tell: Teller) -> Start:
    """Decide what was left open about init and ranks, and make the adapter that training begins with.

    Args:
        job: The run.
        session: The loaded base.
        tell: Hears of progress and decisions.

    Returns:
        The start.

    Raises:
        BaseModelError: If weights that are to be decomposed are zero or not finite.
    """
    began = time.perf_counter()
    look, config, sizes = _Look(job, session, tell), job.config, job.sizes
    numbers: dict[str, Any] = {}
    if config.init == AUTO:
        init, sizes, numbers = _choose(config, look)
        config = config.replace(init=init)
    if config.rank is None:
        sizes, found = _choose_ranks(config, look)
        numbers |= found
    if sizes is not job.sizes:
        config = _with_sizes(config, sizes)
    init = INITS[init_name(config.init)]
    adapter = _MAKERS[init.needs](config, sizes, look)
    if init.is_delta:
        adapter = replace(adapter, origin=adapter.layers)
    if config.use_dora:
        adapter = session.with_magnitudes(adapter)
    numbers["seconds"] = time.perf_counter() - began
    if init.needs != "nothing" or numbers.keys() > {"seconds"}:
        tell.note(f"start: init {config.init} took {numbers['seconds']:.1f} s")
    return Start(adapter, config, numbers)


def _with_sizes(config: TrainConfig, sizes: Mapping[str, Size]) -> TrainConfig:
    """The knobs that give every layer its size again."""
    rank = Counter(size.rank for size in sizes.values()).most_common(1)[0][0]
    others = {path: size for path, size in sizes.items() if size.rank != rank}
    factor = math.sqrt if config.use_rslora else float
    alphas = {path: size.scale * factor(size.rank) for path, size in others.items()}
    return config.replace(
        rank=rank, alpha=next(s.scale for s in sizes.values()) * factor(rank), rank_budget=None, energy=None,
        rank_pattern=tuple(f"{path}={size.rank}" for path, size in others.items()),
        alpha_pattern=tuple(f"{path}={alpha:.10g}" for path, alpha in alphas.items()),
    )  # fmt: skip


class _Look:
    """The rows that starts are made from and judged by, and what was found on them."""

    def __init__(self, job: "Job", session: "TorchSession", tell: Teller) -> None:
        self.job, self.session, self.tell = job, session, tell
        self.steps = job.config.calibration_steps
        self._sketches: dict[str, Sketch] = {}

    def batches(self) -> list[Batch]:
        """Rows of the first steps, as micro-batches."""
        course, rows = self.job.course, self.job.examples.train
        chosen = dict.fromkeys(number for step in range(self.steps) for number in course.rows(step))
        return micro_batches([rows[number] for number in chosen], self.job.way.micro_tokens)

    def held_out(self) -> list[Batch]:
        """A step's worth of rows not among `batches`: held-out ones, or those of the next step."""
        rows = list(self.job.examples.valid) or [
            self.job.examples.train[number] for number in self.job.course.rows(self.steps)
        ]
        most, chosen = self.job.config.batch_tokens, []
        for row in rows:
            if chosen and sum(len(other.ids) for other in chosen) + len(row.ids) > most:
                break
            chosen.append(row)
        return micro_batches(chosen, self.job.way.micro_tokens)

    def weights(self, needs: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """The adapted weights one by one; refuses those that cannot be decomposed."""
        problems, layers = [], self.job.layers
        for number, path in enumerate(layers):
            values = self.session.file_weight(path)
            if not np.isfinite(values).all():
                problems.append(f"{path} holds numbers that are not finite: {needs}; copy the base again")
            elif not values.any():
                problems.append(f"{path} holds only zeros: {needs}; leave the layer out with --targets")
            elif not problems:
                yield path, values
            self.tell.progress("layers decomposed,", number + 1, len(layers))
        if problems:
            raise BaseModelError(*problems[:5])

    def sketches(self, ranks: Mapping[str, int], is_weighted: bool = False) -> dict[str, Sketch]:
        """Main directions of the gradients."""
        from thimble.torch_backend.calibrate import sketch_gradients

        is_known = not is_weighted and all(
            path in self._sketches and len(self._sketches[path].values) >= rank for path, rank in ranks.items()
        )
        if is_known:
            return self._sketches
        self.tell.stage(f"looking at the gradients of {self.steps} steps")
        found = sketch_gradients(self.session, self.batches(), ranks, is_weighted, self.job.config.seed)
        self._sketches = {} if is_weighted else found
        return found


# ---- A and B, by what they are made of ------------------------------------------------------------------------------


def _drawn(config: TrainConfig, sizes: Mapping[str, Size], look: _Look) -> Adapter:
    return fresh_adapter(look.job.model.base.spec.linear_shapes(), config.init, sizes, config.seed)


def _from_weights(config: TrainConfig, sizes: Mapping[str, Size], look: _Look) -> Adapter:
    found = {
        path: from_weight(config.init, values, *sizes[path])[0]
        for path, values in look.weights(f"init {config.init} decomposes it")
    }
    return Adapter(found)


def _from_inputs(config: TrainConfig, sizes: Mapping[str, Size], look: _Look) -> Adapter:
    from thimble.torch_backend.calibrate import input_moments

    base, found = look.job.model.base, {}
    look.tell.stage(f"looking at the inputs of every layer over {look.steps} steps")
    for paths, moments in input_moments(look.session, look.batches()):
        shared: dict[int, NDArray[np.float32]] = {}  # layers that read the same input begin with the same A
        for path in paths:
            if path not in sizes:
                continue
            rank, scale = sizes[path]
            if config.init.startswith("corda"):
                found[path] = corda(
                    look.session.file_weight(path), moments, rank, scale, config.init == "corda:knowledge"
                )
                continue
            if rank not in shared:
                shared[rank] = eva(moments, rank, config.init == "eva:centred")
            found[path] = with_zero_b(shared[rank], base.spec.linear_shapes()[path][0], scale)
    return Adapter({path: found[path] for path in sizes})


def _from_gradients(config: TrainConfig, sizes: Mapping[str, Size], look: _Look) -> Adapter:
    factor = 2 if config.init == "gradient:lora-ga" else 1
    ranks = {path: size.rank * factor for path, size in sizes.items()}
    sketches = look.sketches(ranks, config.init == "weighted-pca")
    shapes = look.job.model.base.spec.linear_shapes()
    return Adapter(
        {path: from_sketch(config.init, sketches[path], shapes[path], *size) for path, size in sizes.items()}
    )


def _from_quantising(config: TrainConfig, sizes: Mapping[str, Size], look: _Look) -> Adapter:
    found = {
        path: loftq(values, look.session.kept_weight(path), *sizes[path])
        for path, values in look.weights("init loftq decomposes what quantising it loses")
    }
    return Adapter(found)


def _from_adapter(config: TrainConfig, sizes: Mapping[str, Size], look: _Look) -> Adapter:
    adapter = load_adapter(config.init.removeprefix(ADAPTER + ":"))
    return Adapter(adapter.layers)


_MAKERS: dict[str, Callable[[TrainConfig, Mapping[str, Size], _Look], Adapter]] = {
    "nothing": _drawn, "weights": _from_weights, "inputs": _from_inputs, "gradients": _from_gradients,
    "quantised": _from_quantising, "adapter": _from_adapter,
}  # fmt: skip


# ---- init auto ------------------------------------------------------------------------------------------------------


def _choose(config: TrainConfig, look: _Look) -> tuple[str, dict[str, Size], dict[str, Any]]:
    """The start that captures most of the gradient of held-out rows, if clearly more than a random one does."""
    job = look.job
    steps = job.course.total_steps or max(1, round(job.course.minutes * 60 / job.seconds_per_step))  # type: ignore[operator]
    look.steps = min(MOST_LOOK, max(LEAST_LOOK, round(LOOK_SHARE * steps / LOOK_COST)))
    cost = look.steps * LOOK_COST
    about = f"about {cost * job.seconds_per_step:.0f} s, {cost / steps:.0%} of the run"
    look.tell.decision(f"init auto looks at {look.steps} steps first: {about}")
    wide = {path: min(RANK_SPREAD * size.rank, *_shape(job, path)) for path, size in job.sizes.items()}
    look.sketches(wide)
    candidates = {
        init: {
            path: factors.A
            for path, factors in _MAKERS[INITS[init].needs](config.replace(init=init), job.sizes, look).layers.items()
        }
        for init in AUTO_INITS
    }
    candidates["wide"] = {path: look.sketches(wide)[path].right[:rank] for path, rank in wide.items()}
    scores, sizes = _score(candidates, look)
    best = max(AUTO_INITS, key=lambda init: scores[init])
    times = scores[best] / scores["kaiming"]
    if times < CLEARLY_MORE or steps > MOST_STEPS:
        best = "kaiming"
    shown = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
    look.tell.decision(f"init {best}: of the gradient of held-out rows, each start captures: {shown}")
    if sizes is not job.sizes:
        ranks = [size.rank for size in sizes.values()]
        look.tell.decision(f"rank: {min(ranks)} to {max(ranks)} by layer, for the same number of parameters")
    return best, sizes, {"captured": scores, "looked_at_steps": look.steps}


def _shape(job: "Job", path: str) -> tuple[int, int]:
    return job.model.base.spec.linear_shapes()[path]


def _score(
    candidates: Mapping[str, Mapping[str, NDArray[np.float32]]], look: _Look
) -> tuple[dict[str, float], dict[str, Size]]:
    """What each start captures, and sizes shared out by gradient energy if these capture more."""
    from thimble.torch_backend.calibrate import captured_energy

    sizes = look.job.sizes
    look.tell.stage("measuring the starts on held-out rows")
    found = captured_energy(look.session, look.held_out(), candidates)
    whole = sum(total for _, total in found["kaiming"].values())
    scores = {init: sum(float(parts.sum()) for parts, _ in found[init].values()) / whole for init in AUTO_INITS}
    if look.job.config.rank_pattern or look.job.config.rank is None:
        return scores, sizes
    sketches = look.sketches({})
    costs = {path: sum(_shape(look.job, path)) for path in sizes}
    mean = look.job.config.rank or AUTO_RANK
    ranks = share_out(
        {path: sketches[path].values[: len(rows)] ** 2 for path, rows in candidates["wide"].items()},  # type: ignore[misc]
        costs, sum(sizes[path].rank * cost for path, cost in costs.items()), max(1, mean // RANK_SPREAD**2),
    )  # fmt: skip
    shared = sum(float(found["wide"][path][0][:rank].sum()) for path, rank in ranks.items())
    even = sum(float(found["wide"][path][0][: size.rank].sum()) for path, size in sizes.items())
    scores["gradient, ranks by layer"] = shared / whole
    if shared < WORTH_SHARING * even:
        return scores, sizes
    return scores, {path: Size(rank, sizes[path].scale) for path, rank in ranks.items()}


# ---- ranks ----------------------------------------------------------------------------------------------------------


def _choose_ranks(config: TrainConfig, look: _Look) -> tuple[dict[str, Size], dict[str, Any]]:
    """Ranks by energy: a budget shared out by gradient energy per parameter, or a share of energy for each layer."""
    shapes = {path: look.job.model.base.spec.linear_shapes()[path] for path in look.job.layers}
    energies, totals = _ENERGIES[config.energy_of](config, shapes, look)
    if config.energy is not None:
        ranks = {
            path: min(_rank_holding(values, totals[path], config.energy), *shapes[path])
            for path, values in energies.items()
        }
        how = f"{config.energy:g} of the energy of {config.energy_of}"
        full = sum(rank >= MOST_RANK for rank in ranks.values())
        if full:
            look.tell.warning(f"{full} layers need more than rank {MOST_RANK} for {how}, and get {MOST_RANK}")
    else:
        ranks = _ranks_of_budget(config, energies, shapes)
        how = f"{sum(rank * sum(shapes[path]) for path, rank in ranks.items()):,} parameters, by {config.energy_of}"
    scale = config.alpha / AUTO_RANK  # the same for all, so that the learning rate stays right
    sizes = {path: Size(rank, scale) for path, rank in ranks.items()}
    low, high = min(ranks.values()), max(ranks.values())
    look.tell.decision(f"rank: {low} to {high}, {np.mean(list(ranks.values())):.1f} on average: {how}")
    if config.energy_of == "weights":
        look.tell.warning(
            "the energy of a weight says how well it can be truncated, not how large a change it needs: a trained "
            "update has a small rank whatever the spectrum of W"
        )
    return sizes, {"ranks": ranks}


def _ranks_of_budget(
    config: TrainConfig, energies: Mapping[str, NDArray[np.float64]], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, int]:
    costs = {path: sum(shape) for path, shape in shapes.items()}
    budget = config.rank_budget or AUTO_RANK * sum(costs.values())
    mean = budget / sum(costs.values())
    least, most = max(1, round(mean / RANK_SPREAD**2)), max(1, math.ceil(mean * RANK_SPREAD))
    return share_out({path: values[:most] for path, values in energies.items()}, costs, budget, least)


def _rank_holding(values: NDArray[np.float64], total: float, energy: float) -> int:
    held = np.cumsum(values)
    return int(min(np.searchsorted(held, energy * total * (1 - 1e-9)) + 1, len(values)))


Energies = tuple[dict[str, NDArray[np.float64]], dict[str, float]]


def _gradient_energies(config: TrainConfig, shapes: Mapping[str, tuple[int, int]], look: _Look) -> Energies:
    """Of each direction of the gradient, measured on rows it was not found on."""
    from thimble.torch_backend.calibrate import captured_energy

    wanted = MOST_RANK if config.energy else 2 * AUTO_RANK
    sketches = look.sketches({path: min(wanted, *shape) for path, shape in shapes.items()})
    rows = {path: sketch.right[:wanted] for path, sketch in sketches.items()}
    found = captured_energy(look.session, look.held_out(), {"": rows})[""]
    return {path: parts for path, (parts, _) in found.items()}, {path: whole for path, (_, whole) in found.items()}


def _activation_energies(config: TrainConfig, shapes: Mapping[str, tuple[int, int]], look: _Look) -> Energies:
    from thimble.torch_backend.calibrate import input_moments

    energies, totals = {}, {}
    for paths, moments in input_moments(look.session, look.batches()):
        values = np.maximum(np.linalg.eigvalsh(moments.mean_square.astype(np.float64))[::-1], 0)
        for path in paths:
            energies[path], totals[path] = values[:MOST_RANK], float(values.sum())
    return {path: energies[path] for path in shapes}, totals


def _weight_energies(config: TrainConfig, shapes: Mapping[str, tuple[int, int]], look: _Look) -> Energies:
    energies, totals = {}, {}
    for path, values in look.weights("its energy is asked for"):
        energies[path] = svd(values, min(MOST_RANK, *values.shape)).values ** 2
        totals[path] = float(np.square(values, dtype=np.float64).sum())
    return energies, totals


_ENERGIES = {"gradients": _gradient_energies, "activations": _activation_energies, "weights": _weight_energies}
