"""From the vocabulary in a GGUF file to a tokenizer of the `tokenizers` package.

Knows three kinds: byte-level BPE (model "gpt2"), SentencePiece BPE with scores (model "llama") and SentencePiece BPE
with merges (model "gemma4"). The rules for missing keys are those of llama.cpp, which will run the file.
"""

import contextlib
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from thimble.data.pretokenize import PRE_TOKENIZERS, PreTokenizer
from thimble.errors import BaseModelError, InputError, listing
from thimble.files.untrusted import printable, shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer

KEY = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # values of tokenizer.ggml.token_type
# Beyond any vocabulary: the longest token in use has some 250 characters, the largest vocabulary 2 million in all.
MOST_TOKENS, MOST_TOKEN_CHARACTERS, MOST_CHARACTERS = 1 << 20, 1024, 1 << 24
SPACE = "\u2581"  # how SentencePiece writes a space

# Tokens that end an answer, whatever the file calls them: llama.cpp knows them by their text too.
END_TOKENS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<turn|>",
    "<|endoftext|>", "<|end_of_text|>", "<end_of_utterance>", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>",
)  # fmt: skip


@contextlib.contextmanager
def rust_faults(problem: str, advice: str) -> Iterator[None]:
    """Turn what the package `tokenizers` raises over a damaged vocabulary into a BaseModelError."""
    # It raises bare Exceptions, and where its Rust code panics something that is no Exception at all.
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BaseModelError(f"{problem}: {printable(str(error))}. {advice}") from None


class GgufVocab(NamedTuple):
    """A tokenizer and what the file says beside the vocabulary."""

    tokenizer: "Tokenizer"
    ids: dict[str, int]  # "bos", "eos", "eot", "eom": those the file has
    adds_bos: bool
    warnings: tuple[str, ...] = ()  # what the file leaves open


def read_vocab(metadata: Mapping[str, Any], source: str) -> GgufVocab:
    """Build the tokenizer a GGUF file describes; a BaseModelError tells of a missing, damaged or unknown vocabulary."""
    model = metadata.get(KEY + "model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _gemma4}
    if model is None or metadata.get(KEY + "tokens") is None:
        missing = KEY + ("tokens" if model is not None else "model")
        raise BaseModelError(
            f"{source} has no tokenizer: {missing} is missing. Expected a complete language model; "
            "a file with weights only (an adapter, an image encoder) cannot be a base."
        )
    if not isinstance(model, str) or model not in builders:
        raise BaseModelError(
            f"{source} has a tokenizer of kind {shown(model)}: expected one of {', '.join(builders)}. "
            "Use another base, or the Hugging Face folder this file was made from."
        )
    tokens = _unique(_tokens(metadata, source))
    types = _token_types(metadata, tokens, source)
    ids = _special_ids(metadata, len(tokens), source)
    problem = f"{source} is damaged: its vocabulary and merges do not fit together"
    with rust_faults(problem, "Fetch the file again."):
        tokenizer, adds_bos = builders[model](metadata, tokens, types, source)
        _add_special_tokens(tokenizer, tokens, types, ids.values(), _strips_after(metadata))
    adds_bos = bool(metadata.get(KEY + "add_bos_token", adds_bos)) and "bos" in ids
    return GgufVocab(tokenizer, ids, adds_bos, _left_open(metadata, source) if model == "gpt2" else ())


def _left_open(metadata: Mapping[str, Any], source: str) -> tuple[str, ...]:
    """A warning of files from before there was a name for how text is cut, which llama.cpp guesses as well."""
    if metadata.get(KEY + "pre"):
        return ()
    return (
        f"{source} does not say how text is cut before tokens are made of it ({KEY}pre is missing, as in files from "
        "before May 2024): it is cut as llama.cpp cuts it then, which may be another way than the model was trained "
        "with; take a newer file of the model",
    )


def _array(metadata: Mapping[str, Any], name: str, kinds: tuple[type, ...], source: str) -> list[Any] | None:
    """An array of one kind of value, or None if the file has none."""
    values = metadata.get(KEY + name)
    if values is None:
        return None
    if not isinstance(values, list | tuple) or not all(type(value) in kinds for value in values):
        raise BaseModelError(
            f"{source} is damaged: {KEY}{name} is {shown(values)}, expected an array of {kinds[0].__name__}. "
            "Fetch the file again."
        )
    return list(values)


def _tokens(metadata: Mapping[str, Any], source: str) -> list[str]:
    tokens = _array(metadata, "tokens", (str,), source) or []
    longest = max(map(len, tokens), default=0)
    total = sum(map(len, tokens))
    if not 1 <= len(tokens) <= MOST_TOKENS or longest > MOST_TOKEN_CHARACTERS or total > MOST_CHARACTERS:
        raise BaseModelError(
            f"{source} has a vocabulary of {len(tokens):,} tokens with {total:,} characters, the longest {longest:,}: "
            f"expected 1 to {MOST_TOKENS:,} tokens of at most {MOST_TOKEN_CHARACTERS:,}, {MOST_CHARACTERS:,} in all. "
            "Fetch the file again."
        )
    return tokens


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
    types = _array(metadata, "token_type", (int,), source)
    if types is None:
        return [NORMAL] * len(tokens)
    if len(types) < len(tokens):
        raise BaseModelError(
            f"{source} is damaged: {KEY}token_type has {len(types):,} entries, expected one for each of the "
            f"{len(tokens):,} tokens. Fetch the file again."
        )
    return types


def _special_ids(metadata: Mapping[str, Any], num_tokens: int, source: str) -> dict[str, int]:
    defaults = {"bos": 1, "eos": 2} if metadata[KEY + "model"] == "llama" else {}
    ids = {}
    for name in ("bos", "eos", "eot", "eom"):
        value = metadata.get(f"{KEY}{name}_token_id", defaults.get(name))
        if value is None:
            continue
        if type(value) is not int or not 0 <= value < num_tokens:
            raise BaseModelError(
                f"{source} is damaged: {KEY}{name}_token_id is {shown(value)}, expected an id below {num_tokens:,}, "
                "the number of tokens. Fetch or convert the file again."
            )
        ids[name] = value
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
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise BaseModelError(
            f"{source} cuts text in a way not known here: {KEY}pre is {shown(name)}, expected one of "
            f"{listing(PRE_TOKENIZERS, most=60)}. Use the Hugging Face folder this file was made from."
        )
    return PRE_TOKENIZERS[name]


def _merges(metadata: Mapping[str, Any], source: str) -> list[tuple[str, str]]:
    merges = _array(metadata, "merges", (str,), source)
    if merges is None:
        raise BaseModelError(f"{source} is damaged: {KEY}merges is missing. Fetch or convert the file again.")
    cuts = [merge.find(" ", 1) for merge in merges]  # from 1: the left part may itself begin with a space
    return [(merge[:cut], merge[cut + 1 :]) for merge, cut in zip(merges, cuts, strict=True)]


def _bpe(tokens: list[str], merges: list[tuple[str, str]], **options: Any) -> "Tokenizer":
    from tokenizers import Tokenizer, models

    return Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges, **options))


def _byte_level(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], source: str
) -> tuple["Tokenizer", bool]:
    from tokenizers import Regex, decoders, pre_tokenizers

    pre = _pre_tokenizer(metadata, source)
    tokenizer = _bpe(tokens, _merges(metadata, source), ignore_merges=pre.ignores_merges)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.adds_bos


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], source: str
) -> tuple["Tokenizer", bool]:
    from tokenizers import decoders, normalizers

    scores = _array(metadata, "scores", (float, int), source)
    if scores is None or len(scores) < len(tokens):
        raise BaseModelError(
            f"{source} is damaged: {KEY}scores has {0 if scores is None else len(scores):,} entries, expected one for "
            f"each of the {len(tokens):,} tokens. Fetch or convert the file again."
        )
    merges = merges_from_scores(tokens, scores, types)
    tokenizer = _with_spaces_spelled(_bpe(tokens, merges, **_fallback(tokens, types)))
    if metadata.get(KEY + "add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), tokenizer.normalizer])
        tokenizer.decoder = decoders.Sequence([tokenizer.decoder, decoders.Strip(" ", 1, 0)])
    return tokenizer, True


def _gemma4(metadata: Mapping[str, Any], tokens: list[str], types: list[int], source: str) -> tuple["Tokenizer", bool]:
    from tokenizers import Regex, pre_tokenizers

    tokenizer = _with_spaces_spelled(_bpe(tokens, _merges(metadata, source), **_fallback(tokens, types)))
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
    """Turn SentencePiece scores, the highest joined first, into an order of merges: pairs of neighbours.

    SentencePiece always joins the neighbours whose union has the highest score; BPE applies merges in order. Listing
    every way to cut every token in two, best score first, makes both the same.
    """
    words = {token: index for index, token in enumerate(tokens) if types[index] in (NORMAL, USER_DEFINED, UNUSED)}
    found = [
        (-scores[index], words[token[:cut]], words[token[cut:]])
        for token, index in words.items()
        for cut in range(1, len(token))
        if token[:cut] in words and token[cut:] in words
    ]
    return [(tokens[left], tokens[right]) for _, left, right in sorted(found)]


def byte_of(token: str) -> bytes | None:
    """The byte a SentencePiece byte token such as `<0x0A>` stands for, or None."""
    found = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes([int(found[1], 16)]) if found else None


@functools.cache
def byte_level_alphabet() -> dict[str, int]:
    """The character each byte is written as in byte-level vocabularies (GPT-2), the other way round."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in plain)
    return {chr(byte): byte for byte in plain} | {
        chr(code): byte for code, byte in zip(itertools.count(256), others, strict=False)
    }
