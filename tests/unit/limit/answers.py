"""Answers of a server that refuses nothing and whose calls get slower, for limits that go by latency."""

from __future__ import annotations

from collections.abc import Callable

from forebay.interfaces import Outcome
from forebay.limit import Limit


def run_answers(limit: Limit, seconds_for: Callable[[int], float], count: int) -> int:
    """Return the limit after `count` answers, each as late as `seconds_for` says for the calls in flight."""
    now = 1000.0
    for _ in range(count):
        n = limit.limit(now)
        now += seconds_for(n) / n
        limit.observe(now, limit.grant(now - seconds_for(n), n), Outcome.SUCCESS)
    return limit.limit(now)


def steady(_: int) -> float:
    """Return the seconds of a call at a server that gets no slower."""
    return 1.0


def queueing(slots: int) -> Callable[[int], float]:
    """Return the seconds of a call by the calls in flight, at a server where calls beyond `slots` queue."""
    return lambda n: max(1.0, n / slots)
