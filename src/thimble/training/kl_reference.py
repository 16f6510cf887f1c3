"""What holds a model to its base while it learns: every few steps a KL term, on texts that the base wrote.

The base's answers are kept as those of an old task are in learning without forgetting (Li and Hoiem, arXiv:1606.09282,
equation 2), with the whole distribution at each place, and on texts of the model's own: nothing is needed but the base.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from thimble.backends.session import Objective, Session
from thimble.config.options import options_of
from thimble.config.train import BEFORE, KL_OPTIONS, TrainConfig
from thimble.data.batches import Batch, micro_batches
from thimble.data.encode import Row
from thimble.data.examples import beginnings
from thimble.data.model import Model
from thimble.errors import plural
from thimble.models.execution import ExecutionPlan
from thimble.training.control import Control
from thimble.training.own_texts import LEAST_SHARE, TEXT_TOKENS, Writer

TEXTS = 128  # about: as many from each beginning
PASS_SHARE, LEAST_PASS, MOST_PASS = 8, 64, 256  # tokens of the texts beside a step: one of 8 of the step's, and bounds
GENERAL_TOKENS = 1100  # of the half of the general text that may be kept, about: tokenizers differ


@dataclass(frozen=True)
class KlTerm:
    """How the answers of the base are kept."""

    weight: float = 0.0  # against learning the task, from 0 up to 1; 0: they are not
    every_steps: int = 1  # which steps do both
    pass_tokens: int = LEAST_PASS  # of the texts beside a step, about
    beginnings: Sequence[Row] = ()  # what the base goes on from in texts of its own, or
    general: Sequence[Row] = ()  # rows of general text
    # How the base is computed with: a run that is resumed writes the same texts again, if they are not kept any more.
    computed: str = ""

    def objectives(
        self, session: Session, writer: Writer, execution: ExecutionPlan, control: Control
    ) -> Sequence[Objective]:
        """What the steps minimise, in turn: cross-entropy, and every few steps a KL term too."""
        rows = self._rows(session, writer, execution, control) if self.weight else []
        if not rows:
            return [Objective()]
        longest = max(self.pass_tokens, *(len(row.ids) for row in rows))
        batches = micro_batches(rows, longest, shares_prefixes=session.shares_prefixes)
        # Rows of one kind stand together there, and short runs come to the first batches alone.
        order = np.argsort(np.random.Philox(key=0).random_raw(len(batches)), kind="stable")
        return _Turns(self, session, [batches[number] for number in order])

    def _rows(self, session: Session, writer: Writer, execution: ExecutionPlan, control: Control) -> Sequence[Row]:
        """The texts, with a label at each place where the answer is kept; none if the base writes too little."""
        if self.general:
            return [replace(row, labels=np.zeros_like(row.labels)) for row in self.general]
        why = "to be held to them while it learns"
        writer = replace(writer, fingerprint=f"{writer.fingerprint} {self.computed}")
        texts = writer.texts(session, self.beginnings, TEXTS, why, execution, control)
        filled = [text for text in texts if text.target_tokens > 1]  # more than its end
        if texts and len(filled) < LEAST_SHARE * len(texts):
            control.log.warning(
                f"the base writes nothing but its end token after {len(texts) - len(filled)} of "
                f"{plural(len(texts), 'beginning')}: none of its answers are kept; --keep-general-on general keeps "
                "those to general text"
            )
            return []
        return filled


class _Turns(Sequence[Objective]):
    """The objectives of as many steps as it takes to keep the answers to all texts once.

    The base reads a batch of them when its turn first comes: short runs do not come to all.
    """

    def __init__(self, term: KlTerm, session: Session, batches: Sequence[Batch]) -> None:
        self._term, self._session, self._batches = term, session, batches
        self._read: dict[int, Objective] = {}  # by the number of the batch

    def __len__(self) -> int:
        return self._term.every_steps * len(self._batches)

    def __getitem__(self, step: int) -> Objective:  # type: ignore[override]  # no slices
        number, before = divmod(range(len(self))[step], self._term.every_steps)
        if before < self._term.every_steps - 1:
            return Objective()
        if number not in self._read:
            self._read[number] = Objective(self._term.weight, self._session.kl_reference(self._batches[number]))
        return self._read[number]


def described(config: TrainConfig) -> str:
    """What is kept and when, for people; where nothing is, that options about it say nothing, if any was given."""
    every, is_own = config.keep_general_every_steps, config.keep_general_on == "own"
    if not config.keep_general:
        given = {name: getattr(config, name) for name in KL_OPTIONS[1:]}
        usual = {name: options_of(TrainConfig)[name].default for name in given}
        if given in (usual, {name: BEFORE[name] for name in given}):
            return ""
        return (
            "answers of the base: not kept, since --keep-general is 0; then --keep-general-on and "
            "--keep-general-every-steps say nothing"
        )
    when = "each step" if every == 1 else f"one step of {every}"
    what = f"about {TEXTS} texts that it writes" if is_own else "half of the general text, which is not measured then"
    return f"answers of the base: kept in {when}, with a weight of {config.keep_general:g}, on {what}"


def kl_pass_tokens(config: TrainConfig) -> int:
    """About so many tokens of texts beside a step that keeps answers; 0 if none does.

    With one step of four that is at most 3 % of what steps of 512 tokens and more read. Labels, 24 steps of 512, weight
    0.3: 64 tokens keep as much as 256 (KL 0.59 and 0.58, plain 1.23), for 1.10 instead of 1.45 of a plain run's time.
    """
    return min(MOST_PASS, max(LEAST_PASS, config.batch_tokens // PASS_SHARE)) if config.keep_general else 0


def kl_places(config: TrainConfig) -> int:
    """At how many places the base's hidden states are kept during the run, at most or about."""
    of_own = TEXTS * (TEXT_TOKENS + 1)
    return (of_own if config.keep_general_on == "own" else GENERAL_TOKENS) if config.keep_general else 0


def kl_term(config: TrainConfig, model: Model, general: Sequence[Row]) -> tuple[KlTerm, Sequence[Row]]:
    """The KL term of a run, and the general text that is left to measure on: none of it was trained on."""
    if not config.keep_general:
        return KlTerm(), general
    term = KlTerm(config.keep_general, config.keep_general_every_steps, kl_pass_tokens(config))
    if config.keep_general_on == "own":
        computed = f"{config.compute} {config.store}"
        return replace(term, beginnings=beginnings(model, config), computed=computed), general
    kept, measured = ([row for number, row in enumerate(general) if number % 4 // 2 == half] for half in (0, 1))
    return replace(term, general=kept), measured
