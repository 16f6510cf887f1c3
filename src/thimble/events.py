"""What a verb tells while it works; the command line and the server render it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """Something worth telling.

    Attributes:
        kind: `decision` (what was chosen and why), `note` (what was found), `warning`, `stage` (a phase begins),
            `progress` (a phase moved) or `step` (an optimiser step was taken).
        text: One sentence for people; of `progress` what is counted.
        data: Numbers for machines: of `progress` done and total; of `step` what stands in metrics.jsonl, and total.
    """

    kind: str
    text: str = ""
    data: dict[str, Any] = field(default_factory=dict)


OnEvent = Callable[[Event], None]
ShouldStop = Callable[[], bool]


def ignore(event: Event) -> None:
    """Tell nobody."""


def never() -> bool:
    """Do not stop early."""
    return False


class Teller:
    """Passes events on and remembers decisions, notes and warnings for the report."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self.told: dict[str, list[str]] = {"decision": [], "note": [], "warning": []}

    def decision(self, text: str) -> None:
        """Tell what was chosen and why."""
        self._tell("decision", text)

    def note(self, text: str) -> None:
        """Tell what was found."""
        self._tell("note", text)

    def warning(self, text: str) -> None:
        """Tell what may spoil the result."""
        self._tell("warning", text)

    def _tell(self, kind: str, text: str) -> None:
        if text not in self.told[kind]:
            self.told[kind].append(text)
            self._on_event(Event(kind, text))

    def stage(self, text: str) -> None:
        """Tell that a phase begins."""
        self._on_event(Event("stage", text))

    def progress(self, what: str, done: int, total: int) -> None:
        """Tell how far a phase is, and what is counted."""
        self._on_event(Event("progress", what, {"done": done, "total": total}))

    def step(self, data: dict[str, Any]) -> None:
        """Tell that an optimiser step was taken."""
        self._on_event(Event("step", data=data))
