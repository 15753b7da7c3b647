"""The limits of one account: what a call takes, whether it may, and what its headers say.

An account is the whole provider's, or that of one key, or of one key and model, as configured. Pure; `now` never goes
backwards.
"""

from __future__ import annotations

import math

from forebay.simulation.provider import wire_errors as wire
from forebay.simulation.provider.fault_plan import RefusalReason
from forebay.simulation.provider.provider_config import Dialect, ProviderConfig, Unit
from forebay.simulation.provider.rate_meters import AccelerationMeter, AccountMeters, RateShortage
from forebay.simulation.provider.simulated_call import SimulatedCall

_MOST_ACCOUNTS = 10_000  # further keys and models share one
_FAULTS = frozenset({RefusalReason.ERROR, RefusalReason.BAD_GATEWAY, RefusalReason.UNAVAILABLE})


class AccountLimits:
    """Rates, growth and money of one account."""

    def __init__(self, config: ProviderConfig, now: float) -> None:
        self._config = config
        self._meters = AccountMeters(config.rate_limits, now)
        self._ramp = AccelerationMeter(config.acceleration) if config.acceleration else None
        self._spent = 0.0  # US dollars
        as_made = {Unit.OUTPUT_TOKENS} if config.dialect is Dialect.OPENAI else {Unit.OUTPUT_TOKENS, Unit.TOKENS}
        self._as_made = as_made & self._meters.units

    @property
    def meters_output(self) -> bool:
        """Output is charged as it is made, so somebody must watch it being made."""
        return bool(self._as_made)

    @property
    def out_of_funds(self) -> bool:
        """All the money is spent."""
        cap = self._config.spend_cap
        return cap is not None and self._spent >= cap

    def shortage(self, now: float, call: SimulatedCall) -> tuple[RefusalReason, RateShortage] | None:
        """Which rate, if any, forbids this call at present."""
        amounts = self._amounts(call)
        shortage = self._meters.shortage(now, amounts)
        if shortage is not None:
            return (
                RefusalReason.TOO_LARGE if math.isinf(shortage.wait) else RefusalReason(shortage.unit.value)
            ), shortage
        shortage = self._ramp.shortage(now, amounts) if self._ramp else None
        return None if shortage is None else (RefusalReason.ACCELERATION, shortage)

    def charge_accepted(self, now: float, call: SimulatedCall) -> None:
        """Charge what is charged at the door."""
        amounts = self._amounts(call)
        for unit, amount in amounts.items():
            self._meters.take(now, unit, amount)
        if self._ramp is not None:
            self._ramp.take(now, amounts)

    def charge_refused(self, now: float, reason: RefusalReason) -> None:
        """Charge what a refusal costs."""
        if self._config.count_faults if reason in _FAULTS else self._config.count_refusals:
            self._meters.take_at_most(now, Unit.REQUESTS, 1.0)

    def charge_output(self, now: float, tokens: int) -> None:
        """Charge output that has been made, where that is how it is charged."""
        for unit in self._as_made:
            self._meters.take(now, unit, tokens)

    def add_spend(self, usd: float) -> None:
        """Money has been spent."""
        self._spent += usd

    def headers(self, dialect: Dialect, now: float, wall: float) -> dict[str, str]:
        """What answers tell of the limits; `wall` is the present in epoch seconds."""
        return wire.rate_limit_headers(dialect, self._meters.readings(now), wall)

    @property
    def next_minute_limit(self) -> float:
        """What an acceleration limit would allow in the next minute; 0 without one."""
        return self._ramp.next_minute_limit() if self._ramp else 0.0

    def _amounts(self, call: SimulatedCall) -> dict[Unit, float]:
        tokens = call.input_tokens
        if self._config.dialect is Dialect.OPENAI:
            tokens = max(tokens, call.max_tokens or 0)
        return {Unit.REQUESTS: 1.0, Unit.TOKENS: float(tokens), Unit.INPUT_TOKENS: float(call.input_tokens)}


class AccountLimitsByKey:
    """All accounts of a provider, each opened by its first call."""

    def __init__(self, config: ProviderConfig) -> None:
        self._config = config
        self._accounts: dict[tuple[str, str], AccountLimits] = {}

    def get(self, now: float, key: str, model: str) -> AccountLimits:
        """The account of a key and a model."""
        name = (key if self._config.by_key else "", model if self._config.by_model else "")
        if name not in self._accounts and len(self._accounts) >= _MOST_ACCOUNTS:
            name = ("", "")
        account = self._accounts.get(name)
        if account is None:
            account = self._accounts[name] = AccountLimits(self._config, now)
        return account
