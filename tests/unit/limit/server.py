"""A server of calls that all take a second, and as much work as a limit lets through."""

from __future__ import annotations

from dataclasses import dataclass, field

from forebay.interfaces import Grant, Limit, Outcome


@dataclass
class Server:
    """Refuses what exceeds `capacity`; `stray` refusals come besides, one in so many calls."""

    limit: Limit
    capacity: int
    stray: int = 0
    slowdown: float | None = 1.0
    now: float = 0.0
    flying: list[Grant] = field(default_factory=list)
    refused: int = 0
    sent: int = 0
    seen: list[int] = field(default_factory=list)  # the limit, after each second

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self.second()

    def second(self) -> None:
        self.now += 1.0
        done, self.flying = self.flying, []
        for grant in done:
            self.limit.accepted(self.now, grant)
            self.limit.observe(self.now, grant, Outcome.SUCCESS, slowdown=self.slowdown)
        for _ in range(3 * self.capacity + 3):  # more at once is refused, and comes back in the next second
            if len(self.flying) >= self.limit.limit(self.now):
                break
            self.send()
        self.seen.append(self.limit.limit(self.now))

    def send(self) -> None:
        grant = self.limit.grant(self.now, len(self.flying) + 1)
        self.sent += 1
        if len(self.flying) >= self.capacity or (self.stray and self.sent % self.stray == 0):
            self.refused += 1
            self.limit.observe(self.now, grant, Outcome.OVERLOAD)
        else:
            self.flying.append(grant)
