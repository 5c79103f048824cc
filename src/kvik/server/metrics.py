"""Figures for Prometheus: kvik's own names, and vLLM's beside them where dashboards are made for those.

What the engine and the cache know is read when somebody asks; what takes time is counted as it happens.
"""

from __future__ import annotations

import re
from collections import Counter as Total
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from kvik.cache.cache import Cache
    from kvik.engine.engine import Engine
    from kvik.engine.job import Known
    from kvik.server.records import Record
    from kvik.server.tenants import Held, Tenants

_CREATED = re.compile(rb"(# \w+ )?[\w:]+_created[ {]")
_SECONDS = tuple(digit * 10.0**power for power in range(-3, 4) for digit in (1, 2, 5))
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
_HISTOGRAMS = {  # ours: (vLLM's, what it is, buckets)
    "first_token_seconds": ("time_to_first_token_seconds", "From arrival to the first token", _SECONDS),
    "between_tokens_seconds": ("inter_token_latency_seconds", "Between two updates of a request", _SECONDS),
    "request_seconds": ("e2e_request_latency_seconds", "From arrival to the last token", _SECONDS),
    "request_prompt_tokens": ("request_prompt_tokens", "Prompt tokens of a request", _TOKENS),
    "request_new_tokens": ("request_generation_tokens", "New tokens of a request", _TOKENS),
}


class Metrics:
    """A server's; of its event loop's thread.

    Args:
        name: the model's.
        tenants: labels.
        vllm: also under vLLM's names.
    """

    def __init__(self, engine: Engine, name: str, tenants: Tenants, *, vllm: bool) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_EngineFigures(engine, name, tenants, vllm))
        self._tenants = tenants
        labels, values = ("model_name", "engine"), (name, "0")
        self._histograms: dict[str, list[Histogram]] = {}
        for ours, (theirs, help, buckets) in _HISTOGRAMS.items():
            made = [Histogram(f"kvik_{ours}", help, buckets=buckets, registry=self._registry)]
            if vllm:
                both = Histogram(f"vllm:{theirs}", help, labels, buckets=buckets, registry=self._registry)
                made.append(both.labels(*values))
            self._histograms[ours] = made
        self._prompt, self._cached = (
            Counter(f"kvik_tenant_{which}_tokens", f"{what}, by key", ["tenant"], registry=self._registry)
            for which, what in (("prompt", "Prompt tokens"), ("cached_prompt", "Those that needed no computing"))
        )
        self._answers = Counter("kvik_answers", "Answers, by why they ended", ["reason"], registry=self._registry)
        self._refusals = Counter("kvik_refused_requests", "Refused, by what was full", ["why"], registry=self._registry)
        self._responses = Counter("kvik_responses", "HTTP responses", ["status"], registry=self._registry)
        self._vllm: Counter | None = None
        if vllm:
            self._vllm = Counter(
                "vllm:request_success", "Answers", [*labels, "finished_reason"], registry=self._registry
            )
        self._name = name

    def text(self) -> bytes:
        """In Prometheus' format. Waits for the engine to be between two steps."""
        lines = generate_latest(self._registry).splitlines(keepends=True)
        return b"".join(line for line in lines if not _CREATED.match(line))  # when each began: nobody reads it

    def known(self, record: Record, known: Known) -> None:
        """One of its prompts has begun."""
        tenant = self._tenants.number(record.tenant)
        self._prompt.labels(tenant).inc(known.tokens)
        self._cached.labels(tenant).inc(known.cached)

    def tokens(self, record: Record, new: int, seconds: float) -> None:
        """A request has so many new tokens, so many seconds after it arrived. Call before it is noted."""
        if record.first_s is None:
            self._observe("first_token_seconds", seconds)
        elif new and record.last_s is not None:
            self._observe("between_tokens_seconds", seconds - record.last_s)

    def ended(self, record: Record) -> None:
        """All its answers have ended by themselves."""
        self._observe("request_seconds", record.last_s or 0.0)
        self._observe("request_prompt_tokens", record.tokens)
        self._observe("request_new_tokens", record.new_tokens)

    def finished(self, reason: str) -> None:
        """An answer has ended."""
        self._answers.labels(reason).inc()
        if self._vllm is not None and reason in ("stop", "length"):
            self._vllm.labels(self._name, "0", reason).inc()

    def refused(self, why: str) -> None:
        """A request was refused, since something was full."""
        self._refusals.labels(why).inc()

    def responded(self, status: int) -> None:
        """A response began."""
        self._responses.labels(str(status)).inc()

    def _observe(self, name: str, value: float) -> None:
        for histogram in self._histograms[name]:
            histogram.observe(value)


class _EngineFigures(Collector):
    def __init__(self, engine: Engine, name: str, tenants: Tenants, vllm: bool) -> None:
        self._engine, self._name, self._tenants, self._both = engine, name, tenants, vllm

    def collect(self) -> Iterator[Metric]:
        engine, counts, cache = self._engine, self._engine.counts, self._engine.cache
        draft = engine.draft_cache
        books, held, mine, drafts = engine.asked(
            lambda: (
                cache.books,
                cache.arena.held,
                self._tenants.held(cache),
                0 if draft is None else draft.arena.held,
            )
        )
        pages = GaugeMetricFamily("kvik_cache_pages", "Pages, by what they are", labels=["state"])
        for state, count in (("free", books.free), ("in_use", books.in_use), ("kept", books.kept)):
            pages.add_metric([state], count)
        yield pages
        yield from self._of_tenants(mine, dict(counts.evicted))
        yield GaugeMetricFamily("kvik_cache_budget_bytes", "Bytes that the cache may hold", cache.budget)
        yield GaugeMetricFamily("kvik_cache_held_bytes", "Bytes that it holds", held)
        if draft is not None:
            yield GaugeMetricFamily(
                "kvik_draft_cache_budget_bytes", "Bytes that the draft's cache may hold", draft.budget
            )
            yield GaugeMetricFamily("kvik_draft_cache_held_bytes", "Bytes that it holds", drafts)
        yield GaugeMetricFamily("kvik_requests_running", "Requests that run", engine.running)
        yield GaugeMetricFamily("kvik_requests_waiting", "Requests that wait", engine.waiting)
        for name, help, count in (
            ("prompt_tokens", "Prompt tokens", counts.prompt_tokens),
            ("cached_prompt_tokens", "Prompt tokens that needed no computing", counts.cached_tokens),
            ("new_tokens", "New tokens", counts.new_tokens),
            ("guessed_tokens", "Tokens that were guessed", counts.guessed_tokens),
            ("accepted_tokens", "Guesses that were right", counts.accepted_tokens),
            ("steps", "Steps of the engine", counts.steps),
            ("preemptions", "Requests that had to give their rows back for a while", counts.preemptions),
            ("evicted_pages", "Pages dropped to make room", counts.evicted_pages),
            ("aborted_requests", "Requests that were aborted", counts.aborted),
        ):
            yield CounterMetricFamily(f"kvik_{name}", help, count)
        if self._both:
            yield from self._as_vllm(books.in_use / max(books.all, 1) * held / max(cache.budget, 1))

    def _of_tenants(self, mine: dict[str, Held], evicted: dict[str, int]) -> Iterable[Metric]:
        sizes = GaugeMetricFamily("kvik_tenant_bytes", "Bytes of pages, by key", labels=["tenant", "state"])
        for name, held in mine.items():
            sizes.add_metric([name, "in_use"], held.in_use)
            sizes.add_metric([name, "kept"], held.kept)
        yield sizes
        gone = Total[str]()
        for owner, count in evicted.items():
            gone[self._tenants.number(owner)] += count
        dropped = CounterMetricFamily("kvik_tenant_evicted_pages", "Pages dropped to make room", labels=["tenant"])
        for name, count in gone.items():
            dropped.add_metric([name], count)
        yield dropped
        if (quota := self._engine.cache.owners.quota) is not None:
            yield GaugeMetricFamily("kvik_tenant_quota_bytes", "Bytes that each key keeps", quota)

    def _as_vllm(self, usage: float) -> Iterable[Metric]:
        engine, counts = self._engine, self._engine.counts
        for name, value in (
            ("num_requests_running", engine.running),
            ("num_requests_waiting", engine.waiting),
            ("kv_cache_usage_perc", usage),
        ):
            yield _labelled(GaugeMetricFamily, name, self._name, value)
        for name, value in (
            ("prefix_cache_queries", counts.prompt_tokens),
            ("prefix_cache_hits", counts.cached_tokens),
            ("prompt_tokens", counts.prompt_tokens),
            ("prompt_tokens_cached", counts.cached_tokens),
            ("generation_tokens", counts.new_tokens),
            ("num_preemptions", counts.preemptions),
        ):
            yield _labelled(CounterMetricFamily, name, self._name, value)
        facts = {"block_size": str(engine.cache.spec.page_size), "cache_dtype": str(engine.cache.spec), "engine": "0"}
        yield InfoMetricFamily("vllm:cache_config", "The cache's settings", facts)


def _held(cache: Cache | None) -> int:
    return 0 if cache is None else cache.arena.held


def _labelled(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily], name: str, model: str, value: float
) -> GaugeMetricFamily | CounterMetricFamily:
    family = kind(f"vllm:{name}", "As vLLM has it", labels=["model_name", "engine"])
    family.add_metric([model, "0"], value)
    return family
