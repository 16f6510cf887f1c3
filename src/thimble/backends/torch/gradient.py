"""The gradient of a step, as a value."""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from thimble.backends.torch.adamw import norm
from thimble.core.metrics import LossSum


@dataclass(frozen=True)
class Gradient:
    """The gradient of a step; see thimble.backends.session.Gradient."""

    loss: LossSum
    flat: NDArray[np.float32]

    @functools.cached_property
    def norm(self) -> float:
        """Length of `flat`, summed in float64."""
        return norm(torch.from_numpy(self.flat))
