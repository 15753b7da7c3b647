"""The load of a shard, as task admission sees it: runs that use a shard do not start while it is down."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from forebay._hooks import call_hook
from forebay.clock import now
from forebay.interfaces import LoadSource
from forebay.task import Priority

_GAIN = 0.1  # of the moving mean of the seconds that a call takes


class ShardLoad:
    """The load of a shard: the seconds that a call takes, over those that it may take. It is a `LoadSource`.

    It is 1.0 while the shard is down: then all tasks whose workers use the shard are rejected, or spilled.

    Args:
        name: of the shard, in messages.
        timeout: seconds that a call may take.
        recheck: seconds until a shard that is down may be up again.
    """

    def __init__(self, name: str, *, timeout: float, recheck: float) -> None:
        self.name = name
        self._timeout = timeout
        self._recheck = recheck
        self._latency = 0.0
        self._pending: dict[int, float] = {}  # when each call that has not ended began, the oldest first
        self._numbers = itertools.count()
        self._is_down = False
        self._on_relief: dict[object, Callable[[], None]] = {}

    def began(self) -> int:
        """Record that a call begins, and return its number."""
        number = next(self._numbers)
        self._pending[number] = now()
        return number

    def ended(self, number: int) -> None:
        """Record that a call has ended."""
        took = now() - self._pending.pop(number)
        self._latency += _GAIN * (took - self._latency)

    def went_down(self) -> None:
        """Record that the shard cannot be used."""
        self._is_down = True

    def came_up(self) -> None:
        """Record that the shard can be used again, and start what has waited for that."""
        self._is_down, self._latency = False, 0.0
        for callback in list(self._on_relief.values()):
            call_hook(f"relief of {self.name}", callback)

    @property
    def accounts(self) -> Sequence[LoadSource]:
        """See `forebay.interfaces.LoadSource`."""
        return (self,)

    def load(self, priority: Priority = Priority.NORMAL) -> tuple[float, str]:  # noqa: ARG002 - all are served alike
        """See `forebay.interfaces.LoadSource`."""
        if self._is_down:
            return 1.0, "down"
        oldest = next(iter(self._pending.values()), None)
        age = 0.0 if oldest is None else now() - oldest
        return min(1.0, max(self._latency, age) / self._timeout), "latency"

    def time_until_below(self, priority: Priority, load: float) -> tuple[float, float]:  # noqa: ARG002 - as above
        """See `forebay.interfaces.LoadSource`."""
        return (self._recheck if self._is_down else 0.0), 0.0

    def may_start(self, priority: Priority) -> bool:  # noqa: ARG002 - as above
        """See `forebay.interfaces.LoadSource`."""
        return not self._is_down

    def typical_latency(self) -> float:
        """See `forebay.interfaces.LoadSource`."""
        return max(self._latency, 0.001)

    def blocks(self, priority: Priority) -> bool:  # noqa: ARG002 - as above
        """See `forebay.interfaces.LoadSource`."""
        return self._is_down

    def hold_back(self, holder: object, runs: int, priority: Priority = Priority.NORMAL) -> None:
        """Do nothing: runs that have not begun do not load a shard."""

    def add_expected_calls(self, runs: int) -> None:
        """Do nothing, as `hold_back`."""

    def on_relief(self, holder: object, callback: Callable[[], None]) -> None:
        """See `forebay.interfaces.LoadSource`."""
        self._on_relief[holder] = callback

    def forget(self, holder: object) -> None:
        """See `forebay.interfaces.LoadSource`."""
        self._on_relief.pop(holder, None)
