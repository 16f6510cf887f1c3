"""The way into a backend: the store of the frozen weights, and a session of the engine, which is loaded only now."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from thimble.backends.module_session import ModuleSession
from thimble.backends.session import Session
from thimble.core.adapter import Adapter
from thimble.core.method import Init
from thimble.data.model import Model
from thimble.data.records import general_records
from thimble.errors import AdapterError, ConfigError, listing
from thimble.files.peft import named_for_peft
from thimble.files.untrusted import some
from thimble.models.base import Base
from thimble.models.module_base import ModuleBase

if TYPE_CHECKING:
    from thimble.backends.torch.module_session import ModuleTorchSession

KAIMING = "kaiming"
SAMPLE_TOKENS = 512  # of text that shows compute int8 which columns of the activations are large


def choose_store(wanted: str, base: Base, compute: str) -> tuple[tuple[str, ...], str]:
    """The stores that come into question for an already chosen compute type, the fastest first, and why that one."""
    if not base.is_own:
        return _store_of_transformers(wanted, base, compute)
    if compute == "int8":
        return _store_of_int8(wanted, base)
    if wanted != "auto":
        return (wanted,), f"store {wanted} was asked for"
    if base.metadata is not None:
        return ("file",), "store file: the blocks of the GGUF are used as they are, memory-mapped"
    return ("dense", "file"), "store dense: the weights of a folder are held in the compute type"


def _store_of_int8(wanted: str, base: Base) -> tuple[tuple[str, ...], str]:
    """Rows of int8 where the processor has instructions to multiply them, else the blocks of the file as they lie."""
    from thimble.backends.torch.block_products import is_multiplied_in_blocks
    from thimble.backends.torch.compute import NO_INT8, machine

    multiplies_rows = "int8" in machine().flops
    dtypes = sorted({base.weights[f"{path}.weight"].dtype for path in base.spec.linear_shapes()})
    has_blocks = any(map(is_multiplied_in_blocks, dtypes))
    if wanted == "int8" or (wanted == "auto" and multiplies_rows):
        if multiplies_rows:
            again = "; --store file rounds no weight again" if has_blocks else ""
            return ("int8",), f"store int8: compute int8 multiplies int8 weights, and keeps them so{again}"
        instead = ", or, in a new run, --store file, which multiplies the blocks of the file" if has_blocks else ""
        raise ConfigError(
            f"compute is int8, with int8 rows: {NO_INT8}; use --compute fp32, which decodes the rows{instead}"
        )
    if has_blocks:
        return ("file",), (
            "store file: compute int8 multiplies the blocks of the file as they are by activations rounded to int8; "
            "gradients are float"
        )
    why = f"the weights of {base.name} are {listing(dtypes)}, no blocks that this processor multiplies"
    rows = "" if wanted == "file" else f", and {NO_INT8}"
    raise ConfigError(f"compute is int8, on blocks of a file: {why}{rows}; use --compute fp32")


def _store_of_transformers(wanted: str, base: Base, compute: str) -> tuple[tuple[str, ...], str]:
    asked = [f"--compute {compute}"] * ("int8" in compute) + [f"--store {wanted}"] * (wanted not in ("auto", "dense"))
    if asked:
        raise ConfigError(
            f"{' and '.join(asked)}: {base.name} is a {base.spec.family}, which runs through transformers, with "
            "weights in fp32 or bf16 alone: leave it out"
        )
    return ("dense",), "store dense: transformers keeps the weights in the compute type"


def choose_decode(wanted: str, base: Base) -> str:
    """How answers are written, `int8` or `float`; a ConfigError for int8 where no weights are blocks of a GGUF."""
    if wanted == "int8" and not base.is_own:
        raise ConfigError(
            f"--decode int8: {base.name} is a {base.spec.family}, which runs through transformers, whose weights are "
            "floats and no blocks of a GGUF: leave it out"
        )
    return "int8" if wanted == "auto" else wanted


def open_session(
    model: Model, compute: str, store: str, is_streamed: bool = False, decode: str = "float", cache_type: str = "float"
) -> Session:
    """Load a base into the torch engine; `is_streamed` reads weights from the file for each product and keeps none.

    `decode` is `float`, or `int8` to quantise activations where answers are written with weights in blocks;
    `cache_type` is `float`, or `int8` to keep keys and values rounded.
    """
    if not model.base.is_own:
        if cache_type != "float":
            raise ConfigError(
                f"--cache-type {cache_type}: {model.base.name} is a {model.base.spec.family}, which runs through "
                "transformers, whose keys and values stay in the compute type: leave it out"
            )
        from thimble.backends.torch.transformers_session import TransformersSession

        return TransformersSession(model.base, compute)
    from thimble.backends.torch.session import TorchSession

    sample = _sample(model) if compute == "int8" and store == "int8" else None
    return TorchSession(model.base, compute, store, is_streamed, sample, decode, cache_type)


def _sample(model: Model) -> NDArray[np.int32]:
    """Tokens of general text, int32 (at most SAMPLE_TOKENS,)."""
    texts = [record.text for record in general_records() if record.text is not None]
    return np.array(model.tokenizer.encode("\n\n".join(texts)), np.int32)[:SAMPLE_TOKENS]


@dataclass(frozen=True)
class OpenedModule:
    """A module in memory with LoRA on it."""

    session: ModuleSession
    base: ModuleBase  # with what is known once it is opened
    whole: tuple[str, ...]  # paths of the modules that are trained whole
    targets: tuple[str, ...]  # the layers that are adapted, as `auto` chose them
    decisions: tuple[str, ...]  # what was chosen, and why


def open_module_session(
    base: ModuleBase, task: str, loss: str, labels: Sequence[str], targets: Sequence[str], train_also: Sequence[str],
    store: str, init: Init, **options: Any,
) -> OpenedModule:  # fmt: skip
    """Load a module for a task and put a new adapter on it; what has to be made anew is trained whole.

    An init that is found on data begins as Kaiming's: `restart` gives A and B their values once there are data. Other
    `options` are those of `thimble.attach`; a BaseModelError or an InputError names what cannot be.
    """
    from thimble.backends.torch.module_session import ModuleTorchSession
    from thimble.backends.torch.module_targets import usual_targets
    from thimble.backends.torch.open_module import open_module

    found = open_module(base, task, labels, options["seed"])
    session = ModuleTorchSession(found.module, loss, found.head)
    whole = (*found.fresh, *train_also)
    chosen, why = usual_targets(found.module, targets, whole)
    is_made_later = init.needs not in ("nothing", "weights")
    first = KAIMING if is_made_later else str(init)
    session.attach(list(chosen), train_also=whole, init=first, **options)
    if is_made_later and (problems := session.init_problems(init)):
        raise ConfigError(*some(problems))
    decisions = (why, *session.described())
    if init.needs == "quantised":
        session.restart_from_rounding(options["seed"])
    if store == "int8":
        decisions = (*decisions, _keep_as_int8(session, is_new=True))
    return OpenedModule(session, found.base, whole, tuple(chosen), decisions)


def _keep_as_int8(session: "ModuleTorchSession", is_new: bool) -> str:
    """Keep a module as int8, and say what of it is."""
    kept, total = session.keep_as_int8(is_new)
    if not kept:
        raise ConfigError(
            "--store int8: the module has no frozen Linear layer of the plain kind, which alone is kept so "
            "(convolutions, embeddings and packed attention stay in float32): leave it out"
        )
    return f"store int8: {kept / total:.0%} of the weights, those of Linear layers, one scale a row; others in float32"


def open_used_module(
    base: ModuleBase,
    task: str,
    loss: str,
    labels: Sequence[str],
    adapter: Adapter,
    first: Mapping[str, NDArray[Any]],
    store: str = "auto",
) -> tuple[ModuleSession, ModuleBase, tuple[str, ...]]:
    """Load a module for a task and put a finished adapter on it.

    `first` are values of what is trained whole before training, such as the head that was fitted to the frozen module:
    the bare base has them. Given beside the session are the base, and the modules of it that its files do not hold,
    which the adapter does; an AdapterError if it does not.
    """
    from thimble.backends.torch.module_session import ModuleTorchSession
    from thimble.backends.torch.open_module import open_module

    found = open_module(base, task, labels)
    session = ModuleTorchSession(found.module, loss, found.head)
    session.set_whole(first)
    session.attach(adapter=adapter)
    if lacking := [path for path in found.drawn if not any(name.startswith(f"{path}.") for name in adapter.replaced)]:
        raise AdapterError(
            f"the adapter holds no {listing(lacking)}, nor does base {base.name}: it was drawn at random in training "
            "and is lost; train again with it in modules_to_save, or name with --base the model that has it"
        )
    if store == "int8":
        _keep_as_int8(session, is_new=False)
    return session, found.base, found.drawn


def openable_tasks(base: ModuleBase) -> dict[str, str]:
    """The tasks that a folder can be opened for, and the class of transformers that each of them is opened in."""
    from thimble.backends.torch.open_module import classes_of

    return classes_of(base)


def fitting_tasks(base: ModuleBase, tasks: Iterable[str], adapter: Adapter) -> list[str]:
    """Of some tasks, those in whose class all layers of an adapter are, and the tensors that it replaces."""
    from thimble.backends.torch.open_module import names_in_class

    needed = {*named_for_peft(adapter), *adapter.replaced}
    return [task for task in tasks if needed <= names_in_class(base, task)]


def class_count(base: ModuleBase, task: str, adapter: Adapter) -> int:
    """How many classes the head of an adapter tells apart, or that of its base where it has none."""
    from thimble.backends.torch.open_module import head_of

    head, count = head_of(base, task)
    values = adapter.replaced.get(f"{head}.weight")
    return count if values is None else len(values)
