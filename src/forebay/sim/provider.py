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

from forebay.sim import dialect as wire
from forebay.sim.calls import Accepted, Call, Cut, Event, Finished, FirstToken, Progress, Refused
from forebay.sim.config import Busy, Price, ProviderConfig
from forebay.sim.door import Account, Accounts
from forebay.sim.faults import Fate, Fates, Reason
from forebay.sim.ledger import Bill, Ledger, Statistics, Usage
from forebay.sim.quota import Shortage
from forebay.sim.sharing import Phase, Sharing, phases

EPOCH: Final = 1_767_225_600.0
"""2026-01-01T00:00:00Z: when a provider began, unless it is told otherwise."""


@dataclass(slots=True, eq=False)
class _Flight:
    """One call in flight."""

    call_id: int
    call: Call
    account: Account
    price: Price
    first: float  # where the work stands when the first token is there
    tpot: float  # seconds of work for each further token
    ticks: bool  # it is looked at every few tokens, not only at its end
    last: int  # the output token after which it ends
    reported: bool  # if that is early: told as an error
    made: int = 0  # output tokens accounted for
    abandoned: bool = False  # its client has left

    def made_at(self, work: float) -> int:
        """Output tokens made when the work stands there."""
        if work < self.first:
            return 0
        return min(self.last, 1 + math.floor((work - self.first) / self.tpot + 1e-6))

    def usage(self, made: int) -> Usage:
        """Its tokens when so many have been made, and what they cost."""
        return Usage(self.call.input_tokens, made, self.price.of(self.call.input_tokens, made))


class Provider:
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
        self._fates = Fates(config.faults, f"{seed}/faults")
        self._prices = sorted(config.prices.items(), key=lambda item: -len(item[0]))
        self._accounts = Accounts(config)
        self._ledger = Ledger(config.runs)
        self._flights: dict[int, _Flight] = {}
        self._phases = phases(config.slots, config.steps, config.slow)
        self._sharing: Sharing[_Flight] = Sharing(0)
        self._events: list[Event] = []
        self._now = 0.0
        self._arrivals = 0
        self._turn(self._phases.pop(0))

    # --- what happens to it -----------------------------------------------------------------------------------------

    def arrive(self, now: float, call: Call) -> Accepted | Refused:
        """A call comes in and is let in or refused, at once."""
        self._run_to(now)
        self._arrivals += 1
        self._ledger.arrived(call.run)
        fate = self._fates.draw(self._now)
        name, price = self._model(call.model)
        if price is None:
            return self._refuse(call, Reason.UNKNOWN_MODEL)
        account = self._accounts.of(self._now, call.key, name)
        reason, shortage = self._objection(fate, account, call)
        if reason is not None:
            account.turned_away(self._now, reason)
            return self._refuse(call, reason, account, shortage)
        account.let_in(self._now, call)
        return self._admit(call, account, price, fate)

    def hang_up(self, now: float, call_id: int) -> Usage | None:
        """The client of a call has left: its slot is free, and what was made until now is billed, and wasted.

        If the provider is configured to `run_on`, the call keeps its slot to its end and is billed whole, then. Either
        way the answer is what was made until now; None if the call is over already.
        """
        self._run_to(now)
        flight = self._flights.get(call_id)
        if flight is None or flight.abandoned:
            return None
        made = flight.made_at(self._sharing.work)
        self._ledger.hung_up += 1
        if self.config.run_on:
            flight.abandoned = True
            return flight.usage(made)
        self._make(flight, made)
        return self._end(flight, wasted=True)

    def next_event(self) -> float:
        """When `advance` will next have something to tell, if nothing else happens before: infinity for never."""
        if self._events:
            return self._now
        if not self._flights:
            return math.inf
        upcoming = self._phases[0].at if self._phases else math.inf
        return min(upcoming, self._sharing.next_at())

    def advance(self, now: float) -> list[Event]:
        """Let time pass until `now`; what happened, in order."""
        self._run_to(now)
        events, self._events = self._events, []
        return events

    # --- what can be asked ------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Calls that hold a slot, or a share of one."""
        return len(self._flights)

    def statistics(self) -> Statistics:
        """A frozen snapshot of everything counted so far."""
        abandoned = sum(flight.abandoned for flight in self._flights.values())
        return self._ledger.snapshot(self._now, len(self._flights) - abandoned, abandoned, self._sharing.busy)

    def bills(self) -> dict[str, Bill]:
        """Calls and tokens of each run that calls named; beyond the configured number of runs, under `(other)`."""
        return self._ledger.copies()

    # --- time -------------------------------------------------------------------------------------------------------

    def _run_to(self, now: float) -> None:
        now = max(now, self._now)
        while True:
            due = self._sharing.next_at()
            upcoming = self._phases[0].at if self._phases else math.inf
            if min(due, upcoming) > now:
                break
            if upcoming <= due:
                self._sharing.run_to(upcoming)
                self._turn(self._phases.pop(0))
            else:
                flight = self._sharing.pop()
                self._now = due
                if self._in_flight(flight):
                    self._reach(flight, due)
        self._sharing.run_to(now)
        self._now = now

    def _turn(self, phase: Phase) -> None:
        """The capacity changes."""
        self._now = phase.at
        self._sharing.slots, self._sharing.speed = phase.slots, phase.speed
        if phase.cut:
            for flight in list(self._flights.values()):
                self._make(flight, flight.made_at(self._sharing.work))
                self._cut(flight, phase.at)

    def _reach(self, flight: _Flight, at: float) -> None:
        """A call is at its next mark: the first token, some more, or the end."""
        made = flight.made
        if made == 0:
            self._make(flight, 1)
            self._tell(flight, FirstToken(flight.call_id, at))
            self._mark(flight)
        elif flight.ticks and made < flight.last:
            self._make(flight, min(flight.last, made + self.config.chunk))
            self._tell(flight, Progress(flight.call_id, at, flight.made - made))
            self._mark(flight)
        else:
            self._make(flight, flight.last)
            if flight.last < flight.call.length:
                self._cut(flight, at)
            else:
                self._tell(flight, Finished(flight.call_id, at, self._end(flight, wasted=flight.abandoned)))

    def _mark(self, flight: _Flight) -> None:
        """Put down where the call must next be looked at."""
        if flight.made == 0:
            due = flight.first
        elif flight.ticks and flight.made < flight.last:
            due = flight.first + (min(flight.last, flight.made + self.config.chunk) - 1) * flight.tpot
        else:
            due = flight.first + flight.last * flight.tpot
        self._sharing.mark(due, flight)

    def _tell(self, flight: _Flight, event: Event) -> None:
        if not flight.abandoned:
            self._events.append(event)

    # --- the door ---------------------------------------------------------------------------------------------------

    def _objection(self, fate: Fate, account: Account, call: Call) -> tuple[Reason | None, Shortage | None]:
        """Why a call cannot be let in: fate first, then the money, the machines, the rates."""
        if fate.refusal is not None:
            return fate.refusal, None
        if account.broke:
            return Reason.SPEND_CAP, None
        crowd = self._crowded()
        if crowd is not None:
            return crowd, None
        return account.objection(self._now, call) or (None, None)

    def _crowded(self) -> Reason | None:
        """Why there is no room for one more call in flight."""
        config, slots = self.config, self._sharing.slots
        if slots == 0 or len(self._flights) >= config.most_in_flight:
            return Reason.OVERLOADED
        if config.overcommit is None or len(self._flights) < config.overcommit * slots:
            return None
        return Reason.CONCURRENCY if config.busy is Busy.CONCURRENCY else Reason.OVERLOADED

    def _admit(self, call: Call, account: Account, price: Price, fate: Fate) -> Accepted:
        length, sharing = call.length, self._sharing
        flight = _Flight(
            self._arrivals,
            call,
            account,
            price,
            first=sharing.work + self.config.ttft * self._lognormal() * fate.factor,
            tpot=self.config.tpot * self._lognormal() * fate.factor,
            ticks=call.stream or account.counts_output,
            last=length if fate.cut is None or length == 1 else 1 + math.floor(fate.cut * (length - 1)),
            reported=fate.reported,
        )
        self._flights[flight.call_id] = flight
        sharing.population = len(self._flights)
        self._mark(flight)
        self._ledger.accepted(len(self._flights))
        request_id, dialect = self._request_id(), call.dialect or self.config.dialect
        headers = account.headers(dialect, self._now, self._epoch + self._now) | wire.identity(dialect, request_id)
        return Accepted(flight.call_id, request_id, headers)

    def _refuse(
        self, call: Call, reason: Reason, account: Account | None = None, shortage: Shortage | None = None
    ) -> Refused:
        dialect = call.dialect or self.config.dialect
        limits = account.headers(dialect, self._now, self._epoch + self._now) if account else {}
        why = wire.Why(reason, call.model, shortage, account.next_allowed if account else 0.0)
        answer = wire.refusal(dialect, why, limits, self._request_id())
        self._ledger.refused(call.run, answer.status, reason)
        retry_after = shortage.wait if shortage and not math.isinf(shortage.wait) else None
        return Refused(answer.status, answer.headers, answer.body, reason, retry_after)

    # --- the end ----------------------------------------------------------------------------------------------------

    def _make(self, flight: _Flight, made: int) -> None:
        """Account for output tokens as they are made."""
        if made > flight.made:
            flight.account.made(self._now, made - flight.made)
            flight.made = made

    def _cut(self, flight: _Flight, at: float) -> None:
        self._ledger.cut += not flight.abandoned
        self._tell(flight, Cut(flight.call_id, at, self._end(flight, wasted=True), flight.reported))

    def _end(self, flight: _Flight, *, wasted: bool) -> Usage:
        del self._flights[flight.call_id]
        self._sharing.population = len(self._flights)
        self._sharing.sweep(self._in_flight)
        if not self._flights:
            self._sharing.rest()
        usage = flight.usage(flight.made)
        flight.account.billed(usage.usd)
        self._ledger.ended(flight.call.run, usage, wasted=wasted)
        return usage

    # --- small things -----------------------------------------------------------------------------------------------

    def _in_flight(self, flight: _Flight) -> bool:
        return flight.call_id in self._flights

    def _model(self, model: str) -> tuple[str, Price | None]:
        return next(((name, price) for name, price in self._prices if model.startswith(name)), ("", None))

    def _request_id(self) -> str:
        return f"req_{self._arrivals:024d}"

    def _lognormal(self) -> float:
        sigma = self.config.noise
        return math.exp(self._noise.gauss(-sigma * sigma / 2, sigma)) if sigma else 1.0
