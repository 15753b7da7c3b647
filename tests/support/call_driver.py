"""Calls of an account for tests: by one process, or by several in turns."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Sequence
from itertools import cycle
from typing import Any

from tests.support.upstream_checks import check_upstream

from forebay import Upstream
from forebay.testing import now


class CallDriver:
    """Makes calls of an account, through its upstreams in turns.

    Args:
        upstreams: of the account, one for each process.
        seconds: that a call takes.

    Attributes:
        admitted: names of the calls, in the order in which they were admitted.
        times: when they were admitted.
        in_flight: calls under way.
        peak: most calls in flight at once.
    """

    def __init__(self, *upstreams: Upstream, seconds: float = 1.0) -> None:
        self.upstreams = upstreams
        self.seconds = seconds
        self._turns = cycle(upstreams)
        self.admitted: list[Any] = []
        self.times: list[float] = []
        self.in_flight = self.peak = 0

    async def call(
        self, name: Any = None, *, model: str = "", used: int | None = None, seconds: float | None = None, **how: Any
    ) -> float:
        """Make a call, and return when it ended.

        Args:
            name: of the call.
            model: see `Upstream.call`.
            used: output tokens that it reports; None: it reports nothing.
            seconds: that it takes; None: as all.
            **how: see `Upstream.call`.
        """
        async with next(self._turns).call(model, **how) as call:
            self.admitted.append(name)
            self.times.append(now())
            self.in_flight += 1
            self.peak = max(self.peak, self.in_flight)
            try:
                await asyncio.sleep(self.seconds if seconds is None else seconds)
            finally:
                self.in_flight -= 1
            if used is not None:
                call.settle(input_tokens=0, output_tokens=used)
        return now()

    def start(self, name: Any = None, **how: Any) -> asyncio.Task[float]:
        """Begin a call."""
        return asyncio.create_task(self.call(name, **how))

    async def hold(self, name: Any = None, **how: Any) -> asyncio.Task[float]:
        """Begin a call, and return once it is in flight."""
        before, task = len(self.admitted), self.start(name, **how)
        while len(self.admitted) == before:
            assert not task.done(), task
            await asyncio.sleep(0.001)
        return task

    def check(self) -> None:
        """Check that nothing is held any more."""
        for upstream in self.upstreams:
            check_upstream(upstream)


def excess(times: Sequence[float], amount: float, period: float) -> float:
    """Return how much more was used in some span of time than a quota grants: one whole amount, and the refill."""
    times = sorted(times)
    return max(
        bisect_right(times, end) - first - amount - (end - start) * amount / period
        for first, start in enumerate(times)
        for end in times[first:]
    )
