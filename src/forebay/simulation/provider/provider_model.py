"""The simulated provider itself: a state machine that is told the time and answers with what happened.

Pure: no clock, no loop, no socket; chance comes from the seed. Whoever drives it calls `arrive` and `hang_up` when
clients do, and `advance` when `next_event` is due. Time is in seconds since the provider began, and what comes with an
earlier time than the last counts as coming now.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final

from forebay.simulation.provider import wire_errors as wire
from forebay.simulation.provider.account_limits import AccountLimits, AccountLimitsByKey
from forebay.simulation.provider.billing import Bill, BilledUsage, BillingLedger, ProviderStatistics
from forebay.simulation.provider.fault_plan import CallFaults, FaultPlan, RefusalReason
from forebay.simulation.provider.processor_sharing import CapacityPhase, ProcessorSharing, capacity_phases
from forebay.simulation.provider.provider_config import BusyReason, ProviderConfig, TokenPrice
from forebay.simulation.provider.rate_meters import RateShortage
from forebay.simulation.provider.simulated_call import (
    CallAccepted,
    CallCompleted,
    CallCut,
    CallEvent,
    CallRefused,
    FirstToken,
    SimulatedCall,
    TokensProduced,
)

EPOCH: Final = 1_767_225_600.0
"""2026-01-01T00:00:00Z: when a provider began, unless it is told otherwise."""


@dataclass(slots=True, eq=False)
class _CallInFlight:
    """One call in flight."""

    call_id: int
    call: SimulatedCall
    account: AccountLimits
    price: TokenPrice
    first_token_work: float  # where the work stands when the first token is there
    tpot: float  # seconds of work for each further token
    reports_progress: bool  # it is looked at every few tokens, not only at its end
    last_token: int  # the output token after which it ends
    reported: bool  # if that is early: told as an error
    output_tokens: int = 0  # output tokens accounted for
    abandoned: bool = False  # its client has left

    def output_tokens_at(self, work: float) -> int:
        """Output tokens made when the work stands there."""
        if work < self.first_token_work:
            return 0
        return min(self.last_token, 1 + math.floor((work - self.first_token_work) / self.tpot + 1e-6))

    def usage(self, made: int) -> BilledUsage:
        """Its tokens when so many have been made, and what they cost."""
        return BilledUsage(self.call.input_tokens, made, self.price.cost(self.call.input_tokens, made))


class ProviderModel:
    """A simulated provider of LLM calls."""

    def __init__(self, config: ProviderConfig, *, seed: int = 0, epoch: float = EPOCH) -> None:
        """Begin at second 0.

        Args:
            config: what it is like.
            seed: all that is left to chance comes from it.
            epoch: the wall time of second 0, in epoch seconds, for headers that tell moments.
        """
        self.config = config
        self._epoch = epoch
        self._noise = random.Random(f"{seed}/noise")
        self._fault_plan = FaultPlan(config.faults, f"{seed}/faults")
        self._prices = sorted(config.prices.items(), key=lambda item: -len(item[0]))
        self._accounts = AccountLimitsByKey(config)
        self._billing = BillingLedger(config.max_runs)
        self._flights: dict[int, _CallInFlight] = {}
        self._phases = capacity_phases(config.slots, config.capacity_steps, config.slowdowns)
        self._sharing: ProcessorSharing[_CallInFlight] = ProcessorSharing(0)
        self._events: list[CallEvent] = []
        self._now = 0.0
        self._arrivals = 0
        self._enter_phase(self._phases.pop(0))

    # --- what happens to it -----------------------------------------------------------------------------------------

    def arrive(self, now: float, call: SimulatedCall) -> CallAccepted | CallRefused:
        """A call comes in and is let in or refused, at once."""
        self._run_to(now)
        self._arrivals += 1
        self._billing.record_arrival(call.run)
        fate = self._fault_plan.draw(self._now)
        name, price = self._price_of(call.model)
        if price is None:
            return self._refuse(call, RefusalReason.UNKNOWN_MODEL)
        account = self._accounts.get(self._now, call.key, name)
        reason, shortage = self._refusal_reason(fate, account, call)
        if reason is not None:
            account.charge_refused(self._now, reason)
            return self._refuse(call, reason, account, shortage)
        account.charge_accepted(self._now, call)
        return self._accept(call, account, price, fate)

    def hang_up(self, now: float, call_id: int) -> BilledUsage | None:
        """The client of a call has left: its slot is free, and what was made until now is billed, and wasted.

        If the provider is configured to `run_on`, the call keeps its slot to its end and is billed whole, then. Either
        way the answer is what was made until now; None if the call is over already.
        """
        self._run_to(now)
        flight = self._flights.get(call_id)
        if flight is None or flight.abandoned:
            return None
        made = flight.output_tokens_at(self._sharing.work)
        self._billing.hung_up += 1
        if self.config.finish_abandoned:
            flight.abandoned = True
            return flight.usage(made)
        self._account_output(flight, made)
        return self._close_call(flight, wasted=True)

    def next_event(self) -> float:
        """When `advance` will next have something to tell, if nothing else happens before: infinity for never."""
        if self._events:
            return self._now
        if not self._flights:
            return math.inf
        upcoming = self._phases[0].at if self._phases else math.inf
        return min(upcoming, self._sharing.next_at())

    def advance(self, now: float) -> list[CallEvent]:
        """Let time pass until `now`; what happened, in order."""
        self._run_to(now)
        events, self._events = self._events, []
        return events

    # --- what can be asked ------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Calls that hold a slot, or a share of one."""
        return len(self._flights)

    def statistics(self) -> ProviderStatistics:
        """A frozen snapshot of everything counted so far."""
        abandoned = sum(flight.abandoned for flight in self._flights.values())
        return self._billing.snapshot(
            self._now, len(self._flights) - abandoned, abandoned, self._sharing.busy_slot_seconds
        )

    def bills(self) -> dict[str, Bill]:
        """Calls and tokens of each run that calls named; beyond the configured number of runs, under `(other)`."""
        return self._billing.copy_bills()

    # --- time -------------------------------------------------------------------------------------------------------

    def _run_to(self, now: float) -> None:
        now = max(now, self._now)
        while True:
            due = self._sharing.next_at()
            upcoming = self._phases[0].at if self._phases else math.inf
            if min(due, upcoming) > now:
                break
            if upcoming <= due:
                self._sharing.advance_to(upcoming)
                self._enter_phase(self._phases.pop(0))
            else:
                flight = self._sharing.pop()
                self._now = due
                if self._in_flight(flight):
                    self._reach_mark(flight, due)
        self._sharing.advance_to(now)
        self._now = now

    def _enter_phase(self, phase: CapacityPhase) -> None:
        """The capacity changes."""
        self._now = phase.at
        self._sharing.slots, self._sharing.speed = phase.slots, phase.speed
        if phase.cut:
            for flight in list(self._flights.values()):
                self._account_output(flight, flight.output_tokens_at(self._sharing.work))
                self._cut(flight, phase.at)

    def _reach_mark(self, flight: _CallInFlight, at: float) -> None:
        """A call is at its next mark: the first token, some more, or the end."""
        made = flight.output_tokens
        if made == 0:
            self._account_output(flight, 1)
            self._emit(flight, FirstToken(flight.call_id, at))
            self._mark(flight)
        elif flight.reports_progress and made < flight.last_token:
            self._account_output(flight, min(flight.last_token, made + self.config.tokens_per_event))
            self._emit(flight, TokensProduced(flight.call_id, at, flight.output_tokens - made))
            self._mark(flight)
        else:
            self._account_output(flight, flight.last_token)
            if flight.last_token < flight.call.length:
                self._cut(flight, at)
            else:
                self._emit(flight, CallCompleted(flight.call_id, at, self._close_call(flight, wasted=flight.abandoned)))

    def _mark(self, flight: _CallInFlight) -> None:
        """Put down where the call must next be looked at."""
        if flight.output_tokens == 0:
            due = flight.first_token_work
        elif flight.reports_progress and flight.output_tokens < flight.last_token:
            due = (
                flight.first_token_work
                + (min(flight.last_token, flight.output_tokens + self.config.tokens_per_event) - 1) * flight.tpot
            )
        else:
            due = flight.first_token_work + flight.last_token * flight.tpot
        self._sharing.mark(due, flight)

    def _emit(self, flight: _CallInFlight, event: CallEvent) -> None:
        if not flight.abandoned:
            self._events.append(event)

    # --- the door ---------------------------------------------------------------------------------------------------

    def _refusal_reason(
        self, fate: CallFaults, account: AccountLimits, call: SimulatedCall
    ) -> tuple[RefusalReason | None, RateShortage | None]:
        """Why a call cannot be let in: fate first, then the money, the machines, the rates."""
        if fate.refusal is not None:
            return fate.refusal, None
        if account.out_of_funds:
            return RefusalReason.SPEND_CAP, None
        crowd = self._capacity_refusal()
        if crowd is not None:
            return crowd, None
        return account.shortage(self._now, call) or (None, None)

    def _capacity_refusal(self) -> RefusalReason | None:
        """Why there is no room for one more call in flight."""
        config, slots = self.config, self._sharing.slots
        if slots == 0 or len(self._flights) >= config.max_in_flight:
            return RefusalReason.OVERLOADED
        if config.overcommit is None or len(self._flights) < config.overcommit * slots:
            return None
        return RefusalReason.CONCURRENCY if config.busy_reason is BusyReason.CONCURRENCY else RefusalReason.OVERLOADED

    def _accept(self, call: SimulatedCall, account: AccountLimits, price: TokenPrice, fate: CallFaults) -> CallAccepted:
        length, sharing = call.length, self._sharing
        flight = _CallInFlight(
            self._arrivals,
            call,
            account,
            price,
            first_token_work=sharing.work + self.config.ttft * self._noise_factor() * fate.slowdown,
            tpot=self.config.tpot * self._noise_factor() * fate.slowdown,
            reports_progress=call.stream or account.meters_output,
            last_token=length
            if fate.cut_after is None or length == 1
            else 1 + math.floor(fate.cut_after * (length - 1)),
            reported=fate.reported,
        )
        self._flights[flight.call_id] = flight
        sharing.population = len(self._flights)
        self._mark(flight)
        self._billing.record_acceptance(len(self._flights))
        request_id, dialect = self._request_id(), call.dialect or self.config.dialect
        headers = account.headers(dialect, self._now, self._epoch + self._now) | wire.request_id_header(
            dialect, request_id
        )
        return CallAccepted(flight.call_id, request_id, headers)

    def _refuse(
        self,
        call: SimulatedCall,
        reason: RefusalReason,
        account: AccountLimits | None = None,
        shortage: RateShortage | None = None,
    ) -> CallRefused:
        dialect = call.dialect or self.config.dialect
        limits = account.headers(dialect, self._now, self._epoch + self._now) if account else {}
        why = wire.RefusalDetails(reason, call.model, shortage, account.next_minute_limit if account else 0.0)
        answer = wire.refusal_response(dialect, why, limits, self._request_id())
        self._billing.record_refusal(call.run, answer.status, reason)
        retry_after = shortage.wait if shortage and not math.isinf(shortage.wait) else None
        return CallRefused(answer.status, answer.headers, answer.body, reason, retry_after)

    # --- the end ----------------------------------------------------------------------------------------------------

    def _account_output(self, flight: _CallInFlight, made: int) -> None:
        """Account for output tokens as they are made."""
        if made > flight.output_tokens:
            flight.account.charge_output(self._now, made - flight.output_tokens)
            flight.output_tokens = made

    def _cut(self, flight: _CallInFlight, at: float) -> None:
        self._billing.cut += not flight.abandoned
        self._emit(flight, CallCut(flight.call_id, at, self._close_call(flight, wasted=True), flight.reported))

    def _close_call(self, flight: _CallInFlight, *, wasted: bool) -> BilledUsage:
        del self._flights[flight.call_id]
        self._sharing.population = len(self._flights)
        self._sharing.discard_unwanted(self._in_flight)
        if not self._flights:
            self._sharing.reset()
        usage = flight.usage(flight.output_tokens)
        flight.account.add_spend(usage.usd)
        self._billing.record_end(flight.call.run, usage, wasted=wasted)
        return usage

    # --- small things -----------------------------------------------------------------------------------------------

    def _in_flight(self, flight: _CallInFlight) -> bool:
        return flight.call_id in self._flights

    def _price_of(self, model: str) -> tuple[str, TokenPrice | None]:
        return next(((name, price) for name, price in self._prices if model.startswith(name)), ("", None))

    def _request_id(self) -> str:
        return f"req_{self._arrivals:024d}"

    def _noise_factor(self) -> float:
        sigma = self.config.noise
        return math.exp(self._noise.gauss(-sigma * sigma / 2, sigma)) if sigma else 1.0
