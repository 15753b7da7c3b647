"""The counters of what calls have used and cost, read from the upstreams at each scrape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, TypeAlias

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from forebay.call_usage import CallUsage
from forebay.gateway.metrics import metric_definitions as definitions
from forebay.gateway.metrics.bounded_label import BoundedLabel
from forebay.gateway.metrics.metric_definitions import MetricDefinition
from forebay.gateway.targets.targets import Target
from forebay.upstream.usage_table import UsageRow

_Labels: TypeAlias = tuple[str, ...]

_COLLECTED: Final = (definitions.SPEND, definitions.TOKENS)


class UsageCollector(Collector):
    """A collector that reads what calls have used, by tenant, model and keys, at each scrape.

    The labels of a row stay as they were when it was first seen, and no value ever goes back: a correction that lowers
    one, of a response made in the background, waits until as much has been added. Else it would look like a restart.

    Args:
        targets: of the gateway.
        models: the label of models.
        tenants: the label of tenants.
        keys: the label of issued keys.
        api_keys: the label of API keys.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        *,
        models: BoundedLabel,
        tenants: BoundedLabel,
        keys: BoundedLabel,
        api_keys: BoundedLabel,
    ) -> None:
        self._targets = targets
        self._models = models
        self._tenants = tenants
        self._keys = keys
        self._api_keys = api_keys
        self._labels: dict[_Labels, _Labels] = {}  # of rows that were seen
        self._highest: dict[tuple[str, _Labels], float] = {}  # values that were shown, by metric and labels

    def collect(self) -> Iterable[Metric]:
        """See `Collector`."""
        families = {
            metric: CounterMetricFamily(metric.name, metric.text, labels=metric.labels) for metric in _COLLECTED
        }
        for (metric, labels), value in self._sums().items():
            shown = max(value, self._highest.get((metric.name, labels), 0.0))
            self._highest[metric.name, labels] = shown
            families[metric].add_metric(labels, shown)
        return families.values()

    def _sums(self) -> dict[tuple[MetricDefinition, _Labels], float]:
        sums: dict[tuple[MetricDefinition, _Labels], float] = {}
        for target in self._targets:
            for row in target.upstream.core.recorder.table.rows():
                for metric, labels, value in _values(self._labels_of(target.name, row), row.usage):
                    sums[metric, labels] = sums.get((metric, labels), 0.0) + value
        return sums

    def _labels_of(self, target: str, row: UsageRow) -> _Labels:
        """Return target, model, tenant, key and API key of a row, as they were when it was first seen."""
        seen = target, row.model, row.tenant, row.key, row.api_key
        labels = self._labels.get(seen)
        if labels is None:
            shown = []
            bounded = (self._models, self._tenants, self._keys, self._api_keys)
            for label, value in zip(bounded, seen[1:], strict=True):
                label.admit(value)
                shown.append(label.label(value))
            labels = self._labels[seen] = (target, *shown)
        return labels


def _values(labels: _Labels, usage: CallUsage) -> Iterator[tuple[MetricDefinition, _Labels, float]]:
    """Yield the values of one row. Kinds of tokens that do not occur have no series."""
    yield definitions.SPEND, labels, usage.usd
    read, written, reasoning = usage.cached_input_tokens, usage.cache_write_tokens, usage.reasoning_tokens
    tokens = {
        ("input", "uncached"): usage.input_tokens - read - written,
        ("input", "cache_read"): read,
        ("input", "cache_write"): written,
        ("output", "answer"): usage.output_tokens - reasoning,
        ("output", "reasoning"): reasoning,
    }
    for kind, number in tokens.items():
        if number > 0:
            yield definitions.TOKENS, (*labels, *kind), float(number)
