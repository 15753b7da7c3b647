"""The conventions of metric names, checked on a page as Prometheus reads it.

Sources: Prometheus, "Metric and label naming"; the checks of ``promtool check metrics``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_NAMESPACES = ("forebay_", "gen_ai_")
_BASE_UNITS = ("seconds", "bytes", "ratio", "usd")
_OTHER_UNITS = frozenset(
    {
        *("s", "ms", "us", "ns", "sec", "secs", "milliseconds", "microseconds", "minutes", "hours", "days"),
        *("b", "kb", "mb", "gb", "kilobytes", "megabytes", "kib", "mib", "pct", "percent", "percentage"),
        *("dollars", "cents"),
    }
)
_TYPES = frozenset({"counter", "gauge", "histogram", "summary"})
_SUFFIXES_OF_TYPES = ("_count", "_sum", "_bucket", "_total")


def problems(page: str) -> list[str]:
    """Return what is wrong with the names on a page."""
    families = list(text_string_to_metric_families(page))
    return [f"{family.name}: {problem}" for family in families for problem in _problems(family)]


def _problems(family: Metric) -> Iterator[str]:
    words = family.name.split("_")
    if not _NAME.fullmatch(family.name):
        yield "is not snake_case"
    if not family.name.startswith(_NAMESPACES):
        yield f"begins with none of {_NAMESPACES}"
    if not family.documentation.endswith("."):
        yield "has no sentence as its HELP"
    if family.type not in ("counter", "gauge", "histogram"):
        yield f"has the type {family.type}"
    if family.type == "counter" and not all(sample.name == family.name + "_total" for sample in family.samples):
        yield "is a counter whose name does not end in _total"
    if family.name.endswith(_SUFFIXES_OF_TYPES):
        yield f"ends in one of {_SUFFIXES_OF_TYPES}"
    if _TYPES.intersection(words):
        yield "has its type in its name"
    if _OTHER_UNITS.intersection(words):
        yield "has a unit that is no base unit"
    if set(_BASE_UNITS).intersection(words[:-1]):
        yield "has its unit before its end"
    yield from _label_problems(family)


def _label_problems(family: Metric) -> Iterator[str]:
    series = [(sample.name, frozenset(sample.labels.items())) for sample in family.samples]
    if len(set(series)) < len(series):
        yield "has a series twice"
    for label in {label for sample in family.samples for label in sample.labels} - {"le"}:
        if not _NAME.fullmatch(label):
            yield f"has a label that is not snake_case: {label}"
