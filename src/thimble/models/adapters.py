"""Finished adapters, read and checked against the base they are to run on."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from thimble.core.adapter import Adapter
from thimble.errors import AdapterError, InputError, Problems, listing, plural
from thimble.files.peft import (
    CONFIG_FILE,
    TASKS_WITH_HEAD,
    WEIGHTS_FILE,
    find_adapter,
    layer_of,
    load_adapter,
    modules_to_save,
)
from thimble.files.peft_parameters import in_order
from thimble.files.tensors import open_tensors
from thimble.files.untrusted import printable
from thimble.models.adapter_base import TASK, difference
from thimble.models.base import Base
from thimble.models.gguf_adapter import gguf_sizes, is_gguf, is_gguf_adapter, load_gguf_adapter
from thimble.models.model_spec import adapted_shapes

# Parts of models of text and images, or of sound, that are not their text model.
NOT_TEXT = (
    "vision_tower", "vision_model", "image_tower", "video_tower", "visual.", "audio_tower", "multi_modal_projector",
    "connector", "vision_embed", "mm_projector", "vision_projection", "embed_vision",
)  # fmt: skip
# PEFT merges into a weight that head and embedding share, and so changes both; its warning does not stop it.
_UNTIED = (
    ". Where head and embedding share a weight (tie_word_embeddings), merging changes both, so give the head its own "
    "before PEFT loads the adapter: model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone()); "
    "model.config.tie_word_embeddings = False"
)


def load_adapters(
    paths: Sequence[str], problems: Problems, base: Base | None = None, is_of_text: bool = True
) -> dict[str, Adapter]:
    """Read adapters, by the path the user gave; those in GGUF files need the base that they were made for.

    If they have to be of text, those of other models are refused.
    """
    read = {path: problems.attempt(_read, path, base, is_of_text) for path in paths}
    return {path: adapter for path, adapter in read.items() if adapter}


def check_all_fit(adapters: Mapping[str, Adapter], base: Base, problems: Problems, warn: Callable[[str], None]) -> None:
    """Refuse adapters whose layers are not the base's, and warn of those that were trained on another one like it."""
    for path, adapter in adapters.items():
        before = len(problems.found)
        problems.attempt(check_fits, path, adapter, base)
        if len(problems.found) == before and (told := difference(path, adapter, base)):
            warn(told)


def stored_bytes(paths: Iterable[str], base: Base | None) -> dict[str, int]:
    """Bytes that each layer takes in the files of adapters, by layer path; those in GGUF files need their base."""
    sizes: dict[str, int] = {}
    for path in paths:
        if base and is_gguf(path):
            found = gguf_sizes(path, base)
        else:
            tensors = open_tensors(find_adapter(path) / WEIGHTS_FILE).tensors
            found = [(layer, info.nbytes) for name, info in tensors.items() if (layer := layer_of(name))]
        for layer, size in found:
            sizes[layer] = sizes.get(layer, 0) + size
    return sizes


def _read(path: str, base: Base | None, is_of_text: bool = True) -> Adapter:
    if is_gguf(path):
        return load_gguf_adapter(path, base)
    adapter = load_adapter(path)
    if is_of_text:
        check_is_of_text(path, adapter)
    return adapter


def is_of_other_layers(path: str) -> bool:
    """Whether an adapter that can be read updates anything but linear layers of a model of text."""
    try:
        adapter = load_adapter(path)
    except InputError:
        return False
    try:
        check_is_of_text(path, adapter)
        check_is_of_layers(path, adapter)
    except AdapterError:
        return True
    return False


def check_is_of_text(path: str, adapter: Adapter) -> None:
    """Refuse an adapter of another kind than commands run: they adapt linear layers of text models, and those alone."""
    if task := adapter.notes.get(TASK, ""):
        raise AdapterError(
            f"adapter {path} was trained for {printable(task)}, and this is for models that write text: "
            "thimble evaluate and thimble generate use it"
        )
    said = adapter.settings.get("task_type")
    if said in TASKS_WITH_HEAD and not adapter.replaced:
        raise AdapterError(
            f"adapter {path} was trained for PEFT's {said} and holds no head (modules_to_save), which says what its "
            "layers are for: copy it anew from where it was made, with all that it holds; if it was trained to write "
            f"text after all, say so in its {CONFIG_FILE} with task_type CAUSAL_LM"
        )
    if said not in (None, "CAUSAL_LM"):
        raise AdapterError(
            f"adapter {path} was trained for PEFT's {said}, and this is for models that write text: "
            "thimble evaluate and thimble generate use it, where its base can be opened for that"
        )
    convolutions = [layer for layer, factors in adapter.layers.items() if factors.layout.kernel]
    embeddings = [layer for layer, factors in adapter.layers.items() if factors.layout.is_embedding]
    modules = modules_to_save(adapter)
    biases = [name for name in adapter.replaced if "bias" in name and name.rpartition(".")[0] not in modules]
    kinds = {
        "factors of convolutions": convolutions, "factors of embeddings": embeddings,
        "modules trained whole (modules_to_save)": modules, "trained biases": biases,
    }  # fmt: skip
    found = [f"{kind}: {listing(names, 3)}" for kind, names in kinds.items() if names]
    if found:
        raise AdapterError(
            f"adapter {path} holds {'; '.join(found)}, which no command runs, since they adapt linear layers of text "
            "models alone: load it on its base with PEFT and write the merged model (merge_and_unload, then "
            "save_pretrained), a folder for --base; or use it from Python, with thimble.attach(model, adapter=folder)"
            f"{_UNTIED if embeddings else ''}"
        )


def check_is_of_layers(path: str, adapter: Adapter) -> None:
    """Refuse an adapter that updates parameters beside layers, for what is made of layers alone."""
    found = [path for path, factors in adapter.layers.items() if factors.layout.experts]
    if found:
        raise AdapterError(
            f"adapter {path} holds factors of parameters (target_parameters): {listing(found, 3)}, and this is for "
            "those of layers: evaluate, generate and chat use it, and in Python thimble.attach(model, adapter=folder) "
            "and thimble.merge(model)"
        )


def check_fits(path: str, adapter: Adapter, base: Base) -> None:
    """Refuse an adapter whose layers are not the base's, naming the first that do not fit."""
    shapes, stacks = adapted_shapes(base.spec), base.spec.parameter_shapes()
    order = list(stacks)
    unknown = [layer for layer in adapter.layers if layer not in shapes]
    wrong = [
        f"{layer} is (out {factors.B.shape[0]}, in {factors.A.shape[1]}), the base has {shapes[layer]}"
        for layer, factors in adapter.layers.items()
        if layer in shapes and (factors.B.shape[0], factors.A.shape[1]) != shapes[layer]
    ]
    wrong += [
        f"{layer} is of {factors.layout.experts} experts, the base has {stacks[layer][0]}"
        for layer, factors in adapter.layers.items()
        if layer in stacks and factors.layout.experts != stacks[layer][0]
    ]
    _check_beside_layers(path, unknown, shapes)
    if not unknown and in_order(adapter, order) is not adapter:
        raise AdapterError(
            f"adapter {path} names its target_parameters in another order than {base.name} has them, which says what "
            "its tensors are of: write them in the order of the model, those of the block 0 first, such as "
            f"{listing([name for name in order if name in adapter.layers][:2])}"
        )
    if unknown or wrong:
        made_for = f"; it was made for {adapter.base}: name that with --base" if adapter.base else ""
        what = [f"it adapts {listing(unknown, 2)}, which the base lacks"] if unknown else []
        what += [listing(wrong, 2)] if wrong else []
        raise AdapterError(f"adapter {path} does not belong to {base.name}: {' and '.join(what)}{made_for}")


def _check_beside_layers(path: str, unknown: Sequence[str], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse by its name what an adapter adapts beside the layers of text blocks."""
    seeing = [layer for layer in unknown if any(part in layer for part in NOT_TEXT)]
    if seeing:
        raise AdapterError(
            f"adapter {path} adapts {plural(len(seeing), 'layer')} outside of the text model, such as {seeing[0]}, "
            "which Thimble does not run: train it again on the text model alone, with PEFT's "
            r'target_modules=r".*(language_model|text_model).*\.(q|k|v|o|gate|up|down)_proj"'
        )
    if "lm_head" in unknown:
        raise AdapterError(
            f"adapter {path} adapts lm_head, the output head, and Thimble runs updates of linear layers of the blocks "
            "alone: load both with PEFT and write the merged model (merge_and_unload, then save_pretrained), a folder "
            f"for --base, or train it again without lm_head among the target_modules{_UNTIED}"
        )
    if named := [layer for layer in unknown if layer.removesuffix(".weight") in shapes]:
        raise AdapterError(
            f"adapter {path} adapts weights of layers as parameters (target_parameters): {listing(named, 2)}; expected "
            "layers, as PEFT's target_modules names them: train it so, or merge it with PEFT into a folder for --base"
        )


def load_fitting(path: str, base: Base) -> Adapter:
    """Read an adapter that is to run on a base.

    Args:
        path: A PEFT folder, a run folder or a GGUF file.
        base: That it has to fit.

    Returns:
        The adapter, float32.

    Raises:
        AdapterError: If it is damaged, or its layers are not the base's.
    """
    adapter = _read(path, base)
    check_fits(path, adapter, base)
    return adapter


def adapters_under(folder: str | Path) -> list[Path]:
    """What lies in a folder and looks like an adapter, unread: adapter folders, run folders and GGUF adapters.

    Args:
        folder: Any folder.

    Returns:
        Their paths, sorted.

    Raises:
        AdapterError: If it cannot be listed.
    """
    try:
        inside = sorted(Path(folder).iterdir())
    except OSError as error:
        raise AdapterError(f"the folder of adapters {folder} cannot be read: {error.strerror}") from None
    return [path for path in inside if is_adapter(path)]


def is_adapter(path: Path) -> bool:
    """Whether a path looks like an adapter folder, a run folder or a GGUF adapter; nothing is read."""
    if path.is_dir():
        return any(
            (inside / CONFIG_FILE).is_file() and (inside / WEIGHTS_FILE).is_file()
            for inside in (path, path / "adapter")
        )
    return path.suffix == ".gguf" and is_gguf_adapter(path)
