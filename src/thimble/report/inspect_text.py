"""What `thimble inspect` found, as text in a terminal: of a base, an adapter, two adapters, or inits on some data."""

from collections.abc import Iterable, Mapping
from typing import Any

from thimble.errors import listing, plural
from thimble.report.formatting import NONE, number, table
from thimble.report.streams import columns

BARS = "▁▂▃▄▅▆▇█"
NAMED_LAYERS = 3  # shown of a list of layers
NO_RANK_FROM_W = (
    "The energy of W says nothing about the rank an adapter needs: W stays whole, and what is learned is a change of "
    "its own."
)


def render_inspect(report: Any) -> str:
    """What was found in a base, in an adapter, in two adapters or of inits, in one screen."""
    parts = _PARTS[report.subject](report)
    if report.skipped:
        parts.append(f"warning: {plural(len(report.skipped), 'weight')} left out: {_few(report.skipped)}")
    if report.figures:
        parts.append("figures  " + "\n         ".join(report.figures))
    return "\n\n".join(parts)


def _base_parts(report: Any) -> list[str]:
    total = sum(report.dtypes.values())
    kinds = ", ".join(f"{count / total:.0%} {name}" for name, count in report.dtypes.items() if count / total >= 0.005)
    head = f"{report.base}: {_blocks_of(report)}, {plural(len(report.spectra), 'weight')}; parameters {kinds}"
    ranks = [f"rank_{share}" for share in (50, 80, 90, 95, 99)]
    rows: list[tuple[str, ...]] = [
        ("mean over blocks", "shape", "stable rank", "50 %", "80 %", "90 %", "95 %", "99 %", "in top 16", "below noise")
    ]
    shapes = {row.kind: "x".join(map(str, row.shape)) for row in report.spectra}
    for kind, mean in report.by_kind.items():
        held = [f"{mean[rank]:.0f}" for rank in ranks]
        noise = f"{mean['below_noise']:.0%}" if "below_noise" in mean else NONE
        rows.append((kind, shapes[kind], f"{mean['stable_rank']:.0f}", *held, f"{mean['top_16']:.0%}", noise))
    legend = (
        "  50 % to 99 %: rank that holds this share of the energy of W; in top 16: energy of its 16 largest\n"
        "  directions; below noise: directions no larger than the rounding of the file's numbers makes."
    )
    return [head, table(rows, columns()), legend, NO_RANK_FROM_W]


def _blocks_of(report: Any) -> str:
    if len(report.blocks) == report.num_blocks:
        return f"all {plural(report.num_blocks, 'block')}"
    return f"blocks {listing(report.blocks, 12)} of {report.num_blocks}"


def _adapter_parts(report: Any) -> list[str]:
    ranks = sorted({update.rank for update in report.updates})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no rank"
    head = f"{report.names[0]}: {plural(len(report.updates), 'layer')} of {rank}"
    rows: list[tuple[str, ...]] = [
        ("mean", "layers", "|ΔW|", "of |W|", "stable", "effective", "90 %", "99 %",
         "writes top/bottom", "reads top/bottom", "intruders")
    ]  # fmt: skip
    rows += [_update_row(name, mean) for name, mean in _means(report).items()]
    if not report.base:  # what needs its weights is not known
        rows = [(*row[:3], *row[4:8]) for row in rows]
        legend = "  stable, effective, 90 %, 99 %: rank of ΔW by four measures."
        return [head, table(rows, columns()), legend, _moves(report)]
    head = f"{head}, on {report.base}"
    legend = (
        "  stable, effective, 90 %, 99 %: rank of ΔW by four measures. top/bottom: how far its leading directions\n"
        "  lie along the largest and the smallest of W, as a multiple of chance. intruders: of the 10 largest\n"
        f"  directions of W + ΔW, those like none of W. Beside W: {_blocks_of(report)}."
    )
    return [head, table(rows, columns()), legend, _moves(report)]


def _means(report: Any) -> dict[str, Mapping[str, float]]:
    """Those of each kind and of all layers; none if the work was stopped before the first."""
    return {**report.by_kind, "all": report.overall} if report.by_kind else {}


def _update_row(name: str, mean: Mapping[str, float]) -> tuple[str, ...]:
    relative = f"{mean['relative_norm']:.2%}" if "relative_norm" in mean else NONE
    ranks = [f"{mean[field]:.1f}" for field in ("stable_rank", "effective_rank", "rank_90", "rank_99")]
    sides = [_multiples(mean, side) for side in ("written", "read")]
    new = f"{mean['intruders']:.2f}" if "intruders" in mean else NONE
    return (name, f"{mean['layers']:.0f}", f"{mean['norm']:.3g}", relative, *ranks, *sides, new)


def _multiples(mean: Mapping[str, float], side: str) -> str:
    if f"{side}_top" not in mean:
        return NONE
    return " / ".join(f"{mean[f'{side}_{end}'] / mean[f'{side}_chance']:.1f}x" for end in ("top", "bottom"))


def _moves(report: Any) -> str:
    lines = []
    if report.moved:
        relative = {update.layer: update.relative_norm for update in report.updates}
        ends = {"most": report.moved[:NAMED_LAYERS], "least": report.moved[-NAMED_LAYERS:][::-1]}
        for word, layers in ends.items():
            lines.append(f"moved {word:<6}" + ", ".join(f"{_short(layer)} {relative[layer]:.2%}" for layer in layers))
    lines.append("not moved   " + (_few(map(_short, report.unmoved)) if report.unmoved else "none: every layer moved"))
    means = {block: mean.get("relative_norm", 0.0) for block, mean in report.by_block.items()}
    blocks = sorted(means, key=int)
    if len(blocks) > 1 and max(means.values()) > 0:
        bars = "".join(BARS[round(7 * means[block] / max(means.values()))] for block in blocks)
        lines.append(f"by block    {blocks[0]} {bars} {blocks[-1]}, the highest is {max(means.values()):.2%} of |W|")
    return "\n".join(lines)


def _short(layer: str) -> str:
    return layer.removeprefix("model.layers.")


def _few(items: Iterable[Any]) -> str:
    return listing(items, NAMED_LAYERS)


def _pair_parts(report: Any) -> list[str]:
    head = f"1  {report.names[0]}\n2  {report.names[1]}"
    rows: list[tuple[str, ...]] = [("mean", "layers", "A reads", "chance", "B writes", "chance", "cosine of ΔW")]
    for kind, mean in _means(report).items():
        shown = [number(mean.get(name)) for name in ("read", "read_chance", "written", "written_chance", "cosine")]
        rows.append((kind, f"{mean['layers']:.0f}", *shown))
    legend = (
        "  A reads, B writes: overlap of the subspaces, from 0 (nothing in common) to 1 (one holds the other).\n"
        "  Runs of one seed and rank begin with the same A, and so read alike whatever they learn."
    )
    others = ((at, layers) for at, layers in enumerate(report.only_in.values(), 1) if layers)
    return [
        head,
        table(rows, columns()),
        legend,
        *(f"only in {at}   {_few(map(_short, layers))}" for at, layers in others),
    ]


def _init_parts(report: Any) -> list[str]:
    head = f"gradients of {report.names[0]} on {report.base}, {plural(len(report.inits), 'layer')}"
    rows: list[tuple[str, ...]] = [("share captured by A of", "layers", "rank", "kaiming", "eva", "gradient")]
    for kind, mean in _means(report).items():
        shares = [f"{mean[init]:.1%}" for init in ("kaiming", "eva", "gradient")]
        rows.append((kind, f"{mean['layers']:.0f}", f"{mean['rank']:.0f}", *shares))
    legend = "  Share of the gradient of W (squared norm) that lies in the rows of A, on rows that A was not made from."
    return [head, table(rows, columns()), legend, report.remark]


_PARTS = {"base": _base_parts, "adapter": _adapter_parts, "two adapters": _pair_parts, "inits": _init_parts}
