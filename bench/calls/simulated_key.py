"""The plant: callers, a bounded line, a limit, and the pure simulated provider, driven from event to event.

A call waits in line, is sent when the limit allows, and comes back to the head of the line after a refusal. Its answer
is worth something if it is there `patience` seconds after the call arrived; then the caller leaves.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from forebay.interfaces import Outcome
from forebay.limit import Grant, Limit
from forebay.simulation import Traffic
from forebay.simulation.provider.fault_plan import RefusalReason
from forebay.simulation.provider.provider_config import ProviderConfig
from forebay.simulation.provider.provider_model import ProviderModel
from forebay.simulation.provider.simulated_call import CallAccepted, CallCompleted, CallCut, CallEvent, SimulatedCall

CONGESTION = frozenset(
    {RefusalReason.CONCURRENCY, RefusalReason.OVERLOADED, RefusalReason.UNAVAILABLE, RefusalReason.STRAY}
)
ACCEPTED_AFTER = 1.0  # seconds without an answer, after which a call has not been refused


class QuotaPacer(Protocol):
    """A quota that is paced ahead, where there is one."""

    def wait(self, now: float, call: SimulatedCall) -> float:
        """Seconds until `call` may be sent; 0 takes what it needs."""


@dataclass(frozen=True, kw_only=True)
class Callers:
    """Who calls, and what they do when refused.

    Attributes:
        rate: calls a second at a moment.
        minutes: how long they come.
        patience: seconds from arrival after which an answer is worth nothing.
        line: calls that may wait; one that finds it full is turned away.
        attempts: sendings of one call.
        keeps_slot: a call keeps its slot between attempts, as in `async with semaphore: call_with_retries()`.
        again: one that found nothing in time comes again, up to so many times.
    """

    rate: Callable[[float], float]
    minutes: float = 10.0
    patience: float = 120.0
    queue_bound: int = 100
    max_attempts: float = math.inf
    holds_slot_while_retrying: bool = False
    resubmissions: int = 0
    base_delay: float = 0.5  # seconds of the first backoff at most
    max_delay: float = 8.0  # seconds of any backoff at most


@dataclass(slots=True, eq=False)
class CallerJob:
    """One call of a caller, and all its attempts."""

    tokens: tuple[int, int]
    arrived: float
    again: int
    alone: float  # seconds that its answer takes on an idle provider
    tries: int = 0
    grant: Grant | None = None
    call_id: int | None = None
    waiting: bool = False  # in line, or in a backoff
    gone: bool = False


@dataclass
class RunRecord:
    """What came out of a run.

    Attributes:
        done: when each answer came in time, and the seconds of work in it.
        sent: when each call was sent.
        refused: when each refusal for congestion came.
        levels: the limit, once a second.
    """

    done: list[tuple[float, float]] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    levels: list[tuple[float, int, int]] = field(default_factory=list)

    def work(self, since: float, until: float) -> float:
        """Seconds of useful work a second: how many slots were put to use."""
        return sum(work for at, work in self.done if since <= at < until) / (until - since)

    def share_refused(self, since: float, until: float) -> float:
        """Refusals for congestion over calls sent."""
        sent = sum(since <= at < until for at in self.sent)
        return sum(since <= at < until for at in self.refused) / max(1, sent)


class LimitRun:
    """One run. The callers and their calls depend on the seed alone, so that every limit meets the same."""

    def __init__(  # noqa: PLR0913 - what a run is made of
        self,
        config: ProviderConfig,
        callers: Callers,
        limit: Limit,
        *,
        seed: int = 0,
        pace: QuotaPacer | None = None,
        baseline: float = 1.0,
    ) -> None:
        """Prepare it.

        Args:
            config: the provider.
            callers: who calls.
            limit: what is tried.
            seed: all chance comes from it.
            pace: a quota to wait for.
            baseline: how far off the expected time of a call is; 1.2 is a fifth too long.
        """
        self.config, self.callers, self.limit, self.pace = config, callers, limit, pace
        self.provider = ProviderModel(config, seed=seed)
        self.record = RunRecord()
        self.in_flight = 0  # as the limit counts them
        self._baseline = baseline
        self._traffic = Traffic.conversation()
        self._arrivals = random.Random(f"{seed}/arrivals")
        self._draws = random.Random(f"{seed}/retries")
        self._line: deque[CallerJob] = deque()
        self._flying: dict[int, CallerJob] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._paused = 0.0  # nothing is sent before, since the provider said so
        self._woken = -1.0
        self.now = 0.0

    def run(self) -> RunRecord:
        """Let the minutes pass."""
        end = 60 * self.callers.minutes
        self._at(0.0, self._arrive)
        self._at(0.0, self._look)
        while True:
            timer = self._timers[0][0]
            self.now = min(timer, max(self.now, self.provider.next_event()))
            if self.now >= end:
                return self.record
            if self.now == timer:
                heapq.heappop(self._timers)[2]()
            else:
                for event in self.provider.advance(self.now):
                    self._heard(event)
            self._send()

    # --- callers ----------------------------------------------------------------------------------------------------

    def _arrive(self) -> None:
        rng = self._arrivals
        rate = self.callers.rate(self.now)
        if rate > 0:
            self._join(self._traffic.lengths(rng), self.callers.resubmissions)
        self._at(self.now + (self._traffic.interarrival(rng, rate) if rate > 0 else 1.0), self._arrive)

    def _join(self, tokens: tuple[int, int], again: int) -> None:
        alone = self.config.ttft + max(1, tokens[1]) * self.config.tpot
        job = CallerJob(tokens, self.now, again, alone)
        if len(self._line) >= self.callers.queue_bound:
            self._lost(job)
            return
        job.waiting = True
        self._line.append(job)
        self._at(self.now + self.callers.patience, lambda: self._impatient(job))

    def _impatient(self, job: CallerJob) -> None:
        if job.gone:
            return
        if job.call_id is not None:
            self.provider.hang_up(self.now, job.call_id)
            self._flying.pop(job.call_id, None)
        if job.grant is not None:
            self._release(job, Outcome.IGNORED)
        elif not job.waiting:
            self.in_flight -= 1  # it kept its slot in a backoff
        self._lost(job)

    def _lost(self, job: CallerJob) -> None:
        job.gone = True
        if job.again:
            self._at(self.now + self._draws.uniform(0.5, 1.5), lambda: self._join(job.tokens, job.again - 1))

    # --- the line and the limit -------------------------------------------------------------------------------------

    def _send(self) -> None:
        while self._line and self.now >= self._paused:
            job = self._line[0]
            if job.gone:
                self._line.popleft()
                continue
            if self.in_flight >= self.limit.limit(self.now):
                self._wake(self.limit.reopens_at(self.now))
                return
            wait = self.pace.wait(self.now, self._call(job)) if self.pace is not None else 0.0
            if wait > 0:
                self._wake(self.now + wait)
                return
            self._line.popleft()
            self.in_flight += 1
            self._attempt(job)

    def _attempt(self, job: CallerJob) -> None:
        job.waiting = False
        job.tries += 1
        grant = job.grant = self.limit.grant(self.now, self.in_flight)
        self.record.sent.append(self.now)
        answer = self.provider.arrive(self.now, self._call(job))
        if isinstance(answer, CallAccepted):
            job.call_id = answer.call_id
            self._flying[answer.call_id] = job
            self._at(self.now + ACCEPTED_AFTER, lambda: self._let_in(job, grant))
            return
        self._at(self.now + self.config.refusal_delay, lambda: self._refused(job, answer.reason, answer.retry_after))

    def _let_in(self, job: CallerJob, grant: Grant) -> None:
        if job.grant is grant:
            self.limit.accepted(self.now, grant)

    def _refused(self, job: CallerJob, reason: RefusalReason, retry_after: float | None) -> None:
        if job.gone:
            return
        congested = reason in CONGESTION
        if congested:
            self.record.refused.append(self.now)
        elif retry_after is not None:
            self._paused = max(self._paused, self.now + retry_after)
            self._wake(self._paused)
        keeps = self.callers.holds_slot_while_retrying and job.tries < self.callers.max_attempts
        self._release(job, Outcome.OVERLOAD if congested else Outcome.IGNORED, keep=keeps)
        if job.tries >= self.callers.max_attempts:
            self._lost(job)
            return
        most = min(self.callers.max_delay, self.callers.base_delay * 2.0 ** min(job.tries - 1, 16))
        job.waiting = not keeps
        self._at(self.now + self._draws.random() * most, lambda: self._return(job))

    def _return(self, job: CallerJob) -> None:
        if job.gone:
            return
        if self.callers.holds_slot_while_retrying:
            self._attempt(job)
        else:
            self._line.appendleft(job)

    def _release(self, job: CallerJob, outcome: Outcome, *, slowdown: float | None = None, keep: bool = False) -> None:
        grant, job.grant, job.call_id = job.grant, None, None
        assert grant is not None
        self.in_flight -= not keep
        self.limit.observe(self.now, grant, outcome, slowdown=slowdown)

    # --- the provider -----------------------------------------------------------------------------------------------

    def _heard(self, event: CallEvent) -> None:
        if not isinstance(event, CallCompleted | CallCut):
            return  # the answer is not streamed, so nobody hears of its beginning
        job = self._flying.pop(event.call_id)
        if isinstance(event, CallCut):
            self._release(job, Outcome.FAULT)
            self._lost(job)
            return
        assert job.grant is not None
        took = self.now - job.grant.granted_at
        if took < ACCEPTED_AFTER:
            self.limit.accepted(self.now, job.grant)
        self._release(job, Outcome.SUCCESS, slowdown=took / (job.alone * self._baseline))
        job.gone = True
        self.record.done.append((self.now, job.alone))

    # --- small things -----------------------------------------------------------------------------------------------

    def _look(self) -> None:
        self.record.levels.append((self.now, self.limit.limit(self.now), self.in_flight))
        self._at(self.now + 1.0, self._look)

    def _call(self, job: CallerJob) -> SimulatedCall:
        return SimulatedCall(model="gpt-4o-mini", input_tokens=job.tokens[0], output_tokens=job.tokens[1])

    def _wake(self, at: float | None) -> None:
        """See to it that `_send` is asked again then."""
        if at is not None and at > self.now and at != self._woken:
            self._woken = at
            self._at(at, lambda: None)

    def _at(self, when: float, then: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (when, next(self._order), then))
