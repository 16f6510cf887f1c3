"""`thimble generate`: answer a whole file of prompts, many at once, and go on after an interruption."""

import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from thimble.backends.open import choose_decode, choose_store, open_session
from thimble.backends.session import Session
from thimble.config.generate import GenerateConfig
from thimble.config.options import as_command
from thimble.config.train import TrainConfig, unused
from thimble.core.adapter import Adapter
from thimble.data.answers import Answer, AnswerFile, differing, unanswered
from thimble.data.context import Context
from thimble.data.encode import Encoder
from thimble.data.encode_prompts import Encoded, EncodedPrompts, encode_prompts
from thimble.data.given_rows import raw_rows
from thimble.data.model import Model, log_base, model_with_adapters
from thimble.data.prompts import Prompt, PromptReader, keep_prompts, read_prompts
from thimble.data.records import Skipped
from thimble.data.run_columns import columns_of_run, typed_columns
from thimble.data.spool import Spool
from thimble.errors import ConfigError, DataError, Problems, listing, plural
from thimble.events import EventLog, OnEvent, ShouldStop, ignore, never
from thimble.inference.batch import Request, answer_all, own_seed
from thimble.inference.engine import PREFILL_TOKENS, Engine
from thimble.inference.sampling import SamplingOptions
from thimble.models.cost import cache_token_bytes
from thimble.models.execution import activation_dtype
from thimble.models.machine import available_bytes
from thimble.training.module_adapter import is_of_module
from thimble.training.module_answers import predictions, write_predictions
from thimble.training.run_folder import check_new_file, check_room
from thimble.training.task_choice import TEXT

SHOWN_ANSWERS = 3
MEMORY_SHARE = 3  # of the free memory, one part in so many is for keys and values: a cache that grows is there twice
OUT_BYTES = 1_000_000  # that there is room for at least
BEFORE_DECODE = "float"  # how answers were written whose file does not say it
ANSWER_SETTINGS = ("system", "temperature", "top_p", "top_k", "min_p", "max_new_tokens", "seed")


@dataclass
class GenerateReport:
    """What was answered.

    Attributes:
        status: `done`, or `interrupted`.
        data: What the user named.
        base: Name of the base.
        adapter: Folder of the adapter, or `base`.
        out: File of the answers; while they are not complete, the file with those there are.
        rows: Rows of the data.
        answered: Rows with an answer, those of earlier runs too.
        unanswered: Rows that cannot be answered; the file says why.
        answered_before: Rows that earlier runs have answered.
        length_limited: Answers of this run that --max-new-tokens or the context ended.
        prompt_tokens: Tokens read by this run.
        completion_tokens: Tokens written by this run.
        seconds: Time that reading and writing them took.
        tokens_per_second: Tokens written in a second.
        samples: The first answers of this run, as they stand in the file.
        go_on: The command that goes on with an interrupted run.
        messages: Decisions, notes and warnings, in order.
    """

    status: str
    data: str
    base: str
    adapter: str
    out: str
    rows: int
    answered: int = 0
    unanswered: int = 0
    answered_before: int = 0
    length_limited: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    samples: list[dict[str, Any]] = field(default_factory=list)
    go_on: str = ""
    messages: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Work:
    """Everything that was checked: what is asked, of whom, and how."""

    config: GenerateConfig
    model: Model
    adapters: dict[str, Adapter]  # at most one
    prompts: Spool[Prompt]
    delimiter: str  # between the cells of a table of answers
    encoded: EncodedPrompts
    compute: str
    store: str
    decode: str
    log: EventLog

    def report(self, out: str) -> GenerateReport:
        """A report of nothing done yet."""
        asked = next(iter(self.adapters), "base")
        return GenerateReport(
            "done", self.config.data, self.model.base.name, asked, out, len(self.prompts),
            unanswered=len(self.encoded.problems), messages=self.log.messages,
        )  # fmt: skip


def generate(config: GenerateConfig, on_event: OnEvent = ignore, should_stop: ShouldStop = never) -> GenerateReport:
    """Answer every row of a file into another one; what is answered is kept, and a resumed run goes on with it."""
    return write_answers(None, config, on_event, should_stop)


def write_answers(
    rows: Iterable[Any] | None, config: GenerateConfig, on_event: OnEvent = ignore, should_stop: ShouldStop = never
) -> GenerateReport:
    """Answer rows from Python, or of the file in `config` if they are None, into the file `out`."""
    if rows is None and is_of_module(config.adapter, config.task, config.base):
        return _predict(config, EventLog(on_event), should_stop)
    log, file = EventLog(on_event), AnswerFile(config.out or "answers.jsonl")
    work = _prepare(config, log, file, rows)
    report = work.report(str(file.path))
    done = _take_up(work, file)
    report.answered = report.answered_before = len(done - work.encoded.problems.keys())
    if file.is_finished and done:
        return report
    try:
        for row in sorted(work.encoded.problems.keys() - done):
            prompt = work.prompts[row - 1]
            file.add(unanswered(prompt, work.encoded.problems[row]).described(prompt))
        for answer in _answers(work, done, report, should_stop):
            line = answer.described(work.prompts[answer.row - 1])
            file.add(line)
            report.samples += [line] * (len(report.samples) < SHOWN_ANSWERS)
        if report.answered + report.unanswered == report.rows:
            file.finish(work.prompts, work.delimiter)
        else:
            report.status, report.out = "interrupted", str(file.partial)
            resumed = config.replace(resume=True, overwrite=False)
            report.go_on = as_command("generate", resumed) if rows is None else "the same call with resume=True"
    finally:
        file.close()
    return report


def _predict(config: GenerateConfig, log: EventLog, should_stop: ShouldStop) -> GenerateReport:
    """Ask an adapter on a module about every row; the file is written once, with the rows done until then."""
    problems = Problems()
    if not config.out:
        problems.add("--out is not given: name the file for the answers, such as --out answers.jsonl")
    elif not config.overwrite:
        problems.attempt(check_new_file, config.out, "--out")
    problems.required()
    used, lines = predictions(config, log, should_stop)
    began, found = time.perf_counter(), list(lines)
    skipped, count = used.rows.skipped, len(used.reading.valid_costs)
    errors = [{"file": row.source, "error": "; ".join(row.problems)} for row in skipped.found]
    write_predictions(config.out or "", found, errors, log)
    return GenerateReport(
        "done" if len(found) == count else "interrupted", config.data, used.base.name, used.trained.path,
        config.out or "", count + skipped.count, len(found), unanswered=skipped.count,
        seconds=time.perf_counter() - began, samples=found[:SHOWN_ANSWERS], messages=log.messages,
    )  # fmt: skip


def answer_rows(
    rows: Iterable[Any] | None, config: GenerateConfig, on_event: OnEvent = ignore, should_stop: ShouldStop = never
) -> list[Answer] | list[dict[str, Any]]:
    """The same without a file; gives the answers in the order of the rows, of adapters on modules their lines."""
    if is_of_module(config.adapter, config.task, config.base):
        if rows is not None:
            raise ConfigError(
                f"adapter {config.adapter[0]} is asked about the rows of a file or folder: name it instead of rows"
            )
        return [*predictions(config, EventLog(on_event), should_stop)[1]]
    work = _prepare(config, EventLog(on_event), None, rows)
    found = {answer.row: answer for answer in _answers(work, set(), work.report(""), should_stop)}
    for row, problem in work.encoded.problems.items():
        found[row] = unanswered(work.prompts[row - 1], problem)
    return [found[row] for row in sorted(found)]


def _prepare(
    config: GenerateConfig, log: EventLog, file: AnswerFile | None, rows: Iterable[Any] | None = None
) -> _Work:
    """Check everything that can be wrong, before the framework is loaded."""
    problems, skipped = Problems((*config.problems, *unused(config, TEXT))), Skipped(config.strict)
    log.stage("reading the base and the prompts")
    model, adapters = model_with_adapters(config.base, config.adapter, problems, log)
    prompts, delimiter = problems.attempt(_read, config, skipped, rows, log) or (None, ",")
    recorded = problems.attempt(_check_file, file, config) if file else None
    if model and model.template is None and config.system:
        problems.add(f"--system: {model.base.name} has no chat template, so there is no place for it; leave it out")
    encoded = problems.attempt(_encode, prompts, model, config, skipped, log) if model and prompts else None
    model, prompts, encoded = problems.required(model, prompts, encoded)
    log_base(model.base, log, model.tokenizer, config.adapter)
    if skipped.count:
        log.warning(
            f"{skipped.count:,} of {plural(skipped.rows, 'row')} cannot be answered and stay without an answer "
            f"(--strict refuses them): {listing(skipped.told(), 3)}"
        )
    from thimble.backends.torch.compute import choose_compute

    wanted = (recorded or {}).get("--compute", "auto") if config.compute == "auto" else config.compute
    compute, why = choose_compute(wanted, config.remeasure)
    log.decision(f"compute: {why if wanted == config.compute else f'{compute}, as in the answers there are'}")
    store, decode = choose_store(config.store, model.base, compute)[0][0], config.decode
    if decode == "auto" and recorded:
        decode = recorded.get("--decode", BEFORE_DECODE)
    else:
        decode = choose_decode(decode, model.base)
    return _Work(config, model, adapters, prompts, delimiter, encoded, compute, store, decode, log)


def _read(
    config: GenerateConfig, skipped: Skipped, rows: Iterable[Any] | None, log: EventLog
) -> tuple[Spool[Prompt], str]:
    """All prompts, and what stands between cells: semicolons where the file has them, as its spreadsheet expects."""
    run = columns_of_run(config, config.adapter)
    reader = PromptReader.of(config, run)
    if rows is not None:
        prompts = keep_prompts(raw_rows(rows), skipped, "the list of rows", reader)
        _tell_columns(reader, run, log)
        return prompts, ","
    if not config.data:
        raise ConfigError(
            "no prompts are given: name a file of them, as in: thimble generate prompts.jsonl --out answers.jsonl"
        )
    prompts, told = read_prompts(config.data, skipped, reader)
    for note in told.notes:
        log.note(note)
    for warning in told.warnings:
        log.warning(warning)
    _tell_columns(reader, run, log)
    return prompts, ";" if set(told.delimiters) == {";"} else ","


def _tell_columns(reader: PromptReader, run: TrainConfig | None, log: EventLog) -> None:
    """Whether rows are asked as the run that trained the adapter asked them."""
    if run is None:
        return
    options = typed_columns(run)
    if reader.as_in_run:
        log.decision(f"columns as in the run that trained the adapter: {options}")
    if reader.otherwise:
        log.warning(
            f"{plural(reader.otherwise, 'row')} without the columns that the adapter was trained on ({options}): they "
            "are asked otherwise than it has learned; name the columns here"
        )


def _check_file(file: AnswerFile, config: GenerateConfig) -> dict[str, str] | None:
    """Refuse a file that cannot be written; gives what the answers in it were made with, if the run is resumed."""
    if not config.out:
        raise ConfigError("--out is not given: name the file for the answers, such as --out answers.jsonl")
    file.check(config.data, config.resume, config.overwrite)
    check_room(file.path.absolute().parent, OUT_BYTES)
    return file.resumable() if config.resume else None


def _encode(
    prompts: Spool[Prompt], model: Model, config: GenerateConfig, skipped: Skipped, log: EventLog
) -> EncodedPrompts:
    """Encode all prompts; a DataError if none can be answered, or if strict one cannot: else each has its own line."""
    spec = model.base.spec
    encoder = Encoder(model.tokenizer, model.template, spec.max_positions, vocab_size=spec.vocab_size)
    context = Context(spec.max_positions, config.max_new_tokens)
    on_row = partial(log.progress, "prompts encoded,")
    encoded = encode_prompts(prompts, encoder, context, config.system, skipped, on_row)
    if config.strict:
        skipped.check()
    if not len(encoded.items):
        raise DataError(*skipped.told())
    if model.template is not None and not config.text_column and (count := _plain_rows(prompts)):
        log.warning(
            f"{plural(count, 'row')} of plain text: it is continued as it stands, not answered; to ask it, as "
            "a chat does, add --prompt-column text, to continue it, --text-column text"
        )
    for warning in encoded.warnings(context):
        log.warning(warning)
    return encoded


def _plain_rows(prompts: Spool[Prompt]) -> int:
    """How many rows are plain text, and no conversation."""
    return sum(prompt.record is not None and prompt.record.text is not None for prompt in prompts)


def _take_up(work: _Work, file: AnswerFile) -> set[int]:
    """Begin the file, or go on with it; gives the rows that are in it. A ConfigError if they were made otherwise."""
    settings = _made_with(work)
    recorded = file.resumable() if work.config.resume else None
    if recorded is None:
        if work.config.resume:
            work.log.note("there is nothing to resume: all rows are answered now")
        file.begin(settings)
        return set()
    if others := differing({"--decode": BEFORE_DECODE, **recorded}, settings):
        raise ConfigError(
            f"--resume: the answers in --out {file.path} were made otherwise ({listing(others)}): give the same "
            "again, or add --overwrite instead of --resume to begin again"
        )
    if file.is_finished:
        work.log.note(f"{file.path} is finished: nothing was left to do")
        return {prompt.row for prompt in work.prompts}
    done = file.go_on()
    work.log.note(f"resumed: {plural(len(done), 'row')} of {len(work.prompts):,} in the file already")
    return done


def _made_with(work: _Work) -> dict[str, str]:
    """All that answers depend on, by names for people."""
    prompts = hashlib.sha256()
    for prompt in work.prompts:
        prompts.update(repr((prompt.row, prompt.record, prompt.columns)).encode("utf-8", "backslashreplace"))
    adapter = hashlib.sha256()
    for path, factors in sorted(pair for each in work.adapters.values() for pair in each.layers.items()):
        adapter.update(f"{path} {factors.scale}".encode() + factors.A.tobytes() + factors.B.tobytes())
        adapter.update(b"" if factors.magnitude is None else factors.magnitude.tobytes())
    options = {f"--{name.replace('_', '-')}": str(getattr(work.config, name)) for name in ANSWER_SETTINGS}
    return {
        "base": f"{work.model.base.name} ({work.model.base.quick_fingerprint()[:16]})",
        "adapter": adapter.hexdigest()[:16] if work.adapters else "none",  # paths vary
        "prompts": prompts.hexdigest()[:16], **options, "--compute": work.compute, "--store": work.store,
        "--decode": work.decode,
    }  # fmt: skip


def _answers(work: _Work, done: set[int], report: GenerateReport, should_stop: ShouldStop) -> Iterator[Answer]:
    """Answer what is not done, as it ends, and count it in the report; ends early if that is asked for."""
    waiting = [place for place, encoded in enumerate(work.encoded.items) if encoded.row not in done]
    if not waiting:
        return
    work.log.stage(f"answering {plural(len(waiting), 'row')}")
    session = open_session(work.model, work.compute, work.store, decode=work.decode)
    tokenizer, items = work.model.tokenizer, work.encoded.items
    adapter = session.load(next(iter(work.adapters.values()), None))
    began = time.perf_counter()
    requests = (_request(place, items[place], work) for place in waiting)
    for ended in answer_all(_engine(session, work), requests, adapter):
        for key, ids, finish in ended:
            row, left_out, asked = items[key]
            prompt, text = work.prompts[row - 1], tokenizer.decode(ids, skip_special=True)
            report.answered += 1
            report.length_limited += finish == "length"
            report.prompt_tokens += len(asked)
            report.completion_tokens += len(ids)
            yield Answer(row, prompt.source, text, finish, len(asked), len(ids), prompt.reference, left_out=left_out)
        report.seconds = time.perf_counter() - began
        report.tokens_per_second = report.completion_tokens / max(report.seconds, 1e-9)
        rate = f"rows answered, {report.tokens_per_second:,.0f} tokens/s:"
        work.log.progress(rate, report.answered + report.unanswered, report.rows)
        if should_stop():
            return


def _request(place: int, encoded: Encoded, work: _Work) -> Request:
    """A prompt with the options of its answer; a row has a seed of its own, whatever is answered beside it."""
    config = work.config
    options = SamplingOptions(
        config.max_new_tokens, work.model.tokenizer.stop_ids, config.temperature, config.top_p, config.top_k,
        config.min_p, own_seed(config.seed, encoded.row - 1),
    )  # fmt: skip
    return Request(place, encoded.ids, options)


def _engine(session: Session, work: _Work) -> Engine:
    """An engine that makes the most tokens a second in the memory there is."""
    from thimble.backends.torch.threads import num_cores

    dtype = activation_dtype(work.compute, work.store)
    most = available_bytes() // MEMORY_SHARE // cache_token_bytes(work.model.base.spec, dtype)
    return Engine(
        session, num_cores(), cache_tokens=most, prefill_tokens=PREFILL_TOKENS, is_interactive=False
    )  # fmt: skip
