"""A run folder that was moved: what it was made of and is not found any more, and whether a finished run is of that."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from thimble.config.groups import LENGTHS
from thimble.config.options import options_of
from thimble.config.paths import exists, path_in
from thimble.config.train import TrainConfig
from thimble.config.values import as_typed, flag
from thimble.data.examples import open_data
from thimble.data.model import find_base, find_module_base
from thimble.errors import ConfigError, as_word, listing
from thimble.events import EventLog
from thimble.training.checkpoint import saved_origin
from thimble.training.run_folder import hash_file, read_config, read_json
from thimble.training.task_choice import TEXT
from thimble.training.tasks.kinds import KINDS

# Options that a run may go on with otherwise than it began, and then ends otherwise.
CHANGING = (
    "learning_rate", "schedule", "warmup_steps", "weight_decay", "adam_beta2", "lora_plus", "max_grad_norm", "patience",
    "eval_every_steps",
)  # fmt: skip
PARTS = ("data", "base", "metric")  # what a run that goes on reads, beside its folder


def missing_parts(config: TrainConfig) -> dict[str, str]:
    """What a run to be resumed was made of and is not found, by option, with what to type then."""
    saved, specs = read_config(Path(config.out)) if config.resume and config.out else {}, options_of(TrainConfig)
    lost = {}
    for name in PARTS:
        value = getattr(config, name)
        path = path_in(specs[name], value)
        if path and saved.get(name) == value and not exists(path) and (name != "base" or _is_path(path)):
            lost[name] = path
    words = []
    for name in lost:
        word = as_word("PATH/TO/" + Path(str(getattr(config, name))).name)
        words.append(word if name == "data" else f"--{name} {word}")
    what = " and ".join(f"the {name} {path}" for name, path in lost.items())
    problem = (
        f"the run in {config.out} began with {what}: not there now, nor beside the run folder. It may lie anywhere: "
        f"thimble train {' '.join(words)} --out {as_word(str(config.out))} --resume"
    )
    return dict.fromkeys(lost, problem)


def log_new_places(config: TrainConfig, log: EventLog) -> None:
    """Say where the base and the data of a run that goes on lie now; that they are the same is known by then."""
    saved = read_config(Path(config.out)) if config.resume and config.out else {}
    for name in PARTS:
        was, now = saved.get(name), getattr(config, name)
        if was and now and os.path.abspath(was) != os.path.abspath(now):
            log.note(f"{name}: {was} when the run began, {now} now")


def log_changed_options(config: TrainConfig, log: EventLog) -> None:
    """Say which options of a run that goes on are others than it began with, so that it ends otherwise."""
    saved = read_config(Path(config.out)) if config.resume and config.out else {}
    names = [name for name in CHANGING if name in saved and getattr(config, name) != saved[name]]
    if any(saved.get(name) for name in LENGTHS):
        names += [name for name in LENGTHS if getattr(config, name) and getattr(config, name) != saved.get(name)]
    for name in names:
        began = f"began with {as_typed(saved[name])}" if saved.get(name) is not None else "began without"
        log.warning(
            f"{flag(name)} is {as_typed(getattr(config, name))}, and the run {began}: it counts from here on, and the "
            "run does not end as it would have"
        )


def _is_path(base: str) -> bool:
    """Whether a base that is not there was a path, and not the name of a hub model."""
    return os.path.isabs(base) or base.endswith(".gguf") or len(base.split("/")) != 2


def check_finished(config: TrainConfig, folder: Path) -> None:
    """Refuse another base, other data or another length, named to resume a run that has ended."""
    saved, manifest = read_config(folder), read_json(folder / "manifest.json") or {}
    _check_length(config, saved, folder)
    wrong = []
    task = str(saved.get("task", TEXT))
    if saved and config.base != saved.get("base") and (expected := manifest.get("base", {}).get("sha256")):
        base = find_module_base(config.base, task) if task in KINDS else find_base(config.base)
        wrong += [] if base.fingerprint() == expected else [f"--base {config.base}"]
    if saved and config.data != saved.get("data") and not _is_of_these_data(config, task, folder, manifest):
        wrong.append(f"DATA {config.data}")
    if wrong:
        raise ConfigError(
            f"{listing(wrong)}: the run in {folder}, which has ended, was made with others, "
            f"{saved.get('data')} and {saved.get('base') or 'the default base'}; leave it out, or begin another run "
            "with another --out"
        )


def _is_of_these_data(config: TrainConfig, task: str, folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a run that has ended was made of the data that are named now; so it is if nothing is known of its own."""
    if task in KINDS:
        began = saved_origin(folder)
        return not began or KINDS[task].open_rows(config).digest == began["data"]
    expected = manifest.get("data")
    return not expected or sorted(map(hash_file, open_data(config).files)) == sorted(expected.values())


def _check_length(config: TrainConfig, saved: Mapping[str, Any], folder: Path) -> None:
    """Refuse a length that a run which has ended did not have: its rates were those of its own."""
    wanted, had = ({name: of(name) for name in LENGTHS if of(name)} for of in (partial(getattr, config), saved.get))
    if had and wanted != had:
        typed = [
            " ".join(f"{flag(name)} {as_typed(value)}" for name, value in given.items()) for given in (wanted, had)
        ]
        raise ConfigError(
            f"{typed[0]}: the run in {folder} has ended, and it had {typed[1]}; leave the length out, or go on "
            f"from what it learned in another run: --init adapter:{as_word(str(folder))} with another --out"
        )
