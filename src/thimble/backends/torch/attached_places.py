"""Which layers of a model take LoRA: named, by pattern or by kind; with the reason for each that does not.

Names are PEFT's: the last part or the end of a path, or a regular expression for whole paths.
"""

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from thimble.backends.torch.attached_layers import CHILD, as_matrix, is_conv1d_of_transformers
from thimble.core.lowrank import LINEAR, Layout
from thimble.errors import escaped, listing, plural
from thimble.files.torch_names import plain, plainly

LINEARS, CONVOLUTIONS, EMBEDDINGS = "all-linear", "all-conv", "all-embedding"
POINTWISE = "all-pointwise"  # convolutions that see one pixel, of which mobile networks are mostly made
KINDS = (LINEARS, CONVOLUTIONS, EMBEDDINGS, POINTWISE)
TAKEN = "Linear, Conv1D, Conv1d, Conv2d, Conv3d, Embedding and MultiheadAttention"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Forward passes that multiply the weight with the input and do nothing else; `super().forward(x) * embed_scale` too.
_KNOWN = {kind.forward for kind in (nn.Linear, *_CONVOLUTIONS, nn.Embedding)}
_SCALED = "ScaledWordEmbedding"


@dataclass(frozen=True)
class Place:
    """A weight that LoRA can update."""

    path: str  # of the layer it belongs to
    layer: nn.Module  # that layer
    weight: str  # what the weight is called in it
    called: nn.Module  # the module in whose call it is used: the layer itself, but for packed attention
    inside: str  # the path of the layer inside of that
    layout: Layout
    is_beside: bool  # whether the layer's forward pass is the known one

    @property
    def child(self) -> str:
        """What its `LowRank` is called inside of the layer; parameters of one module each have their own."""
        return f"{CHILD}_{self.weight}" if self.layout.experts else CHILD

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the update, or of each expert's; `in` of a convolution counts all channels, of every group."""
        out, width = as_matrix(self.layer, getattr(self.layer, self.weight)).shape
        return int(out) // max(1, self.layout.experts), int(width) * self.layout.groups


@dataclass(frozen=True)
class Chosen:
    """What a selection came to."""

    places: list[Place]
    left_out: dict[str, str]  # of a kind that was asked for, and cannot be adapted: path to the reason
    problems: list[str]


class Survey:
    """The modules of a model by path, and who shares what with whom."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = plainly(model.named_modules())
        self.root = self.modules.pop("")
        self.aliases: dict[str, str] = {}  # other paths of a module to its first
        first = {id(module): plain(path) for path, module in model.named_modules()}
        for path, module in plainly(model.named_modules(remove_duplicate=False)).items():
            if path and path not in self.modules:
                self.aliases[path] = first.get(id(module), "")
        self.packed = {
            f"{path}.out_proj": path
            for path, module in self.modules.items()
            if isinstance(module, nn.MultiheadAttention)
        }
        self._owners: dict[object, list[str]] = {}
        for path, module in {"": model, **self.modules}.items():
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                self._owners.setdefault(_storage(parameter), []).append(f"{path}.{name}".lstrip("."))
        self.head = _head_of(model, first)

    def sharers(self, parameter: torch.Tensor) -> list[str]:
        """The names of all parameters that hold the same numbers."""
        return self._owners[_storage(parameter)]

    def kind(self, path: str) -> str:
        """The kind of a module that takes LoRA; empty if it does not."""
        module = self.modules[path]
        return "" if path in self.packed else _kind(module)  # never called: it is adapted with its attention

    def is_of(self, kind: str, path: str) -> bool:
        """Whether a module is of a kind that targets can name."""
        if kind != POINTWISE:
            return self.kind(path) == kind
        return self.kind(path) == CONVOLUTIONS and {*getattr(self.modules[path], "kernel_size", ())} == {1}

    def matching(self, target: str) -> list[str]:
        """The modules that a name stands for, by their first paths."""
        paths = [path for path in (*self.modules, *self.aliases) if names(target, path)]
        return list(dict.fromkeys(self.aliases.get(path, path) for path in paths))

    def places(self, path: str) -> list[Place]:
        """The weights of a module that takes LoRA."""
        module = self.modules[path]
        if isinstance(module, nn.MultiheadAttention):
            inner = Place(f"{path}.out_proj", module.out_proj, "weight", module, "out_proj", LINEAR, False)
            return [Place(path, module, "in_proj_weight", module, "", LINEAR, False), inner]
        kernel = module.kernel_size if isinstance(module, _CONVOLUTIONS) else ()
        layout = Layout(tuple(kernel), getattr(module, "groups", 1) if kernel else 1, isinstance(module, nn.Embedding))
        forward = type(module).forward
        is_known = forward in _KNOWN or type(module).__name__ == "Conv1D" or type(module).__name__.endswith(_SCALED)
        return [Place(path, module, "weight", module, "", layout, is_known)]


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Linear | nn.MultiheadAttention) or is_conv1d_of_transformers(module):
        return LINEARS
    if isinstance(module, _CONVOLUTIONS):
        return CONVOLUTIONS
    return EMBEDDINGS if isinstance(module, nn.Embedding) else ""


def names(target: str, path: str) -> bool:
    """Whether a target names a path: as a whole, by its end, or as a pattern with *."""
    return path == target or path.endswith("." + target) or ("*" in target and fnmatch.fnmatchcase(path, target))


def _storage(parameter: torch.Tensor) -> object:
    if not _is_plain(parameter) or parameter.is_meta or not parameter.numel():
        return id(parameter)
    return parameter.data_ptr(), parameter.numel()


def _is_plain(parameter: torch.Tensor) -> bool:
    """Whether the numbers of a tensor lie in it as they are; those of a subclass may be packed, or not there yet."""
    return type(parameter) in (nn.Parameter, torch.Tensor)


def _head_of(model: nn.Module, first: dict[int, str]) -> str:
    """The path of a language model's output layer, which `all-linear` leaves out as PEFT does."""
    ask: Callable[[], object] | None = getattr(model, "get_output_embeddings", None)
    try:
        head = ask() if callable(ask) else None
    except (AttributeError, NotImplementedError):
        return ""
    return first.get(id(head), "")


# ---- why a layer cannot be adapted ----------------------------------------------------------------------------------


def unfit(survey: Survey, path: str) -> str:
    """Why a module cannot take LoRA, as the end of a sentence; empty if it can."""
    module = survey.modules[path]
    kind = _article(type(module).__name__)
    if path in survey.packed:
        return f"is used by {survey.packed[path]} without being called: name {survey.packed[path]}, which adapts both"
    if not survey.kind(path):
        return _not_taken(module, kind)
    if hasattr(module, CHILD):
        return f"has an attribute {CHILD!r} of its own, the name under which A and B would be kept"
    for place in survey.places(path):
        if reason := _unfit_weight(survey, place, kind):
            return reason
    return ""


def _unfit_weight(survey: Survey, place: Place, kind: str) -> str:
    weight = place.layer._parameters.get(place.weight)
    if place.weight == "in_proj_weight" and weight is None:
        return f"is {kind} whose q, k and v have weights of their own (kdim, vdim): only packed ones can be adapted"
    if weight is None:
        return f"is {kind} whose weight is computed at each call (weight_norm, parametrizations): remove that first"
    if isinstance(weight, UninitializedParameter):
        return f"is {kind} that has no shape before its first batch: run one through the model first"
    if getattr(place.layer, "max_norm", None) is not None:
        return "renormalises its weight at each call (max_norm), so the base would not stay as it is: set max_norm=None"
    return unfit_numbers(survey, f"{place.path}.{place.weight}", weight, kind)


def unfit_numbers(survey: Survey, name: str, weight: torch.Tensor, kind: str) -> str:
    """Why a weight cannot take LoRA, whatever layer it is of, as the end of a sentence; empty if it can."""
    if weight.is_meta:
        return "has no numbers yet (it is on the device meta): load the model first"
    if not _is_plain(weight):
        return (
            f"is {kind} whose weight is a {type(weight).__name__}: expected a plain tensor of floats, not a packed one"
        )
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        dtype = str(weight.dtype).removeprefix("torch.")
        return f"is {kind} with a weight of {dtype}: expected floats of 16 bits or more, not a quantised weight"
    shared = [other for other in survey.sharers(weight) if other != name]
    if shared:
        return (
            f"shares its weight with {listing(shared, 2)}: an update of one would be lost or doubled when it is "
            "merged; give it a weight of its own first, or leave it out"
        )
    return ""


def _not_taken(module: nn.Module, kind: str) -> str:
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return (
            f"is {kind}, which multiplies its weights inside of one call, where no update can be added: train it whole "
            "with train_also, or adapt other layers"
        )
    own = sum(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))
    inner = [path for path, _ in module.named_modules() if path]
    if inner and not own:
        return f"is {kind}, which holds layers and is none: name them, such as {inner[0]}"
    if own:
        return (
            f"is {kind}: LoRA is made for {TAKEN}; name its parameters with target_parameters, or train it whole with "
            "train_also"
        )
    has_any = next(module.parameters(), None) is not None
    return f"is {kind}, which has no matrix to adapt" + (": train it whole with train_also" if has_any else "")


def _article(name: str) -> str:
    return ("an " if name[:1] in "AEIO" or re.match(r"[LMNR][A-Z]|GRU", name) and name[0] != "G" else "a ") + name


# ---- the selection --------------------------------------------------------------------------------------------------


def choose(survey: Survey, targets: str | Sequence[str], whole: Iterable[str], rank: Callable[[str], int]) -> Chosen:
    """The layers that targets name, in the order of the model.

    Args:
        survey: Of the model.
        targets: A kind (`all-linear`, `all-conv`, `all-embedding`), a name, a regular expression for whole paths; or a
            list of kinds and names.
        whole: Modules that are trained whole, whose layers are left out of kinds.
        rank: The rank of a layer, by its path.

    Returns:
        The places, and what is wrong.
    """
    whole, found, left_out, problems = set(whole), dict[str, str](), dict[str, str](), list[str]()
    for target in [targets] if isinstance(targets, str) else targets:
        if target in KINDS:
            paths = [path for path in survey.modules if survey.is_of(target, path)]
            reasons = {path: _unfit(survey, path, rank) for path in paths if not _is_inside(path, whole)}
            if target == LINEARS and survey.head in reasons:
                reasons[survey.head] = "is the output layer: name it to adapt it, or train it whole with train_also"
            found |= {path: "" for path, reason in reasons.items() if not reason}
            left_out |= {path: reason for path, reason in reasons.items() if reason}
            if not any(not reason for reason in reasons.values()):
                problems.append(_nothing_of(target, survey, reasons))
            continue
        paths = survey.matching(target)
        if isinstance(targets, str):
            paths = _by_expression(survey, target) or paths
        if not paths:
            problems.append(no_match("targets", target, survey))
        for path in paths:
            inside = _is_inside(path, whole) and "is trained whole too, by train_also: name it in one of the two"
            if reason := inside or _unfit(survey, path, rank):
                problems.append(f"targets names {target!r}: {path} {reason}")
            found[path] = ""
    places = [place for path in survey.modules if path in found and survey.kind(path) for place in survey.places(path)]
    return Chosen(places, {path: why for path, why in left_out.items() if path not in found}, problems)


def _by_expression(survey: Survey, target: str) -> list[str]:
    """Modules whose whole path a regular expression matches; what holds layers, or nothing, it may match by the way."""
    try:
        expression = re.compile(target)
    except re.error:
        return []  # it may be a name; if it is not, that is told
    paths = [path for path in survey.modules if expression.fullmatch(path)]
    layers = [path for path in paths if survey.kind(path) or _has_matrix(survey.modules[path])]
    return layers or paths


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))


def _unfit(survey: Survey, path: str, rank: Callable[[str], int]) -> str:
    if reason := unfit(survey, path):
        return reason
    groups = survey.places(path)[0].layout.groups
    if rank(path) % groups:
        return (
            f"is a convolution in {groups} groups: expected a rank that they divide, not {rank(path)}; give it one "
            "with rank_pattern, or train it whole with train_also"
        )
    return ""


def _is_inside(path: str, modules: Iterable[str]) -> bool:
    return any(path == module or path.startswith(module + ".") for module in modules)


def _nothing_of(target: str, survey: Survey, reasons: dict[str, str]) -> str:
    if reasons:
        told = "; ".join(f"{path} {reason}" for path, reason in list(reasons.items())[:3])
        return f"targets is {target}, and none of its {plural(len(reasons), 'layer')} can be adapted: {told}"
    recurrent = [path for path, module in survey.modules.items() if isinstance(module, nn.RNNBase | nn.RNNCellBase)]
    told = "".join(f"; {path} {unfit(survey, path)}" for path in recurrent[:1])
    return f"targets is {target}, of which the model has none: it holds {_kinds_of(survey)}{told}"


def _kinds_of(survey: Survey) -> str:
    """The types of modules that have parameters of their own, with a path each."""
    types: dict[str, str] = {}
    for path, module in survey.modules.items():
        if any(True for _ in module.parameters(recurse=False)):
            types.setdefault(type(module).__name__, path)
    return listing(f"{name} ({path})" for name, path in types.items()) or f"no module with parameters{_itself(survey)}"


def _itself(survey: Survey) -> str:
    """What is to be said of a model that is a single layer."""
    kind = _article(type(survey.root).__name__)
    if _kind(survey.root):
        return f"; the model itself is {kind}, without a name: call attach on torch.nn.Sequential(model)"
    has_any = next(survey.root.parameters(recurse=False), None) is not None
    return f"; the model itself {_not_taken(survey.root, kind)}" if has_any else ""


def no_match(option: str, target: str, survey: Survey) -> str:
    """The sentence for a name that no module has."""
    layers = [path for path in survey.modules if survey.kind(path)]
    wrong = "" if _is_expression(target) else ", and is no regular expression"
    near = difflib.get_close_matches(target, {*(path.rsplit(".", 1)[-1] for path in layers), *layers, *KINDS}, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    has = listing(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", path) for path in layers))
    return f"{option} names {escaped(target)!r}, which no module of the model is called{wrong}: {meant}it has {has}"


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def trained_whole(survey: Survey, train_also: Iterable[str]) -> tuple[list[str], list[str]]:
    """The modules that `train_also` names, none inside of another, and what is wrong with them."""
    found, problems = list[str](), list[str]()
    for target in train_also:
        paths = survey.matching(target)
        if not paths:
            problems.append(no_match("train_also", target, survey))
        for path in paths:
            if next(survey.modules[path].parameters(), None) is None:
                problems.append(f"train_also names {target!r}: {path} has no parameters to train")
        found += paths
    whole = [path for path in dict.fromkeys(found) if not _is_inside(path, set(found) - {path})]
    for path in whole:
        problems += _shared_outside(survey, path, whole)
    return whole, problems


def _shared_outside(survey: Survey, path: str, whole: list[str]) -> Iterator[str]:
    for name, parameter in survey.modules[path].named_parameters():
        others = [other for other in survey.sharers(parameter) if not _is_inside(other, whole)]
        if others:
            yield (
                f"train_also names {path}, whose {name} is {listing(others, 2)} too: name all of these modules, so "
                "that they are trained and saved as one, or give it a weight of its own first"
            )
