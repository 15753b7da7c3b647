"""How well quotas are used: calls sent as `forebay.quota` allows, against a simulated provider that binds.

Only pure objects and a heap: no event loop. Each case sends as much as it may for ten simulated minutes, after one that
does not count. Its use is what the provider charged over what it would have granted; its refusals are those that the
provider answered, over all calls sent.
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
MOST_IN_FLIGHT = 2_000
MOST_UNHEARD = 20  # in flight before the first headers: who knows no quota must begin slowly


@dataclass
class Case:
    """One provider, what is known of it beforehand, and when its headers arrive."""

    config: ProviderConfig
    unit: str  # that binds
    given: tuple[Quota, ...] = ()
    headers: str = "first"  # with the "first" token, at the "end", or "never"
    load: float = float("inf")  # calls offered a second
    network: float = 0.1  # seconds on the way at most
    seconds: float = MEASURED
    start: float = 0.0  # of the provider's clock, when the first call is sent
    mistaken: float = 0.1  # how far an estimate of tokens may be off, as a share


@dataclass
class Figures:
    """What came of a case."""

    use: float
    refused: float  # share of calls
    sent: int


class Driver:
    """Sends what may be sent, and tells the quotas what happens."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case = case
        self.provider = ProviderModel(case.config, seed=seed)
        self.quotas = RateLimiter(case.given)
        self.random = random.Random(seed)
        self.order = itertools.count()
        self.events: list[tuple[float, int, Callable[[float], None]]] = []
        self.flights: dict[int, tuple[QuotaReservation, SimulatedCall, dict[str, str]]] = {}
        self.most = MOST_IN_FLIGHT if case.given else MOST_UNHEARD
        self.in_flight = self.sent = self.refused = 0
        self.charged = 0.0
        self.began = case.start + WARM_UP
        self.calls: Iterator[tuple[SimulatedCall, Charge]] = self.draw()
        self.next = next(self.calls)
        self.due = case.start

    def run(self) -> Figures:
        """From the start to the end."""
        now, ends = self.case.start, self.began + self.case.seconds
        while now < ends:
            for event in self.provider.advance(now):
                self.happened(now, event)
            while self.events and self.events[0][0] <= now:
                heapq.heappop(self.events)[2](now)
            wake = self.send(now)
            upcoming = self.events[0][0] if self.events else ends
            now = max(now, min(ends, wake, upcoming, self.provider.next_event()))
        allowance = next(a for a in self.case.config.rate_limits if a.unit.value == self.case.unit)
        granted = min(self.case.load * self.case.seconds, allowance.amount * self.case.seconds / allowance.period)
        return Figures(self.charged / granted, self.refused / max(1, self.sent), self.sent)

    def send(self, now: float) -> float:
        """Send all that may go now; when to look again."""
        while self.in_flight < self.most and now >= self.due:
            call, charge = self.next
            delay = self.quotas.wait(now, charge)
            if delay.seconds:
                return now + delay.seconds
            held = self.quotas.reserve(now, charge)
            self.in_flight += 1
            self.sent += now >= self.began
            self.later(now, lambda at, call=call, held=held: self.arrive(at, call, held))  # type: ignore[misc]
            self.next = next(self.calls)
            if self.case.load != float("inf"):
                self.due += self.random.expovariate(self.case.load)
        return self.due if self.in_flight < self.most else float("inf")

    def later(self, now: float, what: Callable[[float], None]) -> None:
        """After a time on the network."""
        heapq.heappush(self.events, (now + self.case.network * self.random.random(), next(self.order), what))

    def arrive(self, now: float, call: SimulatedCall, held: QuotaReservation) -> None:
        """It reaches the provider, and is let in or refused."""
        answer = self.provider.arrive(now, call)
        if isinstance(answer, CallAccepted):
            self.flights[answer.call_id] = held, call, answer.headers
            self.charge(now, call)
            return
        self.refused += now >= self.began
        self.in_flight -= 1
        told = self.told(answer.headers, now)
        wait = read_retry_after(answer.headers, b"", wall=EPOCH + now)
        self.later(now, lambda at: self.quotas.record_throttled(at, held, wait, told))

    def charge(self, now: float, call: SimulatedCall) -> None:
        """Count what the provider charged at its door."""
        if self.began <= now:
            self.charged += {
                "requests": 1,
                "input_tokens": call.input_tokens,
                "tokens": max(call.input_tokens, call.max_tokens or 0),
            }.get(self.case.unit, 0)

    def told(self, headers: dict[str, str], now: float) -> Sequence[RateLimitHeaders]:
        """What headers say, where they come at all."""
        return () if self.case.headers == "never" else read_rate_limits(headers, wall=EPOCH + now)

    def hear(self, now: float, headers: dict[str, str], held: QuotaReservation) -> None:
        """The headers of an answer are here."""
        if self.quotas.needs_headers(now):
            self.quotas.update_from_headers(now, self.told(headers, now), held)
        self.most = MOST_IN_FLIGHT

    def happened(self, now: float, event: Any) -> None:
        """A call has made progress at the provider."""
        if isinstance(event, FirstToken) and self.case.headers == "first":
            held, _, headers = self.flights[event.call_id]
            self.later(now, lambda at: self.hear(at, headers, held))
        elif isinstance(event, CallCompleted | CallCut):
            held, _, headers = self.flights.pop(event.call_id)
            self.in_flight -= 1
            usage = event.usage
            if self.case.unit == "output_tokens" and now >= self.began:
                self.charged += usage.output_tokens
            used = Charge(input_tokens=usage.input_tokens, output_tokens=usage.output_tokens, tokens=held.charge.tokens)

            def end(at: float) -> None:
                if self.case.headers == "end":
                    self.hear(at, headers, held)
                self.quotas.settle(at, held, used)

            self.later(now, end)

    def draw(self) -> Iterator[tuple[SimulatedCall, Charge]]:
        """Calls, and what we think beforehand that they take."""
        model = "gpt-4o" if self.case.config.dialect is Dialect.OPENAI else "claude-sonnet"
        while True:
            sent = int(self.random.lognormvariate(6.5, 0.8)) + 1
            received = int(self.random.lognormvariate(5.0, 0.8)) + 1
            most = 1024 if self.case.config.dialect is Dialect.OPENAI else None
            call = SimulatedCall(model=model, input_tokens=sent, output_tokens=received, max_tokens=most)
            off = 1 + self.case.mistaken * self.random.uniform(-1, 1)
            guess = int(sent * off)
            yield call, Charge(input_tokens=guess, output_tokens=205, tokens=max(guess, most or 0))


def _provider(dialect: Dialect, unit: Unit, amount: int, **more: Any) -> ProviderConfig:
    slack = SimulatedRateLimit(unit=Unit.REQUESTS, amount=100_000)
    rates = [SimulatedRateLimit(unit=unit, amount=amount, **more)]
    return ProviderConfig(
        dialect=dialect, slots=5_000, tpot=0.02, rate_limits=tuple(rates if unit is Unit.REQUESTS else [*rates, slack])
    )


def cases() -> dict[str, Case]:
    """All of them, by name."""
    openai, anthropic = Dialect.OPENAI, Dialect.ANTHROPIC
    found: dict[str, Case] = {}
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
                    given = (Quota(**{unit.value: amount}, per="minute"),) if known == "given" else ()
                    found[f"{dialect.value} {unit.value} {shape} {known} {headers}"] = Case(
                        _provider(dialect, unit, amount, window=shape == "window"),
                        unit.value,
                        given,
                        headers,
                        start=17.0 if shape == "window" else 0.0,
                    )
    return found


def run() -> dict[str, float]:
    """Use and refusals of every case, the worst of three seeds; and what it costs."""
    figures: dict[str, float] = {}
    began, sent = time.perf_counter(), 0
    for name, case in cases().items():
        outcomes = [Driver(case, seed).run() for seed in range(3)]
        sent += sum(outcome.sent for outcome in outcomes)
        figures[f"{name}: use"] = min(outcome.use for outcome in outcomes)
        figures[f"{name}: refused"] = max(outcome.refused for outcome in outcomes)
    figures["us_per_call"] = (time.perf_counter() - began) / sent * 1e6
    return figures
