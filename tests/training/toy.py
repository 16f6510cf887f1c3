"""A linear model as a session, rows for it as a task, and a sink in memory: whole runs in milliseconds."""

import math
import tempfile
from dataclasses import dataclass, field, replace

import numpy as np

from thimble.backends.session import Objective, Work
from thimble.config.train import TrainConfig
from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors
from thimble.core.method import Method
from thimble.core.metrics import LossSum
from thimble.events import EventLog
from thimble.models.execution import ExecutionPlan
from thimble.training.checkpoint import Checkpoint
from thimble.training.control import Control
from thimble.training.loop import LoopPlan, run
from thimble.training.protocols import OneProcess, Scores
from thimble.training.step_schedule import text_schedule

ROW_TOKENS, SIZE = 8, 3
WIDE, NARROW = ExecutionPlan("dense", 2, 32, 64), ExecutionPlan("dense", 1, 8, 8)
TRUTH = np.array([1.0, -2.0, 3.0])


@dataclass(frozen=True)
class ToyGradient:
    loss: LossSum
    flat: np.ndarray
    norm: float


@dataclass(frozen=True)
class ToyState:
    values: np.ndarray
    mean: np.ndarray
    step: int = 0

    @property
    def active(self):
        return self.values


class ToySession:
    """y = w · x, its squared error taken for nats; calls are kept, and may be spoilt by the step they belong to."""

    shares_prefixes = False

    def __init__(self, loss_at=lambda step, loss: loss, most_tokens=math.inf, spoil=lambda step, values: values):
        self.loss_at, self.most_tokens, self.spoil = loss_at, most_tokens, spoil
        self.calls = []

    def names(self):
        return [call[0] for call in self.calls]

    def load(self, adapter):
        return np.zeros(SIZE) if adapter is None else adapter.layers["layer"].scale * adapter.layers["layer"].A[0]

    def start(self, adapter, method):
        self.method = method
        return ToyState(self.load(adapter).copy(), np.zeros(SIZE))

    def gradient(self, state, work, objective, execution, key):
        self.calls.append(("gradient", execution, objective, key))
        self._fit(execution, key.step + 1)
        total, loss = np.zeros(SIZE), LossSum()
        for x, y in (batch for share in work.shares for batch in share):
            errors = x @ state.values - y
            total += errors @ x
            loss += LossSum(float(errors @ errors) / 2, len(y))
        flat = total / work.target_tokens
        return ToyGradient(replace(loss, nats=self.loss_at(key.step + 1, loss.nats)), flat, float(np.linalg.norm(flat)))

    def _fit(self, execution, step):
        most = self.most_tokens(step) if callable(self.most_tokens) else self.most_tokens
        if execution.micro_tokens > most:
            raise MemoryError(f"tried to allocate {execution.micro_tokens} bytes")

    def apply(self, state, gradient, rate):
        self.calls.append(("apply", rate))
        mean = 0.5 * state.mean + gradient.flat
        return ToyState(self.spoil(state.step + 1, state.values - rate * mean), mean, state.step + 1)

    def losses(self, adapter, batches, execution):
        self.calls.append(("losses", execution))
        return (LossSum(float(np.square(x @ adapter - y).sum()) / 2, len(y)) for x, y in batches)

    def snapshot(self, state, into=None):
        self.calls.append(("snapshot",))
        return {"adapter": state.values.copy(), "exp_avg": state.mean.copy(), "step": np.array([state.step])}

    def restore(self, state, arrays):
        self.calls.append(("restore", tuple(arrays)))
        values = arrays["adapter"].copy()
        if "exp_avg" not in arrays:
            return replace(state, values=values)
        return ToyState(values, arrays["exp_avg"].copy(), int(arrays["step"][0]))

    def adapter(self, state):
        return initial(state.values)

    def is_finite(self, state):
        return bool(np.isfinite(state.values).all() and np.isfinite(state.mean).all())

    def unmoved_layers(self, state):
        return []

    def release(self):
        self.calls.append(("release",))


@dataclass(frozen=True)
class ToyTask:
    """Rows of which each step takes some, and others to measure."""

    x: np.ndarray
    y: np.ndarray
    valid: np.ndarray
    truth: np.ndarray  # by which validation rows are judged
    weights: tuple = (0.0,)  # of the KL term, in turn
    others: object = None  # another truth, by which rows that confirm are judged; None: there are none

    @property
    def costs(self):
        return [ROW_TOKENS] * len(self.x)

    unit = counted = "tokens"

    def work(self, rows, execution, key, features=None):
        size = execution.micro_tokens // ROW_TOKENS
        batches = [(self.x[part], self.y[part]) for part in (rows[i : i + size] for i in range(0, len(rows), size))]
        return Work([batches], len(rows))

    def features(self, session, state, execution, open_file, control):
        return None

    def objectives(self, session, execution, control):
        return [Objective(weight, "the reference" if weight else None) for weight in self.weights]

    def watch(self, session, adapter, execution):
        return list(session.losses(adapter, [(row[None], row[None] @ self.truth) for row in self.valid], execution))

    def confirm(self, session, adapter, execution):
        truth = self.others
        return (
            []
            if truth is None
            else list(session.losses(adapter, [(row[None], row[None] @ truth) for row in self.valid], execution))
        )

    def choose(self, session, adapter, execution):
        return self.watch(session, adapter, execution)

    def evaluate(self, session, adapter, execution, control):
        (loss,) = session.losses(adapter, [(self.valid, self.valid @ self.truth)], execution)
        return Scores(loss.mean, 0.0)

    def divergence(self, session, adapter, execution, control):
        return {}

    def check_base(self, base, control):
        pass

    def initial_loss(self, session, adapter, base, execution, control):
        return self.evaluate(session, adapter, execution, control).loss


@dataclass
class MemorySink:
    """Keeps what a run leaves behind; `fails_at` names steps whose checkpoint finds no room."""

    steps: list = field(default_factory=list)
    checkpoints: dict = field(default_factory=dict)
    before: object = None
    fails_at: tuple = ()
    is_ended: bool = False

    def scratch_file(self):
        return tempfile.TemporaryFile()

    def saved_before(self):
        return self.before

    def write_before(self, before):
        self.before = before

    def write_step(self, row):
        self.steps.append(row)

    def write_checkpoint(self, step, arrays, progress):
        if step in self.fails_at:
            raise OSError(28, "No space left on device")
        arrays = {name: values.copy() for name, values in arrays.items()}
        self.checkpoints[step] = Checkpoint(step, arrays, progress, {})

    def end_steps(self):
        self.is_ended = True

    def write_adapter(self, adapter):
        self.adapter = adapter


def initial(values):
    return Adapter({"layer": Factors(np.array(values, np.float64)[None], np.ones((1, 1)), 1.0)})


def make_task(rows=32, valid_rows=8, **options):
    random = np.random.default_rng(0)
    x = random.integers(-2, 3, (rows, SIZE)).astype(float)
    return ToyTask(
        x, x @ TRUTH, random.integers(-2, 3, (valid_rows, SIZE)).astype(float), **{"truth": TRUTH, **options}
    )


def train(session=None, task=None, sink=None, steps=12, plan=None, options=None, **control):
    """Run the loop; gives the result, the sink and the messages."""
    session, task, sink = session or ToySession(), task or make_task(), sink or MemorySink()
    length = {} if options and "max_minutes" in options else {"max_steps": steps}
    given = {"batch_tokens": 64, "learning_rate": 0.05, "schedule": "constant", "warmup_steps": 0, **length}
    config = TrainConfig.build({**given, **(options or {})})
    schedule = text_schedule(config, task.costs, sum(task.costs), "llama", 64, [(1, SIZE)])
    made = LoopPlan(initial(np.zeros(SIZE)), Method(seed=5), schedule, WIDE, **(plan or {}))
    log = control.pop("log", None) or EventLog(control.pop("on_event", lambda event: None))
    result = run(made, task, session, control.pop("collective", OneProcess()), sink, Control(log, **control))
    return result, sink, log.messages
