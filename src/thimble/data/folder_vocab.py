"""The vocabulary of a Hugging Face folder: tokenizer.json, or the older vocab.json and merges.txt of byte-level BPE."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thimble.data.gguf_vocab import rust_faults
from thimble.errors import BaseModelError, listing
from thimble.files.untrusted import read_bytes, read_json_object, shown

if TYPE_CHECKING:
    import tokenizers

MOST_TOKENIZER_BYTES, MOST_VOCAB_BYTES = 128_000_000, 32_000_000
ADVICE = "Copy the file again, or update the package tokenizers."
# How Qwen2 and its kin cut text into words (transformers, models/qwen2/tokenization_qwen2.py).
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_LEVEL = ("Qwen2Tokenizer", "GPT2Tokenizer")
_OTHER_FILES = ("tokenizer.model", "tekken.json", "spiece.model", "tiktoken.model", "vocab.json", "merges.txt")


def read_inner(folder: Path, config: Mapping[str, Any]) -> "tokenizers.Tokenizer":
    """The tokenizer of a folder as its files of vocabulary describe it; a BaseModelError if there is none."""
    from tokenizers import Tokenizer as Inner

    path = folder / "tokenizer.json"
    if not os.path.lexists(path):
        return _from_vocab_and_merges(folder, config)
    content = read_bytes(path, MOST_TOKENIZER_BYTES, BaseModelError)
    with rust_faults(f"{path} cannot be read as a tokenizer", ADVICE):
        inner = Inner.from_buffer(content)
        if getattr(inner.model, "dropout", None):
            raise BaseModelError(
                f"{path} leaves out merges at random (dropout): expected the same ids for the same text"
            )
        return inner


def prefix_contradictions(inner: "tokenizers.Tokenizer", folder: Path, config: Mapping[str, Any]) -> list[str]:
    """A warning if tokenizer_config.json and tokenizer.json differ in whether a space is put before a text."""
    told = config.get("add_prefix_space")
    text = inner.normalizer.normalize_str("a") if inner.normalizer else "a"
    words = inner.pre_tokenizer.pre_tokenize_str(text) if inner.pre_tokenizer else [(text, (0, 1))]
    puts_space = bool(words) and words[0][0][:1] in (
        "\u2581",
        "\u0120",
    )  # how SentencePiece and byte-level BPE write it
    if not isinstance(told, bool) or told == puts_space:
        return []
    return [
        f"tokenizer_config.json of {folder.name} has add_prefix_space {str(told).lower()}, but tokenizer.json puts "
        f"{'a' if puts_space else 'no'} space before a text: tokenizer.json counts here; some versions of transformers "
        "follow the other: copy all tokenizer files from one place"
    ]


def _from_vocab_and_merges(folder: Path, config: Mapping[str, Any]) -> "tokenizers.Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    files = [folder / name for name in ("vocab.json", "merges.txt")]
    if kind not in _BYTE_LEVEL or not all(os.path.lexists(path) for path in files):
        _refuse(folder)
    vocab = read_json_object(files[0], MOST_VOCAB_BYTES, BaseModelError)
    if not vocab or not all(type(index) is int and 0 <= index < 1 << 31 for index in vocab.values()):
        raise BaseModelError(f"{files[0]} is damaged: expected tokens and their ids; copy the file again")
    merges = _read_merges(files[1])
    has_prefix = config.get("add_prefix_space") is True
    with rust_faults(f"{files[0]} and {files[1].name} cannot be used as a tokenizer", ADVICE):
        inner = Tokenizer(models.BPE(vocab, merges))
        inner.decoder = decoders.ByteLevel()
        if kind == "Qwen2Tokenizer":
            inner.normalizer = normalizers.NFC()
            words = pre_tokenizers.Split(Regex(_QWEN2), behavior="isolated")
            inner.pre_tokenizer = pre_tokenizers.Sequence(
                [words, pre_tokenizers.ByteLevel(add_prefix_space=has_prefix, use_regex=False)]
            )
        else:
            inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=has_prefix)
        return inner


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """Pairs of tokens, a line each; the first line may be a comment with a version."""
    try:
        lines = read_bytes(path, MOST_VOCAB_BYTES, BaseModelError).decode().split("\n")
    except UnicodeDecodeError as error:
        raise BaseModelError(f"{path} is not UTF-8 at byte {error.start:,}: copy the file again") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#version"):
            continue
        left, _, right = line.rstrip("\r").partition(" ")
        if not left or not right or " " in right:
            raise BaseModelError(f"{path}, line {number}: {shown(line)}: expected two tokens with a space between them")
        pairs.append((left, right))
    return pairs


def _refuse(folder: Path) -> None:
    found = [name for name in _OTHER_FILES if os.path.lexists(folder / name)]
    if found:
        raise BaseModelError(
            f"{folder} has only {listing(found)}, expected tokenizer.json. Write it once with transformers: "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    raise BaseModelError(
        f"{folder} has no tokenizer: expected tokenizer.json beside the weights. Copy it from where the model "
        "came from."
    )
