"""The options of `thimble merge`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from thimble.config.groups import PurposeOptions
from thimble.config.options import option, options_of
from thimble.config.values import WHOLE_PATH, at_least, flag, share
from thimble.errors import plural

COMBINATION_TYPES = (
    "cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
MOST_WEIGHT = 100  # of an adapter: more is a slip
MAJORITY_SIGN_METHODS = ("total", "frequency")


def weights(values: Sequence[float]) -> str | None:
    """Check what adapters are multiplied by."""
    is_valid = all(0 < abs(value) <= MOST_WEIGHT for value in values)
    return None if is_valid else f"expected a number for each adapter, from -{MOST_WEIGHT} to {MOST_WEIGHT} and not 0"


def combining(config: "MergeConfig") -> list[str]:
    """The options that were given and say how several adapters become one."""
    specs = options_of(MergeConfig)
    names = ("weight", "combination_type", "density", "majority_sign_method")
    return [name for name in names if getattr(config, name) != specs[name].default]


@dataclass(frozen=True)
class MergeConfig(PurposeOptions):
    """The options of `thimble merge`."""

    group: ClassVar[str] = "merge"

    adapter: tuple[str, ...] = option((), "Adapter folders, the run folders that hold them, or GGUF adapters; several "
        "are added up.", positional=True, path=WHOLE_PATH, metavar="ADAPTER")  # fmt: skip
    base: str | None = option(None, "Base to merge into: a Hugging Face folder or a hub name; with --truncate or "
        "--rank it is only checked that the adapters fit it.", path=WHOLE_PATH, metavar="BASE")  # fmt: skip
    out: str = option("", "Folder to write; it must not exist yet, or be empty.", path=WHOLE_PATH, metavar="DIR")
    truncate: float | None = option(None, "Write a smaller adapter: each layer keeps the smallest rank that holds this "
        "share of its update's energy (squared singular values), such as 0.99; 1 drops only what is zero. Without it, "
        "and without --rank, the adapter is merged into the base.", check=share, metavar="SHARE")  # fmt: skip
    rank: int | None = option(None, "Write a smaller adapter: the most rank any layer keeps.", check=at_least(1))
    weight: tuple[float, ...] = option((), "What an adapter is multiplied by, such as 0.7; given once for each "
        "adapter, in their order. Without it each counts as 1.", check=weights)  # fmt: skip
    combination_type: str = option("cat", "How several adapters become one, as in PEFT's add_weighted_adapter: cat is "
        "their exact sum; linear, ties, dare and magnitude_prune combine A with A and B with B, which is rougher, and "
        "with _svd the updates themselves.", choices=COMBINATION_TYPES)  # fmt: skip
    density: float | None = option(None, "Share of the numbers of each adapter that ties, dare and magnitude_prune "
        "keep, such as 0.5.", check=share, metavar="SHARE")  # fmt: skip
    majority_sign_method: str = option("total", "What elects the sign of a number in ties: the sum over the adapters, "
        "or how many have it.", choices=MAJORITY_SIGN_METHODS)  # fmt: skip
    unmerge: bool = option(False, "Take the adapters off the folder in --base, which they were merged into: exactly "
        "where the original base is still where the adapters say, else within rounding.")  # fmt: skip

    @property
    def writes_adapter(self) -> bool:
        """Whether a smaller adapter is wanted instead of a base."""
        return self.truncate is not None or self.rank is not None

    @property
    def weights(self) -> tuple[float, ...]:
        """What each adapter is multiplied by."""
        return self.weight or (1.0,) * len(self.adapter)

    @property
    def is_pruned(self) -> bool:
        """Whether the way to combine adapters leaves numbers out."""
        return self.combination_type not in ("cat", "linear", "svd")

    @classmethod
    def _conflicts(cls, given: Mapping[str, Any]) -> list[str]:
        problems, count, kind = super()._conflicts(given), len(given.get("adapter", ())), given.get("combination_type")
        numbers, makes_adapter = (
            given.get("weight", ()),
            [flag(name) for name in ("truncate", "rank") if given.get(name) is not None],
        )
        if numbers and len(numbers) != count:
            problems.append(
                f"--weight is given {plural(len(numbers), 'time')} for {plural(count, 'adapter')}: give one for each, "
                "in their order"
            )
        if given.get("unmerge") and makes_adapter:
            problems.append(f"--unmerge takes adapters off a base, and {makes_adapter[0]} writes one: leave one out")
        if kind and kind != "cat" and count == 1:
            problems.append(f"--combination-type {kind} makes one adapter of several, and one is given: leave it out")
        return [*problems, *cls._pruning_conflicts(given, kind or "cat")]

    @classmethod
    def _pruning_conflicts(cls, given: Mapping[str, Any], kind: str) -> list[str]:
        is_pruned, is_given = cls(combination_type=kind).is_pruned, given.get("density") is not None
        problems = []
        if is_pruned and not is_given:
            problems.append(f"--combination-type {kind} keeps a share of the numbers: say which, as in --density 0.5")
        if is_given and not is_pruned:
            problems.append(
                "--density is what ties, dare and magnitude_prune keep: leave it out, or name one of them with "
                "--combination-type"
            )
        if "majority_sign_method" in given and "ties" not in kind:
            problems.append(
                "--majority-sign-method is for ties: leave it out, or take a --combination-type with ties in its name"
            )
        return problems
