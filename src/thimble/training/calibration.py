"""Calibration data, and what they show before training: the main directions and the rank that each layer needs.

Directions are found on some training rows and judged on others: never on what they were fitted to, and never on the
rows that the result is measured on.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from thimble.config.train import TrainConfig
from thimble.core.adapter import Adapter
from thimble.core.inits import Moments, Sketch
from thimble.core.lowrank import scale as scale_of
from thimble.core.lowrank import svd
from thimble.core.method import AUTO_RANK, Init
from thimble.core.targets import Size, share_out
from thimble.data.batches import Batch, micro_batches
from thimble.data.spool import Items
from thimble.errors import BaseModelError
from thimble.events import EventLog
from thimble.models.execution import ExecutionPlan

RANK_SPREAD = 2  # times the mean rank, and a quarter of it, are the bounds of rank auto
MOST_RANK = 128  # by a share of energy
CAPABILITY = "calibration"  # what a session with the methods of CalibrationSession names in `capabilities`

Floats = NDArray[np.float32]
Energy = tuple[NDArray[np.float64], float]  # of each direction, float64 (rank,), and of all there is


class InitSession(Protocol):
    """What inits need of a session; see the methods of the same names in thimble.backends.torch.session. Batches are
    those of the session's own kind.
    """

    def input_moments(self, batches: Sequence[Any]) -> Iterator[tuple[list[str], Moments]]:
        """Second moments of the inputs of all layers, with the paths of those that share an input."""

    def gradient_sketches(
        self, batches: Sequence[Any], ranks: Mapping[str, int], is_weighted: bool, seed: int, checkpointed_blocks: int
    ) -> dict[str, Sketch]:
        """Main directions of the gradient of each weight."""

    def file_weight(self, path: str) -> Floats:
        """A weight as the file has it, float32 (out, in)."""

    def kept_weight(self, path: str) -> Floats:
        """A weight as it is kept in memory, float32 (out, in)."""


class CalibrationSession(InitSession, Protocol):
    """What calibration needs beside: ranks are chosen by it too."""

    @property
    def capabilities(self) -> frozenset[str]:
        """Options that the backend honours beyond plain LoRA."""

    def captured_energy(
        self, batches: Sequence[Batch], candidates: Mapping[str, Mapping[str, Floats]], checkpointed_blocks: int = 0
    ) -> dict[str, dict[str, Energy]]:
        """How much of the gradient of each weight lies in the rows of each candidate for A."""

    def with_magnitudes(self, adapter: Adapter) -> Adapter:
        """An adapter with the magnitudes that change nothing (DoRA)."""


@dataclass(frozen=True)
class CalibrationData:
    """The rows that initializations and ranks are found on, and the layers they are found for."""

    rows: Sequence[Any]  # training rows of the first steps
    judging_rows: Sequence[Any]  # training rows that are not among `rows`, on which directions are judged
    general_rows: Sequence[Any]  # general text, on which the base is not to change
    steps: int  # how many steps' worth `rows` are
    execution: ExecutionPlan  # how many tokens are read at a time, and what is kept of them
    shapes: Mapping[str, tuple[int, int]]  # (out, in) of each adapted layer by path, in the order of the layers
    seed: int  # the run's seed
    experts: Mapping[str, int] = field(default_factory=dict)  # how many matrices each parameter of the base stacks
    cut: Callable[[Sequence[Any], int], list[Any]] = micro_batches  # rows into batches of at most so many tokens

    @classmethod
    def of_steps(
        cls, train: Items[Any], rows_of_step: Callable[[int], Sequence[int]], steps: int, **others: Any
    ) -> Self:
        """Take the rows of the first steps, and those of the next step to judge by; of few rows each gets a half."""
        used = list(dict.fromkeys(number for step in range(steps) for number in rows_of_step(step)))
        judging = [number for number in rows_of_step(steps) if number not in used]
        if not judging:
            used, judging = used[::2], used[1::2] or used
        return cls([train[n] for n in used], [train[n] for n in judging], steps=steps, **others)


S = TypeVar("S", bound=InitSession)


class Calibration(Generic[S]):
    """Calibration data seen through a loaded base."""

    def __init__(self, data: CalibrationData, session: S, log: EventLog) -> None:
        self.data, self.session, self.log = data, session, log
        self._sketches: dict[Any, dict[str, Sketch]] = {}  # the last ones, by what was asked for

    def weights(self, needs: str) -> Iterator[tuple[str, Floats]]:
        """Path and W of each layer, float32 (out, in); raises BaseModelError naming weights that are useless."""
        problems: list[str] = []
        for number, path in enumerate(self.data.shapes, 1):
            values = self.session.file_weight(path)
            if not np.isfinite(values).all():
                problems.append(f"{path} holds NaN or Inf: {needs}; copy the base again")
            elif not values.any():
                problems.append(f"{path} holds only zeros: {needs}; leave the layer out with --targets")
            elif not problems:
                yield path, values
            self.log.progress("layers decomposed", number, len(self.data.shapes))
        if problems:
            raise BaseModelError(*problems[:5])

    def moments(self, uses_general_text: bool = False) -> Iterator[tuple[list[str], Moments]]:
        """Second moments of the inputs of all layers, with the paths of those that share an input."""
        data = self.data
        rows, what = (data.general_rows, "general text") if uses_general_text else (data.rows, f"{data.steps} steps")
        self.log.stage(f"calibrating: inputs of every layer over {what}")
        return self.session.input_moments(self._batches(rows))

    def sketches(self, ranks: Mapping[str, int], is_weighted: bool = False) -> dict[str, Sketch]:
        """Main directions of the gradients, at least as many as `ranks` says by layer path."""
        key, data = (is_weighted, tuple(ranks.items())), self.data
        if key not in self._sketches:
            self.log.stage(f"calibrating: gradients over {data.steps} steps")
            batches, blocks = self._batches(data.rows), data.execution.checkpointed_blocks
            found = self.session.gradient_sketches(
                batches, ranks, is_weighted=is_weighted, seed=data.seed, checkpointed_blocks=blocks
            )
            self._sketches = {key: found}
        return self._sketches[key]

    def captured(
        self: "Calibration[CalibrationSession]", candidates: Mapping[str, Mapping[str, Floats]]
    ) -> dict[str, dict[str, Energy]]:
        """How much of the gradient of other rows each candidate for A captures, by candidate and layer path."""
        batches, blocks = self._batches(self.data.judging_rows), self.data.execution.checkpointed_blocks
        return self.session.captured_energy(batches, candidates, checkpointed_blocks=blocks)

    def _batches(self, rows: Sequence[Any]) -> list[Any]:
        return self.data.cut(rows, self.data.execution.micro_tokens)


# ---- ranks ----------------------------------------------------------------------------------------------------------


def choose_ranks(config: TrainConfig, init: Init, calibration: Calibration[CalibrationSession]) -> dict[str, Size]:
    """Give each layer a rank: a budget shared out by energy per parameter, or a share of each layer's energy."""
    shapes, log = calibration.data.shapes, calibration.log
    energies = _ENERGIES[config.energy_of](config, calibration)
    if config.energy is not None:
        ranks = {path: min(_rank_holding(*energies[path], config.energy), *shape) for path, shape in shapes.items()}
        how = f"{config.energy:g} of the energy of {config.energy_of}"
        if full := sum(rank >= MOST_RANK for rank in ranks.values()):
            log.warning(f"{full} layers need more than rank {MOST_RANK} for {how}, and get {MOST_RANK}")
    else:
        ranks = _ranks_of_budget(
            config, {path: _comparable(energies[path], config.energy_of) for path in shapes}, shapes
        )
        how = f"{sum(rank * sum(shapes[path]) for path, rank in ranks.items()):,} parameters, by {config.energy_of}"
    ranks = {path: init.allowed_rank(rank, shapes[path]) for path, rank in ranks.items()}
    low, high = min(ranks.values()), max(ranks.values())
    log.decision(f"rank: {low} to {high}, {np.mean(list(ranks.values())):.1f} on average: {how}")
    if config.energy_of == "weights":
        log.warning(
            "the energy of a weight says how well it can be truncated, not how large a change it needs: a trained "
            "update has a small rank whatever the spectrum of W"
        )
    for path, rank in ranks.items() if config.explain else ():
        log.note(f"rank of {path}: {rank}")
    scale = scale_of(config.alpha, AUTO_RANK, config.use_rslora)  # the same for all: one learning rate is right
    return {path: Size(rank, scale) for path, rank in ranks.items()}


def _comparable(energy: Energy, energy_of: str) -> NDArray[np.float64]:
    """Energies of directions that may be compared between layers.

    Energy of gradients is what the loss falls by; that of inputs and weights has a unit of each layer's own, so what
    counts is its share of the layer (the ratio of explained variance of EVA, arXiv:2410.07170, section 3.3).
    """
    values, total = energy
    return values if energy_of == "gradients" or total == 0 else values / total


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


def _gradient_energies(config: TrainConfig, calibration: Calibration[CalibrationSession]) -> dict[str, Energy]:
    """Of each direction of the gradient, measured on rows it was not found on."""
    wanted = MOST_RANK if config.energy else 2 * AUTO_RANK
    sketches = calibration.sketches({path: min(wanted, *shape) for path, shape in calibration.data.shapes.items()})
    return calibration.captured({"": {path: sketch.right[:wanted] for path, sketch in sketches.items()}})[""]


def _activation_energies(config: TrainConfig, calibration: Calibration[CalibrationSession]) -> dict[str, Energy]:
    energies: dict[str, Energy] = {}
    for paths, moments in calibration.moments():
        values = np.maximum(np.linalg.eigvalsh(moments.mean_square.astype(np.float64))[::-1], 0)
        energies |= {path: (values[:MOST_RANK], float(values.sum())) for path in paths}
    return energies


def _weight_energies(config: TrainConfig, calibration: Calibration[CalibrationSession]) -> dict[str, Energy]:
    energies: dict[str, Energy] = {}
    for path, values in calibration.weights("--energy-of weights decomposes it"):
        top = svd(values, min(MOST_RANK, *values.shape)).values.astype(np.float64)
        energies[path] = top**2, float(np.square(values, dtype=np.float64).sum())
    return energies


_ENERGIES: dict[str, Callable[[TrainConfig, Calibration[CalibrationSession]], dict[str, Energy]]] = {
    "gradients": _gradient_energies, "activations": _activation_energies, "weights": _weight_energies,
}  # fmt: skip
