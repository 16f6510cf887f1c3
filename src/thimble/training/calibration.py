"""What the data show before training: which start captures most of the gradient, and which rank each layer needs.

Directions are found on some training rows and judged on others: never on what they were fitted to, and never on the
rows that the result is measured on.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from thimble.config.train import TrainConfig
from thimble.core.inits import Sketch
from thimble.core.lowrank import scale as scale_of
from thimble.core.lowrank import svd
from thimble.core.method import AUTO_RANK
from thimble.core.targets import Size, share_out
from thimble.data.batches import Batch, micro_batches
from thimble.errors import BaseModelError
from thimble.events import EventLog

if TYPE_CHECKING:
    from thimble.backends.torch.session import TorchSession
    from thimble.training.plan import RunPlan

RANK_SPREAD = 2  # times the mean rank, and a quarter of it, are the bounds of rank auto
MOST_RANK = 128  # by a share of energy
AUTO_INITS = ("kaiming", "eva", "gradient")  # whose A x are equally long: one learning rate is right for all
CLEARLY_MORE = 5.0  # times as much of the gradient must a start that costs a look at the data capture
MOST_STEPS = 2000  # of longer runs, a faster beginning is a small part
LOOK_SHARE = 0.02  # of a run that init auto may take, as far as that gives it LEAST_LOOK steps to look at
LEAST_LOOK, MOST_LOOK = 2, 8
LOOK_COST = 6.0  # steps that looking at one step takes, the judging of all starts included
MOST_LOOK_SHARE = 0.25  # of a run: a shorter one begins at random


Arrays = Mapping[str, NDArray[np.float32]]  # A by layer path


class CalibrationData:
    """The rows that starts are made from and judged by, and what was found on them."""

    def __init__(self, run_plan: "RunPlan", session: "TorchSession", log: EventLog) -> None:
        self.run_plan, self.session, self.log = run_plan, session, log
        self.steps = run_plan.config.calibration_steps
        self._sketches: dict[Any, dict[str, Sketch]] = {}  # the last ones, by what was asked for

    def batches(self) -> list[Batch]:
        """Rows that starts are made from, those of the first steps, as micro-batches."""
        return self._batches(self._numbers()[0])

    def others(self) -> list[Batch]:
        """Rows that starts are judged by: a step's worth of training rows that are not among `batches`."""
        return self._batches(self._numbers()[1])

    def _numbers(self) -> tuple[list[int], list[int]]:
        """Numbers of the rows to look at and of those to judge by; of few rows each gets a half."""
        step_schedule, steps = self.run_plan.step_schedule, self.steps
        looked = list(dict.fromkeys(number for step in range(steps) for number in step_schedule.rows(step)))
        others = [number for number in step_schedule.rows(steps) if number not in looked]
        return (looked, others) if others else (looked[::2], looked[1::2] or looked)

    def _batches(self, numbers: list[int]) -> list[Batch]:
        return micro_batches(
            [self.run_plan.examples.train[number] for number in numbers], self.run_plan.execution.micro_tokens
        )

    def general(self) -> list[Batch]:
        """General text, on which the base is not to change."""
        return micro_batches(self.run_plan.general, self.run_plan.execution.micro_tokens)

    def weights(self, needs: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """The adapted weights one by one; refuses those that cannot be decomposed."""
        problems, layers = [], self.run_plan.layers
        for number, path in enumerate(layers):
            values = self.session.file_weight(path)
            if not np.isfinite(values).all():
                problems.append(f"{path} holds numbers that are NaN or Inf: {needs}; copy the base again")
            elif not values.any():
                problems.append(f"{path} holds only zeros: {needs}; leave the layer out with --targets")
            elif not problems:
                yield path, values
            self.log.progress("layers decomposed,", number + 1, len(layers))
        if problems:
            raise BaseModelError(*problems[:5])

    def sketches(self, ranks: Mapping[str, int], is_weighted: bool = False) -> dict[str, Sketch]:
        """Main directions of the gradients."""
        from thimble.backends.torch.calibrate import sketch_gradients

        asked = is_weighted, tuple(ranks.items())
        if asked not in self._sketches:
            self.log.stage(f"looking at the gradients of {self.steps} steps")
            found = sketch_gradients(self.session, self.batches(), ranks, is_weighted, self.run_plan.config.seed)
            self._sketches = {asked: found}
        return self._sketches[asked]


# ---- init auto ------------------------------------------------------------------------------------------------------


def choose(calibration: CalibrationData, make: Callable[[str], Arrays]) -> tuple[str, dict[str, Any]]:
    """Choose the start that captures most of the gradient of other rows, if clearly more than a random one does.

    Args:
        calibration: The rows.
        make: Makes A of every layer for a start.

    Returns:
        The init, and what was measured.
    """
    run_plan = calibration.run_plan
    steps = run_plan.step_schedule.total_steps or max(
        1, round((run_plan.step_schedule.minutes or 0) * 60 / run_plan.seconds_per_step)
    )
    calibration.steps = min(MOST_LOOK, max(LEAST_LOOK, round(LOOK_SHARE * steps / LOOK_COST)))
    cost = calibration.steps * LOOK_COST
    if cost > MOST_LOOK_SHARE * steps:
        calibration.log.decision(
            f"init kaiming: {steps} steps are too few to look at {calibration.steps} of them first"
        )
        return "kaiming", {}
    about = f"about {cost * run_plan.seconds_per_step:.0f} s, {cost / steps:.0%} of the run"
    calibration.log.decision(f"init auto looks at {calibration.steps} steps first: {about}")
    captured, by_kind = _score({init: make(init) for init in AUTO_INITS}, calibration)
    best = max(AUTO_INITS, key=lambda init: captured[init])
    if captured[best] < CLEARLY_MORE * captured["kaiming"] or steps > MOST_STEPS:
        best = "kaiming"
    shown = ", ".join(f"{name} {score:.3f}" for name, score in captured.items())
    calibration.log.decision(f"init {best}: of the gradient of other rows, each start captures: {shown}")
    return best, {"captured": captured, "captured_by_kind": by_kind, "looked_at_steps": calibration.steps}


def _score(
    candidates: Mapping[str, Arrays], calibration: CalibrationData
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """What each start captures, in all and by kind of layer."""
    from thimble.backends.torch.calibrate import captured_energy

    calibration.log.stage("measuring the starts on other rows")
    found = captured_energy(calibration.session, calibration.others(), candidates)
    whole = sum(total for _, total in found["kaiming"].values())
    captured = {init: sum(float(parts.sum()) for parts, _ in layers.values()) / whole for init, layers in found.items()}
    return captured, {init: _by_kind(layers) for init, layers in found.items()}


def _by_kind(found: Mapping[str, tuple[NDArray[np.float64], float]]) -> dict[str, float]:
    """Shares of the gradient captured in all layers of a kind."""
    parts: dict[str, tuple[float, float]] = {}
    for path, (part, whole) in found.items():
        kind = path.rsplit(".", 1)[-1]
        before = parts.get(kind, (0.0, 0.0))
        parts[kind] = before[0] + float(part.sum()), before[1] + whole
    return {kind: part / whole if whole else 0.0 for kind, (part, whole) in parts.items()}


# ---- ranks ----------------------------------------------------------------------------------------------------------


def choose_ranks(config: TrainConfig, calibration: CalibrationData) -> tuple[dict[str, Size], dict[str, Any]]:
    """Give each layer a rank: a budget shared out by energy per parameter, or a share of the energy for each layer.

    Args:
        config: The options.
        calibration: The rows.

    Returns:
        Sizes by layer path, and what was measured.
    """
    known = calibration.run_plan.model.base.spec.linear_shapes()
    shapes = {path: known[path] for path in calibration.run_plan.layers}
    energies, totals = _ENERGIES[config.energy_of](config, shapes, calibration)
    if config.energy is not None:
        ranks = {
            path: min(_rank_holding(values, totals[path], config.energy), *shapes[path])
            for path, values in energies.items()
        }
        how = f"{config.energy:g} of the energy of {config.energy_of}"
        full = sum(rank >= MOST_RANK for rank in ranks.values())
        if full:
            calibration.log.warning(f"{full} layers need more than rank {MOST_RANK} for {how}, and get {MOST_RANK}")
    else:
        ranks = _ranks_of_budget(config, energies, shapes)
        how = f"{sum(rank * sum(shapes[path]) for path, rank in ranks.items()):,} parameters, by {config.energy_of}"
    ranks = {path: _allowed(rank, shapes[path], config.init) for path, rank in ranks.items()}
    scale = scale_of(config.alpha, AUTO_RANK, config.use_rslora)  # the same for all: one learning rate is right
    sizes = {path: Size(rank, scale) for path, rank in ranks.items()}
    low, high = min(ranks.values()), max(ranks.values())
    calibration.log.decision(f"rank: {low} to {high}, {np.mean(list(ranks.values())):.1f} on average: {how}")
    if config.energy_of == "weights":
        calibration.log.warning(
            "the energy of a weight says how well it can be truncated, not how large a change it needs: a trained "
            "update has a small rank whatever the spectrum of W"
        )
    return sizes, {"ranks": ranks}


def _allowed(rank: int, shape: tuple[int, int], init: str) -> int:
    """The nearest rank that a start can have."""
    if init == "orthogonal":
        return max(2, rank // 2 * 2)
    return max(1, min(rank, min(shape) // 2)) if init == "gradient:lora-ga" else rank


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


def _gradient_energies(
    config: TrainConfig, shapes: Mapping[str, tuple[int, int]], calibration: CalibrationData
) -> Energies:
    """Of each direction of the gradient, measured on rows it was not found on."""
    from thimble.backends.torch.calibrate import captured_energy

    wanted = MOST_RANK if config.energy else 2 * AUTO_RANK
    sketches = calibration.sketches({path: min(wanted, *shape) for path, shape in shapes.items()})
    rows = {path: sketch.right[:wanted] for path, sketch in sketches.items()}
    found = captured_energy(calibration.session, calibration.others(), {"": rows})[""]
    return {path: parts for path, (parts, _) in found.items()}, {path: whole for path, (_, whole) in found.items()}


def _activation_energies(
    config: TrainConfig, shapes: Mapping[str, tuple[int, int]], calibration: CalibrationData
) -> Energies:
    from thimble.backends.torch.calibrate import input_moments

    energies, totals = {}, {}
    for paths, moments in input_moments(calibration.session, calibration.batches()):
        values = np.maximum(np.linalg.eigvalsh(moments.mean_square.astype(np.float64))[::-1], 0)
        for path in paths:
            energies[path], totals[path] = values[:MOST_RANK], float(values.sum())
    return {path: energies[path] for path in shapes}, totals


def _weight_energies(
    config: TrainConfig, shapes: Mapping[str, tuple[int, int]], calibration: CalibrationData
) -> Energies:
    energies, totals = {}, {}
    for path, values in calibration.weights("its energy is asked for"):
        energies[path] = svd(values, min(MOST_RANK, *values.shape)).values ** 2
        totals[path] = float(np.square(values, dtype=np.float64).sum())
    return energies, totals


_ENERGIES = {"gradients": _gradient_energies, "activations": _activation_energies, "weights": _weight_energies}
