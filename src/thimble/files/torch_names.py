"""Names of tensors that were saved from within a wrapper of torch: what is around a module is no part of the module.

torch.compile, FSDP and activation checkpointing put a part of their own into the names of what they wrap, wherever that
is (`OptimizedModule`, `FullyShardedDataParallel`, `CheckpointWrapper`); DataParallel and DistributedDataParallel wrap
whole models and begin every name with `module.`.
"""

import re
from collections.abc import Iterable
from typing import TypeVar

_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARALLEL = "module."
T = TypeVar("T")


def without_wrappers(name: str) -> str:
    """The name that a tensor has in the model itself.

    >>> without_wrappers("module._orig_mod.model.layers.0._orig_mod.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    return _WRAPPERS.sub("", name.removeprefix(_PARALLEL)).removeprefix(_PARALLEL)


def plainly(named: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Modules or tensors by the names that they have where no part of the model is wrapped, a wrapper's inside for it.

    >>> plainly([("", 0), ("body", 1), ("body._orig_mod", 2), ("body._orig_mod.0", 3), ("module", 4)])
    {'': 0, 'body': 2, 'body.0': 3, 'module': 4}
    """
    return {plain(name): value for name, value in named}


def plain(name: str) -> str:
    """The name that a module or a tensor has where no part of the model is wrapped."""
    return _WRAPPERS.sub("", f"{name}.")[:-1]


def wrappers_of(name: str) -> str:
    """What wrappers put in front of the name of a tensor, or into it, as it stands there; empty if nothing."""
    found = [match[0] for match in _WRAPPERS.finditer(name)]
    return found[0] if found else _PARALLEL if without_wrappers(name) != name else ""
