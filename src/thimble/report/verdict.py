"""What may be claimed of a run: whether it worked and what was forgotten, by rules that stand next to their limits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thimble.errors import plural
from thimble.report.formatting import THIN, is_number, number, percent

Report = Mapping[str, Any]
Steps = Sequence[Mapping[str, Any]]

STRICTEST = ("all arguments right", "all fields right", "exact match")  # the metric that decides, if there is one
SHARES = ("fields right",)  # means of shares, not of right-or-wrong: never shown as a count of rows
CHANCE = 0.025  # a change of counts is called clear if chance alone would bring it less often than this
GOOD_SHARE, HALF_SHARE = 0.9, 0.5  # of rows right after training: "yes", "mostly", below that "partly"
LOSS_MARGIN_NATS = 0.01  # a smaller change of the validation loss is called none
FORGOT_LITTLE, FORGOT_SOME = 0.02, 0.10  # rise of perplexity on general text
MOST_NATS = 700.0  # exp of more overflows


@dataclass(frozen=True)
class Verdict:
    """The answer to "did it work?"."""

    tone: str  # `good`, `mixed`, `bad` or `unknown`
    word: str  # one or two words
    text: str  # a few sentences


def judge(report: Report, steps: Steps) -> Verdict:
    """Say whether a run worked, claiming nothing that was not measured; any value may be missing, NaN or Inf."""
    if report["status"] == "diverged":
        return Verdict("bad", "No", f"{_why_diverged(report, steps)}")
    if not report["steps"]:
        return Verdict("unknown", "Nothing was trained", "No step was taken, so the adapter changes nothing.")
    key = _key_metric(report)
    if not key and not is_number(report["loss_after"]):
        return Verdict("unknown", "Not measured", _why_unmeasured(report, steps))
    verdict = _by_metric(report, key) if key else _by_loss(report)
    forgotten = forgetting(report)[0]
    if forgotten not in ("some", "much"):
        return verdict
    tone = "mixed" if forgotten == "much" and verdict.tone == "good" else verdict.tone
    return Verdict(tone, verdict.word, f"{verdict.text} It forgot {forgotten} of its general knowledge.")


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


def _by_metric(report: Report, key: str) -> Verdict:
    rows, before, after = report["metrics_rows"], report["metrics_before"][key], report["metrics_after"][key]
    old, new = round(before * rows), round(after * rows)
    on, loss = f"On {plural(rows, 'validation row')}", _loss_sentence(report)
    change = f"“{key}” went from {score(report, key, before)} to {score(report, key, after)}"
    if _is_clear_rise(new, old, rows):
        return Verdict("bad", "No", f"It got worse. {on}, {change}. {loss}")
    if _is_clear_rise(old, new, rows):
        word = "Yes" if after >= GOOD_SHARE else "Mostly" if after >= HALF_SHARE else "Partly"
        return Verdict("mixed" if word == "Partly" else "good", word, f"{on}, {change}{_left(report, key)}. {loss}")
    if before >= GOOD_SHARE:
        text = f"The base was good at it: {on.lower()}, {change}. {loss}"
        return Verdict("unknown", "There was little to learn", text)
    risen = [f"“{name}”" for name in report["metrics_before"] if _has_clearly_risen(report, name)]
    if risen:
        return Verdict("mixed", "Partly", f"{on}, {' and '.join(risen)} clearly rose, but {change}. {loss}")
    if new > old:
        return Verdict("mixed", "Unclear", f"{on}, {change}. A difference this small may be chance. {loss}")
    return Verdict("bad", "No", f"The answers are no better. {on}, {change}. {loss}")


def _left(report: Report, key: str) -> str:
    """How many rows are still wrong, if the metric counts rows."""
    wrong = report["metrics_rows"] - round(report["metrics_after"][key] * report["metrics_rows"])
    return f"; {wrong:,} {'is' if wrong == 1 else 'are'} still not right" if wrong and is_count(report, key) else ""


def score(report: Report, name: str, share: float) -> str:
    """A metric as a count of rows if it is one, else as percent."""
    return f"{round(share * report['metrics_rows']):,}" if is_count(report, name) else percent(share)


def is_count(report: Report, name: str) -> bool:
    """Whether a metric is the mean of right-or-wrong, so that it can be shown as so many of so many rows."""
    rows = report["metrics_rows"]
    shares = [metrics[name] for metrics in (report["metrics_before"], report["metrics_after"]) if name in metrics]
    counts = [share * rows if is_number(share) else math.nan for share in shares]
    return name not in SHARES and all(0 <= count <= rows and abs(count - round(count)) < 1e-6 for count in counts)


def _has_clearly_risen(report: Report, name: str) -> bool:
    rows, before, after = report["metrics_rows"], report["metrics_before"][name], report["metrics_after"].get(name)
    return is_number(before) and is_number(after) and _is_clear_rise(round(before * rows), round(after * rows), rows)


def _is_clear_rise(before: int, after: int, rows: int) -> bool:
    """Fisher's exact test, one-sided: would chance alone put this many of all right answers on the second side?

    For means of shares the counts are rounded, which errs on the careful side: they vary less than right-or-wrong does.
    """
    total = before + after
    if not 0 <= before < after <= rows:
        return False
    tail = range(after, min(rows, total) + 1)
    chance = (_log_choose(rows, k) + _log_choose(rows, total - k) - _log_choose(2 * rows, total) for k in tail)
    return sum(map(math.exp, chance)) < CHANCE


def _log_choose(of: int, some: int) -> float:
    return math.lgamma(of + 1) - math.lgamma(some + 1) - math.lgamma(of - some + 1)


def interval(share: float, rows: int) -> str:
    """Wilson's 95 % interval: between which values the metric would lie on very many rows of the same kind."""
    z = 1.96
    middle = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return f"{max(middle - half, 0) * 100:.0f}–{min(middle + half, 1) * 100:.0f}{THIN}%"


# ---- by loss ------------------------------------------------------------------------------------------------------


def _by_loss(report: Report) -> Verdict:
    change, sentence = report["loss_after"] - loss_before(report), _loss_sentence(report)
    if not is_number(change):
        return Verdict(
            "unknown", "Unclear", "The validation loss was only measured after training: nothing to compare."
        )
    if change < -LOSS_MARGIN_NATS:
        text = "It predicts unseen rows better than the base did; whether it answers better, only its answers can show."
        return Verdict("good", "Yes, by the loss", f"{sentence} {text}")
    if change > LOSS_MARGIN_NATS:
        return Verdict("bad", "No", f"{sentence} It fits the training rows and does not generalise.")
    return Verdict("mixed", "No change", sentence)


def _loss_sentence(report: Report) -> str:
    before, after = loss_before(report), report["loss_after"]
    if not (is_number(before) and is_number(after)):
        return ""
    change = after - before
    verb = "fell" if change < -LOSS_MARGIN_NATS else "rose" if change > LOSS_MARGIN_NATS else "hardly changed,"
    return f"The validation loss {verb} from {number(before)} to {number(after)}."


def loss_before(report: Report) -> Any:
    """The validation loss to compare with: that of the bare base, or with the adapter before step 1."""
    return report["loss_base"] if is_number(report["loss_base"]) else report["loss_before"]


def perplexity(loss: Any) -> float:
    """Perplexity of a loss in nats; NaN if there is none."""
    return math.exp(min(loss, MOST_NATS)) if is_number(loss) else math.nan


def forgetting(report: Report) -> tuple[str, str]:
    """How much was forgotten: `nothing`, `little`, `some`, `much` or empty, and a sentence."""
    before, after = report["general_before"], report["general_after"]
    if not (is_number(before) and is_number(after)):
        return "", "Not measured."
    rise = math.exp(min(after - before, MOST_NATS)) - 1
    change = f"perplexity on a small general sample {'rose' if rise >= 0 else 'fell'} by {percent(abs(rise))}"
    if rise < -FORGOT_LITTLE:
        return "nothing", f"Forgot nothing: {change}."
    if rise < FORGOT_LITTLE:
        return "little", f"Forgot little or nothing: {change}."
    if rise < FORGOT_SOME:
        return "some", f"Forgot some: {change}. Fewer steps or a lower learning rate forget less."
    return "much", f"Forgot much: {change}. Fewer steps, a lower learning rate or a smaller rank forget less."
