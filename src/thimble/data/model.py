"""A base with what turns text into its tokens: opened by path or hub name, with tokenizer and chat template."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from thimble.core.adapter import Adapter
from thimble.data.template import ChatTemplate
from thimble.data.tokenizer import Tokenizer, tokenizer_from_folder, tokenizer_from_gguf
from thimble.errors import BaseModelError, MissingPackageError, Problems, install_line, listing
from thimble.events import EventLog
from thimble.files.peft import find_adapter
from thimble.models.adapter_base import base_of
from thimble.models.adapters import check_all_fit, load_adapters
from thimble.models.base import Base, open_base
from thimble.models.gguf_adapter import is_gguf
from thimble.models.module_base import ModuleBase, is_function, open_module_base

_FETCHED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]
# Further copies of the weights in other layouts, which would be as large again and are never read.
_NOT_FETCHED = ["consolidated*", "original/*", "onnx/*", "openvino/*", "*.fp16.safetensors", "adapter_*", "optimizer*"]


@dataclass(frozen=True)
class Model:
    """An opened base with what turns text into its tokens."""

    base: Base
    tokenizer: Tokenizer
    template: ChatTemplate | None  # None if it has none


def open_model(name: str | None) -> Model:
    """Open a base by path or hub name, with tokenizer and template; a BaseModelError if anything is missing."""
    return model_of(find_base(name))


def model_of(base: Base) -> Model:
    """A base with its tokenizer and template; a BaseModelError if they are missing or another base's."""
    tokenizer = tokenizer_from_folder(base.path) if base.metadata is None else tokenizer_from_gguf(base.metadata)
    if tokenizer.last_id >= base.spec.vocab_size:
        raise BaseModelError(
            f"the tokenizer of {base.name} has tokens up to number {tokenizer.last_id:,}, but the base knows "
            f"{base.spec.vocab_size:,}: it belongs to another base; copy the right one"
        )
    beyond = [index for index in (tokenizer.bos_id, tokenizer.eos_id) if (index or 0) >= base.spec.vocab_size]
    if beyond:
        named = listing(f"{tokenizer.piece(index)!r} as number {index:,}" for index in beyond)
        raise BaseModelError(
            f"the tokenizer of {base.name} begins or ends texts with {named}, but the base knows "
            f"{base.spec.vocab_size:,}: name tokens in tokenizer_config.json that it was trained with, or copy the "
            "right files"
        )
    return Model(base, tokenizer, template_of(tokenizer))


def template_of(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template that came with a tokenizer, if one did, with the special tokens it may write."""
    if not tokenizer.chat_template:
        return None
    return ChatTemplate(
        tokenizer.chat_template, tokenizer.bos_token or "", tokenizer.eos_token or "",
        tool_use=tokenizer.tool_template, more_tokens=tokenizer.named_tokens,
    )  # fmt: skip


def find_base(name: str | None) -> Base:
    """Open a base by path or hub name; None is the default base. Raises a BaseModelError as `open_base` does."""
    return open_base(_from_hub(name) if name and is_hub_name(name) else name)


def find_module_base(name: str | None, task: str) -> ModuleBase:
    """Find a base for another task than text, by path, hub name or function; raises a BaseModelError."""
    if name is None:
        raise BaseModelError(
            f"no base is given for --task {task}: name with --base a Hugging Face folder, a hub name (owner/name), or "
            "a function of your own that makes a module, as file.py:name"
        )
    return open_module_base(_from_hub(name) if is_hub_name(name) and not is_function(name) else name)


def base_with_adapters(
    named: str | None, paths: Sequence[str], problems: Problems, log: EventLog
) -> tuple[Base | None, dict[str, Adapter]]:
    """Open a base and adapters on it; without a name, the base that the adapters were trained on.

    Args:
        named: The base, by path or hub name; None if the user named none.
        paths: The adapters; without any, and without a name, the base is the default one.
        problems: Takes what is wrong, such as a base that is not found, or an adapter of another shape.
        log: Takes which base the adapters led to, and a warning for each that was trained on another one like it.

    Returns:
        The base, None if it cannot be opened or is not known, and the adapters that can be read, by their paths.
    """
    in_gguf = [path for path in paths if is_gguf(path)]
    read = load_adapters([path for path in paths if path not in in_gguf], problems)
    base = None
    if named is not None or not paths:
        base = problems.attempt(find_base, named)
    elif read:
        base = problems.attempt(base_of, read)
        if base:
            log.note(f"base: {base.path}, named by {'the adapter' if len(read) == 1 else 'the adapters'}")
    if base or not read:  # else it is known why not
        read |= load_adapters(in_gguf, problems, base)
    adapters = {path: read[path] for path in paths if path in read}
    if base:
        check_all_fit(adapters, base, problems, log.warning)
    return base, adapters


def model_with_adapters(
    named: str | None, paths: Sequence[str], problems: Problems, log: EventLog
) -> tuple[Model | None, dict[str, Adapter]]:
    """The same as `base_with_adapters`, the base with tokenizer and template."""
    base, adapters = base_with_adapters(named, paths, problems, log)
    return problems.attempt(model_of, base) if base else None, adapters


def log_base(base: Base, log: EventLog, tokenizer: Tokenizer | None = None, adapters: Iterable[str] = ()) -> None:
    """Tell which of several files a base was read from, and what in them, or beside adapters, contradicts it."""
    for note in (*base.notes, *base.spec.notes):
        log.note(note)
    for warning in (*base.warnings, *(tokenizer.warnings if tokenizer else ())):
        log.warning(warning)
    for path in adapters if tokenizer else ():
        for warning in _own_tokenizer(path, tokenizer):
            log.warning(warning)


def _own_tokenizer(path: str, tokenizer: Tokenizer) -> list[str]:
    """What differs in the tokenizer that an adapter folder brings, as trainers save one, and which is not used."""
    if is_gguf(path):
        return []
    folder = find_adapter(path)
    if not (folder / "tokenizer.json").is_file():
        return []
    try:
        own = tokenizer_from_folder(folder)
    except BaseModelError as error:
        return [f"adapter {path} brings a tokenizer of its own, which cannot be read and is not used ({error})"]
    unknown = own.unknown_to(tokenizer)
    found = (
        [f"tokens that the base does not have under these ids ({listing(map(repr, unknown), 4)})"] if unknown else []
    )
    if own.chat_template and own.chat_template != tokenizer.chat_template:
        found.append("another chat template")
    if not found:
        return []
    return [
        f"adapter {path} brings a tokenizer of its own with {' and '.join(found)}: the base's is used; copy its "
        "tokenizer files into the folder of the base if the adapter was trained with them"
    ]


def is_hub_name(name: str) -> bool:
    """Whether a name is `owner/name` and nothing here is called that."""
    parts = name.split("/")
    return not Path(name).exists() and len(parts) == 2 and all(parts) and not name.startswith((".", "~"))


def _from_hub(name: str) -> Path:
    name, _, _ = name.partition(":")  # behind which llama.cpp and Ollama name the type of the file
    if name.lower().endswith("-gguf"):
        raise BaseModelError(
            f"base {name} is a repository of GGUF files, of which you need one: fetch it with hf download {name} "
            "FILE.gguf, and name the path that it prints with --base"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingPackageError(
            f"base {name} is not a file or folder here; to fetch it as a hub name run: {install_line('hub')}"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=_FETCHED, ignore_patterns=_NOT_FETCHED))
    except Exception as error:  # the hub client raises many kinds, all of which mean the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseModelError(
            f"base {name} is neither a file or folder here nor a hub model that can be fetched ({reason})"
        ) from None
