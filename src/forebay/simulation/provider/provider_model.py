"""The simulated LLM provider as a state machine: the caller passes the time, and gets the events up to it.

Pure: no clock, no event loop, no socket; randomness comes from the seed. The driver calls `arrive` and `hang_up` when
clients do, and `advance` when `next_event` is due. Time is in seconds since the provider started; a time earlier than
the last one is treated as the last one.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final

from forebay.simulation.provider import wire_errors
from forebay.simulation.provider.account_limits import AccountLimits, AccountLimitsByKey
from forebay.simulation.provider.billing import Bill, BillingLedger, ProviderStatistics, SimulatedUsage
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
"""The default wall time at which a provider starts: 2026-01-01T00:00:00Z, in epoch seconds."""


@dataclass(slots=True, eq=False)
class _CallInFlight:
    """A call in flight: its price, its speed and its progress."""

    call_id: int
    call: SimulatedCall
    account: AccountLimits
    price: TokenPrice
    first_token_work: float  # work at which the first token is produced
    tpot: float  # seconds of work for each further token
    reports_progress: bool  # it has a mark every few tokens, not only at its end
    last_token: int  # the output token after which it ends
    reported: bool  # if it ends early: reported as an error
    output_tokens: int = 0  # accounted for so far
    abandoned: bool = False  # its client hung up
    replica: int = 0  # the server that runs it

    def output_tokens_at(self, work: float) -> int:
        """Return the output tokens produced at `work`."""
        if work < self.first_token_work:
            return 0
        return min(self.last_token, 1 + math.floor((work - self.first_token_work) / self.tpot + 1e-6))

    def usage(self, output_tokens: int) -> SimulatedUsage:
        """Return the usage of this call, with its cost, if it produced `output_tokens`."""
        cost = self.price.cost(self.call.input_tokens, output_tokens)
        return SimulatedUsage(self.call.input_tokens, output_tokens, cost)


class ProviderModel:
    """A simulated LLM provider without a clock.

    Args:
        config: its capacity, limits and faults.
        seed: seeds all randomness.
        epoch: wall time of second 0, in epoch seconds, for headers that state times.
    """

    def __init__(self, config: ProviderConfig, *, seed: int = 0, epoch: float = EPOCH) -> None:
        self.config = config
        self._epoch = epoch
        self._noise = random.Random(f"{seed}/noise")
        self._routing = random.Random(f"{seed}/routing")
        self._by_replica = [0] * config.replicas  # calls in flight
        self._tokens_in_flight = 0
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

    # --- inputs -----------------------------------------------------------------------------------------------------

    def arrive(self, now: float, call: SimulatedCall) -> CallAccepted | CallRefused:
        """Accept or refuse a call that arrives at `now`."""
        self._run_to(now)
        self._arrivals += 1
        self._billing.record_arrival(call.run)
        faults = self._fault_plan.draw(self._now)
        name, price = self._price_of(call.model)
        if price is None:
            return self._refuse(call, RefusalReason.UNKNOWN_MODEL)
        account = self._accounts.get(self._now, call.key, name)
        replica = self._routing.randrange(self.config.replicas) if self.config.replicas > 1 else 0
        reason, shortage = self._refusal_reason(faults, account, call, replica)
        if reason is not None:
            account.charge_refused(self._now, reason)
            account.begin_penalty(self._now, reason)
            return self._refuse(call, reason, account, shortage)
        account.charge_accepted(self._now, call)
        return self._accept(call, account, price, faults, replica)

    def hang_up(self, now: float, call_id: int) -> SimulatedUsage | None:
        """End a call whose client hung up: free its slot, and bill the output produced so far as wasted.

        With `finish_abandoned`, the call keeps its slot to its end and is billed in full. In both cases return the
        usage up to now; None if the call is already over.
        """
        self._run_to(now)
        flight = self._flights.get(call_id)
        if flight is None or flight.abandoned:
            return None
        output_tokens = flight.output_tokens_at(self._sharing.work)
        self._billing.record_hang_up()
        if self.config.finish_abandoned:
            flight.abandoned = True
            return flight.usage(output_tokens)
        self._account_output(flight, output_tokens)
        return self._close_call(flight, wasted=True)

    def next_event(self) -> float:
        """Return when `advance` will next return events, if no input comes before; infinity for never."""
        if self._events:
            return self._now
        if not self._flights:
            return math.inf
        upcoming = self._phases[0].at if self._phases else math.inf
        return min(upcoming, self._sharing.next_at())

    def advance(self, now: float) -> list[CallEvent]:
        """Advance the time to `now` and return the events since the last call, in order."""
        self._run_to(now)
        events, self._events = self._events, []
        return events

    # --- readings ---------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """The number of calls that hold a slot, or a share of one."""
        return len(self._flights)

    def statistics(self) -> ProviderStatistics:
        """Return a snapshot of the counts so far."""
        abandoned = sum(flight.abandoned for flight in self._flights.values())
        return self._billing.snapshot(
            self._now, len(self._flights) - abandoned, abandoned, self._sharing.busy_slot_seconds
        )

    def bills(self) -> dict[str, Bill]:
        """Return the bill of each run that calls named; runs beyond `max_runs` share the bill `(other)`."""
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
                if self._is_in_flight(flight):
                    self._reach_mark(flight, due)
        self._sharing.advance_to(now)
        self._now = now

    def _enter_phase(self, phase: CapacityPhase) -> None:
        """Change the capacity, and cut the calls in flight if the phase begins with a restart."""
        self._now = phase.at
        self._slots = phase.slots
        stalls = self.config.stalls or not phase.slots
        self._sharing.slots, self._sharing.speed = (phase.slots if stalls else self.config.max_in_flight), phase.speed
        if phase.cut:
            for flight in list(self._flights.values()):
                self._account_output(flight, flight.output_tokens_at(self._sharing.work))
                self._cut(flight, phase.at)

    def _reach_mark(self, flight: _CallInFlight, at: float) -> None:
        """Handle a call at its next mark: the first token, further tokens, or the end."""
        before = flight.output_tokens
        if before == 0:
            self._account_output(flight, 1)
            self._emit(flight, FirstToken(flight.call_id, at))
            self._mark(flight)
        elif flight.reports_progress and before < flight.last_token:
            self._account_output(flight, min(flight.last_token, before + self.config.tokens_per_event))
            self._emit(flight, TokensProduced(flight.call_id, at, flight.output_tokens - before))
            self._mark(flight)
        else:
            self._account_output(flight, flight.last_token)
            if flight.last_token < flight.call.length:
                self._cut(flight, at)
            else:
                usage = self._close_call(flight, wasted=flight.abandoned)
                self._emit(flight, CallCompleted(flight.call_id, at, usage))

    def _mark(self, flight: _CallInFlight) -> None:
        """Set the next mark of a call."""
        if flight.output_tokens == 0:
            work = flight.first_token_work
        elif flight.reports_progress and flight.output_tokens < flight.last_token:
            token = min(flight.last_token, flight.output_tokens + self.config.tokens_per_event)
            work = flight.first_token_work + (token - 1) * flight.tpot
        else:
            work = flight.first_token_work + flight.last_token * flight.tpot
        self._sharing.mark(work, flight)

    def _emit(self, flight: _CallInFlight, event: CallEvent) -> None:
        if not flight.abandoned:
            self._events.append(event)

    # --- accepting and refusing -------------------------------------------------------------------------------------

    def _refusal_reason(
        self, faults: CallFaults, account: AccountLimits, call: SimulatedCall, replica: int
    ) -> tuple[RefusalReason | None, RateShortage | None]:
        """Return why a call is refused, if it is. In this order: faults, spend cap, penalty, capacity, rates."""
        if faults.refusal is not None:
            return faults.refusal, None
        if account.out_of_funds:
            return RefusalReason.SPEND_CAP, None
        penalty = account.penalty(self._now)
        if penalty is not None:
            return RefusalReason.PENALTY, penalty
        reason = self._capacity_refusal(call, replica)
        if reason is not None:
            return reason, None
        return account.shortage(self._now, call) or (None, None)

    def _capacity_refusal(self, call: SimulatedCall, replica: int) -> RefusalReason | None:
        """Return why one more call in flight is refused, if it is."""
        config, slots = self.config, self._slots
        if slots == 0 or len(self._flights) >= config.max_in_flight:
            return RefusalReason.OVERLOADED
        full = config.overcommit is not None and (
            self._by_replica[replica] >= config.overcommit * slots / config.replicas
        )
        tokens = self._tokens_in_flight + call.input_tokens + call.length
        if not full and (config.tokens_in_flight is None or tokens <= config.tokens_in_flight):
            return None
        return RefusalReason.CONCURRENCY if config.busy_reason is BusyReason.CONCURRENCY else RefusalReason.OVERLOADED

    def _accept(
        self, call: SimulatedCall, account: AccountLimits, price: TokenPrice, faults: CallFaults, replica: int
    ) -> CallAccepted:
        length, cut_after, sharing = call.length, faults.cut_after, self._sharing
        flight = _CallInFlight(
            self._arrivals,
            call,
            account,
            price,
            first_token_work=sharing.work + self.config.ttft * self._noise_factor() * faults.slowdown,
            tpot=self.config.tpot * self._noise_factor() * faults.slowdown,
            reports_progress=call.stream or account.meters_output,
            last_token=length if cut_after is None or length == 1 else 1 + math.floor(cut_after * (length - 1)),
            reported=faults.reported,
            replica=replica,
        )
        self._flights[flight.call_id] = flight
        self._by_replica[replica] += 1
        self._tokens_in_flight += call.input_tokens + call.length
        sharing.population = len(self._flights)
        self._mark(flight)
        self._billing.record_acceptance(len(self._flights))
        request_id, dialect = self._request_id(), call.dialect or self.config.dialect
        headers = account.headers(dialect, self._now, self._epoch + self._now)
        headers |= wire_errors.request_id_header(dialect, request_id)
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
        next_minute_limit = account.next_minute_limit if account else 0.0
        reports = self.config.reports
        details = wire_errors.RefusalDetails(reason, call.model, shortage, next_minute_limit, reports)
        answer = wire_errors.refusal_response(dialect, details, limits, self._request_id())
        self._billing.record_refusal(call.run, answer.status, reason)
        retry_after = shortage.wait if shortage and not math.isinf(shortage.wait) else None
        return CallRefused(answer.status, answer.headers, answer.body, reason, retry_after)

    # --- the end of a call ------------------------------------------------------------------------------------------

    def _account_output(self, flight: _CallInFlight, output_tokens: int) -> None:
        """Charge the output produced since the last time; `output_tokens` is the number so far."""
        if output_tokens > flight.output_tokens:
            flight.account.charge_output(self._now, output_tokens - flight.output_tokens)
            flight.output_tokens = output_tokens

    def _cut(self, flight: _CallInFlight, at: float) -> None:
        if not flight.abandoned:
            self._billing.record_cut()
        self._emit(flight, CallCut(flight.call_id, at, self._close_call(flight, wasted=True), flight.reported))

    def _close_call(self, flight: _CallInFlight, *, wasted: bool) -> SimulatedUsage:
        del self._flights[flight.call_id]
        self._by_replica[flight.replica] -= 1
        self._tokens_in_flight -= flight.call.input_tokens + flight.call.length
        self._sharing.population = len(self._flights)
        self._sharing.discard_unwanted(self._is_in_flight)
        if not self._flights:
            self._sharing.reset()
        usage = flight.usage(flight.output_tokens)
        flight.account.add_spend(usage.usd)
        self._billing.record_end(flight.call.run, usage, wasted=wasted)
        return usage

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _is_in_flight(self, flight: _CallInFlight) -> bool:
        return flight.call_id in self._flights

    def _price_of(self, model: str) -> tuple[str, TokenPrice | None]:
        return next(((name, price) for name, price in self._prices if model.startswith(name)), ("", None))

    def _request_id(self) -> str:
        return f"req_{self._arrivals:024d}"

    def _noise_factor(self) -> float:
        """Draw a lognormal factor of mean 1."""
        sigma = self.config.noise
        return math.exp(self._noise.gauss(-sigma * sigma / 2, sigma)) if sigma else 1.0
