"""report.html: a training run on one page, for people.

The page is complete in itself: no script, nothing fetched, light and dark. What is said in words on it (did it work,
how much was forgotten) is decided here, by rules that stand next to their limits; the template only sets it out.
"""

import difflib
import io
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from thimble.config.options import options_of
from thimble.config.train import TrainConfig
from thimble.core.metrics import tool_calls, valid_json
from thimble.errors import plural
from thimble.models.base import DEFAULT_PACKAGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Report = Mapping[str, Any]
Steps = Sequence[Mapping[str, Any]]

STRICTEST = ("all arguments right", "all fields right", "exact match")  # the figure that decides, if there is one
SHARES = ("fields right",)  # means of shares, not of right-or-wrong: never shown as a count of rows
CHANCE = 0.025  # a change of counts is called clear if luck alone would bring it less often than this
GOOD_SHARE, HALF_SHARE = 0.9, 0.5  # of rows right after training: "yes", "mostly", below that "partly"
LOSS_MARGIN_NATS = 0.01  # a smaller change of the validation loss is called none
FORGOT_LITTLE, FORGOT_SOME = 0.02, 0.10  # rise of perplexity on general text
LEAST_SMOOTHED = 8  # steps; a shorter curve is shown as it is
MOST_POINTS = 400  # drawn in a chart; longer runs are averaged in groups
MOST_DIFF_TOKENS = 800  # longer answers are not compared word by word: it takes quadratic time
LEAST_ALIKE = 0.35  # below this ratio nearly every word differs, and marking them all would only be noise
LONG_QUESTION = 400  # characters; the rest is folded away
SPIKE = 8.0  # a curve that rises this many times above its start is drawn on a logarithmic axis
NONE, THIN, ARROW = (
    "–",
    "\u202f",
    "\u00a0→\u00a0",
)  # no value; narrow no-break space; arrow that keeps both sides together


def write_report(path: Path, report: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> None:
    """Write the page of a run; a reader sees the old file or the new one, never a part.

    Args:
        path: The file to write.
        report: `asdict` of a TrainReport; anything in it may be missing or NaN or Inf.
        steps: The rows of metrics.jsonl.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("page.html").render(_page(report, steps))
    temporary = path.with_name(f".{path.name}.tmp")
    # JSON can smuggle in lone surrogates, which UTF-8 cannot hold; one odd sample must not cost the whole report
    temporary.write_bytes(text.encode("utf-8", errors="replace"))
    os.replace(temporary, path)


def _page(report: Report, steps: Steps) -> dict[str, Any]:
    """All that the template shows."""
    told = report["messages"]
    return {
        "status": report["status"],
        "headline": _headline(report),
        "facts": _facts(report),
        "warnings": told.get("warning", []),
        "verdict": _verdict(report, steps),
        "figures": _metrics(report),
        "metrics_rows": f"{report['metrics_rows']:,}",
        "has_interval": any(_is_count(report, name) for name in report["metrics_after"]),
        "measures": _measures(report),
        "charts": _charts(report, steps),
        "no_curve": f"{plural(len(steps), 'step')}: too little for a curve.",
        "samples": [_sample(sample) for sample in report["samples"]],
        "samples_note": _samples_note(report),
        "told": [(title, [_term(text) for text in told.get(kind, [])]) for kind, title in TOLD_TITLES],
        "memory": _memory(report),
        "commands": _commands(report),
        "is_relative": not Path(report["out"]).is_absolute(),
        "options": _options(report["config"]),
    }


TOLD_TITLES = (("decision", "Decided"), ("note", "Found"))


def _term(text: str) -> tuple[str, str]:
    """A line such as `compute: bf16, ...` as its subject and the rest; the subject is empty if there is none."""
    match = re.match(r"([a-z][a-z ]{1,20}): (.*)", text, re.DOTALL)
    return (match[1], match[2]) if match else ("", text)


# ---- numbers in words -------------------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any, digits: int = 3) -> str:
    if not _is_number(value):
        return NONE
    return f"{value:.2e}" if abs(value) >= 1e6 else f"{value:,.{digits}f}"


def _percent(share: Any) -> str:
    """A share as percent; 0 and 100 are kept for what is exactly that."""
    if not _is_number(share):
        return NONE
    shown = share * 100
    is_near_an_end = 0 < shown < 10 or 99 < shown < 100
    return (f"{min(max(shown, 0.1), 99.9):.1f}" if is_near_an_end else f"{shown:.0f}") + f"{THIN}%"


def _size(count: Any) -> str:
    if not _is_number(count):
        return NONE
    return f"{count / 1e9:.2f}{THIN}GB" if count >= 1e9 else f"{count / 1e6:.0f}{THIN}MB"


def _amount(count: float) -> str:
    if count < 1e6:
        return f"{count:,}"
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def _duration(seconds: Any) -> str:
    if not _is_number(seconds):
        return NONE
    if seconds < 90:
        return plural(round(seconds), "second") if seconds >= 0.5 else "under a second"
    minutes = round(seconds / 60)
    return plural(minutes, "minute") if minutes < 90 else f"{minutes // 60}{THIN}h {minutes % 60}{THIN}min"


def _perplexity(loss: Any) -> float:
    return math.exp(min(loss, 700.0)) if _is_number(loss) else math.nan


# ---- head ---------------------------------------------------------------------------------------------------------


def _headline(report: Report) -> tuple[str, str, str, str]:
    """Base, verb, data, and how long it took, to be set as one sentence."""
    base, data = report["base"] or "The base", PurePath(report["config"].get("data") or "the examples").name
    steps, spent = report["steps"], f"{plural(report['steps'], 'step')}, {_duration(report['seconds'])} on a CPU"
    if not steps:
        return base, "was to learn from", data, "but the run ended before the first step."
    if report["status"] == "diverged":
        return base, "was learning from", data, f"until training diverged: {spent}."
    if report["status"] == "interrupted":
        return base, "was learning from", data, f"until it was interrupted: {spent}."
    return base, "learned from", data, f"in {spent}."


def _facts(report: Report) -> list[str]:
    facts = []
    if report["tokens"]:
        facts.append(f"{report['tokens']:,} tokens read, {report['target_tokens']:,} of them learned")
    if report["adapter_parameters"] and report["base_parameters"]:
        share = _percent(report["adapter_parameters"] / report["base_parameters"])
        facts.append(f"adapter of {_amount(report['adapter_parameters'])} numbers, {share} of the base")
    if report["total_seconds"]:
        facts.append(f"{_duration(report['total_seconds'])} in all, measuring included")
    return facts


# ---- did it work? -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """The answer to "did it work?": `tone` (good, mixed, bad, unknown), one or two words, and a few sentences."""

    tone: str
    word: str
    text: str


def _verdict(report: Report, steps: Steps) -> Verdict:
    if report["status"] == "diverged":
        return Verdict("bad", "No", f"{_why_diverged(report, steps)} {KEPT_BEFORE_DIVERGING}")
    if not report["steps"]:
        return Verdict("unknown", "Nothing was trained", "No step was taken, so the adapter changes nothing.")
    key = _key_figure(report)
    if not key and not _is_number(report["loss_after"]):
        return Verdict("unknown", "Not measured", _why_unmeasured(report, steps))
    verdict = _task_verdict(report, key) if key else _loss_verdict(report)
    forgotten = _forgetting(report)[0]
    if forgotten not in ("some", "much"):
        return verdict
    tone = "mixed" if forgotten == "much" and verdict.tone == "good" else verdict.tone
    return Verdict(tone, verdict.word, f"{verdict.text} It forgot {forgotten} of its general knowledge.")


KEPT_BEFORE_DIVERGING = (
    "The adapter holds the last good state from before that; its quality was not measured. A learning rate ten times "
    "smaller usually helps."
)


def _why_diverged(report: Report, steps: Steps) -> str:
    row = steps[-1] if steps else {}
    if not _is_number(row.get("loss")):
        what = "the loss was no longer a number"
    elif not _is_number(row.get("grad_norm")):
        what = "the gradient was no longer a number"
    else:
        first = next(step["loss"] for step in steps if _is_number(step["loss"]))
        what = f"the loss had risen from {_number(first, 2)} to {_number(row['loss'], 2)}"
    return f"Training diverged at step {report['steps']}: {what}."


def _why_unmeasured(report: Report, steps: Steps) -> str:
    losses = [row["loss"] for row in steps if _is_number(row.get("loss"))]
    curve = ""
    if len(losses) > 1:
        last = _mean(losses[-max(1, len(losses) // 10) :])
        curve = (
            f" On the training rows the loss went from {_number(losses[0], 2)} to about {_number(last, 2)}, which does "
            "not show how it does on rows it has not seen."
        )
    if report["status"] == "interrupted":
        return f"The run was stopped before the result was measured; what was learned until then is kept.{curve}"
    return f"No rows were held out, so there is nothing to judge by.{curve} Hold some out with --valid-split 0.1."


def _key_figure(report: Report) -> str:
    """The metric that decides, if it was measured before and after."""
    before, after = report["metrics_before"], report["metrics_after"]
    names = [*STRICTEST, *before] if report["metrics_rows"] else []
    known = [name for name in names if _is_number(before.get(name)) and _is_number(after.get(name))]
    return known[0] if known else ""


def _task_verdict(report: Report, key: str) -> Verdict:
    rows, before, after = report["metrics_rows"], report["metrics_before"][key], report["metrics_after"][key]
    old, new = round(before * rows), round(after * rows)
    on, loss = f"On {plural(rows, 'validation row')}", _loss_sentence(report)
    said = f"“{key}” went from {_score(report, key, before)} to {_score(report, key, after)}"
    if _is_clear_rise(new, old, rows):
        return Verdict("bad", "No", f"It got worse. {on}, {said}. {loss}")
    if _is_clear_rise(old, new, rows):
        word = "Yes" if after >= GOOD_SHARE else "Mostly" if after >= HALF_SHARE else "Partly"
        return Verdict("mixed" if word == "Partly" else "good", word, f"{on}, {said}{_left(report, key)}. {loss}")
    if before >= GOOD_SHARE:
        return Verdict("unknown", "There was little to learn", f"The base was good at it: {on.lower()}, {said}. {loss}")
    risen = [f"“{name}”" for name in report["metrics_before"] if _has_clearly_risen(report, name)]
    if risen:
        return Verdict("mixed", "Partly", f"{on}, {' and '.join(risen)} clearly rose, but {said}. {loss}")
    if new > old:
        return Verdict("mixed", "Unclear", f"{on}, {said}. A difference this small may be chance. {loss}")
    return Verdict("bad", "No", f"The answers are no better. {on}, {said}. {loss}")


def _left(report: Report, key: str) -> str:
    """How many rows are still wrong, if the figure counts rows."""
    wrong = report["metrics_rows"] - round(report["metrics_after"][key] * report["metrics_rows"])
    return f"; {wrong:,} {'is' if wrong == 1 else 'are'} still not right" if wrong and _is_count(report, key) else ""


def _score(report: Report, name: str, share: float) -> str:
    return f"{round(share * report['metrics_rows']):,}" if _is_count(report, name) else _percent(share)


def _loss_verdict(report: Report) -> Verdict:
    change, said = report["loss_after"] - _loss_before(report), _loss_sentence(report)
    if not _is_number(change):
        return Verdict(
            "unknown", "Unclear", "The validation loss was only measured after training: nothing to compare."
        )
    if change < -LOSS_MARGIN_NATS:
        text = "It predicts unseen rows better than the base did; whether it answers better, only its answers can show."
        return Verdict("good", "Yes, by the loss", f"{said} {text}")
    if change > LOSS_MARGIN_NATS:
        return Verdict("bad", "No", f"{said} It fits the training rows and not the task.")
    return Verdict("mixed", "No change", said)


def _loss_sentence(report: Report) -> str:
    before, after = _loss_before(report), report["loss_after"]
    if not (_is_number(before) and _is_number(after)):
        return ""
    change = after - before
    verb = "fell" if change < -LOSS_MARGIN_NATS else "rose" if change > LOSS_MARGIN_NATS else "hardly changed,"
    return f"The validation loss {verb} from {_number(before)} to {_number(after)}."


def _loss_before(report: Report) -> float:
    return report["loss_base"] if _is_number(report["loss_base"]) else report["loss_before"]


def _is_count(report: Report, name: str) -> bool:
    """Whether a figure is the mean of right-or-wrong, so that it can be told as so many of so many rows."""
    rows = report["metrics_rows"]
    values = [figures[name] for figures in (report["metrics_before"], report["metrics_after"]) if name in figures]
    return name not in SHARES and all(_is_number(value) and _is_row_count(value * rows, rows) for value in values)


def _is_row_count(value: float, rows: int) -> bool:
    return 0 <= value <= rows and abs(value - round(value)) < 1e-6


def _has_clearly_risen(report: Report, name: str) -> bool:
    rows, before, after = report["metrics_rows"], report["metrics_before"][name], report["metrics_after"].get(name)
    return _is_number(before) and _is_number(after) and _is_clear_rise(round(before * rows), round(after * rows), rows)


def _is_clear_rise(before: int, after: int, rows: int) -> bool:
    """Fisher's exact test, one-sided: would luck alone put this many of all right answers on the second side?

    For means of shares the counts are rounded, which errs on the careful side: they vary less than right-or-wrong does.
    """
    total = before + after
    if not 0 <= before < after <= rows:
        return False
    tail = range(after, min(rows, total) + 1)
    luck = (_log_choose(rows, k) + _log_choose(rows, total - k) - _log_choose(2 * rows, total) for k in tail)
    return sum(map(math.exp, luck)) < CHANCE


def _log_choose(of: int, some: int) -> float:
    return math.lgamma(of + 1) - math.lgamma(some + 1) - math.lgamma(of - some + 1)


# ---- figures ------------------------------------------------------------------------------------------------------


def _metrics(report: Report) -> list[dict[str, Any]]:
    names = dict.fromkeys([*report["metrics_before"], *report["metrics_after"]])
    return [_metric(report, name) for name in names]


def _metric(report: Report, name: str) -> dict[str, Any]:
    before, after, rows = report["metrics_before"].get(name), report["metrics_after"].get(name), report["metrics_rows"]
    is_count = _is_count(report, name)
    values = [_score(report, name, value) if _is_number(value) else NONE for value in (before, after)]
    note = "mean share over all rows"
    if is_count and _is_number(before) and _is_number(after):
        note = f"{_percent(before)}{ARROW}{_percent(after)} ({_interval(after, rows)})"
    return {
        **_measure(name, (values[0], values[1]), note),
        "of": f"/{rows:,}" if is_count else "",
        "widths": [_width(value) for value in (before, after) if _is_number(value)],
    }


def _interval(share: float, rows: int) -> str:
    """Wilson's 95 % interval: between which values the figure would lie on very many rows of the same kind."""
    z = 1.96
    middle = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return f"{max(middle - half, 0) * 100:.0f}–{min(middle + half, 1) * 100:.0f}{THIN}%"


def _width(share: Any) -> str:
    return f"{min(max(share, 0.0), 1.0) * 100:.1f}%" if _is_number(share) else "0%"


def _measures(report: Report) -> list[dict[str, str]]:
    """The figures that every run has, as before and after (or as one value) with a remark."""
    loss = (_number(_loss_before(report)), _number(report["loss_after"]))
    general = (_number(report["general_before"]), _number(report["general_after"]))
    peak, rate = report["peak_memory_bytes"], report["tokens_per_second"]
    speed = _number(rate or None, 0 if rate >= 10 else 1)
    return [
        _measure("Validation loss", loss, _loss_note(report)),
        _measure("Loss on general text", general, _forgetting(report)[1]),
        _measure("Peak memory", ("", _size(peak or None)), _memory_note(peak, report["plan"].get("total"))),
        _measure("Tokens per second", ("", speed), _speed_note(report)),
    ]


def _speed_note(report: Report) -> str:
    steps, planned = report["steps"], report["planned_seconds_per_step"]
    if not steps or not planned:
        return "Read in training; measuring is not counted."
    return f"{report['seconds'] / steps:.2g} s a step; {planned:.2g} s planned. Measuring is not counted."


def _measure(name: str, values: tuple[str, str], note: str) -> dict[str, str]:
    """A figure as `before` (may be empty) and `after`; what was not measured after stands alone, and says so."""
    before, after = values
    if before not in ("", NONE) and after == NONE:
        return {"name": name, "before": "", "after": before, "note": "Before training; not measured after."}
    return {"name": name, "before": "" if before == NONE else before, "after": after, "note": note}


def _loss_note(report: Report) -> str:
    base, start, after = report["loss_base"], report["loss_before"], report["loss_after"]
    if not _is_number(base) and not _is_number(start):
        return "No rows were held out."
    before, after = (_number(_perplexity(value), 2) for value in (_loss_before(report), after))
    moved = _is_number(base) and _is_number(start) and abs(base - start) > 0.001
    attached = f" With the adapter attached, before step 1, the loss was {_number(start)}." if moved else ""
    return f"Nats per token, on rows it never trained on. Perplexity {before}{ARROW}{after}.{attached}"


def _forgetting(report: Report) -> tuple[str, str]:
    """How much was forgotten: `nothing`, `little`, `some`, `much` or empty, and a sentence."""
    before, after = report["general_before"], report["general_after"]
    if not (_is_number(before) and _is_number(after)):
        return "", "Not measured."
    rise = math.exp(min(after - before, 700.0)) - 1
    moved = f"perplexity on a small general sample {'rose' if rise >= 0 else 'fell'} by {_percent(abs(rise))}"
    if rise < -FORGOT_LITTLE:
        return "nothing", f"Forgot nothing: {moved}."
    if rise < FORGOT_LITTLE:
        return "little", f"Forgot little or nothing: {moved}."
    if rise < FORGOT_SOME:
        return "some", f"Forgot some: {moved}. Fewer steps or a lower learning rate forget less."
    return "much", f"Forgot much: {moved}. Fewer steps, a lower learning rate or a smaller rank forget less."


# ---- samples ------------------------------------------------------------------------------------------------------


def _samples_note(report: Report) -> str:
    if not report["metrics_after"]:
        which = "The first validation rows."
    elif report["metrics_rows"] <= len(report["samples"]):
        which = "All validation rows that were answered."
    else:
        which = "Not a random draw: first the rows that gained most, last those that gained least."
    return f"{which} Words are marked where the answer after training and the expected one differ."


def _sample(sample: Mapping[str, str]) -> dict[str, Any]:
    reference, before, after = sample["reference"], sample["before"], sample["after"]
    match = _match(after, reference)
    # the same content in another order is right: marking the order would look like a fault
    expected_parts, after_parts = _differences(reference, reference if match == "equal" else after)
    after_parts = [(after.strip(), False)] if match == "equal" else after_parts
    asked = sample["asked"].strip()
    return {
        "asked": asked,
        "is_long": len(asked) > LONG_QUESTION,
        "start": asked[: LONG_QUESTION // 2],
        "answers": [
            {"name": "Expected", "parts": expected_parts, "match": ""},
            {"name": "Before", "parts": [(before.strip(), False)], "match": _match(before, reference)},
            {"name": "After", "parts": after_parts, "match": match},
        ],
    }


def _match(answer: str, reference: str) -> str:
    """`same`, `equal` (the same JSON or tool call, written differently) or `differs`."""
    if answer.strip() == reference.strip():
        return "same"
    is_equal = tool_calls(answer, reference)["all arguments right"] or valid_json(answer, reference)["all fields right"]
    return "equal" if is_equal else "differs"


Parts = list[tuple[str, bool]]


def _differences(expected: str, written: str) -> tuple[Parts, Parts]:
    """Both texts cut into parts, each with whether it is missing in the other."""
    texts = (expected.strip(), written.strip())
    left, right = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in texts)
    if texts[0] == texts[1] or max(len(left), len(right)) > MOST_DIFF_TOKENS:
        return [(texts[0], False)], [(texts[1], False)]
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    if matcher.ratio() < LEAST_ALIKE:
        return [(texts[0], False)], [(texts[1], False)]
    parts: tuple[Parts, Parts] = ([], [])
    for kind, i, j, k, m in matcher.get_opcodes():
        for side, piece in zip(parts, ("".join(left[i:j]), "".join(right[k:m])), strict=True):
            if piece:
                side.append((piece, kind != "equal"))
    return parts


# ---- memory, commands, options --------------------------------------------------------------------------------------

PART_NAMES = {
    "process": "Python and its libraries",
    "weights": "frozen weights",
    "scratch": "decoded weights, logits and temporaries",
    "adapter": "adapter, gradients, optimiser",
    "activations": "activations kept",
}


def _memory(report: Report) -> dict[str, Any] | None:
    parts = {name: count for name, count in report["plan"].items() if name != "total" and _is_number(count)}
    planned, peak = report["plan"].get("total") or sum(parts.values()), report["peak_memory_bytes"]
    widest = max(planned, peak, 1)
    if not parts:
        return None
    return {
        "parts": [
            {"name": PART_NAMES.get(name, name), "size": _size(count), "width": _width(count / widest)}
            for name, count in parts.items()
        ],
        "planned": _size(planned),
        "peak": _size(peak or None),
        "peak_width": _width(peak / widest),
        "note": _memory_note(peak, planned),
    }


def _memory_note(peak: int, planned: int | None) -> str:
    if not peak or not planned:
        return "Not planned." if peak else "Not measured."
    change = peak / planned - 1
    if abs(change) < 0.005:
        return f"As planned ({_size(planned)})."
    return f"{_percent(abs(change))} {'above' if change > 0 else 'below'} the {_size(planned)} planned."


def _commands(report: Report) -> list[dict[str, str]]:
    """What to type next; every line can be pasted as it is."""
    config, out = report["config"], report["out"]
    base = f" --base {shlex.quote(config['base'])}" if config.get("base") else ""
    adapter = f"{base} --adapter {shlex.quote(out)}"
    config_file = shlex.quote(str(PurePath(out) / "config.yaml"))
    commands = [
        ("Talk to it", f"thimble chat{adapter}"),
        ("Measure it on rows it has not seen", f"thimble evaluate DATA.jsonl{adapter}"),
        ("Use it in Python, with PEFT", _python_lines(report)),
        ("Repeat this run", f"thimble train --config {config_file} --out another/folder"),
    ]
    if report["status"] == "interrupted" and config.get("checkpoint_every_steps"):
        commands.insert(0, ("Continue where it stopped", f"thimble train --config {config_file} --resume"))
    return [{"title": title, "text": text} for title, text in commands]


def _python_lines(report: Report) -> str:
    base = report["config"].get("base") or ""
    imports = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM"]
    lines, where = [], _quoted(base)
    if not base:  # the default base lies in a package, wherever pip has put it
        imports.insert(0, "from importlib.util import find_spec")
        lines = [f'folder = find_spec("{DEFAULT_PACKAGE}").submodule_search_locations[0]']
        where = f"folder, gguf_file={_quoted(report['base'])}"
    elif base.lower().endswith(".gguf"):
        where = f"{_quoted(str(PurePath(base).parent))}, gguf_file={_quoted(PurePath(base).name)}"
    adapter = _quoted(report["adapter"] or str(PurePath(report["out"]) / "adapter"))
    lines += [
        f"base = AutoModelForCausalLM.from_pretrained({where})",
        f"model = PeftModel.from_pretrained(base, {adapter})",
    ]
    return "\n".join([*imports, "", *lines])


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _options(config: Mapping[str, Any]) -> list[dict[str, str]]:
    known = options_of(TrainConfig)
    rows = []
    for name, value in config.items():
        metadata = known[name].metadata if name in known else {}
        shown = _size(value) if metadata.get("is_size") and _is_number(value) else _setting(value)
        rows.append({"name": name, "value": shown, "help": metadata.get("help", "")})
    return rows


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(map(_setting, value)) or NONE
    if isinstance(value, float):
        return f"{value:g}" if math.isfinite(value) else NONE
    return NONE if value is None or value == "" else str(value)


# ---- charts -------------------------------------------------------------------------------------------------------

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
CHARTS = {"loss": (660, 330), "loss-narrow": (340, 260), "rate": (330, 120), "norm": (330, 135)}  # in CSS pixels


def _charts(report: Report, steps: Steps) -> dict[str, Any] | None:
    """Charts as inline SVG by name, with what their captions need; None if there is no curve."""
    if sum(_is_number(row.get("loss")) for row in steps) < 2:
        return None
    at, losses = _column(steps, "step"), _column(steps, "loss")
    watched = [row for row in steps if _is_number(row.get("held_out_loss"))]
    on_the_way = _column(watched, "step"), _column(watched, "held_out_loss")
    kept = report.get("best_step") or report["steps"]

    def loss(axes: "Axes") -> None:
        _draw_loss(axes, at, losses, _validation_marks(report))
        axes.plot(*on_the_way, "o", color=WARM, markersize=4.5, fillstyle="none", clip_on=False, zorder=5)

    return {
        "loss": _draw("loss", loss),
        "loss_narrow": _draw("loss-narrow", loss),
        "rate": _draw("rate", lambda axes: _draw_line(axes, at, _column(steps, "learning_rate"))),
        "norm": _draw("norm", lambda axes: _draw_line(axes, at, _column(steps, "grad_norm"))),
        "held_out": [(word, _number(value)) for word, value in _validation_marks(report).items()],
        "on_the_way": bool(watched),
        "kept": kept if kept != report["steps"] else None,
        "is_smoothed": _is_smoothed(losses),
        "each": "each step" if _group_size(steps) == 1 else f"means of {_group_size(steps)} steps",
        "broken": [step for step, value in zip(at, losses, strict=True) if not _is_number(value)],
        "steps": plural(len(steps), "step"),
    }


def _column(steps: Steps, name: str) -> list[Any]:
    return [row.get(name) for row in steps]


def _validation_marks(report: Report) -> dict[str, float]:
    marks = {"before": _loss_before(report), "after": report["loss_after"]}
    return {word: value for word, value in marks.items() if _is_number(value)}


def _draw_loss(axes: "Axes", at: Sequence[int], losses: Sequence[Any], validation: Mapping[str, float]) -> None:
    _draw_line(axes, at, losses, alpha=0.45 if _is_smoothed(losses) else 1.0)
    if _is_smoothed(losses):
        axes.plot(_thinned(at), _smooth(_thinned(losses)), color=ACCENT, linewidth=2.4)
    for word, value in validation.items():
        axes.plot([at[-1] if word == "after" else 0], [value], "D", color=WARM, markersize=7, clip_on=False, zorder=5)
    for step, value in zip(at, losses, strict=True):
        if not _is_number(value):
            axes.axvline(step, color=BAD, linewidth=1.5, linestyle=(0, (3, 3)))
    axes.set_xlabel("step")


def _draw_line(axes: "Axes", at: Sequence[int], values: Sequence[Any], alpha: float = 1) -> None:
    x, y = _thinned(at), _thinned(values)
    axes.plot(x, y, color=ACCENT, linewidth=1.4, alpha=alpha)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if _has_spike(y):
        known = [value for value in y if _is_number(value)]
        axes.set_yscale("log", subs=[2, 5] if max(known) < 100 * min(known) else [])  # more labels would collide
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(0, at[-1])


def _has_spike(values: Sequence[Any]) -> bool:
    known = [value for value in values if _is_number(value)]
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
    smooth = []
    for at in range(len(values)):
        reach = min(most, at, last - at)
        smooth.append(_mean(values[at - reach : at + reach + 1]))
    return smooth


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if _is_number(value)]
    return sum(known) / len(known) if known else math.nan


def _draw(name: str, draw: "Callable[[Axes], None]") -> str:
    """One chart as an SVG element that takes its colours and fonts from the page."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own matplotlibrc must not change the page
        matplotlib.rcParams.update(CHART_STYLE)
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
    head = rf'<svg class="chart {name}" \1 aria-hidden="true">'  # its caption and the figures above tell the same
    text = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', head, text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text).replace("xlink:href", "href")
    for stand_in, colour in PAGE_COLOURS.items():
        text = text.replace(stand_in, f"var(--{colour})")
    # a hundredth of a pixel is enough, and half the size; text between tags is left alone
    text = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), text)
    return re.sub(r"\s*\n\s*", "\n", text)
