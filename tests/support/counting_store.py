"""A task store that counts its calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from forebay.interfaces import PutResult, TaskStore


class CountingStore:
    """A task store that counts the calls of each method in `calls`, which several may share."""

    def __init__(self, inner: TaskStore, calls: Counter[str]) -> None:
        self._inner = inner
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._inner, name)
        if not callable(attribute):
            return attribute

        def call(*args: Any, **kwargs: Any) -> Any:
            self._calls[name] += 1
            return attribute(*args, **kwargs)

        return call


class ChannelStore(CountingStore):
    """A counting store that tells all of one `channel`, at the same moment, what it has put, as a server may."""

    def __init__(self, inner: TaskStore, calls: Counter[str], channel: list[Callable[[], None]]) -> None:
        super().__init__(inner, calls)
        self._channel = channel

    def subscribe(
        self,
        *,
        on_waiting: Callable[[], None],
        on_ended: Callable[[], None],  # noqa: ARG002
        on_lost: Callable[[], None] | None = None,  # noqa: ARG002
        on_interrupted: Callable[[], None] | None = None,  # noqa: ARG002
    ) -> None:
        """Notice what others put."""
        self._channel.append(on_waiting)

    async def put(self, *args: Any, **kwargs: Any) -> PutResult:
        """Put a record, and tell all of it."""
        put = await self._inner.put(*args, **kwargs)
        for notify in self._channel:
            notify()
        return put
