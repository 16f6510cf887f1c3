"""Adapted parameters that are no layer's weight, such as those of experts, as PEFT has them (`target_parameters`).

PEFT wraps the module of such a parameter, and once more for each further parameter of it, in the order in which the
module has them: the last one is the outermost. Its files hold the wrappers alone, so which of them is which parameter
is told by that order. Here a parameter has its own name, such as `model.layers.0.mlp.experts.down_proj`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors
from thimble.errors import AdapterError, listing
from thimble.files.peft_config import AdapterConfig

INSIDE = "base_layer"  # what PEFT's wrapper of a module calls the module
_INSIDE = re.compile(rf"(\.{INSIDE})+(?=\.|$)")
SETTING = "target_parameters"  # of an adapter: the names of all that are adapted, in the order of their modules


def module_of(path: str, factors: Factors) -> str:
    """The module that PEFT wraps to adapt a layer or a parameter."""
    return path.rpartition(".")[0] if factors.layout.experts else path


def wrappers(layers: Mapping[str, Factors]) -> Counter[str]:
    """How many wrappers PEFT puts around each module."""
    return Counter(module_of(path, factors) for path, factors in layers.items())


def wrapped(name: str, around: Mapping[str, int]) -> str:
    """The name of a module or a tensor, once some modules are wrapped so many times.

    >>> wrapped("attn.out_proj.bias", {"attn": 1, "attn.out_proj": 2})
    'attn.base_layer.out_proj.base_layer.base_layer.bias'
    """
    parts, done = name.split("."), []
    for number, part in enumerate(parts):
        done += [INSIDE] * around.get(".".join(parts[:number]), 0)
        done.append(part)
    return ".".join(done)


def unwrapped(path: str) -> tuple[str, int]:
    """The name of a module as it was before it was wrapped, and how many wrappers lie around the one that is named.

    >>> unwrapped("mlp.base_layer.experts.base_layer")
    ('mlp.experts', 1)
    """
    inner = path
    while inner.endswith(f".{INSIDE}"):
        inner = inner.removesuffix(f".{INSIDE}")
    return _INSIDE.sub("", inner), (len(path) - len(inner)) // (len(INSIDE) + 1)


def depth_of(path: str, layers: Mapping[str, Factors], order: Sequence[str]) -> int:
    """How many wrappers lie around that of a parameter: one for each that its module has behind it."""
    own = {name for name in layers if name.rpartition(".")[0] == path.rpartition(".")[0]}
    names = [name for name in order if name in own]
    return len(names) - 1 - names.index(path)


class Named(NamedTuple):
    """What the wrappers of some modules are."""

    names: dict[tuple[str, int], str]  # module and depth of a wrapper to the name of the parameter
    experts: dict[str, int]  # how many matrices each parameter stacks
    problems: list[str]


def name_parameters(rows: Mapping[tuple[str, int], int], config: AdapterConfig) -> Named:
    """Say which parameter each wrapper is, taking the order of `target_parameters` for that of the module.

    `rows` has the number of rows of A of each module and depth. An adapter is put in the order of its base where that
    is known (`in_order`).
    """
    depths: dict[str, int] = Counter(module for module, _ in rows)
    found = Named({}, {}, [])
    for module, count in depths.items():
        is_plain = count == 1 and rows.get((module, 0)) in config.allowed_ranks(module)
        names = _names_of(module, config.target_parameters, is_plain)
        if not names and (module, 0) in rows and count == 1:
            continue
        if len(names) != count:
            wanted = listing(names) or "none of its parameters"
            found.problems.append(
                f"{module} has LoRA for {count} of its parameters, and target_parameters names {wanted}: expected as "
                "many"
            )
            continue
        for depth, name in enumerate(reversed(names)):
            number = rows.get((module, depth), 0)
            ranks = {rank for rank in config.allowed_ranks(name) if number and number % rank == 0}
            if len(ranks) != 1:
                wanted = listing(map(str, sorted(config.allowed_ranks(name))))
                found.problems.append(f"{name} has {number} rows in its A: expected {wanted} for each of its experts")
            found.names[module, depth] = name
            found.experts[name] = number // min(ranks, default=1)
    unused = [t for t in config.target_parameters if not any(f".{n}".endswith(f".{t}") for n in found.experts)]
    if unused and not found.problems:
        found.problems.append(f"target_parameters names {listing(unused)}, for which it holds no LoRA matrices")
    return found


def _names_of(module: str, targets: Iterable[str], is_plain: bool) -> list[str]:
    """Names of the parameters of a module among targets; without a module a target is of all that are no layers."""
    ends = (target.rpartition(".") for target in dict.fromkeys(targets))
    found = [name for end, _, name in ends if (f".{module}".endswith(f".{end}") if end else not is_plain)]
    return [f"{module}.{name}" for name in dict.fromkeys(found)]


def parameters_of(adapter: Adapter) -> list[str]:
    """The adapted parameters in the order of their modules: as the settings say, else as the layers lie."""
    own = [path for path, factors in adapter.layers.items() if factors.layout.experts]
    said = [path for path in adapter.settings.get(SETTING, ()) if path in own]
    return said + [path for path in own if path not in said]


def in_order(adapter: Adapter, order: Sequence[str]) -> Adapter:
    """An adapter as it is for a base whose parameters, by their paths in the adapter, stand in this order.

    Where its file names those of a module in another order, each wrapper is another parameter than was thought; an
    AdapterError if their scales differ, which are given by name.
    """
    thought = parameters_of(adapter)
    known, modules = set(order), dict.fromkeys(name.rpartition(".")[0] for name in thought)
    true: dict[str, str] = {}
    for module in modules:
        names = [name for name in thought if name.rpartition(".")[0] == module]
        if known.issuperset(names):
            true |= zip(names, sorted(names, key=order.index), strict=True)
    moved = [name for name, other in true.items() if name != other]
    if not moved:
        return adapter
    if len({adapter.layers[name].scale for name in moved}) > 1:
        raise AdapterError(
            f"target_parameters names {listing(moved, 4)} in another order than the model has them, with scales of "
            f"their own: write them in the order of the model, {listing(sorted(moved, key=order.index), 4)}"
        )
    layers = {true.get(path, path): factors for path, factors in adapter.layers.items()}
    settings = {**adapter.settings, SETTING: tuple(true.get(name, name) for name in thought)}
    return replace(adapter, layers=layers, settings=settings)
