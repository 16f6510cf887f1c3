"""The end of a run: its report, what it leaves in its folder, and an honest failure if it failed."""

from thimble.errors import RunError, as_word
from thimble.events import EventLog
from thimble.models.machine import peak_memory_bytes
from thimble.training.answers import write_answers
from thimble.training.before_after import all_answers, compare_answers
from thimble.training.comparison import both_label_reports, compare_losses, compare_metrics
from thimble.training.facts import RunFacts
from thimble.training.gallery import make_gallery
from thimble.training.loop import TrainResult
from thimble.training.result import TrainReport
from thimble.training.sink import RunFolderSink


def make_report(facts: RunFacts, result: TrainResult, log: EventLog, total_seconds: float) -> TrainReport:
    """What a run did, as plain data; the place of the adapter is added when that is published."""
    base, progress, before, after = facts.base, result.progress, result.before, result.after
    report = TrainReport(
        task=facts.task, unit=facts.unit,
        status=result.status, out=str(facts.folder), base=base.name, base_path=str(base.path), loader=base.loader,
        steps=progress.steps, tokens=progress.tokens,
        target_tokens=progress.target_tokens, seconds=progress.seconds, total_seconds=total_seconds,
        tokens_per_second=progress.tokens / progress.seconds if progress.seconds else 0.0,
        rows_per_second=progress.rows / progress.seconds if progress.seconds else 0.0,
        peak_memory_bytes=peak_memory_bytes(), loss_base=before.base.loss, loss_before=before.loss,
        general_before=before.base.general_loss, metric=facts.metric.name, metrics_before=before.base.metrics,
        metrics_rows=len(before.base.answers), skipped_rows=facts.skipped_rows,
        loss_train_before=before.base.train_loss, training_rows=facts.training_rows,
        validation_rows=len(facts.sources), known_rows=facts.known_rows,
        token_ratio=facts.token_ratio, untouched_rows=facts.untouched_rows,
        adapter_parameters=result.adapter.num_parameters, base_parameters=base.num_parameters,
        initialization=progress.initialization, best_step=result.best_step, strength=result.strength,
        rollbacks=progress.guard.rollbacks,
        plan=dict(facts.memory), planned_seconds_per_step=facts.seconds_per_step, messages=log.messages,
        config=facts.config.resolved(), task_details=dict((after or before.base).details),
    )  # fmt: skip
    answers = after.answers if after and len(after.answers) == len(before.base.answers) else ()
    if after:
        report.loss_after, report.general_after, report.loss_train_after = (
            after.loss,
            after.general_loss,
            after.train_loss,
        )
        report.loss_comparison = compare_losses(before.base.row_losses, after.row_losses, facts.sources)
        report.divergence = dict(after.divergence)
        report.general_comparison = compare_losses(before.base.general_rows, after.general_rows)
    if after and answers:
        judging = {facts.sources[number] for number in facts.judging}
        report.metrics_after = after.metrics
        report.metric_comparisons = compare_metrics(before.base.answers, answers, judging)
        report.samples = compare_answers(before.base.answers, answers, facts.metric.has_labels)
    if facts.metric.has_labels and before.base.answers:
        report.labels = both_label_reports(before.base.answers, answers, facts.learned)
    return report


def finish(
    facts: RunFacts, result: TrainResult, report: TrainReport, sink: RunFolderSink, log: EventLog
) -> TrainReport:
    """Publish the adapter and the reports, then raise RunError if the run diverged or its base was cut off."""
    shown = make_gallery(facts, report, result.before.base.answers, result.after.answers if result.after else ())
    try:
        sink.publish(result.adapter, report, facts.base, log, shown)
    except OSError as error:
        kept = f" --resume, which goes on from step {result.saved_step}" if result.saved_step else ""
        raise RunError(
            f"the result cannot be written to {facts.folder} ({error.strerror or error}): free some room or mend "
            f"it, and run the command again{kept}"
        ) from None
    answers = all_answers(result.before.base.answers, result.after.answers if result.after else ())
    write_answers(facts.answers_path, answers, log)
    if result.cut_file:
        raise RunError(
            f"{result.cut_file} became shorter while it was read, after step {report.steps}: what was learned until "
            f"then is kept in {report.adapter}; copy the base again"
        )
    if result.diverged:
        raise RunError(
            f"training diverged at step {report.steps}: {result.diverged}. The last good adapter is kept in "
            f"{report.adapter}; try --learning-rate {facts.safer_rate:.2g}"
        )
    if result.after and result.after.answers and facts.metric.function and not report.metrics_after:
        faults = [text for text in log.messages["warning"] if text.startswith("the metric ")]
        words = ("thimble evaluate", as_word(facts.config.data), "--adapter", as_word(str(facts.folder)))
        raise RunError(
            f"the run is done, with its adapter and report in {facts.folder}, but {faults[-1]}. Mend it and score "
            f"again: {' '.join(words)} --metric {as_word(facts.metric.name)}"
        )
    return report
