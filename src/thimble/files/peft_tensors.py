"""How PEFT names and shapes the tensors of an adapter: two or three a layer, and those that replace the base's own.

PEFT wraps a layer that it adapts, so what lies inside of one is called by way of its `base_layer`; here paths are those
of the model as it was.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble.core.lowrank import Factors, Layout
from thimble.errors import listing
from thimble.files.peft_config import MAX_RANK, AdapterConfig
from thimble.files.peft_parameters import INSIDE, depth_of, module_of, name_parameters, unwrapped, wrapped, wrappers
from thimble.files.tensor_info import TensorInfo
from thimble.files.tensors import TensorFile
from thimble.files.torch_names import without_wrappers
from thimble.files.untrusted import some

ROOT = "base_model.model."
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"  # sides of a layer
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
COUNTER = "num_batches_tracked"  # of a norm: the one tensor of whole numbers
MOST_KERNEL_AXES = 3
MOST_STRANGE = 5  # tensors that are told of: an adapter in another layout has hundreds
_OF_BASE = f".{INSIDE}.weight"
_OF_VOCABULARY = {"embed_tokens": "embedding", "lm_head": "output head"}
_FLOATS = ("F64", "F32", "F16", "BF16")
_NAME = re.compile(r"base_model\.model\.(?P<path>[A-Za-z0-9_.\-]{1,512})")
_SIDES = "|".join(map(re.escape, (A, B, MAGNITUDE, EMBEDDING_A, EMBEDDING_B)))
_SIDE = re.compile(rf"(?P<path>.+)\.(?P<side>{_SIDES})")
# What PEFT writes a second time, if it is told to save biases, of modules that it saves anyway.
_COPIES = (".modules_to_save.", ".original_module.")


@dataclass(frozen=True)
class LayerTensors:
    """Where the factors of one layer lie in a file."""

    A: TensorInfo  # (rank, in, *kernel)
    B: TensorInfo  # (out, rank / groups, *ones)
    magnitude: TensorInfo | None  # (out,); of a convolution with an axis for each of its weight
    layout: Layout

    @property
    def rank(self) -> int:
        """Number of rows of A; of a parameter for each of its experts."""
        return self.A.shape[0] // max(1, self.layout.experts)

    def read(self, file: TensorFile, scale: float) -> Factors:
        """The factors, float32: A and B as matrices."""
        a, b = (file.read(info.name).reshape(info.shape[0], -1) for info in (self.A, self.B))
        magnitude = None if self.magnitude is None else file.read(self.magnitude.name).reshape(-1)
        return Factors(a, b, scale, magnitude, self.layout)


@dataclass(frozen=True)
class AdapterTensors:
    """The tensors of an adapter, sorted; what cannot be one of its is in `problems`."""

    layers: dict[str, LayerTensors]  # by path
    replaced: dict[str, TensorInfo]  # by name in the model
    problems: list[str]


def path_of(name: str) -> str | None:
    """The path of the layer that a tensor belongs to, or of the module whose parameter it is of; None if of none."""
    match = _match(name)
    return match[0] if match and match[2] else None


def _match(name: str) -> tuple[str, int, str] | None:
    """The path that a tensor is of, how many wrappers lie around that which is named, and its side; without one the
    path is its own. None if it has no such name.
    """
    found = _NAME.fullmatch(without_wrappers(name))
    if not found:
        return None
    side = _SIDE.fullmatch(found["path"])
    path, kind = (side["path"], side["side"]) if side else (found["path"], "")
    return *unwrapped(path), kind


def sort_tensors(file: TensorFile, config: AdapterConfig) -> AdapterTensors:
    """Say of every tensor of a file what it is; nothing is read."""
    sides: dict[tuple[str, int], dict[str, TensorInfo]] = {}
    others: dict[str, TensorInfo] = {}
    problems, strange = [], []
    for name, info in file.tensors.items():
        path, depth, side = _match(name) or ("", 0, "")
        if not path or not (info.dtype in _FLOATS if side else _is_replacement(info, config)):
            strange.append(info)
        elif side in sides.get((path, depth), ()) or (not side and path in others):
            other = sides[path, depth][side] if side else others[path]
            around = INSIDE if f".{INSIDE}." in name + other.name else "what wraps a model"
            problems.append(f"tensor {name} is there twice, with {around} in its name and without")
        elif side:
            sides.setdefault((path, depth), {})[side] = info
        elif config.bias == "none" or not any(part in name for part in _COPIES):
            others[path] = info
    strange += [
        info
        for path, info in others.items()
        if info.name.endswith(_OF_BASE) and (path.rpartition(".")[0], 0) not in sides
    ]
    problems += some(map(_is_nothing, strange), MOST_STRANGE)
    layers, wrong = _layers(sides, config)
    if not sides and not problems:
        problems.append("it holds no LoRA matrices")
    return AdapterTensors(layers, others, problems + wrong)


def _layers(
    sides: dict[tuple[str, int], dict[str, TensorInfo]], config: AdapterConfig
) -> tuple[dict[str, LayerTensors], list[str]]:
    """The layers by path, parameters of a module in their order; and what is wrong with them."""
    rows = {key: found[A].shape[0] if A in found and found[A].shape else 0 for key, found in sides.items()}
    named = name_parameters(rows, config)
    layers, problems = dict[str, LayerTensors](), list(named.problems)
    for (module, depth), found in sorted(sides.items(), key=lambda item: -item[0][1]):
        path = named.names.get((module, depth), module)
        problem, layer = _pair(path, found, config.use_dora, named.experts.get(path, 0))
        problems += [problem] if problem else []
        layers |= {path: layer} if layer else {}
    return layers, problems


def _is_nothing(info: TensorInfo) -> str:
    if kind := next((kind for end, kind in _OF_VOCABULARY.items() if info.name.endswith(f".{end}.weight")), ""):
        return (
            f"tensor {info.name} {info.dtype} {info.shape} is a whole {kind}, which PEFT saves too if the model's "
            "vocabulary was made larger: load both with PEFT, and write the merged model (merge_and_unload, then "
            "save_pretrained), a folder for --base"
        )
    what = f"tensor {info.name} {info.dtype} {info.shape} is not a LoRA matrix in PEFT's layout"
    is_renamed = "lora_" in info.name and not (_match(info.name) or ("", 0, ""))[2]
    return f"{what}, {ROOT}PATH.lora_A.weight: save it with PEFT's save_pretrained" if is_renamed else what


def _is_replacement(info: TensorInfo, config: AdapterConfig) -> bool:
    """Whether the config allows for a tensor that takes the place of the base's."""
    path = without_wrappers(info.name).removeprefix(ROOT)
    module, _, name = path.rpartition(".")
    if info.dtype not in _FLOATS and not (name == COUNTER and info.dtype == "I64" and info.shape == ()):
        return False
    if (config.bias != "none" and "bias" in name) or path.endswith(_OF_BASE):
        return True  # PEFT writes the weight of an embedding that it adapts, too
    owners = [module[: dot.start()] for dot in re.finditer(r"\.", module)] + [module]
    return any(owner.endswith(saved) for saved in config.modules_to_save for owner in owners)


def _pair(path: str, found: dict[str, TensorInfo], use_dora: bool, experts: int) -> tuple[str, LayerTensors | None]:
    """The tensors of one layer, or of a parameter of so many experts; or what is wrong with them."""
    pair = (EMBEDDING_A, EMBEDDING_B) if EMBEDDING_A in found or EMBEDDING_B in found else (A, B)
    expected = (*pair, MAGNITUDE) if use_dora else pair
    if sorted(found) != sorted(expected):
        return f"{path} has {listing(found)}: expected {listing(expected)}", None
    a, b, magnitude = found[pair[0]], found[pair[1]], found.get(MAGNITUDE)
    kernel, is_embedding = a.shape[2:], pair[0] == EMBEDDING_A
    if len(kernel) > (0 if is_embedding or experts else MOST_KERNEL_AXES) or len(a.shape) < 2:
        return _is_nothing(a), None
    if len(b.shape) != len(a.shape) or b.shape[2:] != (1,) * len(kernel):
        return f"{_is_nothing(b)}: its A is {a.shape}", None
    groups = a.shape[0] // max(1, b.shape[1])
    is_whole = groups * b.shape[1] == a.shape[0] and (groups == 1 or (bool(kernel) and b.shape[0] % groups == 0))
    if not is_whole or not 1 <= a.shape[0] <= MAX_RANK * max(1, experts) or 0 in a.shape + b.shape:
        wanted = "(rank, in) and (out, rank)" if not kernel else "(rank, in, kernel) and (out, rank / groups, ones)"
        return f"{path} has A {a.shape} and B {b.shape}: expected {wanted}, rank 1 to {MAX_RANK}", None
    if magnitude and magnitude.shape != (wide := _magnitude_shape(b.shape[0], len(kernel))):
        return f"{path} has a magnitude of shape {magnitude.shape}: expected {wide}", None
    return "", LayerTensors(a, b, magnitude, Layout(kernel, groups, is_embedding, experts))


def _magnitude_shape(size: int, axes: int) -> tuple[int, ...]:
    return (1, size) + (1,) * axes if axes else (size,)


def tensors_of(layers: dict[str, Factors], order: Sequence[str] = ()) -> Iterator[tuple[str, NDArray[Any]]]:
    """The tensors of some layers, by the names and in the shapes that PEFT gives them.

    `order` has the names of parameters among them in the order of their modules.
    """
    around = wrappers(layers)
    for path, factors in layers.items():
        layout, name = factors.layout, ROOT + wrapped(module_of(path, factors), around)
        name += f".{INSIDE}" * (depth_of(path, layers, order) if layout.experts else 0)
        axes = len(layout.kernel)
        sides = {
            EMBEDDING_A if layout.is_embedding else A: factors.A.reshape(factors.rank, -1, *layout.kernel),
            EMBEDDING_B if layout.is_embedding else B: factors.B.reshape(*factors.B.shape, *(1,) * axes),
        }
        if factors.magnitude is not None:
            sides[MAGNITUDE] = factors.magnitude.reshape(_magnitude_shape(factors.magnitude.size, axes))
        yield from ((f"{name}.{side}", np.ascontiguousarray(values)) for side, values in sides.items())


def outermost(path: str, layers: Collection[str]) -> str:
    """The adapted layer around a layer, whose rank and alpha PEFT gives it; the layer itself if none is around it."""
    ends = [dot.start() for dot in re.finditer(r"\.", path)]
    return next((path[:end] for end in ends if path[:end] in layers), path)
