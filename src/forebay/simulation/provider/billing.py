"""Counts and bills of a simulated provider: in total, and for each run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Final

OTHER_RUNS: Final = "(other)"
"""The name of the bill that all runs above the bound share."""


@dataclass(frozen=True, slots=True)
class SimulatedUsage:
    """The tokens of one call and their cost."""

    input_tokens: int
    output_tokens: int
    usd: float


@dataclass(slots=True)
class Bill:
    """The calls and tokens of one run, or of all runs. `wasted_*` is the part for calls without a complete answer."""

    calls: int = 0
    refused: int = 0
    finished: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0
    wasted_input_tokens: int = 0
    wasted_output_tokens: int = 0
    wasted_usd: float = 0.0

    def charge(self, usage: SimulatedUsage, *, wasted: bool) -> None:
        """Add a call that has ended."""
        self.input_tokens += usage.input_tokens
        self.output_tokens += usage.output_tokens
        self.usd += usage.usd
        if wasted:
            self.wasted_input_tokens += usage.input_tokens
            self.wasted_output_tokens += usage.output_tokens
            self.wasted_usd += usage.usd
        else:
            self.finished += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderStatistics:
    """A snapshot of a simulated provider. Times are in seconds since it started; tokens and dollars are as billed.

    ``calls = refused + finished + cut + hung_up + in_flight``: each call is counted in exactly one of them.
    A call is billed when it ends: its input, and the output produced by then.
    """

    now: float
    calls: int  # all that arrived
    refused: int
    finished: int  # with a complete answer
    cut: int  # ended early by the provider
    hung_up: int  # abandoned by the client
    in_flight: int  # with a client that waits
    abandoned: int  # hung up and still running: see `ProviderConfig.finish_abandoned`
    peak_in_flight: int
    by_status: dict[int, int]  # answers by HTTP status: 200 for every accepted call
    by_reason: dict[str, int]  # refusals by reason
    input_tokens: int
    output_tokens: int
    usd: float
    wasted_input_tokens: int  # billed for calls that were cut or hung up
    wasted_output_tokens: int
    wasted_usd: float
    busy_slot_seconds: float  # work done; divided by now * slots, the utilization


@dataclass(slots=True)
class BillingLedger:
    """The owner of all counts of a provider; `max_runs` bounds the number of separate bills."""

    max_runs: int
    total: Bill = field(default_factory=Bill)
    cut: int = 0
    hung_up: int = 0
    peak_in_flight: int = 0
    by_status: Counter[int] = field(default_factory=Counter)
    by_reason: Counter[str] = field(default_factory=Counter)
    bills: dict[str, Bill] = field(default_factory=dict)

    def record_arrival(self, run: str | None) -> None:
        """Count a call that arrived."""
        for bill in self._bills(run):
            bill.calls += 1

    def record_refusal(self, run: str | None, status: int, reason: str) -> None:
        """Count a refused call."""
        self.by_status[status] += 1
        self.by_reason[reason] += 1
        for bill in self._bills(run):
            bill.refused += 1

    def record_acceptance(self, in_flight: int) -> None:
        """Count an accepted call; `in_flight` includes it."""
        self.by_status[200] += 1
        self.peak_in_flight = max(self.peak_in_flight, in_flight)

    def record_end(self, run: str | None, usage: SimulatedUsage, *, wasted: bool) -> None:
        """Bill a call that has ended; `wasted` if the client did not get a complete answer."""
        for bill in self._bills(run):
            bill.charge(usage, wasted=wasted)

    def record_cut(self) -> None:
        """Count a call that the provider ended early."""
        self.cut += 1

    def record_hang_up(self) -> None:
        """Count a call that its client abandoned."""
        self.hung_up += 1

    def _bills(self, run: str | None) -> tuple[Bill, ...]:
        if run is None or not self.max_runs:
            return (self.total,)
        bill = self.bills.get(run)
        if bill is None:
            name = run if len(self.bills) < self.max_runs else OTHER_RUNS
            bill = self.bills.setdefault(name, Bill())
        return self.total, bill

    def copy_bills(self) -> dict[str, Bill]:
        """Return a copy of the bill of each run."""
        return {run: replace(bill) for run, bill in self.bills.items()}

    def snapshot(self, now: float, in_flight: int, abandoned: int, busy_slot_seconds: float) -> ProviderStatistics:
        """Return all counts as frozen statistics."""
        total = self.total
        return ProviderStatistics(
            now=now,
            calls=total.calls,
            refused=total.refused,
            finished=total.finished,
            cut=self.cut,
            hung_up=self.hung_up,
            in_flight=in_flight,
            abandoned=abandoned,
            peak_in_flight=self.peak_in_flight,
            by_status=dict(self.by_status),
            by_reason=dict(self.by_reason),
            input_tokens=total.input_tokens,
            output_tokens=total.output_tokens,
            usd=total.usd,
            wasted_input_tokens=total.wasted_input_tokens,
            wasted_output_tokens=total.wasted_output_tokens,
            wasted_usd=total.wasted_usd,
            busy_slot_seconds=busy_slot_seconds,
        )
