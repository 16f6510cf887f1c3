"""Which linear layers get an adapter; a name that matches nothing is an error."""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

from thimble.errors import ConfigError, listing

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")
MLP = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
GROUPS = {"attention": ATTENTION, "mlp": MLP}


def select_layers(targets: Sequence[str], layers: Iterable[str]) -> list[str]:
    """Choose layers by name.

    Args:
        targets: `all-linear`, `attention`, `mlp`, `last-N` (all of the last N blocks), the last part of a name
            (`q_proj`), the end of a path (`self_attn.q_proj`), or a pattern over whole paths (`model.layers.2[0-9].*`).
        layers: Paths of all linear layers of the base, such as `model.layers.0.self_attn.q_proj`.

    Returns:
        The chosen paths, in the order of `layers`.

    Raises:
        ConfigError: Naming every target that matches nothing, with the nearest names.
    """
    layers = list(layers)
    num_blocks = 1 + max((block_of(path) for path in layers), default=0)
    chosen: set[str] = set()
    problems = []
    for target in targets:
        matched = [path for path in layers if _matches(target, path, num_blocks)]
        chosen.update(matched)
        if not matched:
            problems.append(_no_match(target, layers))
    if problems:
        raise ConfigError(*problems)
    return [path for path in layers if path in chosen]


def block_of(path: str) -> int:
    """Number of the block that a layer belongs to."""
    return int(path.split(".")[2])


def _matches(target: str, path: str, num_blocks: int) -> bool:
    if target == "all-linear":
        return True
    if last := re.fullmatch(r"last-(\d+)", target):
        return block_of(path) >= num_blocks - int(last[1])
    if target in GROUPS:
        return path.rsplit(".", 1)[-1] in GROUPS[target]
    return path == target or path.endswith("." + target) or fnmatch.fnmatchcase(path, target)


def _no_match(target: str, layers: list[str]) -> str:
    kinds = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in layers))
    near = difflib.get_close_matches(target, [*kinds, *GROUPS, "all-linear"], n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    matched = f"targets names {target!r}, which matches none of the {len(layers)} layers"
    return f"{matched}: {meant}the base has {listing(kinds)}"
