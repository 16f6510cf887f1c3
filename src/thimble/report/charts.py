"""The charts of the page, as inline SVG that takes its colours and fonts from the page."""

import contextlib
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from thimble.errors import plural
from thimble.report.formatting import is_number, number
from thimble.report.verdict import Report, Steps, loss_before

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST_SMOOTHED = 8  # steps; a shorter curve is shown as it is
MOST_POINTS = 400  # drawn in a chart; longer runs are averaged in groups
SPIKE = 8.0  # a curve that rises this many times above its first value is drawn on a logarithmic axis

# Stand-ins matplotlib can draw with; in the page they become the page's own colours, so that dark mode holds for them.
ACCENT, MUTED, LINE, BAD, WARM = (f"#0{n}0{n}0{n}" for n in range(1, 6))
PAGE_COLOURS = {ACCENT: "accent", MUTED: "muted", LINE: "line", BAD: "bad", WARM: "warm"}
CHART_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "thimble", "font.size": 11, "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED, "xtick.color": LINE, "ytick.color": LINE, "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED, "axes.grid": True, "axes.grid.axis": "y", "grid.color": LINE, "grid.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.axisbelow": True,
    "ytick.major.size": 0, "ytick.minor.size": 0, "ytick.major.pad": 9, "ytick.minor.pad": 9,
    "lines.solid_capstyle": "round",
}  # fmt: skip
CHARTS = {
    "loss": (660, 330),
    "loss-narrow": (340, 260),
    "rate": (330, 120),
    "norm": (330, 135),
    "reliability": (330, 290),
}  # in CSS pixels


def draw_charts(report: Report, steps: Steps) -> dict[str, Any] | None:
    """Loss, learning rate and gradient norm as inline SVG, with what their captions need; None if there is no curve."""
    if sum(is_number(row.get("loss")) for row in steps) < 2:
        return None
    at, losses = _column(steps, "step"), _column(steps, "loss")
    watched = [row for row in steps if is_number(row.get("held_out_loss"))]
    validation = _column(watched, "step"), _column(watched, "held_out_loss")
    best_step = report.get("best_step") or report["steps"]

    def loss(axes: "Axes") -> None:
        _draw_loss(axes, at, losses, _validation_marks(report))
        if watched:  # an empty line that is not clipped would widen the margin
            axes.plot(*validation, "o", color=WARM, markersize=4.5, fillstyle="none", clip_on=False, zorder=5)

    return {
        "loss": _draw("loss", loss),
        "loss_narrow": _draw("loss-narrow", loss),
        "rate": _draw("rate", lambda axes: _draw_line(axes, at, _column(steps, "learning_rate"))),
        "norm": _draw("norm", lambda axes: _draw_line(axes, at, _column(steps, "grad_norm"))),
        "validation": [(word, number(value)) for word, value in _validation_marks(report).items()],
        "is_watched": bool(watched),
        "best_step": best_step if best_step != report["steps"] else None,
        "is_smoothed": _is_smoothed(losses),
        "each": "each step" if _group_size(steps) == 1 else f"means of {_group_size(steps)} steps",
        "broken": [step for step, value in zip(at, losses, strict=True) if not is_number(value)],
        "steps": plural(len(steps), "step"),
    }


def draw_reliability(calibration: Mapping[str, Any]) -> str:
    """How often a classifier is right where it is so sure (reliability diagram), as it is and at its temperature."""

    def draw(axes: "Axes") -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        for name, colour in (("plain", WARM), ("scaled", ACCENT)):
            bins = calibration[name]["bins"]
            at, right = ([part[key] for part in bins] for key in ("confidence", "accuracy"))
            sizes = [6 + 250 * part["rows"] / calibration["rows"] for part in bins]
            axes.scatter(at, right, sizes, color=colour, alpha=0.7, linewidths=0, clip_on=False, zorder=4)
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:.0%}".replace("%", " %"))
        axes.set_xlabel("probability of the label that is said")

    return _draw("reliability", draw)


def _column(steps: Steps, name: str) -> list[Any]:
    return [row.get(name) for row in steps]


def _validation_marks(report: Report) -> dict[str, float]:
    marks = {"before": loss_before(report), "after": report["loss_after"]}
    return {word: value for word, value in marks.items() if is_number(value)}


def _draw_loss(axes: "Axes", at: Sequence[int], losses: Sequence[Any], validation: Mapping[str, float]) -> None:
    _draw_line(axes, at, losses, alpha=0.45 if _is_smoothed(losses) else 1.0)
    if _is_smoothed(losses):
        axes.plot(_thinned(at), _smooth(_thinned(losses)), color=ACCENT, linewidth=2.4)
    for word, value in validation.items():
        axes.plot([at[-1] if word == "after" else 0], [value], "D", color=WARM, markersize=7, clip_on=False, zorder=5)
    for step, value in zip(at, losses, strict=True):
        if not is_number(value):
            axes.axvline(step, color=BAD, linewidth=1.5, linestyle=(0, (3, 3)))
    axes.set_xlabel("step")


def _draw_line(axes: "Axes", at: Sequence[int], values: Sequence[Any], alpha: float = 1) -> None:
    x, y = _thinned(at), _thinned(values)
    axes.plot(x, y, color=ACCENT, linewidth=1.4, alpha=alpha)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if _has_spike(y):
        known = [value for value in y if is_number(value)]
        axes.set_yscale("log", subs=[2, 5] if max(known) < 100 * min(known) else [])  # more labels would collide
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(0, at[-1])


def _has_spike(values: Sequence[Any]) -> bool:
    known = [value for value in values if is_number(value)]
    return bool(known) and min(known) > 0 and max(known) > SPIKE * known[0]


def _is_smoothed(losses: Sequence[Any]) -> bool:
    """Not if there is a spike: a mean would show the loss rising before it did."""
    return len(losses) >= LEAST_SMOOTHED and not _has_spike(losses)


def _thinned(values: Sequence[Any]) -> list[float]:
    """Means of groups, if there are more values than a chart can show."""
    size = _group_size(values)
    return [_mean(values[i : i + size]) for i in range(0, len(values), size)]


def _group_size(values: Sequence[Any]) -> int:
    return math.ceil(len(values) / MOST_POINTS)


def _smooth(values: Sequence[float]) -> list[float]:
    """Means over a window of about a tenth of the run that is centred and narrows at the ends: it lags nowhere."""
    most, last = max(2, len(values) // 20), len(values) - 1
    reaches = [min(most, at, last - at) for at in range(len(values))]
    return [_mean(values[at - reach : at + reach + 1]) for at, reach in enumerate(reaches)]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if is_number(value)]
    return sum(known) / len(known) if known else math.nan


def _draw(name: str, draw: "Callable[[Axes], None]") -> str:
    """One chart as an SVG element that takes its colours and fonts from the page."""
    from matplotlib.figure import Figure

    with drawing_style(CHART_STYLE):
        width, height = CHARTS[name]
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        axes = figure.add_subplot()
        axes.locator_params(nbins=6 if width > 400 else 4)
        draw(axes)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return _inline_svg(stream.getvalue(), name)


def _inline_svg(text: str, name: str) -> str:
    """Strip what only a file of its own needs, and make ids unique within the page."""
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    head = rf'<svg class="chart {name}" \1 aria-hidden="true">'  # its caption and the numbers above say the same
    text = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', head, text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text).replace("xlink:href", "href")
    for stand_in, colour in PAGE_COLOURS.items():
        text = text.replace(stand_in, f"var(--{colour})")
    # a hundredth of a pixel is enough, and half the size; text between tags is left alone
    text = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), text)
    return re.sub(r"\s*\n\s*", "\n", text)


@contextlib.contextmanager
def drawing_style(style: Mapping[str, Any]) -> Iterator[None]:
    """Draw in a style that a user's own matplotlibrc does not change; afterwards theirs holds again."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        yield
