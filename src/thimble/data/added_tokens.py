"""Tokens that only the settings of a Hugging Face folder list, joined with tokenizer.json as transformers joins them.

Sources: `from_pretrained` and the constructor of transformers' tokenizers (tokenization_utils_base.py and
tokenization_utils_tokenizers.py, version 5).
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thimble.errors import BaseModelError, listing
from thimble.files.untrusted import printable, read_json_object, shown

if TYPE_CHECKING:
    import tokenizers

MOST_SETTINGS_BYTES = 8_000_000
MOST_TOKENS, MOST_CHARACTERS = 200_000, 2000  # of an added token
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_RULES = ("single_word", "lstrip", "rstrip", "normalized", "special")

Token = dict[str, Any]  # `content`, and the rules it is found by


def settings_of(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, joined with special_tokens_map.json, which rules where no tokens are listed by id."""
    config, named = (read_settings(folder / f"{name}.json") for name in ("tokenizer_config", "special_tokens_map"))
    return {**named, **config} if "added_tokens_decoder" in config else {**config, **named}


def read_settings(path: Path) -> dict[str, Any]:
    """The content of a JSON file of settings, or nothing if there is none."""
    return read_json_object(path, MOST_SETTINGS_BYTES, BaseModelError) if os.path.lexists(path) else {}


def join_added_tokens(inner: "tokenizers.Tokenizer", folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Add the tokens that only the settings list; ids come as transformers gives them, one behind the other.

    Returned are warnings of tokens whose id in the settings is another one than they have; a BaseModelError if an entry
    is no token.
    """
    from tokenizers import AddedToken

    listed = _listed_by_id(folder, config)
    known = {token.content for token in inner.get_added_tokens_decoder().values()}
    named = _named(folder, config)
    marks = {token["content"] for token in named}
    new = [{**token, "special": token["special"] or token["content"] in marks} for _, token in sorted(listed.items())]
    given = known | {token["content"] for token in new}
    new += [token for token in named if token["content"] not in given]
    if len(new) > MOST_TOKENS:
        raise BaseModelError(f"{folder} lists {len(new):,} added tokens: expected at most {MOST_TOKENS:,}")
    inner.add_tokens([AddedToken(token.pop("content"), **token) for token in map(dict, new)])
    return _contradictions(inner, folder, listed)


def _contradictions(inner: "tokenizers.Tokenizer", folder: Path, listed: Mapping[int, Token]) -> list[str]:
    wrong = []
    for index, token in sorted(listed.items()):
        found = inner.token_to_id(token["content"])
        if found != index:
            wrong.append(f"{shown(token['content'])} is {found}, not {index}")
    if not wrong:
        return []
    return [
        f"the tokenizer files of {folder.name} contradict each other: by tokenizer.json {listing(wrong, 4)} as "
        "tokenizer_config.json or added_tokens.json says; the ids of tokenizer.json are used, as by transformers: copy "
        "all tokenizer files from one place"
    ]


def _listed_by_id(folder: Path, config: Mapping[str, Any]) -> dict[int, Token]:
    """Tokens that are listed with their ids: in added_tokens_decoder, else in the older added_tokens.json."""
    where, found = folder / "tokenizer_config.json", config.get("added_tokens_decoder")
    if found is None:
        where = folder / "added_tokens.json"
        special = {token["content"] for token in _named(folder, config)}
        return {
            _id(where, text, index): _token(
                where, text, {"special": text in special, "normalized": text not in special}
            )
            for text, index in read_settings(where).items()
        }
    if not isinstance(found, dict):
        raise BaseModelError(f"{where} has the added_tokens_decoder {shown(found)}: expected an object of tokens by id")
    return {_id(where, key, key): _token(where, token, {}) for key, token in found.items()}


def _id(where: Path, name: str, index: Any) -> int:
    if isinstance(index, str) and index.isascii() and index.isdecimal() and len(index) < 10:
        index = int(index)
    if type(index) is not int or not 0 <= index < 1 << 31:
        raise BaseModelError(
            f"{where} gives the added token {shown(name)} the id {shown(index)}: expected a whole number"
        )
    return index


def _token(where: Path, token: Any, rules: Mapping[str, bool]) -> Token:
    """A token with the rules it is found by, from its text or from an object."""
    given = token if isinstance(token, dict) else {"content": token}
    content = given.get("content")
    found = {name: given[name] for name in _RULES if name in given}
    if not isinstance(content, str) or not 1 <= len(content) <= MOST_CHARACTERS:
        raise BaseModelError(f"{where} lists the added token {shown(token)}: expected text, or an object with content")
    if not all(isinstance(value, bool) for value in found.values()):
        raise BaseModelError(
            f"{where} lists the added token {printable(content, 40)!r} with a rule that is not true or false"
        )
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "special": False}
    merged = {**plain, **rules, **found}
    merged.setdefault("normalized", not merged["special"])
    return {"content": content, **merged}


def _named(folder: Path, config: Mapping[str, Any]) -> list[Token]:
    """Tokens with a name, such as eos_token, in the order in which transformers adds those that are missing."""
    where = folder / "tokenizer_config.json"
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    by_name = dict(extra) if isinstance(extra, dict) else {}
    own = {key: value for key, value in config.items()
           if key not in NAMED and key.endswith("_token") and isinstance(value, str)}  # fmt: skip
    values = [config.get(key) for key in NAMED]
    values += [*own.values(), *by_name.values(), *(extra if isinstance(extra, list) else [])]
    return list(_once(_token(where, value, {"special": True}) | {"special": True} for value in values if value))


def _once(tokens: Iterator[Token]) -> Iterator[Token]:
    seen: set[str] = set()
    for token in tokens:
        if token["content"] not in seen:
            seen.add(token["content"])
            yield token
