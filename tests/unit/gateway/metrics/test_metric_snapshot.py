"""Metrics of several workers as those of one process."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from forebay.gateway.metrics import metric_definitions as definitions
from forebay.gateway.metrics.metric_definitions import MetricDefinition
from forebay.gateway.metrics.metric_snapshot import MetricSnapshot, SnapshotCollector, merge_snapshots, take_snapshot

ACCOUNT = ("openai", "a")


def of_gauges(values: Mapping[MetricDefinition, Mapping[tuple[str, ...], float]]) -> MetricSnapshot:
    """Return the snapshot of a worker with these gauges."""
    registry = CollectorRegistry()
    for definition, series in values.items():
        gauge = Gauge(definition.name, definition.text, definition.labels, registry=registry)
        for labels, value in series.items():
            gauge.labels(*labels).set(value)
    return take_snapshot(registry)


def page(snapshot: MetricSnapshot) -> dict[tuple[str, ...], float]:
    """Return the values of an encoded page by name and values of labels, in the order of the labels."""
    registry = CollectorRegistry()
    registry.register(SnapshotCollector(snapshot))
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def worker_that_counted(calls: int, *durations: float) -> MetricSnapshot:
    registry = CollectorRegistry()
    counter = Counter("calls_total", "Calls.", ("status",), registry=registry)
    histogram = Histogram("seconds", "Seconds.", ("status",), buckets=(1.0, 2.0), registry=registry)
    counter.labels("200").inc(calls)
    for duration in durations:
        histogram.labels("200").observe(duration)
    return take_snapshot(registry)


def test_counters_and_histograms_are_summed() -> None:
    found = page(merge_snapshots([worker_that_counted(3, 0.5, 1.5), worker_that_counted(4, 1.5, 9.0)]))
    assert found == {
        ("calls_total", "200"): 7.0,
        ("seconds_bucket", "1.0", "200"): 1.0,
        ("seconds_bucket", "2.0", "200"): 3.0,
        ("seconds_bucket", "+Inf", "200"): 4.0,
        ("seconds_count", "200"): 4.0,
        ("seconds_sum", "200"): 12.5,
    }


def test_calls_in_flight_are_summed_and_the_limit_that_all_share_is_shown_once() -> None:
    workers = [
        of_gauges({definitions.IN_FLIGHT: {ACCOUNT: flying}, definitions.LIMIT: {ACCOUNT: 40.0}}) for flying in (3, 5)
    ]
    found = page(merge_snapshots(workers))
    assert found == {("forebay_calls_in_flight", "a", "openai"): 8.0, ("forebay_calls_limit", "a", "openai"): 40.0}


def test_of_a_shared_quota_the_least_remains_that_any_worker_knows() -> None:
    series = (*ACCOUNT, "requests", "configured")
    workers = [of_gauges({definitions.QUOTA_REQUESTS_REMAINING: {series: left}}) for left in (500.0, 120.0)]
    found = page(merge_snapshots(workers))
    assert found == {("forebay_quota_remaining_requests", "a", "requests", "configured", "openai"): 120.0}


def test_a_budget_has_spent_the_most_that_any_worker_knows() -> None:
    workers = [of_gauges({definitions.BUDGET_SPENT: {("openai",): usd}}) for usd in (2.0, 7.0, 0.0)]
    assert page(merge_snapshots(workers)) == {("forebay_budget_spent_usd", "openai"): 7.0}


def test_a_breaker_has_one_state_which_is_the_worst_of_any_worker() -> None:
    def worker(state: str) -> MetricSnapshot:
        series: dict[tuple[str, ...], float] = {
            (*ACCOUNT, each): float(each == state) for each in ("closed", "open", "half_open")
        }
        return of_gauges({definitions.BREAKER: series})

    found = page(merge_snapshots([worker("closed"), worker("half_open"), worker("closed")]))
    assert [labels[2] for labels, value in found.items() if value] == ["half_open"]
    found = page(merge_snapshots([worker("closed"), worker("half_open"), worker("open")]))
    assert [labels[2] for labels, value in found.items() if value] == ["open"]
    assert len(found) == 3


def test_only_counters_and_histograms_of_a_worker_that_has_died_count() -> None:
    died = MetricSnapshot(
        worker_that_counted(3).families + of_gauges({definitions.IN_FLIGHT: {ACCOUNT: 3.0}}).families
    ).counted()
    assert page(died) == {("calls_total", "200"): 3.0}
