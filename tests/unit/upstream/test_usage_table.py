"""The table of what calls have used, by tenant, model and key."""

from __future__ import annotations

from forebay.call_usage import CallUsage
from forebay.upstream.usage_table import UsageLabels, UsageTable

ONE = CallUsage(calls=1, input_tokens=2, usd=0.5)


def calls_of(table: UsageTable) -> dict[tuple[str, str, str], int]:
    return {(row.tenant, row.model, row.key): row.usage.calls for row in table.rows()}


def test_calls_of_the_same_labels_are_added_up() -> None:
    table = UsageTable()
    for model in ("a", "b", "a"):
        table.add(UsageLabels("acme", model, "1234"), ONE)
    assert calls_of(table) == {("acme", "a", "1234"): 2, ("acme", "b", "1234"): 1}
    assert table.total == CallUsage(calls=3, input_tokens=6, usd=1.5)


def test_the_dearest_rows_come_first() -> None:
    table = UsageTable()
    for number in range(5):
        table.add(UsageLabels("acme", f"m{number}", ""), CallUsage(calls=1, usd=float(number % 3)))
    assert [row.usage.usd for row in table.rows()] == [2.0, 1.0, 1.0, 0.0, 0.0]


def test_beyond_the_bound_calls_are_added_up_by_their_model_alone() -> None:
    table = UsageTable(max_rows=2)
    for tenant in ("a", "b", "c", "d", "a"):
        table.add(UsageLabels(tenant, "m", "1234"), ONE)
    assert calls_of(table) == {("a", "m", "1234"): 2, ("b", "m", "1234"): 1, ("other", "m", "other"): 2}


def test_a_table_is_bounded_and_loses_no_call() -> None:
    table = UsageTable(max_rows=10)
    for number in range(1_000):
        table.add(UsageLabels(f"tenant {number}", f"model {number}", f"key {number}"), ONE)
    assert len(table.rows()) == 10 + 200 + 1
    assert sum(calls_of(table).values()) == table.total.calls == 1_000
    assert calls_of(table)["other", "other", "other"] == 790


def test_a_correction_changes_a_row() -> None:
    table = UsageTable()
    labels = UsageLabels("acme", "m", "")
    table.add(labels, ONE)
    table.add(labels, CallUsage(calls=1, input_tokens=7, usd=0.75) - ONE)
    assert [row.usage for row in table.rows()] == [CallUsage(calls=1, input_tokens=7, usd=0.75)]
