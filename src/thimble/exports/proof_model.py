"""Proof that llama.cpp computes what is in a model written as GGUF, and what rounding the model to its type costs.

Two things are compared, beside the numbers themselves (`proof_weights`). The log-probabilities of the file in llama.cpp
and here: the same but for the runtime's arithmetic. And those of the file with those of base and adapter in float:
what rounding costs, which is told and makes no file wrong.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from thimble.backends.session import Session
from thimble.core.adapter import Adapter
from thimble.data.encode import Row
from thimble.data.model import Model
from thimble.errors import DataError, InputError
from thimble.exports.llamacpp import LlamaCpp
from thimble.exports.proof import (
    EFFECT_ERROR,
    MOST_TOKENS,
    Text,
    choose_texts,
    distributions,
    of_tokens,
    probabilities_here,
    what_is_told,
)
from thimble.exports.proof_weights import WeightsCheck

Floats = NDArray[np.float64]

LIKELIEST = 64  # words a place by which distributions are compared; all others count as one
# Nats by which llama.cpp may differ from the same file here: it multiplies blocks by activations of eight bits.
RUNTIME = {"F32": 0.01, "F16": 0.05, "BF16": 0.05}
RUNTIME_OF_BLOCKS = 0.2
RUNTIME_SHARE = 0.05  # of the adapter's effect, beside that: activations in eight bits move large logits by more
LEAST_GAIN = 0.05  # nats: of less, noise decides what share is left
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
        kept_update: Share of all updates together that is in the file.
        runtime_difference: The file in llama.cpp and here.
        rounding_difference: The file and base with adapter in float32, both here.
        effect: How much the adapter moves a log-probability here; 0 without one.
        effect_there: The same in llama.cpp, as a multiple: 1 is the same effect; 1 without an adapter.
        divergence: KL divergence of the file from base and adapter, both here; what is not among the LIKELIEST words of
            a place counts as one word, so the whole is a little more.
        loss_base: Mean negative log-probability of the bare base, here.
        loss_before_rounding: Of base and adapter in float32, here.
        loss_there: Of the file in llama.cpp.
        different_texts: Texts that are other tokens in llama.cpp.
        different_conversations: Conversations that its chat template writes otherwise.
        ends: Whether an answer ends by itself there.
        holds: Whether the numbers are those of base and adapter, and the probabilities in llama.cpp those of the file.
    """

    runtime: str
    rows: int
    positions: int
    tensors: int
    worst_rounding: float
    worst_update: float
    kept_update: float
    runtime_difference: float
    rounding_difference: float
    effect: float
    effect_there: float
    divergence: float
    loss_base: float
    loss_before_rounding: float
    loss_there: float
    different_texts: list[str]
    different_conversations: list[str]
    ends: bool
    holds: bool

    @property
    def kept_gain(self) -> float:
        """Share of what the adapter takes off the loss that the file takes off too; 1 where that is next to nothing."""
        gain = self.loss_base - self.loss_before_rounding
        return (self.loss_base - self.loss_there) / gain if gain > LEAST_GAIN else 1.0

    @property
    def difference(self) -> str:
        """What was found, for whom the proof fails."""
        return (
            f"log-probabilities differ by {self.runtime_difference:.4f} nats, and the effect of the adapter there is "
            f"{self.effect_there:.2f} times what it is here"
        )


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
    texts = choose_texts(rows)
    runtime = LlamaCpp(file, None, threads, MOST_TOKENS, has_template=here.model.template is not None)
    there = _run_there(runtime, here.model, texts, on_row)
    told = what_is_told(there.found)
    ours = _run_here(here, texts)
    found, bare, exact, rounded = (values[told] for values in (there.found, ours.bare, ours.exact, ours.rounded))
    difference = float(np.abs(found - rounded).mean())
    effect = float(np.abs(exact - bare).mean())
    is_same = difference <= RUNTIME.get(file_type, RUNTIME_OF_BLOCKS) + RUNTIME_SHARE * effect
    holds = is_same and (here.adapter is None or _is_same_effect(bare, rounded, found))
    return ModelProof(
        "llama.cpp", len(texts), int(told.sum()), weights.tensors, weights.worst_rounding, weights.worst_update,
        weights.kept_update, difference, float(np.abs(ours.rounded - ours.exact).mean()),
        effect, _multiple(exact - bare, found - bare), ours.divergence,
        *(-float(values.mean()) for values in (bare, exact, found)),
        there.texts, there.conversations, there.ends, holds and not weights.problems,
    )  # fmt: skip


class _There(NamedTuple):
    """What the runtime says: log-probabilities, and what it does otherwise."""

    found: Floats
    texts: list[str]
    conversations: list[str]
    ends: bool


def _run_there(runtime: LlamaCpp, model: Model, texts: Sequence[Text], on_row: Callable[[int, int], None]) -> _There:
    found: list[float] = []
    for done, text in enumerate(texts, 1):
        found += runtime.log_probabilities(text.ids, text.begin)
        on_row(done, len(texts))
    _, ends = runtime.answer(texts[0].ids[: texts[0].begin], MOST_ANSWER)
    return _There(np.array(found), list(_other_texts(runtime, model)), list(_other_conversations(runtime, model)), ends)


class _Ours(NamedTuple):
    """Log-probabilities of the tokens here, and how far the file is from base and adapter."""

    bare: Floats
    exact: Floats
    rounded: Floats
    divergence: float


def _run_here(here: Here, texts: Sequence[Text]) -> _Ours:
    """The bare base, base and adapter, and the file: one base in memory at a time."""
    session = here.open_session(here.model)
    exact: list[Floats] = []
    likeliest = []
    for text, logs in distributions(session, session.load(here.adapter), texts):
        exact.append(of_tokens(text, logs))
        words = np.argpartition(logs, -LIKELIEST, 1)[:, -LIKELIEST:]
        likeliest.append((words, np.take_along_axis(logs, words, 1)))
    bare = probabilities_here(session, session.load(None), texts) if here.adapter else np.concatenate(exact)
    del session
    session = here.open_session(here.written)
    rounded: list[Floats] = []
    divergences: list[Floats] = []
    for (text, logs), (words, before) in zip(distributions(session, session.load(None), texts), likeliest, strict=True):
        rounded.append(of_tokens(text, logs))
        divergences.append(_divergence(before, np.take_along_axis(logs, words, 1)))
    return _Ours(bare, *map(np.concatenate, (exact, rounded)), float(np.concatenate(divergences).mean()))


def _divergence(before: Floats, after: Floats) -> Floats:
    """KL divergence at each place, float64 (places,), by some words' log-probabilities (places, words) and the rest."""
    p, q = np.exp(before), np.exp(after)
    rest, rest_after = (np.maximum(1 - one.sum(1), np.finfo(np.float64).tiny) for one in (p, q))
    return np.asarray((p * (before - after)).sum(1) + rest * np.log(rest / rest_after))


def _multiple(effect: Floats, found: Floats) -> float:
    """What multiple of an effect was found, by least squares; 1 if there is none."""
    size = float(effect @ effect)
    return float(found @ effect / size) if size else 1.0


def _is_same_effect(bare: Floats, rounded: Floats, there: Floats) -> bool:
    """Whether the file differs from the bare base in the runtime as it does here, as far as noise lets it be seen."""
    effect = rounded - bare
    size = float(effect @ effect)
    if not size:
        return True
    unseen = 3 * float(np.sqrt(np.square(there - rounded).mean() / size))
    return abs(_multiple(effect, there - bare) - 1) <= EFFECT_ERROR + unseen


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
