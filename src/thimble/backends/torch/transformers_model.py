"""A model of transformers in memory, frozen, whose layers add an adapter to what they give while one is in use.

The adapters' maths is that of `thimble.attach` (`attached_layers.LowRank`). The model is never in training, so that the
base's own dropout rests; rows of uneven length are padded on the right, where a model that looks back alone sees none
of it. That it does look back alone is tried when it is loaded.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thimble.backends.torch.attached_layers import LowRank
from thimble.backends.torch.attached_parameters import parameter_places
from thimble.backends.torch.attached_places import Place, Survey
from thimble.errors import BaseModelError, listing
from thimble.files.untrusted import printable
from thimble.models.base import Base
from thimble.models.transformers_spec import TransformersSpec, quiet, read_config

MOST_PADDING = 0.25  # share of the tokens of rows that run together
PROBE_TOKENS, PROBE_TELLS = 6, 4  # of the rows that a model is tried on; so many first ones are alike
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of logits that should be equal, as a share of their spread

LowRanks = Mapping[str, LowRank]


class AdaptedModel:
    """A causal language model, and the adapter in use: one at a time, for the time of a call."""

    def __init__(self, base: Base, compute: torch.dtype) -> None:
        from transformers.modeling_layers import GradientCheckpointingLayer

        spec = base.spec
        if not isinstance(spec, TransformersSpec):
            raise TypeError("a base of Thimble's own engine is not run through transformers")
        self.spec, self.name, self.compute = spec, base.name, compute
        self.module = _load(base, compute)
        self.places = _places(self.module, spec)
        self._used: LowRanks = {}
        self._wanted: Tensor | None = None  # places of hidden states that the head reads, in the rows laid end to end
        for path, place in self.places.items():
            self._hook(path, place)
        self._head = self.module.get_output_embeddings()
        if self._head is not None:
            self._head.register_forward_pre_hook(self._choose)
        self._blocks = [module for module in self.module.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.takes_positions = "position_ids" in inspect.signature(self.module.forward).parameters
        self._check_looks_back()

    # ---- the adapter in use ----

    def _hook(self, path: str, place: Place) -> None:
        """Have a layer ask at each call whether it is adapted."""

        def add(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            low_rank = self._used.get(path)
            return low_rank.add(layer, args, kwargs, output) if low_rank else None

        def put_in(layer: nn.Module, args: Any) -> None:
            if low_rank := self._used.get(path):
                low_rank.put_in(layer, place.weight)

        def take_out(layer: nn.Module, args: Any, output: Any) -> None:
            layer.__dict__.pop(place.weight, None)

        if place.is_beside:
            place.layer.register_forward_hook(add, with_kwargs=True)
        else:
            place.layer.register_forward_pre_hook(put_in)
            place.layer.register_forward_hook(take_out, always_call=True)

    @contextlib.contextmanager
    def using(self, low_ranks: LowRanks, checkpointed_blocks: int = 0) -> Iterator[None]:
        """Within this, the layers have the updates of an adapter, and the first blocks keep their inputs alone."""
        self._used = low_ranks
        self._checkpoint(checkpointed_blocks)
        try:
            yield
        finally:
            self._used = {}
            self._checkpoint(0)

    def _checkpoint(self, count: int) -> None:
        """Have the first blocks keep their inputs alone. transformers' own switch would turn their dropout on too."""
        for number, block in enumerate(self._blocks):
            block.__dict__.pop("forward", None)
            if number < count:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

    # ---- calls ----

    def logits(self, rows: Sequence[NDArray[np.int32]], wanted: Sequence[NDArray[np.int64]], **inputs: Any) -> Tensor:
        """Logits after some tokens of rows, float32 (all wanted, vocabulary); `wanted` are places in each row."""
        return self.call(_padded(rows), wanted, **inputs)[0]

    def call(self, ids: Tensor, wanted: Sequence[NDArray[np.int64]], **inputs: Any) -> tuple[Tensor, Any]:
        """The same for rows that are padded, int64 (rows, tokens), and all that the model gives."""
        chosen = torch.from_numpy(np.concatenate([number * ids.shape[1] + one for number, one in enumerate(wanted)]))
        self._wanted = chosen
        try:
            output = self.module(input_ids=ids, **{"use_cache": False, **inputs})
        finally:
            is_chosen, self._wanted = self._wanted is None, None
        found = output.logits.flatten(0, -2)
        return (found if is_chosen else found[chosen]).float(), output

    def _choose(self, head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Have the head read the hidden states alone whose logits are wanted."""
        if self._wanted is None:
            return None
        chosen, self._wanted = self._wanted, None
        return (args[0].flatten(0, -2)[chosen][None], *args[1:])

    @torch.no_grad()
    def _check_looks_back(self) -> None:
        """Refuse a model in which later tokens change what stands before them: what it learns would be of no use."""
        rows = probe_rows(self.spec.vocab_size)
        places = [np.arange(PROBE_TELLS)] * 2
        one, other = self.logits(rows, places).chunk(2)
        if not is_near(one, other, self.compute):
            raise BaseModelError(
                f"base {self.name} is a {self.spec.family} in which later tokens change what comes before them: it "
                "does not write text from left to right; take a causal language model"
            )


def probe_rows(vocabulary: int) -> list[NDArray[np.int32]]:
    """Two rows of any tokens that begin alike."""
    ids = (np.arange(3, 3 + 2 * PROBE_TOKENS) % vocabulary).astype(np.int32)
    return [ids[:PROBE_TOKENS], np.concatenate([ids[:PROBE_TELLS], ids[PROBE_TOKENS : 2 * PROBE_TOKENS - PROBE_TELLS]])]


def is_near(one: Tensor, other: Tensor, compute: torch.dtype) -> bool:
    """Whether logits are equal but for the order of sums."""
    return float((one - other).abs().max()) <= TOLERANCE[compute] * max(float(other.std()), 1e-6)


def groups_of(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of rows that run together, so that little of what runs is padding."""
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        group = groups[-1] if groups else []
        tokens = sum(lengths[other] for other in group) + lengths[number]
        if group and tokens >= (1 - MOST_PADDING) * lengths[group[0]] * (len(group) + 1):
            group.append(number)
        else:
            groups.append([number])
    return groups


def _padded(rows: Sequence[NDArray[np.int32]]) -> Tensor:
    """Rows as int64 (rows, tokens), padded on the right."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for place, row in zip(ids, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(ids)


# ---- loading ----


def _load(base: Base, compute: torch.dtype) -> Any:
    """The model with its weights; a BaseModelError if the folder does not hold all of them."""
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            model, found = AutoModelForCausalLM.from_pretrained(
                base.path, config=read_config(base.path), dtype=compute, trust_remote_code=False, use_safetensors=True,
                local_files_only=True, output_loading_info=True,
            )  # fmt: skip
    except MemoryError:
        raise
    except Exception as error:  # whatever the code of a family raises on files that it cannot use
        what = printable(f"{type(error).__name__}: {error}", 300)
        raise BaseModelError(f"base {base.path}: transformers cannot load it ({what}): copy the base again") from None
    if lacking := sorted(found["missing_keys"]):
        raise BaseModelError(
            f"base {base.path} lacks {listing(map(printable, lacking), 3)}: it is not complete; copy the base again"
        )
    return model.eval().requires_grad_(False)


def _places(model: nn.Module, spec: TransformersSpec) -> dict[str, Place]:
    """The weights that can be adapted, by the paths of their layers."""
    survey = Survey(model)
    layers = {path: survey.places(name)[0] for path, name in spec.modules.items()}
    known = parameter_places(survey)
    return layers | {path: known[name] for path, name in spec.parameters.items()}
