"""Restart policy: which ends of a worker's life have it started again, and which other workers with it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TypeVar

W = TypeVar("W")


class ExitKind(Enum):
    """The way in which the life of a worker ended: it returned, was cancelled, or raised anything else."""

    NORMAL = "normal"
    SHUTDOWN = "shutdown"
    ABNORMAL = "abnormal"


class RestartType(Enum):
    """The ends of its life after which a worker is started again: all, abnormal ones, or none."""

    PERMANENT = "permanent"
    TRANSIENT = "transient"
    TEMPORARY = "temporary"

    def restarts_after(self, exit_kind: ExitKind) -> bool:
        """Return whether a worker of this type is started again after its life ended in this way."""
        if self is RestartType.TRANSIENT:
            return exit_kind is ExitKind.ABNORMAL
        return self is RestartType.PERMANENT


class Strategy(Enum):
    """The workers that are restarted together: one alone, all, or one and those that were registered after it."""

    ONE_FOR_ONE = "one_for_one"
    ONE_FOR_ALL = "one_for_all"
    REST_FOR_ONE = "rest_for_one"

    def restarted_with(self, failed: W, workers: Sequence[W]) -> Sequence[W]:
        """Return the workers that are stopped when `failed` is to be started again, in the order of `workers`."""
        if self is Strategy.ONE_FOR_ALL:
            return workers
        index = workers.index(failed)
        return workers[index:] if self is Strategy.REST_FOR_ONE else workers[index : index + 1]
