"""How the tokens of a text become one vector, as Sentence Transformers notes it in the folder of an encoder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thimble.data.added_tokens import MOST_SETTINGS_BYTES, read_settings
from thimble.errors import BaseModelError, escaped, listing
from thimble.files.untrusted import read_bytes

MEAN, FIRST, LAST = "mean", "first", "last"  # of the last hidden states: of all tokens, of the first, of the last one
PLACES = {FIRST: 0, LAST: -1}
# As its configs have it, in releases before 5 as `pooling_mode_cls_token: true`; the length does not count here.
_MODES = {"mean": MEAN, "mean_tokens": MEAN, "mean_sqrt_len_tokens": MEAN, "cls": FIRST, "cls_token": FIRST}
_MODES |= {"lasttoken": LAST}
FLAG = "pooling_mode_"
_KNOWN = ("Transformer", "Pooling", "Normalize")


def pooling_of(folder: Path, name: str) -> tuple[str, tuple[str, ...]]:
    """The pooling of a base called `name`, and what of the way that its folder notes is not gone here.

    >>> pooling_of(Path("/no/such/folder"), "bert")  # what nobody noted is the mean
    ('mean', ())
    """
    modules = _modules(folder / "modules.json")
    kinds = {str(module.get("type")).rpartition(".")[2]: str(module.get("path") or "") for module in modules}
    settings = read_settings(folder / kinds["Pooling"] / "config.json") if "Pooling" in kinds else {}
    mode = settings.get("pooling_mode")
    flags = [key.removeprefix(FLAG) for key, value in settings.items() if key.startswith(FLAG) and value]
    named = [mode] if mode else flags
    known = [_MODES[str(one)] for one in named if str(one) in _MODES]
    warnings = []
    if named and (len(named) > 1 or not known):
        warnings.append(f"pools tokens by {listing(map(str, named))}, and here the mean is taken")
    if others := [kind for kind in kinds if kind not in _KNOWN]:
        warnings.append(f"goes on behind the pooling with {listing(others)}, which is left out here")
    prompts = read_settings(folder / "config_sentence_transformers.json").get("prompts")
    if isinstance(prompts, Mapping) and (texts := [str(text) for text in prompts.values() if text]):
        warnings.append(
            f"was trained with words in front of its texts ({listing(map(repr, texts), 3)}), which are not put there: "
            "write them into your rows"
        )
    told = tuple(f"base {name}, by its notes for Sentence Transformers, {escaped(warning)}" for warning in warnings)
    return (known[0] if len(named) == 1 and known else MEAN), told


def _modules(path: Path) -> list[Mapping[str, Any]]:
    """What a text goes through, in order."""
    if not path.is_file():
        return []
    try:
        found = json.loads(read_bytes(path, MOST_SETTINGS_BYTES, BaseModelError))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(module, Mapping) for module in found):
        raise BaseModelError(f"{escaped(str(path))} is no list of modules: copy the folder again")
    return found
