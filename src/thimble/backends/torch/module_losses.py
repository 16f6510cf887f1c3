"""What modules are trained on: classes, pairs, or the tokens of texts; the loss of each row, and what the module says.

What a module returns is read here, whatever form it has: a tensor, or an output of transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from thimble.backends.module_session import ModuleBatch
from thimble.backends.torch.written_tokens import IGNORED, token_logits, token_losses, write_tokens
from thimble.errors import RunError

TEMPERATURE = 0.05  # of pairs: Gao et al., SimCSE, arXiv:2104.08821


@dataclass(frozen=True)
class RowLosses:
    """The loss of some rows.

    Attributes:
        nats: float32 (rows,), summed over the targets of a row, with a gradient.
        targets: int64 (rows,): how many targets each has.
    """

    nats: Tensor
    targets: Tensor


class ModuleLoss(Protocol):
    """One way to learn from what a module makes of a batch."""

    is_of_rows: bool  # whether the loss of a row depends on no other row of its batch

    def forward(self, module: nn.Module, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
        """What the loss is taken of."""

    def rows(self, made: Tensor, targets: Mapping[str, Tensor]) -> RowLosses:
        """The loss of each row."""

    def output(self, module: nn.Module, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
        """What the module says of a batch, for people; see ModuleSession.outputs."""


class Labels:
    """Classes: cross-entropy of logits (rows, classes) with `labels` (rows,), each row times its `weights` if given."""

    is_of_rows = True

    def forward(self, module: nn.Module, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
        return logits_of(call(module, inputs))

    def rows(self, made: Tensor, targets: Mapping[str, Tensor]) -> RowLosses:
        nats = functional.cross_entropy(made.float(), targets["labels"], reduction="none")
        nats = nats * targets["weights"] if "weights" in targets else nats
        return RowLosses(nats, torch.ones_like(targets["labels"]))

    def output(self, module: nn.Module, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
        return logits_of(call(module, inputs)).float()


class Pairs:
    """Pairs of texts that belong together: each is to find its other half among those of its batch.

    Symmetric InfoNCE (van den Oord et al., arXiv:1807.03748, equation 4, both ways) of the cosines of mean-pooled
    embeddings, over `TEMPERATURE`.
    """

    is_of_rows = False

    def forward(self, module: nn.Module, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
        return embeddings_of(call(module, inputs), inputs.get("attention_mask"))

    def rows(self, made: Tensor, targets: Mapping[str, Tensor]) -> RowLosses:
        first, second = made.chunk(2)
        cosines, own = first @ second.T / TEMPERATURE, torch.arange(len(first))
        ways = (functional.cross_entropy(way, own, reduction="none") for way in (cosines, cosines.T))
        return RowLosses(sum(ways, torch.zeros(len(first))) / 2, torch.ones(len(first), dtype=torch.int64))

    def output(self, module: nn.Module, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
        return embeddings_of(call(module, inputs), inputs.get("attention_mask"))


class Tokens:
    """Texts: cross-entropy of each token of `labels` (rows, tokens), the module's decoder being given `prompt` (rows,
    given tokens) and those before; at most `most` (rows,), alike for all, are written.
    """

    is_of_rows = True

    def forward(self, module: nn.Module, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
        return token_logits(module, inputs, targets["prompt"], targets["labels"])

    def rows(self, made: Tensor, targets: Mapping[str, Tensor]) -> RowLosses:
        labels = targets["labels"]
        return RowLosses(token_losses(made, labels), (labels != IGNORED).sum(1))

    def output(self, module: nn.Module, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
        return write_tokens(module, inputs, targets["prompt"], int(targets["most"][0]))


LOSSES: Mapping[str, ModuleLoss] = {"labels": Labels(), "pairs": Pairs(), "tokens": Tokens()}


# ---- what a module takes and gives ----------------------------------------------------------------------------------


def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """Run a module on named inputs; a single one that its forward pass calls otherwise is given by place."""
    import inspect

    known = inspect.signature(module.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    named = {name: value for name, value in inputs.items() if takes_any or name in known}
    if not named and len(inputs) == 1:
        return module(*inputs.values())
    return module(**named)


def logits_of(made: Any) -> Tensor:
    """The logits that a module returned: a tensor, an output with `logits`, or the first of several."""
    found = made.get("logits") if isinstance(made, Mapping) else getattr(made, "logits", made)
    found = found[0] if isinstance(found, tuple | list) and found else found
    if not isinstance(found, Tensor):
        raise RunError(f"the module returned {type(made).__name__}: expected logits, as a tensor or under .logits")
    return found


def embeddings_of(made: Any, mask: Tensor | None) -> Tensor:
    """The mean of the last hidden states over tokens that are there, of length 1: float32 (rows, width)."""
    found = getattr(made, "last_hidden_state", made)
    found = found[0] if isinstance(found, tuple | list) and found else found
    if not isinstance(found, Tensor):
        raise RunError(f"the module returned {type(made).__name__}: expected last_hidden_state, or a tensor")
    hidden = found.float()
    if hidden.dim() == 3:
        weights = torch.ones(hidden.shape[:2]) if mask is None else mask.float()
        hidden = (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
    return functional.normalize(hidden, dim=-1)


def as_tensors(batch: ModuleBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and targets of a batch; arrays and tensors share their memory."""
    inputs, targets = (
        {name: torch.from_numpy(values) for name, values in found.items()} for found in (batch.inputs, batch.targets)
    )
    return inputs, targets
