"""A base with what turns text into its tokens: opened by path or hub name, with tokenizer and chat template."""

from dataclasses import dataclass
from pathlib import Path

from thimble.data.template import ChatTemplate
from thimble.data.tokenizer import Tokenizer, tokenizer_from_folder, tokenizer_from_gguf
from thimble.errors import BaseModelError, MissingPackageError
from thimble.models.base import Base, open_base


@dataclass(frozen=True)
class Model:
    """An opened base with what turns text into its tokens."""

    base: Base
    tokenizer: Tokenizer
    template: ChatTemplate | None  # None if it has none


def open_model(name: str | None) -> Model:
    """Open a base by path or hub name, with tokenizer and template; a BaseModelError if anything is missing."""
    base = find_base(name)
    tokenizer = tokenizer_from_folder(base.path) if base.metadata is None else tokenizer_from_gguf(base.metadata)
    if tokenizer.last_id >= base.spec.vocab_size:
        raise BaseModelError(
            f"the tokenizer of {base.name} has tokens up to number {tokenizer.last_id:,}, but the base knows "
            f"{base.spec.vocab_size:,}: it belongs to another base; copy the right one"
        )
    return Model(base, tokenizer, template_of(tokenizer))


def template_of(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template that came with a tokenizer, if one did, with the special tokens it may write."""
    if not tokenizer.chat_template:
        return None
    return ChatTemplate(
        tokenizer.chat_template, tokenizer.bos_token or "", tokenizer.eos_token or "",
        more_tokens=tokenizer.named_tokens,
    )  # fmt: skip


def find_base(name: str | None) -> Base:
    """Open a base by path or hub name; None is the default base. Raises a BaseModelError as `open_base` does."""
    return open_base(_from_hub(name) if name and is_hub_name(name) else name)


def is_hub_name(name: str) -> bool:
    """Whether a name is `owner/name` and nothing here is called that."""
    parts = name.split("/")
    return not Path(name).exists() and len(parts) == 2 and all(parts) and not name.startswith((".", "~"))


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingPackageError(
            f'base {name} is not a file or folder here; to fetch it as a hub name run: pip install "thimble-lora[hub]"'
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]))
    except Exception as error:  # the hub client raises many kinds, all of which mean the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseModelError(
            f"base {name} is neither a file or folder here nor a hub model that can be fetched ({reason})"
        ) from None
