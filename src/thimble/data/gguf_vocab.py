"""From the vocabulary in a GGUF file to a tokenizer of the `tokenizers` package.

Knows three kinds: byte-level BPE (model "gpt2"), SentencePiece BPE with scores (model "llama") and SentencePiece BPE
with merges (model "gemma4"). The rules for missing keys are those of llama.cpp, which will run the file.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from thimble.data.pretokenize import PRE_TOKENIZERS, PreTokenizer
from thimble.errors import BaseModelError, listing

if TYPE_CHECKING:
    from tokenizers import Tokenizer

KEY = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # values of tokenizer.ggml.token_type
SPACE = "\u2581"  # how SentencePiece writes a space

# Tokens that end an answer, whatever the file calls them: llama.cpp knows them by their text too.
END_TOKENS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<turn|>",
    "<|endoftext|>", "<|end_of_text|>", "<end_of_utterance>", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>",
)  # fmt: skip


class GgufVocab(NamedTuple):
    """A tokenizer and what the file says beside the vocabulary."""

    tokenizer: "Tokenizer"
    ids: dict[str, int]  # "bos", "eos", "eot", "eom": those the file has
    adds_bos: bool


def read_vocab(metadata: Mapping[str, Any], source: str) -> GgufVocab:
    """Build the tokenizer a GGUF file describes.

    Args:
        metadata: The key-value pairs of the file.
        source: What to call the file in messages.

    Returns:
        The tokenizer, the ids of special tokens, and whether texts begin with bos.

    Raises:
        BaseModelError: If the file has no vocabulary, a damaged one, or one of a kind not known here.
    """
    model = metadata.get(KEY + "model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _gemma4}
    if model is None or metadata.get(KEY + "tokens") is None:
        missing = KEY + ("tokens" if model is not None else "model")
        raise BaseModelError(
            f"{source} has no tokenizer: {missing} is missing. Expected a complete language model; "
            "a file with weights only (an adapter, an image encoder) cannot be a base."
        )
    if model not in builders:
        raise BaseModelError(
            f"{source} has a tokenizer of kind {model!r}: expected one of {', '.join(builders)}. "
            "Use another base, or the Hugging Face folder this file was made from."
        )
    tokens = _unique(metadata[KEY + "tokens"])
    types = _token_types(metadata, tokens, source)
    ids = _special_ids(metadata, len(tokens), source)
    tokenizer, adds_bos = builders[model](metadata, tokens, types, source)
    _add_special_tokens(tokenizer, tokens, types, ids.values(), _strips_after(metadata))
    return GgufVocab(tokenizer, ids, bool(metadata.get(KEY + "add_bos_token", adds_bos)) and "bos" in ids)


def _unique(tokens: Sequence[str]) -> list[str]:
    """The tokens by id, with a name of its own for an empty or repeated one (padding of some vocabularies)."""
    tokens = list(tokens)
    seen: set[str] = set()
    for index, token in enumerate(tokens):
        if not token or token in seen:
            tokens[index] = f"[EMPTY_{index}]"
        seen.add(tokens[index])
    return tokens


def _token_types(metadata: Mapping[str, Any], tokens: list[str], source: str) -> list[int]:
    types = metadata.get(KEY + "token_type")
    if types is None:
        return [NORMAL] * len(tokens)
    if len(types) < len(tokens):
        raise BaseModelError(
            f"{source} is damaged: {KEY}token_type has {len(types):,} entries, expected one for each of the "
            f"{len(tokens):,} tokens. Fetch the file again."
        )
    return [int(kind) for kind in types]


def _special_ids(metadata: Mapping[str, Any], num_tokens: int, source: str) -> dict[str, int]:
    defaults = {"bos": 1, "eos": 2} if metadata[KEY + "model"] == "llama" else {}
    ids = {}
    for name in ("bos", "eos", "eot", "eom"):
        value = metadata.get(f"{KEY}{name}_token_id", defaults.get(name))
        if value is None:
            continue
        if not 0 <= int(value) < num_tokens:
            raise BaseModelError(
                f"{source} is damaged: {KEY}{name}_token_id is {value}, expected an id below {num_tokens:,}, the "
                "number of tokens. Fetch or convert the file again."
            )
        ids[name] = int(value)
    return ids


def _strips_after(metadata: Mapping[str, Any]) -> bool:
    """Whether special tokens swallow the space after them; GGUF has no key for it, so llama.cpp goes by the name."""
    name = str(metadata.get("general.name", "")).lower()
    return "phi-3" in name or "phi3" in name


def _add_special_tokens(tokenizer: "Tokenizer", tokens: list[str], types: list[int], ids: Any, strips: bool) -> None:
    """Let the tokenizer find special tokens inside a text; one call, since each call rebuilds its search tree."""
    from tokenizers import AddedToken

    special = {index for index, kind in enumerate(types) if kind in (CONTROL, UNKNOWN)} | set(ids)
    special |= {index for index, token in enumerate(tokens) if token in END_TOKENS}
    never_strips = {"<unk>", "<s>", "<|endoftext|>"}
    added = []
    for index, token in enumerate(tokens):
        if index in special or types[index] == USER_DEFINED:
            rstrip = strips and token not in never_strips
            added.append(AddedToken(token, special=index in special, normalized=False, rstrip=rstrip))
    tokenizer.add_tokens(added)


def _pre_tokenizer(metadata: Mapping[str, Any], source: str) -> PreTokenizer:
    name = metadata.get(KEY + "pre") or "default"
    if name not in PRE_TOKENIZERS:
        raise BaseModelError(
            f"{source} cuts text in a way not known here: {KEY}pre is {name!r}, expected one of "
            f"{listing(PRE_TOKENIZERS, most=60)}. Use the Hugging Face folder this file was made from."
        )
    return PRE_TOKENIZERS[name]


def _merges(metadata: Mapping[str, Any], source: str) -> list[tuple[str, str]]:
    merges = metadata.get(KEY + "merges")
    if merges is None:
        raise BaseModelError(f"{source} is damaged: {KEY}merges is missing. Fetch or convert the file again.")
    cuts = [merge.find(" ", 1) for merge in merges]  # from 1: the left part may itself begin with a space
    return [(merge[:cut], merge[cut + 1 :]) for merge, cut in zip(merges, cuts, strict=True)]


def _bpe(source: str, tokens: list[str], merges: list[tuple[str, str]], **options: Any) -> "Tokenizer":
    from tokenizers import Tokenizer, models

    try:
        return Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges, **options))
    except Exception as error:  # the package raises bare Exception when a merge names an unknown token
        raise BaseModelError(
            f"{source} is damaged: its vocabulary and merges do not fit together ({error}). Fetch the file again."
        ) from error


def _byte_level(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], source: str
) -> tuple["Tokenizer", bool]:
    from tokenizers import Regex, decoders, pre_tokenizers

    pre = _pre_tokenizer(metadata, source)
    tokenizer = _bpe(source, tokens, _merges(metadata, source), ignore_merges=pre.ignores_merges)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.adds_bos


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], source: str
) -> tuple["Tokenizer", bool]:
    from tokenizers import decoders, normalizers

    scores = metadata.get(KEY + "scores")
    if scores is None or len(scores) < len(tokens):
        raise BaseModelError(
            f"{source} is damaged: {KEY}scores has {0 if scores is None else len(scores):,} entries, expected one for "
            f"each of the {len(tokens):,} tokens. Fetch or convert the file again."
        )
    merges = merges_from_scores(tokens, [float(score) for score in scores], types)
    tokenizer = _with_spaces_spelled(_bpe(source, tokens, merges, **_fallback(tokens, types)))
    if metadata.get(KEY + "add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), tokenizer.normalizer])
        tokenizer.decoder = decoders.Sequence([tokenizer.decoder, decoders.Strip(" ", 1, 0)])
    return tokenizer, True


def _gemma4(metadata: Mapping[str, Any], tokens: list[str], types: list[int], source: str) -> tuple["Tokenizer", bool]:
    from tokenizers import Regex, pre_tokenizers

    tokenizer = _with_spaces_spelled(_bpe(source, tokens, _merges(metadata, source), **_fallback(tokens, types)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+"), "isolated")
    return tokenizer, True


def _fallback(tokens: list[str], types: list[int]) -> dict[str, Any]:
    unknown = next((token for token, kind in zip(tokens, types, strict=False) if kind == UNKNOWN), None)
    return {"unk_token": unknown, "fuse_unk": True, "byte_fallback": BYTE in types}


def _with_spaces_spelled(tokenizer: "Tokenizer") -> "Tokenizer":
    from tokenizers import decoders, normalizers

    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def merges_from_scores(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Turn SentencePiece scores into an order of merges.

    SentencePiece always joins the neighbours whose union has the highest score; BPE applies merges in order. Listing
    every way to cut every token in two, best score first, makes both the same.

    Args:
        tokens: Tokens by id.
        scores: Score of each token; higher is joined earlier.
        types: Kind of each token; only text takes part.

    Returns:
        Pairs of neighbours to join, in order.
    """
    words = {token: index for index, token in enumerate(tokens) if types[index] in (NORMAL, USER_DEFINED, UNUSED)}
    found = []
    for token, index in words.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in words and right in words:
                found.append((-scores[index], words[left], words[right]))
    return [(tokens[left], tokens[right]) for _, left, right in sorted(found)]


def byte_of(token: str) -> bytes | None:
    """The byte a SentencePiece byte token such as `<0x0A>` stands for, or None."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return None


def byte_level_alphabet() -> dict[str, int]:
    """The character each byte is written as in byte-level vocabularies (GPT-2), the other way round."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in plain)
    return {chr(byte): byte for byte in plain} | {
        chr(code): byte for code, byte in zip(itertools.count(256), others, strict=False)
    }
