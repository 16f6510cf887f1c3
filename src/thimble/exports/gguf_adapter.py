"""An adapter as a GGUF file, which llama.cpp applies to a base while it runs.

Format: llama.cpp's src/llama-adapter.cpp. For each adapted tensor there are `<name>.lora_a` (rank, in) and
`<name>.lora_b` (out, rank), with the rows of B in the order of the base's file; the runtime adds
adapter_scale · alpha / rank · B A, with one alpha for all, or adapter_scale · B A where alpha is 0.
"""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors
from thimble.errors import AdapterError, listing
from thimble.files.gguf_write import NewTensor, write_gguf
from thimble.models.base import Base
from thimble.models.gguf_names import architecture, gguf_name

LORA_ALPHA = "adapter.lora.alpha"


def check_exportable(name: str, adapter: Adapter) -> None:
    """Refuse the magnitudes of DoRA, which the format cannot hold, and what does nothing, so that nothing is proved."""
    layers = [path for path, factors in adapter.layers.items() if factors.magnitude is not None]
    if layers:
        raise AdapterError(
            f"adapter {name} is DoRA ({listing(layers, 2)}): a GGUF adapter holds A and B alone, and llama.cpp would "
            "leave the lengths of the rows out; merge it into a folder of float weights with thimble merge "
            "--base, or approximate it by a plain adapter with --approximate-rank 64"
        )
    if not any(factors.A.any() and factors.B.any() for factors in adapter.layers.values()):
        raise AdapterError(
            f"adapter {name} changes nothing: A or B is 0 in each of its layers, as before any training; name one that "
            "was trained"
        )


def write_gguf_adapter(adapter: Adapter, base: Base, path: Path) -> None:
    """Write an adapter for a base; the same adapter always makes the same bytes.

    Args:
        adapter: Without magnitudes; one in delta form is written as the plain adapter of twice the rank.
        base: What it was made for: it says the names of the tensors and the order of their rows.
        path: The file to write.
    """
    layers = adapter.plain().layers
    alpha = _common_alpha(layers)
    tensors = []
    for layer, factors in layers.items():
        name, order = gguf_name(base, f"{layer}.weight")
        b = factors.B if order is None else factors.B[order]
        left = factors.scale * (factors.rank / alpha if alpha else 1.0)
        b = b if left == 1.0 else b.astype(np.float64) * left
        tensors += [_tensor(f"{name}.lora_a", factors.A), _tensor(f"{name}.lora_b", b)]
    write_gguf(path, _metadata(adapter, base, alpha), tensors)


def _common_alpha(layers: Mapping[str, Factors]) -> float:
    """The alpha of most layers: scale · rank. What the scale of another layer differs by goes into its B."""
    return Counter(factors.scale * factors.rank for factors in layers.values()).most_common(1)[0][0]


def _metadata(adapter: Adapter, base: Base, alpha: float) -> dict[str, Any]:
    notes = {f"thimble.{name.removeprefix('thimble.')}": text for name, text in adapter.notes.items()}
    return {
        "general.architecture": architecture(base),
        "general.type": "adapter",
        "adapter.type": "lora",
        LORA_ALPHA: np.float32(alpha),
        "general.base_model.count": np.uint32(1),
        "general.base_model.0.name": adapter.base or base.name,
        "general.file_type": np.uint32(0),
        **notes,
    }


def _tensor(name: str, values: Any) -> NewTensor:
    numbers = np.ascontiguousarray(values, "<f4")
    return NewTensor(name, "F32", numbers.shape, partial(_parts, numbers))


def _parts(numbers: Any) -> list[memoryview]:
    return [numbers.reshape(-1).view(np.uint8).data]
