"""Reports and progress as text for people, and reports as JSON for programs; decides nothing."""

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from thimble.errors import listing, plural
from thimble.events import Event

REFRESH_SECONDS = 0.2  # of the moving line in a terminal
LOG_SECONDS = 10.0  # between lines in a pipe or file
WIDTH = 100


class Progress:
    """Writes events as they come: a moving line in a terminal, a line now and then elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._last = 0.0
        self._has_line = False

    def on_event(self, event: Event) -> None:
        """Write what is worth writing."""
        if event.kind in ("decision", "note", "warning"):
            mark = {"decision": "  ", "note": "  ", "warning": "! "}[event.kind]
            self._line(mark + event.text)
        elif event.kind == "stage":
            self._line(event.text)
            self._last = time.monotonic()
        elif event.kind == "progress":
            self._moving(f"  {event.text} {event.data['done']} of {event.data['total']}")
        elif event.kind == "step":
            is_first = event.data["step"] == 1
            is_last = event.data["step"] == event.data["total"]
            self._moving(_step_line(event.data), is_forced=is_first or is_last)

    def _line(self, text: str) -> None:
        self.end()
        print(text, file=self._stream, flush=True)

    def _moving(self, text: str, is_forced: bool = False) -> None:
        wait = REFRESH_SECONDS if self._is_terminal else LOG_SECONDS
        if not is_forced and time.monotonic() - self._last < wait:
            return
        self._last = time.monotonic()
        if self._is_terminal:
            print(f"\r\x1b[K{text[:WIDTH]}", end="", file=self._stream, flush=True)
            self._has_line = True
        else:
            print(text, file=self._stream, flush=True)

    def end(self) -> None:
        """Leave the moving line."""
        if self._has_line:
            print(file=self._stream, flush=True)
        self._has_line = False


def _step_line(row: Mapping[str, Any]) -> str:
    of = f"/{row['total']}" if row["total"] else ""
    rate = row["tokens_so_far"] / row["seconds"] if row["seconds"] else 0.0
    memory = f"{row['peak_memory_bytes'] / 1e9:.2f} GB"
    left = f", {duration(row['seconds_left'])} left" if row.get("seconds_left") is not None else ""
    return f"  step {row['step']}{of}  loss {row['loss']:.3f}  {rate:,.0f} tokens/s{left}, {memory}"


def duration(seconds: float) -> str:
    """Seconds as `45 s`, `3:07` or `1:02:09`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if not i else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def _clip(text: str, width: int = WIDTH - 14) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 4] + " ..."


def render_train(report: Any) -> str:
    """The end of a training run in one screen."""
    rows: list[tuple[str, ...]] = [("", "before", "after")]
    for name, before in report.metrics_before.items():
        after = report.metrics_after.get(name)
        rows.append((name, _share(before, report.metrics_rows), _share(after, report.metrics_rows)))
    rows.append(("validation loss", _number(report.loss_before), _number(report.loss_after)))
    rows.append(("general text loss (forgetting)", _number(report.general_before), _number(report.general_after)))
    parts = [_table(rows)]
    for sample in report.samples[:3]:
        parts.append("\n".join(f"  {name:>8}: {_clip(sample[key])}" for name, key in _SAMPLE_LINES))
    speed = f"{report.tokens_per_second:,.0f} tokens/s, {report.peak_memory_bytes / 1e9:.2f} GB"
    state = "" if report.status == "done" else f"{report.status}: "
    parts.append(
        f"{state}{report.steps} steps in {duration(report.seconds)} ({speed}), {duration(report.total_seconds)} in all"
    )
    parts.append(
        f"adapter  {report.adapter}\nreport   {report.out}/report.html\ntry it   thimble chat --adapter {report.out}"
    )
    return "\n\n".join(parts)


_SAMPLE_LINES = (("asked", "asked"), ("expected", "reference"), ("before", "before"), ("after", "after"))


def _share(value: float | None, rows: int) -> str:
    return "-" if value is None else f"{value * rows:.0f}/{rows} ({value:.0%})"


def render_evaluate(report: Any) -> str:
    """All models side by side."""
    names = list(dict.fromkeys(name for result in report.results for name in result.scores))
    rows: list[tuple[str, ...]] = [("", *(result.name for result in report.results))]
    rows.append(("loss", *(_number(result.loss) for result in report.results)))
    rows.append(("perplexity", *(f"{result.perplexity:,.2f}" for result in report.results)))
    for name in names:
        rows.append((name, *(_share(result.scores.get(name), report.answered_rows) for result in report.results)))
    parts = [_table(rows)]
    answers = [result.answers for result in report.results]
    for shown in zip(*answers, strict=False):
        lines = [f"  {'asked':>8}: {_clip(shown[0]['asked'])}", f"  {'expected':>8}: {_clip(shown[0]['reference'])}"]
        lines += [
            f"  {Path(result.name).name[:8]:>8}: {_clip(a['written'])}"
            for result, a in zip(report.results, shown, strict=True)
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def render_merge(report: Any) -> str:
    """What was merged, kind by kind, and what it cost."""
    if report.status != "done":
        return f"{report.status}: nothing was written"
    table = _adapter_rows(report) if report.wrote == "adapter" else _base_rows(report)
    whole = report.kinds[-1]
    if report.wrote == "adapter":
        what = "cut off in all"
        use = f"adapter  {report.out}\ntry it   thimble chat --adapter {report.out}"
    else:
        what = "lost by rounding in all"
        use = f"base     {report.out}\ntry it   thimble chat --base {report.out}"
    cost = f"{_percent(whole.error)} of the update {what}; most in {whole.worst_layer}: {_percent(whole.worst_error)}"
    return "\n\n".join([_table(table), cost, use])


def _adapter_rows(report: Any) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("", "layers", "rank", "now", "parameters", "now", "MB", "now", "error", "worst")]
    for kind in report.kinds:
        sizes = (f"{kind.parameters_before:,}", f"{kind.parameters_after:,}")
        sizes += (f"{kind.bytes_before / 1e6:.2f}", f"{kind.bytes_after / 1e6:.2f}")
        ranks = (_span(kind.rank_before), _span(kind.rank_after))
        rows.append((kind.kind, f"{kind.layers}", *ranks, *sizes, _percent(kind.error), _percent(kind.worst_error)))
    return rows


def _base_rows(report: Any) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("", "layers", "rank", "rounding", "worst")]
    for kind in report.kinds:
        errors = (_percent(kind.error), _percent(kind.worst_error))
        rows.append((kind.kind, f"{kind.layers}", _span(kind.rank_before), *errors))
    return rows


def _span(ends: list[int]) -> str:
    return f"{ends[0]}" if ends[0] == ends[1] else f"{ends[0]}-{ends[1]}"


def _percent(value: float) -> str:
    return f"{value:.2%}" if value >= 1e-4 or not value else f"{value:.0e}"


def render_plan(report: Any) -> str:
    """A plan in a few lines."""
    from thimble.commands.plan import as_table

    return "\n".join(f"{name:>8}  {text}" for name, text in as_table(report))


# ---- inspect --------------------------------------------------------------------------------------------------------

BARS = "▁▂▃▄▅▆▇█"
NAMED_LAYERS = 3  # shown of a list of layers
NO_RANK_FROM_W = (
    "The energy of W says nothing about the rank an adapter needs: W stays whole, and what is learned is a change of "
    "its own."
)


def render_inspect(report: Any) -> str:
    """What was found in a base, in an adapter, or in common by two, in one screen."""
    parts = {"base": _base_parts, "adapter": _adapter_parts, "two adapters": _pair_parts}[report.subject](report)
    parts += [f"! {plural(len(report.skipped), 'weight')} left out: {_few(report.skipped)}"] if report.skipped else []
    parts += ["figures  " + "\n         ".join(report.figures)] if report.figures else []
    return "\n\n".join(parts)


def _base_parts(report: Any) -> list[str]:
    kinds = ", ".join(f"{share:.0%} {name}" for name, share in _shares_of(report.dtypes))
    head = f"{report.base}: {_blocks_of(report)}, {plural(len(report.spectra), 'weight')}; numbers {kinds}"
    ranks = [f"rank_{share}" for share in (50, 80, 90, 95, 99)]
    rows: list[tuple[str, ...]] = [
        ("mean over blocks", "shape", "stable rank", "50 %", "80 %", "90 %", "95 %", "99 %", "in top 16", "below noise")
    ]
    shapes = {row.kind: "x".join(map(str, row.shape)) for row in report.spectra}
    for kind, mean in report.by_kind.items():
        held = [f"{mean[rank]:.0f}" for rank in ranks]
        noise = f"{mean['below_noise']:.0%}" if "below_noise" in mean else "-"
        rows.append((kind, shapes[kind], f"{mean['stable_rank']:.0f}", *held, f"{mean['top_16']:.0%}", noise))
    legend = (
        "  50 % to 99 %: rank that holds this share of the energy of W; in top 16: energy of its 16 largest\n"
        "  directions; below noise: directions no larger than the rounding of the file's numbers makes."
    )
    return [head, _table(rows), legend, NO_RANK_FROM_W]


def _shares_of(counts: Mapping[str, int]) -> list[tuple[str, float]]:
    total = sum(counts.values())
    return [(name, count / total) for name, count in counts.items() if count / total >= 0.005]


def _blocks_of(report: Any) -> str:
    if len(report.blocks) == report.num_blocks:
        return f"all {plural(report.num_blocks, 'block')}"
    return f"blocks {listing(report.blocks, 12)} of {report.num_blocks}"


def _adapter_parts(report: Any) -> list[str]:
    ranks = sorted({update.rank for update in report.updates})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no rank"
    head = f"{report.names[0]}: {plural(len(report.updates), 'layer')} of {rank}, on {report.base}"
    rows: list[tuple[str, ...]] = [
        ("mean", "layers", "|ΔW|", "of |W|", "stable", "effective", "90 %", "99 %",
         "writes top/bottom", "reads top/bottom", "intruders")
    ]  # fmt: skip
    rows += [_update_row(name, mean) for name, mean in _means(report).items()]
    legend = (
        "  stable, effective, 90 %, 99 %: rank of ΔW by four measures. top/bottom: how far its leading directions\n"
        "  lie along the largest and the smallest of W, as a multiple of chance. intruders: of the 10 largest\n"
        f"  directions of W + ΔW, those like none of W. Beside W: {_blocks_of(report)}."
    )
    return [head, _table(rows), legend, _moves(report)]


def _means(report: Any) -> dict[str, Mapping[str, float]]:
    """Those of each kind and of all layers; none if the work was stopped before the first."""
    return {**report.by_kind, "all": report.overall} if report.by_kind else {}


def _update_row(name: str, mean: Mapping[str, float]) -> tuple[str, ...]:
    relative = f"{mean['relative_norm']:.2%}" if "relative_norm" in mean else "-"
    ranks = [f"{mean[field]:.1f}" for field in ("stable_rank", "effective_rank", "rank_90", "rank_99")]
    sides = [_multiples(mean, side) for side in ("written", "read")]
    new = f"{mean['intruders']:.2f}" if "intruders" in mean else "-"
    return (name, f"{mean['layers']:.0f}", f"{mean['norm']:.3g}", relative, *ranks, *sides, new)


def _multiples(mean: Mapping[str, float], side: str) -> str:
    if f"{side}_top" not in mean:
        return "-"
    return " / ".join(f"{mean[f'{side}_{end}'] / mean[f'{side}_chance']:.1f}x" for end in ("top", "bottom"))


def _moves(report: Any) -> str:
    lines = []
    if report.moved:
        relative = {update.layer: update.relative_norm for update in report.updates}
        ends = {"most": report.moved[:NAMED_LAYERS], "least": report.moved[-NAMED_LAYERS:][::-1]}
        lines += [
            f"moved {word:<6}" + ", ".join(f"{_short(layer)} {relative[layer]:.2%}" for layer in layers)
            for word, layers in ends.items()
        ]
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
        shown = [_number(mean.get(name)) for name in ("read", "read_chance", "written", "written_chance", "cosine")]
        rows.append((kind, f"{mean['layers']:.0f}", *shown))
    legend = (
        "  A reads, B writes: overlap of the subspaces, from 0 (nothing in common) to 1 (one holds the other).\n"
        "  Runs of one seed and rank begin with the same A, and so read alike whatever they learn."
    )
    only = [
        f"only in {at}   {_few(map(_short, layers))}" for at, layers in enumerate(report.only_in.values(), 1) if layers
    ]
    return [head, _table(rows), legend, *only]
