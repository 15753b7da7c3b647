"""The limits of one account at a simulated provider: what a call is charged, and when it is refused.

An account is shared by all callers, or belongs to one API key, one model, or one key and model, as configured. Pure;
`now` never goes backwards.
"""

from __future__ import annotations

import math
from dataclasses import replace

from forebay.simulation.provider import wire_errors
from forebay.simulation.provider.fault_plan import RefusalReason
from forebay.simulation.provider.provider_config import Dialect, ProviderConfig, Unit
from forebay.simulation.provider.rate_meters import AccelerationMeter, AccountMeters, RateShortage
from forebay.simulation.provider.simulated_call import SimulatedCall

_MAX_ACCOUNTS = 10_000  # further keys and models share one account
_LIMITS = frozenset(
    {
        *(RefusalReason(unit.value) for unit in Unit),
        RefusalReason.ACCELERATION,
        RefusalReason.CONCURRENCY,
        RefusalReason.OVERLOADED,
    }
)
_FAULTS = frozenset({RefusalReason.ERROR, RefusalReason.BAD_GATEWAY, RefusalReason.UNAVAILABLE})


class AccountLimits:
    """The rate limits, the acceleration limit and the spend cap of one account."""

    def __init__(self, config: ProviderConfig, now: float) -> None:
        self._config = config
        self._meters = AccountMeters(config.rate_limits, now)
        self._acceleration = AccelerationMeter(config.acceleration) if config.acceleration else None
        self._spent = 0.0  # US dollars
        self._penalty_ends = -math.inf
        openai = config.dialect is Dialect.OPENAI
        charged_as_output = {Unit.OUTPUT_TOKENS} if openai else {Unit.OUTPUT_TOKENS, Unit.TOKENS}
        self._charged_as_output = charged_as_output & self._meters.units

    @property
    def meters_output(self) -> bool:
        """True if output is charged while it is produced, so that its progress must be followed."""
        return bool(self._charged_as_output)

    @property
    def out_of_funds(self) -> bool:
        """True once the spend cap is reached."""
        cap = self._config.spend_cap
        return cap is not None and self._spent >= cap

    def shortage(self, now: float, call: SimulatedCall) -> tuple[RefusalReason, RateShortage] | None:
        """Return the rate limit that refuses this call at `now`; None if none does."""
        amounts = self._amounts(call)
        shortage = self._meters.shortage(now, amounts)
        if shortage is not None:
            too_large = math.isinf(shortage.wait)
            return (RefusalReason.TOO_LARGE if too_large else RefusalReason(shortage.unit.value)), shortage
        shortage = self._acceleration.shortage(now, amounts) if self._acceleration else None
        return None if shortage is None else (RefusalReason.ACCELERATION, shortage)

    def penalty(self, now: float) -> RateShortage | None:
        """Return what is left of a penalty, which refuses every call; None if none runs."""
        penalty, left = self._config.penalty, self._penalty_ends - now
        if penalty is None or left <= 0:
            return None
        if penalty.extended:
            self._penalty_ends, left = now + penalty.seconds, penalty.seconds
        return RateShortage(Unit.REQUESTS, 0.0, 0.0, 1.0, left)

    def begin_penalty(self, now: float, reason: RefusalReason) -> None:
        """Begin a penalty, if the configuration has one: a limit has refused a call."""
        if self._config.penalty is not None and reason in _LIMITS:
            self._penalty_ends = now + self._config.penalty.seconds

    def charge_accepted(self, now: float, call: SimulatedCall) -> None:
        """Charge an accepted call: the request, its input, and with OpenAI its bound on output."""
        amounts = self._amounts(call)
        for unit, amount in amounts.items():
            self._meters.take(now, unit, amount)
        if self._acceleration is not None:
            self._acceleration.take(now, amounts)

    def charge_refused(self, now: float, reason: RefusalReason) -> None:
        """Charge a refused call, if the configuration counts it."""
        if self._config.count_faults if reason in _FAULTS else self._config.count_refusals:
            self._meters.take_at_most(now, Unit.REQUESTS, 1.0)

    def charge_output(self, now: float, tokens: int) -> None:
        """Charge output tokens that were produced, where output is charged that way."""
        for unit in self._charged_as_output:
            self._meters.take(now, unit, tokens)

    def add_spend(self, usd: float) -> None:
        """Add the cost of a call, in US dollars."""
        self._spent += usd

    def headers(self, dialect: Dialect, now: float, wall: float) -> dict[str, str]:
        """Return the rate limit headers of an answer; `wall` is the wall time in epoch seconds."""
        reports = self._config.reports
        if not reports.rate_limit_headers:
            return {}
        readings = self._meters.readings(now)
        if reports.remaining is not None:
            readings = [replace(reading, remaining=float(reports.remaining)) for reading in readings]
        return wire_errors.rate_limit_headers(dialect, readings, wall)

    @property
    def next_minute_limit(self) -> float:
        """The acceleration limit of the next minute; 0 without one."""
        return self._acceleration.next_minute_limit() if self._acceleration else 0.0

    def _amounts(self, call: SimulatedCall) -> dict[Unit, float]:
        tokens = call.input_tokens
        if self._config.dialect is Dialect.OPENAI:
            tokens = max(tokens, call.max_tokens or 0)
        return {Unit.REQUESTS: 1.0, Unit.TOKENS: float(tokens), Unit.INPUT_TOKENS: float(call.input_tokens)}


class AccountLimitsByKey:
    """The limits of all accounts of a provider, each created by its first call."""

    def __init__(self, config: ProviderConfig) -> None:
        self._config = config
        self._accounts: dict[tuple[str, str], AccountLimits] = {}

    def get(self, now: float, key: str, model: str) -> AccountLimits:
        """Return the limits of an API key and a model."""
        name = (key if self._config.by_key else "", model if self._config.by_model else "")
        if name not in self._accounts and len(self._accounts) >= _MAX_ACCOUNTS:
            name = ("", "")
        account = self._accounts.get(name)
        if account is None:
            account = self._accounts[name] = AccountLimits(self._config, now)
        return account
