"""Worker costs: the US dollars that a task costs on one worker, given or learned from what its calls cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

AVERAGE_GAIN: Final = 0.2  # weight of the newest success in an average of a worker


class WorkerCosts:
    """The dollars that a task costs on one worker, by task type.

    Args:
        given: the dollars of every task, or those of each task type; a type without any, or None, is learned.
    """

    __slots__ = ("_given", "_learned")

    def __init__(self, given: float | Mapping[str, float] | None = None) -> None:
        self._given = given
        self._learned: dict[str, float] = {}  # average dollars of a success

    def given(self, task_type: str) -> float | None:
        """Return the dollars that were given for a task of this type, or None."""
        return self._given.get(task_type) if isinstance(self._given, Mapping) else self._given

    def of(self, task_type: str) -> float | None:
        """Return the dollars that a task of this type costs, or None while they are neither given nor learned."""
        given = self.given(task_type)
        return self._learned.get(task_type) if given is None else given

    def record(self, task_type: str, usd: float | None) -> None:
        """Record what the calls of a successful run cost, or None if none of them had a price.

        A run without such calls cost nothing if others of the worker have cost something; otherwise it tells nothing.
        """
        before = self._learned.get(task_type)
        if before is not None:
            self._learned[task_type] = before + AVERAGE_GAIN * ((usd or 0.0) - before)
        elif usd is not None:
            self._learned[task_type] = usd

    def forget_learned(self) -> None:
        """Forget what was learned, because a run of the supervisor begins."""
        self._learned.clear()
