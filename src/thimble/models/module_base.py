"""A base that is no decoder of ours: a folder that transformers opens, or a function of the user's own that makes one.

Nothing is loaded here: what it is called, where it lies, what its files are known by, and how its inputs are made.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thimble.errors import BaseModelError, escaped
from thimble.files.untrusted import read_json_object
from thimble.models.frozen_base import quick_hash, whole_hash
from thimble.models.places import find_place
from thimble.models.weight_files import MOST_CONFIG_BYTES, choose_files

_FUNCTION = re.compile(r"(?s)(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)")
PREPROCESSING = "preprocessor_config.json"
AS_BASE = "as_base"  # beside what that says: whether inputs are made as the base's own code does, for another trainer's


@dataclass(frozen=True)
class ModuleBase:
    """A base as its files show it.

    Attributes:
        name: What it is called in messages and reports.
        path: The folder, or the user's file.
        function: The function in that file; empty for a folder.
        config: config.json of a folder; empty for a function.
        files: What it is known by: config and weights, or the user's file.
        preprocessing: How inputs are made, as `preprocessor_config.json` says it.
        loader: The class of transformers that opens it; the function for one of the user's own. Known once it is
            opened, as is what follows.
        module_class: Its own class there, with the module that defines it; empty for a function.
        num_parameters: How many numbers it holds.
        weights_hash: Of the weights that a function made, which its file need not hold.
        notes: Which of several files were read, and the like.
        warnings: What may not be as its owner thinks.
    """

    name: str
    path: Path
    function: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    loader: str = ""
    module_class: str = ""
    num_parameters: int = 0
    weights_hash: str = ""
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def metadata(self) -> None:
        """That of GGUF files, which this is none of."""
        return None

    @property
    def architecture(self) -> str:
        """What the config calls the model, such as `ViTForImageClassification`; empty if it does not."""
        names = self.config.get("architectures")
        return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""

    @property
    def model_type(self) -> str:
        """The family in transformers, such as `vit`; empty for a function."""
        found = self.config.get("model_type")
        return found if isinstance(found, str) else ""

    def quick_fingerprint(self) -> str:
        """A hash of samples of the files, or of the weights that a function made."""
        return self.weights_hash or quick_hash(self.files)

    def fingerprint(self) -> str:
        """A hash of the files, or of the weights that a function made."""
        return self.weights_hash or whole_hash(self.files)


def is_function(base: str | None) -> bool:
    """Whether a base is a function in a file of the user's own, as `file.py:name`."""
    return bool(base and _FUNCTION.fullmatch(base))


def open_module_base(base: str | Path) -> ModuleBase:
    """Find a base; reads JSON files only.

    Args:
        base: `file.py:name`, or a Hugging Face folder.

    Returns:
        The base, with what its files say.

    Raises:
        BaseModelError: If it is missing, has no safetensors, or is none of these.
    """
    if found := _FUNCTION.fullmatch(str(base)):
        return _open_function(Path(found["file"]), found["name"])
    place = find_place(Path(base))
    if not place.path.is_dir():
        raise BaseModelError(
            f"base {place.path} is a file: expected a Hugging Face folder, or a function of your own that makes a "
            "module, as in --base my_model.py:build"
        )
    config = read_json_object(place.path / "config.json", MOST_CONFIG_BYTES, BaseModelError)
    chosen = choose_files(place.path)
    made_by = place.path / PREPROCESSING
    preprocessing = read_json_object(made_by, MOST_CONFIG_BYTES, BaseModelError) if made_by.is_file() else {}
    return ModuleBase(
        escaped(place.name), place.path, config=config, files=(place.path / "config.json", *chosen.files),
        preprocessing=preprocessing, notes=(*place.notes, *chosen.notes),
        warnings=chosen.warnings,
    )  # fmt: skip


def _open_function(path: Path, name: str) -> ModuleBase:
    if not path.is_file():
        raise BaseModelError(
            f"base {path}:{name}: there is no file {path}; expected a file of your own with a function {name} that "
            "makes a torch.nn.Module"
        )
    return ModuleBase(escaped(f"{path.name}:{name}"), path, function=name, files=(path,), loader=name)
