"""A target whose replicas something else sets, by the number that is published."""

from __future__ import annotations

from forebay.scale.target import Replicas, Target


class PublishedTarget:
    """A target that is read, and that something else scales: a HorizontalPodAutoscaler, or KEDA.

    An `forebay.scale.Autoscaler` decides as ever; its decision, ``statistics().desired``, is the number to follow.

    Args:
        target: the replicas to read.
    """

    def __init__(self, target: Target) -> None:
        self._target = target

    @property
    def name(self) -> str:
        """The name of the target."""
        return self._target.name

    @property
    def outside(self) -> bool:
        """As the target says."""
        return self._target.outside

    async def open(self) -> None:
        """Open the target."""
        await self._target.open()

    async def close(self) -> None:
        """Close the target."""
        await self._target.close()

    async def replicas(self) -> Replicas:
        """Return the replicas that the target has."""
        return await self._target.replicas()

    async def scale(self, replicas: int) -> None:
        """Leave the target as it is."""
