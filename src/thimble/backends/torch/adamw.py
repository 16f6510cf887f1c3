"""The optimiser of the adapter: AdamW on one flat vector.

torch's own gives the same numbers, but the first use of any torch optimiser loads torch's compiler: 1.3 to 2.3 seconds
before the first step, and memory that is never used.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BETA1 = 0.9
EPSILON = 1e-8
PIECE = 1 << 20  # parameters handled at a time, so that temporaries stay small


class AdamW:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101), as in torch.optim.AdamW, on float32 (n,) that change in place.

    Weight decay pulls to `goal`, or to zero as in the paper; `rates` are factors of the learning rate of spans of
    parameters, 0 leaving them alone and None meaning 1 for all; `beta2` is what the mean of squared gradients keeps.
    """

    def __init__(
        self,
        parameters: Tensor,
        weight_decay: float,
        goal: Tensor | None = None,
        rates: Sequence[tuple[slice, float]] | None = None,
        beta2: float = 0.999,
    ) -> None:
        self._parameters, self._weight_decay, self._goal = parameters, weight_decay, goal
        self._beta2 = beta2
        self._rates = [(slice(0, len(parameters)), 1.0)] if rates is None else rates
        self._mean, self._square = torch.zeros_like(parameters), torch.zeros_like(parameters)
        self._steps = 0

    def step(self, gradient: Tensor, learning_rate: float, scale: float = 1.0) -> None:
        """Take a step against scale · gradient, float32 (n,)."""
        self._steps += 1
        for span, factor in self._rates:
            for start in range(span.start, span.stop, PIECE) if factor else ():
                piece = slice(start, min(start + PIECE, span.stop))
                slope = gradient[piece] if scale == 1.0 else gradient[piece] * scale
                self._move(piece, slope, learning_rate * factor)

    def _move(self, span: slice, slope: Tensor, learning_rate: float) -> None:
        first, second = BETA1, self._beta2
        parameters, mean, square = (x[span] for x in (self._parameters, self._mean, self._square))
        decay = learning_rate * self._weight_decay
        if decay and self._goal is None:
            parameters.mul_(1 - decay)
        elif decay:
            parameters.lerp_(self._goal[span], decay)
        mean.lerp_(slope, 1 - first)
        square.mul_(second).addcmul_(slope, slope, value=1 - second)
        spread = square.sqrt().div_((1 - second**self._steps) ** 0.5).add_(EPSILON)
        parameters.addcdiv_(mean, spread, value=-learning_rate / (1 - first**self._steps))

    @property
    def squares(self) -> Tensor:
        """Running means of the squared gradients, float32 (n,): zero where there never was one."""
        return self._square

    def state(self) -> dict[str, NDArray[np.float32]]:
        """Moments, not copied, and step count; the names are torch's."""
        steps = np.array([self._steps], np.float32)
        return {"exp_avg": self._mean.numpy(), "exp_avg_sq": self._square.numpy(), "step": steps}

    def restore(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        """Go back to what `state` returned; what is not in it stays."""
        for name, own in (("exp_avg", self._mean), ("exp_avg_sq", self._square)):
            if name in state:
                own.copy_(torch.from_numpy(state[name]))
        if "step" in state:
            self._steps = int(state["step"][0])


def norm(flat: Tensor) -> float:
    """Length of a vector, float32 (n,), summed in float64."""
    return math.hypot(*(float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in flat.split(PIECE)))
