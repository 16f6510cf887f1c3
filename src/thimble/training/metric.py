"""How answers are scored, and which validation rows are answered."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from thimble.config.groups import EvaluationOptions
from thimble.core.labels import AnswerCounts
from thimble.core.metrics import METRICS, Metric, parse_tool_calls, valid_json
from thimble.data.examples import Examples
from thimble.errors import plural
from thimble.events import EventLog
from thimble.training.answers import Answer, Question, make_questions
from thimble.training.user_metric import MetricFault, user_metric

SHORT_ANSWER_WORDS = 8  # references up to this long are scored by exact match unless the user says otherwise
SHOWN_WITHOUT_METRIC = 3  # validation rows that are answered only to be shown


@dataclass
class ChosenMetric:
    """What answers are scored with."""

    name: str  # as the user or `auto` chose it; `none` scores nothing
    function: Metric | None = None  # (answer, reference) -> figures; may raise MetricFault
    counts: AnswerCounts = field(default_factory=AnswerCounts)  # of the references, all rows of the data counted

    @property
    def has_labels(self) -> bool:
        """Whether answers are reported label by label."""
        return self.name == "labels" or (self.name != "none" and self.counts.are_labels)


def choose_metric(wanted: str, references: Sequence[str], counts: AnswerCounts) -> ChosenMetric:
    """The metric a user asked for, or for auto the one that suits the references; a ConfigError if there is none."""
    if wanted in METRICS:
        return ChosenMetric(wanted, METRICS[wanted], counts)
    if wanted != "auto":
        return ChosenMetric(wanted, None if wanted == "none" else user_metric(wanted), counts)
    if not references:
        return ChosenMetric("none", None, counts)
    name = "none"
    if all(parse_tool_calls(text) for text in references):
        name = "tools"
    elif all(text.lstrip()[:1] in ("{", "[") and valid_json(text, text)["valid JSON"] for text in references):
        name = "json"
    elif counts.are_labels:
        name = "labels"
    elif all(len(text.split()) <= SHORT_ANSWER_WORDS for text in references):
        name = "exact"
    return ChosenMetric(name, METRICS.get(name), counts)


def score_answers(answers: Iterable[Answer], metric: ChosenMetric, log: EventLog) -> list[Answer]:
    """Score answers. One that the metric fails on stays without figures; how many those are, and the first, is told."""
    scored, faults = [], []
    for answer in answers:
        try:
            scores, problem = metric.function(answer.written, answer.reference) if metric.function else {}, ""
        except MetricFault as fault:
            faults.append(f"{fault}, on the answer to {answer.source or 'a row'}")
            scores, problem = {}, str(fault)
        scored.append(replace(answer, scores=scores, problem=problem))
    if faults:
        of = f"{len(faults)} of {plural(len(scored), 'answer')}"
        log.warning(f"the metric failed on {of}, which are left out of its figures; first: {faults[0]}")
    elif scored and metric.function and not any(answer.scores for answer in scored):
        log.warning(f"the metric {metric.name} gave no figure for any of {plural(len(scored), 'answer')}")
    return scored


def choose_questions(
    examples: Examples, config: EvaluationOptions, needs_all: bool = False
) -> tuple[list[Question], ChosenMetric]:
    """The validation rows to answer, and the metric to score them with; without one only a few are answered, to be
    shown, unless all answers are needed.
    """
    counts = examples.answers
    has_labels = config.metric == "labels" or (config.metric != "none" and counts.are_labels)
    questions = make_questions(examples.valid_records, examples.encoder, config.eval_rows, has_labels)
    metric = choose_metric(config.metric, [question.reference for question in questions], counts)
    return questions if metric.function or needs_all else questions[:SHOWN_WITHOUT_METRIC], metric
