"""A Hugging Face folder of a family that Thimble's own engine lacks, as a base that runs through transformers."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thimble.errors import BaseModelError, listing, plural
from thimble.files.tensor_info import TensorInfo
from thimble.files.tensors import TensorFile
from thimble.files.untrusted import printable
from thimble.models.spec import SUPPORTED
from thimble.models.transformers_spec import TransformersSpec, describe
from thimble.models.weights import FLOATS, Weight
from thimble.models.wrappers import OTHER_KINDS, WRAPPERS

_KIND = re.compile(r"[A-Za-z0-9_.\-]{1,60}")


def runs_through_transformers(config: Mapping[str, Any]) -> bool:
    """Whether a config.json names a type that is neither of our own families nor known to write no text."""
    kind = config.get("model_type")
    return (
        isinstance(kind, str)
        and _KIND.fullmatch(kind) is not None
        and kind not in (*SUPPORTED, *WRAPPERS, *OTHER_KINDS)
    )


def describe_folder(
    folder: Path, config: Mapping[str, Any], holders: Mapping[str, tuple[TensorFile, TensorInfo]]
) -> tuple[TransformersSpec, dict[str, Weight]]:
    """The description of a folder, and its tensors: those of adaptable layers by our names, others by their own.

    Args:
        folder: Of config.json.
        config: Its fields.
        holders: The tensors by their names there, with the files that hold them.

    Returns:
        The description and the weights. A layer whose weight the file holds in another form has none under its name.

    Raises:
        BaseModelError: If the folder cannot be used, or holds numbers that are no floats.
    """
    spec = describe(folder, config)
    unread = [f"{printable(name)} is {info.dtype}" for name, (_, info) in holders.items() if _is_unread(info)]
    if unread:
        raise BaseModelError(
            f"base {folder}: {unread[0]}, expected one of {listing(FLOATS, 20)}: take the same model in one of these "
            f"types ({plural(len(unread), 'tensor')} of this one cannot be read)"
        )
    weights = {name: Weight(file, info) for name, (file, info) in holders.items()}
    for path, module in spec.modules.items():
        name = _name_in_file(module, spec, holders)
        if name is not None and path not in spec.converted:
            found = Weight(*holders[name], is_turned=path in spec.turned)
            if found.shape == spec.shapes[path]:
                del weights[name]
                weights[f"{path}.weight"] = found
    return spec, weights


def _is_unread(info: TensorInfo) -> bool:
    """Whether a matrix is of no float type; masks and counters that old files hold are nothing to read."""
    return info.dtype not in FLOATS and info.name.endswith(".weight")


def _name_in_file(module: str, spec: TransformersSpec, names: Mapping[str, Any]) -> str | None:
    """What the weight of a module is called in the file: some files leave out the root of the names."""
    wanted = f"{module}.weight"
    return next((name for name in (wanted, wanted.removeprefix(f"{spec.root}.")) if name in names), None)
