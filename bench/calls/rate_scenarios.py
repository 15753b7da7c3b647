"""Scenarios of rates that no header tells, of misleading refusals, of penalties, and of keys that processes share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from bench.calls.scenarios import CALL, EvenPacer, Scenario, provider
from forebay.simulation.provider.provider_config import (
    BusyReason,
    Faults,
    Penalty,
    ProviderConfig,
    ReportedLimits,
    SimulatedRateLimit,
    Unit,
    Wording,
)

_PER_MINUTE: Final = 240
_FREE_SLOTS: Final = 400  # so many that a rate is the only limit
_SILENT: Final = ReportedLimits(wording=Wording.VAGUE, retry_after="", rate_limit_headers=False)


def _rate(reports: ReportedLimits = _SILENT, *, penalty: Penalty | None = None, **limit: object) -> Scenario:
    """Return a scenario of 240 requests a minute; `limit` are fields of SimulatedRateLimit."""
    fields: dict[str, object] = {"unit": Unit.REQUESTS, "amount": _PER_MINUTE, **limit}
    rate_limit = SimulatedRateLimit(**fields)  # type: ignore[arg-type]
    return _limited(rate_limit, reports=reports, penalty=penalty)


def _limited(
    *rate_limits: SimulatedRateLimit, reports: ReportedLimits = _SILENT, penalty: Penalty | None = None
) -> Scenario:
    """Return a scenario of a provider with rate limits; three times the highest rate is offered."""
    config = provider(slots=_FREE_SLOTS, rate_limits=rate_limits, reports=reports, penalty=penalty)
    per_second = max(limit.amount / limit.period for limit in rate_limits)
    return Scenario(config=config, offered=3 * per_second * CALL / _FREE_SLOTS, pacer=_RatePacer, queued_per_slot=1)


def _slots(reports: ReportedLimits, *, slots: int = 50, penalty: Penalty | None = None) -> Scenario:
    """Return a scenario of a limit on calls in flight, which is refused with a 429."""
    return Scenario(config=provider(slots=slots, busy_reason=BusyReason.CONCURRENCY, reports=reports, penalty=penalty))


class _RatePacer(EvenPacer):
    """A pacer that knows the rate limits of a provider at every moment."""

    def __init__(self, config: ProviderConfig) -> None:
        super().__init__(1.0)
        self._limits = config.rate_limits

    def interval(self, now: float) -> float:
        """Return the seconds between two requests at `now`."""
        present = [limit for limit in self._limits if limit.since <= now and (limit.until is None or now < limit.until)]
        return max((limit.period / limit.amount for limit in present), default=1e-3)


def _vague(retry_after: str) -> ReportedLimits:
    return replace(_SILENT, retry_after=retry_after)


def _stray(scenario: Scenario, share: float) -> Scenario:
    """Return the scenario of a provider that also refuses this share of the calls at random, with a 429."""
    return replace(scenario, config=replace(scenario.config, faults=Faults(stray=share)))


def _replicas(replicas: int, slots: int) -> Scenario:
    """Return a scenario of servers behind a load balancer, each of which refuses with a 429 beyond its slots."""
    config = provider(slots=replicas * slots, replicas=replicas, busy_reason=BusyReason.CONCURRENCY, reports=_SILENT)
    return Scenario(config=config, best_fixed=40)


_TOLD: Final = ReportedLimits()  # words, headers and Retry-After tell the truth
_NO_HEADERS: Final = ReportedLimits(rate_limit_headers=False)

RATE_SCENARIOS: Final[Mapping[str, Scenario]] = {  # docs/limits.md has the same names
    "rate, nothing told": _rate(),
    "rate, nothing told, no burst": _rate(burst=2),
    "rate, Retry-After 0": _rate(_vague("0")),
    "rate, Retry-After invalid": _rate(_vague("soon")),
    "rate, Retry-After a day": _rate(_vague("86400")),
    "rate, Retry-After true": _rate(replace(_SILENT, retry_after=None)),
    "rate, said to be concurrency": _rate(replace(_SILENT, wording=Wording.CONCURRENCY)),
    "rate, said to be a rate": _rate(replace(_SILENT, wording=Wording.RATE)),
    "slots, vague, no Retry-After": _slots(_SILENT),
    "slots, Retry-After 0": _slots(_vague("0")),
    "slots, Retry-After 1": _slots(_vague("1")),
    "slots, Retry-After 5": _slots(_vague("5")),
    "slots, Retry-After 30": _slots(_vague("30")),
    "slots, Retry-After 3600": _slots(_vague("3600")),
    "slots, said to be a rate": _slots(replace(_SILENT, wording=Wording.RATE)),
    "slots, said to be a rate, Retry-After 30": _slots(replace(_SILENT, wording=Wording.RATE, retry_after="30")),
    "rate, penalty of 20 s": _rate(penalty=Penalty(seconds=20)),
    "rate, penalty of 20 s, Retry-After true": _rate(replace(_SILENT, retry_after=None), penalty=Penalty(seconds=20)),
    "rate, penalty of 20 s, extended": _rate(penalty=Penalty(seconds=20, extended=True)),
    "slots, penalty of 2 s": _slots(_SILENT, penalty=Penalty(seconds=2)),
    "slots, penalty of 20 s": _slots(_SILENT, penalty=Penalty(seconds=20)),
    "slots, penalty of 20 s, extended": _slots(_SILENT, penalty=Penalty(seconds=20, extended=True)),
    "slots, penalty of 20 s, Retry-After true": _slots(replace(_SILENT, retry_after=None), penalty=Penalty(seconds=20)),
    "window of 40 in 10 s, nothing told": _rate(amount=40, period=10.0, fixed_window=True),
    "window of a minute, nothing told": _rate(fixed_window=True),
    "window of a minute, Retry-After true": _rate(replace(_SILENT, retry_after=None), fixed_window=True),
    "window of a minute, Retry-After 3600": _rate(_vague("3600"), fixed_window=True),
    "window of a minute, remaining 0": _rate(ReportedLimits(remaining=0), fixed_window=True),
    "rate, remaining 0": _rate(ReportedLimits(remaining=0)),
    "rate, headers": _rate(_TOLD),
    "window of a minute, headers": _rate(_TOLD, fixed_window=True),
    "4 a second, headers": _rate(_TOLD, amount=4, period=1.0),
    "window of 4 a second, headers": _rate(_TOLD, amount=4, period=1.0, fixed_window=True),
    "tier falls, nothing told": _limited(
        SimulatedRateLimit(unit=Unit.REQUESTS, amount=2400, until=300.0),
        SimulatedRateLimit(unit=Unit.REQUESTS, amount=240, since=300.0),
    ),
    "tier rises, nothing told": _limited(
        SimulatedRateLimit(unit=Unit.REQUESTS, amount=240, until=300.0),
        SimulatedRateLimit(unit=Unit.REQUESTS, amount=2400, since=300.0),
    ),
    "two processes, headers": replace(_rate(_TOLD), processes=2),
    "five processes, headers": replace(_rate(_TOLD), processes=5),
    "five processes, nothing told": replace(_rate(), processes=5),
    "five processes, window with headers": replace(_rate(_TOLD, fixed_window=True), processes=5),
    "two processes, slots": replace(_slots(_SILENT), processes=2),
    "rate and slots, nothing told": Scenario(
        config=provider(
            slots=30,
            busy_reason=BusyReason.CONCURRENCY,
            rate_limits=(SimulatedRateLimit(unit=Unit.REQUESTS, amount=240),),
            reports=_SILENT,
        ),
        pacer=_RatePacer,
    ),
    "two processes, nothing told": replace(_rate(), processes=2),
    "1,200 a minute, nothing told": _rate(amount=1200),
    "10 replicas of 5, 429": _replicas(10, 5),
    "slots, 5 % at random": _stray(_slots(_SILENT), 0.05),
    "slots, 10 % at random": _stray(_slots(_SILENT), 0.1),
    "slots, 20 % at random": _stray(_slots(_SILENT), 0.2),
}
