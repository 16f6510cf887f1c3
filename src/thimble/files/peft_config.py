"""What `adapter_config.json` says of an adapter, checked before a tensor is read.

The file comes from anybody. What changes the function of the adapter is understood or refused by name; every other
field is ignored. Nothing that it names is imported, and of its regular expressions only those are run that cannot be
made to run forever.
"""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from thimble.core.lowrank import scale
from thimble.core.method import MOST_SCALE
from thimble.errors import AdapterError
from thimble.files.untrusted import read_json_object, shown, some

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MOST_BYTES = 1 << 20
MAX_RANK = 2048  # twice the largest anybody trains: a delta form is kept as one adapter of twice the rank
MOST_ALPHA = MOST_SCALE * MAX_RANK
MOST_ENTRIES = 20_000  # of a pattern
MOST_SHAPES = 500  # of keys of a pattern: models have some dozens
MOST_EXPRESSIONS, MOST_EXPRESSION_CHARACTERS = 20, 200  # among the keys of a pattern that are no names
MOST_REPEATS = 3  # signs in an expression of how often a part comes: trying takes as many loops over a path
MOST_WAYS = 4  # of these, and of brackets if there is a choice: all choices in them are tried with all others
MOST_TRIED_CHARACTERS = 128  # of such a path
MOST_PATH_CHARACTERS = 1024

# Fields of PEFT with which an adapter computes something else than scale · B A; unset or empty they mean nothing.
_NOT_SUPPORTED = (
    "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "trainable_token_indices", "layer_replication",
    "megatron_config", "arrow_config", "velora_config", "kasa_config", "monteclora_config",
)  # fmt: skip
_UNSET: tuple[Any, ...] = (None, False, "none", [], {})
# Starts that leave the base as it is. With the others (PiSSA, OLoRA, CorDA, LoftQ, ...) PEFT changes the base too.
_KEEPS_BASE: tuple[Any, ...] = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
# What PEFT can write into the weights of a base, whereupon it is a base without an adapter.
_MERGEABLE = ("lora_bias", "trainable_token_indices")
_MERGED = "if PEFT can merge it (merge_and_unload, then save_pretrained), what it writes is a folder for --base"
# Other kinds of adapters that change no weights: what they learned is put before the prompt, or beside attention.
_OF_PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT",
               "CARTRIDGE")  # fmt: skip
BIASES = ("none", "all", "lora_only")
_CONTROL = re.compile("[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f-\\x9f]")  # but for tabs and ends of lines
MODEL_CLASS, PARENT_LIBRARY = "base_model_class", "parent_library"  # of auto_mapping
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_LITERAL = re.compile(r"\\[^1-9]|\[\^?\]?(\\.|[^\]\\])*\]|\(\?[:=!]")  # characters and sets, and how brackets begin
_REPEATED = re.compile(r".[*+?{]")  # a part, or the bracket that ends it, and how often it comes
_NAME = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]*")


class Shape(NamedTuple):
    """What keys have in common that are looked up together."""

    place: str  # where in a path they match: `whole`, `end` (of whole names) or `tail`
    size: int  # characters
    any_at: tuple[int, ...]  # where any character will do


class Pattern:
    """Numbers of some layers, from `rank_pattern` or `alpha_pattern`.

    PEFT reads each key as a regular expression for the end of a path (`get_pattern_key`), and the first that matches
    counts. Keys that are names, with or without the marks that people put around them (`^`, `.*`, `$`, `\\.`), are
    looked up to the same effect, so a dot stands for any character; others are tried one by one, and those that cannot
    be read are kept in `unread`.
    """

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self._shapes: dict[Shape, dict[str, tuple[int, Any]]] = {}
        self._others: list[tuple[re.Pattern[str], tuple[int, Any]]] = []
        self.unread: dict[str, Any] = {}
        for number, (key, value) in enumerate(entries.items()):
            shape, text = _parsed(key)
            if not text or (shape not in self._shapes and len(self._shapes) == MOST_SHAPES):
                expression = _expression(key) if len(self._others) < MOST_EXPRESSIONS else None
                if expression:
                    self._others.append((expression, (number, value)))
                else:
                    self.unread[key] = value
            else:
                self._shapes.setdefault(shape, {}).setdefault(text, (number, value))

    def of(self, layer: str, default: Any) -> Any:
        """The number of the first entry that names this layer, or the default."""
        found = [keys.get(_seen(layer, shape)) for shape, keys in self._shapes.items()]
        found += self._matching(layer)
        return min((entry for entry in found if entry), default=(0, default), key=lambda entry: entry[0])[1]

    def _matching(self, layer: str) -> list[tuple[int, Any]]:
        """The entries whose regular expression matches a path, or its end behind a dot."""
        if self._others and len(layer) > MOST_TRIED_CHARACTERS:
            raise AdapterError(
                f"layer {shown(layer)} has more than {MOST_TRIED_CHARACTERS} characters, with which regular "
                "expressions are not tried: write out the names of the layers in rank_pattern and alpha_pattern"
            )
        starts = [0, *(place + 1 for place, letter in enumerate(layer) if letter == ".")]
        return [entry for pattern, entry in self._others if any(pattern.fullmatch(layer, start) for start in starts)]


def _expression(key: str) -> re.Pattern[str] | None:
    """A key as a regular expression; None if it is none, or if trying it could take long: no brackets may come many
    times, and few other parts; and nothing may change how the rest is read (`(?x:`, `(?#`).
    """
    bare = _LITERAL.sub("a", key)
    repeated = _REPEATED.findall(bare)
    ways = len(repeated) + bare.count(")") * ("|" in bare)
    is_short = len(key) <= MOST_EXPRESSION_CHARACTERS and len(repeated) <= MOST_REPEATS and ways <= MOST_WAYS
    if not is_short or "\\" in bare or "(?" in bare or any(part[0] == ")" and part != ")?" for part in repeated):
        return None
    with contextlib.suppress(re.error):
        return re.compile(f"(?:{key})")
    return None


def _parsed(key: str) -> tuple[Shape, str]:
    """The shape of a key and what it says, or nothing if it is no name."""
    text = key.removeprefix("^").removesuffix("$")
    is_tail = text.startswith(".*")
    text = text[2:] if is_tail else text
    plain = text.replace("\\.", ".")
    if not _NAME.fullmatch(plain.removeprefix(".") if is_tail else plain):
        return Shape("", 0, ()), ""
    marked = text.replace("\\.", "/")  # no name has a slash
    any_at = tuple(place for place, mark in enumerate(marked) if mark == ".")
    return Shape("tail" if is_tail else "whole" if key.startswith("^") else "end", len(plain), any_at), plain


def _seen(layer: str, shape: Shape) -> str:
    """What keys of a shape see of a path: dots where any character will do; nothing where they cannot match."""
    before, end = layer[: len(layer) - shape.size], layer[-shape.size :]
    can_match = shape.place == "tail" or not before or (shape.place == "end" and before.endswith("."))
    if len(end) < shape.size or not can_match:
        return ""
    letters = list(end)
    for place in shape.any_at:
        letters[place] = "."
    return "".join(letters)


def pattern_of(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """The pattern that gives layers their numbers, by path, where `usual` is that of all others.

    Paths are its keys; if one of them would match another layer too, all are bound to begin and end where they do.
    """
    found = {path: value for path, value in values.items() if value != usual}
    pattern = Pattern(found)
    if all(pattern.of(path, usual) == value for path, value in values.items()):
        return found
    return {"^" + path.replace(".", "\\.") + "$": value for path, value in found.items()}


@dataclass(frozen=True)
class AdapterConfig:
    """What is needed of an adapter's config."""

    base: str  # name or path of the base it was trained on, for people; may be empty
    rank: int  # of the layers that no pattern names
    alpha: float  # scale numerator, likewise
    use_dora: bool  # whether each layer has a magnitude vector
    use_rslora: bool  # whether alpha is divided by √rank
    ranks: Pattern  # ranks of some layers
    alphas: Pattern  # alphas of some layers
    bias: str = "none"  # which biases were trained: none, all, or those of adapted layers (lora_only)
    modules_to_save: tuple[str, ...] = ()  # ends of paths of modules that were trained whole
    fan_in_fan_out: bool = False  # whether weights of layers lie as (in, out)
    task_type: str | None = None  # which class of PEFT opens it, for PEFT
    auto_mapping: Mapping[str, str] | None = None  # without that, the class of the model that was trained
    target_parameters: tuple[str, ...] = ()  # adapted parameters that are no layer's weight: names, or ends of them

    def allowed_ranks(self, layer: str) -> set[int]:
        """The rank a layer must have; with keys that are regular expressions, theirs too."""
        return {self.ranks.of(layer, self.rank), *self.ranks.unread.values()}

    def scale(self, layer: str, rank: int) -> float:
        """The factor of B A that PEFT would compute."""
        return scale(float(self.alphas.of(layer, self.alpha)), rank, self.use_rslora)


def read_adapter_config(path: Path) -> AdapterConfig:
    """Read and check an adapter's config; the AdapterError names every problem found."""
    config = read_json_object(path, MOST_BYTES, AdapterError)
    checks = (_check_numbers, _check_patterns, _check_function, _check_whole, _check_texts)
    problems = [problem for check in checks for problem in check(config)]
    if problems:
        raise AdapterError(*(f"{path}: {problem}" for problem in some(problems)))
    base = config.get("base_model_name_or_path") or ""
    flags = (bool(config.get(name)) for name in ("use_dora", "use_rslora"))
    patterns = (Pattern(config.get(name) or {}) for name in ("rank_pattern", "alpha_pattern"))
    whole = (config.get("bias") or "none", tuple(config.get("modules_to_save") or ()))
    is_turned, task = bool(config.get("fan_in_fan_out")), config.get("task_type")
    task = task if isinstance(task, str) and re.fullmatch("[A-Z0-9_]{1,40}", task) else None
    return AdapterConfig(
        base, config["r"], float(config["lora_alpha"]), *flags, *patterns, *whole, is_turned, task,
        _auto_mapping(config.get("auto_mapping")), tuple(config.get("target_parameters") or ()),
    )  # fmt: skip


def _instead_of(kind: Any) -> str:
    """What to do with an adapter of another kind."""
    if not isinstance(kind, str):
        return ""
    return "; it changes no weights: train a LoRA instead" if kind in _OF_PROMPTS else f"; {_MERGED}"


def _auto_mapping(value: Any) -> Mapping[str, str] | None:
    """The class that was trained and the module that defines it, as names alone: nothing that they name is imported."""
    if not isinstance(value, dict) or {*value} != {MODEL_CLASS, PARENT_LIBRARY}:
        return None
    is_named = all(isinstance(name, str) and len(name) <= 200 and _DOTTED.fullmatch(name) for name in value.values())
    return value if is_named else None


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= MOST_ALPHA


def _is_switch(value: Any) -> bool:
    return value in (None, True, False)


_RANKS, _ALPHAS = f"a whole number from 1 to {MAX_RANK:,}", f"a number above 0, up to {MOST_ALPHA:,.0f}"


def _check_numbers(config: Mapping[str, Any]) -> list[str]:
    checks = [("r", _is_rank, _RANKS), ("lora_alpha", _is_alpha, _ALPHAS)]
    checks += [(name, _is_switch, "true or false") for name in ("use_dora", "use_rslora", "fan_in_fan_out")]
    if config.get("peft_type") != "LORA":  # other kinds do not have all of these
        checks = [check for check in checks if check[0] in config]
    wrong = [(name, expected) for name, is_valid, expected in checks if not is_valid(config.get(name))]
    return [f"{name} is {shown(config.get(name))}: expected {expected}" for name, expected in wrong]


def _check_patterns(config: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, is_valid, expected in (("rank_pattern", _is_rank, _RANKS), ("alpha_pattern", _is_alpha, _ALPHAS)):
        pattern = config.get(name)
        if pattern is None:
            continue
        if not isinstance(pattern, dict) or len(pattern) > MOST_ENTRIES:
            found = f"holds {len(pattern):,} entries" if isinstance(pattern, dict) else f"is {shown(pattern)}"
            problems.append(f"{name} {found}: expected an object of at most {MOST_ENTRIES:,} layer names and numbers")
            continue
        problems += [
            f"{name} gives {shown(key)} the value {shown(value)}: expected {expected}"
            for key, value in pattern.items()
            if not is_valid(value)
        ]
        if name == "alpha_pattern":
            problems += [
                f"{name} names layers by the regular expression {shown(key)}, which is not run: write out the names "
                "of the layers"
                for key in Pattern(pattern).unread
            ]
    return problems


def _check_function(config: Mapping[str, Any]) -> list[str]:
    kind = config.get("peft_type")
    problems = (
        [] if kind == "LORA" else [f"peft_type is {shown(kind)}: only LORA adapters are supported{_instead_of(kind)}"]
    )
    problems += [
        f"{name} is {shown(config[name])}: not supported; {_MERGED if name in _MERGEABLE else 'train without it'}"
        for name in _NOT_SUPPORTED
        if config.get(name) not in _UNSET
    ]
    start = config.get("init_lora_weights")
    if start not in _KEEPS_BASE:
        problems.append(
            f"init_lora_weights is {shown(start)}, with which the base was changed too: save the adapter again with "
            "PEFT's save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
        )
    return problems


def _check_whole(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with what the config says of tensors that were trained themselves, and of parameters."""
    problems, bias = [], config.get("bias")
    if bias not in (None, False, *BIASES):
        problems.append(f"bias is {shown(bias)}: expected one of {', '.join(BIASES)}")
    for field, kind in (("modules_to_save", "module"), ("target_parameters", "parameter")):
        problems += _name_problems(field, config.get(field), kind)
    if config.get("target_parameters") and config.get("use_dora"):
        problems.append("use_dora is true with target_parameters, for which PEFT has no DoRA: expected one of them")
    return problems


def _name_problems(field: str, names: Any, kind: str) -> list[str]:
    """What is wrong with a list of names of modules or parameters."""
    if names in _UNSET:
        return []
    if not isinstance(names, list) or len(names) > MOST_ENTRIES:
        return [f"{field} is {shown(names)}: expected at most {MOST_ENTRIES:,} names of {kind}s"]
    wrong = [name for name in names if not (isinstance(name, str) and len(name) <= 512 and _NAME.fullmatch(name))]
    return [f"{field} names {shown(name)}: expected the name of a {kind}" for name in wrong]


def _check_texts(config: Mapping[str, Any]) -> list[str]:
    base = config.get("base_model_name_or_path")
    if base is None or (isinstance(base, str) and len(base) <= MOST_PATH_CHARACTERS and not _CONTROL.search(base)):
        return []  # any name of a file will do: what shows it writes out what a terminal would act on
    return [
        f"base_model_name_or_path is {shown(base)}: expected null or at most {MOST_PATH_CHARACTERS:,} characters, none "
        "of them for the control of a terminal"
    ]
