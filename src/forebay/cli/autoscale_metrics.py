"""The metrics of ``forebay autoscale``, in Prometheus's text format."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Final

from forebay.scale import AutoscalerStatistics

_ESCAPES: Final = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def render_metrics(target: str, statistics: AutoscalerStatistics) -> str:
    """Return what an autoscaler of a target has read and decided.

    Readings are left out while another autoscaler leads: they would be older than its own.
    """
    return "".join(_lines(f'target="{_escaped(target)}"', statistics))


def _lines(target: str, seen: AutoscalerStatistics) -> Iterator[str]:
    yield from _metric("forebay_autoscaler_leads", "gauge", "1 if it acts, else 0.", {target: seen.leads})
    if seen.leads:
        gauges = {
            "forebay_desired_replicas": ("Replicas that it decided for.", seen.desired),
            "forebay_wanted_replicas": ("Replicas that the load needs, whatever is short.", seen.wanted),
            "forebay_ready_replicas": ("Replicas that take tasks.", seen.ready),
            "forebay_slots_asked": ("Slots that tasks ask for.", seen.asked),
            "forebay_slots_load_ratio": ("Slots that tasks ask for over those of the replicas.", seen.load),
        }
        for name, (text, value) in gauges.items():
            yield from _metric(name, "gauge", text, {target: value})
        short = {} if seen.limited_by is None else {f'{target},limited_by="{_escaped(seen.limited_by)}"': 1}
        yield from _metric("forebay_replicas_limited", "gauge", "1 for what is short instead of workers.", short)
    scaled = {f'{target},direction="up"': seen.scaled_up, f'{target},direction="down"': seen.scaled_down}
    yield from _metric("forebay_scalings_total", "counter", "Changes of the number of replicas.", scaled)
    counters = {
        "forebay_scaling_failures_total": ("Readings and calls of the target that failed.", seen.failures),
        "forebay_replica_seconds_total": ("Replicas over time.", seen.replica_seconds),
        "forebay_unbought_replica_seconds_total": (
            "Replicas not added, over time.",
            seen.unbought_seconds,
        ),
    }
    for name, (text, value) in counters.items():
        yield from _metric(name, "counter", text, {target: value})


def _metric(name: str, kind: str, text: str, samples: Mapping[str, float]) -> Iterator[str]:
    yield f"# HELP {name} {text}\n# TYPE {name} {kind}\n"
    for labels, value in samples.items():
        yield f"{name}{{{labels}}} {'+Inf' if math.isinf(value) else format(float(value), '.15g')}\n"


def _escaped(text: str) -> str:
    return text.translate(_ESCAPES)
