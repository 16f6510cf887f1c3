"""The step that did best on validation rows, and whether a run returns to it."""

import numpy as np
from numpy.typing import NDArray

from thimble.backends.session import TrainingSession, TrainState
from thimble.core.metrics import LossSum
from thimble.events import EventLog
from thimble.training.guard import has_clearly_risen
from thimble.training.progress import Progress
from thimble.training.protocols import Task


class BestStep:
    """Watches validation rows of a run, and remembers the adapter that did best on them.

    Args:
        task: Whose rows they are.
        session: That the run trains in.
        progress: Of the run; its plateau judges the losses.
        is_kept: Whether the rows are enough to return to that adapter.
        log: Takes what was found, and decided.
    """

    def __init__(self, task: Task, session: TrainingSession, progress: Progress, is_kept: bool, log: EventLog) -> None:
        self._task, self._session, self._progress = task, session, progress
        self._is_kept, self._log = is_kept, log
        self.flat: NDArray[np.float32] | None = None  # the parameters of that adapter, (size,)

    def measure(self, state: TrainState) -> tuple[TrainState, float]:
        """Measure the watched rows, and remember the adapter if it is the best so far.

        Args:
            state: Of the run; not to be used again.

        Returns:
            The same state, and the mean loss of the rows in nats.
        """
        plateau = self._progress.plateau
        rows = self._task.watch(self._session, state.active, self._progress.execution)
        is_best = plateau.add(self._progress.steps, [row.mean for row in rows])
        if is_best and self._is_kept:
            self.flat = self._session.snapshot(state)["adapter"]
        if plateau.is_over:
            state, is_so = self._confirm(state)
            plateau.since = plateau.since if is_so else 0
        return state, sum(rows, LossSum()).mean

    def settle(self, state: TrainState, has_diverged: bool) -> tuple[TrainState, int]:
        """Return to the adapter that did best, if the last one does clearly worse.

        Args:
            state: Of the run after its last step; not to be used again.
            has_diverged: Whether the last adapter is of no use, however it would do.

        Returns:
            The state to end with, and the step whose adapter it has.
        """
        progress, plateau = self._progress, self._progress.plateau
        if self.flat is None:
            return state, progress.steps
        if not has_diverged:
            if plateau.step < progress.steps:  # the last step has not been measured
                state, _ = self.measure(state)
            state, is_worse = self._confirm(state) if plateau.since else (state, False)
            if not is_worse:
                return state, progress.steps
        why = f"its loss of {plateau.best:.3f} on the validation rows watched has clearly risen since"
        self._log.decision(f"kept: the adapter of step {plateau.best_step}; {why}")
        return self._session.restore(state, {"adapter": self.flat}), plateau.best_step

    def _confirm(self, state: TrainState) -> tuple[TrainState, bool]:
        """Whether the loss rose since the best step on rows that are not watched, too, if there are such rows."""
        now = self._task.confirm(self._session, state.active, self._progress.execution)
        if not now or self.flat is None:
            return state, True
        last = self._session.snapshot(state)["adapter"]
        state = self._session.restore(state, {"adapter": self.flat})
        then = self._task.confirm(self._session, state.active, self._progress.execution)
        state = self._session.restore(state, {"adapter": last})
        if has_clearly_risen([row.mean for row in then], [row.mean for row in now]):
            return state, True
        self._log.note(f"on {len(now)} other rows the validation loss has not clearly risen")
        return state, False
