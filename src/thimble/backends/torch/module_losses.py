"""What modules are trained on: classes, pairs, or the tokens of texts; the loss of each row, and what the module says.

What a module returns is read here, whatever form it has: a tensor, or an output of transformers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from thimble.backends.module_session import ModuleBatch
from thimble.backends.torch.written_tokens import IGNORED, token_logits, token_losses, write_tokens
from thimble.data.sentence_tokens import even_batches
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
        return run(module, inputs, logits_of)

    def rows(self, made: Tensor, targets: Mapping[str, Tensor]) -> RowLosses:
        nats = functional.cross_entropy(made.float(), targets["labels"], reduction="none")
        nats = nats * targets["weights"] if "weights" in targets else nats
        return RowLosses(nats, torch.ones_like(targets["labels"]))

    def output(self, module: nn.Module, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
        return run(module, inputs, logits_of).float()


class Pairs:
    """Texts that belong together, as the `pair` (rows, 2) of their places among all texts of the batch, by `content`
    (texts,), which is alike for equal texts. What stands behind all pairs belongs to nobody: explicit negatives.

    Where rows have a `score` (rows,), they are to be as alike as it says, else each text is to find its other half.
    """

    is_of_rows = False

    def forward(self, module: nn.Module, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
        token = int(targets["token"].reshape(-1)[0]) if "token" in targets else None
        return run(module, inputs, partial(embeddings_of, token=token))

    def rows(self, made: Tensor, targets: Mapping[str, Tensor]) -> RowLosses:
        nats = _ordered(made, targets) if "score" in targets else _found(made, targets)
        return RowLosses(nats, torch.ones(len(nats), dtype=torch.int64))

    def output(self, module: nn.Module, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
        made = self.forward(module, inputs, targets)
        return made[targets["pair"]] if "pair" in targets else made


def _found(made: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
    """Symmetric InfoNCE (van den Oord et al., arXiv:1807.03748, equation 4, both ways) of the cosines of embeddings,
    over `TEMPERATURE`: nats (rows,).

    A text that is right too is no wrong answer: what equals the anchor or its other half, and the other halves of equal
    anchors, are left out of the sum.
    """
    (first, second), content, count = targets["pair"].T, targets["content"], len(targets["pair"])
    others = torch.cat([second, torch.arange(2 * count, len(made))])
    anchors, candidates = content[first, None], content[others]
    is_right = (candidates == content[second, None]) | (candidates == anchors)
    is_right[:, :count] |= anchors == content[first]
    own = torch.arange(count)
    is_right[own, own] = False
    near = (made[first] @ made[others].T / TEMPERATURE).masked_fill(is_right, -torch.inf)
    ways = (near, near[:, :count].T)
    return sum((functional.cross_entropy(way, own, reduction="none") for way in ways), torch.zeros(count)) / 2


def _ordered(made: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
    """CoSENT (Su, kexue.fm/archives/8847, 2022), row by row: the cosine of a pair is to be above those of all pairs
    with a lower score, and below those with a higher one: nats (rows,), log(1 + sum of exp(difference / TEMPERATURE)).
    """
    (first, second), score = targets["pair"].T, targets["score"]
    cosines = (made[first] * made[second]).sum(1) / TEMPERATURE
    order = (score[:, None] - score).sign()
    wrong = (order * (cosines - cosines[:, None])).masked_fill(order == 0, -torch.inf)
    return torch.cat([torch.zeros(len(score), 1), wrong], 1).logsumexp(1)


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


def run(module: nn.Module, inputs: Mapping[str, Tensor], read: Callable[[Any, Mapping[str, Tensor]], Tensor]) -> Tensor:
    """What is read of a module's output, texts of like length being run together, since padding takes time too.

    Args:
        module: The module.
        inputs: Its arguments, by name.
        read: Takes the output, and the inputs that it was made of.

    Returns:
        A tensor (rows, ...), in the order of the inputs.
    """
    parts = by_length(inputs)
    made = [read(call(module, part), part) for _, part in parts]
    return torch.cat(made)[torch.cat([rows for rows, _ in parts]).argsort()]


def by_length(inputs: Mapping[str, Tensor], most: int = 1 << 40) -> list[tuple[Tensor, Mapping[str, Tensor]]]:
    """The rows of a batch of texts in parts of like length without the padding that they do not need, each of at most
    so many tokens, with the numbers of its rows; other batches are one part.
    """
    mask = inputs.get("attention_mask")
    if mask is None or "input_ids" not in inputs:
        return [(torch.arange(len(next(iter(inputs.values())))), inputs)]
    lengths = mask.sum(1).tolist()
    parts = []
    for numbers in even_batches(lengths, most):
        rows, longest = torch.tensor(numbers), lengths[numbers[0]]
        parts.append((rows, {name: values[rows, :longest] for name, values in inputs.items()}))
    return parts


def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """Run a module on named inputs; a single one that its forward pass calls otherwise is given by place."""
    import inspect

    known = inspect.signature(module.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    named = {name: value for name, value in inputs.items() if takes_any or name in known}
    if not named and len(inputs) == 1:
        return module(*inputs.values())
    return module(**named)


def logits_of(made: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits that a module returned: a tensor, an output with `logits`, or the first of several."""
    found = made.get("logits") if isinstance(made, Mapping) else getattr(made, "logits", made)
    found = found[0] if isinstance(found, tuple | list) and found else found
    if not isinstance(found, Tensor):
        raise RunError(f"the module returned {type(made).__name__}: expected logits, as a tensor or under .logits")
    return found


def embeddings_of(made: Any, inputs: Mapping[str, Tensor], token: int | None = None) -> Tensor:
    """The mean of the last hidden states over tokens that are there, or that of one `token`, the first (0) or the last
    one (-1), of length 1: float32 (rows, width).
    """
    found = getattr(made, "last_hidden_state", made)
    found = found[0] if isinstance(found, tuple | list) and found else found
    if not isinstance(found, Tensor):
        raise RunError(f"the module returned {type(made).__name__}: expected last_hidden_state, or a tensor")
    hidden, mask = found.float(), inputs.get("attention_mask")
    if hidden.dim() == 3:
        weights = torch.ones(hidden.shape[:2]) if mask is None else mask.float()
        if token is not None:
            place = (weights.sum(1).long() - 1) * (token < 0)
            return functional.normalize(hidden[torch.arange(len(hidden)), place], dim=-1)
        hidden = (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
    return functional.normalize(hidden, dim=-1)


def as_tensors(batch: ModuleBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and targets of a batch; arrays and tensors share their memory."""
    inputs, targets = (
        {name: torch.from_numpy(values) for name, values in found.items()} for found in (batch.inputs, batch.targets)
    )
    return inputs, targets
