"""What the gateway counts, and how Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from forebay.upstream.providers import Usage

if TYPE_CHECKING:
    from forebay.gateway.targets import Target

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_OUTCOMES = ("succeeded", "throttled", "failed")
_MODELS = 200  # by name; what comes after is counted as "other", for names come from callers


class GatewayMetrics:
    """Counters of one gateway; what is now (limits, lines, money) is read from the upstreams when it is asked for."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._registry = CollectorRegistry()
        self._models: set[str] = set()
        self._counters: dict[tuple[object, ...], Counter] = {}
        self._tokens = Counter(
            "forebay_tokens", "LLM tokens used.", ["target", "model", "direction"], registry=self._registry
        )
        self._answers = Counter(
            "forebay_gateway_requests", "Answers given, by status.", ["target", "status"], registry=self._registry
        )
        self._refusals = Counter(
            "forebay_gateway_rejections",
            "Calls rejected, by the limit that rejected them.",
            ["target", "limited_by"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "forebay_gateway_seconds",
            "Seconds from a request to the end of its answer, waiting included.",
            ["target"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_AccountCollector(targets))

    def count_tokens(self, target: str, model: str, usage: Usage) -> None:
        """A call has used so much."""
        if model not in self._models:
            model = model if len(self._models) < _MODELS else "other"
            self._models.add(model)
        self._counter(self._tokens, target, model, "input").inc(usage.input_tokens)
        self._counter(self._tokens, target, model, "output").inc(usage.output_tokens)

    def count_response(self, target: str, status: int, seconds: float) -> None:
        """An answer has ended."""
        self._counter(self._answers, target, str(status)).inc()
        self._seconds.labels(target).observe(seconds)

    def _counter(self, of: Counter, *labels: str) -> Counter:
        """One of its counters; finding it among its siblings takes longer than counting."""
        where = (of, *labels)
        found = self._counters.get(where)
        if found is None:
            found = self._counters[where] = of.labels(*labels)
        return found

    def count_rejection(self, target: str, limited_by: str) -> None:
        """A call was refused by what binds."""
        self._counter(self._refusals, target, limited_by).inc()

    def render(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self._registry)


class _AccountCollector(Collector):
    """What the accounts are at the moment."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = targets

    def collect(self) -> Iterable[Metric]:
        """See `Collector`."""
        labels = ["target", "account"]
        gauges = {
            "in_flight": GaugeMetricFamily("forebay_calls_in_flight", "Calls under way.", labels=labels),
            "limit": GaugeMetricFamily("forebay_calls_limit", "Calls that may be under way.", labels=labels),
            "queued": GaugeMetricFamily("forebay_calls_queued", "Calls in the queue.", labels=labels),
            "load": GaugeMetricFamily(
                "forebay_account_load", "Expected wait of the next call over the longest allowed.", labels=labels
            ),
        }
        broken = GaugeMetricFamily("forebay_breaker_open", "1 while a breaker is not closed.", labels=labels)
        spent = GaugeMetricFamily("forebay_spent_usd", "US dollars spent in this period.", labels=["target"])
        attempts = CounterMetricFamily(
            "forebay_attempts", "Attempts at calls, by what became of them.", labels=[*labels, "outcome"]
        )
        left = GaugeMetricFamily("forebay_quota_left", "What a quota has left.", labels=[*labels, "quota"])
        amount = GaugeMetricFamily("forebay_quota_amount", "What it grants.", labels=[*labels, "quota"])
        for target in self._targets:
            now = target.upstream.statistics()
            if now.spent_usd is not None:
                spent.add_metric([target.name], now.spent_usd)
            for account in now.accounts:
                where = [target.name, account.name]
                for name, gauge in gauges.items():
                    gauge.add_metric(where, getattr(account, name))
                broken.add_metric(where, account.breaker != "closed")
                for outcome in _OUTCOMES:
                    attempts.add_metric([*where, outcome], getattr(account, outcome))
                for quota in account.quotas:
                    left.add_metric([*where, quota.name], quota.remaining)
                    amount.add_metric([*where, quota.name], quota.amount)
        return self._all(*gauges.values(), broken, spent, attempts, left, amount)

    @staticmethod
    def _all(*families: Metric) -> Iterator[Metric]:
        yield from families
