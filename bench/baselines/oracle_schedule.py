"""The schedule of an oracle that knows the provider: each call is sent at the earliest moment it is accepted."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

from bench.fleet.cases import FleetCase, Turn
from forebay.simulation.provider.fault_plan import RefusalReason
from forebay.simulation.provider.provider_model import ProviderModel
from forebay.simulation.provider.simulated_call import CallAccepted, CallCompleted, CallCut, CallEvent

_LOOK_AGAIN = 0.005  # seconds between attempts at an overloaded provider

Turns = tuple[Turn, ...]  # that an agent has left


def schedule(case: FleetCase) -> float:
    """Return the seconds until the last agent has its last answer, if waiting calls go first come, first served.

    The oracle sees refusals and cut calls at once, and repeats a call in the same moment, however often.
    """
    return _Oracle(case, lambda ready, _: ready).run()


def foresight(case: FleetCase) -> float:
    """Return the same, if the agent with most work left goes first, which needs knowledge of future calls."""

    def most_work_left(_: float, left: Turns) -> float:
        return -sum(turn.tools + turn.output_tokens * case.config.tpot for turn in left)

    return _Oracle(case, most_work_left).run()


class _Oracle:
    def __init__(self, case: FleetCase, order: Callable[[float, Turns], float]) -> None:
        self._dialect = case.dialect
        self._order = order
        self._provider = ProviderModel(case.config, seed=case.seed)
        self._upcoming: list[tuple[float, int, Turns]] = [(0.0, agent, plan) for agent, plan in enumerate(case.plans)]
        self._waiting: list[tuple[float, int, Turns]] = []
        self._in_flight: dict[int, tuple[int, Turns]] = {}

    def run(self) -> float:
        """Simulate the schedule; return the seconds until the last answer."""
        now = 0.0
        while True:
            for event in self._provider.advance(now):
                self._handle(event)
            while self._upcoming and self._upcoming[0][0] <= now:
                ready, agent, left = heapq.heappop(self._upcoming)
                heapq.heappush(self._waiting, (self._order(ready, left), agent, left))
            again = self._send(now)
            if not (self._upcoming or self._waiting or self._in_flight):
                return now
            now = min(again, self._provider.next_event(), self._upcoming[0][0] if self._upcoming else math.inf)

    def _handle(self, event: CallEvent) -> None:
        if not isinstance(event, CallCompleted | CallCut):
            return
        agent, left = self._in_flight.pop(event.call_id)
        if isinstance(event, CallCut):
            heapq.heappush(self._waiting, (-math.inf, agent, left))
        elif len(left) > 1:
            heapq.heappush(self._upcoming, (event.at + left[1].tools, agent, left[1:]))

    def _send(self, now: float) -> float:
        """Send all calls that are accepted; return when to look again if nothing happens before."""
        while self._waiting:
            _, agent, left = self._waiting[0]
            answer = self._provider.arrive(now, left[0].call(self._dialect))
            if isinstance(answer, CallAccepted):
                heapq.heappop(self._waiting)
                self._in_flight[answer.call_id] = agent, left
            elif answer.reason is RefusalReason.CONCURRENCY:
                return math.inf  # until a call ends
            elif answer.reason is RefusalReason.OVERLOADED:
                return now + _LOOK_AGAIN
            elif answer.retry_after is not None:
                return now + answer.retry_after
        return math.inf
