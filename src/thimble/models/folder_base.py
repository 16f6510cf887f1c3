"""A Hugging Face folder as a base: config.json, and the safetensors files that transformers would read."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from thimble.errors import BaseModelError, listing
from thimble.files.tensor_info import TensorInfo
from thimble.files.tensors import TensorFile, open_tensors
from thimble.files.torch_names import wrappers_of
from thimble.files.untrusted import names_in, printable, read_json_object
from thimble.models.quantized import check_not_quantized
from thimble.models.spec import DecoderSpec, spec_from_config
from thimble.models.transformers_base import describe_folder, runs_through_transformers
from thimble.models.weight_files import MOST_CONFIG_BYTES, choose_files
from thimble.models.weights import EMBEDDING, HEAD, Base, Weight, check_complete, unread_layers
from thimble.models.wrappers import TEXT, plain_name, unwrap

_PIECE_BYTES = 1 << 22
_QUANTIZED = ("quantization_config", "compression_config", "quantization")


def open_folder(folder: Path, name: str) -> Base:
    """Open a Hugging Face folder, called `name` in messages; raises a BaseModelError as `open_base` does."""
    if not os.path.lexists(folder / "config.json"):
        raise BaseModelError(f"base {folder} has no config.json; it holds {listing(names_in(folder)) or 'nothing'}")
    config = read_json_object(folder / "config.json", MOST_CONFIG_BYTES, BaseModelError)
    is_foreign = runs_through_transformers(config)
    inner, wrapper = (config, None) if is_foreign else unwrap(config)
    chosen = choose_files(folder)
    files = [open_tensors(path) for path in chosen.files]
    holders = _holders(folder, files)
    warnings = check_not_quantized(folder, name, config, {given: info for given, (_, info) in holders.items()})
    wrapped = _told_of_wrappers(name, holders)
    if is_foreign:
        if wrapped:
            raise BaseModelError(*wrapped)
        foreign, weights = describe_folder(folder, config, holders)
        told = (*chosen.warnings, *warnings)
        return Base(name, folder, foreign, weights, None, foreign.prefix, TEXT, chosen.notes, told)
    spec = spec_from_config({key: value for key, value in inner.items() if key not in _QUANTIZED})
    weights = _weights(folder, holders, spec)
    spec, told = _settle_head(folder, spec, weights)
    prefix, loader = (wrapper.prefix, wrapper.loader) if wrapper else ("model.", TEXT)
    return Base(
        name, folder, spec, check_complete(folder, spec, weights), None, prefix, loader, chosen.notes,
        (*chosen.warnings, *warnings, *wrapped, *told, *unread_layers(name, spec, weights)),
    )  # fmt: skip


def _holders(folder: Path, files: list[TensorFile]) -> dict[str, tuple[TensorFile, TensorInfo]]:
    """All tensors of a folder by their names there, with the files that hold them."""
    holders: dict[str, tuple[TensorFile, TensorInfo]] = {}
    twice = []
    for file in files:
        twice += [f"{printable(name)} in {file.path.name}" for name in file.tensors if name in holders]
        holders |= {name: (file, info) for name, info in file.tensors.items()}
    if twice:
        raise BaseModelError(
            f"base {folder} holds tensors more than once: {listing(twice, 3)}; expected each in one file"
        )
    return holders


def _told_of_wrappers(name: str, given: Iterable[str]) -> tuple[str, ...]:
    """What to say of names that were saved from within a wrapper of torch, which transformers does not know."""
    around = next(filter(None, map(wrappers_of, given)), "")
    if not around:
        return ()
    return (
        f"{name} names its tensors with {around}, as torch does around a model that is compiled or parallel: "
        "transformers would not find them and draw new ones; write the files again, as in "
        f"save_file({{name.replace('{around}', ''): tensor for name, tensor in load_file(path).items()}}, path, "
        "{'format': 'pt'}) of safetensors.torch",
    )


def _weights(
    folder: Path, holders: Mapping[str, tuple[TensorFile, TensorInfo]], spec: DecoderSpec
) -> dict[str, Weight]:
    """The tensors by the names of the plain text model; refuses two that would get the same."""
    weights: dict[str, Weight] = {}
    twice = []
    for given, (file, info) in holders.items():
        ours = plain_name(given)
        twice += [f"{printable(given)} in {file.path.name}"] if ours in weights else []
        weights[ours] = Weight(file, info, offset=spec.norm_offset if ours.endswith("norm.weight") else 0.0)
    if twice:
        raise BaseModelError(
            f"base {folder} holds tensors more than once: {listing(twice, 3)}; expected each under one name"
        )
    return weights


def _settle_head(folder: Path, spec: DecoderSpec, weights: dict[str, Weight]) -> tuple[DecoderSpec, tuple[str, ...]]:
    """Whether the head is the embedding, as transformers settles it: by the flag, unless the tensors contradict it."""
    head, embedding = weights.get(HEAD), weights.get(EMBEDDING)
    if not spec.is_tied:
        return spec, ()  # a head that is missing is found later
    if head is not None and embedding is None:  # tied, and saved under the other name
        weights[EMBEDDING] = replace(head)
        del weights[HEAD]
        return spec, ()
    if head is None or embedding is None or _are_equal(head, embedding):
        return spec, ()
    told = (
        f"config.json of {folder.name} says that the head is the embedding (tie_word_embeddings), but {HEAD} holds "
        "other numbers: it is used as the head, as transformers does; set tie_word_embeddings to false"
    )
    return replace(spec, is_tied=False), (told,)


def _are_equal(one: Weight, other: Weight) -> bool:
    """Whether two weights hold the same numbers in the same type; ends at the first that differs."""
    if (one.shape, one.dtype) != (other.shape, other.dtype) or len(one.shape) != 2:
        return False
    rows = max(1, _PIECE_BYTES * one.shape[0] // one.info.nbytes)
    for start in range(0, one.shape[0], rows):
        piece = slice(start, min(start + rows, one.shape[0]))
        if one.raw()[piece].tobytes() != other.raw()[piece].tobytes():
            return False
        one.release(piece)
        other.release(piece)
    return True
