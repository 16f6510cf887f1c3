"""Texts as the tokens of a model that writes what it hears, and back; and the tokens that its texts begin with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thimble.errors import BaseModelError, escaped, listing
from thimble.files.untrusted import read_json_object
from thimble.models.weight_files import MOST_CONFIG_BYTES

WHISPER = "whisper"
_ENGLISH_ONLY_WORDS = 51_864  # the vocabulary of Whisper's English models; others know languages and tasks
_SPECIAL = "<|{}|>"


class TranscriptTokens:
    """The tokenizer of a base in a folder.

    Texts of Whisper begin with a space, as those that it was trained on do. `prompt` holds the tokens that stand before
    each text and are not learned, `end` the one behind it, `most` how many a text may have.
    """

    def __init__(self, folder: Path, name: str, language: str | None = None) -> None:
        """Open the tokenizer of a base called `name`; a BaseModelError says what is missing, or which languages it has.

        `language` is one that Whisper knows, such as `es`.
        """
        from tokenizers import Tokenizer

        file = folder / "tokenizer.json"
        if not file.is_file():
            raise BaseModelError(f"base {name} has no tokenizer.json: expected one beside its config.json")
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(file))
        except Exception as error:  # of the library, without a class of its own
            raise BaseModelError(
                f"base {name}: its tokenizer.json cannot be read ({escaped(str(error))[:120]})"
            ) from None
        config = read_json_object(folder / "config.json", MOST_CONFIG_BYTES, BaseModelError)
        start, end = (config.get(f"{key}_token_id") for key in ("decoder_start", "eos"))
        if type(start) is not int or type(end) is not int:
            raise BaseModelError(
                f"base {name} has no decoder_start_token_id and eos_token_id in its config.json, which texts begin "
                "and end with"
            )
        self._is_whisper = config.get("model_type") == WHISPER
        self.end = end
        self.language = self._language(language, config, name)
        self.prompt = (start, *self._told())
        places = config.get("max_target_positions") or config.get("max_position_embeddings")
        self.most = (places if type(places) is int else 448) - len(self.prompt)

    def _language(self, wanted: str | None, config: dict[str, Any], name: str) -> str:
        """The language that is told to the model; empty for models that know only one."""
        words = config.get("vocab_size")
        knows_many = self._is_whisper and isinstance(words, int) and words > _ENGLISH_ONLY_WORDS
        if not knows_many:
            if wanted:
                raise BaseModelError(f"--language {wanted}: base {name} is told no language; leave it out")
            return ""
        known = self._languages()
        if wanted in known:
            return str(wanted)
        what = f"--language {wanted}: base {name} does not know it" if wanted else f"base {name} knows many languages"
        raise BaseModelError(
            f"{what}: name the one that is spoken, such as --language es; it knows {listing(known, 100)}"
        )

    def _languages(self) -> list[str]:
        """Codes of languages: of two or three letters between the marks of special tokens."""
        names = (word[2:-2] for word in self._tokenizer.get_vocab() if word.startswith("<|") and word.endswith("|>"))
        return sorted(name for name in names if name.isalpha() and name.islower() and len(name) in (2, 3))

    def _told(self) -> list[int]:
        """What Whisper is told before a text: language and task, if it knows several; and that it writes no times."""
        if not self._is_whisper:
            return []
        words = [*([self.language, "transcribe"] if self.language else []), "notimestamps"]
        found = (self._tokenizer.token_to_id(_SPECIAL.format(word)) for word in words)
        return [token for token in found if token is not None]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with the end token."""
        text = f" {text.strip()}" if self._is_whisper else text.strip()
        return [*self._tokenizer.encode(text, add_special_tokens=False).ids, self.end]

    def decode(self, tokens: Sequence[int]) -> tuple[str, bool]:
        """The text of tokens up to the end token, and whether there was one."""
        tokens = list(tokens)
        has_end = self.end in tokens
        tokens = tokens[: tokens.index(self.end)] if has_end else tokens
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)).strip(), has_end
