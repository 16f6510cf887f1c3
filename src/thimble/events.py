"""What a command reports while it works: events for whoever renders them, and the messages a report keeps."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """Something worth reporting."""

    # `decision` (what was chosen and why), `note` (what was found), `warning`, `stage` (a phase begins), `progress` (a
    # phase moved), `step` (an optimiser step was taken) or `request` (a server answered one)
    kind: str
    text: str = ""  # one sentence for people; of `progress` what is counted
    # numbers for machines: of `progress` done and total; of `step` what stands in metrics.jsonl, and total
    data: dict[str, Any] = field(default_factory=dict)


OnEvent = Callable[[Event], None]
ShouldStop = Callable[[], bool]


def ignore(event: Event) -> None:
    """Take no notice."""


def never() -> bool:
    """Do not stop early."""
    return False


class EventLog:
    """Passes events on, and keeps decisions, notes and warnings for the report."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self.messages: dict[str, list[str]] = {"decision": [], "note": [], "warning": []}

    def decision(self, text: str) -> None:
        """Report what was chosen and why."""
        self._add("decision", text)

    def note(self, text: str) -> None:
        """Report what was found."""
        self._add("note", text)

    def warning(self, text: str) -> None:
        """Report what may spoil the result."""
        self._add("warning", text)

    def _add(self, kind: str, text: str) -> None:
        if text not in self.messages[kind]:
            self.messages[kind].append(text)
            self._on_event(Event(kind, text))

    def stage(self, text: str) -> None:
        """Report that a phase begins."""
        self._on_event(Event("stage", text))

    def progress(self, what: str, done: int, total: int) -> None:
        """Report how far a phase is, and what is counted."""
        self._on_event(Event("progress", what, {"done": done, "total": total}))

    def step(self, data: dict[str, Any]) -> None:
        """Report that an optimiser step was taken."""
        self._on_event(Event("step", data=data))
