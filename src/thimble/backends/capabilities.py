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
    "calibration": None,
    "inference": None,
}


def required(adapter: Adapter, method: Method, objective: Objective | None = None) -> frozenset[str]:
    """Capabilities that training makes use of.

    Args:
        adapter: What is trained.
        method: How.
        objective: What for, if that is known.

    Returns:
        Names among `OPTIONS`.
    """
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
    """Refuse what a backend does not honour.

    Args:
        backend: Its name.
        capabilities: What it honours.
        required: What is asked of it.

    Raises:
        ConfigError: With a problem for each option.
    """
    missing = sorted(required - capabilities)
    if missing:
        raise ConfigError(
            *(f"{OPTIONS[name]} is set and the backend {backend} has no {name}: leave it out" for name in missing)
        )
