"""`thimble export`: an adapter in the format of another program, and the proof that it does there what it does here."""

import json
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from thimble.backends.open import open_session
from thimble.config.export import ExportConfig
from thimble.config.sources import CONFIG_FILE, build_config
from thimble.config.train import TrainConfig
from thimble.core.adapter import Adapter
from thimble.data.encode import Row
from thimble.data.examples import encode_examples, general_rows, open_data, split_and_encode
from thimble.data.model import Model, model_with_adapters
from thimble.errors import ConfigError, InputError, Problems, RunError, install_line, plural
from thimble.events import EventLog, OnEvent, ignore
from thimble.exports.gguf_adapter import check_exportable, write_gguf_adapter
from thimble.exports.llamacpp import is_installed
from thimble.exports.proof import MOST_ROWS, Proof, prove
from thimble.files.atomic import sync, write_atomic
from thimble.files.peft import save_adapter
from thimble.models.dora import without_magnitudes
from thimble.report.card import derived_card
from thimble.training.card import about_adapter, write_card
from thimble.training.run_folder import atomic_folder, check_new_folder

FEW_ROWS = 5  # if fewer are held out, training rows serve too: whether it is the same is asked, not how good it is
PROOF = ".proof.json"  # behind the name of the file


@dataclass
class ExportReport:
    """What was written, and whether it does what the adapter does.

    Attributes:
        adapter: What the user named.
        base: Name of the base.
        to: The format.
        out: What was written.
        size_bytes: Of that file or folder.
        layers: How many layers it adapts.
        proof: What was compared in the runtime; None without a proof.
        messages: Decisions, notes and warnings, in order.
    """

    adapter: str
    base: str
    to: str
    out: str
    size_bytes: int
    layers: int
    proof: dict[str, Any] | None
    messages: dict[str, list[str]]


def export(config: ExportConfig, on_event: OnEvent = ignore) -> ExportReport:
    """Write an adapter for another program; a RunError if the proof fails, in which case nothing stays in --out."""
    log = EventLog(on_event)
    model, adapter = _prepare(config, log)
    out, proof = Path(config.out), None
    rows = _rows(config, model, log) if _is_proved(config, model, log) else []
    if config.to == "peft":
        with atomic_folder(out) as folder:
            save_adapter(adapter, folder)
            facts = [("made from", f"{Path(config.adapter).name}, {len(adapter.layers)} layers")]
            write_card(folder, derived_card(about_adapter(adapter, model.base), "export", config, facts))
    elif config.verify_only:
        proof = _proved(config, model, adapter, rows, out, log)
    else:
        proof = _write_gguf(config, model, adapter, rows, log)
    size = sum(path.stat().st_size for path in out.rglob("*")) if out.is_dir() else out.stat().st_size
    return ExportReport(
        config.adapter, model.base.name, config.to, config.out, size, len(adapter.layers),
        asdict(proof) if proof else None, log.messages,
    )  # fmt: skip


def _prepare(config: ExportConfig, log: EventLog) -> tuple[Model, Adapter]:
    """Open everything and check all that can be wrong."""
    problems = Problems(config.problems)
    log.stage("reading the base and the adapter")
    if not config.adapter:
        problems.add("no adapter is given: name an adapter folder or a run folder, as in: thimble export runs/mine-1")
    paths = [config.adapter] if config.adapter else []
    model, adapters = model_with_adapters(config.base, paths, problems, log)
    for name, adapter in adapters.items():
        if config.approximate_rank and not adapter.has_magnitudes:
            problems.add(f"--approximate-rank is for DoRA, and {name} is plain LoRA: leave it out")
        if config.to == "gguf" and not config.approximate_rank:
            problems.attempt(check_exportable, name, adapter)
    problems.attempt(_check_out, config)
    (model,) = problems.required(model)
    adapter = adapters[config.adapter]
    return model, _without_magnitudes(
        adapter, model, config.approximate_rank, log
    ) if config.approximate_rank else adapter


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


def _check_out(config: ExportConfig) -> None:
    suffix = ".gguf" if config.to == "gguf" else ""
    if not config.out:
        raise ConfigError(f"no out is given: name what to write, such as --out adapter{suffix}")
    path = Path(config.out)
    if config.to == "peft":
        check_new_folder(path, 0)
    elif config.verify_only:
        if not path.is_file():
            raise ConfigError(f"--out {path} is no file: with --verify-only name the GGUF adapter to prove again")
    elif path.exists():
        raise ConfigError(f"--out {path} exists: name another file, or prove that one again with --verify-only")
    elif not path.parent.is_dir():
        raise ConfigError(f"--out {path}: there is no folder {path.parent}")


def _is_proved(config: ExportConfig, model: Model, log: EventLog) -> bool:
    """Whether a proof is made; if it could be and is not, say how."""
    if config.to != "gguf" or (config.proof == "never" and not config.verify_only):
        return False
    if model.base.metadata is None:
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
    run = Path(config.adapter)
    if (run / CONFIG_FILE).is_file():
        options = build_config(TrainConfig, {}, str(run / CONFIG_FILE))
        try:
            found = split_and_encode(open_data(options), model, options, log)
            rows = [*found.valid, *found.train][:MOST_ROWS] if len(found.valid) < FEW_ROWS else list(found.valid)
            log.note(f"proved on {plural(min(len(rows), MOST_ROWS), 'row')} of {options.data}, validation rows first")
            return rows
        except InputError as error:
            log.note(f"the data of the run cannot be read ({error.problems[0]})")
    log.note("proved on general text: name your own with --data")
    return list(general_rows(model, TrainConfig.build({})))


def _write_gguf(config: ExportConfig, model: Model, adapter: Adapter, rows: list[Row], log: EventLog) -> Proof | None:
    """Write the file, and give it its name only when it is proved."""
    out = Path(config.out)
    unproved = out.with_name(f".{out.name}.tmp")
    try:
        log.stage("writing the adapter")
        write_gguf_adapter(adapter, model.base, unproved)
        proof = _proved(config, model, adapter, rows, unproved, log) if rows else None
        os.replace(unproved, out)
    except BaseException:
        unproved.unlink(missing_ok=True)
        raise
    sync(out.parent)
    return proof


def _proved(config: ExportConfig, model: Model, adapter: Adapter, rows: list[Row], file: Path, log: EventLog) -> Proof:
    """Compare, and keep what was found beside --out; a RunError if it does not hold."""
    from thimble.backends.torch.threads import num_cores

    log.stage("proving it in llama.cpp")
    session, out = open_session(model, "fp32", "file"), Path(config.out)
    on_row = partial(log.progress, "rows compared")
    try:
        proof = prove(adapter, model.base, session, file, rows, num_cores(), on_row)
    except RuntimeError as error:
        raise RunError(f"llama.cpp cannot use {out}: {error}") from None
    if not proof.holds:
        raise RunError(
            f"{out} does not do in llama.cpp what {config.adapter} does here: log-probabilities differ by "
            f"{proof.adapter_difference:.4f} nats, those of the bare base by {proof.base_difference:.4f}, and the "
            f"effect of the adapter there is {proof.effect_there:.2f} times what it is here"
        )
    if not proof.is_visible:
        log.warning("the adapter moves probabilities by less than the runtime's own noise: the proof says little")
    write_atomic(out.with_name(out.name + PROOF), [json.dumps(asdict(proof), indent=2).encode() + b"\n"])
    return proof
