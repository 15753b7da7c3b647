"""A server whose calls all take equally long, and callers that use all of a limit."""

from __future__ import annotations

from dataclasses import dataclass, field

from forebay.interfaces import Outcome
from forebay.limit import Grant, Limit


@dataclass
class Server:
    """A server that refuses calls beyond `capacity`, and one in every `stray` calls; its calls take `seconds`."""

    limit: Limit
    capacity: int
    stray: int = 0
    slowdown: float | None = 1.0
    now: float = 0.0
    seconds: int = 1
    prompt: bool = False  # a call waits for each slot that is freed, and is sent before the next one is freed
    in_flight: list[Grant] = field(default_factory=list)
    refused: int = 0
    sent: int = 0
    seen: list[int] = field(default_factory=list)  # the limit, after each second

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self.second()

    def second(self) -> None:
        self.now += 1.0
        for grant in self.in_flight:
            if self.now - grant.granted_at == 1.0:
                self.limit.accepted(self.now, grant)
        for grant in list(self.in_flight):
            if self.now - grant.granted_at >= self.seconds:
                self.in_flight.remove(grant)
                self.limit.observe(self.now, grant, Outcome.SUCCESS, slowdown=self.slowdown)
                if self.prompt:
                    self.fill()
        self.fill()
        self.seen.append(self.limit.limit(self.now))

    def fill(self) -> None:
        for _ in range(3 * self.capacity + 3):  # a refused call returns in the next second
            if len(self.in_flight) >= self.limit.limit(self.now):
                break
            self.send()

    def send(self) -> None:
        grant = self.limit.grant(self.now, len(self.in_flight) + 1)
        self.sent += 1
        if len(self.in_flight) >= self.capacity or (self.stray and self.sent % self.stray == 0):
            self.refused += 1
            self.limit.observe(self.now, grant, Outcome.OVERLOAD)
        else:
            self.in_flight.append(grant)
