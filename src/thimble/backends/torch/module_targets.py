"""Which layers of a module are adapted where the user names none: Linear, or the convolutions of a network of those."""

import re
from collections.abc import Sequence

from torch import nn

from thimble.backends.torch.attached_places import CONVOLUTIONS, LINEARS, POINTWISE, Survey
from thimble.errors import InputError, plural
from thimble.files.torch_names import plainly

_LAST = re.compile(r"last-(\d+)")


def usual_targets(module: nn.Module, targets: Sequence[str], whole: Sequence[str]) -> tuple[Sequence[str], str]:
    """The layers to adapt, and why these.

    Args:
        module: The module.
        targets: As asked for; `all-linear` alone stands for what suits the module, `last-N` for its last N blocks.
        whole: Paths of modules that are trained whole.

    Returns:
        Targets as `thimble.attach` takes them, and a sentence.

    Raises:
        InputError: If `last-N` asks for more blocks than there are.
    """
    survey = Survey(module)
    if len(targets) == 1 and (last := _LAST.fullmatch(targets[0])):
        return _last_blocks(survey, module, int(last[1]), whole)
    if list(targets) != [LINEARS]:
        return targets, f"targets: {', '.join(targets)}, as asked for"
    kind, why = _suited(survey, whole)
    return [kind], f"targets: {kind}{why}"


def _suited(survey: Survey, whole: Sequence[str]) -> tuple[str, str]:
    """The kind of layers that holds most of what is frozen."""
    sizes = {kind: 0 for kind in (LINEARS, CONVOLUTIONS, POINTWISE)}
    for path, layer in survey.modules.items():
        if _is_inside(path, whole):
            continue
        for kind in sizes:
            if survey.is_of(kind, path):
                sizes[kind] += sum(parameter.numel() for parameter in layer.parameters())
    if sizes[LINEARS] >= sizes[CONVOLUTIONS]:
        return LINEARS, ""
    what = "its convolutions hold most of its weights"
    if 2 * sizes[POINTWISE] >= sizes[CONVOLUTIONS]:
        return POINTWISE, f", since {what}, and those of one pixel most of these"
    return CONVOLUTIONS, f", since {what}"


def _last_blocks(survey: Survey, module: nn.Module, count: int, whole: Sequence[str]) -> tuple[Sequence[str], str]:
    """The layers in the last blocks of the longest list of blocks, which the module itself may be.

    Blocks without a layer to adapt, such as a pooling, count for nothing.
    """
    kind, _ = _suited(survey, whole)
    layers = [path for path in survey.modules if survey.is_of(kind, path) and not _is_inside(path, whole)]
    lists = dict[str, list[list[str]]]()  # the layers of each block
    for path, blocks in plainly(module.named_modules()).items():
        if isinstance(blocks, nn.ModuleList | nn.Sequential):
            names = [f"{path}.{name}".lstrip(".") for name, _ in blocks.named_children()]
            lists[path] = [held for name in names if (held := [layer for layer in layers if _is_inside(layer, [name])])]
    path = max(lists, key=lambda path: len(lists[path]), default="")
    where, longest = path or "the module", lists.get(path, [])
    if count > len(longest):
        blocks = f"{where} has {plural(len(longest), 'block')} with layers to adapt"
        has = blocks if longest else "the module has no list of blocks"
        raise InputError(f"--targets last-{count}: {has}; name fewer, or layers by their names")
    found = [layer for held in longest[-count:] for layer in held]
    return found, f"targets: {kind} in the last {count} of {plural(len(longest), 'block')} of {where}"


def _is_inside(path: str, modules: Sequence[str]) -> bool:
    return any(path == module or path.startswith(module + ".") for module in modules)
