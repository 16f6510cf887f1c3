"""What a run reports to and asks while it works: the event log, and whether to stop, to wait or to give up its base."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from thimble.events import EventLog, ShouldStop, never

ShouldWait = Callable[[], str]


def never_wait() -> str:
    """Do not wait."""
    return ""


@dataclass(frozen=True)
class Control:
    """The outside of a run."""

    log: EventLog  # takes decisions, warnings, progress and steps
    should_stop: ShouldStop = never  # asked between steps, and between tokens of an evaluation; on True the run ends
    should_wait: ShouldWait = never_wait  # asked between steps; gives the reason to wait, or nothing
    # A file of the base that became shorter while it is read, which ends the run; None while all is well.
    cut_file: Callable[[], Path | None] = lambda: None
