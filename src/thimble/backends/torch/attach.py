"""LoRA on any PyTorch model of the user's own: attach, train in a loop of one's own, save, switch off, merge, detach.

The model stays the object it was, with the same classes and names: A and B are children of the layers that they
update, and hooks add what they make to the output. Weights of the base are frozen, and changed by `merge` alone. The
maths is in `thimble.backends.torch.attached_layers`, the choice of layers in `attached_places`, and how A and B begin
in `attached_start`.
"""

import contextlib
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from thimble.backends.torch.attached_layers import LowRank, hook_beside, hook_within
from thimble.backends.torch.attached_places import Place, Survey
from thimble.backends.torch.attached_start import Start, read_options, start_from, start_new
from thimble.core.adapter import Adapter
from thimble.errors import InputError, RunError, listing, plural
from thimble.files.peft import load_adapter, named_for_text
from thimble.files.torch_names import plainly

_ATTRIBUTE = "_thimble_attachment"


@dataclass
class Attachment:
    """An adapter on a model, as `attach` leaves it there; printed, it says what is trained."""

    model: nn.Module
    places: list[Place]  # the adapted weights
    whole: list[str]  # names of the tensors that are trained themselves: heads, norms, biases
    left_out: dict[str, str]  # layers of a kind that was asked for and cannot be adapted: path to the reason
    kept_norms: list[str]  # frozen norms, which normalise by their running statistics and keep them as they are
    settings: dict[str, Any]  # what PEFT's config says of the adapter beyond ranks and scales
    base_values: dict[str, Tensor]  # the base's own values of the tensors in `whole`, by name
    was_trainable: dict[str, bool]  # what `detach` sets again, by the name of the parameter
    merged_away: dict[str, Tensor] = field(default_factory=dict)  # the base's own weights, while the adapter is merged
    hooks: list[RemovableHandle] = field(default_factory=list)
    nested: list[nn.Module] = field(default_factory=list)  # encoders of PyTorch, kept from their fast path
    first_values: int = 0  # what `_values` was at first
    is_trained: bool = False  # whether the model was called in training

    @property
    def lora(self) -> dict[str, LowRank]:
        """A and B by the path of the layer."""
        return {place.path: getattr(place.layer, place.child) for place in self.places}

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What an optimiser trains, by name."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def __str__(self) -> str:
        count, all_of_it = (
            sum(p.numel() for p in self.trained.values()),
            sum(p.numel() for p in self.model.parameters()),
        )
        kinds: dict[str, int] = {}
        for place in self.places:
            kinds[type(place.called).__name__] = kinds.get(type(place.called).__name__, 0) + 1
        lines = [
            f"LoRA on {plural(len(self.places), 'weight')}: {listing(f'{n} x {kind}' for kind, n in kinds.items())}",
            f"{count:,} of {all_of_it:,} parameters are trained ({100 * count / max(1, all_of_it):.2f} %)",
        ]
        if self.whole:
            lines.append(f"trained themselves: {listing(self.whole)}")
        if self.kept_norms:
            norms = plural(len(self.kept_norms), "frozen norm keeps its", "frozen norms keep their")
            lines.append(f"{norms} running statistics, in train() too: {listing(self.kept_norms, 3)}")
        lines += [f"left out: {path} {reason}" for path, reason in list(self.left_out.items())[:5]]
        if len(self.left_out) > 5:
            lines.append(f"left out: {len(self.left_out) - 5} more; see .left_out")
        if unreached := self._unreached():
            lines.append(f"frozen, and of no kind that LoRA takes: {listing(unreached)}")
        return "\n".join(lines)

    def _unreached(self) -> list[str]:
        """Types of modules with matrices of their own that LoRA cannot take, and how many parameters they hold."""
        survey, held = Survey(self.model), dict[str, int]()
        whole = {*self.whole, *(place.path for place in self.places if place.layout.experts)}
        for path, module in survey.modules.items():
            own = module.named_parameters(recurse=False)
            count = sum(p.numel() for name, p in own if p.dim() >= 2 and f"{path}.{name}" not in whole)
            if count and not survey.kind(path) and path not in survey.packed and not isinstance(module, LowRank):
                held[type(module).__name__] = held.get(type(module).__name__, 0) + count
        return [f"{name} ({count:,} parameters)" for name, count in held.items()]


def attach(
    model: nn.Module,
    targets: str | Sequence[str] = "all-linear",
    *,
    adapter: str | Path | Adapter | None = None,
    **options: Any,
) -> Attachment:
    """Put LoRA on a model and freeze the rest of it; an optimiser made after this trains the adapter.

    >>> print(thimble.attach(model, rank=8, train_also=["classifier"]))  # doctest: +SKIP

    Args:
        model: Any module; it is changed in place, and `detach` undoes it.
        targets: Layers to adapt: `all-linear` (Linear, Conv1D, MultiheadAttention), `all-conv`, `all-pointwise`
            (convolutions that see one pixel), `all-embedding`; a name or the end of a path; a regular expression for
            whole paths; or a list of kinds and names.
        adapter: A finished adapter, or its folder, to go on with or to use; then all options are its own, but for
            `dropout`.
        **options: `train_also` (modules to train whole: heads, norms), `target_parameters` (such as those of experts,
            which are no layer's weight), `rank` (16), `alpha` (32), `rank_pattern` and
            `alpha_pattern` (of some layers, by name), `use_rslora`, `use_dora`, `dropout`, `init` (kaiming, gaussian,
            orthogonal, pissa, pissa:exact, milora, olora), `bias` (none, lora_only, all), `seed`.

    Returns:
        What was done, to be printed.

    Raises:
        InputError: If something cannot be adapted as asked, naming every problem; the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"attach takes a torch.nn.Module, not {type(model).__name__}")
    model = _unwrapped(model)
    if held := [path for path, module in model.named_modules() if _ATTRIBUTE in module.__dict__]:
        where = f" (on {listing(held)})" if held[0] else ""
        raise InputError(f"the model has an adapter already{where}: call thimble.detach(model) first")
    given = read_options(targets, options)
    if adapter is None:
        return _put_on(model, start_new(model, given))
    finished = adapter if isinstance(adapter, Adapter) else load_adapter(adapter)
    return _put_on(model, start_from(model, finished, given))


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` or DataParallel goes around: its layers have the names that others know."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise InputError(
            "the model is wrapped in DistributedDataParallel, which adds up gradients of the parameters that it found: "
            "call thimble.attach(model) first, then wrap it"
        )
    inner = model.module if isinstance(model, nn.DataParallel) else getattr(model, "_orig_mod", None)
    return _unwrapped(inner) if isinstance(inner, nn.Module) else model


def _put_on(model: nn.Module, start: Start) -> Attachment:
    """Change the model; nothing fails any more."""
    tensors, parameters = _tensors(model), dict(model.named_parameters())
    base_values = {name: tensors[name].detach().clone() for name in start.whole}
    modules = plainly(model.named_modules())
    norms = [path for path, module in modules.items() if _has_statistics(module) and path not in start.modules]
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    found = Attachment(model, start.places, start.whole, start.left_out, norms, start.settings, base_values, flags)
    trained = {id(tensors[name]) for name in start.whole}
    for parameter in parameters.values():
        parameter.requires_grad_(id(parameter) in trained)
    for name, values in start.replaced.items():
        tensors[name].data = torch.from_numpy(values.copy()).to(tensors[name].device, tensors[name].dtype)
    for place in start.places:
        low_rank = LowRank(start.factors[place.path], start.origin.get(place.path), start.dropout)
        place.layer.add_module(place.child, low_rank.to(getattr(place.layer, place.weight).device))
        low_rank.train(place.layer.training)
        found.hooks += (
            hook_beside(place.layer)
            if place.is_beside
            else hook_within(place.called, place.inside, place.weight, place.child)
        )
    found.hooks += [modules[path].register_forward_pre_hook(_keep_statistics) for path in norms]
    found.hooks.append(model.register_forward_hook(_after_call))
    # PyTorch's encoder packs padded rows for a fast path that an adapted layer does not take, and then fails.
    found.nested = [module for module in model.modules() if getattr(module, "use_nested_tensor", False) is True]
    for encoder in found.nested:
        encoder.use_nested_tensor = False
    model.__dict__[_ATTRIBUTE] = found
    found.first_values = _values(found)
    return found


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, of shared ones each name."""
    return {
        **plainly(model.named_parameters(remove_duplicate=False)),
        **plainly(model.named_buffers(remove_duplicate=False)),
    }


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(getattr(module, "running_mean", None), Tensor)


def _keep_statistics(norm: nn.Module, args: Any) -> None:
    """A frozen norm is never in training: else its statistics would drift to those of the new data, unsaved."""
    norm.training = False


def _values(found: Attachment) -> int:
    """A checksum of A and B. Their bytes are compared, for a fused optimiser writes into a tensor without counting its
    version up; those of a head say nothing of A and B.
    """
    total = 0
    for low_rank in found.lora.values():
        for parameter in low_rank.parameters():
            total = zlib.crc32(parameter.detach().cpu().contiguous().view(torch.uint8).numpy(), total)
    return total


def _after_call(model: nn.Module, args: Any, output: Any) -> None:
    """After the first call in training, name the layers that took no part in it."""
    found: Attachment = model.__dict__[_ATTRIBUTE]
    if found.is_trained or not (model.training and torch.is_grad_enabled()):
        return
    found.is_trained = True
    _warn_of_uncalled(found, "the first step did not call")


def _warn_of_uncalled(found: Attachment, what: str) -> None:
    if missed := [path for path, low_rank in found.lora.items() if not low_rank.is_called]:
        warnings.warn(
            f"{what} {plural(len(missed), 'adapted layer')} of {len(found.lora)}, which so learned nothing: "
            f"{listing(missed)}. If that is so at every step, leave them out of targets",
            stacklevel=4,
        )


# ---- what is done with it -------------------------------------------------------------------------------------------


def _attachment(model: nn.Module) -> Attachment:
    """The attachment of a model, or of the one model that something wraps."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = [module.__dict__[_ATTRIBUTE] for module in modules if _ATTRIBUTE in module.__dict__]
    if len(found) != 1:
        raise InputError(
            f"{type(model).__name__} has {len(found) or 'no'} adapters attached: expected one"
            + ("; name the model that has it" if found else "; call thimble.attach(model) first")
        )
    return found[0]


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter of a model as it is now: `thimble.save_adapter(thimble.adapter_of(model), folder)` keeps it.

    Args:
        model: With an adapter attached, or a module that holds such a model.

    Returns:
        The adapter, in float32; PEFT opens the folder it is saved in.

    Raises:
        InputError: If nothing is attached.
    """
    found = _attachment(model)
    if not found.is_trained and any(low_rank.is_called for low_rank in found.lora.values()) and _has_changed(found):
        _warn_of_uncalled(found, "no call reached")
    if found.is_trained and not _has_changed(found):
        warnings.warn(
            "none of the adapter's parameters has changed since it was attached, though the model was called in "
            "training: make the optimiser after thimble.attach, from the parameters of this model, and let gradients "
            "pass (torch.utils.checkpoint with use_reentrant=True stops them behind a frozen beginning)",
            stacklevel=2,
        )
    pairs = {path: low_rank.factors() for path, low_rank in found.lora.items()}
    layers, prefixes = named_for_text({path: now for path, (now, _) in pairs.items()})
    origin, _ = named_for_text({path: origin for path, (_, origin) in pairs.items() if origin})
    tensors = _tensors(found.model)
    replaced = {name: _as_numpy(tensors[name]) for name in found.whole}
    base = getattr(getattr(found.model, "config", None), "_name_or_path", "") or ""
    prefix = prefixes[0] if prefixes else "model."
    return Adapter(layers, str(base), {}, origin, prefix, replaced, found.settings)


def _has_changed(found: Attachment) -> bool:
    return _values(found) != found.first_values


def _as_numpy(tensor: Tensor) -> Any:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy().copy()


def merge(model: nn.Module) -> None:
    """Add the adapter to the weights, so that the model runs as fast as its base; `unmerge` takes it out, to the bit.

    The base's own weights are kept in memory for that; `detach` after it drops them and leaves a plain merged model.

    Args:
        model: With an adapter attached.

    Raises:
        InputError: If nothing is attached, or a layer has no weight that could hold its update.
        RunError: If a merged weight is NaN or Inf; nothing is changed then.
    """
    found = _attachment(model)
    if found.merged_away:
        raise InputError("the adapter is merged already: call thimble.unmerge(model) to undo it")
    grouped = [place.path for place in found.places if place.layout.groups > 1]
    if grouped:
        raise InputError(
            f"{listing(grouped)} cannot be merged: the weight of a convolution in groups sees the channels of its own "
            "group alone, and the update, as PEFT defines it, sees all; use the model with the adapter attached"
        )
    weights = {place.path: getattr(place.layer, place.weight) for place in found.places}
    merged = {
        place.path: found.lora[place.path].merged_into(place.layer, weights[place.path]) for place in found.places
    }
    broken = [path for path, weight in merged.items() if not torch.isfinite(weight).all()]
    if broken:
        raise RunError(f"the merged weights of {listing(broken)} are NaN or Inf: nothing was merged")
    for path, weight in weights.items():
        found.merged_away[path], weight.data = weight.data, merged[path]
    _set_state(found, "merged")


def unmerge(model: nn.Module) -> None:
    """Put the base's own weights back, to the bit, and the adapter beside them again.

    Args:
        model: With an adapter that was merged.

    Raises:
        InputError: If none was merged.
    """
    found = _attachment(model)
    if not found.merged_away:
        raise InputError("the adapter is not merged: thimble.merge(model) does that")
    for place in found.places:
        weight = getattr(place.layer, place.weight)
        weight.data = found.merged_away[place.path].to(weight.device, weight.dtype)
    found.merged_away = {}
    _set_state(found, "on")


def _set_state(found: Attachment, state: str) -> None:
    for low_rank in found.lora.values():
        low_rank.state = state


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[nn.Module]:
    """Within this, a model is its base, to the bit: no update, and the base's own heads, norms and biases."""
    found = _attachment(model)
    tensors = _tensors(found.model)
    own = {place.path: getattr(place.layer, place.weight) for place in found.places if place.path in found.merged_away}
    pairs = [(tensors[name], base) for name, base in found.base_values.items()]
    pairs += [(weight, found.merged_away[path]) for path, weight in own.items()]
    # The storage is exchanged, not written to: what autograd keeps for a backward pass begun before stays as it was.
    now = []
    for tensor, base in pairs:
        now.append(tensor.data)
        tensor.data = base.to(tensor.device, tensor.dtype)
    _set_state(found, "off")
    try:
        yield model
    finally:
        for (tensor, _), values in reversed(list(zip(pairs, now, strict=True))):  # a shared one is there twice
            tensor.data = values
        _set_state(found, "merged" if found.merged_away else "on")


def detach(model: nn.Module) -> None:
    """Take the adapter off: the model is what it was before `attach`; or, after `merge`, a plain merged model.

    Args:
        model: With an adapter attached.

    Raises:
        InputError: If nothing is attached.
    """
    found = _attachment(model)
    if not found.merged_away:
        tensors = _tensors(found.model)
        for name, base in found.base_values.items():
            tensors[name].data = base.to(tensors[name].device, tensors[name].dtype)
    for hook in found.hooks:
        hook.remove()
    for encoder in found.nested:
        encoder.use_nested_tensor = True
    for place in found.places:
        delattr(place.layer, place.child)
    for name, parameter in found.model.named_parameters():
        parameter.requires_grad_(found.was_trainable.get(name, True))
    del found.model.__dict__[_ATTRIBUTE]
