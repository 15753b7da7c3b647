"""The interface of targets: what an autoscaler makes larger and smaller."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Final, Protocol

import msgspec

from forebay._json import JsonStruct

_LONGEST_SERVICE: Final = 1e7  # seconds, 16 weeks; more is a mistake of whoever reports


class Replicas(JsonStruct, frozen=True, kw_only=True):
    """The replicas of a target at one moment.

    Attributes:
        current: how many it has been asked for; those that drain do not count.
        ready: how many of these take tasks now.
        limited_by: what the replicas themselves are short of instead of slots, if they tell; see `Demand.limited_by`.
        service: seconds for which a task holds a slot of theirs, if they tell.
    """

    current: int
    ready: int
    limited_by: str | None = None
    service: float | None = None


class ReplicaReport(JsonStruct, frozen=True, kw_only=True):
    """A report of one replica that takes tasks. One with a number that cannot be is none.

    Attributes:
        running: slots that are taken.
        service: mean of the seconds for which a task holds its slot; None before the first has ended.
        limited_by: what it is short of instead of slots; None if nothing.
        draining: whether it takes no more tasks, and goes.
    """

    running: Annotated[int, msgspec.Meta(ge=0)] = 0
    service: Annotated[float, msgspec.Meta(ge=0, le=_LONGEST_SERVICE)] | None = None
    limited_by: Annotated[str, msgspec.Meta(max_length=500)] | None = None
    draining: bool = False


def sum_up(current: int, reports: Sequence[ReplicaReport]) -> Replicas:
    """Return the replicas of a target, of which those that are ready have reported.

    They are short of something if half of them are: a quota of a key that they share is seen by each, and not by all at
    the same moment.
    """
    short = Counter(report.limited_by for report in reports if report.limited_by is not None)
    known = [report.service for report in reports if report.service is not None]
    return Replicas(
        current=current,
        ready=len(reports),
        limited_by=short.most_common(1)[0][0] if short and 2 * short.total() >= len(reports) else None,
        service=sum(known) / len(known) if known else None,
    )


class Target(Protocol):
    """Replicas that an autoscaler adds and removes: slots of a worker, processes, pods, machines.

    An autoscaler calls its methods one at a time, on its event loop. Whatever they raise is logged, and tried again; a
    call that takes too long is cancelled.
    """

    @property
    def name(self) -> str:
        """Its name, in events and messages."""

    @property
    def outside(self) -> bool:
        """True if its replicas are other processes, which take tasks from the overflow; False: slots of this one."""

    async def open(self) -> None:
        """Connect and prepare, before the first call."""

    async def close(self) -> None:
        """Release what it holds; replicas that need this object, such as its child processes, drain and end."""

    async def replicas(self) -> Replicas:
        """Return the replicas that there are."""

    async def scale(self, replicas: int) -> None:
        """Ask for so many replicas, and do not wait until they are ready.

        Those that are too many drain: they take no more tasks, finish what they run, or give it back to the overflow,
        and only then go. The same number again changes nothing.
        """
