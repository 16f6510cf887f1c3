"""Text to token ids and back, for a GGUF file or a Hugging Face folder.

Built on the Rust package `tokenizers`; transformers is never imported. Knows nothing of chat: a template renders a
conversation to text first (`template.py`).
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thimble.data import gguf_vocab
from thimble.data.added_tokens import join_added_tokens, read_settings, settings_of
from thimble.data.folder_template import Templates, checked_template, folder_templates
from thimble.data.folder_vocab import ADVICE, prefix_contradictions, read_inner
from thimble.data.gguf_vocab import rust_faults
from thimble.errors import BaseModelError
from thimble.files.untrusted import shown

if TYPE_CHECKING:
    import tokenizers


TEMPLATE_KEYS = ("tokenizer.chat_template", "tokenizer.chat_template.tool_use")  # of a GGUF file, as llama.cpp has them
NAMED_TOKENS = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")  # beside bos and eos


class Tokenizer:
    """One vocabulary with its special tokens and the chat template that came with it."""

    def __init__(
        self,
        inner: "tokenizers.Tokenizer",
        *,
        bos_id: int | None,
        eos_id: int | None,
        stop_ids: Sequence[int] = (),
        add_bos: bool = False,
        templates: Templates | None = None,
        named_tokens: Mapping[str, str] | None = None,
        warnings: Sequence[str] = (),
    ) -> None:
        """Wrap a tokenizer of the `tokenizers` package, whose post-processor is ignored.

        `stop_ids` are further ids that end an answer; `add_bos` tells that the model expects every text to begin with
        bos; `named_tokens` are texts of special tokens by the names that chat templates know them by; `warnings` are
        what in its files contradicts itself.
        """
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        added = inner.get_added_tokens_decoder()
        self._added = {index: token.content for index, token in added.items()}
        self.vocab_size: int = inner.get_vocab_size()
        self.last_id = max(inner.get_vocab(with_added_tokens=False).values(), default=-1)  # of ordinary tokens
        self.bos_id, self.eos_id = bos_id, eos_id
        self.bos_token = inner.id_to_token(bos_id) if bos_id is not None else ""
        self.eos_token = inner.id_to_token(eos_id) if eos_id is not None else ""
        marks = {index for index in (bos_id, eos_id) if index is not None}
        self.special_ids = frozenset({index for index, token in added.items() if token.special} | marks)
        self.special_tokens = {self._added.get(index) or inner.id_to_token(index): index for index in self.special_ids}
        self.stop_ids = self._stops(stop_ids)
        self.add_bos = add_bos and bos_id is not None
        templates = templates or Templates()
        self.chat_template, self.tool_template = templates.default, templates.tool_use
        self.named_tokens = dict(named_tokens or {})
        self.warnings = (*warnings, *templates.warnings)

    def _stops(self, given: Sequence[int]) -> frozenset[int]:
        named = {index for index in self.special_ids if self._added.get(index) in gguf_vocab.END_TOKENS}
        names = {self._added[index] for index in named}
        if {"<|return|>", "<|call|>"} <= names:  # gpt-oss: <|end|> only ends one of several channels there
            named = {index for index in named if self._added[index] != "<|end|>"}
        return frozenset(named | set(given) | ({self.eos_id} if self.eos_id is not None else set()))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Turn a text into ids; bos and eos are never added, marks like `<|im_end|>` become tokens if `special`."""
        with rust_faults("the tokenizer of the base cannot encode a text", ADVICE):
            inner = self._inner if special else self._plain
            return inner.encode(text, add_special_tokens=False).ids

    def encode_pieces(self, pieces: Sequence[str]) -> list[list[int]]:
        """Turn consecutive pieces of one text into ids, so that no token crosses from one piece into the next.

        Vocabularies that put a space before a text must not do so before a piece that continues one: it is encoded
        behind the end of the piece before it, and that end is cut off again.
        """
        result, before = [], ""
        for piece in pieces:
            result.append(self._encode_behind(before, piece) if before and piece else self.encode(piece))
            before = piece or before
        return result

    def _encode_behind(self, before: str, text: str) -> list[int]:
        if not self.prefixes_space:
            return self.encode(text)
        last = self._added.get((self.encode(before) or [-1])[-1])
        anchor = last if last and before.endswith(last) else "\n"
        head, whole = self.encode(anchor), self.encode(anchor + text)
        return whole[len(head) :] if whole[: len(head)] == head else self.encode(text)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Turn ids into text; bytes that form no character become U+FFFD."""
        with rust_faults("the tokenizer of the base cannot decode its tokens", ADVICE):
            return self._inner.decode([int(index) for index in ids], skip_special_tokens=skip_special)

    def unknown_to(self, other: "Tokenizer") -> dict[str, int]:
        """Added tokens that another tokenizer lacks, or has under other ids, with their ids here."""
        pairs = sorted(self._added.items())
        return {text: index for index, text in pairs if other._inner.token_to_id(text) != index}

    def piece(self, index: int) -> str:
        """The text of one token as it stands inside a sentence, with its leading space."""
        return self.piece_bytes(index).decode("utf-8", errors="replace")

    def piece_bytes(self, index: int) -> bytes:
        """The bytes of one token: a character may be spread over several tokens, so streaming joins bytes."""
        token = self._added.get(index)
        if token is not None:
            return token.encode()
        token = self._inner.id_to_token(index)
        if token is None:
            raise IndexError(f"token id {index} is outside the vocabulary of {self.vocab_size:,} tokens")
        if self._is_byte_level:
            alphabet = gguf_vocab.byte_level_alphabet()
            return b"".join(bytes([alphabet[c]]) if c in alphabet else c.encode() for c in token)
        return gguf_vocab.byte_of(token) or token.replace(gguf_vocab.SPACE, " ").encode()

    @functools.cached_property
    def _plain(self) -> "tokenizers.Tokenizer":
        """A second tokenizer over the same vocabulary that takes special tokens for ordinary text."""
        from tokenizers import Tokenizer as Inner

        plain = Inner(self._inner.model)
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            setattr(plain, part, getattr(self._inner, part))
        plain.add_tokens([token for _, token in sorted(self._inner.get_added_tokens_decoder().items())])
        plain.encode_special_tokens = True
        return plain

    @functools.cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in repr(self._inner.decoder)

    @property
    def inner(self) -> "tokenizers.Tokenizer":
        """The same in the package `tokenizers`, with every added token."""
        return self._inner

    @functools.cached_property
    def prefixes_space(self) -> bool:
        """Whether a space is put before a text."""
        newline = self.encode("\n")
        return self.encode("\na") != newline + self.encode("a")


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str = "the GGUF file") -> Tokenizer:
    """Build the tokenizer of a GGUF file from its metadata, with its chat template; raises as `read_vocab` does."""
    vocab = gguf_vocab.read_vocab(metadata, source)
    return Tokenizer(
        vocab.tokenizer,
        bos_id=vocab.ids.get("bos"),
        eos_id=vocab.ids.get("eos"),
        stop_ids=[vocab.ids[name] for name in ("eot", "eom") if name in vocab.ids],
        add_bos=vocab.adds_bos,
        templates=Templates(*(checked_template(metadata.get(key), source) for key in TEMPLATE_KEYS)),
        warnings=vocab.warnings,
    )


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """Build the tokenizer of a Hugging Face folder, with its chat template; a BaseModelError if it is damaged."""
    folder = Path(folder)
    config = settings_of(folder)
    inner = read_inner(folder, config)
    further = _further_ids(folder)
    with rust_faults(f"{folder / 'tokenizer.json'} cannot be used as a tokenizer", ADVICE):
        warnings = [*join_added_tokens(inner, folder, config), *prefix_contradictions(inner, folder, config)]
        bos_id, eos_id = (_token_id(inner, config.get(name)) for name in ("bos_token", "eos_token"))
        if eos_id is None:
            eos_id = next((index for index in further if inner.id_to_token(index) is not None), None)
        begins_with_bos = bos_id is not None and inner.encode("").ids[:1] == [bos_id]
        adds_bos = config.get("add_bos_token")
        return Tokenizer(
            inner,
            bos_id=bos_id,
            eos_id=eos_id,
            stop_ids=further,
            add_bos=begins_with_bos if adds_bos is None else bool(adds_bos),
            templates=folder_templates(folder, config),
            named_tokens={name: text for name in NAMED_TOKENS if (text := _token_text(config.get(name)))},
            warnings=warnings,
        )


def _further_ids(folder: Path) -> list[int]:
    """Ids that end an answer: of generation_config.json, else of config.json; a number, a list, or nothing."""
    path = folder / "generation_config.json"
    found = read_settings(path).get("eos_token_id")
    if found is None:
        path = folder / "config.json"
        settings = read_settings(path)
        inner = settings.get("text_config")
        found = settings.get("eos_token_id", inner.get("eos_token_id") if isinstance(inner, dict) else None)
    further = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(index) is int and 0 <= index < 1 << 31 for index in further):
        raise BaseModelError(f"{path} has the eos_token_id {shown(found)}: expected an id, or a list of them")
    return further


def _token_id(inner: "tokenizers.Tokenizer", token: Any) -> int | None:
    text = _token_text(token)
    return inner.token_to_id(text) if text is not None else None


def _token_text(token: Any) -> str | None:
    if isinstance(token, dict):  # older folders store the token with its stripping rules
        token = token.get("content")
    return token if isinstance(token, str) else None
