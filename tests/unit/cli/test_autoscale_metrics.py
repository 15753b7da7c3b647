"""The metrics of ``forebay autoscale``."""

from __future__ import annotations

import math

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.support.metric_conventions import problems

from forebay.cli.autoscale_metrics import render_metrics
from forebay.scale import AutoscalerStatistics

TARGET = 'kubernetes:"a\\b"\n'


def samples(statistics: AutoscalerStatistics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return what Prometheus reads: values by name and labels."""
    families = text_string_to_metric_families(render_metrics(TARGET, statistics))
    found = {}
    for family in families:
        assert family.documentation
        assert family.type in ("gauge", "counter")
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("target") == TARGET
            found[sample.name, frozenset(labels.items())] = sample.value
    return found


def test_prometheus_reads_what_it_has_read_and_decided() -> None:
    statistics = AutoscalerStatistics(
        current=4, desired=5, ready=3, wanted=9, asked=12.5, load=math.inf, limited_by='upstream:"x"',
        scaled_up=4, scaled_down=2, failures=1, replica_seconds=1e9 + 0.5, unbought_seconds=60.0,
    )  # fmt: skip
    none: frozenset[tuple[str, str]] = frozenset()
    assert samples(statistics) == {
        ("forebay_autoscaler_leads", none): 1.0,
        ("forebay_desired_replicas", none): 5.0,
        ("forebay_wanted_replicas", none): 9.0,
        ("forebay_ready_replicas", none): 3.0,
        ("forebay_slots_asked", none): 12.5,
        ("forebay_slots_load_ratio", none): math.inf,
        ("forebay_replicas_limited", frozenset({("limited_by", 'upstream:"x"')})): 1.0,
        ("forebay_scalings_total", frozenset({("direction", "up")})): 4.0,
        ("forebay_scalings_total", frozenset({("direction", "down")})): 2.0,
        ("forebay_scaling_failures_total", none): 1.0,
        ("forebay_replica_seconds_total", none): 1e9 + 0.5,
        ("forebay_unbought_replica_seconds_total", none): 60.0,
    }


def test_the_names_follow_the_conventions_of_prometheus() -> None:
    page = render_metrics(TARGET, AutoscalerStatistics(limited_by="host"))
    assert problems(page) == []


def test_nothing_is_limited_by_nothing() -> None:
    assert not [name for name, _ in samples(AutoscalerStatistics()) if name == "forebay_replicas_limited"]


@pytest.mark.parametrize("leads", [True, False])
def test_readings_are_those_of_the_one_that_leads(*, leads: bool) -> None:
    found = samples(AutoscalerStatistics(current=5, leads=leads))
    assert found["forebay_autoscaler_leads", frozenset()] == leads
    assert (("forebay_desired_replicas", frozenset()) in found) is leads
    assert ("forebay_replica_seconds_total", frozenset()) in found
