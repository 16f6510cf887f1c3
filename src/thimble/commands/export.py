"""`thimble export`: adapters and whole models for other programs, and proof that they do there what they do here."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thimble.commands.export_model import (
    Importance,
    WholeModel,
    check_model,
    has_importance,
    measure_importance,
    write_model,
)
from thimble.commands.export_proof import prove_adapter, prove_whole, tell_loss
from thimble.config.export import ExportConfig
from thimble.config.sources import CONFIG_FILE, build_config
from thimble.config.train import TrainConfig
from thimble.core.adapter import Adapter
from thimble.data.encode import Row
from thimble.data.examples import encode_examples, general_rows, open_data, split_and_encode
from thimble.data.model import Model, model_with_adapters
from thimble.errors import ConfigError, InputError, Problems, as_word, install_line, listing, plural
from thimble.events import EventLog, OnEvent, ignore
from thimble.exports.gguf_adapter import check_exportable, write_gguf_adapter
from thimble.exports.llamacpp import is_installed
from thimble.exports.modelfile import modelfile
from thimble.exports.proof import MOST_ROWS, Proof
from thimble.exports.proof_model import ModelProof
from thimble.exports.proof_weights import WeightsCheck
from thimble.files.atomic import sync, write_atomic
from thimble.files.peft import save_adapter
from thimble.models.adapters import check_is_of_layers
from thimble.models.dora import without_magnitudes
from thimble.models.gguf_types import FILE_TYPES, check_file_type
from thimble.report.card import derived_card
from thimble.training.card import about_adapter, write_card
from thimble.training.run_folder import atomic_folder, check_new_folder, check_room

FEW_ROWS = 5  # if fewer are held out, training rows serve too: whether it is the same is asked, not how good it is
PROOF, MODELFILE = ".proof.json", ".Modelfile"  # behind the name of the file


@dataclass
class ExportReport:
    """What was written, and whether it does what the adapter does.

    Attributes:
        adapter: What the user named; empty for a base as it is.
        base: Name of the base.
        to: The format.
        out: What was written.
        size_bytes: Of that file or folder.
        layers: How many layers the adapter adapts.
        type: Type of most weights of a whole model; empty for an adapter.
        modelfile: A Modelfile for Ollama beside it; empty if none was written.
        weights: What was found of the numbers of a whole model; None for an adapter.
        proof: What was compared in the runtime; None without a proof.
        messages: Decisions, notes and warnings, in order.
    """

    adapter: str
    base: str
    to: str
    out: str
    size_bytes: int
    layers: int
    type: str
    modelfile: str
    weights: dict[str, Any] | None
    proof: dict[str, Any] | None
    messages: dict[str, list[str]]


def export(config: ExportConfig, on_event: OnEvent = ignore) -> ExportReport:
    """Write an adapter or a whole model for other programs; a RunError if a proof fails, and nothing stays in --out."""
    log = EventLog(on_event)
    model, adapter, whole = _prepare(config, log)
    out, weights, proof = Path(config.out), None, None
    if config.to == "peft" and adapter:
        with atomic_folder(out) as folder:
            save_adapter(adapter, folder)
            facts = [("made from", f"{Path(config.adapter).name}, {len(adapter.layers)} layers")]
            write_card(folder, derived_card(about_adapter(adapter, model.base), "export", config, facts))
        modelfile = ""
    else:
        rows = _rows(config, model, log) if _is_proved(config, model, log) else []
        weights, proof = _write(config, model, adapter, whole, rows, log)
        modelfile = _write_modelfile(config, model)
    size = sum(path.stat().st_size for path in out.rglob("*")) if out.is_dir() else out.stat().st_size
    return ExportReport(
        config.adapter, model.base.name, config.to, config.out, size, len(adapter.layers) if adapter else 0,
        whole.file_type if whole else "", modelfile, weights._asdict() if weights else None,
        asdict(proof) if proof else None, log.messages,
    )  # fmt: skip


def _prepare(config: ExportConfig, log: EventLog) -> tuple[Model, Adapter | None, WholeModel | None]:
    """Open everything and check all that can be wrong."""
    problems = Problems(config.problems)
    log.stage("reading the base and the adapter")
    if not config.adapter and not (config.merged and config.base):
        problems.add("no adapter is given: name an adapter folder or a run folder, as in: thimble export runs/mine-1")
    paths = [config.adapter] if config.adapter else []
    model, adapters = model_with_adapters(config.base, paths, problems, log)
    adapter, whole = adapters.get(config.adapter), None
    if model and not model.base.is_own:
        if adapter:  # else merging it would be the advice, which is refused too
            problems.attempt(check_is_of_layers, config.adapter, adapter)
        problems.required()
        problems.attempt(_check_own, config, model)
        problems.required()
    if adapter and config.approximate_rank and not adapter.has_magnitudes:
        problems.add(f"--approximate-rank is for DoRA, and {config.adapter} is plain LoRA: leave it out")
    if adapter and config.to == "gguf" and not config.merged and not config.approximate_rank:
        problems.attempt(check_exportable, config.adapter, adapter)
    file_type = problems.attempt(_file_type, config) if config.merged else None
    if model and file_type and (adapter or not paths):
        whole = problems.attempt(WholeModel.of, model, adapter, file_type)
    problems.attempt(_check_out, config, whole)
    (model,) = problems.required(model)
    if adapter and config.approximate_rank:
        adapter = _without_magnitudes(adapter, model, config.approximate_rank, log)
    return model, adapter, whole


def _check_own(config: ExportConfig, model: Model) -> None:
    """Refuse to write a GGUF of a family whose names and layout there are not known here."""
    adapter, base = as_word(config.adapter or "ADAPTER"), as_word(str(model.base.path))
    merged = f"write a merged folder with thimble merge {adapter} --base {base} --out merged"
    model.base.check_own(
        "thimble export --to gguf" if config.to == "gguf" else "thimble export",
        f"{merged}, of which llama.cpp's own convert_hf_to_gguf.py makes a GGUF file"
        if config.to == "gguf"
        else merged,
    )


def _without_magnitudes(adapter: Adapter, model: Model, rank: int, log: EventLog) -> Adapter:
    """A plain adapter in the place of a DoRA one, with what that costs told."""
    log.stage("approximating DoRA by plain LoRA")
    number = len(adapter.layers)
    plain, errors = without_magnitudes(adapter, model.base, rank, lambda done: log.progress("layers", done, number))
    worst = max(errors, key=lambda layer: errors[layer])
    middle = sorted(errors.values())[len(errors) // 2]
    log.warning(
        f"DoRA: approximated by plain LoRA of rank {rank}, which leaves out {middle:.1%} of what the adapter changes "
        f"in the middle layer, and {errors[worst]:.1%} in {worst}; measure it with thimble evaluate before you use it"
    )
    return plain


def _file_type(config: ExportConfig) -> str:
    if not config.type:
        raise ConfigError(f"--merged needs a type: add --type with one of {listing(FILE_TYPES, 20)}")
    name = config.type.upper()  # as llama.cpp takes it
    check_file_type(name)
    return name


def _check_out(config: ExportConfig, whole: WholeModel | None) -> None:
    example = f"{'model' if config.merged else 'adapter'}{'.gguf' if config.to == 'gguf' else ''}"
    if not config.out:
        raise ConfigError(f"no out is given: name what to write, such as --out {example}")
    path = Path(config.out)
    if config.to == "peft":
        check_new_folder(path, 0)
    elif config.out.endswith("/"):
        raise ConfigError(f"--out {config.out} is a folder: name a file in it, such as {config.out}{example}")
    elif config.verify_only:
        if not path.is_file():
            raise ConfigError(f"--out {path} is no file: with --verify-only name the GGUF file to prove again")
    elif path.exists():
        raise ConfigError(f"--out {path} exists: name another file, or prove that one again with --verify-only")
    elif not path.parent.is_dir():
        raise ConfigError(f"--out {path}: there is no folder {path.parent}")
    elif whole:
        check_room(path, whole.size_bytes)


def _is_proved(config: ExportConfig, model: Model, log: EventLog) -> bool:
    """Whether a proof is made; if it could be and is not, say how."""
    if config.to != "gguf" or (config.proof == "never" and not config.verify_only):
        return False
    if model.base.metadata is None and not config.merged:
        why = f": {model.base.name} is a folder, and llama.cpp reads GGUF files: name one of the same model with --base"
    elif not is_installed():
        why = f", which is not installed: {install_line('llamacpp')}, then run this again with --verify-only"
    else:
        return True
    if config.proof == "always" or config.verify_only:
        raise ConfigError(f"not proved in llama.cpp{why}")
    log.warning(f"not proved in llama.cpp{why}")
    return False


def _rows(config: ExportConfig, model: Model, log: EventLog) -> list[Row]:
    """Text for the proof: the user's own if it can be found, else general text."""
    if config.data:
        options = TrainConfig.build({"data": config.data})
        dataset = open_data(options)
        return list(encode_examples(dataset, (), dataset.valid or dataset.train, model, options, log).valid)
    found = _rows_of_run(config, model, log)
    if found:
        train, valid = found
        rows = [*valid, *train][:MOST_ROWS] if len(valid) < FEW_ROWS else valid
        log.note(f"proved on {plural(min(len(rows), MOST_ROWS), 'row')} of the run's data, validation rows first")
        return rows
    log.note("proved on general text: name your own with --data")
    return list(general_rows(model, TrainConfig.build({})))


def _training_rows(config: ExportConfig, model: Model, log: EventLog) -> list[Row]:
    """Rows that the user trains on: of --data, or of the run; none if neither is known."""
    if config.data:
        options = TrainConfig.build({"data": config.data})
        dataset = open_data(options)
        return list(encode_examples(dataset, (), dataset.train, model, options, log).valid)
    found = _rows_of_run(config, model, log)
    return found[0] if found else []


def _rows_of_run(config: ExportConfig, model: Model, log: EventLog) -> tuple[list[Row], list[Row]] | None:
    """Training and validation rows of the run folder that was named; None if it is none, or its data are gone."""
    run = Path(config.adapter)
    if not config.adapter or not (run / CONFIG_FILE).is_file():
        return None
    options = build_config(TrainConfig, {}, str(run / CONFIG_FILE))
    try:
        found = split_and_encode(open_data(options), model, options, log)
    except InputError as error:
        log.note(f"the data of the run cannot be read ({error.problems[0]})")
        return None
    return list(found.train), list(found.valid)


def _write(
    config: ExportConfig,
    model: Model,
    adapter: Adapter | None,
    whole: WholeModel | None,
    rows: list[Row],
    log: EventLog,
) -> tuple[WeightsCheck | None, Proof | ModelProof | None]:
    """Write the file and give it its name only when it is proved; with --verify-only prove the one that is there."""
    out = Path(config.out)
    unproved = out if config.verify_only else out.with_name(f".{out.name}.unproved")
    weights: WeightsCheck | None = None
    proof: Proof | ModelProof | None = None
    try:
        if whole:
            importance = _importance(config, whole, log)
            if not config.verify_only:
                write_model(whole, unproved, importance, log)
            weights = check_model(whole, unproved, out, importance, log)
            proof = prove_whole(whole, weights, unproved, out, rows, log) if rows else None
            tell_loss(whole, config.adapter, weights, proof, log)
        elif adapter:
            if not config.verify_only:
                log.stage("writing the adapter")
                write_gguf_adapter(adapter, model.base, unproved)
            proof = prove_adapter(adapter, config.adapter, model, unproved, out, rows, log) if rows else None
        os.replace(unproved, out)
    except BaseException:
        if not config.verify_only:
            unproved.unlink(missing_ok=True)
        raise
    if proof:
        write_atomic(out.with_name(out.name + PROOF), [json.dumps(asdict(proof), indent=2).encode() + b"\n"])
    sync(out.parent)
    return weights, proof


def _importance(config: ExportConfig, whole: WholeModel, log: EventLog) -> Importance | None:
    """What rounding errors are weighed by: measured with --imatrix, and again for a file that was written so."""
    if not config.imatrix and not (config.verify_only and has_importance(Path(config.out))):
        return None
    rows = _training_rows(config, whole.model, log)
    if not rows:
        raise ConfigError("--imatrix needs examples: name some with --data, or export the run folder of an adapter")
    return measure_importance(whole, rows, log)


def _write_modelfile(config: ExportConfig, model: Model) -> str:
    """Write a Modelfile beside a new GGUF, if there is none and the base is a file too; its name."""
    out = Path(config.out)
    path = out.with_name(out.name + MODELFILE)
    if config.verify_only or (not config.merged and model.base.metadata is None) or path.exists():
        return ""
    name, base = f"./{out.name}", str(model.base.path.absolute())
    text = modelfile(model, name) if config.merged else modelfile(model, base, name)
    write_atomic(path, [text.encode()])
    return str(path)
