"""What a backend may or may not honour, and the refusal of what it does not."""

from collections.abc import Set

from thimble.backends.session import Objective
from thimble.core.adapter import Adapter
from thimble.core.method import Method
from thimble.errors import ConfigError

# What goes beyond plain LoRA, and the option that asks for it; what training does not ask for has none.
OPTIONS = {
    "DoRA": "--use-dora",
    "delta form": "--init in delta form",
    "rsLoRA": None,  # but another scale
    "LoRA+": "--lora-plus",
    "frozen A": "--freeze-a",
    "dropout": "--dropout",
    "KL reference": "--keep-general",
    "weights": None,  # inits that decompose them
    "calibration": None,
    "inference": None,
}
# What a base that runs through transformers honours.
THROUGH_TRANSFORMERS = frozenset(OPTIONS) - {"calibration"}


def required(adapter: Adapter, method: Method, objective: Objective | None = None) -> frozenset[str]:
    """What training makes use of beyond plain LoRA: names among `OPTIONS`; without an objective, none of its own."""
    used = {
        "DoRA": any(factors.magnitude is not None for factors in adapter.layers.values()),
        "delta form": bool(adapter.origin),
        "LoRA+": method.lora_plus != 1,
        "frozen A": method.freezes_a,
        "dropout": method.dropout != 0,
        "KL reference": objective is not None and objective.kl_weight != 0,
    }
    return frozenset(name for name, is_used in used.items() if is_used)


def refuse_missing(backend: str, capabilities: Set[str], required: Set[str]) -> None:
    """Raise a ConfigError with a problem for each option that is asked of a backend and that it does not honour."""
    missing = sorted(required - capabilities)
    if missing:
        raise ConfigError(
            *(f"{OPTIONS[name]} is set and the backend {backend} has no {name}: leave it out" for name in missing)
        )
