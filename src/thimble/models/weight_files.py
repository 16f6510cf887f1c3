"""Which files of a Hugging Face folder hold its weights, chosen as transformers chooses them."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from thimble.errors import BaseModelError, listing
from thimble.files.untrusted import names_in, read_json_object, shown

MOST_CONFIG_BYTES, MOST_INDEX_BYTES, MOST_SHARDS = 4_000_000, 32_000_000, 1000
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FILE_NAME = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]{0,200}\.safetensors")
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
# What transformers never takes for the weights of a model: other layouts, other precisions, leftovers of training.
_NEVER = re.compile(
    r"consolidated.*|adapter_model.*|optimizer.*|scheduler.*|rng_state.*|training.*|.*\.(fp16|bf16|fp32|non_ema)(-\d+-of-\d+)?"
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2", ".download", ".tmp")


@dataclass(frozen=True)
class Chosen:
    """The files that hold the weights of a folder."""

    files: tuple[Path, ...]  # all shards in order
    notes: tuple[str, ...] = ()  # what else lies there and is not read
    warnings: tuple[str, ...] = ()  # what may make the weights other ones than its owner thinks


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder, all shards in order; none that the index names may be missing."""
    return list(choose_files(folder).files)


def choose_files(folder: Path) -> Chosen:
    """Choose as transformers does: the file that config.json names, else model.safetensors, else what the index names.

    Without any of them the shards are taken that are there in full, else the only safetensors file; a BaseModelError
    if that leaves none or a choice.
    """
    named = _named_in_config(folder)
    if named:
        return _with_others(folder, _indexed_files(folder / named) if named.endswith(".json") else [folder / named])
    if os.path.lexists(folder / WHOLE):
        return _with_others(folder, [folder / WHOLE])
    if os.path.lexists(folder / INDEX):
        return _with_others(folder, _indexed_files(folder / INDEX))
    return _with_others(folder, _unindexed_files(folder))


def _named_in_config(folder: Path) -> str | None:
    if not os.path.lexists(folder / "config.json"):
        return None
    found = read_json_object(folder / "config.json", MOST_CONFIG_BYTES, BaseModelError).get("transformers_weights")
    if found is None:
        return None
    if not isinstance(found, str) or not _FILE_NAME.fullmatch(found.removesuffix(".index.json")):
        raise BaseModelError(
            f"{folder / 'config.json'} has the transformers_weights {shown(found)}: expected the name of a "
            ".safetensors file, or of its index, in the same folder"
        )
    return found


def _with_others(folder: Path, files: list[Path]) -> Chosen:
    """What was chosen, and what to say of the files that were not."""
    names = names_in(folder)
    chosen = {path.name for path in files}
    others = [name for name in names if name.endswith((".safetensors", ".gguf", *_PICKLES)) and name not in chosen]
    others = [name for name in others if not _is_leftover(name)]
    twins = [name for name in others if _SHARD.fullmatch(name)]
    warnings = []
    if twins:
        warnings.append(
            f"{folder} holds its weights twice: read from {listing(sorted(chosen), 2)}, as transformers does, and not "
            f"from {listing(twins, 2)}; delete those that are out of date"
        )
    if "adapter_config.json" in names:
        warnings.append(
            f"{folder} holds an adapter beside the base, which transformers would load with it; here the base is read "
            f"alone: name the adapter with --adapter if you want both, or move it elsewhere"
        )
    rest = [name for name in others if name not in twins and not name.startswith("adapter_model")]
    notes = [f"weights: {listing(sorted(chosen), 2)}; not read: {listing(rest, 4)}"] if rest else []
    return Chosen(tuple(files), tuple(notes), tuple(warnings))


def _is_leftover(name: str) -> bool:
    return bool(re.fullmatch(r"(optimizer|scheduler|rng_state|training_args|scaler).*", name))


def _unindexed_files(folder: Path) -> list[Path]:
    """The weights of a folder that has neither model.safetensors nor an index."""
    found = sorted(path for path in folder.glob("*.safetensors") if not _NEVER.fullmatch(path.name[:-12]))
    shards = [path for path in found if _SHARD.fullmatch(path.name)]
    if shards:
        counts = [int(match[2]) for path in shards if (match := _SHARD.fullmatch(path.name))]
        names = {path.name for path in shards}
        missing = [
            name for n in range(1, counts[0] + 1)
            if counts[0] <= MOST_SHARDS and (name := f"model-{n:05}-of-{counts[0]:05}.safetensors") not in names
        ]  # fmt: skip
        if missing or len(set(counts)) > 1:
            what = f"lacks {listing(missing, 3)}" if missing else "holds shards of several sets"
            raise BaseModelError(f"base {folder} {what}, and has no {INDEX}: copy the base again")
        return shards
    if len(found) == 1:
        return found
    if found:
        raise BaseModelError(
            f"base {folder} holds {listing([path.name for path in found], 4)}: expected {WHOLE}, or an index "
            f"{INDEX}, that says which are its weights; rename or index them"
        )
    raise BaseModelError(f"base {folder} has no .safetensors file; {_what_else(folder)}")


def _what_else(folder: Path) -> str:
    """What a folder without weights holds, and how they get there."""
    names = names_in(folder)
    blobs = folder.parent.parent / "blobs"  # of the hub's cache, where files lie while they come
    on_their_way = names_in(blobs) if folder.parent.name == "snapshots" and blobs.is_dir() else []
    unfinished = [name for name in (*names, *on_their_way) if name.endswith(UNFINISHED)]
    if unfinished:
        return f"it holds {listing(unfinished, 3)}, a download that has not ended: download the base again"
    if any(name.startswith("consolidated") and name.endswith(".safetensors") for name in names):
        return (
            "it holds consolidated.safetensors, the layout of Mistral's own programs: expected that of transformers, "
            f"{WHOLE}, which most repositories hold beside it"
        )
    variants = [name for name in names if name.endswith(".safetensors")]
    if variants:
        return f"it holds {listing(variants, 3)}: if these are the weights, call them {WHOLE}"
    if any(name.endswith(_PICKLES) for name in names):
        return (
            "it holds only .bin files, which can run code when read: convert them to safetensors, as transformers "
            f"does: AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained('converted'), and "
            "AutoTokenizer alike"
        )
    return f"it holds {listing(names) or 'nothing'}"


def _indexed_files(index: Path) -> list[Path]:
    """The shards that an index names; a name is nothing but the name of a file beside it."""
    found = read_json_object(index, MOST_INDEX_BYTES, BaseModelError).get("weight_map")
    values = list(found.values()) if isinstance(found, dict) else []
    if not values or not all(isinstance(name, str) for name in values):
        raise BaseModelError(
            f"{index} has the weight_map {shown(found)}: expected an object of names of tensors and files"
        )
    names = sorted(set(values))
    outside = [shown(name) for name in names if not _FILE_NAME.fullmatch(name)]
    if outside or len(names) > MOST_SHARDS:
        what = f"names {listing(outside, 3)}" if outside else f"names {len(names):,} files"
        raise BaseModelError(
            f"{index} {what}: expected at most {MOST_SHARDS:,} names of .safetensors files in the same folder"
        )
    missing = [name for name in names if not os.path.lexists(index.parent / name)]
    if missing:
        unfinished = [name for name in names_in(index.parent) if name.endswith(UNFINISHED)]
        why = f" (there is {listing(unfinished, 2)}, a download that has not ended)" if unfinished else ""
        raise BaseModelError(
            f"base {index.parent} lacks {listing(missing)}, named in {index.name}{why}: copy the base again"
        )
    return [index.parent / name for name in names]
