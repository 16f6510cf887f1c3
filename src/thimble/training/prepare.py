"""What every command does first: open the base, its tokenizer and template, the adapters and the examples.

Each step collects its problems instead of raising, so that a user hears of all of them at once.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from thimble.backends.session import Session
from thimble.config.groups import ComputeOptions, DataOptions
from thimble.core.adapter import Adapter
from thimble.data.encode import Encoder, EncodeReport, Row, encode_all
from thimble.data.records import Dataset, Record, general_records, read_dataset
from thimble.data.spool import Items
from thimble.data.template import ChatTemplate
from thimble.data.tokenizer import Tokenizer, tokenizer_from_folder, tokenizer_from_gguf
from thimble.errors import AdapterError, BaseModelError, ConfigError, MissingPackageError, Problems, listing, plural
from thimble.events import EventLog
from thimble.files.peft import load_adapter
from thimble.models.base import Base, open_base

SHOWN_SKIPPED = 3  # rows that cannot be used, told of in full
SAMPLE_TOKENS = 512  # of text that shows compute int8 which columns of the activations are large


@dataclass(frozen=True)
class Model:
    """An opened base with what turns text into its tokens.

    Attributes:
        base: The base.
        tokenizer: Its tokenizer.
        template: Its chat template, or None if it has none.
    """

    base: Base
    tokenizer: Tokenizer
    template: ChatTemplate | None


def open_model(name: str | None) -> Model:
    """Open a base by path or hub name, with its tokenizer and template.

    Args:
        name: The option `base`.

    Returns:
        The opened base.

    Raises:
        BaseModelError: If anything is missing or not supported.
    """
    base = find_base(name)
    if base.metadata is not None:
        tokenizer = tokenizer_from_gguf(base.metadata)
    else:
        tokenizer = tokenizer_from_folder(base.path)
    if tokenizer.last_id >= base.spec.vocab_size:
        raise BaseModelError(
            f"the tokenizer of {base.name} has tokens up to number {tokenizer.last_id:,}, but the base knows "
            f"{base.spec.vocab_size:,}: it belongs to another base; copy the right one"
        )
    source = tokenizer.chat_template
    template = ChatTemplate(source, tokenizer.bos_token or "", tokenizer.eos_token or "") if source else None
    return Model(base, tokenizer, template)


def find_base(name: str | None) -> Base:
    """Open a base by path or hub name; None is the default base. Raises a BaseModelError as `open_base` does."""
    return open_base(_from_hub(name) if name and is_hub_name(name) else name)


def is_hub_name(name: str) -> bool:
    """Whether a name is `owner/name` and nothing here is called that."""

    parts = name.split("/")
    return not Path(name).exists() and len(parts) == 2 and all(parts) and not name.startswith((".", "~"))


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingPackageError(
            f'base {name} is not a file or folder here; to fetch it as a hub name run: pip install "thimble-lora[hub]"'
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]))
    except Exception as error:  # the hub client raises many kinds, all of which mean the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseModelError(
            f"base {name} is neither a file or folder here nor a hub model that can be fetched ({reason})"
        ) from None


def open_adapters(paths: Sequence[str], base: Base | None, problems: Problems) -> dict[str, Adapter]:
    """Read adapters and check that they fit the base.

    Args:
        paths: Adapter or run folders.
        base: The base, or None if it could not be opened.
        problems: Takes what is wrong.

    Returns:
        Adapters by the path the user gave.
    """
    adapters = {}
    for path in paths:
        adapter = problems.attempt(load_adapter, path)
        if adapter and base:
            problems.attempt(check_fits, path, adapter, base)
        if adapter:
            adapters[path] = adapter
    return adapters


def check_fits(path: str, adapter: Adapter, base: Base) -> None:
    """Refuse an adapter whose layers are not the base's.

    Args:
        path: What the user called it.
        adapter: The adapter.
        base: The base.

    Raises:
        AdapterError: Naming the first layers that do not fit.
    """
    shapes = base.spec.linear_shapes()
    unknown = [layer for layer in adapter.layers if layer not in shapes]
    wrong = [
        f"{layer} is (out {factors.B.shape[0]}, in {factors.A.shape[1]}), the base has {shapes[layer]}"
        for layer, factors in adapter.layers.items()
        if layer in shapes and (factors.B.shape[0], factors.A.shape[1]) != shapes[layer]
    ]
    if unknown or wrong:
        made_for = f"; it was made for {adapter.base}" if adapter.base else ""
        what = [f"it adapts {listing(unknown, 2)}, which the base lacks"] if unknown else []
        what += [listing(wrong, 2)] if wrong else []
        raise AdapterError(f"adapter {path} does not belong to {base.name}: {' and '.join(what)}{made_for}")


@dataclass(frozen=True)
class Examples:
    """The user's examples, as token rows.

    Attributes:
        dataset: As read.
        encoder: What turned records into rows.
        train: Rows to learn from.
        train_report: Counts over them.
        valid: Rows held out.
        valid_records: The records behind them, for questions.
        valid_report: Counts over them.
    """

    dataset: Dataset
    encoder: Encoder
    train: Items[Row]
    train_report: EncodeReport
    valid: tuple[Row, ...]
    valid_records: tuple[Record, ...]
    valid_report: EncodeReport

    @property
    def left_out(self) -> int:
        """How many rows cannot be used, or have nothing to learn."""
        reports = (self.train_report, self.valid_report)
        return self.dataset.skipped.count + sum(len(report.rows_without_labels) for report in reports)


def make_encoder(model: Model, config: DataOptions) -> Encoder:
    """The encoder for a base and the user's wishes."""
    vocab_size = model.base.spec.vocab_size
    return Encoder(model.tokenizer, model.template, config.seq_len, config.loss_on, vocab_size)


def encode_examples(
    dataset: Dataset,
    train: Items[Record],
    valid: Items[Record],
    model: Model,
    config: DataOptions,
    log: EventLog,
) -> Examples:
    """Turn records into rows; what the template refuses is left out with the rest that cannot be used."""
    encoder = make_encoder(model, config)
    on_record = functools.partial(log.progress, "rows encoded")
    sides = [
        encode_all(part, encoder, dataset.skipped, on_record) if part else ((), EncodeReport())
        for part in (train, valid)
    ]
    (train_rows, train_report), (valid_rows, valid_report) = sides
    return Examples(dataset, encoder, train_rows, train_report, tuple(valid_rows), tuple(valid), valid_report)


def log_examples(examples: Examples, log: EventLog) -> None:
    """Say what was read and how it will be learned."""
    dataset = examples.dataset
    held = plural(len(examples.valid), "row")
    log.note(f"data: {plural(len(examples.train), 'row')} of {dataset.format} to learn from, {held} held out")
    for note in (*dataset.notes, *examples.encoder.notes):
        log.note(note)
    log_skipped(dataset, log)
    for warning in examples.encoder.warnings:
        log.warning(warning)
    held_ids = {row.ids.tobytes(): row.source for row in examples.valid}
    known = {held_ids[ids] for row in examples.train if (ids := row.ids.tobytes()) in held_ids} if held_ids else ()
    if known:
        log.warning(
            f"also among the training rows: {plural(len(known), 'validation row')} ({listing(sorted(known), 3)}), where "
            "memory is enough to do well"
        )
    for name, report in (("training", examples.train_report), ("validation", examples.valid_report)):
        _log_lengths(name, report, log)


def log_skipped(dataset: Dataset, log: EventLog) -> None:
    """Warn of rows that cannot be used, with the first of them."""
    skipped = dataset.skipped
    if skipped.count:
        problems = (problem for row in skipped.found[:SHOWN_SKIPPED] for problem in row.problems[:1])
        log.warning(
            f"{skipped.count:,} of {plural(skipped.rows, 'row')} cannot be used and are left out (--strict refuses "
            f"them): {listing(problems, SHOWN_SKIPPED)}"
        )


def _log_lengths(name: str, report: EncodeReport, log: EventLog) -> None:
    """Warn of rows that were cut, or that have nothing to learn."""
    if report.truncated_rows:
        share = report.truncated_rows / report.num_rows
        log.warning(
            f"{plural(report.truncated_rows, f'{name} row')} longer than seq_len ({share:.0%}) lost "
            f"{plural(report.truncated_tokens, 'token')} in all"
        )
    if report.rows_without_labels:
        sources = listing(report.rows_without_labels, 3)
        log.warning(f"{plural(len(report.rows_without_labels), f'{name} row')} left out, nothing to learn: {sources}")


def skipped_rows(examples: Examples) -> list[dict[str, str]]:
    """The rows that were left out, of very many the first, with where each stands and why."""
    rows = [{"source": row.source, "problem": "; ".join(row.problems)} for row in examples.dataset.skipped.found]
    for report in (examples.train_report, examples.valid_report):
        rows += [{"source": source, "problem": "nothing to learn"} for source in report.rows_without_labels]
    return rows


def open_data(path: str, is_strict: bool) -> Dataset:
    """Read the examples; see thimble.data.records. Refuses an empty name, which no flag or file gave."""
    if not path:
        raise ConfigError("no data is given: name a file or folder of examples, as in: thimble train examples.jsonl")
    return read_dataset(path, is_strict)


def choose_store(config: ComputeOptions, base: Base, compute: str) -> tuple[tuple[str, ...], str]:
    """The stores for the frozen weights that come into question, the fastest first, and why that one."""
    if compute == "int8":
        return ("int8",), "store int8: compute int8 multiplies the weights as whole numbers, and keeps them so"
    if config.store != "auto":
        return (config.store,), f"store {config.store} was asked for"
    if base.metadata is not None:
        return ("file",), "store file: the blocks of the GGUF are used as they are, memory-mapped"
    return ("dense", "file"), "store dense: the weights of a folder are held in the compute type"


def open_session(model: Model, compute: str, store: str, is_streamed: bool = False) -> Session:
    """Load the base into the torch engine."""
    from thimble.backends.torch.session import TorchSession

    return TorchSession(model.base, compute, store, is_streamed, _sample(model) if compute == "int8" else None)


def _sample(model: Model) -> NDArray[np.int32]:
    """Tokens of general text, int32 (at most SAMPLE_TOKENS,)."""
    texts = [record.text for record in general_records() if record.text is not None]
    return np.array(model.tokenizer.encode("\n\n".join(texts)), np.int32)[:SAMPLE_TOKENS]
