"""The schedule of somebody who knows the plant: each call is sent at the earliest moment at which it is let in."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

from bench.fleet.cases import Case, Turn
from forebay.simulation.provider.fault_plan import RefusalReason
from forebay.simulation.provider.provider_model import ProviderModel
from forebay.simulation.provider.simulated_call import CallAccepted, CallCompleted, CallCut, CallEvent

_LOOK = 0.005  # seconds until it looks again at a provider that says *overloaded*

Left = tuple[Turn, ...]  # what an agent has yet to do


def schedule(case: Case) -> float:
    """Seconds until the last agent has its last answer, where those who wait go first come, first served.

    It hears at once when it is refused or cut off, and calls again in the same moment, however often.
    """
    return _Oracle(case, lambda ready, _: ready).run()


def foresight(case: Case) -> float:
    """The same, where whoever has most work left goes first: nobody can who does not know what agents will do yet."""

    def most_left(_: float, left: Left) -> float:
        return -sum(turn.tools + turn.output_tokens * case.config.tpot for turn in left)

    return _Oracle(case, most_left).run()


class _Oracle:
    def __init__(self, case: Case, order: Callable[[float, Left], float]) -> None:
        self._dialect = case.dialect
        self._order = order
        self._plant = ProviderModel(case.config, seed=case.seed)
        self._coming: list[tuple[float, int, Left]] = [(0.0, agent, plan) for agent, plan in enumerate(case.plans)]
        self._waiting: list[tuple[float, int, Left]] = []
        self._flying: dict[int, tuple[int, Left]] = {}

    def run(self) -> float:
        """Seconds until the last answer."""
        now = 0.0
        while True:
            for event in self._plant.advance(now):
                self._heard(event)
            while self._coming and self._coming[0][0] <= now:
                ready, agent, left = heapq.heappop(self._coming)
                heapq.heappush(self._waiting, (self._order(ready, left), agent, left))
            again = self._send(now)
            if not (self._coming or self._waiting or self._flying):
                return now
            now = min(again, self._plant.next_event(), self._coming[0][0] if self._coming else math.inf)

    def _heard(self, event: CallEvent) -> None:
        if not isinstance(event, CallCompleted | CallCut):
            return
        agent, left = self._flying.pop(event.call_id)
        if isinstance(event, CallCut):
            heapq.heappush(self._waiting, (-math.inf, agent, left))
        elif len(left) > 1:
            heapq.heappush(self._coming, (event.at + left[1].tools, agent, left[1:]))

    def _send(self, now: float) -> float:
        """Send all that is let in; when to look again, if nothing happens before."""
        while self._waiting:
            _, agent, left = self._waiting[0]
            answer = self._plant.arrive(now, left[0].call(self._dialect))
            if isinstance(answer, CallAccepted):
                heapq.heappop(self._waiting)
                self._flying[answer.call_id] = agent, left
            elif answer.reason is RefusalReason.CONCURRENCY:
                return math.inf  # until a call ends
            elif answer.reason is RefusalReason.OVERLOADED:
                return now + _LOOK
            elif answer.retry_after is not None:
                return now + answer.retry_after
        return math.inf
