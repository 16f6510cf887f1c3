"""Which linear layers get an adapter, and how large a one; a name that matches nothing is an error."""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from thimble.core.lowrank import scale
from thimble.errors import ConfigError, listing

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")
MLP = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
GROUPS = {"attention": ATTENTION, "mlp": MLP}


def select_layers(targets: Sequence[str], layers: Iterable[str]) -> list[str]:
    """Choose layers by name, in the order of `layers`; a ConfigError names targets that match nothing.

    A target is `all-linear`, `attention`, `mlp`, `last-N` (all of the last N blocks), the last part of a name
    (`q_proj`), the end of a path (`self_attn.q_proj`), or a pattern over whole paths (`model.layers.2[0-9].*`).
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


def select_parameters(targets: Sequence[str], parameters: Sequence[str]) -> list[str]:
    """Choose parameters that are no layer's weight by their names, ends of names or patterns, as `select_layers` does.

    No word stands for kinds of them: they are taken where they are named, and nowhere else.
    """
    chosen = {target: [path for path in parameters if _is_named(target, path)] for target in targets}
    problems = [_no_parameter(target, parameters) for target, paths in chosen.items() if not paths]
    if problems:
        raise ConfigError(*problems)
    return [path for path in parameters if any(path in paths for paths in chosen.values())]


class Size(NamedTuple):
    """The size of one layer's update."""

    rank: int  # rows of A: of a parameter, those of all its experts
    scale: float  # factor of B A


def size_layers(
    layers: Sequence[str],
    rank: int,
    alpha: float,
    ranks: Mapping[str, float] | None = None,
    alphas: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    num_blocks: int = 0,
) -> dict[str, Size]:
    """Give each adapted layer its rank and scale, as PEFT's patterns do; a ConfigError names those that match none.

    Patterns are in the words of `select_layers`; of several that match a layer, the last counts.
    """
    found_ranks, found_alphas = dict.fromkeys(layers, float(rank)), dict.fromkeys(layers, alpha)
    problems = []
    for found, pattern, what in ((found_ranks, ranks, "rank_pattern"), (found_alphas, alphas, "alpha_pattern")):
        for target, number in (pattern or {}).items():
            matched = [path for path in layers if _matches(target, path, num_blocks)]
            found.update(dict.fromkeys(matched, number))
            if not matched:
                problems.append(_no_match(target, list(layers)).replace("targets names", f"{what} names"))
    if problems:
        raise ConfigError(*problems)
    return {
        path: Size(int(found_ranks[path]), scale(found_alphas[path], int(found_ranks[path]), use_rslora))
        for path in layers
    }


def share_out(
    energies: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int, least: int = 1
) -> dict[str, int]:
    """Ranks that hold the most energy for a number of parameters, `budget`.

    Every layer gets `least`; then directions are taken one by one, those with the most energy per parameter first.
    Where the energies of a layer fall, as they do but for noise, this greedy choice is the best one. They are given for
    each direction, as many as the rank may be, one smaller than a later one counting as much; costs are those of one
    rank, in + out.

    >>> share_out({"a": [9, 8, 1], "b": [4, 1, 1]}, {"a": 10, "b": 10}, 30)
    {'a': 2, 'b': 1}
    """
    ranks = {path: min(least, len(values)) for path, values in energies.items()}
    left = budget - sum(rank * costs[path] for path, rank in ranks.items())
    directions = sorted(
        (-max(values[number:]) / costs[path], number, path)
        for path, values in energies.items()
        for number in range(ranks[path], len(values))
    )
    for _, number, path in directions:
        if costs[path] <= left and number == ranks[path]:
            ranks[path] += 1
            left -= costs[path]
    return ranks


def block_of(path: str) -> int:
    """Number of the block that a layer belongs to; 0 for one outside the blocks."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), 0)


def _matches(target: str, path: str, num_blocks: int) -> bool:
    if target == "all-linear":
        return True
    if last := re.fullmatch(r"last-(\d+)", target):
        return block_of(path) >= num_blocks - int(last[1])
    if target in GROUPS:
        return path.rsplit(".", 1)[-1] in GROUPS[target]
    return _is_named(target, path)


def _is_named(target: str, path: str) -> bool:
    return path == target or path.endswith("." + target) or fnmatch.fnmatchcase(path, target)


def _no_parameter(target: str, parameters: Sequence[str]) -> str:
    kinds = list(dict.fromkeys(".".join(path.split(".")[-2:]) for path in parameters))
    near = difflib.get_close_matches(target, kinds, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    has = f"{meant}the base has {listing(kinds)}" if kinds else "the base has none but the weights of its layers"
    return f"target_parameters names {target!r}, which no parameter of three dimensions is called: {has}"


def _no_match(target: str, layers: list[str]) -> str:
    kinds = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in layers))
    near = difflib.get_close_matches(target, [*kinds, *GROUPS, "all-linear"], n=1)
    near = ["all-linear"] if target in ("all", "linear") else near  # as LLaMA-Factory and others have it
    meant = f"did you mean {near[0]}? " if near else ""
    matched = f"targets names {target!r}, which matches none of the {len(layers)} layers"
    return f"{matched}: {meant}the base has {listing(kinds)}"
