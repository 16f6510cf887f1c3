"""Opening a module: a Hugging Face folder in the class of a task, or what a function of the user's own makes.

safetensors only; no code of a model's folder is run. What transformers has to make anew, such as the head for the
labels of the data, is drawn from the seed.
"""

import contextlib
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from thimble.backends.torch.clip_inputs import allow_short_windows
from thimble.data.sentence_tokens import SentenceTokenizer
from thimble.errors import BaseModelError, MissingPackageError, escaped, install_line, listing
from thimble.files.user_program import load_program, place_of
from thimble.models.module_base import ModuleBase

# The class of transformers that opens a base for a task.
LOADERS = {
    "classify-text": "AutoModelForSequenceClassification",
    "embed": "AutoModel",
    "classify-image": "AutoModelForImageClassification",
    "classify-audio": "AutoModelForAudioClassification",
    "transcribe": "AutoModelForSpeechSeq2Seq",
}
CTC = (
    "; recognisers that give a letter for each moment (CTC) are not trained here: take one that writes its texts, such "
    "as Whisper, or tell clips apart with --task classify-audio"
)
PREPROCESSING = "preprocessing"  # what a module of the user's own may say of its inputs


@dataclass(frozen=True)
class OpenedModule:
    """A module with what is to be known of it.

    Attributes:
        module: float32, in evaluation.
        base: The base, with what is known once it is opened.
        head: The path of the last Linear, which makes the logits; empty for tasks without classes.
        fresh: Paths of the modules that were made anew, and of the head: they are to be trained whole.
        drawn: Of these, the ones that the base does not hold, which were drawn from the seed.
    """

    module: nn.Module
    base: ModuleBase
    head: str
    fresh: tuple[str, ...]
    drawn: tuple[str, ...] = ()


def open_module(base: ModuleBase, task: str, labels: Sequence[str] = (), seed: int = 0) -> OpenedModule:
    """Load a base for a task.

    Args:
        base: Where it lies.
        task: Such as `classify-image`.
        labels: The classes, for tasks that have them.
        seed: What is made anew is drawn from it.

    Returns:
        The module.

    Raises:
        BaseModelError: If it cannot be opened for the task; the text says what can.
        ConfigError: If the user's file does not run.
        MissingPackageError: If transformers is not installed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        opened = _call_function(base, labels) if base.function else _open_folder(base, task, labels)
    opened = _without_pooler(opened) if task == "embed" else opened
    module = opened.module.float().eval()
    head = opened.head
    if labels and not head:
        raise BaseModelError(
            f"base {base.name} has no Linear layer to be the head: classes are told apart by the last one, so end the "
            "module with one"
        )
    known = replace(opened.base, num_parameters=sum(parameter.numel() for parameter in module.parameters()))
    return OpenedModule(module, known, head, opened.fresh, opened.drawn)


# ---- a function of the user's own -----------------------------------------------------------------------------------


def _call_function(base: ModuleBase, labels: Sequence[str]) -> OpenedModule:
    """Make the module; its last Linear is replaced where it has another size than there are labels."""
    option = f"--base {base.path}:{base.function}"
    expected = "expected a file of your own with a function that makes a torch.nn.Module"
    function = getattr(load_program(base.path, option, expected), base.function, None)
    if not callable(function):
        raise BaseModelError(f"{option}: {base.path} defines no function {base.function}(); {expected}")
    given = {"num_labels": len(labels)} if labels and _takes(function, "num_labels") else {}
    try:
        module = function(**given)
    except (Exception, SystemExit) as error:
        raise BaseModelError(f"{option}: {base.function} failed: {place_of(error, str(base.path))}") from error
    if not isinstance(module, nn.Module):
        raise BaseModelError(f"{option}: {base.function} returned a {type(module).__name__}, {expected}")
    said = getattr(module, PREPROCESSING, {})
    if not isinstance(said, Mapping):
        raise BaseModelError(f"{option}: {PREPROCESSING} of the module is {said!r:.60}; expected a dict")
    head = _last_linear(module) if labels else ""
    known = replace(base, weights_hash=_hash(module, head), preprocessing={**base.preprocessing, **said})
    is_other = bool(head) and module.get_submodule(head).out_features != len(labels)
    if is_other:
        old = module.get_submodule(head)
        new = nn.Linear(old.in_features, len(labels), bias=old.bias is not None)
        module.set_submodule(head, new)
    return OpenedModule(module, known, head, (head,) if head else (), (head,) if is_other else ())


def _takes(function: Any, name: str) -> bool:
    with contextlib.suppress(TypeError, ValueError):
        return name in inspect.signature(function).parameters
    return False


def _last_linear(module: nn.Module) -> str:
    found = [path for path, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    return found[-1] if found else ""


def _hash(module: nn.Module, head: str) -> str:
    """SHA-256 of all weights but the head's, with their names and shapes."""
    total = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if not head or name.rpartition(".")[0] != head:
            total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            total.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _without_pooler(opened: OpenedModule) -> OpenedModule:
    """An encoder without the layer that pools for a classifier: embeddings are means, which it has no part in.

    Models that transformers also makes without one (`add_pooling_layer`) run without it.
    """
    module = opened.module
    if getattr(module, "pooler", None) is None or not _takes(type(module), "add_pooling_layer"):
        return opened
    module.pooler = None  # type: ignore[assignment]
    fresh, drawn = (
        tuple(path for path in paths if path.partition(".")[0] != "pooler") for paths in (opened.fresh, opened.drawn)
    )
    return replace(opened, fresh=fresh, drawn=drawn)


# ---- a folder -------------------------------------------------------------------------------------------------------


def _transformers(base: ModuleBase) -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingPackageError(
            f"base {base.name} is opened by transformers, which is not installed: run {install_line('models')}"
        ) from None
    return transformers


def _open_folder(base: ModuleBase, task: str, labels: Sequence[str]) -> OpenedModule:
    transformers = _transformers(base)
    config = _config(base, transformers)
    name = LOADERS[task]
    loader = getattr(transformers, name)
    if not _class_of(loader, config):
        raise BaseModelError(
            f"base {base.name} is a {escaped(base.model_type)}: {name} of transformers has none for {task}"
            + (CTC if task == "transcribe" and type(config) in transformers.AutoModelForCTC._model_mapping else "")
        )
    if labels:
        config.num_labels = len(labels)
        config.id2label, config.label2id = dict(enumerate(labels)), {label: n for n, label in enumerate(labels)}
        config.problem_type = "single_label_classification"  # the base's own may be another, by which it would be read
    if (
        task == "classify-text" and getattr(config, "pad_token_id", None) is None
    ):  # decoders find their last token by it
        config.pad_token_id = SentenceTokenizer(base.path, base.config).pad_id
    with _quiet(transformers):
        try:
            module, info = loader.from_pretrained(
                str(base.path), config=config, use_safetensors=True, trust_remote_code=False, local_files_only=True,
                dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            told = " ".join(str(error).split())[:300]
            raise BaseModelError(
                f"base {base.name} cannot be opened by {name} of transformers: {escaped(told)}"
            ) from error
    allow_short_windows(module)
    anew = {*info["missing_keys"], *(key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"])}
    fresh = drawn = _owners(module, anew)
    head = _last_linear(module) if labels else ""
    if head and not any(head == path or head.startswith(path + ".") for path in fresh):
        fresh = (*fresh, head)
    kind = type(module)
    known = replace(base, loader=name, module_class=f"{kind.__module__}.{kind.__qualname__}")
    return OpenedModule(module, known, head, fresh, drawn)


def classes_of(base: ModuleBase) -> dict[str, str]:
    """The tasks that a folder can be opened for, and the class that opens each.

    Embeddings are those of texts: what hears or sees has none here.
    """
    transformers = _transformers(base)
    config = _config(base, transformers)
    found = {task: _class_of(getattr(transformers, loader), config) for task, loader in LOADERS.items()}
    hears_or_sees = any(found[task] for task in ("classify-image", "classify-audio", "transcribe"))
    return {task: name for task, name in found.items() if name and not (task == "embed" and hears_or_sees)}


def head_of(base: ModuleBase, task: str) -> tuple[str, int]:
    """The path of the head that a base has in the class of a task, and its classes; nothing is loaded."""
    if base.function:
        module = _call_function(base, ()).module
        head = _last_linear(module)
        return head, module.get_submodule(head).out_features if head else 0
    module = _without_weights(base, task)
    return _last_linear(module), module.config.num_labels


def names_in_class(base: ModuleBase, task: str) -> set[str]:
    """Paths of all modules and names of all tensors that a base has in the class of a task; nothing is loaded."""
    module = _without_weights(base, task)
    return {path for path, _ in module.named_modules()} | {*module.state_dict()}


def _without_weights(base: ModuleBase, task: str) -> Any:
    """The module of a folder on the device meta, where its tensors hold nothing."""
    transformers = _transformers(base)
    config = _config(base, transformers)
    with torch.device("meta"), _quiet(transformers):
        return getattr(transformers, LOADERS[task]).from_config(config)


def _class_of(loader: Any, config: Any) -> str:
    """The name of the class that an auto class opens a config in; empty if it has none."""
    if type(config) not in loader._model_mapping:
        return ""
    found = loader._model_mapping[type(config)]
    return (found[0] if isinstance(found, tuple) else found).__name__


def _config(base: ModuleBase, transformers: Any) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(str(base.path), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        if "auto_map" in base.config:
            raise BaseModelError(
                f"base {base.name} comes with code of its own (auto_map in config.json), which is never run: take a "
                "model whose architecture transformers knows, or name a function of your own that makes the module, as "
                "in --base my_model.py:build"
            ) from None
        kind = json.dumps(base.config.get("model_type"))
        raise BaseModelError(
            f"base {base.name} has the model_type {escaped(kind)}, which transformers {transformers.__version__} does "
            f"not open ({escaped(' '.join(str(error).split())[:120])}): take another, or update transformers"
        ) from None


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the tables of transformers: what is made anew is told in our words."""
    logging, level = transformers.logging, transformers.logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def _owners(module: nn.Module, names: set[str]) -> tuple[str, ...]:
    """The modules that hold tensors of these names, in the order of the model."""
    owners = {name.rpartition(".")[0] for name in names}
    if "" in owners:
        raise BaseModelError(f"the base lacks {listing(sorted(names), 3)}: it is not complete")
    return tuple(path for path, _ in module.named_modules() if path in owners)
