"""The gauges of a gateway's accounts and budgets, read at each scrape."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from forebay.breaker import BreakerState
from forebay.gateway.metrics import metric_definitions as definitions
from forebay.gateway.metrics.metric_definitions import MetricDefinition
from forebay.gateway.targets.targets import Target
from forebay.quota import QuotaLevel
from forebay.upstream.upstream_statistics import AccountStatistics

_Families: TypeAlias = dict[MetricDefinition, GaugeMetricFamily | CounterMetricFamily]

_BY_ACCOUNT: Final = {
    definitions.IN_FLIGHT: "in_flight",
    definitions.LIMIT: "limit",
    definitions.QUEUED: "queued",
    definitions.LOAD: "load",
}
_COLLECTED: Final = (
    *_BY_ACCOUNT,
    *(definitions.BREAKER, definitions.QUOTA_REQUESTS_REMAINING, definitions.QUOTA_REQUESTS_LIMIT),
    *(definitions.QUOTA_TOKENS_REMAINING, definitions.QUOTA_TOKENS_LIMIT, definitions.ACCOUNTS, definitions.UNPRICED),
    *(definitions.BUDGET_LIMIT, definitions.BUDGET_SPENT, definitions.BUDGET_RESERVED, definitions.BUDGET_USED),
)
_BREAKER_STATES: Final = tuple(state.value for state in BreakerState)


class AccountCollector(Collector):
    """A collector that reads the accounts and budgets of all targets at each scrape.

    Accounts come and go with the callers' API keys and models, so they have gauges only, and not all of them: what is
    counted is counted by target.

    Args:
        targets: of the gateway.
        max_accounts: accounts of a target that have gauges of their own: the busiest ones.
    """

    def __init__(self, targets: Sequence[Target], max_accounts: int) -> None:
        self._targets = targets
        self.max_accounts = max_accounts

    def collect(self) -> Iterable[Metric]:
        """See `Collector`."""
        families = {definition: _new_family(definition) for definition in _COLLECTED}
        for target in self._targets:
            statistics = target.upstream.statistics()
            families[definitions.ACCOUNTS].add_metric([target.name], len(statistics.accounts))
            families[definitions.UNPRICED].add_metric([target.name], statistics.unpriced)
            _add_budget(families, target, statistics.spent_usd)
            for account in heapq.nlargest(self.max_accounts, statistics.accounts, key=_activity):
                _add_account(families, [target.name, account.name], account)
        return families.values()


def _new_family(definition: MetricDefinition) -> GaugeMetricFamily | CounterMetricFamily:
    kind = CounterMetricFamily if definition.kind == "counter" else GaugeMetricFamily
    return kind(definition.name, definition.text, labels=definition.labels)


def _add_budget(families: _Families, target: Target, spent: float | None) -> None:
    """Add the gauges of a budget; those of what is spent only if that is known."""
    budget = target.upstream.core.budgets.upstream_budget
    if budget is None:
        return
    values = {definitions.BUDGET_LIMIT: budget.usd, definitions.BUDGET_RESERVED: budget.reserved()[1]}
    if spent is not None:
        values |= {definitions.BUDGET_SPENT: spent, definitions.BUDGET_USED: spent / budget.usd}
    for definition, value in values.items():
        families[definition].add_metric([target.name], value)


def _add_account(families: _Families, labels: list[str], account: AccountStatistics) -> None:
    for definition, name in _BY_ACCOUNT.items():
        families[definition].add_metric(labels, getattr(account, name))
    for state in _BREAKER_STATES:
        families[definitions.BREAKER].add_metric([*labels, state], account.breaker == state)
    for (name, source), quota in _fullest_quotas(account.quotas).items():
        remaining, limit = _quota_metrics(quota)
        families[remaining].add_metric([*labels, name, source], quota.remaining)
        families[limit].add_metric([*labels, name, source], quota.amount)


def _fullest_quotas(quotas: Sequence[QuotaLevel]) -> dict[tuple[str, str], QuotaLevel]:
    """Return quotas by name and source; of two that have both in common the one that binds: series are unique."""
    found: dict[tuple[str, str], QuotaLevel] = {}
    for quota in quotas:
        series = quota.name, "learned" if quota.learned else "configured"
        if series not in found or quota.remaining < found[series].remaining:
            found[series] = quota
    return found


def _quota_metrics(quota: QuotaLevel) -> tuple[MetricDefinition, MetricDefinition]:
    """Return the metrics of what remains of a quota and of its amount, in its unit."""
    if quota.name.startswith("requests"):
        return definitions.QUOTA_REQUESTS_REMAINING, definitions.QUOTA_REQUESTS_LIMIT
    return definitions.QUOTA_TOKENS_REMAINING, definitions.QUOTA_TOKENS_LIMIT


def _activity(account: AccountStatistics) -> tuple[int, bool, float, int]:
    """Return the order in which accounts matter to whoever watches: calls now, an open breaker, load, calls so far."""
    return account.in_flight + account.queued, account.breaker != "closed", account.load, account.sent
