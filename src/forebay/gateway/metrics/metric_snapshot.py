"""The metrics of one process as plain data, so that those of all workers of a gateway can be added up. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, TypeAlias

import msgspec
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from forebay.gateway.metrics import metric_definitions as definitions

_Labels: TypeAlias = tuple[tuple[str, str], ...]
_BREAKER_STATES: Final = ("open", "half_open", "closed")  # the first that any worker has is that of all
_MERGE: Final[Mapping[definitions.Across, Callable[[Sequence[float]], float]]] = {
    "sum": sum,
    "highest": max,
    "lowest": min,
    "worst state": max,
}
_ACROSS: Final = {metric.name.removesuffix("_total"): metric.across for metric in definitions.METRICS}


class SampleSnapshot(msgspec.Struct, frozen=True, array_like=True):
    """One sample.

    Attributes:
        name: with its suffix, such as ``_bucket``.
        labels: by name.
        value: of the sample.
    """

    name: str
    labels: dict[str, str]
    value: float


class FamilySnapshot(msgspec.Struct, frozen=True, array_like=True):
    """One metric with all its samples.

    Attributes:
        name: without ``_total``.
        kind: its type.
        text: its HELP.
        samples: those of one series of a histogram follow each other.
    """

    name: str
    kind: str
    text: str
    samples: list[SampleSnapshot]


class MetricSnapshot(msgspec.Struct, frozen=True, array_like=True):
    """The metrics of a process at one moment.

    Attributes:
        families: by which they are encoded, in the order of the page.
    """

    families: list[FamilySnapshot] = []

    def counted(self) -> MetricSnapshot:
        """Return only what never goes back: counters and histograms."""
        return MetricSnapshot([family for family in self.families if family.kind != "gauge"])


def take_snapshot(source: Collector) -> MetricSnapshot:
    """Return the metrics of a collector or a registry as they are now."""
    return MetricSnapshot(
        [
            FamilySnapshot(
                family.name,
                family.type,
                family.documentation,
                [SampleSnapshot(each.name, dict(each.labels), each.value) for each in family.samples],
            )
            for family in source.collect()
        ]
    )


def merge_snapshots(snapshots: Sequence[MetricSnapshot]) -> MetricSnapshot:
    """Return the metrics of several processes as those of one, by the `across` of their definitions."""
    families: dict[str, FamilySnapshot] = {}
    values: dict[str, dict[tuple[str, _Labels], list[float]]] = {}
    for snapshot in snapshots:
        for family in snapshot.families:
            families.setdefault(family.name, family)
            series = values.setdefault(family.name, {})
            for sample in family.samples:
                series.setdefault((sample.name, tuple(sample.labels.items())), []).append(sample.value)
    return MetricSnapshot(
        [
            msgspec.structs.replace(family, samples=_merge_samples(family, values[name]))
            for name, family in families.items()
        ]
    )


def _merge_samples(family: FamilySnapshot, series: dict[tuple[str, _Labels], list[float]]) -> list[SampleSnapshot]:
    across = _ACROSS.get(family.name, "sum")
    merge = _MERGE[across]
    samples = [SampleSnapshot(name, dict(labels), merge(found)) for (name, labels), found in series.items()]
    return _only_worst_states(samples) if across == "worst state" else samples


def _only_worst_states(samples: Sequence[SampleSnapshot]) -> list[SampleSnapshot]:
    """Return samples of states with 1 for one state of each account: the worst that any worker has."""
    worst: dict[_Labels, str] = {}
    for state in _BREAKER_STATES:
        for sample in samples:
            if sample.labels.get("state") == state and sample.value:
                worst.setdefault(_without_state(sample), state)
    return [
        msgspec.structs.replace(sample, value=float(worst.get(_without_state(sample)) == sample.labels.get("state")))
        for sample in samples
    ]


def _without_state(sample: SampleSnapshot) -> _Labels:
    return tuple((name, value) for name, value in sample.labels.items() if name != "state")


class SnapshotCollector(Collector):
    """A collector of the metrics of a snapshot, to encode them.

    Args:
        snapshot: of the metrics.
    """

    def __init__(self, snapshot: MetricSnapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        """See `Collector`."""
        for family in self._snapshot.families:
            metric = Metric(family.name, family.text, family.kind)
            metric.samples = [Sample(each.name, each.labels, each.value) for each in family.samples]
            yield metric
