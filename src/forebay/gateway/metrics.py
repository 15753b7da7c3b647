"""Metrics of the gateway, for Prometheus."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from forebay.gateway.targets import Target
from forebay.interfaces import Outcome
from forebay.upstream.providers import Usage
from forebay.upstream.upstream_statistics import AccountStatistics

_SECONDS: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_OUTCOMES: Final = {
    Outcome.SUCCESS: "succeeded",
    Outcome.OVERLOAD: "throttled",
    Outcome.FAULT: "failed",
    Outcome.IGNORED: "ignored",
}
_MAX_MODELS: Final = 200  # label values; later models count as "other", since callers choose the names


class GatewayMetrics:
    """The counters of one gateway, and gauges that are read from its upstreams at each scrape.

    Args:
        targets: of the gateway.
        max_accounts: accounts of a target that have gauges of their own: the busiest ones.
    """

    def __init__(self, targets: Sequence[Target], *, max_accounts: int) -> None:
        self._registry = CollectorRegistry()
        self._models: set[str] = set()
        self._counters: dict[tuple[object, ...], Counter] = {}
        self._tokens = Counter(
            "forebay_tokens", "LLM tokens used.", ["target", "model", "direction"], registry=self._registry
        )
        self._responses = Counter(
            "forebay_gateway_requests", "Responses given, by status.", ["target", "status"], registry=self._registry
        )
        self._rejections = Counter(
            "forebay_gateway_rejections",
            "Calls rejected, by the limit that rejected them.",
            ["target", "limited_by"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "forebay_gateway_seconds",
            "Seconds from a request to the end of its response, waiting included.",
            ["target"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._attempts = Counter(
            "forebay_attempts", "Attempts of calls, by outcome.", ["target", "outcome"], registry=self._registry
        )
        self._accounts = _AccountCollector(targets, max_accounts)
        self._registry.register(self._accounts)

    def show_accounts(self, most: int) -> None:
        """Give so many accounts of a target gauges of their own from now on: the busiest ones."""
        self._accounts.max_accounts = most

    def count_tokens(self, target: str, model: str, usage: Usage) -> None:
        """Count the tokens of a call."""
        if model not in self._models:
            model = model if len(self._models) < _MAX_MODELS else "other"
            self._models.add(model)
        self._counter(self._tokens, target, model, "input").inc(usage.input_tokens)
        self._counter(self._tokens, target, model, "output").inc(usage.output_tokens)

    def count_attempt(self, target: str, outcome: Outcome) -> None:
        """Count an attempt of a call that has ended."""
        self._counter(self._attempts, target, _OUTCOMES[outcome]).inc()

    def count_response(self, target: str, status: int, seconds: float) -> None:
        """Count a response that has ended, `seconds` after its request."""
        self._counter(self._responses, target, str(status)).inc()
        self._seconds.labels(target).observe(seconds)

    def count_rejection(self, target: str, limited_by: str) -> None:
        """Count a call that was rejected here, by the limit that rejected it."""
        self._counter(self._rejections, target, limited_by).inc()

    def render(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def _counter(self, parent: Counter, *labels: str) -> Counter:
        """Return the counter with these labels, from a cache: prometheus_client looks it up more slowly."""
        key = (parent, *labels)
        found = self._counters.get(key)
        if found is None:
            found = self._counters[key] = parent.labels(*labels)
        return found


class _AccountCollector(Collector):
    """A collector that reads the accounts of all targets at each scrape.

    Accounts come and go with the callers' API keys and models, so they have gauges only, and not all of them: what is
    counted is counted by target.

    Args:
        targets: of the gateway.
        max_accounts: accounts of a target that have gauges of their own.
    """

    def __init__(self, targets: Sequence[Target], max_accounts: int) -> None:
        self._targets = targets
        self.max_accounts = max_accounts

    def collect(self) -> Iterable[Metric]:
        """See `Collector`."""
        labels = ["target", "account"]
        gauges = {
            "in_flight": GaugeMetricFamily("forebay_calls_in_flight", "Calls in flight.", labels=labels),
            "limit": GaugeMetricFamily("forebay_calls_limit", "Calls that may be in flight.", labels=labels),
            "queued": GaugeMetricFamily("forebay_calls_queued", "Calls in the queue.", labels=labels),
            "load": GaugeMetricFamily(
                "forebay_account_load", "Expected wait of the next call over the longest allowed.", labels=labels
            ),
        }
        breakers = GaugeMetricFamily("forebay_breaker_open", "1 while a circuit breaker is not closed.", labels=labels)
        spent = GaugeMetricFamily("forebay_spent_usd", "US dollars spent in this period.", labels=["target"])
        accounts = GaugeMetricFamily("forebay_accounts", "Accounts in memory, by API key and model.", labels=["target"])
        remaining = GaugeMetricFamily("forebay_quota_remaining", "What remains of a quota.", labels=[*labels, "quota"])
        amount = GaugeMetricFamily("forebay_quota_amount", "The amount of a quota.", labels=[*labels, "quota"])
        for target in self._targets:
            statistics = target.upstream.statistics()
            if statistics.spent_usd is not None:
                spent.add_metric([target.name], statistics.spent_usd)
            accounts.add_metric([target.name], len(statistics.accounts))
            for account in heapq.nlargest(self.max_accounts, statistics.accounts, key=_activity):
                values = [target.name, account.name]
                for name, gauge in gauges.items():
                    gauge.add_metric(values, getattr(account, name))
                breakers.add_metric(values, account.breaker != "closed")
                for quota in account.quotas:
                    remaining.add_metric([*values, quota.name], quota.remaining)
                    amount.add_metric([*values, quota.name], quota.amount)
        return [*gauges.values(), breakers, spent, accounts, remaining, amount]


def _activity(account: AccountStatistics) -> tuple[int, bool, float, int]:
    """Return the order in which accounts matter to whoever watches: calls now, an open breaker, load, calls so far."""
    return account.in_flight + account.queued, account.breaker != "closed", account.load, account.sent
