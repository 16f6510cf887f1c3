"""Random schedules of the engine: any requests beside one another, each of which must get what it gets alone.

Up to 32 adapters of ragged ranks come, are replaced under the same name and go, requests begin alike and are cancelled,
the cache is too small for all. Every token of every answer is compared with a cold reading of all before it: it must be
the likeliest one there, unless two are as good as equal, and its log-probability must be that of the cold reading. The
same holds against the reference in float64 with the adapter merged into the weights, which shares no code with it (of
the real base that would take too long). Where products are in whole numbers a cold reading is another thing: there each
answer must be that of the request alone in an engine of its own.
"""

import time
from dataclasses import dataclass, field, replace

import numpy as np

from stress import TINY, Line
from thimble.backends.tape import OPS
from thimble.backends.torch.session import TorchSession
from thimble.core.adapter import Adapter
from thimble.core.inits import LayerData, kaiming
from thimble.core.lowrank import Factors, merge
from thimble.inference.engine import Engine
from thimble.inference.sampling import SamplingOptions
from thimble.models import forward
from thimble.models.base import default_base, open_base

NEAR = 1e-4  # two logits are as good as equal; and the largest difference of a log-probability
MOST_NEAR = 1e-3  # share of tokens of which two are as good as equal
ADAPTERS, LONGEST_PROMPT, LONGEST_ANSWER = 32, 90, 14


@dataclass
class Asked:
    """A request, and what it got."""

    prompt: np.ndarray
    adapter: object
    options: SamplingOptions
    written: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    finish: str = ""


@dataclass
class Outcome:
    """What a schedule came to."""

    requests: int = 0
    tokens: int = 0
    near: int = 0  # tokens that are not the likeliest of a cold reading, which has one as good as equal
    wrong: int = 0  # tokens that are another
    drift: float = 0.0  # largest difference of a log-probability to a cold reading
    merged_drift: float = 0.0  # and to the merged model
    cached: int = 0  # tokens of prompts that were not read


def draw_adapter(base, random, size):
    """Of some rank, of all layers or of some, with magnitudes now and then; numbers of B are of some size."""
    only, rank = random.choice(["", "", "q_proj", "down_proj", "layers.1"]), int(random.integers(1, 9))
    layers = {}
    for path, shape in base.spec.linear_shapes().items():
        if only in path:
            first = kaiming(LayerData(path, shape, rank, float(random.uniform(0.5, 2))))
            layers[path] = replace(first, B=(random.standard_normal(first.B.shape) * size).astype(np.float32))
    if random.random() < 0.15:
        lengths = {path: np.linalg.norm(base.weights[f"{path}.weight"].read(), axis=1) for path in layers}
        layers = {path: Factors(f.A, f.B, f.scale, lengths[path] * 1.1) for path, f in layers.items()}
    return Adapter(layers)


class Merged:
    """The reference of the merged models, by adapter: logits of any row in float64."""

    def __init__(self, base):
        self.spec = base.spec
        self.weights = {name: weight.read().astype(np.float64) for name, weight in base.weights.items()}
        self.merged = {}

    def logits(self, ids, active, start):
        """Of the merged model, after the tokens from `start` on: float64 (tokens, vocabulary)."""
        if active not in self.merged:
            layers = active.export().layers if active.layers else {}
            changed = {f"{path}.weight": factors for path, factors in layers.items()}
            self.merged[active] = {
                **self.weights, **{name: merge(self.weights[name], factors) for name, factors in changed.items()}
            }  # fmt: skip
        weights, rows = self.merged[active], forward.layout(self.spec, np.array([0, len(ids)]))
        hidden = forward.hidden(OPS, self.spec, weights, ids, rows)
        return np.asarray(forward.logits(OPS, self.spec, weights, hidden[start:]))


class Schedule:
    """One engine and the customers that use it."""

    adapters, b_size = ADAPTERS, 0.1

    def __init__(self, session, base, seed, keeps_prefixes):
        self.session, self.base, self.random = session, base, np.random.default_rng(seed)
        random = self.random
        self.names = [self.loaded() for _ in range(int(random.integers(1, self.adapters + 1)))] + [session.load(None)]
        self.texts = [random.integers(3, 290, LONGEST_PROMPT).astype(np.int32) for _ in range(3)]
        self.engine = Engine(
            session, num_workers=int(random.integers(1, 3)), max_slots=int(random.integers(1, 20)),
            cache_tokens=int(random.choice([64, 400, 4000])), prefill_tokens=int(random.choice([7, 32, 50, 1024])),
            is_interactive=bool(random.random() < 0.8), keeps_prefixes=keeps_prefixes,
        )  # fmt: skip
        self.asked: dict[int, Asked] = {}
        self.outcome = Outcome()

    def loaded(self):
        return self.session.load(draw_adapter(self.base, self.random, self.b_size))

    def prompt(self):
        """The beginning of a known text with an end of its own, of any lengths."""
        text, random = self.texts[self.random.integers(3)], self.random
        common, own = int(random.integers(0, LONGEST_PROMPT)), int(random.integers(1, 8))
        return np.concatenate([text[:common], random.integers(3, 290, own).astype(np.int32)])

    def ask(self):
        place = int(len(self.names) * self.random.random() ** 3)  # few are asked for often, as customers are
        if self.random.random() < 0.05:  # the name stands for another adapter from now on
            self.names[place] = self.loaded()
        stop_ids = frozenset(self.random.integers(3, 290, 3).tolist())
        options = SamplingOptions(int(self.random.integers(1, LONGEST_ANSWER)), stop_ids, logprobs=0)
        request = Asked(self.prompt(), self.names[place], options)
        self.asked[self.engine.add(request.prompt, options, request.adapter)] = request

    def run(self, requests):
        """Have some requests come and go in any order."""
        left = requests
        while left or not self.engine.is_idle:
            coming = min(left, int(self.random.geometric(0.4)) - 1)
            for _ in range(coming):
                self.ask()
            left -= coming
            if self.random.random() < 0.05 and self.asked:
                number = int(self.random.choice(list(self.asked)))
                self.engine.cancel(number)
                self.asked[number].finish = self.asked[number].finish or "cancelled"
            for token in self.engine.step():
                self.note(token)
        assert self.engine.load.used_tokens == 0
        assert all(request.finish for request in self.asked.values())
        for request in self.asked.values():
            self.check(request)
        return self.outcome

    def note(self, token):
        request = self.asked[token.request]
        assert not request.finish, "a request that has ended gets nothing more"
        if token.id is not None:
            request.written.append(token.id)
            request.logprobs.append(token.logprobs.chosen)
        if token.finish:
            request.finish = token.finish
            assert token.usage[::2] == (len(request.prompt), len(request.written))
            self.outcome.cached += token.usage.cached_tokens

    def check(self, request):
        """Compare each token with a cold reading of the prompt and of what was written before it."""
        self.outcome.requests += 1
        ids = np.array([*request.prompt, *request.written], np.int32)
        cold = self.session.logits(ids, request.adapter)[len(request.prompt) - 1 :].astype(np.float64)
        written = list(request.written)
        if request.finish == "stop":  # the token that ended it is one of these
            assert int(cold[len(written)].argmax()) in request.options.stop_ids or self.is_near(cold[len(written)])
        if request.finish == "length":
            assert len(written) == request.options.max_new_tokens
        merged = self.merged_logits(ids, request)
        for row, other, token, logprob in zip(cold, merged, written, request.logprobs, strict=False):
            self.outcome.tokens += 1
            likeliest = int(row.argmax())
            if token != likeliest or token != int(other.argmax()):
                is_near = row[likeliest] - row[token] < NEAR and other.max() - other[token] < NEAR
                self.outcome.near, self.outcome.wrong = self.outcome.near + is_near, self.outcome.wrong + (not is_near)
            self.outcome.drift = max(self.outcome.drift, abs(logprob - log_probability(row, token)))
            self.outcome.merged_drift = max(self.outcome.merged_drift, abs(logprob - log_probability(other, token)))

    def merged_logits(self, ids, request):
        """Of the model that the adapter is merged into, from the end of the prompt on."""
        if not hasattr(self, "_merged"):
            self._merged = Merged(self.base)
        return self._merged.logits(ids, request.adapter, len(request.prompt) - 1)

    def is_near(self, row):
        second, first = np.sort(row)[-2:]
        return first - second < NEAR


def log_probability(row, token):
    return row[token] - row.max() - np.log(np.exp(row - row.max()).sum())


class RealSchedule(Schedule):
    """One of the default base: compared with cold readings alone."""

    adapters, b_size = 8, 0.02

    def merged_logits(self, ids, request):
        return self.session.logits(ids, request.adapter)[len(request.prompt) - 1 :].astype(np.float64)


class WholeNumberSchedule(Schedule):
    """One where prompts and answers are multiplied in whole numbers."""

    def check(self, request):
        self.outcome.requests += 1
        self.outcome.tokens += len(request.written)
        engine, written, logprobs = Engine(self.session, is_interactive=False), [], []
        engine.add(request.prompt, request.options, request.adapter)
        while not engine.is_idle:
            for token in engine.step():
                if token.id is not None:
                    written.append(token.id)
                    logprobs.append(token.logprobs.chosen)
        count = len(request.written)
        is_whole = request.finish == "cancelled" or count == len(written)
        self.outcome.wrong += not is_whole or request.written != written[:count]
        for found, alone in zip(request.logprobs, logprobs, strict=False):
            self.outcome.drift = max(self.outcome.drift, abs(found - alone))


def random_schedules(count, seed=0, each=40):
    """Schedules of some requests each, with and without a prefix cache."""
    base = open_base(TINY)
    return _line("requests in random schedules", Schedule, TorchSession(base, "fp32", "dense"), base, count, seed, each)


def real_schedules(count, seed=0):
    """The same on the default base, whose blocks are decoded in float32."""
    base = open_base(default_base())
    return _line("requests in random schedules, default base", RealSchedule, TorchSession(base), base, count, seed, 20)


def whole_number_schedules(count, seed=0, each=40, cache_type="float"):
    """The same where activations are rounded to eight bits, and keys and values too, if `cache_type` is int8."""
    base = open_base(TINY.with_name("llama_q8_0.gguf"))
    session = TorchSession(base, "fp32", "file", decode="int8", cache_type=cache_type)
    what = "requests in whole numbers" + (", keys and values too" if cache_type == "int8" else "")
    return _line(what, WholeNumberSchedule, session, base, count, seed, each)


def _line(what, kind, session, base, count, seed, each):
    """Run schedules of a kind until there were so many requests."""
    began, outcomes = time.perf_counter(), []
    for number in range(-(-count // each)):
        schedule = kind(session, base, (seed, number), keeps_prefixes=number % 4 != 3)
        outcomes.append(schedule.run(min(each, count - number * each)))
    names = ("requests", "tokens", "near", "wrong", "cached")
    sums = {name: sum(getattr(one, name) for one in outcomes) for name in names}
    drift, merged = max(one.drift for one in outcomes), max(one.merged_drift for one in outcomes)
    against = {
        Schedule: f"{drift:.0e} of a cold reading and {merged:.0e} of the merged model",
        RealSchedule: f"{drift:.0e} of a cold reading", WholeNumberSchedule: f"{drift:.0e} of the request alone",
    }  # fmt: skip
    note = (
        f"{sums['tokens']:,} tokens, {sums['near']} where two were as good as equal, log-probabilities within "
        f"{against[kind]}, {sums['cached']:,} tokens of prompts from the cache"
    )
    wrong = sums["wrong"] + (drift > NEAR) + (merged > NEAR) + (sums["near"] > MOST_NEAR * max(1000, sums["tokens"]))
    return Line(what, sums["requests"], int(wrong), time.perf_counter() - began, note)
