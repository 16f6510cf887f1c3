"""Pictures and clips of the page: what was said of each before and after training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thimble.errors import plural

# What became of a row, by whether it was right before and after; the first are shown first.
GROUPS = {
    (True, False): ("spoilt", "right before, wrong after"),
    (False, True): ("mended", "wrong before, right after"),
    (False, False): ("wrong", "wrong before and after"),
    (True, True): ("right", "right before and after"),
}


@dataclass(frozen=True)
class Shown:
    """A picture or clip that the page shows.

    Attributes:
        uri: Its content, as a data URI.
        source: Where it came from, for people.
        reference: What is right.
        before: What the model said before training.
        after: What it said after training.
    """

    uri: str
    source: str
    reference: str
    before: str
    after: str

    @property
    def is_clip(self) -> bool:
        """Whether it is played and not looked at."""
        return self.uri.startswith("data:audio/")


def group_of(reference: str, before: str, after: str) -> str:
    """What became of a row: a word of GROUPS."""
    return GROUPS[before.strip() == reference.strip(), after.strip() == reference.strip()][0]


def choose_shown(groups: Sequence[str], most: int) -> list[int]:
    """Numbers of rows to show: of each group the same count while there are, what is left over to the first groups."""
    rows = {name: [row for row, group in enumerate(groups) if group == name] for name, _ in GROUPS.values()}
    left, counts = most, dict.fromkeys(rows, 0)
    while left and (open_groups := [name for name in rows if counts[name] < len(rows[name])]):
        for name in open_groups[:left]:
            counts[name] += 1
            left -= 1
    return [row for name, count in counts.items() for row in _spread(rows[name], count)]


def _spread(rows: Sequence[int], count: int) -> list[int]:
    """So many of some rows, spread evenly."""
    return [rows[(2 * place + 1) * len(rows) // (2 * count)] for place in range(count)]


def gallery_of(shown: Sequence[Shown], report: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the template shows of pictures and clips with labels; None if there are none."""
    if not shown or not report.get("labels"):
        return None
    words = dict(GROUPS.values())
    cards = [
        {
            "uri": one.uri, "is_clip": one.is_clip, "source": one.source, "reference": one.reference,
            "before": one.before, "after": one.after, "group": group_of(one.reference, one.before, one.after),
        }
        for one in shown
    ]  # fmt: skip
    found = [name for name in words if any(card["group"] == name for card in cards)]
    noun = "clip" if shown[0].is_clip else "picture"
    rows = report["metrics_rows"]
    return {
        "title": f"{noun.title()}s before and after training",
        "note": (
            f"All {plural(rows, 'validation row')}." if len(cards) >= rows
            else f"{len(cards)} of {plural(rows, 'validation row')}. Not a random draw: each group below is shown as "
            "far as there is room, so that what changed and what is wrong is seen first."
        ),
        "groups": [(words[name], name, [card for card in cards if card["group"] == name]) for name in found],
    }  # fmt: skip


def players_of(shown: Sequence[Shown]) -> dict[str, str]:
    """Data URIs of clips by their sources, for the answers that are texts."""
    return {one.source: one.uri for one in shown if one.is_clip}
