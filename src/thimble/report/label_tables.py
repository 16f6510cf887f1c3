"""How well labels were found, as tables of bounded size: cells of text, for the terminal and for the page."""

from collections.abc import Mapping
from html import escape
from typing import Any

from thimble.report.formatting import clip, percent

Rows = list[tuple[str, ...]]
Scores = Mapping[str, Any]  # a thimble.core.labels.LabelScores as a dict

LABEL_WIDTH = 28


def summary(scores: Scores) -> str:
    """Accuracy with its interval, macro F1, and what always writing the most frequent label would give."""
    low, high = scores["interval"]
    between = f"95 % interval {low:.0%} to {high:.0%}"
    baseline = f"always writing “{_name(scores['majority'])}” gives {percent(scores['baseline'], '')}"
    accuracy = f"accuracy {percent(scores['accuracy'], '')} of {scores['rows']:,} rows ({between})"
    return f"{accuracy}, macro F1 {scores['macro_f1']:.2f}; {baseline}"


def label_rows(scores: Scores, training_rows: Mapping[str, int], most: int) -> Rows:
    """A row a label, the most frequent first, under a head; those beyond `most` are counted in the last row."""
    head = ("label", *(("training rows",) if training_rows else ()), "rows", "precision", "recall", "F1")
    rows = [head]
    for score in scores["labels"][:most]:
        learned = (f"{training_rows.get(score['label'], 0):,}",) if training_rows else ()
        shares = (f"{score[name]:.2f}" for name in ("precision", "recall", "f1"))
        rows.append((_name(score["label"]), *learned, f"{score['rows']:,}", *shares))
    if (left := len(scores["labels"]) - most) > 0:
        rows.append((f"and {left:,} more", *[""] * (len(head) - 1)))
    return rows


def confusion_rows(scores: Scores, most: int) -> Rows:
    """The confusion table: a row for each expected label, a column for each that was written; or, for more than `most`
    labels, the most frequent confusions.
    """
    names, cells = [score["label"] for score in scores["labels"]], scores["confusion"]
    if len(names) > most:
        return _frequent(cells, most)
    from thimble.core.labels import OTHER  # brings numpy, which --help does without

    columns = [*names, OTHER] if any(OTHER in row for row in cells.values()) else names
    rows: Rows = [("expected \\ written", *map(_name, columns))]
    for name in names:
        if name in cells:
            rows.append((_name(name), *(f"{cells[name].get(column, 0) or '.'}" for column in columns)))
    return rows


def confusion_shares(scores: Scores) -> list[list[float]]:
    """Which share of the rows of each expected label was written as each, in the order of `confusion_rows`."""
    from thimble.core.labels import OTHER

    names, cells = [score["label"] for score in scores["labels"]], scores["confusion"]
    columns = [*names, OTHER] if any(OTHER in row for row in cells.values()) else names
    return [
        [cells[name].get(column, 0) / sum(cells[name].values()) for column in columns]
        for name in names
        if name in cells
    ]


def confusion_picture(scores: Scores) -> str:
    """The confusion table of many labels as an SVG element: a square for each pair that occurs, the darker the oftener.

    A square tells its pair to whoever points at it. Rows are what is expected, columns what was written.
    """
    names, cells = [score["label"] for score in scores["labels"]], scores["confusion"]
    places = {name: number for number, name in enumerate(names)}
    squares = []
    for expected, row in cells.items():
        for written, count in row.items():
            if written in places:
                kind = "hit" if written == expected else "miss"
                strength = 0.15 + 0.85 * count / sum(row.values())
                told = escape(f"{_name(expected)} → {_name(written)}: {count:,}")
                squares.append(
                    f'<rect class="{kind}" x="{places[written]}" y="{places[expected]}" width="1" height="1" '
                    f'opacity="{strength:.2f}"><title>{told}</title></rect>'
                )
    side = len(names)
    head = f'<svg class="confusion" viewBox="0 0 {side} {side}" role="img" aria-label="confusion of {side} labels">'
    frame = f'<rect class="frame" width="{side}" height="{side}" stroke-width="{side / 300:.2f}"/>'
    return f"{head}{frame}{''.join(squares)}</svg>"


def _frequent(cells: Mapping[str, Mapping[str, int]], most: int) -> Rows:
    wrong = [
        (expected, written, count)
        for expected, row in cells.items()
        for written, count in row.items()
        if written != expected
    ]
    wrong.sort(key=lambda cell: -cell[2])
    rows: Rows = [("expected", "written", "rows")]
    rows += [(_name(expected), _name(written), f"{count:,}") for expected, written, count in wrong[:most]]
    if len(wrong) > most:
        rows.append((f"and {len(wrong) - most:,} more", "", ""))
    return rows


def _name(label: str) -> str:
    return clip(label, LABEL_WIDTH) or '""'
