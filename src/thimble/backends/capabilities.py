"""Options that a backend may or may not honour, and the refusal of those that it does not."""

from collections.abc import Set

from thimble.backends.session import Objective
from thimble.core.adapter import Adapter
from thimble.core.method import Method
from thimble.errors import ConfigError

# By the names of their options: what goes beyond plain LoRA (rsLoRA and per-layer alphas are but another scale).
DELTA_FORM = "init in delta form"
ALL = frozenset(("use_dora", DELTA_FORM, "weight_decay", "lora_plus", "dropout", "freeze_a", "keep_general"))


def required(adapter: Adapter, method: Method, objective: Objective | None = None) -> frozenset[str]:
    """Which of `ALL` a training run makes use of.

    Args:
        adapter: What is trained.
        method: How.
        objective: What for, if that is known.

    Returns:
        Names of capabilities.
    """
    used = {
        "use_dora": any(factors.magnitude is not None for factors in adapter.layers.values()),
        DELTA_FORM: bool(adapter.origin),
        "weight_decay": method.weight_decay != 0,
        "lora_plus": method.lora_plus != 1,
        "dropout": method.dropout != 0,
        "freeze_a": method.freezes_a,
        "keep_general": objective is not None and objective.kl_weight != 0,
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
            *(f"--{name.replace('_', '-')} is not honoured by the backend {backend}: leave it out" for name in missing)
        )
