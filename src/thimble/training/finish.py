"""The end of a run: its report, what it leaves in its folder, and an honest failure if it failed."""

from thimble.errors import RunError
from thimble.events import EventLog
from thimble.models.machine import peak_memory_bytes
from thimble.training.before_after import compare_answers
from thimble.training.loop import TrainResult
from thimble.training.plan import RunPlan
from thimble.training.result import TrainReport
from thimble.training.sink import RunFolderSink


def make_report(run_plan: RunPlan, result: TrainResult, log: EventLog, total_seconds: float) -> TrainReport:
    """What a run did, as plain data; the place of the adapter is added when that is published."""
    base, progress, before, after = run_plan.model.base, result.progress, result.before, result.after
    report = TrainReport(
        status=result.status, out=str(run_plan.folder), base=base.name, base_path=str(base.path), loader=base.loader,
        steps=progress.steps, tokens=progress.tokens,
        target_tokens=progress.target_tokens, seconds=progress.seconds, total_seconds=total_seconds,
        tokens_per_second=progress.tokens / progress.seconds if progress.seconds else 0.0,
        peak_memory_bytes=peak_memory_bytes(), loss_base=before.base.loss, loss_before=before.loss,
        general_before=before.base.general_loss, metric=run_plan.metric_name, metrics_before=before.base.metrics,
        metrics_rows=len(before.base.answers), skipped_rows=run_plan.examples.left_out,
        adapter_parameters=result.adapter.num_parameters, base_parameters=base.num_parameters,
        initialization=progress.initialization, best_step=result.best_step, rollbacks=progress.guard.rollbacks,
        plan=run_plan.memory.parts(), planned_seconds_per_step=run_plan.seconds_per_step, messages=log.messages,
        config=run_plan.config.resolved(),
    )  # fmt: skip
    if after:
        report.loss_after, report.general_after = after.loss, after.general_loss
    if after and len(after.answers) == len(before.base.answers):
        report.metrics_after = after.metrics
        report.samples = compare_answers(before.base.answers, after.answers)
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
    return report
