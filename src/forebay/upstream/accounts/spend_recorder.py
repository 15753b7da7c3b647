"""The spend log's view of an upstream's calls: each is recorded when it is settled, and when its cost is revised."""

from __future__ import annotations

from forebay import clock
from forebay.spend_log import SpendAmounts, SpendLabels, SpendLog
from forebay.spend_log.spend_record import hour_of
from forebay.upstream.call_request import CallRequest

_MAX_MODEL = 200  # characters of a model's name, which is its caller's to choose


class RecordedCall:
    """One call, whose cost is recorded in the hour in which it got its permit: that is the period of its budgets."""

    __slots__ = ("_counted", "_labels", "_log", "_task_id")

    def __init__(self, spend_log: SpendLog, labels: SpendLabels, task_id: str | None) -> None:
        self._log = spend_log
        self._labels = labels
        self._task_id = task_id
        self._counted = SpendAmounts()

    def settle(self, usd: float, *, input_tokens: int, output_tokens: int) -> None:
        """Record the call, with its cost."""
        self._counted = SpendAmounts(1, input_tokens, output_tokens, usd)
        self._log.record(self._labels, self._counted, self._task_id)

    def revise(self, usd: float, *, input_tokens: int, output_tokens: int) -> None:
        """Correct what was recorded, by usage that became known later."""
        before, after = self._counted, SpendAmounts(1, input_tokens, output_tokens, usd)
        change = SpendAmounts(
            after.calls - before.calls,
            input_tokens - before.input_tokens,
            output_tokens - before.output_tokens,
            usd - before.usd,
        )
        self._counted = after
        self._log.record(self._labels, change, self._task_id)


class SpendRecorder:
    """Records the calls of one account.

    Args:
        spend_log: where they are recorded.
        upstream: the name of the account's upstream.
        api_key: its API key, as it is shown.
        by_task: tasks have budgets, so that spend is recorded by task, too.
    """

    def __init__(self, spend_log: SpendLog, upstream: str, api_key: str, *, by_task: bool) -> None:
        self._log = spend_log
        self._upstream = upstream
        self._api_key = api_key
        self._by_task = by_task

    def begin(self, request: CallRequest) -> RecordedCall | None:
        """Return the record of a call that gets its permit now; None if it is free of charge, such as a GET."""
        if request.free:
            return None
        model, hour = request.model[:_MAX_MODEL], hour_of(clock.wall_time())
        labels = SpendLabels(hour, self._upstream, request.tenant, model, request.key_name, self._api_key)
        return RecordedCall(self._log, labels, request.task_id if self._by_task else None)
