"""A module of any kind in memory, with LoRA attached; see thimble.backends.module_session for what methods promise.

All that is trained lies in one vector (`module_values`). The module itself stays as in evaluation, so that statistics
of norms keep still and the base's own dropout leaves nothing out.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from thimble.backends.module_session import Measured, ModuleBatch
from thimble.backends.session import LayerInfo, Objective, StepKey, Work
from thimble.backends.torch.adamw import AdamW
from thimble.backends.torch.attach import Attachment, adapter_of, attach, detach, merge
from thimble.backends.torch.flat_training import FlatTraining
from thimble.backends.torch.folding import Folding
from thimble.backends.torch.gradient import Gradient
from thimble.backends.torch.memory import out_of_memory
from thimble.backends.torch.module_cost import measure
from thimble.backends.torch.module_features import KeptRows, add_features, new_features
from thimble.backends.torch.module_losses import LOSSES, RowLosses, as_tensors, by_length, logits_of, run
from thimble.backends.torch.module_start import ModuleStart
from thimble.backends.torch.module_values import ActiveValues, ModuleValues
from thimble.core.adapter import Adapter
from thimble.core.method import Method
from thimble.core.metrics import LossSum
from thimble.files.tensors import write_safetensors
from thimble.files.torch_names import plainly
from thimble.models.execution import ExecutionPlan

Tensors = Mapping[str, Tensor]

NO_LIMIT = 1 << 40  # of tokens
CAPABILITIES = frozenset({"delta form", "DoRA", "rsLoRA", "LoRA+", "frozen A", "dropout", "weights"})


@dataclass(frozen=True)
class ModuleState:
    """An adapter in training, with its optimiser."""

    active: ActiveValues
    method: Method
    optimiser: AdamW
    initial: Adapter  # for what is no number: base, notes, settings


class ModuleTorchSession(FlatTraining, ModuleStart):
    """A frozen module and the loss it is trained on, by its name; `head` is the path of its last Linear, if it has one.

    `attach` comes first, then `start` or `use`.
    """

    capabilities = CAPABILITIES

    def __init__(self, module: nn.Module, loss: str, head: str = "") -> None:
        self.module, self.head = module.eval(), head
        self._loss = LOSSES[loss]
        self._attached: Attachment | None = None
        self._values: ModuleValues

    # ---- adapters -------------------------------------------------------------------------------------------------

    def attach(
        self, targets: str | Sequence[str] = "all-linear", adapter: Adapter | None = None, **options: Any
    ) -> None:
        """Put LoRA on the module, new or finished; see `thimble.attach`. An InputError names every problem."""
        self._attached = attach(self.module, targets, adapter=adapter, **options)
        self._values = ModuleValues(self.module, self._attached)

    @property
    def attachment(self) -> Attachment:
        """What `attach` put on the module."""
        if self._attached is None:
            raise ValueError("attach comes first")
        return self._attached

    @functools.cached_property
    def folding(self) -> Folding:
        """The convolutions that are computed together with what follows them while a gradient is."""
        return Folding(self.attachment)

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        return tuple(LayerInfo(place.path, place.shape, 0) for place in self.attachment.places)

    @property
    def trained_parameters(self) -> int:
        """How many numbers are trained."""
        return len(self._values.flat)

    @property
    def rate_layers(self) -> list[tuple[int, int]]:
        """(rank, in) of each adapted layer: what default learning rates depend on."""
        lora = self.attachment.lora
        return [
            (len(lora[place.path].A) // max(1, place.layout.experts), place.shape[1])
            for place in self.attachment.places
        ]

    def described(self) -> tuple[str, ...]:
        """What is adapted and trained, a line each."""
        return tuple(
            f"adapter: {line}" if not number else line for number, line in enumerate(str(self.attachment).split("\n"))
        )

    @property
    def convolutions(self) -> Sequence[str]:
        return self.folding.described()

    def run_back(self, batches: Sequence[ModuleBatch]) -> None:
        """Run batches forward and back, each layer being called as it is; nothing is learned."""
        with self._collecting(torch.zeros_like(self._values.flat), is_folded=False):
            for batch in batches:
                self._backward(batch, NO_LIMIT, 0)

    def measure(self, batch: ModuleBatch) -> Measured:
        """What a micro-batch takes; see thimble.backends.torch.module_cost."""

        def gradient() -> Tensor:
            with self._collecting(flat := torch.zeros_like(self._values.flat)):
                self._backward(batch, NO_LIMIT, 0)
            return flat

        self.folding.check(gradient)
        return measure(self.module, gradient)

    def set_whole(self, values: Mapping[str, NDArray[Any]]) -> None:
        """Give what is trained whole other values, in the base too: a head that was fitted."""
        tensors = {**plainly(self.module.named_parameters()), **plainly(self.module.named_buffers())}
        for name, array in values.items():
            with torch.no_grad():
                tensors[name].copy_(torch.from_numpy(np.asarray(array)))
            if self._attached:
                self._attached.base_values[name] = tensors[name].detach().clone()

    def set_head(self, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> None:
        """Give the head other values: float32 (classes, width) and (classes,), which one without a bias cannot have."""
        head = plainly(self.module.named_modules())[self.head]
        self.set_whole({f"{self.head}.weight": weight} | ({} if head.bias is None else {f"{self.head}.bias": bias}))

    def save_merged(self, folder: Path) -> dict[str, float]:
        places = self.attachment.places
        before = {place.path: getattr(place.layer, place.weight).detach().clone() for place in places}
        merge(self.module)
        moved = {
            place.path: float((getattr(place.layer, place.weight) - before[place.path]).norm()) for place in places
        }
        detach(self.module)
        if hasattr(self.module, "save_pretrained"):
            self.module.save_pretrained(folder)
        else:
            values = {name: tensor.numpy() for name, tensor in plainly(self.module.state_dict().items()).items()}
            write_safetensors(folder / "model.safetensors", values)
        return moved

    def fresh_adapter(self) -> Adapter:
        """The adapter as it is now, with what is trained whole."""
        return adapter_of(self.module)

    def load(self, adapter: Adapter | None) -> ActiveValues:
        return self._values.read(adapter)

    def start(self, adapter: Adapter, method: Method) -> ModuleState:
        values = self._values
        values.put(values.read(adapter))
        factors = {"A": 0.0 if method.freezes_a else 1.0, "B": method.lora_plus}
        rates = [(span, factors.get(kind, 1.0)) for kind, spans in values.spans.items() for span in spans]
        goal = values.flat.clone() if method.weight_decay else None
        for layer in self.attachment.lora.values():
            layer.dropout.p = method.dropout
        return ModuleState(
            values.here, method, AdamW(values.flat, method.weight_decay, goal, rates, method.beta2), adapter
        )

    def adapter(self, state: ModuleState) -> Adapter:
        found, initial = adapter_of(self.module), state.initial
        settings = {**found.settings, **initial.settings}
        return replace(found, base=initial.base, notes=initial.notes, settings=settings)

    # ---- training -------------------------------------------------------------------------------------------------

    @out_of_memory
    def gradient(
        self, state: ModuleState, work: Work, objective: Objective, execution: ExecutionPlan, key: StepKey
    ) -> Gradient:
        """See Session; micro-batches run one by one, each on all cores."""
        flat, total = torch.zeros_like(self._values.flat), LossSum()
        batches: Sequence[ModuleBatch] = [batch for share in work.shares for batch in share]
        with self._collecting(flat), torch.random.fork_rng(devices=[]):
            for number, batch in enumerate(batches):
                total += self._backward(batch, execution.micro_tokens, _seed(key, number), work.features)
        flat.mul_(1 / work.target_tokens)
        return Gradient(total, flat.numpy())

    @contextlib.contextmanager
    def _collecting(self, flat: Tensor, is_folded: bool = True) -> Iterator[None]:
        """Within this, backward passes add to a vector, dropout of adapters is on, and convolutions are folded."""
        with self._values.collecting(flat), self.folding.in_place() if is_folded else contextlib.nullcontext():
            yield

    def new_features(self, batch: ModuleBatch, open_file: Callable[[], BinaryIO], rows: int) -> KeptRows | None:
        with self.folding.in_place():
            return new_features(self.module, self._loss, batch, open_file, rows)

    def add_features(self, features: KeptRows, batches: Iterator[ModuleBatch]) -> Iterator[int]:
        done = 0
        for batch in batches:
            with self.folding.in_place():
                add_features(self.module, self._loss, features, batch)
            done += len(batch.numbers)
            yield done

    def _backward(self, batch: ModuleBatch, most: int, seed: int, features: KeptRows | None = None) -> LossSum:
        """Add the gradient of a micro-batch; of rows whose loss is one of all together, in parts of at most so many
        tokens.
        """
        inputs, targets = as_tensors(batch)
        parts = [] if self._loss.is_of_rows else by_length(inputs, most)
        if len(parts) > 1 and sum(part["input_ids"].numel() for _, part in parts) > most:
            return self._backward_twice(parts, targets, seed)
        torch.manual_seed(seed)
        with features.in_place(batch.numbers) if features else contextlib.nullcontext():
            losses = self._loss.rows(self._loss.forward(self.module, inputs, targets), targets)
        losses.nats.sum().backward()
        return _sum_of(losses)

    def _backward_twice(self, parts: Sequence[tuple[Tensor, Tensors]], targets: Tensors, seed: int) -> LossSum:
        """Run all parts to see what they make, and once more to go back through them (Gao et al., GradCache,
        arXiv:2101.06983): the gradient is that of one large batch, in the memory of a small one.
        """
        made = []
        for number, (_, part) in enumerate(parts):
            torch.manual_seed(seed + number)
            with torch.no_grad():
                made.append(self._loss.forward(self.module, part, targets))
        order = torch.cat([rows for rows, _ in parts])
        leaves = torch.cat(made)[order.argsort()].requires_grad_()
        losses = self._loss.rows(leaves, targets)
        (slopes,) = torch.autograd.grad(losses.nats.sum(), leaves)
        for number, (rows, part) in enumerate(parts):
            torch.manual_seed(seed + number)
            self._loss.forward(self.module, part, targets).backward(slopes[rows])
        return _sum_of(losses)

    # ---- measuring ------------------------------------------------------------------------------------------------

    def losses(
        self, adapter: ActiveValues, batches: Iterator[ModuleBatch], execution: ExecutionPlan
    ) -> Iterator[list[LossSum]]:
        return (self._losses(adapter, *as_tensors(batch)) for batch in batches)

    @out_of_memory
    @torch.no_grad()
    def _losses(self, adapter: ActiveValues, inputs: Tensors, targets: Tensors) -> list[LossSum]:
        with self._values.using(adapter):
            found = self._loss.rows(self._loss.forward(self.module, inputs, targets), targets)
        return [LossSum(*row) for row in zip(found.nats.tolist(), found.targets.tolist(), strict=True)]

    def outputs(
        self, adapter: ActiveValues, batches: Iterator[ModuleBatch], execution: ExecutionPlan
    ) -> Iterator[NDArray[Any]]:
        return (self._output(adapter, *as_tensors(batch)) for batch in batches)

    @out_of_memory
    @torch.no_grad()
    def _output(self, adapter: ActiveValues, inputs: Tensors, targets: Tensors) -> NDArray[Any]:
        with self._values.using(adapter):
            found: NDArray[Any] = self._loss.output(self.module, inputs, targets).numpy()
        return found

    def head_inputs(self, batches: Iterator[ModuleBatch], execution: ExecutionPlan) -> Iterator[NDArray[Any]]:
        return (self._head_inputs(as_tensors(batch)[0]) for batch in batches)

    @out_of_memory
    @torch.no_grad()
    def _head_inputs(self, inputs: Tensors) -> NDArray[Any]:
        """What the module gives while its head gives back what comes to it, pooled as its logits are."""
        handle = plainly(self.module.named_modules())[self.head].register_forward_hook(lambda _, args, output: args[0])
        try:
            with self._values.using(self.load(None)):
                found: NDArray[Any] = run(self.module, inputs, logits_of).float().numpy()
        finally:
            handle.remove()
        return found

    def release(self) -> None:
        """Nothing is kept between calls."""

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def _arrays(self, state: ModuleState) -> dict[str, NDArray[np.float32]]:
        return {"adapter": self._values.flat.numpy(), **state.optimiser.state()}

    def restore(self, state: ModuleState, arrays: Mapping[str, NDArray[np.float32]]) -> ModuleState:
        state.optimiser.restore(arrays)
        if "adapter" in arrays:
            self._values.flat.copy_(torch.from_numpy(arrays["adapter"]))
        return state

    def unmoved_layers(self, state: ModuleState) -> list[str]:
        return self._values.unmoved(state.optimiser.squares)


def _sum_of(losses: RowLosses) -> LossSum:
    return LossSum(float(losses.nats.detach().double().sum()), int(losses.targets.sum()))


def _seed(key: StepKey, number: int) -> int:
    """What dropout of a micro-batch is drawn from."""
    return int(np.random.SeedSequence([key.seed, key.step, number]).generate_state(1, np.uint64)[0] >> 1)
