"""Text that ends where one of some strings begins, whatever pieces it comes in."""

from collections.abc import Sequence


class StopText:
    """Lets text through, but for what may be the beginning of a stop string, and ends before the first whole one.

    >>> text = StopText(["</a>"])
    >>> text.add("one<"), text.add("/b>two</"), text.add("a>three"), text.is_stopped
    ('one', '</b>two', '', True)

    Args:
        stops: Strings, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = list(stops), ""
        self.is_stopped = False

    @property
    def pending(self) -> str:
        """What is held back."""
        return self._held

    def add(self, text: str) -> str:
        """What may go out now."""
        if self.is_stopped:
            return ""
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.is_stopped, self._held = True, ""
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """What was held back, when nothing more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The longest end of a text that is a beginning of a string."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
