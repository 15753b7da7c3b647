"""What is not written yet: it is added up, and its number of rows is bounded, but no dollar is lost."""

from __future__ import annotations

import pytest

from forebay.spend_log import OTHER, SpendAmounts, SpendLabels, unwritten_spend
from forebay.spend_log.spend_record import HOUR, AlertPlace, GivenAlert, TaskHour
from forebay.spend_log.unwritten_spend import UnwrittenSpend


def labels(
    hour: int = 0, tenant: str = "acme", model: str = "gpt-4o", key: str = "ab12", upstream: str = "openai"
) -> SpendLabels:
    return SpendLabels(hour, upstream, tenant, model, key)


def call(usd: float = 1.0) -> SpendAmounts:
    return SpendAmounts(calls=1, input_tokens=10, output_tokens=5, usd=usd)


def dollars(unwritten: UnwrittenSpend) -> float:
    return sum(amounts.usd for amounts in unwritten.take().rows.values())


def test_calls_with_the_same_labels_are_one_row() -> None:
    unwritten = UnwrittenSpend()
    for _ in range(3):
        unwritten.add(labels(), call(0.5))
    unwritten.add(labels(hour=HOUR), call())
    rows = unwritten.take().rows
    assert rows == {labels(): SpendAmounts(3, 30, 15, 1.5), labels(hour=HOUR): SpendAmounts(1, 10, 5, 1.0)}
    assert not unwritten


def test_a_batch_that_could_not_be_written_is_added_to_what_came_meanwhile() -> None:
    unwritten = UnwrittenSpend()
    unwritten.add(labels(), call(), task_id="t")
    unwritten.add_alert(AlertPlace("openai", "budget", ""), GivenAlert(0.0, 0.8))
    batch = unwritten.take()
    unwritten.add(labels(), call(2.0), task_id="t")
    unwritten.add_alert(AlertPlace("openai", "budget", ""), GivenAlert(0.0, 1.0))
    unwritten.return_batch(batch)
    rows, tasks, alerts = unwritten.take()
    assert rows == {labels(): SpendAmounts(2, 20, 10, 3.0)}
    assert tasks == {TaskHour(0, "openai", "t"): 3.0}
    assert alerts == {AlertPlace("openai", "budget", ""): GivenAlert(0.0, 1.0)}, "the later one"


def test_beyond_the_bound_models_are_not_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unwritten_spend, "_MAX_TOLD_APART", 2)
    unwritten = UnwrittenSpend()
    for model in ("a", "b", "c", "d", "a"):
        unwritten.add(labels(model=model), call())
    rows = unwritten.take().rows
    assert {row.model: amounts.usd for row, amounts in rows.items()} == {"a": 2.0, "b": 1.0, OTHER: 2.0}
    unwritten.add(labels(model="e"), call())
    assert [row.model for row in unwritten.take().rows] == [OTHER], "the bound is of an hour, not of a group"
    unwritten.add(labels(hour=2 * HOUR, model="e"), call())
    assert [row.model for row in unwritten.take().rows] == ["e"]


def test_many_models_do_not_make_the_key_unknown_by_which_they_have_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unwritten_spend, "_MAX_TOLD_APART", 2)
    monkeypatch.setattr(unwritten_spend, "_MAX_KEYS", 4)
    unwritten = UnwrittenSpend()
    for number in range(6):
        unwritten.add(labels(model=f"m{number}", key="writer"), call())
    for number in range(3):
        unwritten.add(labels(key=f"k{number}"), call())
    rows = unwritten.take().rows
    assert [(row.model, row.key) for row in rows] == [
        ("m0", "writer"), ("m1", "writer"), (OTHER, "writer"), (OTHER, "k0"), (OTHER, OTHER)
    ]  # fmt: skip


def test_beyond_the_bound_tenants_are_not_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unwritten_spend, "_MAX_TOLD_APART", 1)
    monkeypatch.setattr(unwritten_spend, "_MAX_KEYS", 2)
    monkeypatch.setattr(unwritten_spend, "_MAX_TENANTS", 3)
    unwritten = UnwrittenSpend()
    for number in range(6):
        unwritten.add(labels(tenant=f"t{number}"), call())
    rows = unwritten.take().rows
    assert [row.tenant for row in rows] == ["t0", "t1", "t2", OTHER]
    assert sum(amounts.usd for amounts in rows.values()) == 6.0


def test_a_file_that_cannot_be_written_for_long_costs_no_more_memory_and_no_dollar(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unwritten_spend, "_MAX_ROWS", 10)
    monkeypatch.setattr(unwritten_spend, "_MAX_TASKS", 10)
    unwritten = UnwrittenSpend()
    for hour in range(5):
        for number in range(20):
            unwritten.add(labels(hour * HOUR, tenant=f"t{number}"), call(), task_id=f"{hour}:{number}")
    batch = unwritten.take()
    assert len(batch.rows) <= 10 + 5
    assert len(batch.tasks) == 10
    unwritten.return_batch(batch)
    assert dollars(unwritten) == 100.0


def test_less_than_was_counted_is_a_negative_amount() -> None:
    unwritten = UnwrittenSpend()
    unwritten.add(labels(), call(2.0))
    unwritten.add(labels(), SpendAmounts(0, -4, 3, -1.5))
    assert unwritten.take().rows == {labels(): SpendAmounts(1, 6, 8, 0.5)}
