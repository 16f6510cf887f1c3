"""What the data show before training: which start captures most of the gradient, and which rank each layer needs.

Directions are found on rows of the first steps and judged on held-out rows, never on what they were fitted to.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from thimble.core.config import TrainConfig
from thimble.core.lowrank import svd
from thimble.core.starts import Sketch
from thimble.core.targets import Size, share_out
from thimble.data.batches import Batch, micro_batches
from thimble.errors import BaseModelError
from thimble.verbs.events import Teller

if TYPE_CHECKING:
    from thimble.torch_backend.session import TorchSession
    from thimble.verbs.job import Job

AUTO_RANK = 16  # whose number of parameters rank auto shares out when no budget is given
RANK_SPREAD = 2  # times the mean rank, and a quarter of it, are the bounds of rank auto
MOST_RANK = 128  # by a share of energy
AUTO_INITS = ("kaiming", "eva", "gradient")  # whose A x are equally long: one learning rate is right for all
CLEARLY_MORE = 5.0  # times as much of the gradient must a start that costs a look at the data capture
WORTH_SHARING = 1.05  # times as much must ranks by layer capture as one rank for all
MOST_STEPS = 2000  # of longer runs, a faster beginning is a small part
LOOK_SHARE = 0.02  # of a run that init auto may take, as far as that gives it LEAST_LOOK steps to look at
LEAST_LOOK, MOST_LOOK = 2, 8
LOOK_COST = 6.0  # steps that looking at one step takes, the judging of all starts included
MOST_LOOK_SHARE = 0.25  # of a run: a shorter one begins at random


Arrays = Mapping[str, NDArray[np.float32]]  # A by layer path


class Look:
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


# ---- init auto ------------------------------------------------------------------------------------------------------


def choose(
    config: TrainConfig, look: Look, make: Callable[[str], Arrays]
) -> tuple[str, dict[str, Size], dict[str, Any]]:
    """Choose the start that captures most of the gradient of held-out rows, if clearly more than a random one does.

    Args:
        config: The knobs.
        look: The rows.
        make: Makes A of every layer for a start.

    Returns:
        The init, the sizes of the layers, and what was measured.
    """
    job = look.job
    steps = job.course.total_steps or max(1, round(job.course.minutes * 60 / job.seconds_per_step))  # type: ignore[operator]
    look.steps = min(MOST_LOOK, max(LEAST_LOOK, round(LOOK_SHARE * steps / LOOK_COST)))
    cost = look.steps * LOOK_COST
    if cost > MOST_LOOK_SHARE * steps:
        look.tell.decision(f"init kaiming: {steps} steps are too few to look at {look.steps} of them first")
        return "kaiming", job.sizes, {}
    about = f"about {cost * job.seconds_per_step:.0f} s, {cost / steps:.0%} of the run"
    look.tell.decision(f"init auto looks at {look.steps} steps first: {about}")
    wide = {path: min(RANK_SPREAD * size.rank, *_shape(job, path)) for path, size in job.sizes.items()}
    look.sketches(wide)
    candidates: dict[str, Arrays] = {init: make(init) for init in AUTO_INITS}
    candidates["wide"] = {path: look.sketches(wide)[path].right[:rank] for path, rank in wide.items()}
    scores, by_kind, sizes = _score(candidates, look)
    best = max(AUTO_INITS, key=lambda init: scores[init])
    times = scores[best] / scores["kaiming"]
    if times < CLEARLY_MORE or steps > MOST_STEPS:
        best = "kaiming"
    shown = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
    look.tell.decision(f"init {best}: of the gradient of held-out rows, each start captures: {shown}")
    numbers = {"captured": scores, "captured_by_kind": by_kind, "looked_at_steps": look.steps}
    if sizes is not job.sizes:
        ranks = numbers["ranks"] = {path: size.rank for path, size in sizes.items()}
        low, high = min(ranks.values()), max(ranks.values())
        look.tell.decision(f"rank: {low} to {high} by layer, for the same number of parameters")
    return best, sizes, numbers


def _shape(job: "Job", path: str) -> tuple[int, int]:
    return job.model.base.spec.linear_shapes()[path]


def _score(
    candidates: Mapping[str, Mapping[str, NDArray[np.float32]]], look: Look
) -> tuple[dict[str, float], dict[str, dict[str, float]], dict[str, Size]]:
    """What each start captures, in all and by kind of layer, and sizes by layer if these let it capture more."""
    from thimble.torch_backend.calibrate import captured_energy

    sizes = look.job.sizes
    look.tell.stage("measuring the starts on held-out rows")
    found = captured_energy(look.session, look.held_out(), candidates)
    whole = sum(total for _, total in found["kaiming"].values())
    scores = {init: sum(float(parts.sum()) for parts, _ in found[init].values()) / whole for init in AUTO_INITS}
    by_kind = {init: _by_kind(found[init]) for init in AUTO_INITS}
    if look.job.config.rank_pattern or look.job.config.rank is None:
        return scores, by_kind, sizes
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
        return scores, by_kind, sizes
    return scores, by_kind, {path: Size(rank, sizes[path].scale) for path, rank in ranks.items()}


def _by_kind(found: Mapping[str, tuple[NDArray[np.float64], float]]) -> dict[str, float]:
    """Shares of the gradient captured in all layers of a kind."""
    parts: dict[str, tuple[float, float]] = {}
    for path, (part, whole) in found.items():
        kind = path.rsplit(".", 1)[-1]
        before = parts.get(kind, (0.0, 0.0))
        parts[kind] = before[0] + float(part.sum()), before[1] + whole
    return {kind: part / whole if whole else 0.0 for kind, (part, whole) in parts.items()}


# ---- ranks ----------------------------------------------------------------------------------------------------------


def choose_ranks(config: TrainConfig, look: Look) -> tuple[dict[str, Size], dict[str, Any]]:
    """Give each layer a rank: a budget shared out by energy per parameter, or a share of the energy for each layer.

    Args:
        config: The knobs.
        look: The rows.

    Returns:
        Sizes by layer path, and what was measured.
    """
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


def _gradient_energies(config: TrainConfig, shapes: Mapping[str, tuple[int, int]], look: Look) -> Energies:
    """Of each direction of the gradient, measured on rows it was not found on."""
    from thimble.torch_backend.calibrate import captured_energy

    wanted = MOST_RANK if config.energy else 2 * AUTO_RANK
    sketches = look.sketches({path: min(wanted, *shape) for path, shape in shapes.items()})
    rows = {path: sketch.right[:wanted] for path, sketch in sketches.items()}
    found = captured_energy(look.session, look.held_out(), {"": rows})[""]
    return {path: parts for path, (parts, _) in found.items()}, {path: whole for path, (_, whole) in found.items()}


def _activation_energies(config: TrainConfig, shapes: Mapping[str, tuple[int, int]], look: Look) -> Energies:
    from thimble.torch_backend.calibrate import input_moments

    energies, totals = {}, {}
    for paths, moments in input_moments(look.session, look.batches()):
        values = np.maximum(np.linalg.eigvalsh(moments.mean_square.astype(np.float64))[::-1], 0)
        for path in paths:
            energies[path], totals[path] = values[:MOST_RANK], float(values.sum())
    return {path: energies[path] for path in shapes}, totals


def _weight_energies(config: TrainConfig, shapes: Mapping[str, tuple[int, int]], look: Look) -> Energies:
    energies, totals = {}, {}
    for path, values in look.weights("its energy is asked for"):
        energies[path] = svd(values, min(MOST_RANK, *values.shape)).values ** 2
        totals[path] = float(np.square(values, dtype=np.float64).sum())
    return energies, totals


_ENERGIES = {"gradients": _gradient_energies, "activations": _activation_energies, "weights": _weight_energies}
