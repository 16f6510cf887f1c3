"""What a server counts, under the names of vLLM, so that dashboards and routers made for it read this one too."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_GAPS = (0.002, 0.005, 0.01, 0.02, 0.04, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Now(NamedTuple):
    """What goes on in a server at a moment."""

    running: int  # answers that are written
    waiting: int  # requests that have not begun
    cache_share: float  # of the key-value cache that is taken, 0 to 1
    running_adapters: tuple[str, ...]
    waiting_adapters: tuple[str, ...]
    most_adapters: int  # that a step can have
    adapters: int  # that are served
    adapter_bytes: int  # of those in memory that are kept for later requests
    most_adapter_bytes: int  # that these may take
    adapter_loads: int  # reads of adapters from their files
    adapter_evictions: int  # adapters that had to make room for others
    cache_bytes: int  # of keys and values
    kept_bytes: int  # of those that no request has, and that are kept for later ones
    most_kept_bytes: int  # that these may take
    evicted_tokens: int  # whose keys and values were kept, and had to make room


class Metrics:
    """Counters of one server.

    Args:
        base: Name of the base, which every figure carries.
        now: What goes on, asked when the figures are read.
    """

    def __init__(self, base: str, now: Callable[[], Now]) -> None:
        self._registry = CollectorRegistry()
        self._base = base

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"vllm:{name}", help, ["model_name", *labels], registry=self._registry)

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"vllm:{name}", help, ["model_name"], buckets=buckets, registry=self._registry)
            return made.labels(base)

        self._finished = counter("request_success", "Answers by how they ended.", "finished_reason")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.").labels(base)
        self._written = counter("generation_tokens", "Tokens of answers.").labels(base)
        self._queries = counter("prefix_cache_queries", "Tokens of prompts looked up in the prefix cache.").labels(base)
        self._hits = counter("prefix_cache_hits", "Tokens of prompts found in it.").labels(base)
        self._cached = counter("prompt_tokens_cached", "Tokens of prompts that were not read again.").labels(base)
        self._first = histogram("time_to_first_token_seconds", "From a request to its first token.", _SECONDS)
        self._gap = histogram("inter_token_latency_seconds", "Between tokens of an answer.", _GAPS)
        self._queue = histogram("request_queue_time_seconds", "From a request to when its prompt is begun.", _SECONDS)
        self._prefill = histogram("request_prefill_time_seconds", "From there to the first token.", _SECONDS)
        self._decode = histogram("request_decode_time_seconds", "From the first token to the last.", _SECONDS)
        self._inference = histogram("request_inference_time_seconds", "Prefill and decode.", _SECONDS)
        self._whole = histogram("e2e_request_latency_seconds", "From a request to its end.", _SECONDS)
        self._prompts = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._answers = histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self._registry.register(_Moment(base, now))

    def note_first(self, seconds: float, prefill: float) -> None:
        """Count a first token: how long after the request it came, and how long of that the prompt was read."""
        self._first.observe(seconds)
        self._queue.observe(seconds - prefill)
        self._prefill.observe(prefill)

    def note_gap(self, seconds: float) -> None:
        """Count a further token: how long after the one before."""
        self._gap.observe(seconds)

    def note_phases(self, prefill: float, decode: float) -> None:
        """Count an answer that had at least one token and is over: how long prompt and answer took."""
        self._decode.observe(decode)
        self._inference.observe(prefill + decode)

    def note_prompt(self, tokens: int, cached: int) -> None:
        """Count a prompt, and its tokens that an earlier one had read."""
        self._prompt.inc(tokens)
        self._prompts.observe(tokens)
        self._queries.inc(tokens)
        self._hits.inc(cached)
        self._cached.inc(cached)

    def note_answer(self, tokens: int, finish: str) -> None:
        """Count an answer that ended: `stop`, `length`, `tool_calls` or `abort`."""
        self._written.inc(tokens)
        self._answers.observe(tokens)
        self._finished.labels(self._base, finish).inc()

    def note_request(self, seconds: float) -> None:
        """Count a request that is over."""
        self._whole.observe(seconds)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)


class _Moment(Collector):
    """Figures of the moment in which they are asked for."""

    def __init__(self, base: str, now: Callable[[], Now]) -> None:
        self._base, self._now = base, now

    def collect(self) -> Iterator[Metric]:
        """Give the figures."""
        now = self._now()
        yield self._gauge("num_requests_running", "Answers that are written.", now.running)
        yield self._gauge("num_requests_waiting", "Requests that wait.", now.waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the key-value cache that is taken.", now.cache_share)
        told = {
            "max_lora": str(now.most_adapters),
            "running_lora_adapters": ",".join(now.running_adapters),
            "waiting_lora_adapters": ",".join(now.waiting_adapters),
        }
        yield self._gauge("lora_requests_info", "Adapters in use, told at this time.", time.time(), told)
        yield self._own(GaugeMetricFamily, "adapters", "Adapters that are served.", now.adapters)
        yield self._own(GaugeMetricFamily, "adapter_resident_bytes", "Memory of adapters kept.", now.adapter_bytes)
        most = "What these may take."
        yield self._own(GaugeMetricFamily, "adapter_resident_max_bytes", most, now.most_adapter_bytes)
        yield self._own(CounterMetricFamily, "adapter_loads", "Adapters read from files.", now.adapter_loads)
        yield self._own(CounterMetricFamily, "adapter_evictions", "Adapters that made room.", now.adapter_evictions)
        yield self._own(GaugeMetricFamily, "kv_cache_bytes", "Memory of keys and values.", now.cache_bytes)
        kept = "Memory of keys and values kept for later requests."
        yield self._own(GaugeMetricFamily, "prefix_cache_bytes", kept, now.kept_bytes)
        yield self._own(GaugeMetricFamily, "prefix_cache_max_bytes", most, now.most_kept_bytes)
        evicted = "Tokens that were kept and made room."
        yield self._own(CounterMetricFamily, "prefix_cache_evicted_tokens", evicted, now.evicted_tokens)

    def _own(self, kind: type[GaugeMetricFamily | CounterMetricFamily], name: str, help: str, value: float) -> Metric:
        """A figure that vLLM does not have."""
        family = kind(f"thimble:{name}", help, labels=["model_name"])
        family.add_metric([self._base], value)
        return family

    def _gauge(self, name: str, help: str, value: float, labels: Mapping[str, str] | None = None) -> GaugeMetricFamily:
        labels = {"model_name": self._base} if labels is None else labels
        family = GaugeMetricFamily(f"vllm:{name}", help, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family
