"""The card of an adapter folder: what it says of the adapter and its base, and where it may be written."""

import os
from pathlib import Path

from thimble.core.adapter import Adapter
from thimble.models.adapter_base import FUNCTION, TASK, known_hub_name, labels_of, license_of
from thimble.models.frozen_base import FrozenBase
from thimble.report.card import CARD, About, is_ours
from thimble.report.words import TEXT
from thimble.training.run_folder import write_text


def write_card(folder: Path, text: str) -> None:
    """Write a card into an adapter folder, unless one is there that somebody wrote or changed."""
    path = folder / CARD
    if not os.path.lexists(path) or is_ours(path):
        write_text(path, text)


def about_adapter(adapter: Adapter, base: FrozenBase | None) -> About:
    """Adapter and base in the words of a card; of a base that is not opened only what the adapter says."""
    layers = adapter.plain().layers.values()
    hub_name = known_hub_name(adapter)
    is_file = base is not None and base.metadata is not None
    return About(
        base=base.name if base else os.path.basename(adapter.base) or "a base that is not named",
        hub_name=hub_name,
        file=base.path.name if base and is_file else "",
        license=license_of(base) if base else "",
        loader="" if FUNCTION in adapter.notes else base.loader if base else "AutoModelForCausalLM",
        ranks=[factors.rank // max(1, factors.layout.experts) for factors in layers],
        scales=[factors.scale for factors in layers],
        parameters=sum(factors.num_parameters for factors in layers),
        use_dora=adapter.has_magnitudes,
        task=adapter.notes.get(TASK, TEXT),
        labels=len(labels_of(adapter) or ()),
    )
