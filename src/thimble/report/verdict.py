"""What may be claimed of a run: whether it worked and what was forgotten, by rules that stand next to their limits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thimble.core.metrics import ERROR_RATES, WEAK_RATIO, goodness
from thimble.core.significance import CHANCE, LEAST_ROWS, LOSS_CHANCE, Paired, fisher, is_clear, wilson
from thimble.errors import plural
from thimble.report.forgetting import MOST, forgetting, general_rise
from thimble.report.formatting import THIN, is_number, number, percent
from thimble.report.words import is_text, words_of

Report = Mapping[str, Any]
Steps = Sequence[Mapping[str, Any]]

# The metric that decides, if there is one.
STRICTEST = ("all arguments right", "all fields right", "accuracy", "CER", "exact match")
# Means of what is not right-or-wrong: never shown as a count of rows.
SHARES = ("fields right", "MRR", "Spearman", *ERROR_RATES)
GOOD_SHARE, HALF_SHARE = 0.9, 0.5  # of rows or letters right after training: "yes", "mostly", below that "partly"
LOSS_MARGIN_NATS = 0.01  # a smaller change of the validation loss is called none
RECALL_SHARE = 0.25  # of the fall on training rows: less on validation rows is rather recall than learning


@dataclass(frozen=True)
class Verdict:
    """The answer to "did it work?"."""

    tone: str  # `good`, `mixed`, `bad`, or `unknown`, which is shown without a colour
    word: str  # one or two words
    text: str  # a few sentences
    cautions: tuple[str, ...] = ()  # what the words above do not cover, a sentence or two each


def judge(report: Report, steps: Steps) -> Verdict:
    """Say whether a run worked, claiming nothing that was not measured; any value may be missing, NaN or Inf."""
    if report["status"] == "diverged":
        return Verdict("bad", "No", f"{_why_diverged(report, steps)}")
    if not report["steps"]:
        return Verdict("unknown", "Nothing was trained", "No step was taken, so the adapter changes nothing.")
    key = _key_metric(report)
    if not key and not is_number(report["loss_after"]):
        return Verdict("unknown", "Not measured", _why_unmeasured(report, steps), _cautions(report))
    tries = _tries(report, steps, not key)
    verdict = _by_metric(report, key, tries) if key else _by_loss(report, tries)
    tone, word, text = verdict.tone, verdict.word, verdict.text
    forgotten = forgetting(report)[0]
    if forgotten in ("some", "much"):
        tone = "mixed" if forgotten == "much" and tone == "good" else tone
        word = f"{word}, but it forgot much" if general_rise(report) >= MOST and tone == "mixed" else word
        text = f"{text} It forgot {forgotten} of its general knowledge."
    if not key and _is_weak(report) and tone == "good":
        tone = "mixed"  # what is predicted better may still be gibberish
    return Verdict(tone, word, text, _cautions(report))


def _tries(report: Report, steps: Steps, is_by_loss: bool) -> int:
    """Among how many states of the adapter the result was chosen by validation rows: each is a chance of its own.

    Levels of chance are divided by it (Bonferroni). Where an earlier step is kept, it was chosen among all that were
    measured; where the last one is, the loss on these rows still chose between two, it and the best before it, while
    answers had no part in that. Rows that were set apart and choose nothing need no such care.
    """
    if report.get("untouched_rows"):
        return 1
    if report.get("best_step") in (None, 0, report["steps"]):
        return 2 if is_by_loss and any("held_out_loss" in row for row in steps) else 1
    return 1 + sum("held_out_loss" in row for row in steps)


# ---- cautions -----------------------------------------------------------------------------------------------------


def _cautions(report: Report) -> tuple[str, ...]:
    """What a reader of the verdict must know with it."""
    rules = (_lost, _forgot_much, _weak_language, _known, _few_texts, _recall, _no_better_than_one)
    return tuple(text for text in (rule(report) for rule in rules) if text)


def _lost(report: Report) -> str:
    """Transcripts that are no transcripts: a recogniser that is lost says nothing, or the same again and again."""
    details = report.get("task_details") or {}
    counts = {
        "empty": details.get("empty"), "in circles, the same words again and again": details.get("in circles"),
        "cut off at --max-new-tokens": details.get("cut off"),
    }  # fmt: skip
    found = [f"{count:,} {what}" for what, count in counts.items() if count]
    return f"Among the texts written after training: {'; '.join(found)}." if found else ""


def _forgot_much(report: Report) -> str:
    word, sentence = forgetting(report)
    return sentence if word in ("some", "much", "unclear") else ""


def _few_texts(report: Report) -> str:
    """Whether the rows compared are pieces of a few texts, so that they say little of others."""
    compared = report.get("loss_comparison") or {}
    texts = compared.get("groups", 0)
    if not 0 < texts < LEAST_ROWS:
        return ""
    return (
        f"The {plural(compared['rows'], 'row')} compared one by one are pieces of {plural(texts, 'text')}: what they "
        "show holds for more of the same, and need not for other texts."
    )


def _is_weak(report: Report) -> bool:
    return bool(report.get("token_ratio", 0.0) >= WEAK_RATIO)


def _weak_language(report: Report) -> str:
    if not _is_weak(report):
        return ""
    return (
        f"The base hardly knows this language: its words take {number(report['token_ratio'], 1)} times the tokens of "
        "English ones. A lower loss does not make its sentences right: read some answers, or take a base made for the "
        "language."
    )


def _known(report: Report) -> str:
    known, rows = report.get("known_rows", 0), report.get("validation_rows", 0)
    if not known:
        return ""
    return (
        f"{known:,} of {plural(rows, 'validation row')} {'is' if known == 1 else 'are'} also among the training rows: "
        "doing well there shows memory, and nothing is concluded from them."
    )


def _recall(report: Report) -> str:
    """Whether the training rows were learned by heart rather than what they have in common with others."""
    before, after = report.get("loss_train_before"), report.get("loss_train_after")
    values = (before, after, loss_before(report), report["loss_after"])
    compared = report.get("loss_comparison") or {}
    if not all(map(is_number, values)) or compared.get("rows", LEAST_ROWS) < LEAST_ROWS:
        return ""
    train, valid = before - after, loss_before(report) - report["loss_after"]
    if train < 10 * LOSS_MARGIN_NATS or valid > RECALL_SHARE * train:
        return ""
    change = f"went from {number(values[2])} to {number(values[3])}"
    return (
        f"It mostly learned the training rows by heart: there the loss fell from {number(before)} to {number(after)}; "
        f"on validation rows it {change}."
    )


def _no_better_than_one(report: Report) -> str:
    """Whether labels are found no better than by always writing the most frequent one."""
    scores = (report.get("labels") or {}).get("after") or {}
    if not scores or scores["baseline_chance"] <= CHANCE:
        return ""
    return (
        f"Always writing “{scores['majority']}” would be right in {percent(scores['baseline'])} of these rows; the "
        f"accuracy of {percent(scores['accuracy'])} is not clearly above that."
    )


def _why_diverged(report: Report, steps: Steps) -> str:
    row = steps[-1] if steps else {}
    if not is_number(row.get("loss")):
        what = "the loss was NaN or Inf"
    elif not is_number(row.get("grad_norm")):
        what = "the gradient was NaN or Inf"
    else:
        first = next(step["loss"] for step in steps if is_number(step["loss"]))
        what = f"the loss had risen from {number(first, 2)} to {number(row['loss'], 2)}"
    return (
        f"Training diverged at step {report['steps']}: {what}. The adapter holds the last good state from before that; "
        "its quality was not measured. A learning rate ten times smaller usually helps."
    )


def _why_unmeasured(report: Report, steps: Steps) -> str:
    losses = [row["loss"] for row in steps if is_number(row.get("loss"))]
    curve = ""
    if len(losses) > 1:
        tail = losses[-max(1, len(losses) // 10) :]
        curve = (
            f" On the training rows the loss went from {number(losses[0], 2)} to about "
            f"{number(sum(tail) / len(tail), 2)}, which does not show how it does on rows it has not seen."
        )
    if report["status"] == "interrupted":
        return f"The run was stopped before the result was measured; what was learned until then is kept.{curve}"
    return f"There are no validation rows, so nothing to judge by.{curve} Hold some out with --valid-split 0.1."


# ---- by metrics ---------------------------------------------------------------------------------------------------


def _key_metric(report: Report) -> str:
    """The metric that decides, if it was measured before and after."""
    before, after = report["metrics_before"], report["metrics_after"]
    names = [*STRICTEST, *before] if report["metrics_rows"] else []
    known = [name for name in names if is_number(before.get(name)) and is_number(after.get(name))]
    return known[0] if known else ""


def _by_metric(report: Report, key: str, tries: int) -> Verdict:
    before, after = report["metrics_before"][key], report["metrics_after"][key]
    on, loss = f"On {plural(rows_of(report, key), 'validation row')}", _loss_sentence(report)
    change = f"“{key}” went from {score(report, key, before)} to {score(report, key, after)}{_within(report, key)}"
    compared = (report.get("metric_comparisons") or {}).get(key, {}).get("rows", report["metrics_rows"])
    if compared < LEAST_ROWS:
        return _too_few(compared, f"{on}, {change}. {loss}")
    if _is_clear(report, key, "chance_worse", tries):
        return Verdict("bad", "No", f"It got worse. {on}, {change}. {loss}")
    if _is_clear(report, key, "chance", tries):
        good = goodness(key, after)
        word = "Yes" if good >= GOOD_SHARE else "Mostly" if good >= HALF_SHARE else "Partly"
        word = "Partly" if key == "accuracy" and _no_better_than_one(report) else word
        return Verdict("mixed" if word == "Partly" else "good", word, f"{on}, {change}{_left(report, key)}. {loss}")
    if goodness(key, before) >= GOOD_SHARE:
        text = f"{_capital(words_of(report).before)} was good at it: {on.lower()}, {change}. {loss}"
        return Verdict("unknown", "There was little to learn", text)
    others = [name for name in report["metrics_before"] if name != key]
    risen = [name for name in others if _is_clear(report, name, "chance", tries * len(others))]
    if risen:
        verb = "improved" if set(risen) & set(ERROR_RATES) else "rose"
        names = " and ".join(f"“{name}”" for name in risen)
        return Verdict("mixed", "Partly", f"{on}, {names} clearly {verb}, but {change}. {loss}")
    if goodness(key, after) > goodness(key, before):
        return Verdict("mixed", "Unclear", f"{on}, {change}. A difference this small may be chance. {loss}")
    brought = "LoRA brought nothing over a head on the frozen model" if words_of(report).has_head else ""
    return Verdict("bad", "No", f"{brought or 'The answers are no better'}. {on}, {change}. {loss}")


def _within(report: Report, key: str) -> str:
    """The 95 % interval of the change of a metric, if rows were compared."""
    compared, values = (report.get("metric_comparisons") or {}).get(key, {}), report["metrics_after"]
    low, high = compared.get("low"), compared.get("high")
    if not is_number(low) or not is_number(high):
        return ""
    if key not in ERROR_RATES and not 0 <= values[key] <= 1:
        return f" (95 % interval of the change: {low:+.3g} to {high:+.3g})"
    return f" (95 % interval of the change: {low * 100:+.0f} to {high * 100:+.0f} points of a hundred)"


def _left(report: Report, key: str) -> str:
    """How many rows are still wrong, if the metric counts rows."""
    rows = rows_of(report, key)
    wrong = rows - round(report["metrics_after"][key] * rows)
    return f"; {wrong:,} {'is' if wrong == 1 else 'are'} still not right" if wrong and is_count(report, key) else ""


def score(report: Report, name: str, share: float) -> str:
    """A metric as a count of rows if it is one, else as percent; what is no share as it is."""
    if is_count(report, name):
        return f"{round(share * rows_of(report, name)):,}"
    return figure(name, share)


def may_be_count(name: str, value: float) -> bool:
    """Whether a mean may be that of right-or-wrong."""
    return 0 <= value <= 1 and name not in SHARES


def figure(name: str, value: float) -> str:
    """A metric as percent if it is a share; what is none as it is."""
    if name in ERROR_RATES:
        return f"{value * 100:.1f}{THIN}%"
    return percent(value) if 0 <= value <= 1 else number(value)


def rows_of(report: Report, name: str) -> int:
    """Answers that have a metric: all, unless a metric of the user's own left some out."""
    found = (report.get("metric_comparisons") or {}).get(name, {})
    return int(found.get("rows_after") or report["metrics_rows"])


def is_count(report: Report, name: str) -> bool:
    """Whether a metric is the mean of right-or-wrong, so that it can be shown as so many of so many rows."""
    rows, compared = rows_of(report, name), (report.get("metric_comparisons") or {}).get(name, {})
    if compared.get("rows_before", rows) != rows:
        return False
    shares = [metrics[name] for metrics in (report["metrics_before"], report["metrics_after"]) if name in metrics]
    counts = [share * rows if is_number(share) else math.nan for share in shares]
    return name not in SHARES and all(0 <= count <= rows and abs(count - round(count)) < 1e-6 for count in counts)


def _is_clear(report: Report, name: str, side: str, tries: int) -> bool:
    """Whether chance alone would hardly bring this rise (`chance`) or fall (`chance_worse`), row by row.

    A report of an older release does not know which rows rose: there the counts are compared.
    """
    compared = (report.get("metric_comparisons") or {}).get(name)
    before, after = report["metrics_before"][name], report["metrics_after"].get(name)
    if not is_number(before) or not is_number(after):
        return False
    if (goodness(name, after) > goodness(name, before)) != (side == "chance"):
        return False
    if compared:
        return bool(compared["rows"] >= LEAST_ROWS and compared[side] <= CHANCE / tries)
    rows = report["metrics_rows"]
    low, high = sorted((round(before * rows), round(after * rows)))
    return fisher(low, high, rows) < CHANCE / tries


def _too_few(rows: int, sentence: str) -> Verdict:
    text = f"{plural(rows, 'new validation row')} cannot tell a gain from chance; {LEAST_ROWS} are the least."
    return Verdict("unknown", "Too few rows to tell", f"{text} {sentence}")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def interval(share: float, rows: int) -> str:
    """Wilson's 95 % interval: between which values the metric would lie on very many rows of the same kind."""
    low, high = wilson(share, rows)
    return f"{low * 100:.0f}–{high * 100:.0f}{THIN}%"


# ---- by loss ------------------------------------------------------------------------------------------------------


def _by_loss(report: Report, tries: int) -> Verdict:
    change, sentence = report["loss_after"] - loss_before(report), _loss_sentence(report)
    if not is_number(change):
        return Verdict(
            "unknown", "Unclear", "The validation loss was only measured after training: nothing to compare."
        )
    if compared := report.get("loss_comparison"):  # reports of an older release have none
        paired = Paired(**compared)
        if paired.rows < LEAST_ROWS:
            return _too_few(paired.rows, sentence)
        is_up = change > 0
        tested = Paired(paired.rows, paired.worse, paired.better, -paired.t, paired.chance_worse, paired.chance)
        if abs(change) > LOSS_MARGIN_NATS and not is_clear(tested if is_up else paired, LOSS_CHANCE / tries):
            return Verdict("mixed", "Unclear", f"{sentence} {_rows_apart(paired)}: a change like this may be chance.")
    if change < -LOSS_MARGIN_NATS:
        text = f"It predicts unseen rows better than {words_of(report).before} did"
        text += "; whether it answers better, only its answers can show." if is_text(report) else "."
        return Verdict("good", "Yes, by the loss", f"{sentence} {text}")
    if change > LOSS_MARGIN_NATS:
        return Verdict("bad", "No", f"{sentence} It fits the training rows and does not generalise.")
    return Verdict("mixed", "No change", sentence)


def _rows_apart(paired: Paired) -> str:
    unit = "text" if paired.groups >= LEAST_ROWS else "row"
    return f"Of {plural(paired.rows, unit)} compared one by one, {paired.better:,} fell and {paired.worse:,} rose"


def _loss_sentence(report: Report) -> str:
    before, after = loss_before(report), report["loss_after"]
    if not (is_number(before) and is_number(after)):
        return ""
    change = after - before
    verb = "fell" if change < -LOSS_MARGIN_NATS else "rose" if change > LOSS_MARGIN_NATS else "hardly changed,"
    compared = report.get("loss_comparison") or {}
    low, high = compared.get("low"), compared.get("high")
    within = (
        f" (95 % interval of the change: {-high:+.3f} to {-low:+.3f})" if is_number(low) and is_number(high) else ""
    )
    return f"The validation loss {verb} from {number(before)} to {number(after)}{within}."


def loss_before(report: Report) -> Any:
    """The validation loss to compare with: that of the bare base, or with the adapter before step 1."""
    return report["loss_base"] if is_number(report["loss_base"]) else report["loss_before"]
