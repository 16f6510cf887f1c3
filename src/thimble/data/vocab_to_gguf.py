"""The vocabulary of a Hugging Face folder as GGUF metadata, as llama.cpp's converter writes it.

A GGUF file names how text is cut into words instead of saying it. The name is found by what the cutting does: the one
is taken whose patterns (`pretokenize`) cut a difficult text into the same words.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thimble.data.added_tokens import read_settings
from thimble.data.gguf_vocab import BYTE, CONTROL, KEY, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, byte_of
from thimble.data.pretokenize import PRE_TOKENIZERS
from thimble.data.tokenizer import TEMPLATE_KEYS, Tokenizer
from thimble.errors import BaseModelError

if TYPE_CHECKING:
    import tokenizers

NO_SCORE = -1000.0  # of tokens that no merge makes
# The first name of those that cut alike is written: the most common first.
_NAMES = ("llama-bpe", "qwen2", "smollm", "gpt-2", "tekken", "gpt-4o", "smaug-bpe", *PRE_TOKENIZERS)
# Spaces, numbers, contractions, scripts and signs, on which the patterns in use differ.
TRIAL = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis) ✅ 🦙🦙 3 33 333 3333 "
    "33333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български '''```\"\"\"..."
    "!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, We'Ve a'lL camelCase HTTPServer "
    "x/y//\n a\u0301 e\u0301É ½ ²³ Ⅷ café_naïve $1,234.50 (a)[b]{c} <|x|>\r\n\r\n  end "
)


def vocab_header(folder: Path, tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """Metadata of a folder's vocabulary and chat template.

    Args:
        folder: Of the base.
        tokenizer: The same, as it is used here.
        size: Rows of the embedding: what the vocabulary lacks is filled up with unused tokens.

    Returns:
        Values by key, as `write_gguf` takes them.

    Raises:
        BaseModelError: If llama.cpp knows no such tokenizer.
    """
    inner = tokenizer.inner
    described = json.loads(inner.to_str())
    is_byte_level = "ByteLevel" in json.dumps(described["pre_tokenizer"]) and not described["model"].get(
        "byte_fallback"
    )
    if described["model"]["type"] != "BPE":
        raise BaseModelError(
            f"the tokenizer of {folder} is {described['model']['type']}: expected BPE, or SentencePiece's BPE; "
            "llama.cpp's own converter may know it"
        )
    tokens, types = _tokens(inner, tokenizer, size, is_byte_level)
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in described["model"]["merges"]]
    if is_byte_level:
        pre = name_of(inner, described, folder)
        header = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges}
    else:
        header = {"model": "llama", "pre": "default", "tokens": tokens, "scores": _scores(tokens, merges)}
        header["add_space_prefix"] = np.bool_(tokenizer.prefixes_space)
    header |= {
        "token_type": np.array(types, np.int32),
        **_ids(folder, tokenizer, size),
        "add_eos_token": np.bool_(False),
    }
    given = zip(TEMPLATE_KEYS, (tokenizer.chat_template, tokenizer.tool_template), strict=True)
    templates: dict[str, Any] = {key: text for key, text in given if text}
    templates |= {"tokenizer.chat_templates": ["tool_use"]} if tokenizer.tool_template else {}
    return {KEY + name: value for name, value in header.items()} | templates


def _tokens(
    inner: "tokenizers.Tokenizer", tokenizer: Tokenizer, size: int, is_byte_level: bool
) -> tuple[list[str], list[int]]:
    """All tokens by number, and what each is."""
    added = inner.get_added_tokens_decoder()
    unknown = getattr(inner.model, "unk_token", None)
    tokens, types = [f"[PAD{index}]" for index in range(size)], [UNUSED] * size
    for text, index in inner.get_vocab(with_added_tokens=True).items():
        if index >= size:
            continue
        tokens[index] = text
        if index in added:
            types[index] = CONTROL if index in tokenizer.special_ids or _looks_special(text) else USER_DEFINED
        elif text == unknown and not is_byte_level:
            types[index] = UNKNOWN
        else:
            types[index] = BYTE if byte_of(text) is not None and not is_byte_level else NORMAL
    return tokens, types


def _looks_special(text: str) -> bool:
    """Whether llama.cpp's converter takes a token for a mark, whatever the folder says."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith(("<|", "<｜")) and text.endswith(("|>", "｜>")))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _scores(tokens: list[str], merges: list[str]) -> Any:
    """SentencePiece joins the pair whose union has the highest score: the order of the merges, as scores."""
    first: dict[str, int] = {}
    for number, merge in enumerate(merges):
        first.setdefault(merge.replace(" ", "", 1), number)
    return np.array([-float(first[token]) if token in first else NO_SCORE for token in tokens], np.float32)


def _ids(folder: Path, tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """Numbers of the named tokens: by their texts in the tokenizer's files, or else by config.json."""
    config, inner = read_settings(folder / "config.json"), tokenizer.inner
    keys: dict[str, Any] = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("sep", "seperator"), ("pad", "padding")):
        named = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}.get(ours)
        named = inner.token_to_id(tokenizer.named_tokens.get(f"{ours}_token", "")) if named is None else named
        index = config.get(f"{ours}_token_id") if named is None else named
        if type(index) is int and 0 <= index < size:
            keys[f"{theirs}_token_id"] = np.uint32(index)
    return keys | {"add_bos_token": np.bool_(tokenizer.add_bos)}


def name_of(inner: "tokenizers.Tokenizer", described: dict[str, Any], folder: Path) -> str:
    """What llama.cpp calls the way in which a byte-level tokenizer cuts text; a BaseModelError if it knows none."""
    from tokenizers import Regex, pre_tokenizers

    words = [word for word, _ in inner.pre_tokenizer.pre_tokenize_str(TRIAL)]
    ignores_merges = bool(described["model"].get("ignore_merges"))
    for name in _NAMES:
        pre = PRE_TOKENIZERS[name]
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
        cut = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        if pre.ignores_merges == ignores_merges and [word for word, _ in cut.pre_tokenize_str(TRIAL)] == words:
            return name
    raise BaseModelError(
        f"the tokenizer of {folder} cuts text into words in a way that llama.cpp has no name for here: convert the "
        "folder with llama.cpp's own convert_hf_to_gguf.py, and name that file with --base"
    )
