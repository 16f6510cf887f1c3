"""report.html: a training run on one page, for people.

The page is complete in itself: no script, nothing fetched, light and dark. `verdict` decides what is claimed on it,
`charts` draws, `samples` sets answers side by side, this module prepares the other words and numbers, and the template
page.html only arranges them.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from thimble.config.options import options_of
from thimble.config.train import ONLY_FOR, TrainConfig
from thimble.core.metrics import ERROR_RATES
from thimble.errors import escaped, plural
from thimble.report.certainty import certainty_of
from thimble.report.charts import draw_charts
from thimble.report.forgetting import forgetting, moved, perplexity
from thimble.report.formatting import ARROW, NONE, amount, duration, is_number, number, percent, size
from thimble.report.gallery import Shown, gallery_of, players_of
from thimble.report.label_tables import confusion_picture, confusion_rows, confusion_shares, label_rows, summary
from thimble.report.next_commands import commands_of
from thimble.report.samples import samples_note, samples_of
from thimble.report.verdict import (
    Report,
    Steps,
    interval,
    is_count,
    judge,
    loss_before,
    rows_of,
    score,
)
from thimble.report.words import is_text, rate_of, task_of, words_of

MOST_LABELS, MOST_CONFUSED, MOST_PICTURED = 40, 15, 150  # in the tables and the picture of labels
MESSAGE_TITLES = (("decision", "Decided"), ("note", "Found"))


def write_report(path: Path, report: Report, steps: Steps, shown: Sequence[Shown] = ()) -> None:
    """Write the page of a run into its folder; a reader sees the old file or the new one, never a part.

    `shown` are the pictures or clips of some validation rows.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    has_checkpoint = any((path.parent / "checkpoints").glob("step-*"))
    text = environment.get_template("page.html").render(_page(report, steps, shown, has_checkpoint))
    temporary = path.with_name(f".{path.name}.tmp")
    # JSON can smuggle in lone surrogates, which UTF-8 cannot hold; one odd sample must not cost the whole report
    temporary.write_bytes(text.encode("utf-8", errors="replace"))
    os.replace(temporary, path)


def _page(report: Report, steps: Steps, shown: Sequence[Shown], has_checkpoint: bool) -> dict[str, Any]:
    """All that the template shows."""
    messages = report["messages"]
    return {
        "status": report["status"],
        "headline": _headline(report),
        "facts": _facts(report),
        "warnings": messages.get("warning", []),
        "verdict": judge(report, steps),
        "metrics": [_metric(report, name) for name in {**report["metrics_before"], **report["metrics_after"]}],
        "metrics_rows": plural(report["metrics_rows"], "validation row"),
        "has_interval": any(is_count(report, name) for name in report["metrics_after"]),
        "labels": _labels(report),
        "certainty": certainty_of(report),
        "gallery": gallery_of(shown, report),
        "measures": _measures(report),
        "charts": draw_charts(report, steps),
        "loss_title": "Loss, nats per target token" if is_text(report) else "Loss, nats",
        "no_curve": f"{plural(len(steps), 'step')}: too little for a curve.",
        "samples": samples_of(report, players_of(shown)),
        "samples_note": samples_note(report),
        "messages": [(title, [_term(text) for text in messages.get(kind, [])]) for kind, title in MESSAGE_TITLES],
        "memory": _memory(report),
        "commands": commands_of(report, has_checkpoint),
        "is_relative": not Path(report["out"]).is_absolute(),
        "options": _options(report["config"], task_of(report)),
    }


def _term(text: str) -> tuple[str, str]:
    """A line such as `compute: bf16, ...` as its subject and the rest; the subject is empty if there is none."""
    match = re.match(r"([a-z][a-z ]{1,20}): (.*)", text, re.DOTALL)
    return (match[1], match[2]) if match else ("", text)


# ---- head ---------------------------------------------------------------------------------------------------------


def _headline(report: Report) -> tuple[str, str, str, str]:
    """Base, verb, data, and how long it took, to be set as one sentence."""
    base, path = report["base"] or "The base", PurePath(report["config"].get("data") or "the examples")
    data = path.name if path.suffix else str(PurePath(*path.parts[-2:]))  # of a folder also where it is: `demo/data`
    data = escaped(data)
    steps, spent = report["steps"], f"{plural(report['steps'], 'step')}, {duration(report['seconds'])} on a CPU"
    if not steps:
        return base, "was to be fine-tuned on", data, "but the run ended before the first step."
    ends = {"diverged": "training diverged", "interrupted": "the run was interrupted"}
    if report["status"] in ends:
        return base, "was fine-tuned on", data, f"until {ends[report['status']]}: {spent}."
    return base, "fine-tuned on", data, f"in {spent}."


def _facts(report: Report) -> list[str]:
    facts = []
    if report["tokens"] and is_text(report):
        facts.append(f"{report['tokens']:,} training tokens, {report['target_tokens']:,} of them target tokens")
    elif report["tokens"]:
        rows = words_of(report).rows
        held = f"{report['training_rows']:,} {rows} to learn from, {report['validation_rows']:,} held out"
        facts.append(f"{report['task']}: {held}")
        facts.append(f"before training: {words_of(report).before}")
    if report["adapter_parameters"] and report["base_parameters"]:
        share = percent(report["adapter_parameters"] / report["base_parameters"])
        facts.append(f"adapter of {amount(report['adapter_parameters'])} parameters, {share} of the base")
    if report["total_seconds"]:
        facts.append(f"{duration(report['total_seconds'])} in all, evaluation included")
    return facts


# ---- metrics and measurements ---------------------------------------------------------------------------------------


def _metric(report: Report, name: str) -> dict[str, Any]:
    before, after, rows = report["metrics_before"].get(name), report["metrics_after"].get(name), rows_of(report, name)
    counts = is_count(report, name)
    values = [score(report, name, value) if is_number(value) else NONE for value in (before, after)]
    has_all = rows_of(report, name) == report["metrics_rows"]
    of = "all rows" if has_all else f"the {plural(rows_of(report, name), 'row')} that have it"
    is_share = all(not is_number(value) or 0 <= value <= 1 for value in (before, after))
    note = f"mean {'share ' if is_share else ''}over {of}"
    if name in ERROR_RATES:
        note = f"errors over the {ERROR_RATES[name]} of all expected texts, in small letters, without punctuation"
    if counts and is_number(before) and is_number(after):
        note = f"{percent(before)}{ARROW}{percent(after)} ({interval(after, rows)})"
    return {
        **_measure(name, (values[0], values[1]), note),
        "of": f"/{rows:,}" if counts else "",
        "widths": [_width(value) for value in (before, after) if is_number(value)] if is_share else [],
    }


def _labels(report: Report) -> dict[str, Any] | None:
    """Labels after training, or before it if the run was cut short, as tables."""
    labels = report.get("labels") or {}
    scores = labels.get("after") or labels.get("before")
    if not scores:
        return None
    return {
        "when": "After training" if labels.get("after") else "Before training", "summary": summary(scores),
        "labels": label_rows(scores, labels.get("training_rows", {}), MOST_LABELS),
        "confusion": confusion_rows(scores, MOST_CONFUSED),
        "shares": confusion_shares(scores) if len(scores["labels"]) <= MOST_CONFUSED else [],
        "picture": confusion_picture(scores) if MOST_CONFUSED < len(scores["labels"]) <= MOST_PICTURED else "",
    }  # fmt: skip


def _width(share: Any) -> str:
    return f"{min(max(share, 0.0), 1.0) * 100:.1f}%" if is_number(share) else "0%"


def _measures(report: Report) -> list[dict[str, str]]:
    """What every run measures, as before and after (or as one value) with a remark."""
    loss = (number(loss_before(report)), number(report["loss_after"]))
    general = (number(report["general_before"]), number(report["general_after"]))
    same, moved_note = moved(report)
    peak, (counted, rate) = report["peak_memory_bytes"], rate_of(report)
    speed = number(rate or None, 0 if rate >= 10 else 1)
    return [
        _measure("Validation loss", loss, _loss_note(report)),
        *([_measure("Loss on general text", general, forgetting(report)[1])] if is_text(report) else []),
        *([_measure("Goes on as the base", ("", same), moved_note)] if same else []),
        _measure("Peak memory", ("", size(peak or None)), _memory_note(peak, report["plan"].get("total"))),
        _measure(f"{counted.capitalize()} per second", ("", speed), _speed_note(report)),
    ]


def _measure(name: str, values: tuple[str, str], note: str) -> dict[str, str]:
    """A measurement as `before` (may be empty) and `after`; what was not measured after stands alone, and says so."""
    before, after = values
    if before not in ("", NONE) and after == NONE:
        return {"name": name, "before": "", "after": before, "note": "Before training; not measured after."}
    return {"name": name, "before": "" if before == NONE else before, "after": after, "note": note}


def _loss_note(report: Report) -> str:
    base, attached, after = report["loss_base"], report["loss_before"], report["loss_after"]
    if not is_number(base) and not is_number(attached):
        return "There are no validation rows."
    before, after = (number(perplexity(value), 2) for value in (loss_before(report), after))
    is_moved = is_number(base) and is_number(attached) and abs(base - attached) > 0.001
    moved = f" With the adapter attached, before step 1, the loss was {number(attached)}." if is_moved else ""
    rows = "validation rows, some of them trained on" if report.get("known_rows") else "rows it never trained on"
    if not is_text(report):
        return f"Nats, on {rows}."
    return f"Nats per target token, on {rows}. Perplexity {before}{ARROW}{after}.{moved}"


def _speed_note(report: Report) -> str:
    steps, planned = report["steps"], report["planned_seconds_per_step"]
    if not steps or not planned:
        return "During training; evaluation is not counted."
    return f"{report['seconds'] / steps:.2g} s a step; {planned:.2g} s planned. Evaluation is not counted."


# ---- memory and options ---------------------------------------------------------------------------------------------

PART_NAMES = {
    "process": "Python and its libraries", "weights": "frozen weights", "activations": "activations kept",
    "scratch": "decoded weights, logits and temporaries", "adapter": "adapter, gradients, optimiser",
}  # fmt: skip


def _memory(report: Report) -> dict[str, Any] | None:
    parts = {name: count for name, count in report["plan"].items() if name != "total" and is_number(count)}
    planned, peak = report["plan"].get("total") or sum(parts.values()), report["peak_memory_bytes"]
    widest = max(planned, peak, 1)
    if not parts:
        return None
    shown = [
        {"name": PART_NAMES.get(name, name), "size": size(count), "width": _width(count / widest)}
        for name, count in parts.items()
    ]
    return {
        "parts": shown, "planned": size(planned), "peak": size(peak or None), "peak_width": _width(peak / widest),
        "note": _memory_note(peak, planned),
    }  # fmt: skip


def _memory_note(peak: int, planned: int | None) -> str:
    if not peak or not planned:
        return "Not planned." if peak else "Not measured."
    change = peak / planned - 1
    if abs(change) < 0.005:
        return f"As planned ({size(planned)})."
    return f"{percent(abs(change))} {'above' if change > 0 else 'below'} the {size(planned)} planned."


def _options(config: Mapping[str, Any], task: str) -> list[dict[str, str]]:
    """Every option that says something for a task as it is typed, with its value and what it means."""
    known = options_of(TrainConfig)
    rows = []
    for name, value in config.items():
        if task not in ONLY_FOR.get(name, (task,)):
            continue
        metadata = known[name].metadata if name in known else {}
        typed = name.upper() if metadata.get("positional") else "--" + name.replace("_", "-")
        shown = size(value) if metadata.get("is_size") and is_number(value) else escaped(_setting(value))
        rows.append({"name": typed, "value": shown, "help": metadata.get("help", "")})
    return rows


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return ", ".join(map(_setting, value)) or NONE
    if isinstance(value, float):
        return f"{value:g}" if math.isfinite(value) else NONE
    return NONE if value is None or value == "" else str(value)
