"""The options of `thimble train` and `thimble plan`, and which of them a run that is resumed may change."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from thimble.config import values
from thimble.config.groups import (
    COLUMNS,
    LENGTHS,
    TASKS,
    AdapterOptions,
    ComputeOptions,
    InitOptions,
    OptimiserOptions,
    RunOptions,
    SplitOptions,
    TaskOptions,
    ValidationOptions,
)
from thimble.config.options import Field, Given, Options, is_switch, option, options_of, typed
from thimble.config.values import AUTO, as_typed
from thimble.core.method import Init, parse_init
from thimble.errors import listing


@dataclass(frozen=True)
class TrainConfig(
    RunOptions,
    ValidationOptions,
    OptimiserOptions,
    InitOptions,
    AdapterOptions,
    ComputeOptions,
    TaskOptions,
    SplitOptions,
):
    """The options of `thimble train`."""


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """The options of `thimble plan`: those of train, and the machine to plan for."""

    group: ClassVar[str] = "machine"

    machine: tuple[str, ...] = option((), "Plan for a machine that is not this one, such as cores=4,memory=8GB. Its "
        "memory is counted as exactly; its speed is that of this processor for so many cores, an estimate.",
        check=values.machine, metavar="cores=N,memory=SIZE")  # fmt: skip


KL_OPTIONS = ("keep_general", "keep_general_on", "keep_general_every_steps")

# Options that make a run what it is: a run that is resumed keeps them as it began. (Base and data are known by their
# hashes, so that they may lie elsewhere.)
FIXED = (
    *COLUMNS, "loss_on", "seq_len", "batch_tokens", "seed", "targets", "target_parameters", "rank", "rank_pattern",
    "alpha", "alpha_pattern", "strength", "use_rslora", "use_dora", "init", "freeze_a", "dropout", *KL_OPTIONS,
    "valid_split", "store", "task", "train_also", "batch_rows", "class_weights", "image_size", "augment", "max_seconds",
    "language",
)  # fmt: skip

# What runs did before there was an option for it: a config.yaml without it is of such a run.
BEFORE: Mapping[str, Any] = {"adam_beta2": 0.999, "keep_general_on": "general", "keep_general_every_steps": 1}

# Options that say nothing for some tasks: given there, they are refused.
ONLY_FOR: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("train_also", "batch_rows"), TASKS[1:]),
    "class_weights": ("classify-text", "classify-image", "classify-audio"),
    **dict.fromkeys(("image_size", "augment"), ("classify-image",)),
    "max_seconds": ("classify-audio", "transcribe"),
    "language": ("transcribe",),
    "seq_len": ("text", "classify-text", "embed"),
    "max_new_tokens": ("text", "transcribe"),
    **dict.fromkeys(
        ("prompt_template", "text_column", "loss_on", "batch_tokens", "remeasure", "metric", "eval_rows", "rank_budget",
         "energy", "energy_of", "explain", *KL_OPTIONS, "strength", "system", "temperature", "top_p", "top_k", "min_p",
         "decode"), ("text",),
    ),
}  # fmt: skip


def misplaced(config: TrainConfig, task: str) -> list[str]:
    """A problem for each option that was given and says nothing for a task."""
    problems = unused(config, task)
    if task != "text" and config.rank is None:
        problems.append(f"--rank auto: only for text; name a rank for --task {task}")
    return problems + (_misplaced_init(config, parse_init(config.init)) if task != "text" else [])


def unused(config: Options, task: str) -> list[str]:
    """A problem for each option of any command that was given and says nothing for a task."""
    specs = options_of(type(config))
    given = {
        name: value for name in ONLY_FOR if name in specs and (value := getattr(config, name)) != specs[name].default
    }
    problems = [
        f"{typed(specs[name], value)}: says nothing for --task {task}, only for {listing(ONLY_FOR[name], 9)}; leave it "
        "out"
        for name, value in given.items()
        if task not in ONLY_FOR[name]
    ]
    compute, store = getattr(config, "compute", AUTO), getattr(config, "store", AUTO)
    if task != "text" and compute not in (AUTO, "fp32"):
        problems.append(f"--compute {compute}: only for text; modules of other tasks are computed in fp32")
    if task != "text" and store == "file":
        problems.append("--store file: only for text; modules of other tasks are kept as float32 (dense) or int8")
    return problems


def _misplaced_init(config: TrainConfig, init: Init) -> list[str]:
    """What an init needs that modules of other tasks than text do not have."""
    if init.needs == "adapter":
        return [f"--init {init}: only for text; a module begins with an adapter in Python, by thimble.attach"]
    if init.uses_general_text:
        return [f"--init {init}: is found on general text, which only text reads; take --init corda"]
    if init.needs == "quantised" and config.store != "int8":
        return [f"--init {init}: is made from what quantising loses, and nothing is quantised: add --store int8"]
    return []


def of_run(saved: Mapping[str, Given]) -> dict[str, Given]:
    """The options in a run's config.yaml, complete: a run of an earlier release goes on as it began."""
    found = {**{name: Given(value, name) for name, value in BEFORE.items()}, **saved}
    if "store" in found and found["store"].value == AUTO:  # as releases left it for other tasks than text
        found["store"] = found["store"]._replace(value="dense")
    return found


def layered(below: Mapping[str, Given], above: Mapping[str, Given]) -> dict[str, Given]:
    """Lay options over others; a length of the run replaces whatever length lies below it."""
    has_length = any(name in above and above[name].value is not None for name in LENGTHS)
    return {**{name: value for name, value in below.items() if not (has_length and name in LENGTHS)}, **above}


def take_up(saved: Mapping[str, Given], given: Mapping[str, Given]) -> tuple[dict[str, Given], list[str]]:
    """Join the options in a run's config.yaml (`auto` resolved) with those given now; with a problem for each change
    that would make it another run. One that is given as auto is what it was resolved to.
    """
    kept = {name: value for name, value in given.items() if not (value.value == AUTO and name in saved)}
    unused = [name for name in ("rank_budget", "energy") if name not in saved or not saved[name].value]
    kept = {name: value for name, value in kept.items() if name not in unused}
    joined = layered(saved, kept)
    before, now, specs = TrainConfig.make(saved), TrainConfig.make(joined), options_of(TrainConfig)
    changed = (name for name in FIXED if name in kept and getattr(now, name) != getattr(before, name))
    return joined, [
        f"{typed(specs[name], getattr(now, name))}: the run to resume began with "
        f"{_value_as_typed(specs[name], getattr(before, name))}; leave it out, or begin another run with another --out"
        for name in changed
    ]


def _value_as_typed(spec: Field, value: object) -> str:
    """A value as it is typed behind its option; of a switch, which has none, the option."""
    return typed(spec, value) if is_switch(spec) else as_typed(value)
