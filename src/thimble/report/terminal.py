"""Progress and reports as text in a terminal, and reports as JSON for programs; decides nothing."""

import json
import math
import textwrap
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from thimble.errors import as_word, escaped, plural
from thimble.events import Event
from thimble.report import formatting
from thimble.report.formatting import NONE, THIN, clip, clock, is_number, number, small_percent, table
from thimble.report.keys import to_json_dict
from thimble.report.label_tables import confusion_rows, label_rows, summary
from thimble.report.streams import FALLBACK_COLUMNS, columns, is_terminal, say
from thimble.report.words import FRAMES, is_text, speed, words_of

REFRESH_SECONDS = 0.2  # of the moving line in a terminal
LOG_SECONDS = 10.0  # between lines in a pipe or file
SHOWN_SAMPLES, MOST_SAMPLES = 3, 8  # more of them where there are more labels
MOST_LABELS, MOST_CONFUSED = 12, 8
MARKS = {"decision": "  ", "note": "  ", "warning": "warning: ", "request": "  "}

_size = partial(formatting.size, space=" ")


class Progress:
    """Writes events as they come: a moving line in a terminal, a line now and then elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._is_terminal = stream, is_terminal(stream)
        self._last, self._has_line = 0.0, False

    def on_event(self, event: Event) -> None:
        """Write what is worth writing."""
        if event.kind in MARKS:
            self._line(MARKS[event.kind] + event.text)
        elif event.kind == "stage":
            self._line(event.text)
            self._last = time.monotonic()
        elif event.kind == "progress":
            self._moving(f"  {event.text} {event.data['done']} of {event.data['total']}")
        elif event.kind == "step":
            self._moving(_step_line(event.data), is_forced=event.data["step"] in (1, event.data["total"]))

    def on_warning(self, event: Event) -> None:
        """Write warnings alone."""
        if event.kind == "warning":
            self.on_event(event)

    def _line(self, text: str) -> None:
        self.end()
        say(escaped(text, kept="\n"), self._stream)

    def _moving(self, text: str, is_forced: bool = False) -> None:
        wait = REFRESH_SECONDS if self._is_terminal else LOG_SECONDS
        if not is_forced and time.monotonic() - self._last < wait:
            return
        self._last = time.monotonic()
        if self._is_terminal:
            width = columns(self._stream) or FALLBACK_COLUMNS
            say(f"\r\x1b[K{text[: width - 1]}", self._stream, end="")
            self._has_line = True
        else:
            say(text, self._stream)

    def end(self) -> None:
        """Leave the moving line."""
        if self._has_line:
            say("", self._stream)
        self._has_line = False


def _table(rows: Sequence[Sequence[str]]) -> str:
    return table(rows, columns())


def _clip(text: str, name_width: int = 8) -> str:
    return clip(text, max(20, (columns() or FALLBACK_COLUMNS) - name_width - 6))


def _step_line(row: Mapping[str, Any]) -> str:
    of = f"/{row['total']}" if row["total"] else ""
    seconds = row["seconds"] or math.inf
    rows, costs = row.get("rows_so_far", 0) / seconds, row["tokens_so_far"] / seconds
    rate = speed(row.get("counted", "tokens"), rows, row.get("unit", "tokens"), costs)
    left = f", {clock(row['seconds_left'])} left" if row.get("seconds_left") is not None else ""
    memory = _size(row["peak_memory_bytes"])
    return f"  step {row['step']}{of}  loss {row['loss']:.3f}  {rate}{left}, {memory}"


def to_json(report: Any) -> str:
    """A report as one line of JSON in ASCII, the only thing that `--json` prints on stdout."""
    return json.dumps(to_json_dict(report))


def render_train(report: Any) -> str:
    """The end of a training run in one screen."""
    rows: list[tuple[str, ...]] = [("", "head alone" if words_of(vars(report)).has_head else "before", "after")]
    compared, labels = vars(report).get("metric_comparisons") or {}, vars(report).get("labels") or {}
    for name in {**report.metrics_before, **report.metrics_after}:
        counts = [compared.get(name, {}).get(side, report.metrics_rows) for side in ("rows_before", "rows_after")]
        values = (report.metrics_before.get(name), report.metrics_after.get(name))
        rows.append((name, *(_share(name, value, count) for value, count in zip(values, counts, strict=True))))
    rows.append(("validation loss", number(report.loss_before), number(report.loss_after)))
    values = vars(report)
    if is_text(values):
        rows.append(("general text loss (forgetting)", number(report.general_before), number(report.general_after)))
    if same := vars(report).get("divergence", {}).get("same"):
        rows.append(("goes on as the base, in its own texts", NONE, formatting.percent(same, space="")))
    parts = [_table(rows), *_label_parts(labels.get("after"), labels.get("training_rows", {}))]
    shown = min(len(labels.get("training_rows", ())), MOST_SAMPLES)  # some of every label
    for sample in report.samples[: max(SHOWN_SAMPLES, shown)]:
        parts.append("\n".join(f"  {name:>8}: {_clip(sample[key])}" for name, key in _SAMPLE_LINES))
    fast = f"{_speed_of(report)}, {_size(report.peak_memory_bytes)}"
    state = "" if report.status == "done" else f"{report.status}: "
    took = f"{report.steps} steps in {clock(report.seconds)} ({fast}), {clock(report.total_seconds)} in all"
    places = f"adapter  {escaped(report.adapter)}\nreport   {escaped(report.out)}/report.html"
    out = as_word(report.out)
    resume = f"go on    thimble train --out {out} --resume\n" if report.status == "interrupted" else ""
    verdict = [verdict_text(vars(report)["verdict"])] if vars(report).get("verdict") else []
    use = f"thimble chat --adapter {out}"
    use = use if is_text(values) else f"thimble generate DATA --adapter {out} --out answers.jsonl"
    return "\n\n".join([*parts, *verdict, state + took, f"{places}\n{resume}try it   {use}"])


def _speed_of(report: Any) -> str:
    """The speed of a run or a plan; reports of older releases count no rows."""
    values = vars(report)
    counted = "tokens" if is_text(values) else words_of(values).rows
    rows, unit = values.get("rows_per_second") or 0.0, values.get("unit") or "tokens"
    return speed(counted, rows, unit, report.tokens_per_second)


_SAMPLE_LINES = (("asked", "asked"), ("expected", "reference"), ("before", "before"), ("after", "after"))


def _share(name: str, value: float | None, rows: int) -> str:
    """A figure over answers: a count where answers are right or wrong, a share as percent, anything else as it is."""
    if value is None or not rows:
        return NONE
    from thimble.report.verdict import figure, may_be_count  # brings numpy, which --help does without

    if not may_be_count(name, value):
        return f"{figure(name, value).replace(THIN, '')} (mean of {rows})"
    return f"{value * rows:.0f}/{rows} ({formatting.percent(value, space='')})"


def verdict_text(verdict: Mapping[str, Any]) -> str:
    """The verdict with its cautions, as they stand in the report."""
    width = columns() or FALLBACK_COLUMNS
    paragraphs = [("  ", f"{verdict['word']}. {verdict['text']}")]
    paragraphs += [("  ! ", caution) for caution in verdict.get("cautions", ())]
    wrapped = [
        textwrap.fill(escaped(text.replace(THIN, " ")), width, initial_indent=mark, subsequent_indent=" " * len(mark))
        for mark, text in paragraphs
    ]
    return "\n".join(["did it work?", *wrapped])


def _label_parts(scores: Mapping[str, Any] | None, training_rows: Mapping[str, int]) -> list[str]:
    """Labels in a few tables, if answers are labels."""
    if not scores:
        return []
    labels = _table(label_rows(scores, training_rows, MOST_LABELS))
    confusion = _table(confusion_rows(scores, MOST_CONFUSED))
    return [f"  {escaped(summary(scores))}", labels, confusion]


def render_evaluate(report: Any) -> str:
    """All models side by side."""
    names = list(dict.fromkeys(name for result in report.results for name in result.scores))
    rows: list[tuple[str, ...]] = [("", *(escaped(result.name) for result in report.results))]
    rows.append(("loss", *(number(result.loss) for result in report.results)))
    rows.append(("perplexity", *(number(result.perplexity, 2) for result in report.results)))
    for name in names:
        rows.append(
            (name, *(_share(name, result.scores.get(name), result.counts.get(name, 0)) for result in report.results))
        )
    parts = [_table(rows)]
    for result in report.results:
        if result.labels:
            parts.append("\n\n".join([escaped(result.name), *_label_parts(result.labels, {})]))
    parts += [_against_base(result) for result in report.results if result.loss_comparison]
    answers = [result.answers for result in report.results]
    models = _short_names([result.name for result in report.results])
    width = max(8, *map(len, models))
    for shown in zip(*answers, strict=False):
        lines = [("asked", shown[0]["asked"]), ("expected", shown[0]["reference"])]
        lines += [(name, answer["written"]) for name, answer in zip(models, shown, strict=True)]
        parts.append("\n".join(f"  {name:>{width}}: {_clip(text, width)}" for name, text in lines))
    return "\n\n".join(parts)


def _short_names(names: Sequence[str]) -> list[str]:
    """Names by their last part, where that tells them apart."""
    ends = [Path(name).name for name in names]
    return [escaped(end if ends.count(end) == 1 else name) for end, name in zip(ends, names, strict=True)]


def _against_base(result: Any) -> str:
    """Whether an adapter differs from the base by more than chance, row by row."""
    lines = [f"{escaped(result.name)}, against the base row by row:"]
    for name, found in {"loss": result.loss_comparison, **result.metric_comparisons}.items():
        counts = f"better on {found['better']}, worse on {found['worse']} of {found['rows']} rows"
        low, high = found.get("low"), found.get("high")
        within = f", by {low:+.3f} to {high:+.3f} (95% interval)" if is_number(low) and is_number(high) else ""
        lines.append(f"  {escaped(name)}: {counts}{within}; {_by_chance(found)}")
    return "\n".join(lines)


def _by_chance(found: Mapping[str, Any]) -> str:
    """How often chance alone would bring a difference like this."""
    from thimble.core.significance import LEAST_ROWS  # brings numpy, which --help does without

    if found["rows"] < LEAST_ROWS:
        return f"too few to tell (at least {LEAST_ROWS})"
    chance = 2 * min(found["chance"], found["chance_worse"])  # of a difference as large to either side
    often = "less than 0.1%" if chance < 0.001 else f"{chance:.1%}"
    return f"chance alone would do this in {often} of cases" if chance < 0.5 else "no difference"


def render_generate(report: Any) -> str:
    """How many rows were answered, the first of them, and where they are."""
    parts = []
    for sample in report.samples:
        if "answer" not in sample:  # what a model that does not write says of a file
            parts.append("\n".join(f"  {name:>11}: {_clip(_shown(value), 11)}" for name, value in sample.items()))
            continue
        asked = sample.get("prompt") or sample.get("text") or sample["messages"][-1]["content"]
        lines = [("asked", asked), ("expected", sample.get("reference")), ("answer", sample["answer"])]
        parts.append("\n".join(f"  {name:>8}: {_clip(text)}" for name, text in lines if text is not None))
    counts = [f"{report.answered:,} of {report.rows:,} rows answered"]
    counts += [f"{report.answered_before:,} of them before"] * bool(report.answered_before)
    counts += [f"{report.unanswered:,} cannot be"] * bool(report.unanswered)
    counts += [f"{plural(report.length_limited, 'answer')} cut off by the length"] * bool(report.length_limited)
    speed = f"{report.completion_tokens:,} tokens in {clock(report.seconds)}, {report.tokens_per_second:,.0f} tokens/s"
    speed = speed if report.completion_tokens else clock(report.seconds)
    state = ", ".join(counts) + (f" ({speed})" if report.seconds else "")
    places = [f"answers  {report.out}", *([f"go on    {report.go_on}"] if report.go_on else [])]
    state = state if report.status == "done" else f"{report.status}: {state}"
    return "\n\n".join([*parts, state, "\n".join(places)])


def _shown(value: Any) -> str:
    """A value of a line; of many numbers the largest."""
    if isinstance(value, Mapping):
        best = sorted(value.items(), key=lambda pair: -pair[1])
        return ", ".join(f"{name} {share:.1%}" for name, share in best[:SHOWN_SAMPLES])
    return str(value)


def render_serve(report: Any) -> str:
    """How many requests a server had, and what it wrote."""
    refused = f", {report.refused:,} of them refused" if report.refused else ""
    tokens = f"{report.prompt_tokens:,} tokens read, {report.completion_tokens:,} written"
    return f"served {plural(report.requests, 'request')}{refused} in {clock(report.seconds)}: {tokens}"


def render_merge(report: Any) -> str:
    """What was merged, kind by kind, and what it cost."""
    if report.status != "done":
        return f"{report.status}: nothing was written"
    is_adapter, total = report.wrote == "adapter", report.kinds[-1]
    rows = [_MERGE_HEADS[report.wrote], *(_kind_row(kind, is_adapter) for kind in report.kinds)]
    what, option = ("cut off in all", "--adapter") if is_adapter else ("lost by rounding in all", "--base")
    worst = f"most in {total.worst_layer}: {small_percent(total.worst_error)}"
    cost = f"{small_percent(total.error)} of the update {what}; {worst}"
    if report.original:
        cost = f"the weights of {escaped(report.original)} again, bit for bit"
    base = f"--base {as_word(report.needs_base)} " if report.needs_base else ""
    use = f"{report.wrote:<8} {escaped(report.out)}\n"
    if report.loader in ("AutoModelForCausalLM", ""):
        use += f"try it   thimble chat {base}{option} {as_word(report.out)}"
    else:
        use += f"open it  with {report.loader}, in Python"
    return "\n\n".join([_table(rows), cost, use])


def render_export(report: Any) -> str:
    """What was written, and what the proof found."""
    what = f"{report.type}, " if report.type else ""
    lines = [f"wrote    {report.out} ({what}{_size(report.size_bytes)}, {plural(report.layers, 'adapted layer')})"]
    if report.weights:
        found = report.weights
        kept = f", and {found['kept_update']:.3f} of the update is there" if report.layers else ""
        lines.append(
            f"checked  {found['tensors']} tensors read again: their blocks are those that were to be written; rounding "
            f"changed none by more than {small_percent(found['worst_rounding'])}{kept}"
        )
    if report.proof:
        lines += _proof_lines(report.proof, is_whole=bool(report.weights))
    if report.modelfile:
        lines.append(f"beside   {report.modelfile} for Ollama (untested)")
    return "\n".join(lines)


def _proof_lines(found: Mapping[str, Any], is_whole: bool) -> list[str]:
    """The proof in one line, and its figures in another."""
    effect = f"the adapter's effect there is {found['effect_there']:.3f} times what it is here"
    on = f"proved   in {found['runtime']}, on {found['positions']} tokens of {found['rows']} rows: "
    if not is_whole:
        return [
            on + effect,
            f"         log-probabilities differ by {found['adapter_difference']:.5f} nats with it, by "
            f"{found['base_difference']:.5f} without (effect {found['effect']:.3f})",
        ]
    return [
        on + (effect if found["effect"] else "it computes what is in the file"),
        f"         log-probabilities differ by {found['runtime_difference']:.5f} nats from the same file here, by "
        f"{found['rounding_difference']:.5f} by rounding (effect {found['effect']:.3f}, KL divergence "
        f"{found['divergence']:.5f})",
        f"         loss {found['loss_base']:.4f} of the bare base, {found['loss_before_rounding']:.4f} of base and "
        f"adapter, {found['loss_there']:.4f} of the file there",
    ]


_MERGE_HEADS = {
    "adapter": ("", "layers", "rank", "now", "parameters", "now", "MB", "now", "error", "worst"),
    "base": ("", "layers", "rank", "rounding", "worst"),
}


def _kind_row(kind: Any, is_adapter: bool) -> tuple[str, ...]:
    smaller = (
        _span(kind.rank_after), f"{kind.parameters_before:,}", f"{kind.parameters_after:,}",
        f"{kind.bytes_before / 1e6:.2f}", f"{kind.bytes_after / 1e6:.2f}",
    ) if is_adapter else ()  # fmt: skip
    errors = small_percent(kind.error), small_percent(kind.worst_error)
    return (kind.kind, f"{kind.layers}", _span(kind.rank_before), *smaller, *errors)


def _span(ends: list[int]) -> str:
    return f"{ends[0]}" if ends[0] == ends[1] else f"{ends[0]}-{ends[1]}"


def _heard(report: Any) -> str:
    """How long the clips of a plan are, or how many tokens its texts have; nothing of pictures, which are all alike."""
    if report.unit == FRAMES:
        return f", {clock(report.tokens_per_epoch / 100)} of sound"
    return f", {report.tokens_per_epoch:,} tokens" if report.unit == "tokens" else ""


def render_plan(report: Any) -> str:
    """A plan in a few lines."""
    share = report.adapter_parameters / report.base_parameters
    tokens = f"{report.tokens_per_epoch:,} tokens, {report.target_tokens_per_epoch:,} of them target tokens"
    parts = ", ".join(f"{name} {size / 1e6:.0f}" for name, size in report.memory.items() if name != "total")
    steps = f" for {report.steps:,} steps" if report.steps else ""
    rows = [
        ("machine", _machine(report.machine)),
        ("base", report.base),
        ("adapter", f"{formatting.amount(report.adapter_parameters)} parameters ({share:.1%} of the base)"),
        (
            "data",
            f"{report.rows:,} rows, {tokens}; longest row {report.longest_row_tokens:,}"
            if is_text(vars(report))
            else f"{report.task}: {report.rows:,} {words_of(vars(report)).rows}{_heard(report)}",
        ),
        ("memory", f"{_size(report.memory['total'])} of {_size(report.available_bytes)} free"),
        ("", f"MB: {parts}"),
        ("speed", f"{_speed_of(report)}, {report.seconds_per_step:.2f} s a step"),
        ("time", f"{report.seconds_total / 60:.1f} minutes{steps}"),
    ]
    for other in report.alternatives:
        faster = report.seconds_per_step / other.seconds_per_step
        rows.append(("or", f"{other.change}: {_size(other.memory_bytes)}, {faster:.2f} times the speed"))
    return "\n".join(f"{name:>8}  {text}" for name, text in rows)


def _machine(machine: Mapping[str, Any]) -> str:
    rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in machine["flops"].items())
    disk = f", disk {machine['disk_bytes'] / 1e9:.1f} GB/s" if "disk_bytes" in machine else "; an estimate"
    cores = "" if machine.get("is_estimate") else f", {machine['cores']} cores"
    return f"{machine['name']}{cores}; G operations/s: {rates}; memory {machine['copy_bytes'] / 1e9:.0f} GB/s{disk}"
