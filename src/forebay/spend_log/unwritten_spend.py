"""The part of a spend log that is not written yet, added up by its labels, within bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from forebay.spend_log.spend_record import HOUR, OTHER, AlertPlace, GivenAlert, SpendAmounts, SpendLabels, TaskHour

_MAX_TOLD_APART: Final = 10_000  # labels an hour; of further ones model and API key are "(other)"
_MAX_KEYS: Final = 20_000  # labels an hour, those included; of further ones the key, by which it has a budget, is too
_MAX_TENANTS: Final = 100_000  # labels an hour, those included; of further ones the tenant is "(other)" too
_MAX_ROWS: Final = 200_000  # that wait while the file cannot be written; further ones are by hour and upstream only
_MAX_TASKS: Final = 131_072  # as many as have budgets in memory; the oldest are forgotten first
_MAX_ALERTS: Final = 131_072


class SpendBatch(NamedTuple):
    """The spend that is written in one transaction."""

    rows: Mapping[SpendLabels, SpendAmounts]
    tasks: Mapping[TaskHour, float]
    alerts: Mapping[AlertPlace, GivenAlert]


class UnwrittenSpend:
    """The spend that is not written yet. Not thread-safe.

    Callers choose the names of tenants and models, so their number is bounded: beyond the bounds the names are lost,
    and no dollar is.
    """

    def __init__(self) -> None:
        self._rows: dict[SpendLabels, SpendAmounts] = {}
        self._tasks: dict[TaskHour, float] = {}
        self._alerts: dict[AlertPlace, GivenAlert] = {}
        self._told_apart: set[SpendLabels] = set()  # labels of this hour and the last that were written, or will be
        self._hour = 0  # the latest

    def __bool__(self) -> bool:
        return bool(self._rows or self._tasks or self._alerts)

    def add(self, labels: SpendLabels, amounts: SpendAmounts, task_id: str | None = None) -> None:
        """Add what a call has cost, or, with negative amounts, what it has cost less than was counted.

        Args:
            labels: of the call.
            amounts: of the call.
            task_id: the task whose budget it was spent from, if it has one.
        """
        row = self._rows.get(labels)
        if row is None:
            labels = self._bounded(labels)
            row = self._rows.get(labels)
        if row is None:
            row = self._rows[labels] = SpendAmounts()
        row.add(amounts)
        if task_id is not None:
            self._add_task(TaskHour(labels.hour, labels.upstream, task_id), amounts.usd)

    def add_alert(self, place: AlertPlace, given: GivenAlert) -> None:
        """Add an alert that was given."""
        if len(self._alerts) < _MAX_ALERTS or place in self._alerts:
            self._alerts[place] = given

    def take(self) -> SpendBatch:
        """Return all of it, and begin again."""
        batch = SpendBatch(self._rows, self._tasks, self._alerts)
        self._rows, self._tasks, self._alerts = {}, {}, {}
        return batch

    def return_batch(self, batch: SpendBatch) -> None:
        """Add a batch that could not be written."""
        for labels, amounts in batch.rows.items():
            self.add(labels, amounts)
        for task, usd in batch.tasks.items():
            self._add_task(task, usd)
        for place, given in batch.alerts.items():
            self._alerts.setdefault(place, given)

    def _add_task(self, task: TaskHour, usd: float) -> None:
        if task not in self._tasks and len(self._tasks) >= _MAX_TASKS:
            del self._tasks[next(iter(self._tasks))]
        self._tasks[task] = self._tasks.get(task, 0.0) + usd

    def _bounded(self, labels: SpendLabels) -> SpendLabels:
        """Return the labels that are used for `labels`, so that there are not too many."""
        known = self._told_apart
        if labels.hour > self._hour:
            self._hour = labels.hour
            known = self._told_apart = {each for each in known if each.hour >= labels.hour - HOUR}
        if labels in known:
            return labels
        if len(self._rows) < _MAX_ROWS:
            without_model = labels._replace(model=OTHER, api_key=OTHER)
            without_key = without_model._replace(key=OTHER)
            bounds = ((labels, _MAX_TOLD_APART), (without_model, _MAX_KEYS), (without_key, _MAX_TENANTS))
            for shorter, most in bounds:
                if shorter in known or len(known) < most:
                    known.add(shorter)
                    return shorter
        return labels._replace(tenant=OTHER, model=OTHER, key=OTHER, api_key=OTHER)
