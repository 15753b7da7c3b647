"""The counters of what calls have used and cost."""

from __future__ import annotations

from forebay.call_usage import CallUsage
from forebay.gateway import TargetSettings
from forebay.gateway.metrics.bounded_label import OTHER, BoundedLabel
from forebay.gateway.metrics.usage_collector import UsageCollector
from forebay.gateway.targets.targets import Target
from forebay.upstream.usage_table import UsageLabels


class Counters:
    """A collector of one target, and what its calls have used.

    Args:
        max_values: of each label.
    """

    def __init__(self, max_values: int = 10) -> None:
        target = Target(TargetSettings(name="openai", url="http://127.0.0.1"))
        labels = {name: BoundedLabel(max_values) for name in ("models", "tenants", "keys", "api_keys")}
        self._table = target.upstream.core.recorder.table
        self._collector = UsageCollector([target], **labels)

    def use(self, *, tenant: str = "acme", **usage: float) -> None:
        """Add the usage of a call, or a correction."""
        self._table.add(UsageLabels(tenant, "gpt-4o", "writer", "12345678"), CallUsage(**usage))  # type: ignore[arg-type]

    def read(self, name: str, label: str) -> dict[str, float]:
        """Return the values of a metric by one of its labels."""
        return {
            sample.labels[label]: sample.value
            for family in self._collector.collect()
            for sample in family.samples
            if sample.name == name
        }


def test_each_kind_of_token_is_counted_once() -> None:
    counters = Counters()
    counters.use(input_tokens=100, cached_input_tokens=30, cache_write_tokens=20, output_tokens=50, reasoning_tokens=40)
    expected = {"uncached": 50, "cache_read": 30, "cache_write": 20, "answer": 10, "reasoning": 40}
    assert counters.read("forebay_tokens_total", "kind") == expected


def test_what_finds_no_series_of_its_own_is_added_up() -> None:
    counters = Counters(max_values=1)
    for tenant, usd in (("acme", 9.0), ("umbrella", 2.0), ("initech", 1.0)):
        counters.use(tenant=tenant, usd=usd)
    assert counters.read("forebay_spend_usd_total", "tenant") == {"acme": 9.0, OTHER: 3.0}


def test_a_series_stays_with_whoever_had_it_first() -> None:
    counters = Counters(max_values=1)
    counters.use(tenant="acme", usd=1.0)
    assert counters.read("forebay_spend_usd_total", "tenant") == {"acme": 1.0}
    counters.use(tenant="umbrella", usd=50.0)
    assert counters.read("forebay_spend_usd_total", "tenant") == {"acme": 1.0, OTHER: 50.0}


def test_a_correction_makes_no_counter_go_back() -> None:
    counters = Counters()
    counters.use(usd=5.0)
    assert counters.read("forebay_spend_usd_total", "tenant") == {"acme": 5.0}
    counters.use(usd=-4.0)
    assert counters.read("forebay_spend_usd_total", "tenant") == {"acme": 5.0}
    counters.use(usd=10.0)
    assert counters.read("forebay_spend_usd_total", "tenant") == {"acme": 11.0}
