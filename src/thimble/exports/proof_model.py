"""Proof that a model written as GGUF is the base with its adapter, and that llama.cpp computes what is in it.

Three things are compared. The numbers of the file, read again, with those of base and adapter: each tensor within the
rounding of its type, and each update there in full, which rounding hides from single numbers but not from thousands.
The log-probabilities of the file in llama.cpp and here: the same but for the runtime's arithmetic. And those of the
file with those of base and adapter in float: what rounding costs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from thimble.backends.session import Session
from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors, merge
from thimble.data.encode import Row
from thimble.data.model import Model
from thimble.errors import DataError, InputError
from thimble.exports.llamacpp import LlamaCpp
from thimble.exports.proof import (
    EFFECT_ERROR,
    MOST_POSITIONS,
    MOST_ROWS,
    MOST_TOKENS,
    choose_tokens,
    probabilities_here,
)
from thimble.models.base import Base

Floats = NDArray[np.float64]
Chosen = Sequence[tuple[list[int], int]]  # the tokens of each row, and the first that is compared

MOST_CHECKED_ROWS = 512  # of each matrix
# Length of the rounding error of a tensor, as a share of its own: what none of its type comes near.
ROUNDING = {"F32": 1e-6, "F16": 2e-3, "BF16": 1e-2}
ROUNDING_OF_BLOCKS = 0.5
SHARE_ERROR = 0.02  # of an update, beside what rounding hides
# Nats by which llama.cpp may differ from the same file here: it multiplies blocks by activations of eight bits.
RUNTIME = {"F32": 0.01, "F16": 0.05, "BF16": 0.05}
RUNTIME_OF_BLOCKS = 0.2
MOST_ANSWER = 256  # tokens
TEXTS = (
    "Hello, world! It's 3.14 %, isn't it?", "  two  spaces\tand\ta tab\n\n\nlines\r\n", "你好，世界 — ñandú, ěščř",
    "👩‍👩‍👧 🦙🏽 emoji ☃", "def f(x):\n    return {'a': [1, 22, 333, 4444]}", "<|im_start|>user\nHi<|im_end|>\n", "",
)  # fmt: skip
_TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather of a city 🌦", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}  # fmt: skip
_ASKED = {"role": "user", "content": "What's the weather in Zürich? 🌞"}
CONVERSATIONS = {
    "a question": ([_ASKED], None),
    "a system turn": ([{"role": "system", "content": "Answer briefly."}, _ASKED], None),
    "several turns": (
        [_ASKED, {"role": "assistant", "content": "Sunny."}, {"role": "user", "content": "And now?"}],
        None,
    ),
    "tools": ([_ASKED], [_TOOL]),
}


class WeightsCheck(NamedTuple):
    """What the numbers of a file were found to be."""

    tensors: int  # compared
    worst_rounding: float  # share of its length that a tensor changed by
    worst_update: float  # share of an update that is in the file; the one furthest from 1, and 1 without updates
    problems: tuple[str, ...]  # what is not within rounding


@dataclass(frozen=True)
class ModelProof:
    """What was compared; log-probabilities in nats a token, averaged over the positions.

    Attributes:
        runtime: Name of the runtime.
        rows: Rows of text.
        positions: Tokens whose probability was compared.
        tensors: Tensors whose numbers were compared.
        worst_rounding: Share of its length that a tensor changed by when it was rounded to its type.
        worst_update: Share of an update of the adapter that is in the file: the one furthest from 1.
        runtime_difference: The file in llama.cpp and here.
        rounding_difference: The file and base with adapter in float32, both here.
        effect: How much the adapter moves a log-probability here; 0 without one.
        effect_there: The same in llama.cpp, as a multiple: 1 is the same effect; 1 without an adapter.
        loss_before_rounding: Mean negative log-probability of base and adapter in float32, here.
        loss_there: Of the file in llama.cpp.
        different_texts: Texts that are other tokens in llama.cpp.
        different_conversations: Conversations that its chat template writes otherwise.
        ends: Whether an answer ends by itself there.
        holds: Whether numbers and probabilities are the same, as far as rounding lets it be seen.
    """

    runtime: str
    rows: int
    positions: int
    tensors: int
    worst_rounding: float
    worst_update: float
    runtime_difference: float
    rounding_difference: float
    effect: float
    effect_there: float
    loss_before_rounding: float
    loss_there: float
    different_texts: list[str]
    different_conversations: list[str]
    ends: bool
    holds: bool


# ---- the numbers ----------------------------------------------------------------------------------------------------


def check_weights(base: Base, updates: Mapping[str, Factors], written: Base) -> WeightsCheck:
    """Compare every tensor of a written file, by its name in transformers, with base and updates."""
    problems, worst_rounding, worst_update = [], 0.0, 1.0
    if set(base.weights) != set(written.weights):
        missing = sorted(set(base.weights) ^ set(written.weights))
        problems.append(f"the file and the base do not hold the same tensors: {missing[:3]}")
    for name in base.weights:
        if name in written.weights:
            rounding, share, unseen = _compare_tensor(base, updates.get(name.removesuffix(".weight")), written, name)
            dtype = written.weights[name].dtype
            if not rounding <= ROUNDING.get(dtype, ROUNDING_OF_BLOCKS):
                problems.append(f"{name} ({dtype}) differs by {rounding:.1%} of its length")
            if abs(share - 1) > SHARE_ERROR + unseen:
                problems.append(f"{share:.2f} of the update of {name} is in the file: expected 1")
            worst_rounding = max(worst_rounding, rounding)
            worst_update = max(worst_update, share, key=lambda value: abs(value - 1))
    return WeightsCheck(len(base.weights), worst_rounding, worst_update, tuple(problems))


def _compare_tensor(base: Base, update: Factors | None, written: Base, name: str) -> tuple[float, float, float]:
    """Rounding as a share of the tensor, how much of its update is there, and how well that can be seen (5 sigma)."""
    old, new = base.weights[name], written.weights[name]
    if len(old.shape) == 1:
        before, found = (weight.read().astype(np.float64) for weight in (old, new))
        return _share(found - before, before), 1.0, 0.0
    rows = np.unique(np.linspace(0, old.shape[0] - 1, MOST_CHECKED_ROWS).astype(np.int64))
    before, found = (weight.read_rows(rows).astype(np.float64) for weight in (old, new))
    if update is None:
        return _share(found - before, before), 1.0, 0.0
    magnitude = None if update.magnitude is None else update.magnitude[rows]
    exact = merge(before, Factors(update.A, update.B[rows], update.scale, magnitude))
    delta, error = exact - before, found - exact
    size = float(np.square(delta).sum())
    if size == 0:
        return _share(error, exact), 1.0, 0.0
    unseen = 5 * float(np.linalg.norm(error)) / np.sqrt(size * error.size)
    return _share(error, exact), float(((found - before) * delta).sum() / size), unseen


def _share(error: Floats, whole: Floats) -> float:
    size = float(np.linalg.norm(whole))
    return float(np.linalg.norm(error)) / size if size else float(np.linalg.norm(error))


# ---- the runtime ----------------------------------------------------------------------------------------------------


class Here(NamedTuple):
    """The three that are run here, opened when they are asked for: each is a base in memory."""

    model: Model  # the base
    adapter: Adapter | None
    written: Model  # the file
    open_session: Callable[[Model], Session]  # in float32


def prove_model(
    here: Here,
    file: Path,
    file_type: str,
    weights: WeightsCheck,
    rows: Sequence[Row],
    threads: int,
    on_row: Callable[[int, int], None] = lambda done, total: None,
) -> ModelProof:
    """Compare a whole model in llama.cpp with the one it was made of.

    Args:
        here: What it was made of.
        file: The GGUF file.
        file_type: One of FILE_TYPES.
        weights: What `check_weights` found.
        rows: Text to compare on; the first MOST_ROWS are taken, and of them the first target tokens.
        threads: For llama.cpp.
        on_row: Told how many rows are done.

    Returns:
        What was found.

    Raises:
        MissingPackageError: Without the runtime.
        RuntimeError: If the runtime refuses the file.
    """
    chosen = choose_tokens(rows[:MOST_ROWS])
    each = max(1, MOST_POSITIONS // max(1, len(chosen)))
    there = _run_there(LlamaCpp(file, None, threads, MOST_TOKENS, here.model.template is not None), here.model, chosen,
                       each, on_row)  # fmt: skip
    bare, exact, rounded = _run_here(here, chosen, each)
    told = np.isfinite(there.found)  # of tokens that are no whole character nothing is told
    if not told.any():
        raise RuntimeError("it tells the probability of none of the tokens; name other examples with --data")
    effect, share, is_same = _effect(*(values[told] for values in (bare, exact, there.found)))
    difference = float(np.abs(there.found - rounded)[told].mean())
    holds = is_same and difference <= RUNTIME.get(file_type, RUNTIME_OF_BLOCKS) and not weights.problems
    return ModelProof(
        "llama.cpp", len(chosen), int(told.sum()), weights.tensors, weights.worst_rounding, weights.worst_update,
        difference, float(np.abs(rounded - exact).mean()), effect, share, -float(exact[told].mean()),
        -float(there.found[told].mean()), there.texts, there.conversations, there.ends, holds,
    )  # fmt: skip


class _There(NamedTuple):
    """What the runtime says: log-probabilities, and what it does otherwise."""

    found: Floats
    texts: list[str]
    conversations: list[str]
    ends: bool


def _run_there(
    runtime: LlamaCpp, model: Model, chosen: Chosen, each: int, on_row: Callable[[int, int], None]
) -> _There:
    found: list[float] = []
    for done, (ids, begin) in enumerate(chosen, 1):
        found += runtime.log_probabilities(ids[: begin + each], begin)
        on_row(done, len(chosen))
    ids, begin = chosen[0]
    _, ends = runtime.answer(ids[:begin], MOST_ANSWER)
    return _There(np.array(found), list(_other_texts(runtime, model)), list(_other_conversations(runtime, model)), ends)


def _run_here(here: Here, chosen: Chosen, each: int) -> tuple[Floats, Floats, Floats]:
    """Log-probabilities of the bare base, of base and adapter, and of the file: one base in memory at a time."""
    session = here.open_session(here.model)
    bare = probabilities_here(session, session.load(None), chosen, each)
    exact = probabilities_here(session, session.load(here.adapter), chosen, each) if here.adapter else bare
    del session
    session = here.open_session(here.written)
    return bare, exact, probabilities_here(session, session.load(None), chosen, each)


def _effect(bare: Floats, exact: Floats, there: Floats) -> tuple[float, float, bool]:
    """Size of the adapter's effect here, its multiple there by least squares, and whether that is 1 as far as seen."""
    effect = exact - bare
    size = float(effect @ effect)
    if not size:
        return 0.0, 1.0, True
    share = float((there - bare) @ effect / size)
    # Of an effect that rounding drowns, the fit is noise too.
    unseen = 3 * float(np.sqrt(np.square(there - exact).mean() / size))
    return float(np.abs(effect).mean()), share, abs(share - 1) <= EFFECT_ERROR + unseen


def _other_texts(runtime: LlamaCpp, model: Model) -> Iterator[str]:
    for text in TEXTS:
        if runtime.tokenize(text) != model.tokenizer.encode(text):
            yield text


def _other_conversations(runtime: LlamaCpp, model: Model) -> Iterator[str]:
    """Conversations that llama.cpp writes otherwise; what the template refuses here is not asked there."""
    for name, (messages, tools) in CONVERSATIONS.items():
        if model.template is None:
            return
        try:
            ours = model.template.render(messages, tools, add_generation_prompt=True)
        except (DataError, InputError):
            continue
        try:
            is_same = runtime.apply_template(messages, tools).removeprefix(model.tokenizer.bos_token or "") == (
                ours.removeprefix(model.tokenizer.bos_token or "")  # which llama.cpp leaves to its tokenizer
            )
        except RuntimeError:
            is_same = False
        if not is_same:
            yield name
