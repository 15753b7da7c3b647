"""Head-of-line bypass, compared with a strict queue: no call is served later because another overtook it."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from forebay.breaker import UPSTREAM_RULES, Breaker
from forebay.interfaces import Charge, Outcome
from forebay.limit import FixedLimit, Grant
from forebay.quota import Quota, RateLimiter
from forebay.quota.quota_doubt import QuotaDoubt
from forebay.task import Priority
from forebay.upstream.accounts.account import Account
from forebay.upstream.accounts.bypass import LOOK_AHEAD
from forebay.upstream.call_request import Admitted, CallOutcome, CallRequest, Permit, Queued, Rejected

UNITS = ("requests", "input_tokens", "output_tokens")
SUCCESS = CallOutcome(kind=Outcome.SUCCESS)


class Rule(NamedTuple):
    """A quota of `amount` a minute: in windows, of which the first ends at `window_end`, or refilled continuously."""

    unit: str
    amount: int
    window_end: float | None


class Job(NamedTuple):
    """A call: when it arrives, how long it runs, the amounts that it reserves and those that it uses."""

    arrival: float
    duration: float
    reserved: tuple[int, int, int]
    used: tuple[int, int, int]

    def charge(self, amounts: tuple[int, int, int]) -> Charge:
        return Charge(**dict(zip(UNITS, amounts, strict=True)))


# --- the model: a strict queue, without bypass ---


class Pool:
    """The amount that one quota has left. An amount reserved in an earlier window does not come back."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.left, self.at, self.window_end, self.window = rule, float(rule.amount), 0.0, rule.window_end, 0

    def advance(self, now: float) -> None:
        if self.window_end is None:
            self.left = min(self.rule.amount, self.left + (now - self.at) * self.rule.amount / 60.0)
        while self.window_end is not None and self.window_end <= now:
            self.window_end, self.left, self.window = self.window_end + 60.0, float(self.rule.amount), self.window + 1
        self.at = now

    def available_at(self, amount: float) -> float:
        if amount <= self.left + 1e-6 or not amount:
            return self.at
        if self.window_end is not None:
            return self.window_end
        return self.at + (amount - self.left) * 60.0 / self.rule.amount

    def take(self, amount: float) -> int:
        self.left -= amount
        return self.window

    def give_back(self, amount: float, window: int) -> None:
        if window == self.window:
            self.left = min(self.rule.amount, self.left + amount)


def served_in_order(jobs: list[Job], slots: int, rules: list[Rule]) -> list[float]:
    """Return when each call is sent if all are sent in the order of arrival."""
    pools = [Pool(rule) for rule in rules]
    units = [UNITS.index(rule.unit) for rule in rules]
    ends: list[tuple[float, int, list[int]]] = []
    arriving, queue = deque(enumerate(jobs)), deque[int]()
    sent = [math.inf] * len(jobs)
    now = 0.0
    while arriving or queue:
        for pool in pools:
            pool.advance(now)
        while ends and ends[0][0] <= now:
            _, one, windows = heapq.heappop(ends)
            for pool, unit, window in zip(pools, units, windows, strict=True):
                pool.give_back(jobs[one].reserved[unit] - jobs[one].used[unit], window)
        while arriving and arriving[0][1].arrival <= now:
            queue.append(arriving.popleft()[0])
        ready = math.inf
        while queue and len(ends) < slots:
            wanted = jobs[queue[0]].reserved
            ready = max(pool.available_at(wanted[unit]) for pool, unit in zip(pools, units, strict=True))
            if ready > now:
                break
            windows = [pool.take(wanted[unit]) for pool, unit in zip(pools, units, strict=True)]
            sent[queue[0]], ready = now, math.inf
            heapq.heappush(ends, (now + jobs[queue[0]].duration, queue.popleft(), windows))
        now = min(ready, ends[0][0] if ends else math.inf, arriving[0][1].arrival if arriving else math.inf)
    return sent


# --- the account ---


class NumberedWaiter:
    """A numbered waiter that records its decision and its wake-up time."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.gone = False
        self.decision: Admitted | Rejected | None = None
        self.wake_time = math.inf

    def resolve(self, decision: Admitted | Rejected) -> bool:
        self.decision = decision
        return True

    def wake_at(self, when: float) -> bool:
        self.wake_time = when
        return True


class BypassCountingAccount(Account):
    """An account that allows a number of bypasses, and records which calls the last one overtook."""

    bypasses = 1_000_000_000  # still allowed
    overtaken: Sequence[NumberedWaiter] = ()

    def _bypass_head(self, now: float) -> float:
        if not self.bypasses:
            return math.inf
        queued = list(self.queue.in_order())
        seconds = super()._bypass_head(now)
        if not seconds:
            self.bypasses -= 1
            overtaken = itertools.takewhile(lambda waiting: waiting.is_queued, queued)
            self.overtaken = [waiting.waiter for waiting in overtaken if isinstance(waiting.waiter, NumberedWaiter)]
        return seconds


def account_of(slots: int, rules: list[Rule], usd: float = math.inf) -> BypassCountingAccount:
    given = [rule for rule in rules if rule.window_end is None]
    quotas = RateLimiter(Quota(**{rule.unit: rule.amount}, per="minute", strict=False) for rule in given)
    for rule in rules:
        if rule.window_end is not None:  # as if learned from headers
            observed = quotas._observe(0.0, rule.unit, rule.amount, 60.0, rule.amount)
            observed.doubt = QuotaDoubt(1e12, rule.amount, 1.0)  # no trials: they exceed the quota
            observed.bucket.window_end, observed.bucket.window_delay = rule.window_end, 0.0
    return BypassCountingAccount(
        "upstream:test",
        limit=FixedLimit(slots),
        quotas=quotas,
        breaker=Breaker(UPSTREAM_RULES, draw=lambda: 0.5),
        budgets=lambda _: () if usd == math.inf else (ConstantBudget(usd),),
        max_wait=1e9,
        draw=lambda: 0.5,
    )


class NothingHeld:
    """Dollars held of a `ConstantBudget`."""

    def settle(self, usd: float) -> None:
        del usd

    def revise(self, usd: float) -> None:
        del usd


class ConstantBudget:
    """A budget whose spend stays 0."""

    name = "the budget"

    def __init__(self, usd: float) -> None:
        self.usd = usd

    def can_afford(self, usd: float, priority: Priority) -> bool:
        return usd <= self.usd / (1 + priority)

    def try_reserve(self, usd: float, priority: Priority) -> NothingHeld:
        del usd, priority
        return NothingHeld()

    def rejection(self, usd: float, priority: Priority) -> Rejected:
        del priority
        return Rejected(f"{usd} is too much", "budget", 0.0, None)


class Run:
    """The calls of `jobs` through an account, by time: at one moment the ends come before the arrivals."""

    def __init__(self, jobs: list[Job], slots: int, rules: list[Rule], bypasses: int = 1_000_000_000) -> None:
        self.account = account_of(slots, rules)
        self.account.bypasses = bypasses
        self.jobs = jobs
        self.waiting: dict[int, NumberedWaiter] = {}
        self.ends: list[tuple[float, int, Permit]] = []
        self.sent = [math.inf] * len(jobs)

    def served(self) -> list[float]:
        """Return when each call is sent."""
        arriving = deque(enumerate(self.jobs))
        now = 0.0
        while arriving or self.waiting:
            while self.ends and self.ends[0][0] <= now:
                _, number, permit = heapq.heappop(self.ends)
                job = self.jobs[number]
                self.account.settle(now, permit, CallOutcome(kind=Outcome.SUCCESS, used=job.charge(job.used)))
            self.serve_queue(now)
            while arriving and arriving[0][1].arrival <= now:
                self.arrive(now, *arriving.popleft())
            wake_times = [caller.wake_time for caller in self.waiting.values() if caller.wake_time > now]
            now = min(
                [
                    *wake_times,
                    *([self.ends[0][0]] if self.ends else []),
                    *([arriving[0][1].arrival] if arriving else []),
                ],
                default=math.inf,
            )
            assert now < math.inf or not (arriving or self.waiting), "a call waits, and no event can serve it"
        return self.sent

    def arrive(self, now: float, number: int, job: Job) -> None:
        request = CallRequest(charge=job.charge(job.reserved))
        answer = self.account.try_acquire(now, request)
        if isinstance(answer, Admitted):
            self.send(now, number, answer.permit)
            return
        assert isinstance(answer, Queued), answer
        self.waiting[number] = NumberedWaiter(number)
        self.account.queue.enqueue(now, request, self.waiting[number])
        self.serve_queue(now)

    def serve_queue(self, now: float) -> None:
        self.account.serve_queue(now)
        for number, caller in list(self.waiting.items()):
            if caller.decision is not None:
                assert isinstance(caller.decision, Admitted)
                self.send(now, number, caller.decision.permit)
                del self.waiting[number]

    def send(self, now: float, number: int, permit: Permit) -> None:
        self.sent[number] = now
        heapq.heappush(self.ends, (now + self.jobs[number].duration, number, permit))


@st.composite
def jobs_of(draw: st.DrawFn, rules: list[Rule]) -> list[Job]:
    most = {rule.unit: rule.amount for rule in rules}
    jobs = []
    for arrival in sorted(draw(st.lists(st.integers(0, 40), min_size=3, max_size=24))):
        reserved, used = [], []
        for unit in UNITS:
            amount = draw(st.sampled_from([0, 1, most.get(unit, 9) // 10, most.get(unit, 9) // 2, most.get(unit, 9)]))
            reserved.append(amount)
            used.append(draw(st.integers(0, amount)))
        duration = draw(st.integers(1, 90))
        amounts = (reserved[0], reserved[1], reserved[2]), (used[0], used[1], used[2])
        jobs.append(Job(float(arrival), float(duration), *amounts))
    return jobs


# Amounts that refill without rounding: else the account could send a call just before a window ends, and the model at
# its end.
RULES = st.lists(
    st.builds(Rule, st.sampled_from(UNITS), st.sampled_from([15, 30, 60]), st.sampled_from([None, None, 7.0, 50.0])),
    min_size=1,
    max_size=3,
    unique_by=lambda rule: rule.unit,
)
CHAT, EMBEDDING = (1, 10, 50), (1, 10, 0)  # a chat produces output tokens, an embedding none
TOKEN_QUOTAS = [Rule("input_tokens", 60, None), Rule("output_tokens", 60, None)]


class Case(NamedTuple):
    """Calls to one account."""

    rules: list[Rule]
    slots: int
    jobs: list[Job]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rules = draw(RULES)
    return Case(rules, draw(st.sampled_from([1, 2, 3, 5, 40])), draw(jobs_of(rules)))


# The tenth waits much longer than the others: one after the other, nearly all behind it are promoted one priority.
DURATIONS = (6, 1, 1, 1, 1, 1, 1, 2, 4, 21, *[1] * 14)
ARRIVALS = (*[0] * 19, 5, 5, 5, 12, 14)
PROMOTED = Case(
    [Rule("requests", 6, None)],
    1,
    [Job(arrival, duration, (0, 0, 0), (0, 0, 0)) for arrival, duration in zip(ARRIVALS, DURATIONS, strict=True)],
)

# One call overtakes in one window, ends in the next, and must give back nothing there: else the fourth would be sent
# and end earlier, and the amount that it gives back would be lost to the eleventh, because the bucket would be full.
TWO_WINDOWS = Case(
    [Rule("requests", 6, 7.0), Rule("input_tokens", 6, 7.0), Rule("output_tokens", 6, 50.0)],
    40,
    [
        Job(0.0, duration, reserved, used)
        for duration, reserved, used in (
            (35, (0, 0, 1), (0, 0, 1)), (1, (0, 0, 0), (0, 0, 0)), (28, (0, 1, 6), (0, 0, 0)),
            (65, (0, 6, 1), (0, 0, 0)), (15, (6, 3, 0), (0, 0, 0)), *[(1, (0, 0, 0), (0, 0, 0))] * 4,
            (2, (1, 6, 0), (0, 0, 0)), (1, (0, 1, 0), (0, 0, 0)), (1, (0, 0, 0), (0, 0, 0)), (16, (0, 0, 1), (0, 0, 0)),
        )
    ],
)  # fmt: skip


@given(cases())
@example(PROMOTED)
def test_no_call_is_served_later_than_in_a_strict_queue(case: Case) -> None:
    rules, slots, jobs = case.rules, case.slots, [job._replace(used=job.reserved) for job in case.jobs]
    strict = served_in_order(jobs, slots, rules)
    for number, (at, without) in enumerate(zip(Run(jobs, slots, rules).served(), strict, strict=True)):
        assert at <= without + 1e-3, f"call {number} is sent at {at}; without bypass it is sent at {without}"


@given(cases())
@example(PROMOTED)
@example(TWO_WINDOWS)
def test_no_overtaken_call_is_served_later_whatever_calls_in_flight_give_back(case: Case) -> None:
    rules, slots, jobs = case
    before, bypasses = Run(jobs, slots, rules, bypasses=0).served(), 0
    assert before == pytest.approx(served_in_order(jobs, slots, rules), abs=1e-3)
    while True:
        run = Run(jobs, slots, rules, bypasses=bypasses + 1)
        after = run.served()
        if run.account.bypasses:
            return
        for caller in run.account.overtaken:
            one = caller.number
            assert after[one] <= before[one] + 1e-3, f"bypass {bypasses}: {one} at {after[one]}, not at {before[one]}"
        before, bypasses = after, bypasses + 1


def new_account(*rules: Rule, slots: int = 9, usd: float = math.inf) -> Account:
    return account_of(slots, list(rules) or TOKEN_QUOTAS, usd)


def request(account: Account, reserved: tuple[int, int, int], now: float = 0.0, **how: object) -> NumberedWaiter:
    """Request a permit for a call that reserves these amounts; return its waiter, decided at once or queued."""
    caller = NumberedWaiter()
    call = CallRequest(charge=Charge(**dict(zip(UNITS, reserved, strict=True))), **how)  # type: ignore[arg-type]
    answer = account.try_acquire(now, call)
    if isinstance(answer, Queued):
        account.queue.enqueue(now, call, caller)
        account.serve_queue(now)
    else:
        caller.decision = answer
    return caller


def admitted(caller: NumberedWaiter) -> bool:
    return isinstance(caller.decision, Admitted)


def test_a_call_that_uses_other_quotas_overtakes_a_head_that_waits_for_its_own() -> None:
    account = new_account()
    assert admitted(request(account, CHAT))
    head = request(account, CHAT)
    assert admitted(request(account, EMBEDDING))
    account.serve_queue(39.9)
    assert head.decision is None
    account.serve_queue(40.0)  # it needs 50 at 60 a minute, and 10 were left
    assert admitted(head)


def test_a_small_call_does_not_overtake_if_it_uses_the_quota_that_the_head_waits_for() -> None:
    account = new_account()
    request(account, CHAT)
    assert not admitted(request(account, CHAT))
    assert not admitted(request(account, (1, 1, 1)))


def test_an_amount_that_refills_before_the_head_is_served_may_be_used() -> None:
    account = new_account()
    first = request(account, CHAT)
    assert isinstance(first.decision, Admitted)
    # So nothing is in flight that could serve the head earlier.
    account.settle(0.0, first.decision.permit, SUCCESS)
    assert not admitted(request(account, (1, 20, 50)))  # the head goes in 40 s, with 40 more input tokens
    assert admitted(request(account, (1, 50, 0)))
    assert not admitted(request(account, (1, 50, 0)))


def test_an_amount_that_a_call_in_flight_may_give_back_is_kept_for_the_head() -> None:
    account = new_account()
    request(account, CHAT)  # it may turn out to have produced no output
    assert not admitted(request(account, (1, 20, 50)))
    assert admitted(request(account, (1, 30, 0)))
    assert not admitted(request(account, (1, 1, 0)))


def test_the_needs_of_all_calls_ahead_are_kept_for_them() -> None:
    account = new_account()
    request(account, CHAT)
    request(account, CHAT)
    request(account, (1, 30, 50))
    assert admitted(request(account, (1, 10, 0)))
    assert not admitted(request(account, (1, 10, 0)))  # of 40 input tokens left, the head needs 10 and the next 30


def test_the_rest_of_a_window_may_be_used_before_it_ends() -> None:
    account = new_account(Rule("input_tokens", 60, 30.0))
    first = request(account, (1, 40, 0))
    assert isinstance(first.decision, Admitted)
    account.settle(0.0, first.decision.permit, SUCCESS)
    head = request(account, (1, 50, 0))
    assert admitted(request(account, (1, 15, 0)))
    assert not admitted(request(account, (1, 15, 0)))  # the window has too little left
    account.serve_queue(30.0)
    assert admitted(head)


def test_the_head_wakes_when_a_later_call_can_overtake_it() -> None:
    account = new_account()
    for reserved in ((1, 60, 0), (0, 0, 60)):
        caller = request(account, reserved)
        assert isinstance(caller.decision, Admitted)
        account.settle(0.0, caller.decision.permit, SUCCESS)
    head = request(account, (1, 0, 60))
    later = request(account, (1, 15, 0))
    assert not admitted(later)
    assert head.wake_time == 15.0
    account.serve_queue(15.0)
    assert admitted(later)
    assert not admitted(head)


def test_a_slot_is_kept_for_each_overtaken_call() -> None:
    account = new_account(slots=4)
    request(account, CHAT)
    head = request(account, CHAT)
    assert admitted(request(account, (0, 0, 0)))
    request(account, CHAT)
    assert not admitted(request(account, (0, 0, 0)))  # it may run longer than the two ahead wait for tokens
    account.serve_queue(40.0)
    assert admitted(head)


class GrowingLimit(FixedLimit):
    """A limit that grows by one with each accepted call, as an adaptive limit does on its way up."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.accepted_calls = 0

    def limit(self, now: float) -> int:
        return super().limit(now) + self.accepted_calls

    def accepted(self, now: float, grant: Grant) -> None:
        super().accepted(now, grant)
        self.accepted_calls += 1


def test_the_head_wakes_when_an_accepted_call_raises_the_limit() -> None:
    account = new_account()
    account.limit = GrowingLimit(2)
    request(account, CHAT)
    head, other = request(account, CHAT), request(account, EMBEDDING)
    assert other.decision is None  # the only slot is the head's
    assert head.wake_time == 1.0  # a call counts as accepted so long after it was sent
    account.serve_queue(1.0)
    assert admitted(other)


def test_dollars_are_kept_for_each_overtaken_call_by_the_share_of_the_lowest_priority() -> None:
    account = new_account(usd=13.5)
    request(account, CHAT, usd=1.0)
    request(account, CHAT, usd=2.0)  # NORMAL calls may use a third of the budget
    assert admitted(request(account, EMBEDDING, usd=2.5))  # no dollar of it has been spent
    assert not admitted(request(account, EMBEDDING, usd=2.6))
    assert not admitted(request(account, EMBEDDING, usd=0.1))  # it is behind a call that reserves 2.6


def test_only_the_first_calls_of_the_queue_may_overtake() -> None:
    account = new_account(Rule("output_tokens", 60, None), slots=99)
    request(account, CHAT)
    for _ in range(LOOK_AHEAD - 1):
        request(account, CHAT)
    assert admitted(request(account, EMBEDDING))
    request(account, CHAT)
    assert not admitted(request(account, EMBEDDING))


def test_an_overtaking_call_does_not_change_the_order_of_tenants() -> None:
    account = new_account()
    request(account, CHAT)
    head = request(account, CHAT, tenant="a")
    for _ in range(5):
        request(account, CHAT, tenant="a")
    assert admitted(request(account, (1, 0, 0), tenant="a"))
    other = request(account, CHAT, tenant="b")
    account.serve_queue(40.0)
    account.serve_queue(100.0)
    assert admitted(head)
    assert admitted(other)  # served second after the head, not behind all calls ahead of the one that overtook


def test_no_call_overtakes_while_the_breaker_is_not_closed() -> None:
    account = new_account()
    request(account, CHAT)
    request(account, CHAT)
    account.breaker.trip(0.0)
    assert account.breaker.retry_after(0.0)
    when = account.breaker.retry_after(0.0) or 0.0
    assert account.breaker.ready(when + 0.1)
    caller = request(account, EMBEDDING, now=when + 0.1)
    assert not admitted(caller)
