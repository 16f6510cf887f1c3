"""The end of a run: its report, what it leaves in its folder, and an honest failure if it failed."""

from thimble.errors import RunError, as_word
from thimble.events import EventLog
from thimble.models.machine import peak_memory_bytes
from thimble.training.answers import write_answers
from thimble.training.before_after import all_answers, compare_answers
from thimble.training.comparison import both_label_reports, compare_losses, compare_metrics
from thimble.training.loop import TrainResult
from thimble.training.plan import RunPlan
from thimble.training.result import TrainReport
from thimble.training.sink import RunFolderSink


def make_report(run_plan: RunPlan, result: TrainResult, log: EventLog, total_seconds: float) -> TrainReport:
    """What a run did, as plain data; the place of the adapter is added when that is published."""
    base, progress, before, after = run_plan.model.base, result.progress, result.before, result.after
    examples = run_plan.examples
    report = TrainReport(
        status=result.status, out=str(run_plan.folder), base=base.name, base_path=str(base.path), loader=base.loader,
        steps=progress.steps, tokens=progress.tokens,
        target_tokens=progress.target_tokens, seconds=progress.seconds, total_seconds=total_seconds,
        tokens_per_second=progress.tokens / progress.seconds if progress.seconds else 0.0,
        peak_memory_bytes=peak_memory_bytes(), loss_base=before.base.loss, loss_before=before.loss,
        general_before=before.base.general_loss, metric=run_plan.metric.name, metrics_before=before.base.metrics,
        metrics_rows=len(before.base.answers), skipped_rows=examples.left_out,
        loss_train_before=before.base.train_loss, training_rows=len(examples.train),
        validation_rows=len(examples.valid), known_rows=len(examples.known),
        token_ratio=run_plan.token_ratio, untouched_rows=run_plan.watch.untouched_rows,
        adapter_parameters=result.adapter.num_parameters, base_parameters=base.num_parameters,
        initialization=progress.initialization, best_step=result.best_step, strength=result.strength,
        rollbacks=progress.guard.rollbacks,
        plan=run_plan.memory.parts(), planned_seconds_per_step=run_plan.seconds_per_step, messages=log.messages,
        config=run_plan.config.resolved(),
    )  # fmt: skip
    answers = after.answers if after and len(after.answers) == len(before.base.answers) else ()
    if after:
        report.loss_after, report.general_after, report.loss_train_after = (
            after.loss,
            after.general_loss,
            after.train_loss,
        )
        sources = [row.source for row in examples.valid]
        report.loss_comparison = compare_losses(before.base.row_losses, after.row_losses, sources)
        report.divergence = dict(after.divergence)
        report.general_comparison = compare_losses(before.base.general_rows, after.general_rows)
    if after and answers:
        judging = {examples.valid[number].source for number in run_plan.watch.judging}
        report.metrics_after = after.metrics
        report.metric_comparisons = compare_metrics(before.base.answers, answers, judging)
        report.samples = compare_answers(before.base.answers, answers, run_plan.metric.has_labels)
    if run_plan.metric.has_labels and before.base.answers:
        report.labels = both_label_reports(before.base.answers, answers, examples.train_report.answers)
    return report


def finish(
    run_plan: RunPlan, result: TrainResult, report: TrainReport, sink: RunFolderSink, log: EventLog
) -> TrainReport:
    """Publish the adapter and the reports, then raise RunError if the run diverged or its base was cut off."""
    try:
        sink.publish(result.adapter, report, run_plan.model.base, log)
    except OSError as error:
        kept = f" --resume, which goes on from step {result.saved_step}" if result.saved_step else ""
        raise RunError(
            f"the result cannot be written to {run_plan.folder} ({error.strerror or error}): free some room or mend "
            f"it, and run the command again{kept}"
        ) from None
    answers = all_answers(result.before.base.answers, result.after.answers if result.after else ())
    write_answers(run_plan.answers_path, answers, log)
    if result.cut_file:
        raise RunError(
            f"{result.cut_file} became shorter while it was read, after step {report.steps}: what was learned until "
            f"then is kept in {report.adapter}; copy the base again"
        )
    if result.diverged:
        raise RunError(
            f"training diverged at step {report.steps}: {result.diverged}. The last good adapter is kept in "
            f"{report.adapter}; try --learning-rate {run_plan.step_schedule.safer_rate:.2g}"
        )
    if result.after and result.after.answers and run_plan.metric.function and not report.metrics_after:
        faults = [text for text in log.messages["warning"] if text.startswith("the metric ")]
        words = ("thimble evaluate", as_word(run_plan.config.data), "--adapter", as_word(str(run_plan.folder)))
        raise RunError(
            f"the run is done, with its adapter and report in {run_plan.folder}, but {faults[-1]}. Mend it and score "
            f"again: {' '.join(words)} --metric {as_word(run_plan.metric.name)}"
        )
    return report
