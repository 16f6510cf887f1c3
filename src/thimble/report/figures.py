"""Figures of what `thimble inspect` found, as PNG and SVG: for a page or a talk.

Drawn from reports as plain data. Colours can be told apart with every kind of colour vision (Okabe and Ito's for
lines; viridis for amounts, purple to orange for signs), and lines also by their dashes.
"""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from thimble.report.charts import drawing_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

Report = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]

INK, MUTED, LINE = "#1a1a1a", "#5f6368", "#d5d8dc"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1a1a1a")
DASHES = ("-", "-", "-", "-", (0, (5, 1.6)), (0, (5, 1.6)), (0, (5, 1.6)))
STYLE = {
    "font.size": 11, "axes.titlesize": 11, "axes.titlecolor": MUTED, "axes.titlelocation": "left",
    "axes.titlepad": 10, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK, "xtick.color": MUTED,
    "ytick.color": MUTED, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": LINE, "grid.linewidth": 0.7, "axes.axisbelow": True, "axes.linewidth": 0.8, "legend.frameon": False,
    "lines.linewidth": 2, "svg.hashsalt": "thimble", "figure.facecolor": "white",
}  # fmt: skip
PNG_DOTS_PER_INCH = 160
WIDTH, HEIGHT = 8.6, 4.6  # inches of a figure with axes
TITLE_POINTS = 29  # from the axes up to the title
MOST_TICKS = 16  # numbers of blocks along an axis
FIGURES = {"base": ("energy",), "adapter": ("moved", "decay", "alignment"), "two adapters": ("overlap",), "inits": ()}


def figure_files(subject: str) -> list[str]:
    """Names of the files that are drawn of a base, an adapter or two adapters."""
    return [f"{name}.{kind}" for name in FIGURES[subject] for kind in ("png", "svg")]


def write_figures(folder: Path, report: Report) -> list[str]:
    """Draw all figures of a report before the first is written; their paths, none if an adapter moved no layer."""
    from matplotlib.figure import Figure

    drawn: dict[str, bytes] = {}
    with drawing_style(STYLE):
        for name in filter(lambda name: _has_data(name, report), FIGURES[report["subject"]]):
            figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
            _DRAWN[name](figure, report)
            for kind in ("png", "svg"):
                stream = io.BytesIO()
                metadata = {"Date": None} if kind == "svg" else None
                figure.savefig(stream, format=kind, dpi=PNG_DOTS_PER_INCH, metadata=metadata)
                drawn[f"{name}.{kind}"] = stream.getvalue()
    for name, content in drawn.items():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{name}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, folder / name)
    return [str(folder / name) for name in drawn]


def _has_data(name: str, report: Report) -> bool:
    """Whether there is anything to draw: an adapter may have changed nothing, or nothing in the blocks measured."""
    if name == "alignment":
        return "written_top" in report["overall"]
    if name == "overlap":
        return any(row["block"] is not None for row in report["overlaps"])
    return report["subject"] == "base" or bool(report["moved"])


def _entitle(axes: "Axes", title: str, subtitle: str) -> None:
    """A title that begins where the axes do, and what it holds for below it."""
    axes.set_title(f"\n{subtitle}", linespacing=1.8)  # the empty line keeps room for the title
    above = axes.annotate(
        title, (0, 1), (0, TITLE_POINTS), xycoords="axes fraction", textcoords="offset points", fontsize=13,
        fontweight="bold", annotation_clip=False,
    )  # fmt: skip
    above.set_in_layout(False)  # it may be wider than a panel, which must not push the next one away


def _kinds(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["kind"] for row in rows))


def _lines(kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How the line of each kind is drawn."""
    return {
        kind: {"color": COLOURS[at % len(COLOURS)], "linestyle": DASHES[at % len(DASHES)]}
        for at, kind in enumerate(kinds)
    }


def _mean(columns: Sequence[Sequence[float]]) -> list[float]:
    """Means over rows of equal length, entry by entry."""
    return [sum(values) / len(values) for values in zip(*columns, strict=True)]


# ---- a base ---------------------------------------------------------------------------------------------------------


def _draw_energy(figure: "Figure", report: Report) -> None:
    axes = figure.add_subplot()
    kinds = _kinds(report["spectra"])
    curves = {kind: _mean([row["curve"] for row in report["spectra"] if row["kind"] == kind]) for kind in kinds}
    order = sorted(kinds, key=lambda kind: -sum(curves[kind]))
    for kind in order:
        percent = [100 * value for value in curves[kind]]
        at = [100 * point / (len(percent) - 1) for point in range(len(percent))]
        axes.plot(at, percent, label=f"{kind}, {_crossing(at, percent, 90):.0f} %", **_lines(kinds)[kind])
    axes.plot([0, 100], [0, 100], color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
    axes.annotate("all directions alike", (72, 72), (2, -8), textcoords="offset points", color=MUTED, va="top")
    axes.axhline(90, color=INK, linewidth=1)
    axes.annotate("90 %", (100, 90), (-2, -4), textcoords="offset points", ha="right", va="top")
    axes.set(xlim=(0, 100), ylim=(0, 101), xlabel="directions kept, % of the full rank", ylabel="energy of W, %")
    blocks = f"{len(report['blocks'])} of {report['num_blocks']} blocks"
    _entitle(axes, "How the energy of a weight is spread", f"{report['base']}, mean over {blocks}")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), title="90 % is held by", alignment="left")


def _crossing(at: Sequence[float], values: Sequence[float], level: float) -> float:
    """Where rising values reach a level, interpolated."""
    after = next(i for i, value in enumerate(values) if value >= level)
    share = (level - values[after - 1]) / (values[after] - values[after - 1])
    return at[after - 1] + share * (at[after] - at[after - 1])


# ---- an adapter -----------------------------------------------------------------------------------------------------


def _draw_moved(figure: "Figure", report: Report) -> None:
    from matplotlib.colors import LogNorm  # one layer often moves many times as far as the rest

    updates = report["updates"]
    percent = {(row["kind"], row["block"]): 100 * row["relative_norm"] for row in updates if row["relative_norm"]}
    figure.set_figheight(3.4)
    axes = figure.add_subplot()
    norm = LogNorm(min(percent.values()), max(percent.values()))
    image = _heat_map(axes, updates, percent, "viridis", norm)
    axes.set_xlabel("block")
    _entitle(axes, "Where the adapter moved the weights", _names(report))
    _label_logs(_scale_bar(figure, image, axes, "‖ΔW‖ / ‖W‖, %").ax.yaxis)


def _names(report: Report) -> str:
    return " and ".join(PurePath(name).name for name in report["names"])


def _label_logs(axis: Any) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5, written as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def _heat_map(axes: "Axes", rows: Rows, values: Mapping[Any, float], colours: str, norm: "Normalize") -> Any:
    """Kinds down, blocks across; what is not known stays white."""
    kinds = _kinds(rows)
    blocks = sorted({row["block"] for row in rows if row["block"] is not None})
    cells = [[values.get((kind, block), float("nan")) for block in blocks] for kind in kinds]
    image = axes.imshow(cells, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    step = -(-len(blocks) // MOST_TICKS)
    axes.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xticks([at - 0.5 for at in range(1, len(blocks))], minor=True)
    axes.set_yticks([at - 0.5 for at in range(1, len(kinds))], minor=True)
    axes.grid(visible=False)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.spines[:].set_visible(False)
    return image


def _scale_bar(figure: "Figure", image: Any, axes: "Axes", label: str) -> Any:
    bar = figure.colorbar(image, ax=axes, aspect=14, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.set_label(label)
    return bar


def _draw_decay(figure: "Figure", report: Report) -> None:
    axes = figure.add_subplot()
    kinds = _kinds(report["updates"])
    longest = 0
    for kind, style in _lines(kinds).items():
        rows = [row["values"] for row in report["updates"] if row["kind"] == kind and row["norm"]]
        shares = [[100 * value**2 / sum(v**2 for v in values) for value in values] for values in rows]
        rank = min(map(len, shares), default=0)
        if rank:
            means = _mean([row[:rank] for row in shares])
            axes.plot(range(1, rank + 1), means, marker="o", markersize=4, label=kind, **style)
            longest = max(longest, rank)
    axes.set_yscale("log")
    _label_logs(axes.yaxis)
    axes.set(xlim=(0.5, longest + 0.5), xlabel="singular value, the largest first", ylabel="energy of ΔW, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _entitle(axes, "How the energy of the update is spread", f"{_names(report)}, mean over the layers of a kind")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


SIDES = (("written", "directions that ΔW writes"), ("read", "directions that ΔW reads"))
ENDS = (("top", "top of W", "#0072b2", "o"), ("bottom", "bottom of W", "#d55e00", "s"))


def _draw_alignment(figure: "Figure", report: Report) -> None:
    figure.set_figheight(3.9)
    kinds = [kind for kind in _kinds(report["updates"]) if "written_top" in report["by_kind"][kind]]
    panels = figure.subplots(1, 2, sharey=True, sharex=True, gridspec_kw={"wspace": 0.06})
    for axes, (side, title) in zip(panels, SIDES, strict=True):
        means = [report["by_kind"][kind] for kind in kinds]
        axes.axvline(1, color=INK, linewidth=1)
        for end, label, colour, marker in ENDS:
            ratios = [mean[f"{side}_{end}"] / mean[f"{side}_chance"] for mean in means]
            axes.plot(ratios, range(len(kinds)), marker, color=colour, markersize=7.5, label=label, clip_on=False)
        axes.grid(axis="x", visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        _entitle(axes, "How the update lies to the directions of W" if side == "written" else "", title)
        axes.set_xlabel("times as aligned as chance")
    panels[0].set_yticks(range(len(kinds)), kinds)
    panels[0].invert_yaxis()
    panels[0].set_xlim(left=0)
    panels[1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


# ---- two adapters ---------------------------------------------------------------------------------------------------

OVERLAPS = (
    ("read", "what A reads: overlap φ", "viridis", (0, 1)),
    ("written", "what B writes: overlap φ", "viridis", (0, 1)),
    ("cosine", "cosine of both ΔW", "PuOr_r", (-1, 1)),
)


def _draw_overlap(figure: "Figure", report: Report) -> None:
    from matplotlib.colors import Normalize

    figure.set_figheight(7.6)
    panels = figure.subplots(3, 1, sharex=True)
    for axes, (name, title, colours, limits) in zip(panels, OVERLAPS, strict=True):
        values = {(row["kind"], row["block"]): row[name] for row in report["overlaps"] if row[name] is not None}
        image = _heat_map(axes, report["overlaps"], values, colours, Normalize(*limits))
        if name == "read":
            _entitle(axes, f"What two adapters have in common: {_names(report)}", title)
        else:
            axes.set_title(title)
        _scale_bar(figure, image, axes, "")
    panels[-1].set_xlabel("block")


_DRAWN = {
    "energy": _draw_energy, "moved": _draw_moved, "decay": _draw_decay, "alignment": _draw_alignment,
    "overlap": _draw_overlap,
}  # fmt: skip
