"""Reports and progress as text for people, and reports as JSON for programs; decides nothing."""

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from thimble.verbs.events import Event

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

    def hear(self, event: Event) -> None:
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


def to_json(report: Any) -> str:
    """A report dataclass as one line of JSON; numbers that are not finite become null."""
    return json.dumps(without_nan(dataclasses.asdict(report)), ensure_ascii=False)


def without_nan(value: Any) -> Any:
    """Plain data with None for numbers that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    for name, before in report.task_before.items():
        after = report.task_after.get(name)
        rows.append((name, _share(before, report.task_rows), _share(after, report.task_rows)))
    rows.append(("held-out loss", _number(report.loss_before), _number(report.loss_after)))
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
    from thimble.verbs.plan import as_table

    return "\n".join(f"{name:>8}  {text}" for name, text in as_table(report))
