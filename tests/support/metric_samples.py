"""The metrics of a gateway, as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from forebay.gateway.server import Gateway


def samples(gateway: Gateway, name: str, **labels: str) -> Iterator[Sample]:
    """Yield the samples of this name whose labels have these values; other labels may have any."""
    for family in text_string_to_metric_families(gateway.forwarder.metrics.render().decode()):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                yield sample


def total(gateway: Gateway, name: str, **labels: str) -> float:
    """Return the sum of those samples; 0 if there is none."""
    return sum(sample.value for sample in samples(gateway, name, **labels))
