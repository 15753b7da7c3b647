"""Queues like those of SQS, in memory and in a time of their own: for what a real service would take hours to do."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from forebay import clock
from forebay.errors import StoreUnavailable
from forebay.overflow.sqs_queues import Message, OutgoingMessage
from forebay.task import Priority


@dataclass
class _Queued:
    """A message in a queue."""

    outgoing: OutgoingMessage
    sent_at: float
    visible_at: float
    receives: int = 0
    handle: str = ""


@dataclass
class SimulatedQueues:
    """The queues of one overflow. Several stores may use them at once.

    Attributes:
        now: seconds; a message that is hidden is seen again once it has passed.
        max_visibility: seconds since a message was received for which it may be hidden at most.
    """

    where: str = "sqs://simulated"
    max_bytes: int = 1 << 20
    max_envelope_bytes: int = 1 << 19
    now: float = 0.0
    max_visibility: float = 12 * 3600.0
    messages: list[_Queued] = field(default_factory=list)
    handles: itertools.count[int] = field(default_factory=itertools.count)

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def send(self, messages: Sequence[OutgoingMessage]) -> Sequence[StoreUnavailable | None]:
        for message in messages:
            self.messages.append(_Queued(message, clock.wall_time(), self.now + max(0.0, message.delay)))
        return [None] * len(messages)

    async def receive(self, priority: Priority, count: int, *, hidden: float, wait: int = 0) -> Sequence[Message]:  # noqa: ARG002
        received: list[Message] = []
        for queued in self.messages:
            record = queued.outgoing.record
            if len(received) < count and record.priority is priority and queued.visible_at <= self.now:
                queued.visible_at = self.now + hidden
                queued.receives += 1
                queued.handle = f"handle {next(self.handles)}"
                message = Message(
                    record=record,
                    nonce=queued.outgoing.nonce,
                    handle=queued.handle,
                    received_at=self.now,
                    sent_at=queued.sent_at,
                    receives=queued.receives,
                )
                received.append(message)
        return received

    async def hide(self, messages: Iterable[tuple[Message, float]]) -> None:
        self.hide_blocking(messages)

    def hide_blocking(self, messages: Iterable[tuple[Message, float]]) -> None:
        for message, seconds in messages:
            left = max(0.0, message.received_at + self.max_visibility - self.now)
            for queued in self.messages:
                if queued.handle == message.handle:
                    queued.visible_at = self.now + min(seconds, left)

    async def delete(self, messages: Sequence[Message]) -> Sequence[Message]:
        handles = {message.handle for message in messages}
        self.messages = [queued for queued in self.messages if queued.handle not in handles]
        return []

    async def count(self, priority: Priority) -> tuple[int, int]:
        there = [queued for queued in self.messages if queued.outgoing.record.priority is priority]
        return sum(queued.visible_at <= self.now for queued in there), len(there)
