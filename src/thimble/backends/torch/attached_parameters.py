"""Which parameters of a model take LoRA though they are no layer's weight: those of experts, above all.

They are named as in PEFT's `target_parameters`: by their whole names or the ends of them.
"""

import difflib
import re
from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.parameter import UninitializedParameter

from thimble.backends.torch.attached_places import CONVOLUTIONS, Place, Survey, names, unfit_numbers
from thimble.core.lowrank import Layout
from thimble.errors import escaped, listing

AXES = (2, 3)  # of a parameter: (out, in), or a stack of these


def choose_parameters(
    survey: Survey, targets: Sequence[str], whole: Iterable[str], layers: Iterable[Place]
) -> tuple[list[Place], list[str]]:
    """The parameters that targets name, in the order of the model, and what is wrong.

    Args:
        survey: Of the model.
        targets: Names, ends of names or patterns with *.
        whole: Modules that are trained whole.
        layers: The layers that are adapted.

    Returns:
        A place for each parameter; sentences.
    """
    known = parameter_places(survey)
    found, problems = dict[str, Place](), list[str]()
    for target in targets:
        matched = {path: place for path, place in known.items() if names(target, path)}
        if not matched:
            problems.append(_no_match(target, survey, known))
        for path, place in matched.items():
            if reason := unfit_parameter(survey, place, whole, layers):
                problems.append(f"target_parameters names {escaped(target)!r}: {path} {reason}")
        found |= matched
    return [place for path, place in known.items() if path in found], problems


def parameter_places(survey: Survey) -> dict[str, Place]:
    """Every parameter of a module that has two or three axes, by its name, in the order of the model."""
    return {
        f"{path}.{name}": parameter_place(path, module, name)
        for path, module in survey.modules.items()
        for name, parameter in module.named_parameters(recurse=False)
        if not isinstance(parameter, UninitializedParameter) and parameter.dim() in AXES
    }


def parameter_place(path: str, module: nn.Module, name: str) -> Place:
    """A parameter of a module as a place of LoRA: its values are replaced while the module is called."""
    parameter = getattr(module, name)
    experts = parameter.shape[0] if parameter.dim() == AXES[1] else 1
    return Place(f"{path}.{name}", module, name, module, "", Layout(experts=experts), False)


def unfit_parameter(survey: Survey, place: Place, whole: Iterable[str] = (), layers: Iterable[Place] = ()) -> str:
    """Why a parameter cannot take LoRA, as the end of a sentence; empty if it can."""
    module = place.path.rpartition(".")[0]
    if survey.kind(module) == CONVOLUTIONS:
        return "is the weight of a convolution: name the layer in targets"
    if isinstance(place.layer, nn.RNNBase):
        return "is read inside of one call, where no update can be added: train it whole with train_also"
    if any(module == one or module.startswith(f"{one}.") for one in whole):
        return "is trained whole too, by train_also: name it in one of the two"
    if any(layer.path == module or layer.path.startswith(f"{module}.") for layer in layers):
        return "belongs to a module that targets names, or that is around one: adapt it in one of the two"
    if hasattr(place.layer, place.child):
        return f"stands beside an attribute {place.child!r}, the name under which A and B would be kept"
    return unfit_numbers(survey, place.path, getattr(place.layer, place.weight), "a parameter")


def _no_match(target: str, survey: Survey, known: Iterable[str]) -> str:
    """The sentence for a name that no parameter has."""
    own = [path for path in known if not survey.kind(path.rpartition(".")[0])]
    near = difflib.get_close_matches(target, {*(".".join(path.split(".")[-2:]) for path in own), *own}, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    has = listing(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", path) for path in own)) or "none but the weights of layers"
    return (
        f"target_parameters names {escaped(target)!r}, which no parameter with two or three axes is called: {meant}it "
        f"has {has}"
    )
