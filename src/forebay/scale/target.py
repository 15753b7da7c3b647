"""The interface of targets: what an autoscaler makes larger and smaller."""

from __future__ import annotations

from typing import Protocol

from forebay._json import JsonStruct


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
