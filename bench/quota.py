"""Use of quotas: calls sent as the rate limiter allows, at a simulated provider whose quota is the bottleneck.

Only pure objects and a heap: no event loop. Each case sends as much as it may for ten simulated minutes, after one that
does not count. Its use is the amount that the provider charged over the amount granted; its refusals are those of the
provider over all calls sent.
"""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from forebay.interfaces import Charge, RateLimitHeaders
from forebay.quota import Quota, QuotaReservation, RateLimiter
from forebay.simulation.provider.provider_config import Dialect, ProviderConfig, SimulatedRateLimit, Unit
from forebay.simulation.provider.provider_model import EPOCH, ProviderModel
from forebay.simulation.provider.simulated_call import CallAccepted, CallCompleted, CallCut, FirstToken, SimulatedCall
from forebay.upstream.providers import read_rate_limits, read_retry_after

WARM_UP, MEASURED = 60.0, 600.0  # seconds
MAX_IN_FLIGHT = 2_000
MAX_BEFORE_HEADERS = 20  # calls in flight before the first headers: a client that knows no quota must begin slowly


@dataclass
class QuotaCase:
    """One provider, the quotas that are known beforehand, and when headers arrive.

    Attributes:
        config: the provider.
        unit: the unit of the quota that is the bottleneck.
        given: the quotas that are known beforehand.
        headers: when they are read: with the ``"first"`` token, at the ``"end"``, or ``"never"``.
        load: calls offered a second.
        network: seconds on the network, at most.
        seconds: how long the case is measured.
        start: the provider's clock when the first call is sent.
        estimate_error: how far an estimate of tokens may be off, as a share.
    """

    config: ProviderConfig
    unit: str
    given: tuple[Quota, ...] = ()
    headers: str = "first"
    load: float = float("inf")
    network: float = 0.1
    seconds: float = MEASURED
    start: float = 0.0
    estimate_error: float = 0.1


@dataclass
class CaseResult:
    """The result of a case: its use and its refusals as shares, and the calls sent."""

    use: float
    refused: float
    sent: int


class CaseRun:
    """One run of a case: it sends what the rate limiter allows, and reports what happens to it."""

    def __init__(self, case: QuotaCase, seed: int) -> None:
        self.case = case
        self.provider = ProviderModel(case.config, seed=seed)
        self.limiter = RateLimiter(case.given)
        self.random = random.Random(seed)
        self.next_event = itertools.count().__next__
        self.events: list[tuple[float, int, Callable[[float], None]]] = []
        self.in_flight_calls: dict[int, tuple[QuotaReservation, SimulatedCall, dict[str, str]]] = {}
        self.max_in_flight = MAX_IN_FLIGHT if case.given else MAX_BEFORE_HEADERS
        self.in_flight = self.sent = self.refused = 0
        self.charged = 0.0
        self.measured_from = case.start + WARM_UP
        self.calls: Iterator[tuple[SimulatedCall, Charge]] = self.draw_calls()
        self.next_call = next(self.calls)
        self.due = case.start

    def run(self) -> CaseResult:
        """Simulate the case."""
        now, end = self.case.start, self.measured_from + self.case.seconds
        while now < end:
            for event in self.provider.advance(now):
                self.handle(now, event)
            while self.events and self.events[0][0] <= now:
                heapq.heappop(self.events)[2](now)
            wake = self.send(now)
            upcoming = self.events[0][0] if self.events else end
            now = max(now, min(end, wake, upcoming, self.provider.next_event()))
        rate_limit = next(limit for limit in self.case.config.rate_limits if limit.unit.value == self.case.unit)
        seconds = self.case.seconds
        granted = min(self.case.load * seconds, rate_limit.amount * seconds / rate_limit.period)
        return CaseResult(self.charged / granted, self.refused / max(1, self.sent), self.sent)

    def send(self, now: float) -> float:
        """Send all calls that may go now; return when to look again."""
        while self.in_flight < self.max_in_flight and now >= self.due:
            call, charge = self.next_call
            delay = self.limiter.wait(now, charge)
            if delay.seconds:
                return now + delay.seconds
            reservation = self.limiter.reserve(now, charge)
            self.in_flight += 1
            self.sent += now >= self.measured_from
            self.after_network(now, lambda at, call=call, held=reservation: self.arrive(at, call, held))  # type: ignore[misc]
            self.next_call = next(self.calls)
            if self.case.load != float("inf"):
                self.due += self.random.expovariate(self.case.load)
        return self.due if self.in_flight < self.max_in_flight else float("inf")

    def after_network(self, now: float, then: Callable[[float], None]) -> None:
        """Call `then` after a time on the network."""
        heapq.heappush(self.events, (now + self.case.network * self.random.random(), self.next_event(), then))

    def arrive(self, now: float, call: SimulatedCall, reservation: QuotaReservation) -> None:
        """Let a call arrive at the provider, which accepts or refuses it."""
        answer = self.provider.arrive(now, call)
        if isinstance(answer, CallAccepted):
            self.in_flight_calls[answer.call_id] = reservation, call, answer.headers
            self.charge(now, call)
            return
        self.refused += now >= self.measured_from
        self.in_flight -= 1
        limits = self.read_headers(answer.headers, now)
        retry_after = read_retry_after(answer.headers, b"", wall=EPOCH + now)
        self.after_network(now, lambda at: self.limiter.record_throttled(at, reservation, retry_after, limits))

    def charge(self, now: float, call: SimulatedCall) -> None:
        """Count what the provider charges when it accepts a call."""
        if self.measured_from <= now:
            self.charged += {
                "requests": 1,
                "input_tokens": call.input_tokens,
                "tokens": max(call.input_tokens, call.max_tokens or 0),
            }.get(self.case.unit, 0)

    def read_headers(self, headers: dict[str, str], now: float) -> Sequence[RateLimitHeaders]:
        """Return the rate limits of headers, if the case reads them."""
        return () if self.case.headers == "never" else read_rate_limits(headers, wall=EPOCH + now)

    def handle_headers(self, now: float, headers: dict[str, str], reservation: QuotaReservation) -> None:
        """Pass the headers of an answer to the rate limiter."""
        if self.limiter.needs_headers(now):
            self.limiter.update_from_headers(now, self.read_headers(headers, now), reservation)
        self.max_in_flight = MAX_IN_FLIGHT

    def handle(self, now: float, event: Any) -> None:
        """Handle an event of the provider."""
        if isinstance(event, FirstToken) and self.case.headers == "first":
            reservation, _, headers = self.in_flight_calls[event.call_id]
            self.after_network(now, lambda at: self.handle_headers(at, headers, reservation))
        elif isinstance(event, CallCompleted | CallCut):
            reservation, _, headers = self.in_flight_calls.pop(event.call_id)
            self.in_flight -= 1
            usage = event.usage
            if self.case.unit == "output_tokens" and now >= self.measured_from:
                self.charged += usage.output_tokens
            tokens = reservation.charge.tokens
            used = Charge(input_tokens=usage.input_tokens, output_tokens=usage.output_tokens, tokens=tokens)

            def end(at: float) -> None:
                if self.case.headers == "end":
                    self.handle_headers(at, headers, reservation)
                self.limiter.settle(at, reservation, used)

            self.after_network(now, end)

    def draw_calls(self) -> Iterator[tuple[SimulatedCall, Charge]]:
        """Yield calls, each with the client's estimate of its charge."""
        model = "gpt-4o" if self.case.config.dialect is Dialect.OPENAI else "claude-sonnet"
        max_tokens = 1024 if self.case.config.dialect is Dialect.OPENAI else None
        while True:
            sent = int(self.random.lognormvariate(6.5, 0.8)) + 1
            received = int(self.random.lognormvariate(5.0, 0.8)) + 1
            call = SimulatedCall(model=model, input_tokens=sent, output_tokens=received, max_tokens=max_tokens)
            estimate = int(sent * (1 + self.case.estimate_error * self.random.uniform(-1, 1)))
            yield call, Charge(input_tokens=estimate, output_tokens=205, tokens=max(estimate, max_tokens or 0))


def _provider(dialect: Dialect, unit: Unit, amount: int, **more: Any) -> ProviderConfig:
    ample = SimulatedRateLimit(unit=Unit.REQUESTS, amount=100_000)
    limits = [SimulatedRateLimit(unit=unit, amount=amount, **more)]
    return ProviderConfig(
        dialect=dialect,
        slots=5_000,
        tpot=0.02,
        rate_limits=tuple(limits if unit is Unit.REQUESTS else [*limits, ample]),
    )


def cases() -> dict[str, QuotaCase]:
    """Return all cases by name."""
    openai, anthropic = Dialect.OPENAI, Dialect.ANTHROPIC
    found: dict[str, QuotaCase] = {}
    for known in ("given", "learned"):
        for shape in ("bucket", "window"):
            for dialect, unit, amount in (
                (openai, Unit.REQUESTS, 600),
                (openai, Unit.TOKENS, 400_000),
                (anthropic, Unit.REQUESTS, 600),
                (anthropic, Unit.INPUT_TOKENS, 400_000),
                (anthropic, Unit.OUTPUT_TOKENS, 80_000),
            ):
                for headers in ("first", "end"):
                    given = (Quota(**{unit.value: amount}, per="minute", strict=False),) if known == "given" else ()
                    found[f"{dialect.value} {unit.value} {shape} {known} {headers}"] = QuotaCase(
                        _provider(dialect, unit, amount, fixed_window=shape == "window"),
                        unit.value,
                        given,
                        headers,
                        start=17.0 if shape == "window" else 0.0,
                    )
    return found


def run() -> dict[str, float]:
    """Return use and refusals of every case, the worst of three seeds, and microseconds a call."""
    results: dict[str, float] = {}
    started, sent = time.perf_counter(), 0
    for name, case in cases().items():
        outcomes = [CaseRun(case, seed).run() for seed in range(3)]
        sent += sum(outcome.sent for outcome in outcomes)
        results[f"{name}: use"] = min(outcome.use for outcome in outcomes)
        results[f"{name}: refused"] = max(outcome.refused for outcome in outcomes)
    results["us_per_call"] = (time.perf_counter() - started) / sent * 1e6
    return results
