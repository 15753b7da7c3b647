"""One run of callers on a simulated provider under a limit: a bounded queue and retries, from event to event.

A call waits in the queue, is sent when the limit allows, and returns to the head of the queue when it was refused. Its
answer counts if it arrives within `Callers.timeout` seconds; then the caller leaves.
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

OVERLOAD = frozenset(
    {RefusalReason.CONCURRENCY, RefusalReason.OVERLOADED, RefusalReason.UNAVAILABLE, RefusalReason.STRAY}
)
ACCEPTED_AFTER = 1.0  # seconds without an answer after which a call counts as accepted


class QuotaPacer(Protocol):
    """The rate limiter of a quota that is known."""

    def wait(self, now: float, call: SimulatedCall) -> float:
        """Return the seconds until `call` may be sent; 0 takes what it needs."""


@dataclass(frozen=True, kw_only=True)
class Callers:
    """The callers, and what they do when a call is refused.

    Attributes:
        rate: calls a second, by the time in seconds.
        minutes: how long they call.
        timeout: seconds from its arrival after which an answer is worth nothing.
        queue_bound: calls that may wait; one that finds the queue full is rejected.
        max_attempts: attempts at one call.
        holds_slot_while_retrying: a call keeps its slot between attempts, as in `async with semaphore: retry()`.
        resubmissions: how often a caller submits again that got no answer in time.
        base_delay: seconds of the first backoff at most.
        max_delay: seconds of any backoff at most.
        lengths: draws the input and output tokens of a call.
    """

    rate: Callable[[float], float]
    minutes: float = 10.0
    timeout: float = 120.0
    queue_bound: int = 100
    max_attempts: float = math.inf
    holds_slot_while_retrying: bool = False
    resubmissions: int = 0
    base_delay: float = 0.5
    max_delay: float = 8.0
    lengths: Callable[[random.Random], tuple[int, int]] = Traffic.conversation().lengths


@dataclass(slots=True, eq=False)
class CallerJob:
    """One call of a caller, and all its attempts."""

    tokens: tuple[int, int]  # of input and output
    resubmissions: int  # left
    service_time: float  # seconds that its answer takes on an idle provider
    attempts: int = 0
    grant: Grant | None = None
    call_id: int | None = None
    waiting: bool = False  # in the queue, or in a backoff without a slot
    finished: bool = False


@dataclass
class RunRecord:
    """The events of one run.

    Attributes:
        done: when each answer arrived in time, and its service time in seconds.
        sent: when each call was sent.
        refused: when each refusal for overload came.
        levels: once a second: the time, the limit and the calls in flight.
    """

    done: list[tuple[float, float]] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    levels: list[tuple[float, int, int]] = field(default_factory=list)

    def work(self, since: float, until: float) -> float:
        """Return the seconds of useful work a second: the slots in use."""
        return sum(work for at, work in self.done if since <= at < until) / (until - since)

    def share_refused(self, since: float, until: float) -> float:
        """Return the refusals for overload over the calls sent."""
        sent = sum(since <= at < until for at in self.sent)
        return sum(since <= at < until for at in self.refused) / max(1, sent)


class LimitRun:
    """One run. The callers and their calls depend on the seed alone, so that every limit meets the same.

    Args:
        config: the provider.
        callers: the callers.
        limit: the limit under test.
        seed: of all random numbers.
        pacer: a quota to wait for.
        duration_error: the expected duration of a call over the true one; 1.2 is a fifth too long.
    """

    def __init__(  # noqa: PLR0913 - what a run is made of
        self,
        config: ProviderConfig,
        callers: Callers,
        limit: Limit,
        *,
        seed: int = 0,
        pacer: QuotaPacer | None = None,
        duration_error: float = 1.0,
    ) -> None:
        self.config, self.callers, self.limit, self.pacer = config, callers, limit, pacer
        self.provider = ProviderModel(config, seed=seed)
        self.record = RunRecord()
        self.in_flight = 0  # as the limit counts them
        self._duration_error = duration_error
        self._traffic = Traffic.conversation()
        self._arrivals = random.Random(f"{seed}/arrivals")
        self._draws = random.Random(f"{seed}/retries")
        self._queue: deque[CallerJob] = deque()
        self._in_flight_jobs: dict[int, CallerJob] = {}  # by call id
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._next_timer = itertools.count().__next__
        self._held_until = 0.0  # by a Retry-After
        self._wakes_at = -1.0
        self.now = 0.0

    def run(self) -> RunRecord:
        """Simulate all minutes; return what happened."""
        end = 60 * self.callers.minutes
        self._at(0.0, self._arrive)
        self._at(0.0, self._sample)
        while True:
            timer = self._timers[0][0]
            self.now = min(timer, max(self.now, self.provider.next_event()))
            if self.now >= end:
                return self.record
            if self.now == timer:
                heapq.heappop(self._timers)[2]()
            else:
                for event in self.provider.advance(self.now):
                    self._handle(event)
            self._send()

    # --- callers ----------------------------------------------------------------------------------------------------

    def _arrive(self) -> None:
        rng = self._arrivals
        rate = self.callers.rate(self.now)
        if rate > 0:
            self._submit(self.callers.lengths(rng), self.callers.resubmissions)
        self._at(self.now + (self._traffic.interarrival(rng, rate) if rate > 0 else 1.0), self._arrive)

    def _submit(self, tokens: tuple[int, int], resubmissions: int) -> None:
        service_time = self.config.ttft + max(1, tokens[1]) * self.config.tpot
        job = CallerJob(tokens, resubmissions, service_time)
        if len(self._queue) >= self.callers.queue_bound:
            self._fail(job)
            return
        job.waiting = True
        self._queue.append(job)
        self._at(self.now + self.callers.timeout, lambda: self._time_out(job))

    def _time_out(self, job: CallerJob) -> None:
        if job.finished:
            return
        if job.call_id is not None:
            self.provider.hang_up(self.now, job.call_id)
            self._in_flight_jobs.pop(job.call_id, None)
        if job.grant is not None:
            self._release(job, Outcome.IGNORED)
        elif not job.waiting:
            self.in_flight -= 1  # it kept its slot in a backoff
        self._fail(job)

    def _fail(self, job: CallerJob) -> None:
        job.finished = True
        if job.resubmissions:
            delay = self._draws.uniform(0.5, 1.5)
            self._at(self.now + delay, lambda: self._submit(job.tokens, job.resubmissions - 1))

    # --- the queue and the limit ------------------------------------------------------------------------------------

    def _send(self) -> None:
        while self._queue and self.now >= self._held_until:
            job = self._queue[0]
            if job.finished:
                self._queue.popleft()
                continue
            if self.in_flight >= self.limit.limit(self.now):
                self._wake(self.limit.reopens_at(self.now))
                return
            wait = self.pacer.wait(self.now, self._call(job)) if self.pacer is not None else 0.0
            if wait > 0:
                self._wake(self.now + wait)
                return
            self._queue.popleft()
            self.in_flight += 1
            self._attempt(job)

    def _attempt(self, job: CallerJob) -> None:
        job.waiting = False
        job.attempts += 1
        grant = job.grant = self.limit.grant(self.now, self.in_flight)
        self.record.sent.append(self.now)
        answer = self.provider.arrive(self.now, self._call(job))
        if isinstance(answer, CallAccepted):
            job.call_id = answer.call_id
            self._in_flight_jobs[answer.call_id] = job
            self._at(self.now + ACCEPTED_AFTER, lambda: self._accept(job, grant))
            return
        delay = self.config.refusal_delay
        if delay > ACCEPTED_AFTER:
            self._at(self.now + ACCEPTED_AFTER, lambda: self._accept(job, grant))
        self._at(self.now + delay, lambda: self._handle_refusal(job, answer.reason, answer.retry_after))

    def _accept(self, job: CallerJob, grant: Grant) -> None:
        if job.grant is grant:
            self.limit.accepted(self.now, grant)

    def _handle_refusal(self, job: CallerJob, reason: RefusalReason, retry_after: float | None) -> None:
        if job.finished:
            return
        overload = reason in OVERLOAD
        if overload:
            self.record.refused.append(self.now)
        elif retry_after is not None:
            self._held_until = max(self._held_until, self.now + retry_after)
            self._wake(self._held_until)
        keeps = self.callers.holds_slot_while_retrying and job.attempts < self.callers.max_attempts
        self._release(job, Outcome.OVERLOAD if overload else Outcome.IGNORED, keeps_slot=keeps)
        if job.attempts >= self.callers.max_attempts:
            self._fail(job)
            return
        max_delay = min(self.callers.max_delay, self.callers.base_delay * 2.0 ** min(job.attempts - 1, 16))
        job.waiting = not keeps
        self._at(self.now + self._draws.random() * max_delay, lambda: self._retry(job))

    def _retry(self, job: CallerJob) -> None:
        if job.finished:
            return
        if self.callers.holds_slot_while_retrying:
            self._attempt(job)
        else:
            self._queue.appendleft(job)

    def _release(
        self, job: CallerJob, outcome: Outcome, *, slowdown: float | None = None, keeps_slot: bool = False
    ) -> None:
        grant, job.grant, job.call_id = job.grant, None, None
        assert grant is not None
        self.in_flight -= not keeps_slot
        self.limit.observe(self.now, grant, outcome, slowdown=slowdown)

    # --- the provider -----------------------------------------------------------------------------------------------

    def _handle(self, event: CallEvent) -> None:
        if not isinstance(event, CallCompleted | CallCut):
            return  # the answer is not streamed, so its first token is not seen
        job = self._in_flight_jobs.pop(event.call_id)
        if isinstance(event, CallCut):
            self._release(job, Outcome.FAULT)
            self._fail(job)
            return
        assert job.grant is not None
        seconds = self.now - job.grant.granted_at
        if seconds < ACCEPTED_AFTER:
            self.limit.accepted(self.now, job.grant)
        self._release(job, Outcome.SUCCESS, slowdown=seconds / (job.service_time * self._duration_error))
        job.finished = True
        self.record.done.append((self.now, job.service_time))

    # --- timers -----------------------------------------------------------------------------------------------------

    def _sample(self) -> None:
        self.record.levels.append((self.now, self.limit.limit(self.now), self.in_flight))
        self._at(self.now + 1.0, self._sample)

    def _call(self, job: CallerJob) -> SimulatedCall:
        return SimulatedCall(model="gpt-4o-mini", input_tokens=job.tokens[0], output_tokens=job.tokens[1])

    def _wake(self, at: float | None) -> None:
        """Call `_send` again at that time."""
        if at is not None and at > self.now and at != self._wakes_at:
            self._wakes_at = at
            self._at(at, lambda: None)

    def _at(self, when: float, then: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (when, self._next_timer(), then))
