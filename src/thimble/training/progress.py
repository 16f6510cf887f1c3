"""How far a run is: counts and plain data that a checkpoint keeps beside its arrays."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from thimble.models.execution import ExecutionPlan
from thimble.training.guard import Guard, Memorisation, Plateau

COUNTED = ("tokens", "target_tokens", "seconds", "initialization")


@dataclass
class Progress:
    """Where a run is."""

    execution: ExecutionPlan  # how a step is run: the only copy, which becomes smaller when memory runs out
    guard: Guard = field(default_factory=Guard)  # judges every step
    plateau: Plateau = field(default_factory=Plateau)  # follows the loss of validation rows
    memorisation: Memorisation = field(default_factory=Memorisation)  # follows the loss of training rows
    steps: int = 0  # optimiser steps done
    rows: int = 0  # rows trained on, each as often as it was
    tokens: int = 0  # tokens of all rows trained on, prompts included
    target_tokens: int = 0  # of these, the target tokens
    seconds: float = 0.0  # time spent in steps, without pauses and evaluation
    initialization: dict[str, Any] = field(default_factory=dict)  # what was measured to choose init and ranks

    def count(self, rows: int, tokens: int, target_tokens: int) -> None:
        """Add what a step has read."""
        self.rows, self.tokens = self.rows + rows, self.tokens + tokens
        self.target_tokens += target_tokens

    def so_far(self) -> dict[str, int]:
        """What speeds are made of."""
        return {"rows_so_far": self.rows, "tokens_so_far": self.tokens}

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint, which keeps the number of steps itself."""
        return {
            **{name: getattr(self, name) for name in COUNTED}, "rows": self.rows, "rollbacks": self.guard.rollbacks,
            "guard": self.guard.state(), "plateau": self.plateau.state(), "memorisation": self.memorisation.state(),
            "execution": asdict(self.execution),
        }  # fmt: skip

    def restore(self, steps: int, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned after so many steps; how a step is run was decided by the run plan."""
        self.steps = steps
        for name in COUNTED:
            setattr(self, name, state[name])
        self.rows = state.get("rows", 0)  # which older runs did not count
        self.guard = Guard.restored(state.get("guard", {}))
        self.plateau.restore(state.get("plateau", {}))
        self.memorisation.restore(state.get("memorisation", {}))
